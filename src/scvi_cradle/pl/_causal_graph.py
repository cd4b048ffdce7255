"""Drawings of causal graphs: the boxes of programs, their edges and the legend."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

from scvi_cradle._validation import check_positive
from scvi_cradle.pl._layers import Layout, Point, lay_out
from scvi_cradle.pl._style import BLACK, BLUE, GREY, LIGHT, VERMILION, finish, panels, style

POSITIVE, NEGATIVE = VERMILION, BLUE
LINE, PAD = 0.11, 0.05  # inches: height of a line of text, space around it
MIN_WIDTH = 3.3  # inches, of a figure
AROUND = (0.3, 0.4)  # inches, of the title and of the legend
LETTERS = (13, 16)  # that a box holds in its name, and in a line of treatments
FONT = (7.0, 5.6)  # points of the name and of the treatments
LINE_WIDTH = (0.6, 3.0)  # points of an edge of strength 0 and of the strongest one
FAINTEST = 0.2  # opacity of an edge of stability 0

Text = tuple[str, ...]  # the name of a node and lines of treatments


class Edge(NamedTuple):
    """What is drawn of an edge; without a stability it is opaque."""

    weight: float
    strength: float
    stability: float | None

    @property
    def colour(self) -> str:
        return NEGATIVE if self.weight < 0 else POSITIVE

    @property
    def opacity(self) -> float:
        return 1.0 if self.stability is None else FAINTEST + (1 - FAINTEST) * self.stability


def causal_graph(
    graph: nx.DiGraph,
    *,
    n_treatments: int = 3,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw a causal graph in layers, causes above their effects.

    Parameters
    ----------
    graph
        Acyclic graph, as of ``model.get_causal_graph()``. Every edge has a ``weight``, whose sign gives the colour, and
        may have ``strength`` (at least 0; the width; default: the size of ``weight``) and ``stability`` (0 to 1; the
        opacity). Nodes may have ``treatments`` (text, names joined by ``", "``).
    n_treatments
        Number of treatments named in every node; the others are counted. 0 for none.
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
    TypeError
        If ``graph`` is no :class:`networkx.DiGraph`.
    ValueError
        If the graph has no nodes or a cycle, or an attribute of an edge is missing or out of range.

    Notes
    -----
    The layer of a node is the length of the longest path to it; a layer of more than four nodes takes several rows.
    Nodes without edges come last. Edges run between the nodes of the rows that they pass. Widths are relative to the
    strongest edge; edges without ``stability`` are opaque. ``graph.graph["threshold"]`` is named in the title.

    Examples
    --------
    >>> import networkx as nx
    >>> graph = nx.DiGraph(threshold=0.25)
    >>> graph.add_node("program_01", treatments="KLF1, GATA1")
    >>> graph.add_edge("program_01", "program_02", weight=-0.6, strength=0.7)
    >>> cradle.pl.causal_graph(graph)
    """
    check_positive("n_treatments", n_treatments, integer=True, allow_zero=True)
    _check_graph(graph)
    edges = {(cause, effect): _edge(cause, effect, data) for cause, effect, data in graph.edges(data=True)}
    texts = {node: _node_text(node, data.get("treatments"), n_treatments) for node, data in graph.nodes(data=True)}
    layout = lay_out(graph, {node: 2 * PAD + LINE * len(text) for node, text in texts.items()})
    left, right = layout.sides
    spare = max(0.0, MIN_WIDTH - (right - left + 2 * PAD)) / 2 + PAD
    width = right - left + 2 * spare
    with style():
        fig, (axis,) = panels(1, ax, size=(width, layout.depth + 2 * PAD + sum(AROUND[: 1 + bool(edges)])))
        axis.set(xlim=(left - spare, right + spare), ylim=(-layout.depth - PAD, PAD))
        axis.set_aspect("equal", anchor="N")
        axis.set_axis_off()
        axis.set_title(_title(graph))
        if edges:
            _add_legend(axis, list(edges.values()))
        fig.draw_without_rendering()  # decides the size of the axes, and with it that of the text
        scale = axis.get_window_extent().width / (fig.dpi * width)
        strongest = max((edge.strength for edge in edges.values()), default=0.0)
        for pair, edge in sorted(edges.items(), key=lambda item: item[1].strength):
            _draw_edge(axis, layout.paths[pair], edge, _line_width(edge.strength, strongest), scale)
        for node, text in texts.items():
            _draw_node(axis, layout, node, text, scale)
        return finish(fig, axis, ax=ax, show=show, save=save)


def _check_graph(graph: Any) -> None:
    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        msg = (
            "`graph` must be a networkx.DiGraph with at most one edge from a node to another; "
            f"received {type(graph).__name__}: take a model's `get_causal_graph()`."
        )
        raise TypeError(msg)
    if not len(graph):
        msg = "`graph` must have at least one node; received none: add the programs as nodes, with or without edges."
        raise ValueError(msg)
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [str(cause) for cause, _ in nx.find_cycle(graph)]
        msg = f"`graph` must not have a cycle; received {' -> '.join([*cycle, cycle[0]])}: remove one of these edges."
        raise ValueError(msg)


