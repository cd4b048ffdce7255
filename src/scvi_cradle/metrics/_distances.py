"""Distances between two groups of cells: maximum mean discrepancy and energy distance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial.distance import cdist

from scvi_cradle._matrix import iter_blocks
from scvi_cradle._validation import check_positive, preview

CHUNK = 1_000
N_REFERENCE = 500
BANDWIDTH_FACTORS = (0.5, 1.0, 2.0)
PUBLISHED_BANDWIDTHS = 1000.0 / 2.0**5 * 2.0 ** np.arange(10)


def mmd_rbf(
    real: Any, predicted: Any, *, bandwidth: float | None = None, reference: Any = None, unbiased: bool = False
) -> float:
    r"""Squared maximum mean discrepancy with Gaussian kernels of three widths (quantile-hurdle paper, section 9.3).

    Parameters
    ----------
    real, predicted
        Cells, shapes ``(n_real, n_features)`` and ``(n_predicted, n_features)``: array, DataFrame or sparse matrix, in
        any one space (latent or log-normalised), which is for the caller to name. Of two DataFrames the columns of the
        second are put in the order of the first. All cells are taken: where values are compared, draw as many cells of
        every group first (:func:`energy_distance` does so itself), since the value falls with their number.
    bandwidth
        Middle width :math:`\sigma_0`. ``None``: square root of the median squared distance between cells of
        ``reference``, of at most 500 of them, evenly spaced.
    reference
        Cells that set the width, the controls in the paper. ``None``: ``real``. To compare several predictions give
        all the same ``reference`` or ``bandwidth``.
    unbiased
        Leave out the distances of cells to themselves. The paper does not; its value falls with the number of cells.

    Returns
    -------
    Mean over :math:`\sigma \in \{\sigma_0/2, \sigma_0, 2\sigma_0\}` of :math:`\overline{k(x, x')} +
    \overline{k(y, y')} - 2\overline{k(x, y)}` with :math:`k = \exp(-d^2 / 2\sigma^2)`; 0 for equal cells, negative
    values are possible with ``unbiased``.

    Raises
    ------
    ValueError
        For NaN, too few cells (the median needs two), other features, or a width of 0.
    """
    x, y = paired_cells(real, predicted, 2 if unbiased else 1)
    if bandwidth is None:
        if reference is None and len(x) < 2:
            msg = (
                "The width of the kernel needs at least 2 cells of `real`; received 1: give `bandwidth` or `reference`."
            )
            raise ValueError(msg)
        reference = in_order_of(real, reference, "real", "reference")
        anchor = x if reference is None else as_cells(reference, "reference", 2)
        bandwidth = median_distance(anchor, x.shape[1])
        if bandwidth == 0:
            msg = "The width of the kernel must be positive; received cells with a median distance of 0: give `bandwidth`."
            raise ValueError(msg)
    check_positive("bandwidth", bandwidth)
    scales = [2.0 * (bandwidth * f) ** 2 for f in BANDWIDTH_FACTORS]
    return _mmd(x, y, scales, unbiased=unbiased) / len(scales)


def mmd_multiscale(real: Any, predicted: Any, *, unbiased: bool = False) -> float:
    r"""Squared maximum mean discrepancy with the ten fixed kernels of the discrepancy-VAE and PerturbedVAE (table 11).

    Parameters
    ----------
    real, predicted, unbiased
        As for :func:`mmd_rbf`. The widths are absolute, so that a value means something only for cells in the space of
        the paper (5,000 genes, log-normalised).

    Returns
    -------
    As :func:`mmd_rbf` with the kernel :math:`\sum_{i=0}^{9} \exp(-d^2 / b_i)`, :math:`b_i = (1000 / 2^5)\, 2^i`.

    Raises
    ------
    ValueError
        For NaN, too few cells or other features.
    """
    x, y = paired_cells(real, predicted, 2 if unbiased else 1)
    return _mmd(x, y, PUBLISHED_BANDWIDTHS.tolist(), unbiased=unbiased)


def energy_distance(
    real: Any, predicted: Any, *, n_cells: int | None = None, squared: bool = False, seed: int | None = 0
) -> float:
    r"""Energy distance between two groups of cells, :math:`2E\|x-y\| - E\|x-x'\| - E\|y-y'\|`.

    Parameters
    ----------
    real, predicted
        Cells as for :func:`mmd_rbf`.
    n_cells
        Cells of either side, drawn without replacement. ``None``: as many as the smaller side has. Both sides always
        have the same number, since the spread of the estimate depends on it.
    squared
        Use squared Euclidean distances (scPerturb); the result is then twice the squared distance of the means.
    seed
        Seed of the draw.

    Returns
    -------
    Unbiased estimate: distances of cells to themselves are left out, so that two samples of one distribution give 0 on
    average and can give negative values. (Other tools average over them, too, which adds a term of order 1/n.)

    Raises
    ------
    ValueError
        For NaN, fewer than two cells, other features, or ``n_cells`` above what there is.

    References
    ----------
    Székely and Rizzo 2013; Peidli et al. 2024 (scPerturb).
    """
    x, y = paired_cells(real, predicted, 2)
    most = min(len(x), len(y))
    if n_cells is not None:
        check_positive("n_cells", n_cells, integer=True)
    if n_cells is not None and not 2 <= n_cells <= most:
        msg = f"`n_cells` must be between 2 and the size of the smaller group, {most}; received {n_cells}."
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    x, y = (v if len(v) == (n_cells or most) else v[rng.choice(len(v), n_cells or most, replace=False)] for v in (x, y))
    metric = "sqeuclidean" if squared else "euclidean"
    return 2.0 * _mean_of(x, y, metric) - _mean_of(x, x, metric, own=True) - _mean_of(y, y, metric, own=True)


def _mean_of(x: np.ndarray, y: np.ndarray, metric: str, *, own: bool = False) -> float:
    """Mean distance over all pairs of cells, of different cells where both groups are one."""
    total = sum(cdist(x[i : i + CHUNK], y, metric).sum() for i in range(0, len(x), CHUNK))
    return float(total / (len(x) * (len(y) - 1 if own else len(y))))


def _mmd(x: np.ndarray, y: np.ndarray, scales: list[float], *, unbiased: bool) -> float:
    def mean(a: np.ndarray, b: np.ndarray, *, own: bool) -> float:
        total = 0.0
        for i in range(0, len(a), CHUNK):
            d2 = cdist(a[i : i + CHUNK], b, "sqeuclidean")
            total += sum(np.exp(-d2 / s).sum() for s in scales)
        left_out = len(a) * len(scales) if own and unbiased else 0
        return float((total - left_out) / (len(a) * (len(b) - 1 if own and unbiased else len(b))))

    return mean(x, x, own=True) + mean(y, y, own=True) - 2.0 * mean(x, y, own=False)


def median_distance(cells: np.ndarray, n_features: int) -> float:
    """Return the square root of the median squared distance between at most 500 of ``cells``, evenly spaced."""
    if cells.shape[1] != n_features:
        msg = f"`reference` must have the features of `real`; received {cells.shape[1]} and {n_features}."
        raise ValueError(msg)
    rows = np.unique(np.linspace(0, len(cells) - 1, min(len(cells), N_REFERENCE)).astype(np.int64))
    chosen = cells[rows]
    d2 = cdist(chosen, chosen, "sqeuclidean")[np.triu_indices(len(chosen), 1)]
    return float(np.sqrt(np.median(d2)))


def paired_cells(real: Any, predicted: Any, n_least: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both groups as dense float64 matrices with the same features in the same order."""
    predicted = in_order_of(real, predicted, "real", "predicted")
    x, y = as_cells(real, "real", n_least), as_cells(predicted, "predicted", n_least)
    if x.shape[1] != y.shape[1]:
        msg = f"`real` and `predicted` must have the same features; received {x.shape[1]} and {y.shape[1]}."
        raise ValueError(msg)
    return x, y


