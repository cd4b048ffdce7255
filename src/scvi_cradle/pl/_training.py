"""Figures of a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from scvi_cradle.pl._style import BLUE, ORANGE, AxesArgument, finish, panels, style

# key of the history without its ending, title, unit
CURVES = {
    "elbo": ("negative ELBO", "nats per cell"),
    "reconstruction_loss": ("reconstruction loss", "nats per cell"),
    "kl_local": ("KL of the basal state", "nats per cell"),
    "kl_treatment": ("KL of treatment effects", "nats per cell"),
    "kl_artifact": ("KL of the artifact", "nats per cell"),
    "cf_kl": ("counterfactual KL", "nats per eligible cell"),
}
ENDINGS = {"train": (BLUE, "-"), "validation": (ORANGE, "--")}


def training_history(
    history: Mapping[str, Any],
    *,
    ncols: int = 3,
    ax: AxesArgument = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> list[Axes] | None:
    """Draw the losses of a training over its epochs, in training and validation cells.

    Parameters
    ----------
    history
        ``model.history``: a DataFrame or Series per quantity, indexed by epoch. Drawn are the negative ELBO, the
        reconstruction loss, the divergences and the counterfactual term, as far as they are there.
    ncols
        Panels per row.
    ax
        Axes to draw into, one per quantity. Default: a new figure.
    show
        Show the figure. Default: new figures that are not saved, where matplotlib's backend can show any.
    save
        File to write.

    Returns
    -------
    The axes, one per quantity; ``None`` if the figure was shown.

    Raises
    ------
    ValueError
        If there is nothing to draw.

    Notes
    -----
    The upper end of an axis leaves out the first tenth of the epochs and the highest 2 % of the other values, so that a
    steep start or a single peak does not hide the rest.
    """
    curves = {name: _series(history, name) for name in CURVES}
    curves = {name: parts for name, parts in curves.items() if parts}
    if not curves:
        msg = "`history` must be the `history` of a trained model; received none of its losses: train it first."
        raise ValueError(msg)
    with style():
        fig, axes = panels(len(curves), ax, ncols=ncols, size=(2.6, 2.2))
        for axis, (name, parts) in zip(axes, curves.items(), strict=True):
            for ending, series in parts.items():
                colour, line = ENDINGS[ending]
                single = "o" if len(series) == 1 else None
                axis.plot(series.index, series, line, color=colour, label=ending, marker=single, markersize=4)
            title, unit = CURVES[name]
            axis.set(title=title, xlabel="epoch", ylabel=unit)
            axis.set_ylim(*_limits(list(parts.values())))
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes[0].legend(loc="upper right")
        return finish(fig, axes, ax=ax, show=show, save=save)


def _series(history: Mapping[str, Any], name: str) -> dict[str, pd.Series]:
    found = {}
    for ending in ENDINGS:
        values = history.get(f"{name}_{ending}")
        if values is None:
            continue
        series = values.iloc[:, 0] if isinstance(values, pd.DataFrame) else pd.Series(values)
        series = series.astype(np.float64)
        series = series[np.isfinite(series.to_numpy())]
        if len(series):
            found[ending] = series
    return found


def _limits(parts: list[pd.Series]) -> tuple[float, float]:
    last = max(float(s.index.max()) for s in parts)
    late = [s[s.index >= 0.1 * last] for s in parts]
    low = min(float(s.min()) for s in parts)
    high = max(float(np.quantile(s, 0.98)) for s in late if len(s))
    margin = 0.06 * (high - low) if high > low else 0.5
    return low - margin, high + margin
