"""The metrics of a report, each as a sum over perturbations so that perturbations can be resampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from scvi_cradle.metrics._scores import (
    discrimination_rows,
    flat_pearson,
    flat_r2,
    flat_sums,
    jaccard_rows,
    pearson_rows,
)


@dataclass(frozen=True)
class Panel:
    """True and predicted effects of the same perturbations and genes.

    Parameters
    ----------
    real, predicted
        Effects against controls, shape ``(n_perturbations, n_genes)``.
    real_shift, predicted_shift
        Changes from the mean of the (training) perturbations, same shape.
    kept
        Genes that no perturbation targets, shape ``(n_genes,)``; only these enter the discrimination score.
    """

    real: np.ndarray
    predicted: np.ndarray
    real_shift: np.ndarray
    predicted_shift: np.ndarray
    kept: np.ndarray


class Metric(NamedTuple):
    """What each perturbation contributes, ``(n_perturbations, m)``, and the score of the total, ``(..., m)``."""

    contributions: Callable[[Panel], np.ndarray]
    score: Callable[[np.ndarray], np.ndarray]


def _mean(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0] / totals[..., 1]


def _averaged(rows: Callable[[Panel], np.ndarray]) -> Metric:
    def contributions(panel: Panel) -> np.ndarray:
        values = rows(panel)
        return np.stack([values, np.ones_like(values)], axis=1)

    return Metric(contributions, _mean)


METRICS: dict[str, Metric] = {
    "pearson_delta": _averaged(lambda p: pearson_rows(p.real, p.predicted)),
    "pearson_delta_perturbed_mean": _averaged(lambda p: pearson_rows(p.real_shift, p.predicted_shift)),
    "perturbation_discrimination": _averaged(lambda p: discrimination_rows(p.real[:, p.kept], p.predicted[:, p.kept])),
    "ate_pearson": Metric(lambda p: flat_sums(p.real, p.predicted), flat_pearson),
    "ate_r2": Metric(lambda p: flat_sums(p.real, p.predicted), flat_r2),
    "jaccard_top_20": _averaged(lambda p: jaccard_rows(p.real, p.predicted, 20)),
    "jaccard_top_50": _averaged(lambda p: jaccard_rows(p.real, p.predicted, 50)),
}


def score_panel(panel: Panel) -> dict[str, float]:
    """Return the value of every metric."""
    return {name: float(m.score(m.contributions(panel).sum(axis=0))) for name, m in METRICS.items()}


def bootstrap_panel(panel: Panel, n_bootstrap: int, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Return the 2.5 % and 97.5 % quantiles of every metric over perturbations drawn with replacement."""
    n = len(panel.real)
    weights = rng.multinomial(n, np.full(n, 1.0 / n), size=n_bootstrap)  # (n_bootstrap, n_perturbations)
    intervals = {}
    for name, metric in METRICS.items():
        low, high = np.quantile(metric.score(weights @ metric.contributions(panel)), [0.025, 0.975])
        intervals[name] = (float(low), float(high))
    return intervals
