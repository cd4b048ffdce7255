"""Figures of perturbation probabilities: on an embedding, against the truth, and against guide counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import ArrayLike
from scipy.special import expit

from scvi_cradle._labels import LabelRule, canonical_labels, check_has_control
from scvi_cradle._validation import check_key, check_positive, near_matches, preview
from scvi_cradle.pl._latent import BASIS_NAMES, embedding_points
from scvi_cradle.pl._style import (
    BLUE,
    LIGHT,
    MARKERS,
    PALETTE,
    SKY,
    AxesArgument,
    finish,
    group_legend,
    panels,
    style,
    ticks,
)

# from light to dark, so that grey print and any colour vision keep the order
PROBABILITY_COLOURS = LinearSegmentedColormap.from_list("probability", ["#DCDCDC", SKY, BLUE, "#1E1E46"])


def perturbation_probability(
    adata: AnnData,
    target: str,
    probability: Any,
    *,
    prior: Any = None,
    perturbation_key: str = "perturbation",
    control: str | Sequence[str | None] = "control",
    sep: str | None = "+",
    basis: str = "X_umap",
    ax: AxesArgument = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> list[Axes] | None:
    """Draw controls and the cells of one target: their labels, the evidence of guide counts, and the probability.

    Parameters
    ----------
    adata
        Cells, with an embedding in ``obsm[basis]``.
    target
        Treatment; its cells are those whose label contains it.
    probability
        Probability of the perturbation: DataFrame of cells x targets, as of ``get_perturbation_probability()``, Series
        or array with a value for each cell, or key of ``obs`` or ``obsm``. Tables with names are brought into the order
        of the cells.
    prior
        Guide prior, as of :func:`scvi_cradle.pp.guide_prior`, in the same forms; drawn as sigmoid of it. ``None``: no
        such panel.
    perturbation_key
        Column of ``obs`` with perturbation labels.
    control, sep
        Label (or labels) of controls, and the text between the treatments of a combination.
    basis
        Key of ``obsm``, of which the first two columns are drawn.
    ax
        Axes to draw into, two, or three with ``prior``. Default: a new figure.
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
        If a key or the target is missing.
    ValueError
        For a target without cells, no control, values out of range, or values missing for a cell.

    Notes
    -----
    The cells of the target lie above the controls, those of larger values on top.

    As figures 3 and 4 of the quantile-hurdle paper.
    """
    points = embedding_points(adata, basis)
    check_key(adata.obs, perturbation_key, "adata.obs", "perturbation_key")
    rule = LabelRule.create(control, sep)
    labels = canonical_labels(adata.obs[perturbation_key], rule)
    check_has_control(labels, rule, f"`obs[{perturbation_key!r}]`")
    members = [rule.treatments(label) for label in labels.categories]
    exposed = np.array([target in m for m in members])[labels.codes]
    if not exposed.any():
        known = sorted({t for m in members for t in m})
        msg = f"`target` must be a treatment with cells; received {target!r}{near_matches(target, known)} (known: {preview(known)})."
        raise ValueError(msg)
    controls = np.array([not m for m in members])[labels.codes]
    values = {"guide prior": expit(_of_cells(adata, prior, target, "prior"))} if prior is not None else {}
    values["probability"] = _of_cells(adata, probability, target, "probability")
    for name, number in values.items():
        if ((number < 0) | (number > 1)).any():
            msg = f"`{name}` must lie between 0 and 1; received {number.min():.3g} to {number.max():.3g}."
            raise ValueError(msg)
    size = float(np.clip(8_000 / (exposed.sum() + controls.sum()), 2, 20))
    rasterized = len(points) > 5_000
    with style():
        fig, axes = panels(1 + len(values), ax, ncols=3, size=(2.8, 3.2))
        for which, colour in ((controls, LIGHT), (exposed, BLUE)):
            axes[0].scatter(
                points[which, 0], points[which, 1], s=size, color=colour, linewidths=0, rasterized=rasterized
            )
        legend = [(f"{rule.control_name} ({controls.sum():,})", LIGHT), (f"{target} ({exposed.sum():,})", BLUE)]
        group_legend(axes[0], legend, "", loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=2)
        axes[0].set_title("label")
        for axis, (name, number) in zip(axes[1:], values.items(), strict=True):
            order = np.lexsort((number, exposed))
            order = order[(controls | exposed)[order]]
            image = axis.scatter(points[order, 0], points[order, 1], c=number[order], s=size, linewidths=0)
            image.set(cmap=PROBABILITY_COLOURS, clim=(0, 1), rasterized=rasterized)
            axis.set_title(name)
        fig.colorbar(image, ax=axes[-1], label=f"P({target})", shrink=0.8, aspect=18, ticks=[0, 0.5, 1])
        name = BASIS_NAMES.get(basis, basis.removeprefix("X_"))
        for axis in axes:
            axis.set(xlabel=f"{name} 1", xticks=[], yticks=[])
        axes[0].set_ylabel(f"{name} 2")
        return finish(fig, axes, ax=ax, show=show, save=save)


def probability_calibration(
    table: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw the share of perturbed cells against their mean probability, with 95 % intervals.

    Parameters
    ----------
    table
        ``calibration`` of :func:`scvi_cradle.metrics.probability_scores`, or several by name.
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
    ValueError
        If a table lacks columns or is empty.

    Notes
    -----
    The grey line is perfect calibration. Larger points stand for more cells.
    """
    tables = {"": table} if isinstance(table, pd.DataFrame) else dict(table)
    needed = {"n", "mean_probability", "share_perturbed", "ci_low", "ci_high"}
    for name, rows in tables.items():
        if not needed <= set(rows.columns) or rows.empty:
            msg = f"`table` must be the `calibration` of `metrics.probability_scores`; received the columns {preview(rows.columns)} and {len(rows)} rows{f' in {name!r}' if name else ''}."
            raise ValueError(msg)
    if not tables:
        msg = "`table` must hold at least one table; received an empty mapping."
        raise ValueError(msg)
    with style():
        fig, (axis,) = panels(1, ax, size=(3.4, 3.2))
        axis.axline((0, 0), slope=1, color=LIGHT, linewidth=1, zorder=0)
        for i, (name, rows) in enumerate(tables.items()):
            colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
            x, y = rows["mean_probability"], rows["share_perturbed"]
            axis.vlines(x, rows["ci_low"], rows["ci_high"], color=colour, linewidth=1)
            axis.plot(x, y, color=colour, linewidth=0.8, marker=marker, markersize=0, alpha=0.6)
            size = 12 + 60 * rows["n"] / rows["n"].sum()
            axis.scatter(x, y, s=size, color=colour, marker=marker, linewidths=0, zorder=3, label=name or None)
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), box_aspect=1)
        axis.set(xlabel="mean probability", ylabel="share of perturbed cells")
        if "" not in tables:
            axis.legend(loc="upper left")
        return finish(fig, axis, ax=ax, show=show, save=save)


