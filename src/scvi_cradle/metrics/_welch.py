"""Welch's test with weighted cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

from scvi_cradle._validation import check_one_of
from scvi_cradle.metrics._distances import as_cells, in_order_of

Variance: TypeAlias = Literal["reliability", "frequency", "biased"]
ROUNDING = 1e-12  # of the weighted sum of squares: a smaller spread is none
UNUSABLE = 1e-12  # of the sum of the weights: a smaller denominator of the variance is none


class Moments(NamedTuple):
    """Of every gene, for one group of cells ``(n_genes,)`` or for several ``(n_groups, n_genes)``."""

    mean: np.ndarray
    variance: np.ndarray
    n_eff: Any  # one number, or an array of shape (n_groups, 1)


def kish_effective_size(weights: ArrayLike) -> float:
    r"""Return the effective number of weighted cells, :math:`(\sum w)^2 / \sum w^2` (Kish 1965).

    Parameters
    ----------
    weights
        Non-negative weights, shape ``(n_cells,)``.

    Returns
    -------
    The number of cells for equal weights, less otherwise; 0 when all weights are 0.

    Raises
    ------
    ValueError
        For negative, infinite or missing weights.
    """
    w = _weights(weights, "weights", None)
    largest = w.max(initial=0.0)
    if largest == 0:
        return 0.0
    scaled = w / largest  # no underflow of squares
    return float(scaled.sum() ** 2 / (scaled**2).sum())


def weighted_welch(
    x_test: Any,
    weights: ArrayLike,
    x_reference: Any,
    *,
    reference_weights: Sequence[float] | np.ndarray | None = None,
    variance: Variance = "reliability",
) -> pd.DataFrame:
    r"""Test every gene for a difference of means between weighted cells and a reference (quantile-hurdle paper, 4.3).

    Parameters
    ----------
    x_test, x_reference
        Expression, shapes ``(n_test, n_genes)`` and ``(n_reference, n_genes)``: array, sparse matrix or DataFrame,
        whose columns then name the genes. Of two DataFrames the columns of ``x_reference`` are put in the order of
        ``x_test``.
    weights
        Weight of every test cell, e.g. the probability that it is perturbed, shape ``(n_test,)``.
    reference_weights
        Weight of every reference cell; ``None``: 1, as published.
    variance
        Of the weighted test cells (and of the weighted reference): ``"reliability"``:
        :math:`\sum w (x - m)^2 / (V_1 - V_2 / V_1)` with :math:`V_k = \sum w^k`, which does not depend on the scale of
        the weights; ``"frequency"``: denominator :math:`V_1 - 1`, as the text can be read; ``"biased"``: :math:`V_1`.

    Returns
    -------
    DataFrame over genes: ``statistic``, ``df``, ``pvalue`` (two-sided), ``mean_difference`` (test minus reference),
    ``n_eff`` of the test cells. Where there is nothing to test (an effective size of 1 or less, no variance, a
    denominator that is not positive) the statistic is 0 and the p-value 1. A group whose spread around its mean is
    below 1e-12 of its sum of squares has no variance: the rest is rounding.

    Raises
    ------
    ValueError
        For NaN, negative weights, shapes that do not fit, or DataFrames with other or doubled columns.

    Notes
    -----
    With equal weights this is Welch's test, ``scipy.stats.ttest_ind(equal_var=False)``.

    **Weights that look at expression need weighted controls.** Choosing test cells by any score of their expression
    moves their mean along that score, also when the score is noise. On non-targeting cells of a real screen (Papalexi
    2021), 200 of them called perturbed against 800, a nominal .05 became .073 with weights p and controls of weight 1,
    .078 when the score was cross-fitted, and .050 when the controls were weighted by the same, cross-fitted score: give
    it as ``reference_weights``. Even the plain test (.051) had a hit after Bonferroni in 20 of 100 null runs: sparse
    genes have other tails than Student's (``python benchmarks/metric_study.py welch``).
    """
    check_one_of("variance", variance, ("reliability", "frequency", "biased"))
    genes = next((x.columns for x in (x_test, x_reference) if isinstance(x, pd.DataFrame)), None)
    x_reference = in_order_of(x_test, x_reference, "x_test", "x_reference")
    test, reference = _matrix(x_test, "x_test"), _matrix(x_reference, "x_reference")
    if test.shape[1] != reference.shape[1]:
        msg = f"`x_test` and `x_reference` must have the same genes; received {test.shape[1]} and {reference.shape[1]}."
        raise ValueError(msg)
    w = _weights(weights, "weights", test.shape[0])
    v = np.ones(reference.shape[0]) if reference_weights is None else reference_weights
    v = _weights(v, "reference_weights", reference.shape[0])
    a, b = moments(test, w, variance), moments(reference, v, variance)
    columns = {**compare(a, b), "n_eff": np.full(len(a.mean), float(a.n_eff))}
    return pd.DataFrame(columns, index=genes)


def compare(a: Moments, b: Moments) -> dict[str, np.ndarray]:
    """Return ``statistic, df, pvalue, mean_difference`` from the moments of test and reference cells."""
    difference = a.mean - b.mean
    part_a, part_b = (m.variance / np.where(m.n_eff > 0, m.n_eff, np.inf) for m in (a, b))
    squared = part_a + part_b
    valid = (a.n_eff > 1) & (b.n_eff > 1) & (squared > 0)
    safe = np.where(valid, squared, 1.0)
    statistic = np.where(valid, difference / np.sqrt(safe), 0.0)
    share_a, share_b = part_a / safe, part_b / safe
    spread = share_a**2 / np.maximum(a.n_eff - 1, 1e-12) + share_b**2 / np.maximum(b.n_eff - 1, 1e-12)
    df = np.where(valid, 1.0 / np.where(valid, spread, 1.0), 1.0)
    pvalue = np.where(valid, 2.0 * student_t.sf(np.abs(statistic), df), 1.0)
    return {"statistic": statistic, "df": df, "pvalue": pvalue, "mean_difference": difference}


def moments(x: np.ndarray | sp.csr_matrix, w: np.ndarray, variance: Variance) -> Moments:
    """Return the moments of weighted cells, where ``x`` holds no stored value twice."""
    x, w = x[w > 0], w[w > 0]
    if not len(w):
        return Moments(np.zeros(x.shape[1]), np.zeros(x.shape[1]), 0.0)
    if variance != "frequency":  # the other forms do not depend on the scale, squares of small weights would be lost
        w = w / w.max()
    total = float(w.sum())
    mean = np.asarray(w @ x).ravel() / total
    if isinstance(x, sp.csr_matrix):  # the zeros of a gene contribute (sum of their weights) * mean^2
        stored = sp.csr_matrix((np.ones_like(x.data), x.indices, x.indptr), shape=x.shape)
        zeros = np.maximum(total - np.asarray(w @ stored).ravel(), 0.0)
        zeros[stored.getnnz(axis=0) == x.shape[0]] = 0.0
        centred = x.copy()
        centred.data = (x.data - mean[x.indices]) ** 2
        squares = np.asarray(w @ centred).ravel() + zeros * mean**2
        size = np.asarray(w @ x.power(2)).ravel()
    else:
        squares, size = w @ (x - mean) ** 2, w @ x**2
    squares = np.where(squares > ROUNDING * size, squares, 0.0)
    freedom = degrees(total, float((w**2).sum()), variance)
    usable = freedom > UNUSABLE * total
    return Moments(
        mean, squares / freedom if usable else np.zeros_like(mean), kish_effective_size(w) if usable else 0.0
    )


def degrees(first: Any, second: Any, variance: Variance) -> Any:
    """Return the denominator of the variance from the sums of the weights and of their squares."""
    if variance == "frequency":
        return first - 1.0
    return first if variance == "biased" else first - second / first


def _matrix(x: Any, name: str) -> np.ndarray | sp.csr_matrix:
    if sp.issparse(x):
        matrix = sp.csr_matrix(x, dtype=np.float64, copy=True)
        matrix.sum_duplicates()
        if not np.isfinite(matrix.data).all() or not matrix.shape[0] or not matrix.shape[1]:
            msg = f"`{name}` must hold finite values of cells x genes; received NaN, infinite values or nothing."
            raise ValueError(msg)
        return matrix
    return as_cells(x, name, 1)


def _weights(weights: ArrayLike, name: str, n: int | None) -> np.ndarray:
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 1 or (n is not None and len(w) != n):
        msg = f"`{name}` must hold one number for every cell{'' if n is None else f', {n} of them'}; received shape {w.shape}."
        raise ValueError(msg)
    if not (np.isfinite(w) & (w >= 0)).all():
        msg = f"`{name}` must be finite and not negative; received values from {np.min(w)} to {np.max(w)}."
        raise ValueError(msg)
    return w
