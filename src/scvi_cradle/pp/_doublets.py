"""Doublet calls, batch by batch. Functions return their notes; the caller turns them into warnings."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from scvi_cradle._matrix import rows_of, to_csr
from scvi_cradle._qc import ALL_CELLS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_CELLS = 30_000
MIN_CELLS = MIN_GENES = 30
N_COMPONENTS = 30
METHODS = ("scrublet", "scrublet-package")

Calls = tuple[np.ndarray, "str | None"]


def check_method(method: str) -> None:
    """Raise ``ImportError`` when the package behind ``method`` is not installed."""
    if method == "scrublet-package" and find_spec("scrublet") is None:
        msg = (
            "`doublets='scrublet-package'` needs the package scrublet, which is not installed: "
            "`pip install 'scvi-cradle[scrublet]'`, or use `doublets='scrublet'`."
        )
        raise ImportError(msg)


def call_doublets(
    matrix: Any, method: str, *, batches: np.ndarray | None, seed: int, max_cells: int = MAX_CELLS
) -> tuple[np.ndarray, list[str]]:
    """Call doublets within every batch.

    Parameters
    ----------
    matrix
        Counts of shape ``(n_cells, n_genes)`` in any storage. Of a matrix on disk or a dask array only the cells of a
        batch, or of a chunk of it, are in memory at a time.
    method
        ``"scrublet"`` (scanpy's) or ``"scrublet-package"``; both with exact neighbours.
    batches
        Batch of every cell, or ``None``.
    seed
        Seed of the simulated doublets and of the chunks.
    max_cells
        Larger batches are shuffled and called in chunks of equal size.

    Returns
    -------
    Boolean array of shape ``(n_cells,)`` and the notes that the user has to see.
    """
    counts = to_csr(matrix) if sp.issparse(matrix) else matrix
    names = np.full(counts.shape[0], ALL_CELLS) if batches is None else batches
    calls, notes = np.zeros(counts.shape[0], dtype=bool), []
    run = _scanpy_scrublet if method == "scrublet" else _package_scrublet
    for batch in np.unique(names):
        chunks = list(_chunks(np.flatnonzero(names == batch), max_cells, seed))
        if len(chunks) > 1:
            notes.append(f"`doublet`, batch {str(batch)!r}: above {max_cells} cells, called in {len(chunks)} chunks.")
        for rows in chunks:
            calls[rows], note = _call_usable(rows_of(counts, rows), run, seed)
            if note is not None:
                notes.append(f"`doublet`, batch {str(batch)!r}: {note}; none of these {len(rows)} cells is called.")
    return calls, notes


def _chunks(rows: np.ndarray, max_cells: int, seed: int) -> Iterator[np.ndarray]:
    n_chunks = -(-len(rows) // max_cells)
    if n_chunks > 1:
        rows = np.random.default_rng(seed).permutation(rows)
    yield from np.array_split(rows, n_chunks)


def _call_usable(counts: sp.csr_matrix, run: Callable[[sp.csr_matrix, int], Calls], seed: int) -> Calls:
    calls = np.zeros(counts.shape[0], dtype=bool)
    genes = np.flatnonzero(np.bincount(counts.indices[counts.data > 0], minlength=counts.shape[1]) >= 3)
    used = counts[:, genes]
    cells = np.flatnonzero(np.asarray((used > 0).sum(axis=1)).ravel() >= 3)
    if len(cells) < MIN_CELLS or len(genes) < MIN_GENES:
        return calls, f"{len(cells)} cells and {len(genes)} genes with counts, fewer than {MIN_CELLS} of one"
    with warnings.catch_warnings(), _threads_kept():
        warnings.simplefilter("ignore")
        calls[cells], note = run(used[cells].astype(np.float32), seed)
    return calls, note


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Put the thread count of torch back, where it is loaded: numba's kernels in Scrublet change it for the process."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch is not None else None
    try:
        yield
    finally:
        if torch is not None:
            torch.set_num_threads(threads)


def _scanpy_scrublet(counts: sp.csr_matrix, seed: int) -> Calls:
    import scanpy as sc

    adata = AnnData(counts)
    adata.obs_names = [str(i) for i in range(adata.n_obs)]
    n_components = min(N_COMPONENTS, _n_variable_genes(adata) - 1, adata.n_obs // 2)
    if n_components < 2:
        return np.zeros(adata.n_obs, dtype=bool), "too few highly variable genes"
    # the argument was renamed: `random_state` became `rng`
    seed_argument = "rng" if "rng" in inspect.signature(sc.pp.scrublet).parameters else "random_state"
    # approximate neighbours fail with scipy 1.17 above some 2,700 cells
    options = {"use_approx_neighbors": False, "n_prin_comps": n_components, "verbose": False, seed_argument: seed}
    sc.pp.scrublet(adata, **options)
    note = None if "threshold" in adata.uns["scrublet"] else "no doublet score separates two modes"
    return adata.obs["predicted_doublet"].isin([True]).to_numpy(dtype=bool), note


def _n_variable_genes(adata: AnnData) -> int:
    """Count the genes that scanpy's Scrublet will keep; its principal components cannot be more."""
    import scanpy as sc

    prepared = adata.copy()
    sc.pp.filter_genes(prepared, min_cells=3)
    sc.pp.filter_cells(prepared, min_genes=3)
    sc.pp.normalize_total(prepared)
    sc.pp.log1p(prepared)
    sc.pp.highly_variable_genes(prepared)
    return int(prepared.var["highly_variable"].sum())


def _package_scrublet(counts: sp.csr_matrix, seed: int) -> Calls:
    scrublet = importlib.import_module("scrublet")
    state = np.random.get_state()  # noqa: NPY002 - the package seeds numpy's global generator; it is put back
    try:
        caller = scrublet.Scrublet(counts.tocsc(), random_state=seed)
        # it keeps the 15 % most variable genes
        n_components = max(2, min(N_COMPONENTS, int(0.15 * counts.shape[1]) - 1, counts.shape[0] // 2))
        _, calls = caller.scrub_doublets(use_approx_neighbors=False, n_prin_comps=n_components, verbose=False)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    if calls is None:
        return np.zeros(counts.shape[0], dtype=bool), "no doublet score separates two modes"
    return np.asarray(calls, dtype=bool), None
