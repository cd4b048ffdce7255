"""Scores of recovered masks and latents against simulated ones."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from sklearn.linear_model import LinearRegression

from scvi_cradle._validation import check_one_of, check_unique_names, preview
from scvi_cradle.metrics._rows import unit_rows

Mask: TypeAlias = AnnData | pd.DataFrame | np.ndarray
_LAYER = "mask_prob"
_THRESHOLD = 0.5


def mask_frame(mask: Any, name: str) -> pd.DataFrame:
    """Return whether every mask probability exceeds 0.5, as a table of treatments x latents.

    The treatments of an array are numbered. AnnData are read from ``layers["mask_prob"]``.
    """
    if isinstance(mask, AnnData):
        if _LAYER not in mask.layers:
            msg = f"`{name}` must hold the layer {_LAYER!r}; received the layers {list(mask.layers)}: take a model's `get_perturbation_effects()`."
            raise KeyError(msg)
        values, index = mask.layers[_LAYER], mask.obs_names
    else:
        values, index = mask, mask.index if isinstance(mask, pd.DataFrame) else None
    matrix = as_matrix(values, name)
    if not ((matrix >= 0) & (matrix <= 1)).all():
        msg = f"`{name}` must hold a mask or its probabilities, from 0 to 1; received values from {matrix.min()} to {matrix.max()}."
        raise ValueError(msg)
    frame = pd.DataFrame(matrix > _THRESHOLD, index=index)
    check_unique_names(frame.index, "Treatment")
    return frame


def as_matrix(values: ArrayLike, name: str) -> np.ndarray:
    """Return ``values`` as a float64 matrix of finite numbers."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        msg = f"`{name}` must be a matrix that is not empty; received the shape {matrix.shape}."
        raise ValueError(msg)
    if not np.isfinite(matrix).all():
        msg = f"`{name}` must be finite; received NaN or infinite values."
        raise ValueError(msg)
    return matrix


