"""Heat maps of the latent dimensions that treatments use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from pandas.api.types import is_numeric_dtype
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import pdist

from scvi_cradle._validation import check_key, check_probability
from scvi_cradle.pl._style import MAX_GROUPS, Legend, finish, group_colours, group_legend, panels, style

MASK_LAYER = "mask_prob"
MAX_OPTIMAL = 2_000  # rows whose order within the tree is optimised, which takes two seconds
CELL = 0.14  # inches of a named row or column
SIDE = (1.4, 11.0)  # inches, of heat maps whose rows and columns are named
UNNAMED = 6.5  # inches of a side that is too long for names
FONT = (5.0, 8.0)  # points of the names


def mask(
    effects: AnnData,
    *,
    layer: str | None = MASK_LAYER,
    color: str | None = None,
    cluster: bool = True,
    min_prob: float | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw which latent dimensions every treatment uses, as a heat map of treatments x latent dimensions.

    Parameters
    ----------
    effects
        Result of ``model.get_perturbation_effects()``, of shape ``(n_treatments, n_latent)``.
    layer
        Layer to draw, e.g. ``"embedding_mean"``; ``None`` for ``X``, the expected effects ``E[e * m]``.
    color
        Column of ``obs`` with groups of treatments, e.g. pathways, drawn as a strip of colours.
    cluster
        Order rows and columns by hierarchical clustering (average linkage, Euclidean distances of the drawn values).
        ``False`` keeps their order.
    min_prob
        Hide the latent dimensions whose ``layers["mask_prob"]`` is below this for every treatment, e.g. 0.5. Default:
        none is hidden.
    ax
        Axes to draw into. Default: a new figure.
    show
        Show the figure. Default: new figures that are not saved, where matplotlib's backend can show any.
    save
        File to write.

    Returns
    -------
    The axes; ``None`` if the figure was shown.

    Raises
    ------
    KeyError
        If the layer or the column is not there.
    ValueError
        If values are not finite, ``color`` holds more than 18 different numbers, or no latent dimension is left.

    Notes
    -----
    Mask probabilities are drawn from 0 to 1, other layers from 0 to their largest value or, if some are negative,
    symmetric about 0. ``embedding_mean`` says nothing where the mask is off; ``X`` is near 0 there. Rows and columns
    are named where there is room. Groups have the colours of ``uns[f"{color}_colors"]``, if it is there; beyond the 18
    largest they are grey.

    As figure 2 of :cite:`bereket2023samsvae`, which has the rows sorted by pathway.

    Examples
    --------
    >>> effects = model.get_perturbation_effects()
    >>> effects.obs["pathway"] = pathways
    >>> cradle.pl.mask(effects, color="pathway", min_prob=0.5)
    >>> cradle.pl.mask(effects[effects.obs["pathway"].argsort()], color="pathway", cluster=False)
    """
    values, kept = _layer(effects, layer), _kept_dimensions(effects, min_prob)
    colours, legend = (None, []) if color is None else _row_colours(effects, color)
    values = values[:, kept]
    rows, columns = (_order(values), _order(values.T)) if cluster else (np.arange(n) for n in values.shape)
    with style():
        height, width = (_side(n) for n in values.shape)
        ncols = _legend_columns(legend, width)
        fig, (axis,) = panels(1, ax, size=(width + 2.0, height + 0.8 + 0.2 * -(-len(legend) // ncols)))
        if ax is not None:
            width, height = axis.bbox.width / fig.dpi, axis.bbox.height / fig.dpi
            ncols = _legend_columns(legend, width)
        scale = {"cmap": "Blues", "vmin": 0.0, "vmax": 1.0} if layer == MASK_LAYER else _scale(values)
        image = axis.imshow(values[np.ix_(rows, columns)], aspect="auto", **scale)
        axis.spines[:].set_visible(False)
        hidden = f" ({len(columns)} of {len(kept)})" if len(columns) < len(kept) else ""
        _name_ticks(axis, "y", effects.obs_names[rows], "treatment", height)
        _name_ticks(axis, "x", effects.var_names[kept][columns], f"latent dimension{hidden}", width)
        if colours is not None:
            _strip(axis, colours[rows], width)
            group_legend(axis, legend, str(color), loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols)
        name = "mask probability" if layer == MASK_LAYER else layer or "expected effect"
        shrink = min(1.0, 1.8 / height)
        fig.colorbar(image, ax=axis, label=name, shrink=shrink, aspect=12, anchor=(0, 1), pad=0.15 / width)
        return finish(fig, axis, ax=ax, show=show, save=save)


def _layer(effects: AnnData, layer: str | None) -> np.ndarray:
    if layer is not None:
        check_key(effects.layers, layer, "effects.layers", "layer")
    values: np.ndarray = effects.to_df(layer=layer).to_numpy(dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        received = f"{int((~np.isfinite(values)).sum())} that are not" if values.size else f"shape {values.shape}"
        msg = f"The values to draw must be finite numbers of at least one treatment; received {received}: choose another `layer`."
        raise ValueError(msg)
    return values


def _kept_dimensions(effects: AnnData, min_prob: float | None) -> np.ndarray:
    if min_prob is None:
        return np.ones(effects.n_vars, dtype=bool)
    check_probability("min_prob", min_prob)
    largest = _layer(effects, MASK_LAYER).max(axis=0)
    if largest.max() < min_prob:
        msg = f"`min_prob` must leave a latent dimension; received {min_prob}, while the largest probability is {largest.max():.2g}: lower it."
        raise ValueError(msg)
    return largest >= min_prob


def _row_colours(effects: AnnData, color: str) -> tuple[np.ndarray, Legend]:
    check_key(effects.obs, color, "effects.obs", "color")
    n = effects.obs[color].nunique()
    if is_numeric_dtype(effects.obs[color]) and n > MAX_GROUPS:
        msg = f"`color` must be a column of groups; received {color!r} with {n} different numbers: bin them, e.g. with `pd.cut`."
        raise ValueError(msg)
    return group_colours(effects.obs[color], effects.uns.get(f"{color}_colors"))


def _legend_columns(legend: Legend, inches: float) -> int:
    return max(1, int(inches / (0.4 + 0.07 * max((len(name) for name, _ in legend), default=0))))


def _order(values: np.ndarray) -> np.ndarray:
    """Return the rows in the order of the leaves of their hierarchical clustering."""
    if len(values) < 3:
        return np.arange(len(values))
    return leaves_list(linkage(pdist(values), method="average", optimal_ordering=len(values) <= MAX_OPTIMAL))


def _scale(values: np.ndarray) -> dict[str, Any]:
    largest = float(np.abs(values).max()) or 1.0
    signed = bool((values < 0).any())
    return {"cmap": "RdBu_r" if signed else "Blues", "vmin": -largest if signed else 0.0, "vmax": largest}


def _font(n: int, inches: float) -> float:
    """Return the size in points at which ``n`` names fit side by side; 0 if it is illegible."""
    size = min(0.9 * 72 * inches / n, FONT[1])
    return size if size >= FONT[0] else 0.0


def _side(n: int) -> float:
    return float(np.clip(CELL * n, *SIDE)) if _font(n, SIDE[1]) else UNNAMED


def _name_ticks(ax: Axes, which: str, names: pd.Index, what: str, inches: float) -> None:
    """Name the rows (``"y"``) or columns (``"x"``) where there is room, else state how many there are."""
    axis = ax.yaxis if which == "y" else ax.xaxis
    size = _font(len(names), inches)
    if size:
        turned = 90 if which == "x" and max(len(str(n)) for n in names) * 0.7 * size > 72 * inches / len(names) else 0
        axis.set_ticks(range(len(names)), [str(n) for n in names], fontsize=size, rotation=turned)
        axis.set_tick_params(length=0, pad=2)
        axis.set_label_text(what)
    else:
        axis.set_ticks([])
        axis.set_label_text(what if "(" in what else f"{what}s ({len(names)})")


def _strip(ax: Axes, colours: np.ndarray, inches: float) -> None:
    """Draw a column of colours to the left of a heat map."""
    left, right = ax.get_xlim()
    unit = (right - left) / inches  # of the horizontal axis, in an inch
    extent = (left - 0.2 * unit, left - 0.05 * unit, len(colours) - 0.5, -0.5)
    ax.imshow(colours[:, None], extent=extent, aspect="auto", interpolation="nearest")
    ax.set(xlim=(extent[0], right), ylim=extent[2:])
