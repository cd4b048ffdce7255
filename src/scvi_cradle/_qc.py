"""The quality-control rule: metrics, thresholds, flags and their association with perturbations. Pure functions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_cradle._association import association_table
from scvi_cradle._constants import QC_CRITERIA, QC_UNS_KEY
from scvi_cradle._matrix import map_blocks
from scvi_cradle._validation import as_flags, preview

__all__ = [
    "association_table",
    "check_record",
    "fit_thresholds",
    "flag_cells",
    "gene_set_hash",
    "gene_set_masks",
    "on_scale",
    "qc_metrics",
    "record_gene_masks",
]

GENE_SET_PATTERNS: dict[str, str] = {
    "mt": r"^MT-",
    "ribo": r"^RP[SL]",
    "hb": r"^HB(A[12]?|B|D|E1|G[12]|M|Q1[AB]?|Z|A-(A\d|X)|B-(B[ST12]|BH\d|Y))$",
}
"""Gene symbols of human (``MT-ND1``) and mouse (``mt-Nd1``); matched without regard to case."""
PCT_CRITERIA = {QC_CRITERIA.PCT_MT: "mt", QC_CRITERIA.PCT_RIBO: "ribo", QC_CRITERIA.PCT_HB: "hb"}
"""Criteria on percentages and the gene set that each one counts."""
COUNT_CRITERIA = (QC_CRITERIA.TOTAL_COUNTS, QC_CRITERIA.N_GENES)
MAD_SCALE = {"cradle": 1.0, "robust": 1.4826}
ALL_CELLS = "all"
"""Name of the only batch of a record that was fitted without batches."""


def gene_set_masks(var: pd.DataFrame) -> dict[str, np.ndarray]:
    """Mark the mitochondrial, ribosomal and haemoglobin genes, one boolean array of shape ``(n_genes,)`` each.

    Parameters
    ----------
    var
        Gene table with symbols as index. A boolean column ``mt``, ``ribo`` or ``hb`` replaces the symbols' pattern.

    Raises
    ------
    ValueError
        If such a column holds anything but True/False or 0/1.
    """
    masks = {}
    for name, pattern in GENE_SET_PATTERNS.items():
        if name in var.columns:
            masks[name] = as_flags(var[name], f"`var[{name!r}]`", "rename the column if it does not mark the gene set")
        else:
            symbol = re.compile(pattern, re.IGNORECASE)
            masks[name] = np.array([bool(symbol.match(str(g))) for g in var.index], dtype=bool)
    return masks


def gene_set_hash(genes: Iterable[object], gene_sets: Mapping[str, Iterable[object]]) -> str:
    """Return a SHA-256 of all gene names and of the members of each set; the order of genes does not matter."""
    parts = [sorted(map(str, genes)), *(sorted(map(str, gene_sets[name])) for name in GENE_SET_PATTERNS)]
    return hashlib.sha256("\n\n".join("\n".join(p) for p in parts).encode()).hexdigest()


def qc_metrics(matrix: Any, gene_sets: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Compute the metrics of every cell in float64, by blocks and without a dense copy.

    Parameters
    ----------
    matrix
        Counts of shape ``(n_cells, n_genes)`` in any storage.
    gene_sets
        Boolean arrays ``mt``, ``ribo``, ``hb`` of shape ``(n_genes,)``.

    Returns
    -------
    Columns ``total_counts``, ``n_genes``, ``pct_mt``, ``pct_ribo``, ``pct_hb`` (0 to 100; NaN without counts).
    """
    masks = np.column_stack([np.asarray(gene_sets[name], dtype=np.float64) for name in PCT_CRITERIA.values()])

    def sums(block: sp.csr_matrix) -> np.ndarray:
        positive = np.concatenate([[0], np.cumsum(block.data > 0)])
        total = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
        return np.column_stack([total, positive[block.indptr[1:]] - positive[block.indptr[:-1]], block @ masks])

    values = np.vstack([np.zeros((0, 2 + masks.shape[1])), *map_blocks(matrix, sums)])
    with np.errstate(invalid="ignore"):
        values[:, 2:] *= 100.0 / np.where(values[:, :1] > 0, values[:, :1], np.nan)
    return pd.DataFrame(values, columns=[*COUNT_CRITERIA, *PCT_CRITERIA])


def on_scale(values: Any, criterion: str, flavor: str) -> np.ndarray:
    """Return a metric on the scale of its thresholds: log1p for counts and genes of flavor ``"robust"``."""
    array = np.asarray(values, dtype=np.float64)
    return np.log1p(array) if flavor == "robust" and criterion in COUNT_CRITERIA else array


