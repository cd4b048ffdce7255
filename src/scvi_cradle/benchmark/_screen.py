"""A data set as the demo and the benchmark read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle._constants import COLUMNS, QC_UNS_KEY
from scvi_cradle._labels import LabelRule, canonical_labels, check_has_control
from scvi_cradle._matrix import check_counts, get_matrix, to_csr
from scvi_cradle._validation import as_flags, check_key, check_unique_names, preview

MIN_CELLS, FEWEST_CELLS = 5, 2
SPLIT_VALUES = ("train", "val", "test", "unused")


def read_counts(path: Path, perturbation_key: str | None, layer: str | None) -> AnnData:
    """Read an AnnData file with raw counts of uniquely named genes and a column of labels.

    Raises
    ------
    FileNotFoundError, KeyError, ValueError
        In one sentence, for a file that is not there or not one, and for what it lacks.
    """
    if not path.is_file():
        msg = f"The data must be an AnnData file (.h5ad); received {str(path)!r}, which is not there."
        raise FileNotFoundError(msg)
    try:
        adata = anndata.read_h5ad(path)
    except Exception as error:
        msg = f"The data must be an AnnData file (.h5ad); received {str(path)!r}, which cannot be read as one: {first_line(error)}."
        raise ValueError(msg) from error
    if perturbation_key is None:
        msg = f"`--perturbation-key` must name the column with the perturbation labels; the columns are {preview(adata.obs, 12)}."
        raise ValueError(msg)
    check_key(adata.obs, perturbation_key, "adata.obs", "perturbation_key")
    check_counts(get_matrix(adata, layer), "`X`" if layer is None else f"`layers[{layer!r}]`")
    check_unique_names(adata.var_names, "Gene")
    return adata


def first_line(error: Exception) -> str:
    """Return the first line of a message, without its full stop."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return (text.strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@dataclass(frozen=True)
