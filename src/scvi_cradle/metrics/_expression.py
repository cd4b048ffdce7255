"""Errors of predicted expression: of single cells, and of mean profiles."""

from __future__ import annotations

from typing import Any

import numpy as np

from scvi_cradle._validation import check_positive
from scvi_cradle.metrics._distances import paired_cells

PUBLISHED_BATCH = 32


def relative_rmse(real: Any, predicted: Any) -> float:
    r"""Root mean squared error relative to the size of the truth, :math:`\sqrt{\overline{(\hat y-y)^2}/\overline{y^2}}`.

    Parameters
    ----------
    real, predicted
        Expression in one space, shape ``(n_cells, n_genes)``; cell i of one side is compared with cell i of the other.
        Without true pairs the order is arbitrary, and a constant prediction of the mean beats a sample of the true
        cells: .44 against about .62 in the PerturbedVAE's data. Means of conditions can be given, too.

    Returns
    -------
    0 for equal sides, 1 for a prediction of zeros.

    Raises
    ------
    ValueError
        For NaN, other shapes, or a truth of zeros.

    References
    ----------
    PerturbedVAE, "RMSE" of tables 2 to 4, here as one ratio over all cells; :func:`published_relative_rmse` averages
    over batches.
    """
    y, guess = _same_shape(real, predicted)
    size = float((y**2).mean())
    if size == 0:
        msg = "A relative error needs a truth that is not zero; received zeros only."
        raise ValueError(msg)
    return float(np.sqrt(((guess - y) ** 2).mean() / size))


def published_relative_rmse(real: Any, predicted: Any, *, batch_size: int = PUBLISHED_BATCH) -> float:
    """Return the mean relative RMSE over consecutive batches of cells, the protocol of PerturbedVAE's tables.

    Parameters
    ----------
    real, predicted
        As for :func:`relative_rmse`, cells of one perturbation.
    batch_size
        Cells per batch; the last batch may be smaller.

    Raises
    ------
    ValueError
        For NaN, other shapes, a batch of zeros, or a batch size that is not positive.
    """
    check_positive("batch_size", batch_size, integer=True)
    y, guess = _same_shape(real, predicted)
    parts = range(0, len(y), batch_size)
    return float(np.mean([relative_rmse(y[i : i + batch_size], guess[i : i + batch_size]) for i in parts]))


def r2_of_means(real: Any, predicted: Any) -> float:
    """Return the coefficient of determination of the mean profile over genes.

    Parameters
    ----------
    real, predicted
        Expression in one space, shapes ``(n_real, n_genes)`` and ``(n_predicted, n_genes)``.

    Returns
    -------
    At most 1; negative where predicting one number for all genes is better; 0 where the true profile is constant. The
    mean of all perturbations reaches .95 to .99 on real screens: no headline.

    Raises
    ------
    ValueError
        For NaN or other numbers of genes.
    """
    x, y = (cells.mean(axis=0) for cells in paired_cells(real, predicted, 1))
    return _r2(x, y)


def published_r2_of_means(real: Any, predicted: Any, *, batch_size: int = PUBLISHED_BATCH) -> float:
    """Return R² of mean profiles as published with PerturbedVAE: sides swapped, clipped at 0, averaged over batches.

    Parameters
    ----------
    real, predicted
        As for :func:`r2_of_means`, with as many predicted as real cells.
    batch_size
        Cells per batch.

    Raises
    ------
    ValueError
        For NaN, other shapes, or a batch size that is not positive.

    Notes
    -----
    Kept for comparisons with printed tables only. The third form of the literature, the squared correlation of the two
    profiles, ignores any error of level and scale.
    """
    check_positive("batch_size", batch_size, integer=True)
    x, y = _same_shape(real, predicted)
    parts = [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]
    return float(np.mean([max(_r2(y[p].mean(axis=0), x[p].mean(axis=0)), 0.0) for p in parts]))


def l2_of_means(real: Any, predicted: Any) -> float:
    """Return the Euclidean distance of the mean profiles.

    Parameters
    ----------
    real, predicted
        As for :func:`r2_of_means`.

    Raises
    ------
    ValueError
        For NaN or other numbers of genes.
    """
    x, y = (cells.mean(axis=0) for cells in paired_cells(real, predicted, 1))
    return float(np.linalg.norm(x - y))


def _r2(truth: np.ndarray, guess: np.ndarray) -> float:
    total = float(((truth - truth.mean()) ** 2).sum())
    return 1.0 - float(((guess - truth) ** 2).sum()) / total if total > 0 else 0.0


def _same_shape(real: Any, predicted: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = paired_cells(real, predicted, 1)
    if len(x) != len(y):
        msg = f"`real` and `predicted` must have as many cells as each other; received {len(x)} and {len(y)}."
        raise ValueError(msg)
    return x, y
