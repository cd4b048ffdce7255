"""Sparse-aware helpers on count matrices: nothing of size cells x genes is made dense here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from scvi_cradle._constants import COUNTS_PER_CELL
from scvi_cradle._validation import check_key

BLOCK_SIZE = 1_024  # rows: of 20,000 genes with 16 % counts 25 MB
GROUPED_BLOCK_SIZE = 4_096  # where every block is added to dense sums of many groups


def get_matrix(adata: AnnData, layer: str | None) -> Any:
    """Return ``adata.X`` or ``adata.layers[layer]`` as it is stored (dense, sparse, backed or dask)."""
    if layer is None:
        if adata.X is None:
            msg = "The AnnData must hold counts; received `X=None`: name the layer with the counts, e.g. `layer='counts'`."
            raise ValueError(msg)
        return adata.X
    check_key(adata.layers, layer, "adata.layers", "layer")
    return adata.layers[layer]


def iter_blocks(matrix: Any, block_size: int = BLOCK_SIZE) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Yield ``(first row, block)`` with CSR blocks of at most ``block_size`` rows, from any storage."""
    n_rows = matrix.shape[0]
    if sp.issparse(matrix) and matrix.format == "csc":
        matrix = matrix.tocsr()
    for start in range(0, n_rows, block_size):
        block = matrix[start : min(start + block_size, n_rows)]
        if hasattr(block, "compute"):
            block = block.compute()
        yield start, sp.csr_matrix(block)


def to_csr(matrix: Any) -> sp.csr_matrix:
    """Return ``matrix`` as one CSR matrix; a CSR matrix is returned as it is, without a copy."""
    if isinstance(matrix, sp.csr_matrix):
        return matrix
    if sp.issparse(matrix):
        return sp.csr_matrix(matrix)
    blocks = [block for _, block in iter_blocks(matrix)]
    return sp.vstack(blocks, format="csr") if blocks else sp.csr_matrix(matrix.shape)


def stack_rows(blocks: list[sp.csr_matrix]) -> sp.csr_matrix:
    """Return CSR blocks as one matrix; the list is emptied from its end, so that blocks and matrix share the memory of one."""
    n_stored = sum(block.nnz for block in blocks)
    n_rows, n_columns = sum(block.shape[0] for block in blocks), blocks[0].shape[1]
    index = blocks[0].indices.dtype if n_stored < np.iinfo(np.int32).max else np.dtype(np.int64)
    data, indices = np.empty(n_stored, dtype=blocks[0].dtype), np.empty(n_stored, dtype=index)
    lengths = np.concatenate([np.diff(block.indptr) for block in blocks])
    end = n_stored
    while blocks:
        block = blocks.pop()
        data[end - block.nnz : end], indices[end - block.nnz : end] = block.data, block.indices
        end -= block.nnz
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(index)
    return sp.csr_matrix((data, indices, indptr), shape=(n_rows, n_columns))


def counts_problem(matrix: Any) -> str | None:
    """Return what keeps ``matrix`` from being raw counts (NaN, infinity, negative, fractional), or ``None``."""
    for _, block in iter_blocks(matrix):
        values = block.data
        if values.dtype.kind in "biu":
            if values.dtype.kind == "i" and values.size and values.min() < 0:
                return "negative values"
            continue
        if not np.isfinite(values).all():
            return "NaN or infinite values"
        if (values < 0).any():
            return "negative values"
        if (values != np.round(values)).any():
            return "fractional values"
    return None


def check_counts(matrix: Any, where: str) -> None:
    """Raise ``ValueError`` unless every value is a finite non-negative integer."""
    problem = counts_problem(matrix)
    if problem is not None:
        msg = f"{where} must hold raw counts; received {problem}: pass the layer that holds the counts, e.g. `layer='counts'`."
        raise ValueError(msg)


def check_finite(matrix: Any, where: str) -> None:
    """Raise ``ValueError`` unless every value is finite."""
    for _, block in iter_blocks(matrix):
        if block.dtype.kind == "f" and not np.isfinite(block.data).all():
            msg = f"{where} must hold finite values; received NaN or infinite values: drop these cells or genes."
            raise ValueError(msg)


def check_non_negative(matrix: Any, where: str) -> None:
    """Raise ``ValueError`` unless no value is negative."""
    for _, block in iter_blocks(matrix):
        if block.dtype.kind in "if" and block.data.size and block.data.min() < 0:
            msg = f"{where} must hold values that are not negative; received {block.data.min():.3g}: pass normalised values that are not scaled or centred, e.g. of `scanpy.pp.log1p`."
            raise ValueError(msg)


def row_sums(matrix: Any) -> np.ndarray:
    """Return the sum of every row in float64."""
    sums = [np.asarray(block.sum(axis=1, dtype=np.float64)).ravel() for _, block in iter_blocks(matrix)]
    return np.concatenate(sums) if sums else np.zeros(0)


def weighted_sums(matrix: Any, weights: Any, *functions: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """Return weighted sums over cells of functions of the values, with no second copy of the matrix.

    Parameters
    ----------
    matrix
        Values in any storage, shape ``(n_cells, n_genes)``.
    weights
        Sparse weights of the cells, shape ``(n_cells, n_groups)``.
    functions
        Functions of an array of values, in float64, that are 0 at 0.

    Returns
    -------
    For each function a float64 array of shape ``(n_groups, n_genes)``.
    """
    of_cell = sp.csr_matrix(weights)
    sums = [np.zeros((of_cell.shape[1], matrix.shape[1])) for _ in functions]
    for start, block in iter_blocks(matrix, GROUPED_BLOCK_SIZE):
        rows = sp.csr_matrix(of_cell[start : start + block.shape[0]].T)
        values = block.data.astype(np.float64)
        for total, function in zip(sums, functions, strict=True):
            block.data = function(values).astype(np.float64, copy=False)
            total += (rows @ block).toarray()
    return sums


def log_normalize(block: sp.csr_matrix) -> sp.csr_matrix:
    """Return ``log2(1 + 1e4 x / total)`` of a block of counts as a new float64 matrix; empty cells stay 0."""
    out = block.astype(np.float64)
    out.sum_duplicates()
    totals = np.asarray(out.sum(axis=1)).ravel()  # (n_cells,)
    scale = COUNTS_PER_CELL / np.where(totals > 0, totals, 1.0)
    out.data = np.log1p(out.data * np.repeat(scale, np.diff(out.indptr))) / np.log(2.0)
    return out
