"""Quality-control pass rate of generated cells, beside that of real cells."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvi_cradle._constants import QC_CRITERIA, QC_UNS_KEY
from scvi_cradle._matrix import check_counts, get_matrix
from scvi_cradle._qc import check_record, flag_cells, qc_metrics, record_gene_masks
from scvi_cradle._validation import as_flags, check_key, check_tables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

ALL_LABELS = "all"


def qc_pass_rate(
    real: AnnData,
    predicted: AnnData,
    *,
    perturbation_key: str = "perturbation",
    thresholds: Mapping[str, Any] | None = None,
    layer: str | None = None,
    batch_key: str | None = None,
    artifact_key: str | None = None,
) -> pd.DataFrame:
    """Compute the share of generated cells that pass the thresholds of the real data, label by label.

    Metrics are computed anew from the counts of both sides. Doublets have no threshold: a doublet is a pair of real
    cells, and calls on generated cells mean nothing, so the criterion is left out and named.

    Parameters
    ----------
    real
        Real cells with raw counts.
    predicted
        Generated cells with raw counts and the genes of ``real`` in any order.
    perturbation_key
        Column of labels in both; labels are compared as they are written.
    thresholds
        Record of :func:`scvi_cradle.pp.qc_label`; ``None``: ``real.uns["qc_label"]``.
    layer
        Layer with the counts of ``real``, and of ``predicted`` where it has that layer; ``None``: the layer of the
        record, or ``X``.
    batch_key
        Column of batches; ``None``: the record's. When thresholds differ between batches and a side lacks the column,
        both sides are compared with the thresholds' mean over batches.
    artifact_key
        Boolean column of ``real``, True = failed; ``None``: the record's column if ``real`` has it.

    Returns
    -------
    Rows: labels in the order of ``predicted``, then ``"all"``: all its cells, and all real cells with these labels.
    Columns: ``generated``, ``real``, ``real_passed`` (among real cells that are not flagged, NaN without flags): share
    of cells within all thresholds, 0 to 1; ``generated_<criterion>``, ``real_<criterion>``; ``n_generated``,
    ``n_real``; ``criteria_left_out``. Rates over no cell are NaN.

    Raises
    ------
    KeyError
        If a column or a layer is missing.
    TypeError
        If ``obs`` or ``var`` are not in memory (``read_lazy``).
    ValueError
        For values that are not counts, for genes other than those of the record, unknown batches, or without
        thresholds.

    Warns
    -----
    UserWarning
        If thresholds per batch are averaged.

    References
    ----------
    CRADLE-VAE's QCPR; it calls doublets on generated cells and counts the larger class as passed, both not done here.
    """
    check_tables(real, "real")
    check_tables(predicted, "predicted")
    record = _record(real, thresholds)
    for side, name in ((real, "real.obs"), (predicted, "predicted.obs")):
        check_key(side.obs, perturbation_key, name, "perturbation_key")
    flagged = _artifacts(real, artifact_key, record)
    batches = _batches(real, predicted, batch_key, record)
    layer = layer or str(record.get("layer", "")) or None
    passes = {
        "generated": _passes(predicted, layer if layer in predicted.layers else None, record, batches[1], "predicted"),
        "real": _passes(real, layer, record, batches[0], "real"),
    }
    wanted = predicted.obs[perturbation_key].astype(str).to_numpy(dtype=str)
    observed = real.obs[perturbation_key].astype(str).to_numpy(dtype=str)
    labels = list(dict.fromkeys(wanted.tolist()))
    rows = [_row(passes, flagged, wanted == label, observed == label) for label in labels]
    rows.append(_row(passes, flagged, np.ones(len(wanted), dtype=bool), np.isin(observed, labels)))
    table = pd.DataFrame(rows, index=pd.Index([*labels, ALL_LABELS], name="perturbation"))
    table["criteria_left_out"] = QC_CRITERIA.DOUBLET if QC_CRITERIA.DOUBLET in np.asarray(record["criteria"]) else ""
    return table


def _record(real: AnnData, thresholds: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if thresholds is None and QC_UNS_KEY not in real.uns:
        msg = (
            f"A pass rate needs thresholds; received thresholds=None and no `uns[{QC_UNS_KEY!r}]` in `real`: "
            "run `pp.qc_label` on it."
        )
        raise ValueError(msg)
    record = real.uns[QC_UNS_KEY] if thresholds is None else thresholds
    check_record(record)
    if not any(c in record["thresholds"] for c in np.asarray(record["criteria"])):
        msg = "A pass rate needs a criterion with a threshold; received only 'doublet': run `pp.qc_label` with others."
        raise ValueError(msg)
    return record


def _artifacts(real: AnnData, artifact_key: str | None, record: Mapping[str, Any]) -> np.ndarray | None:
    key = artifact_key or str(record.get("key_added", ""))
    if artifact_key is None and key not in real.obs:
        return None
    check_key(real.obs, key, "real.obs", "artifact_key")
    return as_flags(real.obs[key], f"`real.obs[{key!r}]`", "run `pp.qc_label` to get such a column")


def _batches(
    real: AnnData, predicted: AnnData, batch_key: str | None, record: Mapping[str, Any]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    fitted = str(record.get("batch_key", ""))
    key = batch_key or fitted
    if not fitted or len(np.asarray(record["batches"]).ravel()) == 1:
        return None, None
    if key in real.obs and key in predicted.obs:
        of_real, of_predicted = (side.obs[key].astype(str).to_numpy(dtype=str) for side in (real, predicted))
        return of_real, of_predicted
    text = f"Thresholds were fitted per batch, and one side has no `obs[{key!r}]`: their mean over batches is used."
    warnings.warn(text, UserWarning, stacklevel=3)
    return None, None


def _passes(
    adata: AnnData, layer: str | None, record: Mapping[str, Any], batches: np.ndarray | None, side: str
) -> pd.DataFrame:
    matrix = get_matrix(adata, layer)
    check_counts(matrix, f"`{side}.X`" if layer is None else f"`{side}.layers[{layer!r}]`")
    metrics = qc_metrics(matrix, record_gene_masks(record, adata.var_names, f"`{side}`"))
    return ~flag_cells(metrics, record, batches)


def _row(
    passes: dict[str, pd.DataFrame], flagged: np.ndarray | None, generated: np.ndarray, real: np.ndarray
) -> dict[str, float | int]:
    cells = {side: passes[side][mask] for side, mask in (("generated", generated), ("real", real))}
    row: dict[str, float | int] = {side: _rate(cells[side].all(axis=1)) for side in cells}
    row["real_passed"] = np.nan if flagged is None else _rate(passes["real"][real & ~flagged].all(axis=1))
    row |= {f"{side}_{c}": _rate(frame[c]) for side, frame in cells.items() for c in frame.columns}
    return row | {f"n_{side}": len(frame) for side, frame in cells.items()}


def _rate(passed: pd.Series) -> float:
    return float(passed.mean()) if len(passed) else np.nan
