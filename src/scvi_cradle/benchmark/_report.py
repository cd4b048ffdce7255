"""One report of predicted effects: scores with intervals, beside a baseline and a ceiling."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle.metrics._effects import align_effects
from scvi_cradle.metrics._evaluate import REPORT_COLUMNS
from scvi_cradle.metrics._panel import METRICS, Panel, bootstrap_panel, score_panel


def effects_report(
    real: AnnData,
    predicted: AnnData,
    *,
    train: AnnData,
    ceiling: pd.DataFrame,
    exclude_genes: Collection[str] = (),
    n_bootstrap: int = 200,
    seed: int | None = 0,
) -> pd.DataFrame:
    """Score predicted effects against measured ones.

    Parameters
    ----------
    real, predicted
        Effects of the same perturbations and genes.
    train
        Effects of the training perturbations; the baseline predicts their mean for every perturbation.
    ceiling
        Result of :func:`scvi_cradle.metrics.replicate_ceiling`.
    exclude_genes
        Genes that do not enter the discrimination score: those that perturbations target.
    n_bootstrap, seed
        Draws of perturbations for the intervals, and their seed.

    Returns
    -------
    A report as of :func:`scvi_cradle.metrics.evaluate`.
    """
    kept = ~real.var_names.isin(list(exclude_genes))
    panel = _panel(real, predicted, train, kept)
    constant = real.copy()
    constant.X = np.tile(np.asarray(train.X).mean(axis=0), (real.n_obs, 1))
    value, baseline = score_panel(panel), score_panel(_panel(real, constant, train, kept))
    n = len(panel.real)
    intervals = bootstrap_panel(panel, n_bootstrap, np.random.default_rng(seed)) if n > 1 and n_bootstrap else {}
    rows = {}
    for name in METRICS:
        low, high = intervals.get(name, (value[name], value[name]))
        top = float(ceiling.loc[name, "mean"])
        room = top - baseline[name]
        scaled = (value[name] - baseline[name]) / room if room > 0 else np.nan
        note = "" if room > 0 else "scaled is undefined: the ceiling is not above the baseline"
        rows[name] = [value[name], low, high, baseline[name], top, scaled, n, note]
    return pd.DataFrame.from_dict(rows, orient="index", columns=REPORT_COLUMNS).rename_axis("metric")


def _panel(real: AnnData, predicted: AnnData, train: AnnData, kept: np.ndarray) -> Panel:
    """Put effects side by side; shifts are changes from the mean of the training perturbations."""
    truth, guess = (frame.to_numpy() for frame in align_effects(real, predicted))
    mean_effect = np.asarray(train.X).mean(axis=0)
    # measured cells against the mean training perturbation: no controls enter
    offset = real.var["control_mean"].to_numpy() - train.var["control_mean"].to_numpy()
    return Panel(truth, guess, truth + offset - mean_effect, guess - mean_effect, kept)
