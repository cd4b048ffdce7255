"""Welch's test with weighted cells for many categories at once, by products of sparse matrices."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp

from scvi_cradle._matrix import to_csr, weighted_sums
from scvi_cradle._validation import check_one_of
from scvi_cradle.metrics._welch import ROUNDING, UNUSABLE, Moments, Variance, compare, degrees, moments

SUSPECT = 1e-3  # share of the sum of squares: below it, a difference of sums has lost digits and is taken again


def welch_tests(
    x: Any, test: Any, reference: Any, *, variance: Variance = "reliability", floor: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Test every gene in every category: :func:`scvi_cradle.metrics.weighted_welch` of each column of weights.

    Parameters
    ----------
    x
        Expression, shape ``(n_cells, n_genes)``: sparse matrix or array.
    test, reference
        Weight of every cell in every category, not negative, shapes ``(n_cells, n_categories)``: sparse matrices or
        arrays. A cell with weight 0 is not in the group.
    variance
        As in :func:`scvi_cradle.metrics.weighted_welch`.
    floor
        Where True, shape ``(n_categories, n_genes)``, the variance of the reference is taken if that of the test cells is
        smaller. Test cells that happen not to express a sparse gene have no variance, and a p-value of nearly 0
        without it.

    Returns
    -------
    ``statistic``, ``df``, ``pvalue`` and ``mean_difference`` of shape ``(n_categories, n_genes)`` and ``n_eff`` of the
    test cells, ``(n_categories,)``; where there is nothing to test, the statistic is 0 and the p-value 1.

    Raises
    ------
    ValueError
        For NaN, negative weights or shapes that do not fit.

    Notes
    -----
    Sums of squares are differences here, which lose digits for genes of little spread around a large mean. These genes
    are found by the size of what is left, and computed again around their mean, category by category.
    """
    check_one_of("variance", variance, ("reliability", "frequency", "biased"))
    x = _checked(x, "x")
    w, v = _weights(test, "test", x.shape[0]), _weights(reference, "reference", x.shape[0])
    if w.shape != v.shape:
        msg = f"`test` and `reference` must have one column for each category; received {w.shape[1]} and {v.shape[1]}."
        raise ValueError(msg)
    a = _all_moments(x, w, variance)
    first, of_category = _distinct(v)
    b = Moments(*(m[of_category] for m in _all_moments(x, v[:, first], variance)))
    if floor is not None:
        a = a._replace(variance=np.where(floor, np.maximum(a.variance, b.variance), a.variance))
    return {**compare(a, b), "n_eff": a.n_eff.ravel()}


def _distinct(weights: sp.csc_matrix) -> tuple[list[int], np.ndarray]:
    """Return the first of every set of equal columns, and for each column its set: controls are often shared."""
    known: dict[tuple[bytes, bytes], int] = {}
    first: list[int] = []
    of_category = np.empty(weights.shape[1], dtype=np.int64)
    for k, (start, stop) in enumerate(pairwise(weights.indptr)):
        key = (weights.indices[start:stop].tobytes(), weights.data[start:stop].tobytes())
        if key not in known:
            known[key] = len(first)
            first.append(k)
        of_category[k] = known[key]
    return first, of_category


def _all_moments(x: sp.csr_matrix, weights: sp.csc_matrix, variance: Variance) -> Moments:
    scaled = _scaled(weights)
    if variance == "frequency":
        scaled, kish = weights, scaled
    else:
        kish = scaled
    first, second, one, two = (_sums(m) for m in (scaled, scaled.power(2), kish, kish.power(2)))
    total = np.where(first > 0, first, 1.0)
    sums, size = weighted_sums(x, scaled, np.positive, np.square)
    mean = sums / total
    squares = size - mean**2 * total
    _take_again(x, scaled, mean, squares, size)
    np.copyto(squares, 0.0, where=squares <= ROUNDING * size)
    freedom = degrees(total, second, variance)
    usable = (first > 0) & (freedom > UNUSABLE * first)
    squares /= np.where(usable, freedom, np.inf)
    return Moments(mean, squares, np.where(usable, one**2 / np.where(two > 0, two, 1.0), 0.0))


def _take_again(
    x: sp.csr_matrix, weights: sp.csc_matrix, mean: np.ndarray, squares: np.ndarray, size: np.ndarray
) -> None:
    """Replace means and sums of squares of genes whose squares are a small difference of large numbers."""
    suspect = squares < SUSPECT * size
    for category in np.flatnonzero(suspect.any(axis=1)):
        cells = slice(weights.indptr[category], weights.indptr[category + 1])
        genes = np.flatnonzero(suspect[category])
        values = x[weights.indices[cells]][:, genes].astype(np.float64)
        exact = moments(values, weights.data[cells], "biased")
        mean[category, genes] = exact.mean
        squares[category, genes] = exact.variance * weights.data[cells].sum()


def _scaled(weights: sp.csc_matrix) -> sp.csc_matrix:
    """Divide every column by its largest weight: squares of small weights would be lost."""
    largest = weights.max(axis=0).toarray().ravel()
    data = weights.data / np.repeat(largest, np.diff(weights.indptr))
    return sp.csc_matrix((data, weights.indices, weights.indptr), shape=weights.shape)


def _sums(weights: sp.csc_matrix) -> np.ndarray:
    """Return the sum of every column, shape ``(n_categories, 1)``."""
    return np.asarray(weights.sum(axis=0), dtype=np.float64).reshape(-1, 1)


def _checked(x: Any, name: str) -> sp.csr_matrix:
    matrix = to_csr(x)
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    if not np.isfinite(matrix.data).all() or not matrix.shape[0] or not matrix.shape[1]:
        msg = f"`{name}` must hold finite values, cells x columns; received NaN, infinite values or nothing."
        raise ValueError(msg)
    return matrix


def _weights(weights: Any, name: str, n_cells: int) -> sp.csc_matrix:
    w = sp.csc_matrix(_checked(weights, name), dtype=np.float64)
    if w.shape[0] != n_cells or (w.data < 0).any():
        msg = f"`{name}` must hold one weight, not negative, for each of {n_cells} cells; received shape {w.shape} or values below 0."
        raise ValueError(msg)
    w.eliminate_zeros()
    return w
