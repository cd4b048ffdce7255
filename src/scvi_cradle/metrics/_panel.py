"""The metrics of a report, each as a sum over perturbations so that perturbations can be resampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from scvi_cradle.metrics._rows import (
    discrimination_rows,
    flat_pearson,
    flat_r2,
    flat_sums,
    jaccard_rows,
    pearson_rows,
    top_k,
)
from scvi_cradle.metrics._scores import jaccard_chance

N_TOP = 20
SPEARMAN_BROWN = 2.0  # gain of the odds of a correlation when the cells double and noise is independent
MAX_GAIN = 2.5
SMALLEST = 1e-6


@dataclass(frozen=True)
class Panel:
    """True and predicted effects of the same perturbations and genes.

    Parameters
    ----------
    real, predicted
        Effects against controls, shape ``(n_perturbations, n_genes)``.
    real_shift, predicted_shift
        Changes from the mean of the (training) perturbations, same shape.
    untargeted
        Genes that no perturbation targets, shape ``(n_genes,)``; only these enter the discrimination score.
    scored
        Entries that count, shape ``(n_perturbations, n_genes)``; ``None``: all.
    distance
        Energy distance of the predicted from the true cells, shape ``(n_perturbations,)``, NaN where there are too few
        cells; ``None``: not measured.
    """

    real: np.ndarray
    predicted: np.ndarray
    real_shift: np.ndarray
    predicted_shift: np.ndarray
    untargeted: np.ndarray
    scored: np.ndarray | None = None
    distance: np.ndarray | None = None

    @cached_property
    def top(self) -> np.ndarray:
        """The genes with the largest absolute true effects of every perturbation."""
        return top_k(self.real, N_TOP, self.scored)


class Metric(NamedTuple):
    """What each perturbation contributes, ``(n_perturbations, m)``, the score of the total, ``(..., m)``, and its nature.

    ``floor`` returns for a number of genes the score of pure noise, from which a larger experiment leads to 1; ``None``
    where a score does not change with the size of the experiment; ``gain`` is by how much its odds grow when the cells
    double, ``None`` where that is to be measured; ``sign`` is -1 where less is better; ``bounds`` are the
    smallest and the largest possible score.
    """

    contributions: Callable[[Panel], np.ndarray]
    score: Callable[[np.ndarray], np.ndarray]
    floor: Callable[[int], float] | None = lambda n_genes: 0.0
    gain: float | None = None
    sign: int = 1
    bounds: tuple[float, float] = (-1.0, 1.0)


def _mean(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0] / np.maximum(totals[..., 1], 1.0)


def _averaged(rows: Callable[[Panel], np.ndarray], bounds: tuple[float, float] = (-1.0, 1.0), **nature: Any) -> Metric:
    def contributions(panel: Panel) -> np.ndarray:
        values = rows(panel)
        known = ~np.isnan(values)
        return np.stack([np.where(known, values, 0.0), known], axis=1).astype(np.float64)

    return Metric(contributions, _mean, bounds=bounds, **nature)


def _distance(panel: Panel) -> np.ndarray:
    if panel.distance is None:
        msg = "This panel holds no distances."
        raise RuntimeError(msg)
    return panel.distance


SHARE = (0.0, 1.0)


def _of_noise(n_genes: int) -> float:
    return -1.0  # R2 of two copies of noise; of two noisy copies of a signal (1 + R2) / 2 is the share of the signal


def _chance(k: int) -> Callable[[int], float]:
    return lambda n_genes: jaccard_chance(n_genes, k) if n_genes > k else 0.0


METRICS: dict[str, Metric] = {
    "pearson_delta": _averaged(lambda p: pearson_rows(p.real, p.predicted, p.scored)),
    "pearson_delta_perturbed_mean": _averaged(lambda p: pearson_rows(p.real_shift, p.predicted_shift, p.scored)),
    "pearson_delta_top_20": _averaged(lambda p: pearson_rows(p.real, p.predicted, p.top)),
    "perturbation_discrimination": _averaged(
        lambda p: discrimination_rows(p.real[:, p.untargeted], p.predicted[:, p.untargeted]),
        SHARE,
        floor=lambda n_genes: 0.5,
    ),
    "ate_pearson": Metric(lambda p: flat_sums(p.real, p.predicted, p.scored), flat_pearson, gain=SPEARMAN_BROWN),
    "ate_r2": Metric(
        lambda p: flat_sums(p.real, p.predicted, p.scored), flat_r2, _of_noise, SPEARMAN_BROWN, bounds=(-np.inf, 1.0)
    ),
    "ate_pearson_top_20": Metric(lambda p: flat_sums(p.real, p.predicted, p.top), flat_pearson),
    "ate_r2_top_20": Metric(lambda p: flat_sums(p.real, p.predicted, p.top), flat_r2, _of_noise, bounds=(-np.inf, 1.0)),
    "jaccard_top_20": _averaged(lambda p: jaccard_rows(p.real, p.predicted, 20, p.scored), SHARE, floor=_chance(20)),
    "jaccard_top_50": _averaged(lambda p: jaccard_rows(p.real, p.predicted, 50, p.scored), SHARE, floor=_chance(50)),
    "energy_distance": _averaged(_distance, (-np.inf, np.inf), floor=None, sign=-1),
}


def metric_names(panel: Panel) -> list[str]:
    """Return the names of the metrics that a panel answers."""
    measured = panel.distance is not None and not np.isnan(panel.distance).all()
    return [name for name in METRICS if name != "energy_distance" or measured]


def contributions(panel: Panel) -> dict[str, np.ndarray]:
    """Return what every perturbation adds to every metric, arrays of shape ``(n_perturbations, m)``."""
    return {name: METRICS[name].contributions(panel) for name in metric_names(panel)}


def score_panel(panel: Panel) -> dict[str, float]:
    """Return the value of every metric."""
    return {name: float(METRICS[name].score(c.sum(axis=0))) for name, c in contributions(panel).items()}


def extrapolate(name: str, n_genes: int, halves: np.ndarray, quarters: np.ndarray) -> np.ndarray:
    """Return the score of a repeat of the whole experiment from those of repeats of its halves and quarters.

    The odds of a score, on the scale on which noise is 0 and a perfect repeat 1, are taken to grow by the same factor
    from quarters to halves and from halves to the whole, from 1 to 2.5. For correlations of all effects the factor is 2,
    which is the Spearman-Brown formula. A score that is not above that of noise stays that of the halves.
    """
    floor = METRICS[name].floor
    if floor is None:
        return halves
    low = floor(n_genes)
    half, quarter = (np.clip((v - low) / (1.0 - low), SMALLEST, 1.0 - SMALLEST) for v in (halves, quarters))
    odds = half / (1.0 - half)
    gain = METRICS[name].gain or np.clip(odds * (1.0 - quarter) / quarter, 1.0, MAX_GAIN)
    full = low + (1.0 - low) * odds * gain / (1.0 + odds * gain)
    return np.where((halves - low) / (1.0 - low) > SMALLEST, full, halves)
