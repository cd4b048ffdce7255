"""Scores of predicted effects. Arrays have shape ``(n_perturbations, n_genes)``, truth first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import pandas as pd

from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.metrics._effects import Effects, align_effects, as_frame

CONSTANT = 1e-10  # a vector whose spread is below this share of its size counts as constant


def unit_rows(values: np.ndarray, *, centre: bool) -> np.ndarray:
    """Scale every row to length one, after taking off its mean if asked; rows without spread become zero."""
    moved = values - values.mean(axis=1, keepdims=True) if centre else values
    length = np.linalg.norm(moved, axis=1, keepdims=True)
    known = length > CONSTANT * np.linalg.norm(values, axis=1, keepdims=True)
    return np.where(known, moved / np.where(known, length, 1.0), 0.0)


def pearson_rows(real: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of every row; 0 where one side is constant."""
    return np.clip((unit_rows(real, centre=True) * unit_rows(predicted, centre=True)).sum(axis=1), -1.0, 1.0)


def is_constant(values: np.ndarray) -> np.ndarray:
    """Return for every row whether all of its values are equal, which leaves a correlation undefined."""
    return np.asarray(~unit_rows(values, centre=True).any(axis=1))


def jaccard_rows(real: np.ndarray, predicted: np.ndarray, k: int) -> np.ndarray:
    """Return the Jaccard index of the ``k`` largest absolute non-zero effects of every row."""
    first, second = top_k(real, k), top_k(predicted, k)
    union = (first | second).sum(axis=1)
    return (first & second).sum(axis=1) / np.maximum(union, 1)


def top_k(values: np.ndarray, k: int) -> np.ndarray:
    """Mark the ``k`` largest absolute non-zero values of every row; ties go to the first gene."""
    size = np.abs(values)
    chosen = np.argsort(-size, axis=1, kind="stable")[:, :k]
    marked = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(marked, chosen, values=True, axis=1)
    return marked & (size > 0)


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


