"""One linear discriminant and a mixture of two normals per category: the scores of many cells by little data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, log_expit, logit
from sklearn.covariance import ledoit_wolf

from scvi_cradle.train._classifiers import ClassifierFit, top_half_gap

MIN_CELLS = 4
MAX_ITERATIONS, TOLERANCE = 1_000, 1e-7
LEAST = 1e-6  # bounds of a probability of a whole category


def fit_discriminants(
    z: np.ndarray,
    unlabeled: Sequence[np.ndarray],
    negative: Sequence[np.ndarray],
    *,
    n_folds: int = 4,
    groups: Sequence[np.ndarray] | None = None,
    seed: int = 0,
) -> ClassifierFit:
    r"""Score cells by how far they lie towards the perturbed mean, out of fold, and turn scores into log-odds.

    Of a mixture of perturbed and unperturbed cells the mean differs from that of controls in the direction in which the
    perturbation moves cells, whatever the share of perturbed cells; so the linear discriminant of labelled cells and
    controls (covariance shrunken by Ledoit and Wolf) is the best direction for normal classes. Along it

    .. math:: s_N \sim N(0, 1), \qquad s_U \sim \pi N(m, 1) + (1 - \pi) N(0, 1), \qquad
        g(s) = \mathrm{logit}(\pi) + m s - m^2 / 2,

    with ``m`` at least 0 and :math:`\pi` found by expectation maximisation. The probability is multiplied by that of any
    effect at all, from the Bayesian information criterion of the mixture (two parameters) against :math:`N(0, 1)`.

    Parameters
    ----------
    z
        Latents of all cells, shape ``(n_cells, d)``.
    unlabeled, negative
        Per category the positions of its labelled cells and of its controls.
    n_folds
        Every cell is scored by a direction that was found without its fold.
    groups
        Per category one value per labelled cell, e.g. its guide: folds never part a group. Categories with a single
        group have random folds.
    seed
        Of the folds.

    Returns
    -------
    A :class:`~scvi_cradle.train.ClassifierFit` without heads; ``prevalence`` is :math:`\pi` times the probability of an
    effect, ``control_score`` the mean probability of controls, ``gap`` that of probabilities at even odds, which does not
    depend on :math:`\pi`. Categories with fewer than 4 cells of a kind have log-odds
    of a probability of 1e-6 and are not ``calibrated``.
    """
    n = len(unlabeled)
    fit = ClassifierFit(
        prevalence=np.full(n, LEAST),
        calibrated=np.zeros(n, dtype=bool),
        control_score=np.full(n, LEAST),
        steps=np.zeros(n, dtype=np.int64),
        unlabeled_logits=[np.full(len(u), logit(LEAST)) for u in unlabeled],
        negative_logits=[np.full(len(v), logit(LEAST)) for v in negative],
        gap=np.zeros(n),
        heads=[None] * n,
    )
    z = np.asarray(z, dtype=np.float64)
    for k, (positives, controls) in enumerate(zip(unlabeled, negative, strict=True)):
        if min(len(positives), len(controls)) < MIN_CELLS:
            continue
        rng = np.random.default_rng([seed, k])
        fold = _folds(len(positives), n_folds, None if groups is None else groups[k], rng)
        scores, of_controls = _out_of_fold(
            z[positives], z[controls], fold, _folds(len(controls), int(fold.max()) + 1, None, rng)
        )
        centre, scale = of_controls.mean(), max(of_controls.std(), 1e-12)
        scores, of_controls = (scores - centre) / scale, (of_controls - centre) / scale
        share, mean, steps = two_normals(scores)
        effect = _log_odds_of_effect(scores, share, mean)
        fit.unlabeled_logits[k], fit.negative_logits[k] = (
            _weakened(logit(share) + mean * s - mean**2 / 2, effect) for s in (scores, of_controls)
        )
        even = [_weakened(mean * s - mean**2 / 2, effect) for s in (scores, of_controls)]
        fit.gap[k] = top_half_gap(*map(expit, even))
        fit.prevalence[k] = np.clip(share * expit(effect), LEAST, 1 - LEAST)
        fit.control_score[k] = expit(fit.negative_logits[k]).mean()
        fit.calibrated[k], fit.steps[k] = True, steps
    return fit


def two_normals(scores: np.ndarray) -> tuple[float, float, int]:
    """Return share and mean of the second part of ``(1 - share) N(0, 1) + share N(mean, 1)``, and the steps taken.

    A flat prior Beta(2, 2) keeps the share off 0 and 1; the mean is at least 0.
    """
    share, mean = 0.5, max(float(np.quantile(scores, 0.75)), 0.5)
    for step in range(1, MAX_ITERATIONS + 1):  # noqa: B007 - returned
        p = expit(logit(share) + mean * scores - mean**2 / 2)
        old = share, mean
        share, mean = (p.sum() + 1.0) / (len(p) + 2.0), max(float(p @ scores / p.sum()), 0.0)
        if abs(share - old[0]) + abs(mean - old[1]) < TOLERANCE:
            break
    return float(share), mean, step


def _log_odds_of_effect(scores: np.ndarray, share: float, mean: float) -> float:
    """Return half the difference of the two models in the Bayesian information criterion."""
    ratio = np.logaddexp(np.log1p(-share), np.log(share) + mean * scores - mean**2 / 2)
    return float(ratio.sum() - np.log(len(scores)))


def _weakened(log_odds: np.ndarray, effect: float) -> np.ndarray:
    """Return the log-odds of the product of two probabilities, both given as log-odds."""
    log_p = log_expit(log_odds) + log_expit(effect)
    log_p = np.clip(log_p, np.log(LEAST) * 3, -1e-12)
    return log_p - np.log(-np.expm1(log_p))


def _out_of_fold(
    positives: np.ndarray, controls: np.ndarray, fold: np.ndarray, control_fold: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores of cells along directions that were found without their folds, in units of the controls' spread."""
    scores, of_controls = np.zeros(len(positives)), np.zeros(len(controls))
    for k in np.unique(fold):
        train, reference = positives[fold != k], controls[control_fold != k]
        direction = _direction(train, reference)
        inside = reference @ direction
        scale = max(inside.std(), 1e-12)
        scores[fold == k] = (positives[fold == k] @ direction - inside.mean()) / scale
        of_controls[control_fold == k] = (controls[control_fold == k] @ direction - inside.mean()) / scale
    return scores, of_controls


def _direction(positives: np.ndarray, controls: np.ndarray) -> np.ndarray:
    means = positives.mean(0), controls.mean(0)
    scale = np.maximum(controls.std(0), 1e-12)  # before the shrinkage, which is towards a multiple of the identity
    within = np.concatenate([positives - means[0], controls - means[1]]) / scale
    covariance, _ = ledoit_wolf(within, assume_centered=True)
    return np.linalg.solve(covariance + 1e-9 * np.eye(len(covariance)), (means[0] - means[1]) / scale) / scale


def _folds(n: int, n_folds: int, groups: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Return the fold of every cell; whole groups where there are several, else at random, of equal sizes."""
    if groups is not None:
        names, code, size = np.unique(groups, return_inverse=True, return_counts=True)
        if len(names) > 1:
            fold, load = np.zeros(len(names), dtype=np.int64), np.zeros(min(n_folds, len(names)))
            for name in np.argsort(-size, kind="stable"):  # the largest groups first, each into the emptiest fold
                fold[name] = load.argmin()
                load[fold[name]] += size[name]
            return fold[code]
    return rng.permutation(np.arange(n) % min(n_folds, n))