def in_order_of(first: Any, second: Any, name: str, other: str) -> Any:
    """Return ``second`` with its columns in the order of ``first`` where both are DataFrames, else as it is.

    Raises
    ------
    ValueError
        If two DataFrames have other columns, or columns of one name.
    """
    if not (isinstance(first, pd.DataFrame) and isinstance(second, pd.DataFrame)):
        return second
    differing = first.columns.symmetric_difference(second.columns, sort=False)
    if len(differing):
        msg = f"`{name}` and `{other}` must have the same features; received DataFrames that differ in the columns {preview(differing)}: rename or choose columns, or pass arrays."
        raise ValueError(msg)
    for table, which in ((first, name), (second, other)):
        if not table.columns.is_unique:
            msg = f"The columns of `{which}` must be unique; received {preview(table.columns[table.columns.duplicated()].unique())} more than once: make them unique, or pass arrays."
            raise ValueError(msg)
    return second[first.columns]


def as_cells(values: Any, name: str, n_least: int) -> np.ndarray:
    """Return cells as a dense float64 matrix; a vector is one feature."""
    if sp.issparse(values):
        blocks = [block.toarray() for _, block in iter_blocks(values)]
        cells = np.vstack(blocks).astype(np.float64) if blocks else np.zeros(values.shape)
    else:
        cells = np.asarray(values, dtype=np.float64)
    cells = cells[:, None] if cells.ndim == 1 else cells
    if cells.ndim != 2 or len(cells) < n_least or not cells.shape[1]:
        msg = f"`{name}` must hold at least {n_least} cells with features, shape (n_cells, n_features); received shape {cells.shape}."
        raise ValueError(msg)
    if not np.isfinite(cells).all():
        msg = f"`{name}` must hold finite values; received NaN or infinite values."
        raise ValueError(msg)
    return cells
