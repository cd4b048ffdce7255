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

N_TOP = 20
N_FIT = 1e-6


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

    ``unit`` (offset and factor) maps scores to a reliability in (0, 1) that a larger experiment raises, ``None`` where a
    score does not change with the size of the experiment; ``sign`` is -1 where less is better; ``bounds`` are the
    smallest and the largest possible score.
    """

    contributions: Callable[[Panel], np.ndarray]
    score: Callable[[np.ndarray], np.ndarray]
    unit: tuple[float, float] | None = (0.0, 1.0)
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
R2_UNIT = (1.0, 0.5)  # of two noisy copies of a signal: (1 + R2) / 2 is the share of the signal
METRICS: dict[str, Metric] = {
    "pearson_delta": _averaged(lambda p: pearson_rows(p.real, p.predicted, p.scored)),
    "pearson_delta_perturbed_mean": _averaged(lambda p: pearson_rows(p.real_shift, p.predicted_shift, p.scored)),
    "pearson_delta_top_20": _averaged(lambda p: pearson_rows(p.real, p.predicted, p.top)),
    "perturbation_discrimination": _averaged(
        lambda p: discrimination_rows(p.real[:, p.untargeted], p.predicted[:, p.untargeted]), SHARE
    ),
    "ate_pearson": Metric(lambda p: flat_sums(p.real, p.predicted, p.scored), flat_pearson),
    "ate_r2": Metric(lambda p: flat_sums(p.real, p.predicted, p.scored), flat_r2, R2_UNIT, bounds=(-np.inf, 1.0)),
    "ate_pearson_top_20": Metric(lambda p: flat_sums(p.real, p.predicted, p.top), flat_pearson),
    "ate_r2_top_20": Metric(lambda p: flat_sums(p.real, p.predicted, p.top), flat_r2, R2_UNIT, bounds=(-np.inf, 1.0)),
    "jaccard_top_20": _averaged(lambda p: jaccard_rows(p.real, p.predicted, 20, p.scored), SHARE),
    "jaccard_top_50": _averaged(lambda p: jaccard_rows(p.real, p.predicted, 50, p.scored), SHARE),
    "energy_distance": _averaged(_distance, (-np.inf, np.inf), unit=None, sign=-1),
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


def extrapolate(name: str, halves: np.ndarray, quarters: np.ndarray) -> np.ndarray:
    """Return the score of a repeat of the whole experiment from those of repeats of its halves and quarters.

    The log-odds of a score, on the scale on which 1 is a perfect repeat, are taken to grow linearly with the logarithm
    of the number of cells. For correlations of a signal with independent noise this is the Spearman-Brown formula; for
    the others it was measured. A score that is not above zero stays that of the halves.
    """
    unit = METRICS[name].unit
    if unit is None:
        return halves
    offset, scale = unit
    half, quarter = (np.clip((v + offset) * scale, N_FIT, 1.0 - N_FIT) for v in (halves, quarters))
    odds = (half / (1.0 - half)) ** 2 * (1.0 - quarter) / quarter
    full = odds / (1.0 + odds) / scale - offset
    return np.where(((halves + offset) * scale > N_FIT) & (half > quarter), full, halves)
