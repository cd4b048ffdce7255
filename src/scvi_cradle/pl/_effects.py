"""Figures of treatment effects and of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes

from scvi_cradle._validation import check_positive, near_matches, preview
from scvi_cradle.metrics._effects import Effects, align_effects, as_frame
from scvi_cradle.metrics._rows import pearson_rows
from scvi_cradle.pl._style import (
    BLACK,
    BLUE,
    GREY,
    LIGHT,
    MARKERS,
    PALETTE,
    VERMILION,
    AxesArgument,
    finish,
    panels,
    style,
)

MAX_PANELS = 9
RANGE = (-0.6, 1.6)  # of scaled scores; what lies outside is drawn at the edge with an arrow
NEEDED = ("scaled", "scaled_low", "scaled_high", "baseline", "ceiling")
METRIC_NAMES = {
    "pearson_delta": "Pearson of effects,\nper perturbation",
    "pearson_delta_perturbed_mean": "Pearson of effects,\nless the mean effect",
    "perturbation_discrimination": "perturbation\ndiscrimination",
    "ate_pearson": "Pearson of all effects",
    "pearson_delta_top_20": "Pearson of effects,\n20 strongest genes each",
    "ate_r2": "R² of all effects",
    "ate_pearson_top_20": "Pearson of all effects,\n20 strongest genes each",
    "ate_r2_top_20": "R² of all effects,\n20 strongest genes each",
    "jaccard_top_20": "top 20 genes (Jaccard)",
    "jaccard_top_50": "top 50 genes (Jaccard)",
    "energy_distance": "energy distance of cells",
}


def treatment_effects(
    real: Effects,
    predicted: Effects,
    *,
    perturbations: str | Sequence[str] | None = None,
    n_genes: int = 6,
    ncols: int = 3,
    ax: AxesArgument = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> list[Axes] | None:
    """Draw predicted against real effects, a point per gene and a panel per perturbation.

    Parameters
    ----------
    real, predicted
        Effects of shape ``(n_perturbations, n_genes)``, in log2 units, e.g. from
        :func:`scvi_cradle.metrics.average_treatment_effects` and from a model's ``get_average_treatment_effects``.
        Perturbations and genes that only one of them has are left out.
    perturbations
        Perturbations to draw. Default: all in common, at most the first nine.
    n_genes
        Number of genes with the largest real effects that are named.
    ncols
        Panels per row.
    ax
        Axes to draw into, one per perturbation. Default: a new figure.
    show
        Show the figure. Default: new figures that are not saved, where matplotlib's backend can show any.
    save
        File to write.

    Returns
    -------
    The axes, one per perturbation; ``None`` if the figure was shown.

    Raises
    ------
    ValueError
        If there are no effects in common, or a perturbation is unknown.

    Notes
    -----
    The grey line is the identity; titles give Pearson's correlation over genes. All panels have the same axes.
    """
    check_positive("n_genes", n_genes, integer=True, allow_zero=True)
    truth, guess = _in_common(real, predicted)
    chosen = _chosen_rows(truth, perturbations)
    truth, guess = truth.loc[chosen], guess.loc[chosen]
    correlation = pearson_rows(truth.to_numpy(), guess.to_numpy())
    limit = 1.08 * max(float(np.abs(truth.to_numpy()).max()), float(np.abs(guess.to_numpy()).max()), 1e-3)
    with style():
        fig, axes = panels(len(chosen), ax, ncols=ncols, size=(2.7, 2.8))
        for axis, label, r in zip(axes, chosen, correlation, strict=True):
            x, y = truth.loc[label].to_numpy(), guess.loc[label].to_numpy()
            axis.axline((0, 0), slope=1, color=LIGHT, linewidth=1, zorder=0)
            axis.axhline(0, color=LIGHT, linewidth=0.5, zorder=0)
            axis.axvline(0, color=LIGHT, linewidth=0.5, zorder=0)
            axis.scatter(x, y, s=9, color=BLUE, alpha=0.45, linewidths=0, rasterized=len(x) > 5_000)
            axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", box_aspect=1)
            axis.set(xlabel="measured effect (log2)", ylabel="predicted effect (log2)")
            axis.set_title(f"{label}: r = {r:.2f}")
            _name_genes(axis, x, y, [str(g) for g in truth.columns], n_genes, limit)
        return finish(fig, axes, ax=ax, show=show, save=save)


def evaluation(
    table: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    metrics: Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw scores on a scale from the baseline (0) to the replicate ceiling (1), with their intervals.

    Parameters
    ----------
    table
        Result of :func:`scvi_cradle.metrics.evaluate`, or several by name.
    metrics
        Rows to draw. Default: all of the first table.
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
        If a table lacks a column or a metric.

    Notes
    -----
    Each row states baseline and ceiling, which are 0 and 1 there. Arrows point to scores outside of the figure. A
    metric whose ceiling is not better than its baseline cannot be scaled and is said to be so.
    """
    tables = {"": table} if isinstance(table, pd.DataFrame) else dict(table)
    rows = _metric_rows(tables, metrics)
    with style():
        height = max(1.8, (0.26 + 0.13 * len(tables)) * len(rows) + 1.0 + 0.2 * (len(tables) > 1))
        fig, (axis,) = panels(1, ax, size=(6.2, height))
        step = min(0.16, 0.7 / len(tables))
        for i, (name, scores) in enumerate(tables.items()):
            offset = step * (i - (len(tables) - 1) / 2)
            _draw_scores(axis, scores.loc[rows], offset, PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)], name)
        _dress_scores(axis, next(iter(tables.values())).loc[rows], legend=len(tables) > 1)
        return finish(fig, axis, ax=ax, show=show, save=save)


