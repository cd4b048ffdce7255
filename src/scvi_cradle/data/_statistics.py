"""What a model learns from training cells outside gradient descent: counts, moments, library sizes, reference profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scvi import REGISTRY_KEYS, settings
from scvi.data import AnnDataManager
from tqdm.auto import tqdm

from scvi_cradle._constants import KEYS
from scvi_cradle._matrix import BLOCK_SIZE, rows_of, to_csr
from scvi_cradle.data._collected import MIN_VARIANCE, CollectedCells, GeneSums
from scvi_cradle.data._spill import RowSpill
from scvi_cradle.data._stored import stored_matrix

MAX_LIBRARIES = 10_000
MAX_REFERENCE_CELLS = 1_000


@dataclass(frozen=True)
class TrainingStatistics:
    """Statistics of the training cells.

    Parameters
    ----------
    input_mean, input_std
        Moments of ``log(1 + x)`` (or of ``x``) per gene, shape ``(n_genes,)``; the standard deviation of a constant gene is 1.
    input_variance
        Variance of the same values per gene, 0 for a constant gene, shape ``(n_genes,)``.
    gene_share
        Share of all counts that falls on each gene, shape ``(n_genes,)``.
    n_obs_per_treatment, n_obs_per_label
        Training cells with a non-zero dosage of each treatment, and of each label.
    n_empty
        Training cells without any count.
    n_failed, n_failed_per_label
        Training cells that failed QC.
    libraries
        A sample of at most 10,000 training cells per batch and flag: arrays ``cell`` (position), ``total``, ``artifact``,
        ``batch``, ``categorical``, ``continuous`` and ``weight`` (cells that a row stands for).
    reference_labels, reference_profiles
        Codes of the labels with failed training cells, and their gene-wise medians (or means) of counts as CSR.
    pools
        Failed training cells of each of these labels (at most 1,000, a seeded sample), as CSR; empty if not asked for.
    """

    input_mean: np.ndarray
    input_std: np.ndarray
    input_variance: np.ndarray
    gene_share: np.ndarray
    n_obs_per_treatment: np.ndarray
    n_obs_per_label: np.ndarray
    n_empty: int
    n_failed: int
    n_failed_per_label: np.ndarray
    libraries: dict[str, np.ndarray]
    reference_labels: np.ndarray
    reference_profiles: sp.csr_matrix
    pools: tuple[sp.csr_matrix, ...]


def training_statistics(
    manager: AnnDataManager,
    train_indices: np.ndarray,
    *,
    members: np.ndarray,
    n_treatments: int,
    log: bool = True,
    statistic: str = "median",
    sources: np.ndarray | None = None,
    keep_pools: bool = True,
    check: Callable[[sp.csr_matrix, str], None] | None = None,
    collected: CollectedCells | None = None,
    seed: int = 0,
) -> TrainingStatistics:
    """Compute the statistics of the training cells in one pass over blocks of rows.

    Parameters
    ----------
    manager
        Manager of the AnnData.
    train_indices
        Positions of the training cells.
    members
        Treatments of every label, padded with -1, shape ``(n_labels, width)``.
    n_treatments
        Number of treatments.
    log
        Moments of ``log(1 + x)``, or of ``x`` for values that are no counts.
    statistic
        ``"median"`` or ``"mean"``: how the failed cells of a label make its reference profile.
    sources
        Which labels the sample of libraries is drawn from, shape ``(n_labels,)``; default: all.
    keep_pools
        Whether to return the failed cells that profiles are made from.
    check
        What values on disk have to pass: their cells are seen here for the first time.
    collected
        What a pass over these cells has left, whose expression is then not read.
    seed
        Seed of the samples of libraries and of pools above 1,000 cells.
    """
    rng = np.random.default_rng(seed)
    codes = column(manager, KEYS.PERTURBATION).astype(np.int64)[train_indices]
    flags = column(manager, KEYS.ARTIFACT)[train_indices] > 0 if KEYS.ARTIFACT in manager.data_registry else None
    n_labels = len(members)
    failed = np.zeros(len(codes), dtype=bool) if flags is None else flags
    labels = np.unique(codes[failed])
    members_of = [train_indices[rows] for rows in _reference_cells(labels, codes, failed, rng)]
    make = partial(_references, statistic=statistic, keep_pools=keep_pools)
    if collected is None:
        sums, totals, (profiles, pools) = _read(manager, train_indices, members_of, make, log=log, check=check)
    else:
        sums, totals = collected.sums[log], collected.totals
        profiles, pools = make((collected.failed[rows] for rows in members_of), len(sums.counts))
    mean, variance, share = sums.moments()
    return TrainingStatistics(
        input_mean=mean,
        input_std=np.where(variance > MIN_VARIANCE, np.sqrt(variance), 1.0),
        input_variance=variance,
        gene_share=share,
        n_obs_per_treatment=_treatment_counts(manager, train_indices, codes, members, n_treatments),
        n_obs_per_label=np.bincount(codes, minlength=n_labels),
        n_empty=int((totals == 0).sum()),
        n_failed=int(failed.sum()),
        n_failed_per_label=np.bincount(codes[failed], minlength=n_labels),
        libraries=_libraries(
            manager,
            train_indices,
            totals,
            failed,
            rng,
            np.ones(len(codes), dtype=bool) if sources is None else sources[codes],
        ),
        reference_labels=labels,
        reference_profiles=profiles,
        pools=pools,
    )


def column(manager: AnnDataManager, key: str) -> np.ndarray:
    """Return a registered column as a flat array."""
    return np.asarray(manager.get_from_registry(key)).ravel()


def _read(
    manager: AnnDataManager,
    train_indices: np.ndarray,
    members_of: list[np.ndarray],
    make: Callable[..., tuple[sp.csr_matrix, tuple[sp.csr_matrix, ...]]],
    *,
    log: bool,
    check: Callable[[sp.csr_matrix, str], None] | None,
) -> tuple[GeneSums, np.ndarray, tuple[sp.csr_matrix, tuple[sp.csr_matrix, ...]]]:
    """Return sums over genes, totals of cells, and profiles and pools of the cells of every label."""
    stored = stored_matrix(manager)
    matrix = manager.get_from_registry(REGISTRY_KEYS.X_KEY) if stored is None else stored
    matrix = to_csr(matrix) if sp.issparse(matrix) else matrix
    with RowSpill(np.sort(np.concatenate([*members_of, []])).astype(np.int64), matrix.shape[1]) as spill:
        visit = None
        if stored is not None:

            def visit(rows: np.ndarray, block: sp.csr_matrix) -> None:
                if check is not None:
                    check(block, "The screen on disk")
                spill.keep(rows, block)

        sums, totals = _sums(matrix, train_indices, log=log, visit=visit)
        failed_cells = (rows_of(matrix, rows) if stored is None else spill[rows] for rows in members_of)
        return sums, totals, make(failed_cells, matrix.shape[1])


def _sums(
    matrix: Any,
    indices: np.ndarray,
    *,
    log: bool,
    visit: Callable[[np.ndarray, sp.csr_matrix], None] | None = None,
) -> tuple[GeneSums, np.ndarray]:
    """Return sums over genes and the totals of the cells, from blocks in the order of the matrix.

    ``visit`` is shown the positions and values of every block of a matrix on disk.
    """
    order, totals = np.argsort(indices, kind="stable"), np.zeros(len(indices))
    sums = GeneSums(matrix.shape[1], log=log)
    starts = range(0, len(indices), BLOCK_SIZE)
    for start in tqdm(starts, desc="statistics of training cells", disable=visit is None or settings.verbosity > 20):
        chosen = order[start : start + BLOCK_SIZE]
        block = rows_of(matrix, indices[chosen])
        if visit is not None:
            visit(indices[chosen], block)
        totals[chosen] = sums.add(block)
    return sums, totals


def _treatment_counts(
    manager: AnnDataManager, indices: np.ndarray, codes: np.ndarray, members: np.ndarray, n_treatments: int
) -> np.ndarray:
    if KEYS.DOSAGE in manager.data_registry:
        dosage = manager.get_from_registry(KEYS.DOSAGE)
        values = dosage.to_numpy() if isinstance(dosage, pd.DataFrame) else dosage
        return np.asarray((sp.csr_matrix(values)[indices] != 0).sum(axis=0)).ravel()
    treated = members[codes].ravel()
    return np.bincount(treated[treated >= 0], minlength=n_treatments)


def _libraries(
    manager: AnnDataManager,
    indices: np.ndarray,
    totals: np.ndarray,
    failed: np.ndarray,
    rng: np.random.Generator,
    eligible: np.ndarray,
) -> dict[str, np.ndarray]:
    batch = column(manager, REGISTRY_KEYS.BATCH_KEY).astype(np.int64)[indices]
    kept, weight = [], []
    for group in np.unique(np.stack([batch, failed], axis=1)[eligible], axis=0):
        rows = np.flatnonzero(eligible & (batch == group[0]) & (failed == group[1]))
        chosen = rows if len(rows) <= MAX_LIBRARIES else np.sort(rng.choice(rows, MAX_LIBRARIES, replace=False))
        kept.append(chosen)
        weight.append(np.full(len(chosen), len(rows) / len(chosen)))
    rows = np.concatenate(kept)
    return pool_of_cells(manager, indices[rows], totals[rows], failed[rows], np.concatenate(weight))


def pool_of_cells(
    manager: AnnDataManager, cells: np.ndarray, totals: np.ndarray, failed: np.ndarray, weight: np.ndarray
) -> dict[str, np.ndarray]:
    """Return what new cells take from given ones: the arrays of ``TrainingStatistics.libraries``."""
    batch = column(manager, REGISTRY_KEYS.BATCH_KEY).astype(np.int64)[cells]
    pool = {"cell": cells, "total": totals, "artifact": failed, "batch": batch, "weight": weight}
    for name, key in (("categorical", REGISTRY_KEYS.CAT_COVS_KEY), ("continuous", REGISTRY_KEYS.CONT_COVS_KEY)):
        if key in manager.data_registry:
            pool[name] = np.asarray(manager.get_from_registry(key))[cells]
    return pool


def _reference_cells(
    labels: np.ndarray, codes: np.ndarray, failed: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the failed cells that make the profile of every label."""
    chosen = []
    for label in labels:
        rows = np.flatnonzero(failed & (codes == label))
        if len(rows) > MAX_REFERENCE_CELLS:
            rows = np.sort(rng.choice(rows, MAX_REFERENCE_CELLS, replace=False))
        chosen.append(rows)
    return chosen


