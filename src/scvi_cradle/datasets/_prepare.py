"""The filters that papers put before their models, each a function of its own."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData
from scipy.stats import false_discovery_control, ttest_ind_from_stats

from scvi_cradle._constants import COLUMNS, CONTROL_UNS_KEY, COUNTS_PER_CELL
from scvi_cradle._matrix import (
    BLOCK_SIZE,
    check_counts,
    is_dask,
    log_normalize,
    map_blocks,
    row_sums,
    sum_blocks,
    to_csr,
)
from scvi_cradle._qc import gene_set_masks
from scvi_cradle._validation import check_key, check_one_of, check_positive, check_probability

STRONG_EFFECTS = "strong_effects"


def prepare_norman(adata: AnnData, *, paper: Literal["cradle", "sams", "perturbedvae"] = "cradle") -> AnnData:
    """Filter the screen of Norman et al. and choose its genes as the papers do.

    Parameters
    ----------
    adata
        Result of :func:`norman`, with raw counts in ``X``. It is not changed.
    paper
        ``"cradle"`` :cite:p:`baek2024cradlevae`: all genes; ``"sams"`` :cite:p:`bereket2023samsvae`: 5,000 highly
        variable genes; ``"perturbedvae"``: these genes with ``X`` normalised to 10,000 counts a cell and
        ``log(1 + x)``, raw counts in ``layers["counts"]``.

    Returns
    -------
    A new AnnData. Genes found in at least 20 cells are kept, then cells with 200 to 6,000 genes and less than 15 % of
    mitochondrial counts. Matrices are dask arrays where ``X`` was one.

    Raises
    ------
    ValueError
        If ``X`` does not hold raw counts, ``paper`` is unknown, or nothing is left.

    Notes
    -----
    The file that :func:`norman` reads first has been filtered in this way already. Its own 5,000 genes
    (``var["highly_variable"]``) are taken if it marks that many among the genes kept; else they come from
    :func:`scanpy.pp.highly_variable_genes` on log-normalised counts. With fewer genes all are kept.
    Published sizes: 111,255 cells x 19,018 genes (CRADLE-VAE) and x 5,000 genes (SAMS-VAE); PerturbedVAE reports
    105,528 cells of another version of the file.
    """
    check_one_of("paper", paper, ("cradle", "sams", "perturbedvae"))
    check_counts(adata.X, "`adata.X`")
    kept = _filter_genes(adata, min_cells=20)
    n_genes = sc.pp.filter_cells(kept, min_genes=200, inplace=False)[1]
    mitochondrial = kept[:, gene_set_masks(kept.var)["mt"]].X
    pct_mt = 100 * row_sums(mitochondrial) / np.maximum(row_sums(kept.X), 1)
    cells = (n_genes >= 200) & (n_genes <= 6000) & (pct_mt < 15)
    kept = _nonempty(kept[cells].copy(), "with 200 to 6,000 genes and less than 15 % of mitochondrial counts")
    if paper != "cradle":
        kept = kept[:, _highly_variable(kept, 5000)].copy()
    return _log_normalized(kept) if paper == "perturbedvae" else kept


def prepare_dixit(adata: AnnData, *, max_targets: int = 2) -> AnnData:
    """Keep the cells of the screen of Dixit et al. that received few guides.

    Parameters
    ----------
    adata
        Result of :func:`dixit`. It is not changed.
    max_targets
        Largest number of targets of a cell.

    Returns
    -------
    A new AnnData. Published size: 103,420 cells x 18,531 genes, 10 single genes and 45 pairs
    :cite:p:`baek2024cradlevae`.

    Raises
    ------
    KeyError
        Without ``obs["perturbation"]``.
    ValueError
        If ``max_targets`` is not a positive integer.
    """
    check_positive("max_targets", max_targets, integer=True)
    check_key(adata.obs, COLUMNS.PERTURBATION, "adata.obs", "perturbation")
    n_targets = adata.obs[COLUMNS.PERTURBATION].astype(str).str.count(r"\+").to_numpy() + 1
    return adata[n_targets <= max_targets].copy()


def prepare_santinha(adata: AnnData) -> AnnData:
    """Filter and normalise the screen of Santinha et al. as for the classifiers of perturbed cells.

    Parameters
    ----------
    adata
        Result of :func:`santinha`, with raw counts in ``X``. It is not changed.

    Returns
    -------
    A new AnnData. Kept are cells with at least 6,000 counts and 2,700 genes, and of these the genes that are found in
    at least 3 cells, are not mitochondrial, and have a mean count of at least 0.4 in the controls or in some
    perturbation. ``X`` is normalised to 10,000 counts a cell and ``log(1 + x)``; ``layers["counts"]`` holds raw counts.
    Matrices are dask arrays where ``X`` was one.

    Raises
    ------
    KeyError
        Without ``obs["perturbation"]``.
    ValueError
        If ``X`` does not hold raw counts, or nothing is left.

    Notes
    -----
    The order is that of the paper's text. It does not say on which scale the mean of 0.4 is taken; since it stands
    before the normalisation, raw counts are taken.
    """
    check_key(adata.obs, COLUMNS.PERTURBATION, "adata.obs", "perturbation")
    check_counts(adata.X, "`adata.X`")
    cells = sc.pp.filter_cells(adata, min_counts=6000, inplace=False)[0]
    cells &= sc.pp.filter_cells(adata, min_genes=2700, inplace=False)[0]
    kept = _nonempty(adata[cells].copy(), "with at least 6,000 counts and 2,700 genes")
    kept = _filter_genes(kept, min_cells=3, without=gene_set_masks(kept.var)["mt"])
    means = sc.get.aggregate(kept, by=COLUMNS.PERTURBATION, func="mean").layers["mean"]
    highest = np.asarray(means.max(axis=0)).ravel()
    return _log_normalized(_nonempty(kept[:, highest >= 0.4].copy(), "with a mean of 0.4 in some condition"))


def prepare_replogle(
    adata: AnnData,
    *,
    min_cells: int = 25,
    min_de_genes: int = 50,
    min_perturbations: int = 10,
    fdr_level: float = 0.05,
    n_controls: int | None = 2000,
    seed: int = 0,
) -> AnnData:
    r"""Keep the perturbations of a large screen with strong effects, their genes, and some controls.

    Parameters
    ----------
    adata
        Result of :func:`replogle` (any screen with raw counts in ``X``, ``obs["perturbation"]`` and controls), in
        memory, on disk or a dask array. It is not changed; the matrix is read block by block.
    min_cells
        Smallest number of cells of a perturbation, at least 2.
    min_de_genes
        A perturbation is strong when at least so many genes differ from the controls.
    min_perturbations
        A gene is kept when it differs from the controls under at least so many strong perturbations.
    fdr_level
        Level of the false discovery rate, over the genes of each perturbation.
    n_controls
        Number of controls to keep, drawn at random; ``None`` keeps all. The tests use all.
    seed
        Seed of that draw.

    Returns
    -------
    A new AnnData in memory with the cells in their order, the kept genes, and the table ``uns["strong_effects"]``:
    for every perturbation ``n_cells``, ``n_de_genes`` (0 if it has too few cells to be tested) and ``kept``.

    Raises
    ------
    KeyError
        Without ``obs["perturbation"]`` or ``uns["control"]``.
    ValueError
        If an argument is out of range, ``X`` does not hold raw counts, there are fewer than two controls, or no
        perturbation or gene is kept.

    Notes
    -----
    The papers :cite:p:`bereket2023samsvae,baek2024cradlevae` follow :cite:t:`lopez2023svae`: perturbations with strong
    effects and the genes associated with them, 118,461 cells (118,641 in the second paper) x 1,187 genes, 722 guide
    pairs of 20 to 2,000 cells and 2,000 controls. They state no thresholds. **The rule here is this package's own**:
    Student's t-test on :math:`\log(1 + 10^4 x_{ig} / \sum_h x_{ih})` between the cells of a perturbation and all
    controls, Benjamini-Hochberg over genes. It cannot be expected to give the cells and genes of the papers. Its sizes
    on the full screen have not been measured: read them off the result and name them beside any comparison.

    The variance is pooled over both groups because Welch's test fails here: a rare gene is easily absent from all cells
    of a small group, whose own variance is then zero. Among 299 genes of :func:`papalexi`, 25 random controls against
    the others had on average 75 genes that "differ" by Welch's test and 0.8 by the pooled one.

    Means and variances take about 40 bytes for every pair of a perturbation and a gene.
    """
    check_positive("min_cells", min_cells, integer=True)
    if min_cells < 2:
        msg = f"`min_cells` must be at least 2, so that a variance exists; received {min_cells}."
        raise ValueError(msg)
    check_positive("min_de_genes", min_de_genes, integer=True)
    check_positive("min_perturbations", min_perturbations, integer=True)
    check_probability("fdr_level", fdr_level)
    if n_controls is not None:
        check_positive("n_controls", n_controls, integer=True)
    check_positive("seed", seed, integer=True, allow_zero=True)
    check_key(adata.obs, COLUMNS.PERTURBATION, "adata.obs", "perturbation")
    check_key(adata.uns, CONTROL_UNS_KEY, "adata.uns", "control")

    labels = adata.obs[COLUMNS.PERTURBATION].astype(str).to_numpy()
    names, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    is_control = names == str(adata.uns[CONTROL_UNS_KEY])
    if sizes[is_control].sum() < 2:
        msg = f"At least two cells must be controls; received {sizes[is_control].sum()} with the label {adata.uns[CONTROL_UNS_KEY]!r}."
        raise ValueError(msg)
    tested = (sizes >= min_cells) & ~is_control
    mean, std = _log_moments(adata.X, codes, sizes)
    differs = np.zeros(mean.shape, dtype=bool)  # (n_labels, n_genes)
    for row in np.flatnonzero(tested):
        control = (mean[is_control][0], std[is_control][0], sizes[is_control][0])
        differs[row] = _differs(mean[row], std[row], sizes[row], control, fdr_level)
    n_de_genes = differs.sum(axis=1)
    strong = tested & (n_de_genes >= min_de_genes)
    genes = differs[strong].sum(axis=0) >= min_perturbations
    if not strong.any() or not genes.any():
        msg = (
            f"At least one perturbation must be strong and one gene differ under {min_perturbations} of them; received "
            f"{strong.sum()} strong perturbations (most genes that differ: {n_de_genes.max()}) and {genes.sum()} genes: "
            "lower `min_de_genes` or `min_perturbations`."
        )
        raise ValueError(msg)
    cells = strong[codes]
    controls = np.flatnonzero(is_control[codes])
    if n_controls is not None and len(controls) > n_controls:
        controls = np.random.default_rng(seed).choice(controls, n_controls, replace=False)
    cells[controls] = True

    kept = AnnData(_subset(adata.X, cells, genes), obs=adata.obs[cells].copy(), var=adata.var[genes].copy())
    kept.obs[COLUMNS.PERTURBATION] = pd.Categorical(labels[cells])
    kept.uns[CONTROL_UNS_KEY] = adata.uns[CONTROL_UNS_KEY]
    table = pd.DataFrame({"n_cells": sizes, "n_de_genes": n_de_genes, "kept": strong}, index=pd.Index(names))
    kept.uns[STRONG_EFFECTS] = table[~is_control]
    return kept


def _log_moments(matrix: Any, codes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of log-normalised counts, each of shape ``(n_labels, n_genes)``."""

    def add(totals: list[np.ndarray], counts: sp.csr_matrix, rows: np.ndarray) -> None:
        check_counts(counts, "`adata.X`")
        block = log_normalize(counts) * np.log(2.0)
        present, position = np.unique(rows, return_inverse=True)
        cells = np.arange(len(rows))
        member = sp.csr_matrix((np.ones(len(rows)), (position, cells)), shape=(len(present), len(rows)))
        totals[0][present] += (member @ block).toarray()
        totals[1][present] += (member @ block.power(2)).toarray()

    shapes = [(len(sizes), matrix.shape[1])] * 2
    total, squares = sum_blocks(matrix, add, shapes, codes, block_size=BLOCK_SIZE)
    n = sizes[:, None]
    mean = total / n
    scatter = squares - n * mean**2
    scatter[scatter < 1e-12 * squares] = 0.0  # rounding: all values are equal
    return mean, np.sqrt(scatter / np.maximum(n - 1, 1))