def _in_common(real: Effects, predicted: Effects) -> tuple[pd.DataFrame, pd.DataFrame]:
    if not all(isinstance(effects, AnnData | pd.DataFrame) for effects in (real, predicted)):
        return align_effects(real, predicted)
    first, second = (as_frame(effects, name)[0] for effects, name in ((real, "real"), (predicted, "predicted")))
    rows = first.index[first.index.isin(second.index)]
    columns = first.columns[first.columns.isin(second.columns)]
    if rows.empty or columns.empty:
        what = "perturbation" if rows.empty else "gene"
        msg = f"`real` and `predicted` must have effects in common; received no {what} that both have."
        raise ValueError(msg)
    return align_effects(first.loc[rows, columns], second.loc[rows, columns])


def _chosen_rows(truth: pd.DataFrame, perturbations: str | Sequence[str] | None) -> list[str]:
    if perturbations is None:
        return list(truth.index[:MAX_PANELS])
    asked = [perturbations] if isinstance(perturbations, str) else list(perturbations)
    unknown = [p for p in asked if p not in truth.index]
    if unknown or not asked:
        hint = near_matches(unknown[0], truth.index) if unknown else ""
        msg = f"`perturbations` must be among those with both effects; received {preview(unknown) or 'none'}{hint}."
        raise ValueError(msg)
    return asked


def _name_genes(ax: Axes, x: np.ndarray, y: np.ndarray, genes: list[str], n_genes: int, limit: float) -> None:
    """Mark and name the genes with the largest real effects, each name where it covers no other one."""
    gap, letter, height = 0.05 * limit, 0.065 * limit, 0.12 * limit
    named = np.argsort(-np.abs(x), kind="stable")[:n_genes]
    ax.scatter(x[named], y[named], s=14, color=VERMILION, linewidths=0, zorder=3)
    taken = [(x[g] - gap / 2, y[g] - gap / 2, x[g] + gap / 2, y[g] + gap / 2) for g in named]
    for gene in named:
        width = letter * len(genes[gene])
        for right, up in ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (1, 2), (1, -2), (-1, 2), (-1, -2)):
            side = gap * (1 + abs(up))
            left = x[gene] + (side if right > 0 else -width - side)
            middle = y[gene] + up * height
            box = (left, middle - height / 2, left + width, middle + height / 2)
            if left > -limit and box[2] < limit and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                ax.text(left, middle, genes[gene], fontsize=7, va="center", color=BLACK, zorder=4)
                if up:
                    end = left if right > 0 else left + width
                    ax.plot([x[gene], end], [y[gene], middle], color=GREY, linewidth=0.6, zorder=2)
                break


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _metric_rows(tables: dict[str, pd.DataFrame], metrics: Sequence[str] | None) -> list[str]:
    if not tables:
        msg = "`table` must hold at least one result of `metrics.evaluate`; received none."
        raise ValueError(msg)
    first = next(iter(tables.values()))
    rows = list(first.index) if metrics is None else list(metrics)
    for name, table in tables.items():
        where = f"`table[{name!r}]`" if name else "`table`"
        lacking = [c for c in NEEDED if c not in table.columns] or [r for r in rows if r not in table.index]
        if lacking:
            msg = f"{where} must be a result of `metrics.evaluate` with the metrics to draw; received one without {preview(lacking)}."
            raise ValueError(msg)
    return rows


def _draw_scores(ax: Axes, scores: pd.DataFrame, offset: float, colour: str, marker: str, name: str) -> None:
    value, low, high = (scores[c].to_numpy(dtype=np.float64) for c in NEEDED[:3])
    height = np.arange(len(scores)) + offset
    inside = (value >= RANGE[0]) & (value <= RANGE[1])
    ax.hlines(height, np.clip(low, *RANGE), np.clip(high, *RANGE), color=colour, linewidth=1.5)
    ax.plot(value[inside], height[inside], marker, color=colour, markersize=6, label=name)
    for side, arrow in ((value < RANGE[0], "<"), (value > RANGE[1], ">")):
        ax.plot(np.clip(value[side], *RANGE), height[side], arrow, color=colour, markersize=6, clip_on=False)


def _dress_scores(ax: Axes, scores: pd.DataFrame, *, legend: bool) -> None:
    for x in (0, 1):
        ax.axvline(x, color=GREY, linewidth=1, linestyle="--", zorder=0)
    ax.set_yticks(range(len(scores)), [METRIC_NAMES.get(str(m), str(m)) for m in scores.index])
    ax.set(xlim=RANGE, ylim=(len(scores) - 0.5, -0.5))
    ax.set_xticks([-0.5, 0, 0.5, 1, 1.5], ["-0.5", "0\nbaseline", "0.5", "1\nceiling", "1.5"])
    ax.set_xlabel("score, from the baseline to a repeat of the experiment")
    for i, row in enumerate(scores.itertuples()):
        known = np.isfinite(row.scaled)
        text = f"{row.baseline:.2f} to {row.ceiling:.2f}" if known else "ceiling not better\nthan the baseline"
        ax.text(1.02, i, text, transform=ax.get_yaxis_transform(), va="center", color=GREY, fontsize=8)
    ax.text(
        1.02, -0.62, "baseline\nto ceiling", transform=ax.get_yaxis_transform(), va="bottom", color=GREY, fontsize=8
    )
    if legend:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, handletextpad=0.2, columnspacing=1.2)