class Screen:
    """Counts and labels, and nothing else of the file.

    Parameters
    ----------
    adata
        Raw counts in ``X`` (CSR); ``obs``: ``"perturbation"`` (canonical labels) and ``"batch"``; boolean columns of
        ``var``.
    rule
        How the labels are read.
    failed
        Flags of the user, shape ``(n_cells,)``, or ``None``.
    record
        Thresholds behind these flags, or ``None``.
    split
        Split of the user, shape ``(n_cells,)``, or ``None``.
    """

    adata: AnnData
    rule: LabelRule
    failed: np.ndarray | None = None
    record: dict[str, Any] | None = None
    split: np.ndarray | None = None

    @property
    def labels(self) -> np.ndarray:
        """Canonical label of every cell, shape ``(n_cells,)``."""
        return self.adata.obs[COLUMNS.PERTURBATION].astype(str).to_numpy()

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of functions that take the labels of :attr:`adata`."""
        return {"perturbation_key": COLUMNS.PERTURBATION, "control": self.rule.control_name, "sep": self.rule.sep}

    @property
    def batch_key(self) -> str | None:
        """Column of batches, if there are any."""
        return "batch" if "batch" in self.adata.obs else None

    @property
    def perturbations(self) -> list[str]:
        """Canonical labels without the control, sorted."""
        return sorted(set(self.labels) - {self.rule.control_name})

    @property
    def targets(self) -> list[str]:
        """All treatments, sorted."""
        return sorted({t for label in self.perturbations for t in self.rule.treatments(label)})


def read_screen(
    path: Path,
    perturbation_key: str,
    *,
    rule: LabelRule,
    layer: str | None = None,
    batch_key: str | None = None,
    artifact_key: str | None = None,
    split_key: str | None = None,
) -> Screen:
    """Read and check a file.

    Raises
    ------
    FileNotFoundError, KeyError, ValueError
        For input that cannot be used, in one sentence.
    """
    file = read_counts(path, perturbation_key, layer)
    labels = canonical_labels(file.obs[perturbation_key], rule)
    check_has_control(labels, rule, f"`obs[{perturbation_key!r}]`")
    if len(labels.categories) < 2:
        msg = f"`obs[{perturbation_key!r}]` must hold at least one perturbation; received only {rule.control_name!r}."
        raise ValueError(msg)
    obs = pd.DataFrame({COLUMNS.PERTURBATION: labels}, index=file.obs_names.astype(str))
    if batch_key is not None:
        obs["batch"] = pd.Categorical(_column(file, batch_key, "batch_key").astype(str))
    failed, record = _flags(file, artifact_key)
    split = None if split_key is None else _split(file, split_key)
    var = file.var[[c for c in file.var if file.var[c].dtype == bool]]
    adata = AnnData(to_csr(get_matrix(file, layer)).astype(np.float32), obs=obs, var=var.copy())
    adata.obs_names_make_unique()
    canonical = LabelRule.create(rule.control_name, rule.sep)
    return Screen(adata, canonical, failed, record, split)


def _column(adata: AnnData, key: str, argument: str) -> pd.Series:
    check_key(adata.obs, key, "adata.obs", argument)
    column = adata.obs[key]
    if column.isna().any():
        msg = f"`obs[{key!r}]` must have a value for every cell; received {int(column.isna().sum())} missing values."
        raise ValueError(msg)
    return column


def _flags(adata: AnnData, key: str | None) -> tuple[np.ndarray | None, dict[str, Any] | None]:
    if key is None:
        return None, None
    check_key(adata.obs, key, "adata.obs", "artifact_key")
    failed = as_flags(adata.obs[key], f"`obs[{key!r}]`", "drop these cells, or leave out `--artifact-key`")
    record = adata.uns.get(QC_UNS_KEY)
    made_here = record is not None and str(record.get("key_added", "")) == key
    # counts and batches of the screen are found under other names than in the file
    return failed, {**record, "layer": "", "batch_key": str(record["batch_key"]) and "batch"} if made_here else None


def _split(adata: AnnData, key: str) -> np.ndarray:
    split = _column(adata, key, "split_key").astype(str).to_numpy()
    unknown = sorted(set(split) - set(SPLIT_VALUES))
    if unknown or not {"train", "test"} <= set(split):
        received = preview(unknown or sorted(set(split)))
        msg = f"`obs[{key!r}]` must hold only {SPLIT_VALUES}, 'train' and 'test' among them; received {received}: see `scvi_cradle.pp.split_perturbations`."
        raise ValueError(msg)
    return split


def scored_labels(
    labels: np.ndarray, split: np.ndarray, failed: np.ndarray, control: str, candidates: list[str] | None = None
) -> tuple[list[str], str, int]:
    """Choose what is predicted: labels with enough held-out cells that passed quality control.

    Parameters
    ----------
    labels, split, failed
        Of every cell, shape ``(n_cells,)``.
    control
        Label of controls.
    candidates
        Labels to choose among. Default: all with held-out cells.

    Returns
    -------
    The labels, sorted; the part of the split that the controls of the measured effects are from (no method is trained
    on it); and the number of cells that was enough.

    Raises
    ------
    ValueError
        If no label, or no part, has enough.
    """
    n_cells = pd.Series(labels[(split == "test") & ~failed]).value_counts()
    if candidates is None:
        candidates = sorted(n_cells.index.drop(control, errors="ignore"))
    counts = n_cells.reindex(candidates).fillna(0)
    enough = MIN_CELLS if (counts >= MIN_CELLS).any() else FEWEST_CELLS
    kept = [label for label in candidates if counts[label] >= enough]
    if not kept:
        msg = (
            f"A perturbation to predict must have {FEWEST_CELLS} held-out cells that pass quality control; received none "
            f"among {preview(candidates) or 'no label'}: use more cells, or wider QC thresholds."
        )
        raise ValueError(msg)
    controls = (labels == control) & ~failed
    part = "test" if (controls & (split == "test")).sum() >= 2 else "val"
    if (controls & (split == part)).sum() < 2 or not (controls & (split == "train")).any():
        msg = (
            "Control cells that pass quality control are needed for training and for testing (2 at least); received "
            f"{int(controls.sum())} in all: use more controls, or wider QC thresholds."
        )
        raise ValueError(msg)
    return kept, part, enough