def _differs(
    mean: np.ndarray, std: np.ndarray, n: int, control: tuple[np.ndarray, np.ndarray, int], fdr_level: float
) -> np.ndarray:
    """Mark the genes whose mean differs from that of the controls; a gene without any variance does not.

    The variance is pooled: by chance a rare gene is absent from all cells of a small group, whose own variance of zero
    would make the difference look certain.
    """
    varies = (std > 0) | (control[1] > 0)
    marked = np.zeros(len(mean), dtype=bool)
    if varies.any():
        mean0, std0 = control[0][varies], control[1][varies]
        pvalue = ttest_ind_from_stats(mean[varies], std[varies], n, mean0, std0, control[2], equal_var=True).pvalue
        marked[varies] = false_discovery_control(pvalue) < fdr_level
    return marked


def _subset(matrix: Any, cells: np.ndarray, genes: np.ndarray) -> sp.csr_matrix:
    """Return rows and columns of a matrix in any storage."""
    blocks = map_blocks(matrix, lambda block, kept: block[kept][:, genes], cells)
    return sp.csr_matrix(sp.vstack(list(blocks), format="csr"), dtype=np.float32)


def _filter_genes(adata: AnnData, *, min_cells: int, without: np.ndarray | None = None) -> AnnData:
    genes = sc.pp.filter_genes(adata, min_cells=min_cells, inplace=False)[0]
    genes = genes if without is None else genes & ~without
    return _nonempty(adata[:, genes].copy(), f"found in at least {min_cells} cells")