def probability_by_guides(
    guide_counts: ArrayLike,
    probability: ArrayLike,
    *,
    n_bins: int = 8,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw the mean probability of a target's cells against the counts of its guides.

    Parameters
    ----------
    guide_counts
        Counts of the target's guides in its cells, shape ``(n_cells,)``.
    probability
        Probability of the perturbation in the same cells, shape ``(n_cells,)``.
    n_bins
        Bins with about equally many cells; equal counts are never parted, so there can be fewer.
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
    ValueError
        For other lengths, no cells, or values out of range.

    Notes
    -----
    A point lies at the median count of its bin; bars are 95 % intervals of the mean (1.96 standard errors, within 0
    and 1).
    """
    counts, p = (np.asarray(v, dtype=np.float64) for v in (guide_counts, probability))
    if counts.ndim != 1 or counts.shape != p.shape or not len(p):
        msg = f"`guide_counts` and `probability` must hold one value for every cell; received the shapes {counts.shape} and {p.shape}."
        raise ValueError(msg)
    if not (np.isfinite(counts) & (counts >= 0) & (p >= 0) & (p <= 1)).all():
        msg = "`guide_counts` must not be negative and `probability` lie between 0 and 1; received other or missing values."
        raise ValueError(msg)
    check_positive("n_bins", n_bins, integer=True)
    edges = np.unique(np.quantile(counts, np.arange(1, n_bins) / n_bins))
    bins = np.searchsorted(edges, counts)
    groups = [(counts[bins == b], p[bins == b]) for b in np.unique(bins)]
    middle = [np.median(c) for c, _ in groups]
    mean = np.array([q.mean() for _, q in groups])
    half = np.array([1.96 * q.std(ddof=1) / np.sqrt(len(q)) if len(q) > 1 else 0.0 for _, q in groups])
    with style():
        fig, (axis,) = panels(1, ax, size=(3.4, 2.8))
        axis.vlines(middle, np.maximum(mean - half, 0), np.minimum(mean + half, 1), color=BLUE, linewidth=1)
        axis.plot(middle, mean, "o-", color=BLUE, markersize=5, linewidth=0.8)
        if min(middle) > 0 and max(middle) > 5 * min(middle):
            axis.set_xscale("log")
            ticks(axis, "x", log=True)
        axis.set(ylim=(0, 1), xlabel="guide counts of the target", ylabel="mean probability")
        return finish(fig, axis, ax=ax, show=show, save=save)


def _of_cells(adata: AnnData, values: Any, target: str, argument: str) -> np.ndarray:
    """Values of every cell, from a key, a table of targets, a series or an array."""
    if isinstance(values, str):
        if values not in adata.obs and values not in adata.obsm:
            hint = near_matches(values, [*adata.obs.columns, *adata.obsm])
            msg = f"`{argument}` must be a key of `adata.obs` or `adata.obsm`; received {values!r}{hint}."
            raise KeyError(msg)
        values = adata.obs[values] if values in adata.obs else adata.obsm[values]
    if isinstance(values, pd.DataFrame):
        check_key(values, target, f"{argument}.columns", "target")
        values = values[target]
    if isinstance(values, pd.Series):
        if not values.index.is_unique or not adata.obs_names.isin(values.index).all():
            msg = f"`{argument}` must hold one row for every cell, by name; received {int(adata.obs_names.isin(values.index).sum())} of {adata.n_obs} cells: take it for these cells."
            raise ValueError(msg)
        values = values.reindex(adata.obs_names)
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape != (adata.n_obs,) or not np.isfinite(numbers).all():
        msg = f"`{argument}` must hold one finite value for each of {adata.n_obs} cells; received shape {numbers.shape}, or NaN."
        raise ValueError(msg)
    return numbers
