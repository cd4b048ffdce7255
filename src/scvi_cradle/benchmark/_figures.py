"""Figures of a benchmark: scores of all methods, and curves over the share of combinations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from scvi_cradle.benchmark._settings import WITH_FRACTIONS
from scvi_cradle.benchmark._tables import OVER_FRACTIONS, RELATIVE
from scvi_cradle.pl._style import GREY, MARKERS, PALETTE, finish, panels, style

DOTS = (
    *("ate_pearson", "pearson_delta", "pearson_delta_perturbed_mean", "perturbation_discrimination"),
    *("jaccard_top_50", "relative_rmse_of_mean", "energy_distance", "qc_pass_rate", RELATIVE),
)
LINES = ("-", "--", ":")
DASHED = "dashed: ceiling (effects: repeat of the held-out\nmeasurement with as many cells)"


def draw(summary: pd.DataFrame, out: Path) -> list[Path]:
    """Draw what an experiment is about into a folder and return the files."""
    if summary.empty:
        return []
    experiment = str(summary["experiment"].iloc[0])
    path = out / f"{experiment}.png"
    function = draw_curves if experiment in WITH_FRACTIONS else draw_scores
    return [path] if function(summary, path) else []


def draw_scores(summary: pd.DataFrame, path: Path) -> bool:
    """Draw a panel for every metric: methods below each other, thresholds in colours, baseline and ceiling as lines."""
    metrics = [m for m in DOTS if m in set(summary["metric"])]
    models = list(dict.fromkeys(summary.loc[summary["metric"].isin(metrics), "model"]))
    thresholds = list(dict.fromkeys(summary["threshold"].fillna(0)))
    if not metrics:
        return False
    with style():
        fig, axes = panels(len(metrics), None, ncols=4, size=(3.0, 0.24 * len(models) + 1.2))
        columns = -(-len(metrics) // -(-len(metrics) // 4))
        for number, (metric, ax) in enumerate(zip(metrics, axes, strict=True)):
            rows = summary[summary["metric"] == metric]
            for i, threshold in enumerate(thresholds):
                part = rows[rows["threshold"].fillna(0) == threshold]
                height = [models.index(m) + 0.22 * (i - (len(thresholds) - 1) / 2) for m in part["model"]]
                colour = PALETTE[i % len(PALETTE)]
                ax.hlines(height, part["ci_low"], part["ci_high"], color=colour, linewidth=1.2)
                name = f"{threshold:g} MADs" if threshold else "given flags"
                ax.plot(part["mean"], height, MARKERS[i % len(MARKERS)], color=colour, markersize=4, label=name)
            for column, line in (("baseline", ":"), ("ceiling", "--")):
                if rows[column].notna().any():
                    ax.axvline(rows[column].mean(), color=GREY, linestyle=line, linewidth=1, zorder=0)
            ax.set_yticks(range(len(models)), [""] * len(models) if number % columns else models)
            ax.set(ylim=(len(models) - 0.5, -0.5), title=metric)
            ax.xaxis.set_major_locator(MaxNLocator(4))
        if len(thresholds) > 1:
            axes[0].legend(loc="best")
        fig.supxlabel(f"dotted: baseline\n{DASHED}", fontsize=8.5, color=GREY)
        finish(fig, None, ax=None, show=False, save=path)
    return True


def draw_curves(summary: pd.DataFrame, path: Path) -> bool:
    """Draw a panel for every metric over the share of combinations (SAMS-VAE, figure 4); a row for every threshold."""
    metrics = [m for m in OVER_FRACTIONS if m in set(summary["metric"])]
    thresholds = list(dict.fromkeys(summary["threshold"].fillna(0)))
    if not metrics:
        return False
    models = list(dict.fromkeys(summary.loc[summary["metric"].isin(metrics), "model"]))
    with style():
        fig, axes = panels(len(metrics) * len(thresholds), None, ncols=len(metrics), size=(2.7, 2.6))
        grid = np.array(axes, dtype=object).reshape(len(thresholds), len(metrics))
        for threshold, row in zip(thresholds, grid, strict=True):
            for metric, ax in zip(metrics, row, strict=True):
                part = summary[(summary["metric"] == metric) & (summary["threshold"].fillna(0) == threshold)]
                _draw_curves(ax, part, models)
                ax.set(title=metric, xlabel="share of combinations (%)")
            row[0].set_ylabel(f"{threshold:g} MADs" if threshold else "given flags")
        handles, names = axes[0].get_legend_handles_labels()
        fig.legend(handles, names, loc="outside right upper")
        if summary["ceiling"].notna().any():
            fig.supxlabel(DASHED, fontsize=8.5, color=GREY)
        finish(fig, None, ax=None, show=False, save=path)
    return True


def _draw_curves(ax: Axes, rows: pd.DataFrame, models: list[str]) -> None:
    for i, model in enumerate(models):
        part = rows[rows["model"] == model].sort_values("fraction")
        if part.empty:
            continue
        x, n = 100 * part["fraction"].to_numpy(), len(PALETTE)
        colour, line = PALETTE[i % n], LINES[(i // n) % len(LINES)]
        ax.plot(x, part["mean"], line, marker=MARKERS[i % len(MARKERS)], markersize=3.5, color=colour, label=model)
        ax.fill_between(x, part["ci_low"], part["ci_high"], color=colour, alpha=0.12, linewidth=0)
    if rows["ceiling"].notna().any():
        ax.axhline(rows["ceiling"].mean(), color=GREY, linestyle="--", linewidth=1, zorder=0)
