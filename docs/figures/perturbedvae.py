"""Draw the graph of PerturbedVAE: `python docs/figures/perturbedvae.py` writes the SVG beside this file."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch

BLUE, VERMILION, GREEN, GREY, BLACK = "#0072B2", "#B34700", "#007A59", "#555555", "#000000"
INVARIANT, RESPONSIVE, OBSERVED = (BLUE, "#DCEBF7"), (VERMILION, "#FCE8D8"), (BLACK, "#D9D9D9")
SIZE = (7.6, 5.0)  # inches, and units of the drawing
RADIUS, SMALL = 0.33, 0.22

Point = tuple[float, float]


def node(ax: Axes, at: Point, text: str, colours: tuple[str, str], radius: float = RADIUS, size: float = 14) -> Circle:
    line, fill = colours
    circle = Circle(at, radius, facecolor=fill, edgecolor=line, linewidth=1.5, zorder=3)
    ax.add_patch(circle)
    ax.text(*at, text, ha="center", va="center", fontsize=size, color=BLACK, zorder=4)
    return circle


def box(ax: Axes, corner: Point, width: float, height: float, line: str, fill: str = "none") -> FancyBboxPatch:
    patch = FancyBboxPatch(
        corner, width, height, boxstyle="round,pad=0,rounding_size=0.15", facecolor=fill, edgecolor=line, linewidth=1.3
    )
    ax.add_patch(patch)
    return patch


def arrow(
    ax: Axes, start: Patch, end: Patch, ends: tuple[Point, Point], *, colour: str = BLACK, bend: float = 0.0,
    dashed: bool = False, head: str = "-|>", width: float = 1.4,
) -> None:  # fmt: skip
    ax.add_patch(
        FancyArrowPatch(
            *ends,
            patchA=start,
            patchB=end,
            arrowstyle=head,
            mutation_scale=12,
            connectionstyle=f"arc3,rad={bend}",
            linestyle=(0, (4, 2.5)) if dashed else "-",
            linewidth=width,
            color=colour,
            shrinkA=1.5,
            shrinkB=1.5,
            zorder=2,
        )
    )


def label(ax: Axes, at: Point, text: str, colour: str = BLACK, size: float = 10.5, ha: str = "center") -> None:
    ax.text(*at, text, ha=ha, va="center", fontsize=size, color=colour, zorder=5)


def draw() -> Figure:
    fig = Figure(figsize=SIZE, facecolor="white")
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
    ax.axis("off")

    box(ax, (0.12, 0.12), SIZE[0] - 0.24, SIZE[1] - 0.24, GREY)
    label(ax, (SIZE[0] - 0.3, 0.34), r"cells $i = 1, \ldots, N$", GREY, ha="right")
    partner = (1.05, 2.75), (1.05, 0.95)
    box(ax, (0.38, 0.42), 1.34, 2.98, GREY)
    label(ax, (1.05, 3.6), "control partner", GREY)

    at = {"zi": (3.05, 2.75), "x": (4.1, 0.95), "c": (2.75, 0.95), "n": (6.75, 2.75), "u": (6.05, 4.4)}
    zi0 = node(ax, partner[0], r"$z_\iota^0$", INVARIANT)
    x0 = node(ax, partner[1], r"$x^0$", OBSERVED)
    zi = node(ax, at["zi"], r"$z_\iota$", INVARIANT)
    x = node(ax, at["x"], "$x$", OBSERVED)
    c = node(ax, at["c"], "$c$", OBSERVED, SMALL, 12)
    n = node(ax, at["n"], r"$n_\nu$", RESPONSIVE)
    u = node(ax, at["u"], "$u$", OBSERVED)

    zn = box(ax, (4.25, 1.95), 1.55, 1.6, VERMILION, "#FFF8F2")
    label(ax, (4.46, 3.34), r"$z_\nu$", VERMILION, 13)
    inner = {1: (5.02, 3.2), 2: (5.45, 2.72), 3: (4.66, 2.3)}
    programs = {i: node(ax, p, str(i), RESPONSIVE, SMALL - 0.02, 10) for i, p in inner.items()}
    for i, j in ((1, 2), (1, 3), (2, 3)):
        arrow(ax, programs[i], programs[j], (inner[i], inner[j]), colour=VERMILION, width=1.2)
    label(ax, (5.33, 2.2), r"$\Lambda_{\nu\nu}(u)$", VERMILION)

    middle = (5.02, 2.75)
    arrow(ax, zi, zn, (at["zi"], middle))
    label(ax, (3.8, 2.95), r"$\Lambda_{\nu\iota}(u)$")
    arrow(ax, n, zn, (at["n"], middle))
    arrow(ax, u, n, (at["u"], at["n"]))
    label(ax, (6.62, 3.72), r"$\mu(u),\ \beta(u)$", ha="left")
    arrow(ax, u, zn, (at["u"], middle))
    arrow(ax, zi, x, (at["zi"], at["x"]))
    arrow(ax, zn, x, (middle, at["x"]))
    arrow(ax, c, x, (at["c"], at["x"]))
    label(ax, (4.06, 1.5), "$g$")

    arrow(ax, x, zi, (at["x"], at["zi"]), colour=BLUE, bend=-0.4, dashed=True)
    arrow(ax, x0, zi0, (partner[1], partner[0]), colour=BLUE, dashed=True)
    arrow(ax, x, n, (at["x"], at["n"]), colour=VERMILION, bend=0.35, dashed=True)
    label(ax, (2.86, 1.72), r"$q(z_\iota \mid x)$", BLUE, ha="right")
    label(ax, (5.85, 1.2), r"$q(n_\nu \mid x, u)$", VERMILION, ha="left")
    arrow(ax, zi0, zi, (partner[0], at["zi"]), colour=GREEN, head="-", width=2.6)
    label(ax, (2.12, 3.0), "alignment", GREEN)

    label(ax, (0.42, 4.55), "filled grey: observed", BLACK, 9.5, "left")
    label(ax, (0.42, 4.3), "solid arrows: the model    dashed: the encoder", BLACK, 9.5, "left")
    label(ax, (0.42, 4.05), r"blue: invariant to $u$    red: responsive to $u$", BLACK, 9.5, "left")
    return fig


if __name__ == "__main__":
    mpl.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "perturbedvae", "mathtext.fontset": "dejavuserif"}
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg")
    draw().savefig(target, dpi=150, **({"metadata": {"Date": None}} if target.suffix == ".svg" else {}))
