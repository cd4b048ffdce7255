"""Panels of the figures of quality control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.stats import gaussian_kde

from scvi_cradle._constants import QC_CRITERIA
from scvi_cradle.pl._style import BLUE, FAIL, GREY, PALETTE, padded, ticks

TITLES = {
    QC_CRITERIA.TOTAL_COUNTS: "UMI counts per cell",
    QC_CRITERIA.N_GENES: "genes detected per cell",
    QC_CRITERIA.PCT_MT: "mitochondrial counts (%)",
    QC_CRITERIA.PCT_RIBO: "ribosomal counts (%)",
    QC_CRITERIA.PCT_HB: "haemoglobin counts (%)",
    QC_CRITERIA.DOUBLET: "doublet calls",
}
LOGARITHMIC = (QC_CRITERIA.TOTAL_COUNTS, QC_CRITERIA.N_GENES)
MAX_KDE_CELLS = 5_000
MAX_BATCH_COLOURS = 6
N_BINS = 50


class Quality(NamedTuple):
    """Metrics and flags of the cells of one AnnData."""

    metrics: pd.DataFrame
    flags: pd.DataFrame
    batches: np.ndarray | None


def drawable(values: pd.Series, criterion: str) -> np.ndarray:
    array = values.to_numpy(dtype=np.float64)
    array = array[np.isfinite(array)]
    return np.maximum(array, 1.0) if criterion in LOGARITHMIC else array


def is_wide(values: np.ndarray, criterion: str) -> bool:
    """Whether counts or genes range over more than a factor of ten: a logarithmic axis."""
    return criterion in LOGARITHMIC and len(values) > 0 and bool(values.max() > 10 * values.min())


def violin(ax: Axes, position: int, values: np.ndarray, colour: str, *, log: bool) -> None:
    if not len(values):
        return
    scaled = np.log10(values) if log else values
    grid, density = _density(scaled)
    half = 0.4 * density / density.max()
    heights = 10**grid if log else grid
    ax.fill_betweenx(heights, position - half, position + half, color=colour, alpha=0.55, linewidth=0, zorder=2)
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    ax.vlines(position, low, high, color="black", linewidth=3, zorder=4)
    ax.plot(position, median, marker="o", markersize=4, color="white", markeredgecolor="black", zorder=5)


def _density(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(1.0, abs(high)):
        return np.array([low, high]), np.ones(2)
    if len(values) > MAX_KDE_CELLS:
        quantiles = np.linspace(0, len(values) - 1, MAX_KDE_CELLS).round().astype(int)
        values = np.sort(values)[quantiles]
    grid = np.linspace(low, high, 200)
    return grid, gaussian_kde(values)(grid)


def dress_violins(ax: Axes, criterion: str, shares: dict[str, float], *, log: bool) -> None:
    ax.set_xlim(-0.6, len(shares) - 0.4)
    ax.set_xticks(range(len(shares)), [f"{name}\n{percent(share)} fail" for name, share in shares.items()])
    ax.set_ylabel(TITLES[criterion])
    if log:
        ax.set_yscale("log")
    ax.set_ylim(*padded(ax.dataLim.intervaly, log=log))
    ticks(ax, "y", log=log)


def batch_colours(record: Mapping[str, Any], quality: Quality) -> dict[str, str]:
    """Return a colour for every batch, in the order of the thresholds; none for a single batch or for many."""
    names = [str(name) for name in np.ravel(record["batches"])]
    if quality.batches is None or not 1 < len(names) <= MAX_BATCH_COLOURS:
        return {}
    return dict(zip(names, PALETTE, strict=False))


def histogram(ax: Axes, quality: Quality, criterion: str, batches: dict[str, str]) -> None:
    values = quality.metrics[criterion].to_numpy(dtype=np.float64)
    kept = np.isfinite(values)
    values = np.maximum(values, 1.0) if criterion in LOGARITHMIC else values
    log = is_wide(values[kept], criterion)
    low, high = (float(f(values[kept])) for f in (np.min, np.max)) if kept.any() else (0.0, 1.0)
    high = high if high > low else low + 1.0
    edges = (np.geomspace if log else np.linspace)(low, high, N_BINS + 1).tolist()
    for name, colour in batches.items():
        chosen = kept & (quality.batches == name)
        ax.hist(values[chosen], edges, histtype="step", color=colour, linewidth=1.3, label=name)
    if not batches:
        ax.hist(values[kept], edges, color=BLUE, alpha=0.8)
    if log:
        ax.set_xscale("log")
    ax.set_xlim(*padded((low, high), log=log))
    ax.set_xlabel(TITLES[criterion])
    ax.set_ylabel("cells")
    ticks(ax, "x", log=log)
    ticks(ax, "y", log=False)


def doublet_bars(ax: Axes, flags: np.ndarray) -> None:
    share = float(flags.mean()) if len(flags) else 0.0
    ax.bar([0, 1], [int((~flags).sum()), int(flags.sum())], color=[BLUE, FAIL], width=0.6)
    ax.set_xticks([0, 1], ["single cells", "doublets"])
    ax.set_xlim(-0.6, 1.6)
    ax.set_xlabel(TITLES[QC_CRITERIA.DOUBLET])
    ax.set_ylabel("cells")
    ticks(ax, "y", log=False)
    ax.set_title(f"{percent(share)} flagged", color=FAIL if share else GREY)


def percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"