def flat_sums(real: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return what each row adds to a correlation over all rows: n, x, y, xx, yy, xy; shape ``(n_perturbations, 6)``."""
    shift = real.mean()
    x, y = real - shift, predicted - shift
    ones = np.full(len(x), float(x.shape[1]))
    return np.stack([ones, x.sum(1), y.sum(1), (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)], axis=1)


def flat_pearson(sums: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation from totals of :func:`flat_sums`, ``(..., 6)``; 0 where one side is constant."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    var_x, var_y = xx - x * x / n, yy - y * y / n
    known = (var_x > CONSTANT * xx) & (var_y > CONSTANT * yy)
    r = (xy - x * y / n) / np.sqrt(np.where(known, var_x * var_y, 1.0))
    return np.where(known, np.clip(r, -1.0, 1.0), 0.0)


def flat_r2(sums: np.ndarray) -> np.ndarray:
    """Return the coefficient of determination from totals of :func:`flat_sums`; 0 where the truth is constant."""
    n, x, _, xx, yy, xy = np.moveaxis(sums, -1, 0)
    var_x = xx - x * x / n
    known = var_x > CONSTANT * xx
    return np.where(known, 1.0 - (xx - 2.0 * xy + yy) / np.where(known, var_x, 1.0), 0.0)


def ate_pearson(real: Effects, predicted: Effects, *, average: Literal["flat", "perturbation"] = "flat") -> float:
    """Correlate true and predicted effects.

    Parameters
    ----------
    real, predicted
        Effects of shape ``(n_perturbations, n_genes)``, e.g. from :func:`average_treatment_effects`. AnnData and
        DataFrames are matched by their names.
    average
        ``"flat"``: one correlation over all perturbations and genes, the published number, which rewards the common
        shift and strong perturbations; ``"perturbation"``: mean of the correlations of single perturbations.

    Returns
    -------
    Correlation; 0 where one side is constant.

    Raises
    ------
    ValueError
        If perturbations or genes do not match.

    Notes
    -----
    Effects that were taken against the same control cells correlate even where nothing happened; see
    :func:`replicate_ceiling` and :func:`evaluate`, which keep the controls apart.
    """
    check_one_of("average", average, ("flat", "perturbation"))
    x, y = (f.to_numpy() for f in align_effects(real, predicted))
    return float(flat_pearson(flat_sums(x, y).sum(axis=0)) if average == "flat" else pearson_rows(x, y).mean())


def ate_r2(real: Effects, predicted: Effects) -> float:
    """Return the coefficient of determination of the flattened effects, ``1 - SS_residual / SS_total``.

    Parameters
    ----------
    real, predicted
        Effects as for :func:`ate_pearson`; the truth comes first, the score is not symmetric.

    Returns
    -------
    At most 1; negative where predicting the mean of the truth is better; 0 where the truth is constant.

    Raises
    ------
    ValueError
        If perturbations or genes do not match.
    """
    x, y = (f.to_numpy() for f in align_effects(real, predicted))
    return float(flat_r2(flat_sums(x, y).sum(axis=0)))


def jaccard_top_k(real: Effects, predicted: Effects, k: int = 50) -> float:
    """Return the mean over perturbations of the Jaccard index of the genes with the ``k`` largest absolute effects.

    Parameters
    ----------
    real, predicted
        Effects as for :func:`ate_pearson`.
    k
        Number of genes. By chance the score is about ``k / (2 * n_genes - k)``.

    Returns
    -------
    Score in [0, 1]. Genes without an effect are never among the top; ties go to the first gene of ``real``.

    Raises
    ------
    ValueError
        If perturbations or genes do not match, or ``k`` is not a positive integer.
    """
    check_positive("k", k, integer=True)
    x, y = (f.to_numpy() for f in align_effects(real, predicted))
    return float(jaccard_rows(x, y, k).mean())


def pearson_delta(
    real: Effects,
    predicted: Effects,
    *,
    reference: Literal["control", "perturbed_mean"] = "control",
    train: Effects | None = None,
) -> float:
    """Return the mean over perturbations of the correlation of true and predicted changes.

    Parameters
    ----------
    real, predicted
        Effects against the control, as for :func:`ate_pearson`.
    reference
        ``"control"``: changes from the control; ``"perturbed_mean"``: changes from the mean effect of the training
        perturbations, so that the shift common to all perturbations scores nothing.
    train
        Effects of the training perturbations; needed for, and only for, ``reference="perturbed_mean"``.

    Returns
    -------
    Mean correlation; a perturbation with a constant change counts as 0.

    Raises
    ------
    ValueError
        If perturbations or genes do not match, or ``train`` is missing or not used.
    """
    check_one_of("reference", reference, ("control", "perturbed_mean"))
    if (train is None) == (reference == "perturbed_mean"):
        need = "needs" if train is None else "does not use"
        msg = f"`reference={reference!r}` {need} the effects of training perturbations; received train={'None' if train is None else 'effects'}."
        raise ValueError(msg)
    x, y = align_effects(real, predicted)
    centre = np.zeros(x.shape[1]) if train is None else _mean_effect(train, x.columns)
    return float(pearson_rows(x.to_numpy() - centre, y.to_numpy() - centre).mean())


def _mean_effect(train: Effects, genes: pd.Index) -> np.ndarray:
    frame, named = as_frame(train, "train")
    if named and set(frame.columns) == set(genes):
        frame = frame[genes]
    elif frame.shape[1] != len(genes) or (named and not isinstance(genes, pd.RangeIndex)):
        msg = f"`train` must hold the genes of `real`; received {frame.shape[1]} genes, {len(genes)} expected."
        raise ValueError(msg)
    return frame.to_numpy().mean(axis=0)


def perturbation_discrimination(real: Effects, predicted: Effects, *, exclude_genes: Iterable[str] = ()) -> float:
    r"""Return how well predicted effects single out their own perturbation (chance 0.5, best 1).

    Parameters
    ----------
    real, predicted
        Effects as for :func:`ate_pearson`.
    exclude_genes
        Genes to leave out where effects have names: usually the targets of all perturbations, whose own knock-down
        would give the perturbation away. Names that are not there are passed over.

    Returns
    -------
    Mean over perturbations of :math:`1 - k / (n - 1)`, where :math:`k` true effects are closer (cosine distance) to the
    prediction than its own truth; ties count one half. 0.5 for a constant prediction and for a single perturbation.

    Raises
    ------
    ValueError
        If perturbations or genes do not match, or no gene is left.
    """
    x, y = align_effects(real, predicted)
    kept = ~x.columns.isin(list(exclude_genes))
    if not kept.any():
        msg = f"At least one gene must be left; received `exclude_genes` with all {len(kept)} genes."
        raise ValueError(msg)
    return float(discrimination_rows(x.to_numpy()[:, kept], y.to_numpy()[:, kept]).mean())
