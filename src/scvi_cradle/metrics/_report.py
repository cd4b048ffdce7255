"""The form of a report: values with intervals beside baseline and ceiling, and what has to be said of each."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from scvi_cradle.metrics._panel import METRICS, Panel, contributions
from scvi_cradle.metrics._rows import is_constant
from scvi_cradle.metrics._scores import jaccard_chance

REPORT_COLUMNS = [
    *("value", "ci_low", "ci_high", "baseline", "ceiling", "scaled", "scaled_low", "scaled_high"),
    *("n_perturbations", "note"),
]
LEVEL = 0.95


class Ceiling(Protocol):
    """What a repeat scores for draws of perturbations."""

    def __call__(self, name: str, weights: np.ndarray) -> np.ndarray:
        """Return the score of a metric for weights of its perturbations, ``(n_draws, n_perturbations)``."""


def build_report(
    predicted: Panel,
    baseline: Panel,
    ceiling: Ceiling,
    *,
    names: list[str],
    among: list[int] | None = None,
    n_bootstrap: int,
    rng: np.random.Generator,
    notes: list[str],
) -> pd.DataFrame:
    """Return the table; rows are the metrics ``names`` that both panels answer.

    ``among`` are the perturbations that the ceiling knows, all by default; scores are scaled over these.
    """
    n = len(predicted.real)
    ours, trivial = contributions(predicted), contributions(baseline)
    bootstrap = n_bootstrap > 1 and n > 1
    if not bootstrap:
        notes = [*notes, "no interval: " + (f"{n_bootstrap=}" if n > 1 else "one perturbation")]
    draws = rng.multinomial(n, np.full(n, 1.0 / n), size=n_bootstrap) if bootstrap else np.ones((0, n))
    weights = np.vstack([np.ones((1, n)), draws])  # the first row is the estimate
    kept = list(range(n)) if among is None else among
    inner = weights[:, kept]
    inner = inner[inner.any(axis=1)]  # draws with a perturbation that the ceiling knows
    rows = {}
    for name in [name for name in names if name in ours and name in trivial]:
        score, sign = METRICS[name].score, METRICS[name].sign
        value, base = score(weights @ ours[name]), score(weights @ trivial[name])
        best = np.broadcast_to(ceiling(name, inner), (len(inner),))
        gain, room = (sign * (x - score(inner @ trivial[name][kept])) for x in (score(inner @ ours[name][kept]), best))
        scaled = float(gain[0] / room[0]) if room[0] > 0 else np.nan
        said = notes + metric_notes(name, predicted)
        if not room[0] > 0:
            said.append("scaled is undefined: the ceiling is not better than the baseline")
        elif scaled > 1:
            said.append("above the ceiling: less noise than a repeat of the experiment has, or these cells were seen")
        low, high = _interval(value, n, METRICS[name].bounds)
        scaled_low, scaled_high = _interval(_ratio_draws(gain, room), len(kept), (-np.inf, np.inf))
        numbers = [value[0], low, high, base[0], best[0], scaled, scaled_low, scaled_high]
        rows[name] = [*map(float, numbers), n, "; ".join(said)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=REPORT_COLUMNS).rename_axis("metric")


def _ratio_draws(gain: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Return draws of ``gain / room`` linearised at the estimates, which come first: rooms near 0 do no harm."""
    if not room[0] > 0:
        return np.full(1, np.nan)
    ratio = gain[0] / room[0]
    return ratio + (gain - ratio * room) / room[0]


def _interval(values: np.ndarray, n: int, bounds: tuple[float, float]) -> tuple[float, float]:
    """Return the estimate, first of ``values``, plus and minus Student's quantile times the sd of the draws that follow.

    The sd over draws of ``n`` perturbations is too small by ``sqrt(1 - 1/n)``.
    """
    estimate, draws = float(values[0]), values[1:]
    if len(draws) < 2 or n < 2:
        return estimate, estimate
    width = float(student_t.ppf(0.5 + LEVEL / 2, n - 1) * draws.std(ddof=1) * np.sqrt(n / (n - 1)))
    return max(estimate - width, bounds[0]), min(estimate + width, bounds[1])


def metric_notes(name: str, panel: Panel) -> list[str]:
    """Say what is undefined, and what chance gives."""
    n, n_genes = panel.real.shape
    if name == "energy_distance":
        unknown = 0 if panel.distance is None else int(np.isnan(panel.distance).sum())
        said = [
            "of log2 expression over all genes, unbiased, at most 100 cells a side and as many on both; less is better"
        ]
        return said + ([f"{unknown} of {n} perturbations with fewer than two cells left out"] if unknown else [])
    if name.startswith("jaccard"):
        k = int(name.rsplit("_", 1)[1])
        if k >= n_genes:
            return [f"only {n_genes} genes: every gene with an effect is among the top {k}"]
        return [f"by chance {jaccard_chance(n_genes, k):.3f}"]
    if name == "perturbation_discrimination":
        if n == 1:
            return ["one perturbation: undefined, set to 0.5"]
        return [f"chance 0.5; {int((~panel.untargeted).sum())} genes that are targets left out"]
    said = ["the genes are chosen by the truth that is scored"] if name.endswith("top_20") else []
    kept = panel.top if name.endswith("top_20") else panel.scored
    sides = (
        (panel.real_shift, panel.predicted_shift) if name.endswith("perturbed_mean") else (panel.real, panel.predicted)
    )
    constant = int((is_constant(sides[0], kept) | is_constant(sides[1], kept)).sum())
    if name.startswith("pearson_delta") and constant:
        said.append(f"{constant} of {n} perturbations have a constant change: undefined, counted as 0")
    if name.startswith("ate") and any(np.ptp(side) == 0 for side in sides):
        said.append("all effects of one side are equal: a correlation is undefined, set to 0")
    return said
