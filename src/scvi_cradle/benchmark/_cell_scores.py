"""Scores of generated cells, label by label: distances of distributions, and errors of expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import stats
from scipy.spatial.distance import pdist

from scvi_cradle import metrics
from scvi_cradle._constants import COLUMNS
from scvi_cradle._matrix import log_normalize, to_csr

MAX_CELLS = 100  # of a label, on either side
OF_EFFECT = "relative_rmse_of_effect"
#: -1 where less is better
SIGNS = {
    "published_relative_rmse": -1,
    "relative_rmse": -1,
    "relative_rmse_of_mean": -1,
    "published_r2_of_means": 1,
    "r2_of_means": 1,
    "l2_of_means": -1,
    "energy_distance": -1,
    "mmd_rbf": -1,
}


def draw(
    cells: AnnData, label: str | None, rng: np.random.Generator, n_cells: int | None = None, *, on_log: bool = False
) -> np.ndarray:
    """Return log2 expression of ``n_cells`` (default: ``MAX_CELLS``) at most of a label (``None``: of all), shuffled.

    ``on_log``: ``X`` holds log2 expression already, and not counts.
    """
    rows = np.arange(cells.n_obs) if label is None else np.flatnonzero(cells.obs[COLUMNS.PERTURBATION] == label)
    chosen = rng.permutation(rows)[: MAX_CELLS if n_cells is None else n_cells]
    values = to_csr(cells.X[chosen])
    return (values.astype(np.float64) if on_log else log_normalize(values)).toarray()


def label_scores(real: np.ndarray, predicted: np.ndarray, bandwidth: float) -> dict[str, float]:
    """Score the predicted cells of one label.

    Returns
    -------
    ``relative_rmse``: cell by cell, arbitrary pairs; ``relative_rmse_of_mean``: real cells against the mean of the
    predicted ones, the better of the two for anything without true pairs; ``r2_of_means``, ``l2_of_means``;
    ``published_relative_rmse`` and ``published_r2_of_means``: means over batches of 32 cells, as in PerturbedVAE's tables;
    ``energy_distance`` and ``mmd_rbf``, both unbiased; NaN where a side has one cell.
    """
    n = min(len(real), len(predicted))
    mean = np.broadcast_to(predicted.mean(axis=0), real.shape)
    scores = {
        "published_relative_rmse": metrics.published_relative_rmse(real[:n], predicted[:n]),
        "published_r2_of_means": metrics.published_r2_of_means(real[:n], predicted[:n]),
        "relative_rmse": metrics.relative_rmse(real[:n], predicted[:n]),
        "relative_rmse_of_mean": metrics.relative_rmse(real, mean),
        "r2_of_means": metrics.r2_of_means(real, predicted),
        "l2_of_means": metrics.l2_of_means(real, predicted),
    }
    if n > 1:
        scores["energy_distance"] = metrics.energy_distance(real[:n], predicted[:n])
        scores["mmd_rbf"] = metrics.mmd_rbf(real[:n], predicted[:n], bandwidth=bandwidth, unbiased=True)
    return {name: scores.get(name, np.nan) for name in SIGNS}


def table_of(score: Callable[[str, int], dict[str, float]], labels: list[str], n_cells: np.ndarray) -> pd.DataFrame:
    """Return the scores of labels, each with its number of cells a side, labels x metrics."""
    rows = [score(label, int(n)) for label, n in zip(labels, n_cells, strict=True)]
    return pd.DataFrame(rows, index=labels, columns=list(SIGNS))


def references(real: AnnData, train: AnnData, controls: AnnData, labels: list[str], *, seed: int) -> dict[str, Any]:
    """Score what knows nothing, and a repeat of the held-out measurement, all with as many cells as predictions.

    A repeat of a label is one half of its held-out cells against the other. So that numbers of cells make no difference,
    half of these cells are the truth of the baseline and of predictions, too.

    Parameters
    ----------
    real
        Held-out cells that passed, two at least of every label.
    train
        Training cells that passed, without controls: predicted for every label.
    controls
        Control cells; the median distance between them is the width of the kernel.
    labels
        Labels to score.
    seed
        Seed of the draws.

    Returns
    -------
    ``bandwidth``; ``n_cells``: cells a side of every label, half of its held-out ones and at most ``MAX_CELLS``, shape
    ``(n_labels,)``; ``baseline`` and ``ceiling``: means over labels.
    """
    rng = np.random.default_rng(seed)
    found = real.obs[COLUMNS.PERTURBATION].astype(str).value_counts()
    n_cells = np.minimum(found.reindex(labels).to_numpy(dtype=np.int64) // 2, MAX_CELLS)
    bandwidth = float(np.median(pdist(draw(controls, None, rng))))
    anyone = draw(train, None, rng)

    def halves(label: str, n: int) -> dict[str, float]:
        both = draw(real, label, rng, 2 * n)
        return label_scores(both[:n], both[n:], bandwidth)

    def nothing(label: str, n: int) -> dict[str, float]:
        return label_scores(draw(real, label, rng, n), rng.permutation(anyone)[:n], bandwidth)

    means = {
        name: dict(table_of(score, labels, n_cells).mean())
        for name, score in (("baseline", nothing), ("ceiling", halves))
    }
    return {"bandwidth": bandwidth, "n_cells": n_cells, **means}


def generated_scores(
    real: AnnData, generated: AnnData, labels: list[str], known: dict[str, Any], seed: int, *, on_log: bool = False
) -> list[dict[str, Any]]:
    """Return rows of a report for generated cells; intervals are those of a mean over labels (Student's t).

    ``on_log``: generated cells are log2 expression already; measured ones are counts in any case.
    """
    rng = np.random.default_rng(seed)

    def predicted(label: str, n: int) -> dict[str, float]:
        return label_scores(
            draw(real, label, rng, n), draw(generated, label, rng, n, on_log=on_log), known["bandwidth"]
        )

    scores = table_of(predicted, labels, known["n_cells"])
    rows = []
    for name, sign in SIGNS.items():
        values = scores[name].dropna().to_numpy()
        if not len(values):
            continue
        note = (
            f"mean over perturbations; half of the held-out cells and as many predicted ones, at most {MAX_CELLS} a side; "
            f"log2 expression; {'more' if sign > 0 else 'less'} is better; ceiling: the other half of the held-out cells"
        )
        rows.append(_row(name, values, sign, known["baseline"][name], known["ceiling"][name], note))
    return rows


def effect_score(real: AnnData, effects: AnnData, train: AnnData) -> dict[str, Any]:
    """Return a row of a report: measured cells against the mean of training controls plus the predicted effect.

    Nothing is drawn, so that methods that generate cells and methods that generate means are treated alike.

    Parameters
    ----------
    real
        Held-out cells that passed.
    effects
        Predicted effects of their labels.
    train
        Measured effects of training cells; ``var["control_mean"]`` is the mean of the controls. Their mean over labels is
        the effect of the baseline.
    """
    control, labels = train.var["control_mean"].to_numpy(), real.obs[COLUMNS.PERTURBATION].astype(str).to_numpy()
    errors = []
    for label, effect in zip(effects.obs_names, np.asarray(effects.X), strict=True):
        cells = log_normalize(to_csr(real.X[np.flatnonzero(labels == label)])).toarray()
        guesses = (np.broadcast_to(control + e, cells.shape) for e in (effect, np.asarray(train.X).mean(axis=0)))
        errors.append([metrics.relative_rmse(cells, guess) for guess in guesses])
    values, baseline = np.array(errors).T
    note = "mean over perturbations; all held-out cells; log2 expression; less is better; no ceiling: nothing is drawn"
    return _row(OF_EFFECT, values, -1, float(baseline.mean()), np.nan, note)


def _row(metric: str, values: np.ndarray, sign: int, base: float, top: float, note: str) -> dict[str, Any]:
    mean, n = float(values.mean()), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    room = sign * (top - base)
    numbers = {"value": mean, "ci_low": mean - half, "ci_high": mean + half, "baseline": base, "ceiling": top}
    numbers["scaled"] = sign * (mean - base) / room if room > 0 else np.nan
    return {"metric": metric, **numbers, "n_perturbations": n, "note": note}
