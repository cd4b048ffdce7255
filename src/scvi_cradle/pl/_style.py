"""What all figures share: colours, settings, panels, and what happens to a finished figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

# Okabe and Ito: told apart with any colour vision
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"),
)
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FAIL = VERMILION
GREY = "#666666"
LIGHT = "#BBBBBB"
DPI = 150
MANY = tuple(mpl.colormaps["tab20"]([*range(14), *range(16, 20)]))  # colours of more groups; grey is for the others
MAX_GROUPS = len(MANY)  # with a colour of their own
MIN_LABELLED = 0.1  # share of the axis that a shaded part needs for its name
NON_INTERACTIVE = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}
SETTINGS: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "figure.titlesize": 11,
    "font.size": 9,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}

Legend = list[tuple[str, Any]]  # names of groups with their colours
AxesArgument = Axes | Sequence[Axes] | np.ndarray | None


@contextmanager
def style() -> Iterator[None]:
    """Draw figures with our settings; matplotlib's are restored at the end.

    A backend may be loaded only by the first figure, and says then whether figures show by themselves (as in
    notebooks): that is kept.
    """
    with mpl.rc_context(SETTINGS):
        yield
        interactive = mpl.is_interactive()
    mpl.interactive(interactive)


def panels(
    n: int, ax: AxesArgument, *, ncols: int = 3, size: tuple[float, float] = (2.5, 2.3)
) -> tuple[Figure, list[Axes]]:
    """Return ``n`` axes: new ones in rows of ``ncols``, or those that the caller gave.

    Raises
    ------
    ValueError
        If the number of given axes is not ``n``.
    """
    if ax is not None:
        given = [ax] if isinstance(ax, Axes) else list(np.ravel(np.asarray(ax, dtype=object)))
        if len(given) != n:
            msg = (
                f"`ax` must hold one axes for each of the {n} panels; received {len(given)}: pass {n}, or leave it out."
            )
            raise ValueError(msg)
        return cast("Figure", given[0].get_figure(root=True)), given
    rows = -(-n // ncols)
    columns = -(-n // rows)  # filled evenly
    width, height = size
    fig, grid = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    axes = list(grid.ravel())
    for empty in axes[n:]:
        empty.remove()
    return fig, axes[:n]


def finish(fig: Figure, result: Any, *, ax: AxesArgument, show: bool | None, save: str | Path | None) -> Any:
    """Save, show or return a figure; a figure that was saved and is not shown is closed.

    ``show=None`` shows new figures that are not saved, where the backend can show any.
    """
    if show is None:
        show = ax is None and save is None and plt.get_backend().lower() not in NON_INTERACTIVE
    if save is not None:
        path = Path(save)
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=DPI)
    if show:
        plt.show()
        return None
    if save is not None and ax is None:
        plt.close(fig)
    return result


def shade(
    ax: Axes, bounds_per_batch: dict[str, np.ndarray], *, axis: str, colours: Sequence[str] | None = None
) -> None:
    """Shade the values that fail in every batch, and draw the bounds of every batch; infinite bounds are left out.

    The limits of the axes must be final. ``bounds_per_batch`` has ``"lower"`` and ``"upper"``.
    """
    span, line = (ax.axhspan, ax.axhline) if axis == "y" else (ax.axvspan, ax.axvline)
    low, high = ax.get_ylim() if axis == "y" else ax.get_xlim()
    for which, edge, outermost in (("lower", low, np.min), ("upper", high, np.max)):
        bounds = bounds_per_batch[which]
        if not np.isfinite(bounds).all():
            continue
        for bound, colour in zip(bounds, colours or [FAIL] * len(bounds), strict=True):
            if low < bound < high:
                line(bound, color=colour, linewidth=1.0, linestyle="--", zorder=3)
        limit = float(outermost(bounds))
        if low < limit < high:
            span(edge, limit, color=FAIL, alpha=0.1, linewidth=0, zorder=0)
            scaled = ax.transData.transform([[edge, edge], [limit, limit]])
            side = 1 if axis == "y" else 0
            if abs(scaled[1, side] - scaled[0, side]) < MIN_LABELLED * ax.bbox.size[side]:
                continue
            at_high = edge == high
            where = (0.98, 0.97 if at_high else 0.02) if axis == "y" else (0.97 if at_high else 0.03, 0.97)
            sides = (
                ("right", "top" if at_high else "bottom") if axis == "y" else ("right" if at_high else "left", "top")
            )
            ax.text(*where, "fails", transform=ax.transAxes, ha=sides[0], va=sides[1], color=FAIL, fontsize=8)


def padded(limits: Sequence[float] | np.ndarray, *, log: bool) -> tuple[float, float]:
    """Return the limits of an axis for values in ``limits``; from 0 where they begin near it."""
    low, high = float(limits[0]), float(limits[1])
    if log:
        return low / 1.1, high * 1.1
    high = high if high > low else low + 1.0
    return 0.0 if 0 <= low < 0.2 * high else low - 0.03 * (high - low), high + 0.03 * (high - low)


def ticks(ax: Axes, which: str, *, log: bool) -> None:
    """Put ticks at round numbers on the ``"x"`` or the ``"y"`` axis."""
    axis = ax.yaxis if which == "y" else ax.xaxis
    low, high = ax.get_ylim() if which == "y" else ax.get_xlim()
    if log:
        axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if high > 5:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def group_colours(column: pd.Series, stored: Any) -> tuple[np.ndarray, Legend]:
    """Return the colour of every row as RGBA, of shape ``(n, 4)``, and the groups with their colours.

    ``stored`` holds a colour for each category, as scanpy's ``uns[f"{key}_colors"]``, and is used where the numbers
    agree. Missing values, and groups beyond the :data:`MAX_GROUPS` largest, are grey.
    """
    groups = column.astype("category").cat
    names = [str(name) for name in groups.categories]
    sizes = np.bincount(groups.codes[groups.codes >= 0], minlength=len(names))
    largest = np.argsort(-sizes, kind="stable")[:MAX_GROUPS]
    shown = [code for code in sorted(largest) if sizes[code]]
    palette = list(PALETTE if len(shown) <= len(PALETTE) else MANY)
    if stored is not None and len(stored) == len(names):
        palette = [stored[code] for code in shown]
    table = to_rgba_array([LIGHT] * (len(names) + 1))  # the last one for missing values, whose code is -1
    table[shown] = to_rgba_array(palette[: len(shown)])
    legend = [(names[code], table[code]) for code in shown]
    codes = groups.codes.to_numpy()
    if not np.isin(codes, shown).all():
        legend.append(("others" if (sizes > 0).sum() > len(shown) else "none", table[-1]))
    return table[codes], legend


def group_legend(ax: Axes, legend: Legend, title: str, **place: Any) -> None:
    """Add a legend with a square for every group; ``place`` goes to matplotlib."""
    square = partial(Line2D, [], [], linestyle="", marker="s", markersize=6)
    handles = [square(color=colour, label=name) for name, colour in legend]
    ax.legend(handles=handles, title=title, handletextpad=0.2, columnspacing=1.0, borderaxespad=0.3, **place)
