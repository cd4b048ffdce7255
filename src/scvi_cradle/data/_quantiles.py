"""Quantiles of the positive values of every gene."""

from __future__ import annotations

from typing import Any

import numpy as np

from scvi_cradle._matrix import rows_of, to_csr


def empirical_quantiles(
    matrix: Any, levels: np.ndarray, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of positive values of every gene and the quantiles of these values.

    Parameters
    ----------
    matrix
        Cells x genes in any storage.
    levels
        Levels of the quantiles, shape ``(n_levels,)``.
    rows
        Positions of the cells that count; default: all.

    Returns
    -------
    Shares ``(n_genes,)``, between ``1 / (n + 1)`` and ``n / (n + 1)`` for ``n`` cells, and quantiles
    ``(n_genes, n_levels)``, linear between the ordered values. A gene without positive values gets the smallest share
    and the quantiles of the positive values of all genes.

    Raises
    ------
    ValueError
        If there is no positive value at all.
    """
    columns = (to_csr(matrix) if rows is None else rows_of(matrix, rows)).tocsc()
    columns.sum_duplicates()
    n_cells, n_genes = columns.shape
    if not (columns.data > 0).any():
        msg = f"The cells must hold positive values; received {n_cells} cells of zeros."
        raise ValueError(msg)
    share, quantiles = np.zeros(n_genes), np.zeros((n_genes, len(levels)))
    for gene in range(n_genes):
        values = columns.data[columns.indptr[gene] : columns.indptr[gene + 1]]
        values = values[values > 0]
        share[gene] = len(values) / n_cells
        if len(values):
            quantiles[gene] = np.quantile(values.astype(np.float64), levels)
    silent = share == 0
    if silent.any():
        quantiles[silent] = np.quantile(columns.data[columns.data > 0].astype(np.float64), levels)
    return share.clip(1 / (n_cells + 1), n_cells / (n_cells + 1)), quantiles
