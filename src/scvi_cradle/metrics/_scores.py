"""Scores of predicted effects. Arrays have shape ``(n_perturbations, n_genes)``, truth first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import pandas as pd
from scipy.stats import hypergeom

from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.metrics._effects import Effects, align_effects, as_frame
from scvi_cradle.metrics._rows import (
    discrimination_rows,
    flat_pearson,
    flat_r2,
    flat_sums,
    jaccard_rows,
    less,
    pearson_rows,
)
from scvi_cradle.metrics._rows import top_k as strongest_genes


def ate_pearson(
    real: Effects,
    predicted: Effects,
    *,
    average: Literal["flat", "perturbation"] = "flat",
    top_k: int | None = None,
) -> float:
    """Correlate true and predicted effects.

    Parameters
    ----------
    real, predicted
        Effects of shape ``(n_perturbations, n_genes)``, e.g. from :func:`average_treatment_effects`. AnnData and
        DataFrames are matched by their names.
    average
        ``"flat"``: one correlation over all perturbations and genes, the published number, which rewards the common
        shift and strong perturbations; ``"perturbation"``: mean of the correlations of single perturbations.
    top_k
        Use of every perturbation only the genes with the ``top_k`` largest absolute true effects (20 in the papers'
        "DE" columns). They are chosen by the noise of the truth, too: compare with a baseline and a replicate only.

    Returns
    -------
    Correlation; 0 where one side is constant.

    Raises
    ------
    ValueError
        If perturbations or genes do not match, or ``top_k`` is not a positive integer.

    References
    ----------
    SAMS-VAE, section 5.2 and table 1 (ATE-rho); CRADLE-VAE, table 2.

    Notes
    -----
    Effects that were taken against the same control cells correlate even where nothing happened; see
    :func:`replicate_ceiling` and :func:`evaluate`, which keep the controls apart.
    """
    check_one_of("average", average, ("flat", "perturbation"))
    x, y = (f.to_numpy() for f in align_effects(real, predicted))
    kept = _strongest(x, top_k)
    if average == "flat":
        return float(flat_pearson(flat_sums(x, y, kept).sum(axis=0)))
    return float(pearson_rows(x, y, kept).mean())


def ate_r2(real: Effects, predicted: Effects, *, top_k: int | None = None) -> float:
    """Return the coefficient of determination of the flattened effects, ``1 - SS_residual / SS_total``.

    Parameters
    ----------
    real, predicted
        Effects as for :func:`ate_pearson`; the truth comes first, the score is not symmetric.
    top_k
        As for :func:`ate_pearson`.

    Returns
    -------
    At most 1; negative where predicting the mean of the truth is better; 0 where the truth is constant.

    Raises
    ------
    ValueError
        If perturbations or genes do not match, or ``top_k`` is not a positive integer.

    References
    ----------
    CRADLE-VAE, table 2 (ATE-R2): ``r2_score(data, model)``.
    """
    x, y = (f.to_numpy() for f in align_effects(real, predicted))
    return float(flat_r2(flat_sums(x, y, _strongest(x, top_k)).sum(axis=0)))


def _strongest(real: np.ndarray, k: int | None) -> np.ndarray | None:
    if k is None:
        return None
    check_positive("top_k", k, integer=True)
    return strongest_genes(real, k)


def jaccard_top_k(real: Effects, predicted: Effects, k: int = 50) -> float:
    """Return the mean over perturbations of the Jaccard index of the genes with the ``k`` largest absolute effects.

    Parameters
    ----------
    real, predicted
        Effects as for :func:`ate_pearson`.
    k
        Number of genes. By chance the score is :func:`jaccard_chance`.

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


def jaccard_chance(n_genes: int, k: int = 50) -> float:
    r"""Return the expected Jaccard index of two independent random sets of ``k`` genes.

    Parameters
    ----------
    n_genes
        Number of genes to draw from.
    k
        Size of both sets; from ``n_genes`` on they are equal.

    Returns
    -------
    :math:`E[X / (2k - X)]` with :math:`X` hypergeometric, close to ``k / (2 * n_genes - k)``.

    Raises
    ------
    ValueError
        If a number is not a positive integer.
    """
    check_positive("n_genes", n_genes, integer=True)
    check_positive("k", k, integer=True)
    k = min(k, n_genes)
    shared = np.arange(k + 1)
    return float(hypergeom(n_genes, k, k).pmf(shared) @ (shared / (2 * k - shared)))


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
    centre = np.zeros(x.shape[1]) if train is None else mean_effect(train, x.columns)
    return float(pearson_rows(less(x.to_numpy(), centre), less(y.to_numpy(), centre)).mean())


def mean_effect(train: Effects, genes: pd.Index) -> np.ndarray:
    """Return the mean of the training effects over ``genes``."""
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