def _references(
    pools: Iterable[sp.csr_matrix], n_genes: int, *, statistic: str, keep_pools: bool
) -> tuple[sp.csr_matrix, tuple[sp.csr_matrix, ...]]:
    profiles, kept = [], []
    for pool in pools:
        profile = medians(pool) if statistic == "median" else _means(pool)
        profiles.append(sp.csr_matrix(profile.astype(np.float32)))
        if keep_pools:
            kept.append(pool)
    stacked = sp.vstack(profiles, format="csr") if profiles else sp.csr_matrix((0, n_genes), dtype=np.float32)
    return stacked, tuple(kept)


def _means(block: sp.csr_matrix) -> np.ndarray:
    return (np.ones(block.shape[0]) @ block) / block.shape[0]


def medians(block: sp.csr_matrix, width: int = 2_048) -> np.ndarray:
    """Return the median of every column; only columns whose median may not be 0 are made dense, ``width`` at a time.

    The zeros of a column stand between its negative and its positive values, so that its median is 0 where fewer than half
    of its values are negative and fewer than half positive.
    """
    columns = sp.csc_matrix(block)
    columns.sum_duplicates()
    below, above = (
        np.diff(np.concatenate([[0], np.cumsum(sign)])[columns.indptr]) for sign in (columns.data < 0, columns.data > 0)
    )
    result = np.zeros(columns.shape[1])
    decided = np.flatnonzero(2 * np.maximum(below, above) >= columns.shape[0])
    for start in range(0, len(decided), width):
        some = decided[start : start + width]
        result[some] = np.median(columns[:, some].toarray(), axis=0)
    return result