def _edge(cause: Any, effect: Any, data: dict[str, Any]) -> Edge:
    weight = data.get("weight")
    received = {"weight": weight, "strength": data.get("strength", _size(weight)), "stability": data.get("stability")}
    bounds = {"weight": (-np.inf, np.inf), "strength": (0.0, np.inf), "stability": (0.0, 1.0)}
    for name, value in received.items():
        if name == "stability" and value is None:
            continue
        low, high = bounds[name]
        if not np.isfinite(_size(value)) or not low <= value <= high:
            wanted = {"weight": "a finite number", "strength": "a finite number of at least 0"}.get(name, "from 0 to 1")
            msg = f"`{name}` of every edge must be {wanted}; received {value!r} for {cause!r} -> {effect!r}."
            raise ValueError(msg)
    return Edge(**received)


def _size(value: Any) -> float:
    """Return the absolute value of a number, NaN of anything else."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return abs(float(value)) if is_number else np.nan


def _node_text(node: Any, treatments: Any, n_shown: int) -> Text:
    names = [name for name in str(treatments or "").split(", ") if name]
    shown = [_shortened(name, LETTERS[1] - 1) for name in names[:n_shown]]
    if n_shown and len(names) > n_shown:
        shown.append(f"+{len(names) - n_shown}\N{NO-BREAK SPACE}more")
    lines = textwrap.wrap(", ".join(shown), LETTERS[1], break_on_hyphens=False)
    return (_shortened(str(node), LETTERS[0]), *lines)


def _shortened(name: str, n_letters: int) -> str:
    return name if len(name) <= n_letters else f"{name[: n_letters - 1]}…"


def _title(graph: nx.DiGraph) -> str:
    n = graph.number_of_edges()
    threshold = graph.graph.get("threshold")
    above = "" if threshold is None else f" above {threshold:g}"
    return f"{n or 'no'} edge{'s' if n > 1 else ''}{above}"


def _line_width(strength: float, strongest: float) -> float:
    low, high = LINE_WIDTH
    return low + (high - low) * (strength / strongest if strongest > 0 else 0.0)


def _add_legend(ax: Axes, edges: list[Edge]) -> None:
    """Explain colour, width and opacity, each in a column of two lines, of the smallest and the largest value."""

    def line(label: str, *, colour: str = GREY, width: float = 1.5, opacity: float = 1.0) -> Line2D:
        return Line2D([], [], color=colour, linewidth=width, alpha=opacity, label=label)

    columns = [[line("positive weight", colour=POSITIVE), line("negative weight", colour=NEGATIVE)]]
    strengths = sorted({edge.strength for edge in edges})
    ends = sorted({strengths[0], strengths[-1]})
    columns.append([line(f"strength {end:.2g}", width=_line_width(end, strengths[-1])) for end in ends])
    opacity = {edge.stability: edge.opacity for edge in edges if edge.stability is not None}
    if opacity:
        ends = sorted({min(opacity), max(opacity)})
        columns.append([line(f"stability {end:.2g}", opacity=opacity[end], width=3.0) for end in ends])
    handles = [handle for column in columns for handle in (*column, line("", width=0.0))[:2]]
    place: dict[str, Any] = {
        "loc": "upper center",
        "bbox_to_anchor": (0.5, 0.0),
        "ncols": len(columns),
        "fontsize": FONT[0],
    }
    ax.legend(handles=handles, handlelength=1.4, columnspacing=1.0, **place)


def _draw_edge(ax: Axes, stops: list[Point], edge: Edge, width: float, scale: float) -> None:
    """Draw a curve through the stops that enters and leaves each of them vertically."""
    points, codes = [stops[0]], [Curve.MOVETO]
    for (x0, y0), (x1, y1) in zip(stops[:-1], stops[1:], strict=True):
        middle = (y0 + y1) / 2
        points += [(x0, middle), (x1, middle), (x1, y1)]
        codes += [Curve.CURVE4] * 3
    head = f"-|>,head_length={0.25 + 0.1 * width},head_width={0.11 + 0.05 * width}"
    arrow = FancyArrowPatch(path=Curve(points, codes), arrowstyle=head, mutation_scale=10 * scale, zorder=1)
    arrow.set(color=edge.colour, alpha=edge.opacity, linewidth=width * scale, joinstyle="miter", capstyle="butt")
    ax.add_patch(arrow)


def _draw_node(ax: Axes, layout: Layout, node: Any, text: Text, scale: float) -> None:
    x, top, width, height = layout.box(node)
    shape: dict[str, Any] = {"boxstyle": f"round,pad=0,rounding_size={PAD}", "facecolor": "white", "edgecolor": LIGHT}
    ax.add_patch(FancyBboxPatch((x - width / 2, top - height), width, height, linewidth=0.8 * scale, zorder=2, **shape))
    for i, line in enumerate(text):
        y = top - PAD - LINE * (i + 0.5)
        size, colour = (FONT[0], BLACK) if i == 0 else (FONT[1], GREY)
        ax.text(x, y, line, fontsize=size * scale, color=colour, ha="center", va="center", zorder=3)