def _nonempty(adata: AnnData, which: str) -> AnnData:
    if 0 in adata.shape:
        kind = "gene" if adata.n_vars == 0 else "cell"
        msg = f"At least one {kind} must be {which}; received none: these filters are made for the published data set."
        raise ValueError(msg)
    return adata


def _highly_variable(adata: AnnData, n_genes: int) -> np.ndarray:
    if adata.n_vars <= n_genes:
        return np.ones(adata.n_vars, dtype=bool)
    marked = adata.var.get("highly_variable")
    if marked is not None and marked.dtype == bool and marked.sum() == n_genes:
        return marked.to_numpy()
    table = sc.pp.highly_variable_genes(_log_normalized(adata), n_top_genes=n_genes, inplace=False)
    return table["highly_variable"].to_numpy()


def _log_normalized(adata: AnnData) -> AnnData:
    """Return a copy with log-normalised ``X`` and raw counts in ``layers["counts"]``."""
    result = adata.copy()
    result.X = (result.X if is_dask(result.X) else to_csr(result.X)).astype(np.float32)
    result.layers["counts"] = result.X.copy()
    _normalize(result)
    return result


def _normalize(adata: AnnData) -> None:
    """Normalise ``X`` in place; cells without counts stay zero."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some cells have zero counts", UserWarning)
        sc.pp.normalize_total(adata, target_sum=COUNTS_PER_CELL)
    sc.pp.log1p(adata)
