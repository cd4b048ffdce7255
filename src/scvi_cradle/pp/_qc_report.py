"""Which perturbations fail quality control more often than controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from scvi_cradle._constants import QC_CRITERIA
from scvi_cradle._labels import LabelRule, canonical_labels, check_has_control
from scvi_cradle._qc import association_table
from scvi_cradle._validation import as_flags, check_key, check_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

REMEDY = "run `pp.qc_label` to get such a column"


def qc_report(
    adata: AnnData,
    perturbation_key: str,
    *,
    control: str | Sequence[str | None] = "control",
    sep: str | None = "+",
    artifact_key: str = "artifact",
    batch_key: str | None = None,
) -> pd.DataFrame:
    """Compare how often cells of each perturbation and controls fail quality control.

    Where they differ much, the "artifact" is an effect of the perturbation, and a model that removes it removes
    biology: leave that criterion out, or the perturbation.

    Parameters
    ----------
    adata
        Data with flags, usually from :func:`scvi_cradle.pp.qc_label`.
    perturbation_key
        Column of ``obs`` with perturbation labels.
    control, sep
        Label (or labels) of controls, and the text between the treatments of a combination.
    artifact_key
        Boolean column of ``obs``, True = failed.
    batch_key
        Column of ``obs``: cells are compared with controls of their batch only.

    Returns
    -------
    One row per perturbation, sorted, without the control:

    - ``n_cells``; ``fail_rate`` and ``control_fail_rate``, between 0 and 1 (with batches, the controls' rate is
      weighted by the perturbation's cells per batch);
    - ``odds_ratio``, ``pvalue``: Fisher's exact test, with batches the Cochran-Mantel-Haenszel test; where the table
      has an empty cell 0.5 is added, so that the ratio is finite; ``qvalue``: Benjamini-Hochberg;
    - ``main_criterion``: the criterion of ``obs["qc_<criterion>"]`` with the largest excess over controls, or ``""``;
    - ``confounded``: qvalue < 0.05, odds ratio > 2 and a failure rate more than 0.1 above the controls'.

    Raises
    ------
    KeyError
        If a column is missing.
    TypeError
        If ``obs`` or ``var`` are not in memory (``read_lazy``).
    ValueError
        For labels that cannot be read, no control cell, flags that are not boolean, missing batches.
    """
    check_tables(adata)
    check_key(adata.obs, perturbation_key, "adata.obs", "perturbation_key")
    if artifact_key not in adata.obs:
        msg = f"`artifact_key` must be a column of `adata.obs`; received {artifact_key!r}: {REMEDY}."
        raise KeyError(msg)
    rule = LabelRule.create(control, sep)
    labels = canonical_labels(adata.obs[perturbation_key], rule)
    check_has_control(labels, rule, f"`obs[{perturbation_key!r}]`")
    flags = as_flags(adata.obs[artifact_key], f"`obs[{artifact_key!r}]`", REMEDY)
    found = [c for c in QC_CRITERIA if f"qc_{c}" in adata.obs]
    criteria = pd.DataFrame({c: as_flags(adata.obs[f"qc_{c}"], f"`obs['qc_{c}']`", REMEDY) for c in found})
    batches = None
    if batch_key is not None:
        check_key(adata.obs, batch_key, "adata.obs", "batch_key")
        column = adata.obs[batch_key]
        if column.isna().any():
            n_missing = int(column.isna().sum())
            msg = f"`obs[{batch_key!r}]` must name the batch of every cell; received {n_missing} missing values."
            raise ValueError(msg)
        batches = column.astype(str).to_numpy(dtype=str)
    return association_table(labels, flags, rule.control_name, criteria, batches)
