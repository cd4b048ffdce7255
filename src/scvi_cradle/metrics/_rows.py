"""Scores of single rows of effects, arrays of shape ``(n_perturbations, n_genes)``, truth first.

Where a function takes ``kept``, a boolean array of the same shape, the other entries do not exist for it.
"""

from __future__ import annotations

import numpy as np

CONSTANT = 1e-10  # a vector whose spread is below this share of its size counts as constant


def unit_rows(values: np.ndarray, *, centre: bool, kept: np.ndarray | None = None) -> np.ndarray:
    """Scale every row to length one, after taking off its mean if asked; rows without spread become zero."""
    if kept is not None:
        values = np.where(kept, values, 0.0)
    moved = values
    if centre:
        n = values.shape[1] if kept is None else np.maximum(kept.sum(axis=1, keepdims=True), 1)
        moved = values - values.sum(axis=1, keepdims=True) / n
        moved = moved if kept is None else np.where(kept, moved, 0.0)
    length = np.linalg.norm(moved, axis=1, keepdims=True)
    known = length > CONSTANT * np.linalg.norm(values, axis=1, keepdims=True)
    return np.where(known, moved / np.where(known, length, 1.0), 0.0)


def less(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return ``values - reference``; rows that differ from it by rounding only become zero."""
    difference = values - reference
    size = np.linalg.norm(values, axis=-1, keepdims=True) + np.linalg.norm(reference, axis=-1, keepdims=True)
    return np.where(np.linalg.norm(difference, axis=-1, keepdims=True) > CONSTANT * size, difference, 0.0)


def pearson_rows(real: np.ndarray, predicted: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    """Return Pearson's correlation of every row; 0 where one side is constant."""
    product = unit_rows(real, centre=True, kept=kept) * unit_rows(predicted, centre=True, kept=kept)
    return np.clip(product.sum(axis=1), -1.0, 1.0)


def is_constant(values: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    """Return for every row whether all of its values are equal, which leaves a correlation undefined."""
    return np.asarray(~unit_rows(values, centre=True, kept=kept).any(axis=1))


def top_k(values: np.ndarray, k: int, kept: np.ndarray | None = None) -> np.ndarray:
    """Mark the ``k`` largest absolute non-zero values of every row; ties go to the first gene."""
    size = np.abs(values) if kept is None else np.where(kept, np.abs(values), 0.0)
    chosen = np.argsort(-size, axis=1, kind="stable")[:, :k]
    marked = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(marked, chosen, values=True, axis=1)
    return marked & (size > 0)


def jaccard_rows(real: np.ndarray, predicted: np.ndarray, k: int, kept: np.ndarray | None = None) -> np.ndarray:
    """Return the Jaccard index of the ``k`` largest absolute non-zero effects of every row."""
    first, second = top_k(real, k, kept), top_k(predicted, k, kept)
    union = (first | second).sum(axis=1)
    return (first & second).sum(axis=1) / np.maximum(union, 1)


def discrimination_rows(real: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return for every row 1 - (rank of its own truth among all truths by cosine distance) / (n - 1)."""
    n = len(real)
    if n < 2:
        return np.full(n, 0.5)
    similarity = unit_rows(predicted, centre=False) @ unit_rows(real, centre=False).T  # (predicted, real)
    lead = similarity - np.diagonal(similarity)[:, None]
    tied = np.abs(lead) <= CONSTANT
    closer = ((lead > 0) & ~tied).sum(axis=1) + (tied.sum(axis=1) - 1) / 2.0
    return 1.0 - closer / (n - 1)


def flat_sums(real: np.ndarray, predicted: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    """Return what each row adds to a correlation over all rows: n, x, y, xx, yy, xy; shape ``(n_perturbations, 6)``."""
    kept = np.ones(real.shape, dtype=bool) if kept is None else kept
    shift = real[kept].mean() if kept.any() else 0.0
    x, y = np.where(kept, real - shift, 0.0), np.where(kept, predicted - shift, 0.0)
    n = kept.sum(axis=1).astype(np.float64)
    return np.stack([n, x.sum(1), y.sum(1), (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)], axis=1)


def flat_pearson(sums: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation from totals of :func:`flat_sums`, ``(..., 6)``; 0 where one side is constant."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    n = np.maximum(n, 1.0)
    var_x, var_y = xx - x * x / n, yy - y * y / n
    known = (var_x > CONSTANT * xx) & (var_y > CONSTANT * yy)
    r = (xy - x * y / n) / np.sqrt(np.where(known, var_x * var_y, 1.0))
    return np.where(known, np.clip(r, -1.0, 1.0), 0.0)


def flat_r2(sums: np.ndarray) -> np.ndarray:
    """Return the coefficient of determination from totals of :func:`flat_sums`; 0 where the truth is constant."""
    n, x, _, xx, yy, xy = np.moveaxis(sums, -1, 0)
    var_x = xx - x * x / np.maximum(n, 1.0)
    known = var_x > CONSTANT * xx
    return np.where(known, 1.0 - (xx - 2.0 * xy + yy) / np.where(known, var_x, 1.0), 0.0)