def latent_pair(z: ArrayLike, truth: ArrayLike, names: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Return both matrices after checking that they hold the same, at least two, cells."""
    first, second = as_matrix(z, names[0]), as_matrix(truth, names[1])
    if len(first) != len(second) or len(first) < 2:
        msg = (
            f"`{names[0]}` and `{names[1]}` must hold the same cells, at least two, in the same order; "
            f"received {len(first)} and {len(second)} rows."
        )
        raise ValueError(msg)
    return first, second


def correlations(truth: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return Pearson's correlations, ``(n_true, n_estimated)``, of columns; 0 where one is constant."""
    return unit_rows(truth.T, centre=True) @ unit_rows(z.T, centre=True).T


def _match_rows(true: pd.DataFrame, estimated: pd.DataFrame, *, named: bool) -> tuple[np.ndarray, np.ndarray]:
    if named:
        odd = true.index.symmetric_difference(estimated.index)
        if len(odd):
            msg = f"`mask_true` and `mask_estimated` must hold the same treatments; received {preview(odd)} in one of them: subset both."
            raise ValueError(msg)
        estimated = estimated.loc[true.index]
    if len(true) != len(estimated):
        msg = f"`mask_true` and `mask_estimated` must hold the same treatments; received {len(true)} and {len(estimated)} rows."
        raise ValueError(msg)
    return true.to_numpy(), estimated.to_numpy()


def _match_latents(assignment: tuple[ArrayLike, ArrayLike], n_true: int, n_estimated: int) -> np.ndarray:
    """Return the correlations that decide which estimated column stands for which true one."""
    if not isinstance(assignment, tuple) or len(assignment) != 2:
        msg = f"`assignment` must be a tuple (latent, truth) of two matrices; received {type(assignment).__name__}."
        raise TypeError(msg)
    latent, truth = latent_pair(*assignment, ("assignment[0]", "assignment[1]"))
    if (latent.shape[1], truth.shape[1]) != (n_estimated, n_true):
        msg = (
            "`assignment` must hold (latent, truth) with one column for every column of `mask_estimated` and of "
            f"`mask_true`, here {n_estimated} and {n_true}; received {latent.shape[1]} and {truth.shape[1]}."
        )
        raise ValueError(msg)
    return correlations(truth, latent)


def mask_f1(
    mask_true: Mask, mask_estimated: Mask, *, assignment: tuple[np.ndarray, np.ndarray] | None = None
) -> dict[str, float]:
    r"""Compare an estimated mask with the true one after matching their columns.

    Parameters
    ----------
    mask_true, mask_estimated
        Masks or mask probabilities, treatments x latents; values above 0.5 count as ones. A DataFrame or an array, or
        the AnnData of a model's ``get_perturbation_effects()``, read from ``layers["mask_prob"]``. Rows are matched
        by name where both have names, else by position. The numbers of latents may differ.
    assignment
        How columns are matched. ``None``: one to one so that most true positives result
        :cite:`bereket2023samsvae`, appendix A.5. A tuple ``(latent, truth)`` of the latents of the same cells,
        estimated (cells x columns of ``mask_estimated``) and true (cells x columns of ``mask_true``): one to one so
        that the sum of their Pearson correlations is largest :cite:`lopez2023svae`.

    Returns
    -------
    ``precision``, ``recall`` and ``f1``: matched ones as a share of all estimated ones, of all true ones, and the
    harmonic mean of both. Columns left without a partner count in the denominators. A score without ones in its
    denominator is 0.

    Raises
    ------
    ValueError
        If shapes or treatments do not match or values are not within [0, 1].
    KeyError
        If an AnnData has no layer ``"mask_prob"``.
    TypeError
        If ``assignment`` is not a tuple of two matrices.

    Notes
    -----
    The matching sees the truth, so a random mask scores above its density, and more so with few treatments
    or with more latents than the truth has: compare with a mask whose rows are shuffled.

    Without ``assignment`` signs do not matter: a mask has none. The correlations of ``assignment`` keep their sign,
    as in the authors' code: a latent that is the mirror image of its true one is matched with another if possible.
    The sign of a latent is not identified, so flip mirrored latents beforehand or leave ``assignment`` out.

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_cradle.metrics import mask_f1
    >>> true = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 0]])
    >>> mask_f1(true, true[:, [1, 0, 2]])
    {'precision': 1.0, 'recall': 1.0, 'f1': 1.0}
    """
    named = all(isinstance(mask, AnnData | pd.DataFrame) for mask in (mask_true, mask_estimated))
    frames = mask_frame(mask_true, "mask_true"), mask_frame(mask_estimated, "mask_estimated")
    true, estimated = _match_rows(*frames, named=named)
    hits = true.T.astype(np.float64) @ estimated  # (n_true, n_estimated)
    benefit = hits if assignment is None else _match_latents(assignment, true.shape[1], estimated.shape[1])
    matched = hits[linear_sum_assignment(benefit, maximize=True)].sum()
    n_true, n_estimated = true.sum(), estimated.sum()
    return {
        "precision": float(matched / max(n_estimated, 1)),
        "recall": float(matched / max(n_true, 1)),
        "f1": float(2.0 * matched / max(n_true + n_estimated, 1)),
    }


def mean_correlation_coefficient(
    z: ArrayLike, truth: ArrayLike, *, method: Literal["pearson", "spearman"] = "pearson"
) -> float:
    r"""Return the mean absolute correlation of true latents with the estimated ones matched to them.

    Parameters
    ----------
    z
        Estimated latents of shape ``(n_cells, n_estimated)``.
    truth
        True latents of the same cells, shape ``(n_cells, n_true)``.
    method
        ``"pearson"``; ``"spearman"``: correlation of the ranks, also 1 after a monotone map of every latent.

    Returns
    -------
    Score in [0, 1], the mean over the true latents: :math:`\frac{1}{p} \max_\pi \sum_j |\rho(s_j, z_{\pi(j)})|` over
    one-to-one assignments. A constant latent, and a true latent left without a partner, count as 0.

    Raises
    ------
    ValueError
        If the cells do not match, a value is not finite, or ``method`` is unknown.

    Notes
    -----
    Order, sign, scale and offset of the estimated latents do not matter; a rotation of them does, see
    :func:`block_r2`. Matching and scoring use the same cells, so unrelated latents score above 0, the more of them the
    higher. The score of :cite:`lopez2023svae`.
    """
    check_one_of("method", method, ("pearson", "spearman"))
    estimated, true = latent_pair(z, truth, ("z", "truth"))
    if method == "spearman":
        estimated, true = rankdata(estimated, axis=0), rankdata(true, axis=0)
    size = np.abs(correlations(true, estimated))
    return float(min(size[linear_sum_assignment(size, maximize=True)].sum() / true.shape[1], 1.0))


def block_r2(z_train: ArrayLike, truth_train: ArrayLike, z_test: ArrayLike, truth_test: ArrayLike) -> float:
    """Return how much of a block of true latents a linear map of the estimated ones explains in other cells.

    Parameters
    ----------
    z_train, z_test
        Estimated latents, e.g. posterior means, of shape ``(n_cells, n_estimated)``.
    truth_train, truth_test
        True latents of the same cells, shape ``(n_cells, n_true)``.

    Returns
    -------
    Coefficient of determination on the test cells, the plain mean over the true latents, of an ordinary
    least squares regression with intercept fitted on the training cells. At most 1; below 0 where the mean of the test
    cells predicts better.

    Raises
    ------
    ValueError
        If cells or latents do not match or a value is not finite.

    Notes
    -----
    Any invertible linear map of the estimated latents gives the same score, and latents beside the needed ones cost
    nothing: the score says that a block is present, not that its latents are apart (:func:`mean_correlation_coefficient`
    does). Predict one block from the estimates of another to see leakage. With fewer training cells than
    latents the regression fits noise. It is not symmetric: the estimate comes first, the truth second.
    """
    z_fit, true_fit = latent_pair(z_train, truth_train, ("z_train", "truth_train"))
    z_held, true_held = latent_pair(z_test, truth_test, ("z_test", "truth_test"))
    for name, first, second in (("z", z_fit, z_held), ("truth", true_fit, true_held)):
        if first.shape[1] != second.shape[1]:
            msg = (
                f"`{name}_train` and `{name}_test` must hold the same latents; "
                f"received {first.shape[1]} and {second.shape[1]} columns."
            )
            raise ValueError(msg)
    return float(LinearRegression().fit(z_fit, true_fit).score(z_held, true_held))