def fit_thresholds(
    metrics: pd.DataFrame,
    criteria: Sequence[str],
    *,
    flavor: str = "cradle",
    n_mads: float = 5.0,
    batches: Sequence[object] | np.ndarray | None = None,
) -> dict[str, Any]:
    """Fit median +- ``n_mads`` median absolute deviations per criterion and batch.

    ``"cradle"``: linear values, raw deviations; counts and genes have a lower bound, percentages an upper one.
    ``"robust"``: counts and genes as log1p with both bounds, percentages with an upper one, deviations x 1.4826.

    Parameters
    ----------
    metrics
        Result of :func:`qc_metrics` for the reference cells. Undefined percentages are left out.
    criteria
        Criteria to fit; ``"doublet"`` has no threshold and is passed over.
    flavor, n_mads
        The rule.
    batches
        Batch of every reference cell; ``None``: one batch named ``"all"``.

    Returns
    -------
    ``batches`` and ``n_cells``, arrays of shape ``(n_batches,)``, and ``thresholds``: per criterion the arrays
    ``median``, ``mad``, ``lower``, ``upper`` of that shape, on the scale of :func:`on_scale`; no bound is infinite.
    """
    names, codes = [ALL_CELLS], np.zeros(len(metrics), dtype=np.int64)
    if batches is not None:
        names, codes = _encode(batches)
    thresholds = {}
    for criterion in (c for c in criteria if c != QC_CRITERIA.DOUBLET):
        values = on_scale(metrics[criterion], criterion, flavor)
        groups = [values[(codes == b) & np.isfinite(values)] for b in range(len(names))]
        median = np.array([np.median(g) if len(g) else 0.0 for g in groups])
        mad = np.array([np.median(np.abs(g - m)) if len(g) else 0.0 for g, m in zip(groups, median, strict=True)])
        width = n_mads * MAD_SCALE[flavor] * mad
        has_lower = criterion in COUNT_CRITERIA
        has_upper = criterion in PCT_CRITERIA or flavor == "robust"
        thresholds[str(criterion)] = {
            "median": median,
            "mad": mad,
            "lower": median - width if has_lower else np.full(len(names), -np.inf),
            "upper": median + width if has_upper else np.full(len(names), np.inf),
        }
    n_cells = np.bincount(codes, minlength=len(names)).astype(np.int64)
    return {"batches": np.array(names, dtype=str), "n_cells": n_cells, "thresholds": thresholds}


def check_record(record: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``record`` is what :func:`scvi_cradle.pp.qc_label` stores."""
    rule = f"`thresholds` must be a stored `uns[{QC_UNS_KEY!r}]`"
    if not isinstance(record, Mapping):
        msg = f"{rule}; received {type(record).__name__}: run `pp.qc_label` first."
        raise TypeError(msg)
    needed = ("flavor", "criteria", "batches", "n_cells", "thresholds", "gene_sets", "gene_set_hash")
    missing = [k for k in needed if k not in record]
    if missing:
        msg = f"{rule}; received a mapping without {preview(missing)}: run `pp.qc_label` first."
        raise ValueError(msg)


def record_gene_masks(record: Mapping[str, Any], genes: pd.Index, where: str) -> dict[str, np.ndarray]:
    """Return the gene sets of a record as boolean arrays over ``genes``.

    Raises
    ------
    ValueError
        If ``genes`` are not the genes that the record was fitted on (their order does not matter).
    """
    if gene_set_hash(genes, record["gene_sets"]) != str(record["gene_set_hash"]):
        msg = (
            f"Thresholds hold for the genes they were fitted on; {where} holds another gene set ({len(genes)} genes): "
            "run `pp.qc_label` on data with the same genes."
        )
        raise ValueError(msg)
    return {name: np.isin(genes.astype(str).to_numpy(dtype=str), _texts(s)) for name, s in record["gene_sets"].items()}


def flag_cells(
    metrics: pd.DataFrame, record: Mapping[str, Any], batches: Sequence[object] | np.ndarray | None = None
) -> pd.DataFrame:
    """Compare metrics with stored thresholds; True = fails. Comparisons are strict.

    A cell without counts fails every criterion. Doublets have no threshold and no column.

    Parameters
    ----------
    metrics
        Result of :func:`qc_metrics` with ``n_cells`` rows.
    record
        ``uns["qc_label"]``.
    batches
        Batch of every cell; it is not looked at when the record was fitted without batches. ``None`` with thresholds
        per batch: their mean, weighted by the cells that each batch was fitted on.

    Returns
    -------
    Boolean columns, one per criterion with a threshold.

    Raises
    ------
    ValueError
        If a batch is unknown to the record.
    """
    rows = _batch_rows(record, batches, len(metrics))
    weights = np.asarray(record["n_cells"], dtype=np.float64)
    empty = metrics[QC_CRITERIA.TOTAL_COUNTS].to_numpy() == 0
    flags = {}
    for criterion in (c for c in _texts(record["criteria"]) if c in record["thresholds"]):
        values = on_scale(metrics[criterion], criterion, str(record["flavor"]))
        lower, upper = (np.asarray(record["thresholds"][criterion][s], dtype=np.float64) for s in ("lower", "upper"))
        if rows is None:
            lower, upper = (np.average(bound, weights=weights, keepdims=True) for bound in (lower, upper))
        else:
            lower, upper = lower[rows], upper[rows]
        flags[criterion] = (values < lower) | (values > upper) | empty
    return pd.DataFrame(flags, index=metrics.index)


def _batch_rows(
    record: Mapping[str, Any], batches: Sequence[object] | np.ndarray | None, n_cells: int
) -> np.ndarray | None:
    names = _texts(record["batches"])
    if len(names) == 1 and (batches is None or not str(record.get("batch_key", ""))):
        return np.zeros(n_cells, dtype=np.int64)
    if batches is None:
        return None
    found, codes = _encode(batches)
    unknown = [b for b in found if b not in names]
    if unknown:
        known = preview(names)
        msg = f"Batches must be known to the thresholds ({known}); received {preview(unknown)}: fit new thresholds."
        raise ValueError(msg)
    return np.array([names.index(b) for b in found], dtype=np.int64)[codes]


def _encode(values: Sequence[object] | np.ndarray) -> tuple[list[str], np.ndarray]:
    names, codes = np.unique(np.asarray([str(v) for v in values], dtype=str), return_inverse=True)
    return [str(n) for n in names], np.asarray(codes).ravel()


def _texts(values: Any) -> list[str]:
    return [str(v) for v in np.asarray(values).ravel()]
