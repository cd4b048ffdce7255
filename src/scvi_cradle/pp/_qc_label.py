"""Quality-control labels by median absolute deviations."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scvi_cradle._constants import QC_CRITERIA, QC_UNS_KEY
from scvi_cradle._matrix import check_counts, get_matrix
from scvi_cradle._qc import (
    ALL_CELLS,
    COUNT_CRITERIA,
    MAD_SCALE,
    PCT_CRITERIA,
    check_record,
    fit_thresholds,
    flag_cells,
    gene_set_hash,
    gene_set_masks,
    qc_metrics,
)
from scvi_cradle._validation import as_flags, check_key, check_one_of, check_positive, check_tables, preview
from scvi_cradle.pp._doublets import METHODS, call_doublets, check_method

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

DEFAULT_N_MADS = 5.0
SCANPY_COLUMNS = {
    "total_counts": "total_counts",
    "n_genes": "n_genes_by_counts",
    "pct_mt": "pct_counts_mt",
    "pct_ribo": "pct_counts_ribo",
    "pct_hb": "pct_counts_hb",
}


def qc_label(
    adata: AnnData,
    *,
    n_mads: float = DEFAULT_N_MADS,
    flavor: Literal["cradle", "robust"] = "cradle",
    criteria: Sequence[str] = tuple(QC_CRITERIA),
    layer: str | None = None,
    batch_key: str | None = None,
    reference: str | Sequence[bool] | np.ndarray | pd.Series | None = None,
    thresholds: Mapping[str, Any] | None = None,
    doublets: str | None = "scrublet",
    key_added: str = "artifact",
    copy: bool = False,
    seed: int = 0,
) -> AnnData | None:
    """Mark the cells that fail quality control, criterion by criterion.

    A cell fails a criterion when its value lies strictly outside the median -+ ``n_mads`` median absolute deviations
    (MAD) of its batch. A cell without counts fails every criterion but ``"doublet"``.

    Parameters
    ----------
    adata
        Raw counts in ``X`` or in a layer: sparse, dense, on disk, or a dask array of dense or sparse chunks, whose
        chunks of rows are left to Dask's scheduler. Gene symbols as ``var_names``; boolean columns ``mt``, ``ribo``,
        ``hb`` of ``var`` replace the sets that are otherwise read from the symbols.
    n_mads
        Number of MADs, positive; the paper used 3, 4 and 5.
    flavor
        ``"cradle"``, the paper's rule: raw MAD on linear values, lower bound for counts and genes, upper bound for
        percentages. ``"robust"``: counts and genes as log1p with both bounds, percentages with an upper one, MAD x
        1.4826.
    criteria
        Which of ``"total_counts"``, ``"n_genes"``, ``"pct_mt"``, ``"pct_ribo"``, ``"pct_hb"``, ``"doublet"``.
    layer
        Layer with the counts; ``None``: ``X``.
    batch_key
        Column of ``obs``: thresholds and doublets are found within each batch.
    reference
        Boolean column of ``obs``, or a mask of shape ``(n_cells,)``: thresholds are fitted on these cells (e.g. those
        for training) and applied to all.
    thresholds
        A stored ``uns["qc_label"]``: nothing is fitted. With the default ``criteria`` those of the record are used;
        ``batch_key=None`` takes the record's.
    doublets
        ``"scrublet"``: scanpy's, with exact neighbours. ``"scrublet-package"``: the original package. Any other name:
        a boolean column of ``obs``. ``None``: the criterion ``"doublet"`` is left out. A batch of up to 30,000 cells is
        called at once, a larger one is shuffled and called in chunks of equal size, 30,000 cells at most; of counts
        on disk or in a dask array only the cells of that batch or chunk are loaded. Below 30 genes or cells no cell is
        called. Chunks and cells that are not called are warned about.
    key_added
        Column for the union of the criteria.
    copy
        Return a copy with the columns instead of writing into ``adata``.
    seed
        Seed of the doublet calls.

    Returns
    -------
    ``None``, or the copy. Written: boolean ``obs["qc_<criterion>"]`` (True = fails) for the criteria in use,
    ``obs[key_added]``, their union; scanpy's ``total_counts``, ``n_genes_by_counts``, ``pct_counts_mt``,
    ``pct_counts_ribo``, ``pct_counts_hb`` (0 to 100; NaN without counts) in ``obs``; and ``uns["qc_label"]`` with the
    parameters, gene sets and thresholds per batch, ready for ``thresholds=`` and for ``write_h5ad``.

    Raises
    ------
    KeyError
        If a layer or column is missing.
    ValueError
        For values that are not counts, for arguments out of range, if ``thresholds`` hold for other genes or batches
        or come together with ``n_mads``, ``flavor`` or ``reference``, if a batch has no reference cell.
    TypeError
        If ``thresholds`` is not a stored record, or ``obs`` or ``var`` are not in memory (``read_lazy``).
    ImportError
        For ``doublets="scrublet-package"`` without the package.

    Warns
    -----
    UserWarning
        Naming criterion and batch: a MAD of 0; a bound that can never flag; a gene set without genes; more than half
        of the cells flagged; chunked or omitted doublet calls.

    Notes
    -----
    The flag may be the effect of a perturbation: look at :func:`scvi_cradle.pp.qc_report` before training on it.
    """
    _check_arguments(adata, n_mads=n_mads, flavor=flavor, criteria=criteria, key_added=key_added, seed=seed, copy=copy)
    matrix = get_matrix(adata, layer)
    check_counts(matrix, "`X`" if layer is None else f"`layers[{layer!r}]`")
    masks = gene_set_masks(adata.var)
    if thresholds is None:
        batches = _batch_names(adata, batch_key)
        kept = _reference_mask(adata, reference, batches)
        metrics = qc_metrics(matrix, masks)
        of_kept = None if batches is None else batches[kept]
        record = _parameters(adata, masks, flavor, n_mads, batch_key, reference)
        record |= fit_thresholds(metrics[kept], criteria, flavor=flavor, n_mads=float(n_mads), batches=of_kept)
    else:
        _check_reuse(adata, masks, thresholds, n_mads, flavor, reference)
        criteria = _reused_criteria(thresholds, criteria)
        batches = _batch_names(adata, batch_key or str(thresholds.get("batch_key", "")) or None)
        metrics, record = qc_metrics(matrix, masks), dict(thresholds)
    used = _criteria_in_use(criteria, doublets)
    record |= {"criteria": np.array(used, dtype=str), "key_added": key_added, "layer": layer or "", "seed": int(seed)}
    record["doublets"] = str(doublets) if QC_CRITERIA.DOUBLET in used else ""
    flags = flag_cells(metrics, record, batches)
    notes = _threshold_notes(record) if thresholds is None else []
    if QC_CRITERIA.DOUBLET in used:
        flags[QC_CRITERIA.DOUBLET], doublet_notes = _doublets(adata, matrix, str(doublets), batches, seed)
        notes += doublet_notes
    flags = flags[used]
    for note in notes + _majority_notes(flags, batches):
        warnings.warn(note, UserWarning, stacklevel=2)
    return _write(adata, metrics, flags, record, copy=copy)


def _check_arguments(
    adata: AnnData, *, n_mads: float, flavor: str, criteria: Sequence[str], key_added: str, seed: int, copy: bool
) -> None:
    check_tables(adata)
    check_positive("n_mads", n_mads)
    check_one_of("flavor", flavor, tuple(MAD_SCALE))
    check_positive("seed", seed, integer=True, allow_zero=True)
    if isinstance(criteria, str) or not len(criteria) or len(set(criteria)) < len(criteria):
        msg = f"`criteria` must list at least one of {tuple(QC_CRITERIA)}, each once; received {criteria!r}."
        raise ValueError(msg)
    for criterion in criteria:
        check_one_of("criteria", criterion, tuple(QC_CRITERIA))
    taken = {f"qc_{c}" for c in QC_CRITERIA} | set(SCANPY_COLUMNS.values())
    if not isinstance(key_added, str) or not key_added or key_added in taken:
        msg = f"`key_added` must not be empty or the column of a criterion; received {key_added!r}: choose another."
        raise ValueError(msg)
    if adata.is_view and adata.isbacked and not copy:
        msg = "Labels cannot be written into a view of a backed AnnData; received one: pass `adata.to_memory()`."
        raise ValueError(msg)


def _parameters(
    adata: AnnData, masks: dict[str, np.ndarray], flavor: str, n_mads: float, batch_key: str | None, reference: Any
) -> dict[str, Any]:
    sets = {name: adata.var_names[mask].astype(str).to_numpy(dtype=str) for name, mask in masks.items()}
    return {
        "flavor": flavor,
        "n_mads": float(n_mads),
        "batch_key": batch_key or "",
        "reference": reference if isinstance(reference, str) else ("" if reference is None else "mask"),
        "gene_sets": sets,
        "gene_set_hash": gene_set_hash(adata.var_names, sets),
    }


def _batch_names(adata: AnnData, batch_key: str | None) -> np.ndarray | None:
    if batch_key is None:
        return None
    check_key(adata.obs, batch_key, "adata.obs", "batch_key")
    column = adata.obs[batch_key]
    if column.isna().any():
        n_missing = int(column.isna().sum())
        msg = f"`obs[{batch_key!r}]` must name the batch of every cell; received {n_missing} missing values."
        raise ValueError(msg)
    return column.astype(str).to_numpy(dtype=str)


def _reference_mask(adata: AnnData, reference: Any, batches: np.ndarray | None) -> np.ndarray:
    if reference is None:
        mask = np.ones(adata.n_obs, dtype=bool)
    else:
        if isinstance(reference, str):
            check_key(adata.obs, reference, "adata.obs", "reference")
            reference = adata.obs[reference]
        values = pd.Series(np.asarray(reference))
        if len(values) != adata.n_obs:
            msg = f"`reference` must have one entry per cell ({adata.n_obs}); received {len(values)}."
            raise ValueError(msg)
        mask = as_flags(values, "`reference`", "pass a boolean column or mask")
    without = ["all cells"] if not mask.any() else []
    if batches is not None:
        without = sorted(set(batches) - set(batches[mask]))
    if without:
        msg = f"Every batch must have reference cells; received none in {preview(without)}: widen `reference`."
        raise ValueError(msg)
    return mask


def _check_reuse(
    adata: AnnData, masks: dict[str, np.ndarray], thresholds: Any, n_mads: float, flavor: str, reference: Any
) -> None:
    check_record(thresholds)
    given = {"n_mads": n_mads != DEFAULT_N_MADS, "flavor": flavor != "cradle", "reference": reference is not None}
    clashes = [name for name, is_given in given.items() if is_given]
    if clashes:
        msg = f"`thresholds` are applied as they are stored; received {preview(clashes)} beside them: drop one of both."
        raise ValueError(msg)
    sets = {name: adata.var_names[mask] for name, mask in masks.items()}
    if gene_set_hash(adata.var_names, sets) != str(thresholds["gene_set_hash"]):
        msg = (
            f"Thresholds hold for the genes they were fitted on; received {adata.n_vars} genes with another gene set: "
            "use the same genes and the same `mt`, `ribo`, `hb` columns in `var`, or fit new thresholds."
        )
        raise ValueError(msg)


def _reused_criteria(thresholds: Mapping[str, Any], criteria: Sequence[str]) -> list[str]:
    stored = [str(c) for c in np.asarray(thresholds["criteria"]).ravel()]
    if tuple(criteria) == tuple(QC_CRITERIA):
        return stored
    missing = [c for c in criteria if c != QC_CRITERIA.DOUBLET and c not in thresholds["thresholds"]]
    if missing:
        msg = f"`criteria` must have stored thresholds; received {preview(missing)}, stored: {preview(stored)}."
        raise ValueError(msg)
    return list(criteria)


def _criteria_in_use(criteria: Sequence[str], doublets: str | None) -> list[str]:
    used = [str(c) for c in criteria if c != QC_CRITERIA.DOUBLET or doublets is not None]
    if not used:
        msg = "At least one criterion must be left; received 'doublet' alone with `doublets=None`: name another one."
        raise ValueError(msg)
    return used


def _doublets(
    adata: AnnData, matrix: Any, doublets: str, batches: np.ndarray | None, seed: int
) -> tuple[np.ndarray, list[str]]:
    if doublets in METHODS:
        check_method(doublets)
        return call_doublets(matrix, doublets, batches=batches, seed=seed)
    if doublets not in adata.obs:
        msg = f"`doublets` must be one of {METHODS}, a boolean column of `adata.obs` or None; received {doublets!r}."
        raise KeyError(msg)
    return as_flags(adata.obs[doublets], f"`obs[{doublets!r}]`", "pass a column that marks doublets"), []


def _threshold_notes(record: dict[str, Any]) -> list[str]:
    names = record["batches"]
    notes: list[str] = []
    for criterion, fitted in record["thresholds"].items():
        gene_set = PCT_CRITERIA.get(criterion)
        if gene_set is not None and not len(record["gene_sets"][gene_set]):
            notes.append(
                f"`{criterion}`, batch {preview(names)}: no gene belongs to the set {gene_set!r}, so no cell can fail; "
                f"gene names must be symbols, or mark the genes in `var[{gene_set!r}]`."
            )
            continue
        flat = fitted["mad"] == 0
        if flat.any():
            any_positive = (fitted["upper"] <= 0)[flat].all()
            fails = "any positive value fails" if any_positive else "any value beyond the median fails"
            where = preview(names[flat])
            notes.append(f"`{criterion}`, batch {where}: the MAD is 0, {fails}; consider leaving it out.")
        is_count = criterion in COUNT_CRITERIA
        never = fitted["lower"] < 0 if is_count else fitted["upper"] >= 100
        if never.any():
            what = "lower bound is negative" if is_count else "upper bound is 100 or more"
            where = preview(names[never])
            notes.append(f"`{criterion}`, batch {where}: the {what} and can never flag; lower `n_mads`.")
    return notes


def _majority_notes(flags: pd.DataFrame, batches: np.ndarray | None) -> list[str]:
    names = np.full(len(flags), ALL_CELLS) if batches is None else batches
    rates = flags.assign(**{"all criteria together": flags.any(axis=1)}).groupby(names).mean()
    notes: list[str] = []
    for criterion in rates.columns:
        most = rates.index[rates[criterion] > 0.5]
        if len(most) and (criterion in flags.columns or not notes):
            share = f"up to {rates.loc[most, criterion].max():.0%}"
            notes.append(f"`{criterion}`, batch {preview(most)}: flags more than half of the cells ({share}).")
    return notes


def _write(
    adata: AnnData, metrics: pd.DataFrame, flags: pd.DataFrame, record: dict[str, Any], *, copy: bool
) -> AnnData | None:
    target = adata
    if copy:
        target = adata.to_memory() if adata.isbacked else adata.copy()
    columns: dict[str, Any] = {name: metrics[metric].to_numpy() for metric, name in SCANPY_COLUMNS.items()}
    columns[SCANPY_COLUMNS["n_genes"]] = columns[SCANPY_COLUMNS["n_genes"]].astype(np.int64)
    columns |= {f"qc_{criterion}": flags[criterion].to_numpy() for criterion in flags}
    columns[record["key_added"]] = flags.any(axis=1).to_numpy()
    target.obs = target.obs.assign(**columns)
    target.uns[QC_UNS_KEY] = record
    return target if copy else None
