"""Drawings of causal graphs: layers, places, what edges and nodes say, and what is refused."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import matplotlib as mpl
import networkx as nx
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from scvi_cradle import pl
from scvi_cradle.pl._causal_graph import BLUE, FAINTEST, LINE_WIDTH, VERMILION
from scvi_cradle.pl._layers import BOX, GAP, LANE, PER_ROW, Layout, lay_out, node_rows

mpl.use("Agg")


def programs(n: int = 4, density: float = 0.6, *, stability: bool = True, seed: int = 0) -> nx.DiGraph:
    """Programs in causal order, as of a model's ``get_causal_graph``."""
    rng = np.random.default_rng(seed)
    graph = nx.DiGraph(threshold=0.25)
    names = [f"program_{i + 1:02d}" for i in range(n)]
    for name in names:
        treatments = [f"GENE{k}" for k in rng.choice(30, rng.integers(0, 7), replace=False)]
        graph.add_node(name, treatments=", ".join(treatments))
    for cause, effect in combinations(names, 2):
        if rng.random() < density:
            weight = float(rng.choice([-1, 1]) * rng.uniform(0.2, 1.0))
            extra = {"stability": float(rng.random())} if stability else {}
            graph.add_edge(cause, effect, weight=weight, strength=abs(weight) + 0.1, **extra)
    return graph


def weighted(*edges: tuple[str, str, dict[str, Any]], **graph: Any) -> nx.DiGraph:
    result = nx.DiGraph(**graph)
    result.add_edges_from(edges)
    return result


def arrows(ax: Any) -> list[FancyArrowPatch]:
    return [patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)]


def boxes(ax: Any) -> list[FancyBboxPatch]:
    return [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


def arrow_of(ax: Any, colour: str) -> FancyArrowPatch:
    (found,) = [arrow for arrow in arrows(ax) if to_rgba(arrow.get_edgecolor(), 1) == to_rgba(colour)]
    return found


SIZES = [(4, 0.6), (10, 0.25), (20, 0.08), (20, 0.2), (30, 0.3), (1, 0.0), (9, 0.0)]
every_size = pytest.mark.parametrize(("n", "density"), SIZES)


# --- where things are


@every_size
def test_rows_are_the_lengths_of_the_longest_paths(n: int, density: float) -> None:
    graph = programs(n, density)
    rows = node_rows(graph)
    assert sorted(node for row in rows for node in row) == sorted(graph)
    assert max(map(len, rows)) <= PER_ROW
    level = {node: i for i, row in enumerate(rows) for node in row}
    assert all(level[cause] < level[effect] for cause, effect in graph.edges)
    longest = dict.fromkeys(graph, 0)
    for node in nx.topological_sort(graph):
        for effect in graph.successors(node):
            longest[effect] = max(longest[effect], longest[node] + 1)
    alone = set(nx.isolates(graph))
    for upper, lower in combinations([node for row in rows for node in row if node not in alone], 2):
        assert longest[upper] <= longest[lower]
    if alone and len(alone) < n:
        assert min(level[node] for node in alone) > max(level[node] for node in graph if node not in alone)


def test_rows_by_hand() -> None:
    graph = nx.DiGraph([("a", "b"), ("b", "c"), ("a", "c"), ("d", "c")])
    graph.add_node("alone")
    assert node_rows(graph) == [["a", "d"], ["b"], ["c"], ["alone"]]
    wide = nx.DiGraph()
    wide.add_nodes_from(range(9))
    assert node_rows(wide) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def overlaps(layout: Layout) -> int:
    """Pairs of boxes that touch, and edges that touch a box in a row that they only pass."""
    found = 0
    area = {}
    for node in layout.x:
        x, top, width, height = layout.box(node)
        area[node] = (x - width / 2, x + width / 2, top - height, top)
    for a, b in combinations(area.values(), 2):
        found += a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
    for (cause, effect), path in layout.paths.items():
        for x, y in path[1:-1]:
            inside = [low <= x <= high and bottom <= y <= top for low, high, bottom, top in area.values()]
            found += any(inside)
        assert path[0][1] == pytest.approx(layout.y[cause] - layout.heights[cause])
        assert path[-1][1] == layout.y[effect]
        assert abs(path[0][0] - layout.x[cause]) < BOX / 2
        assert abs(path[-1][0] - layout.x[effect]) < BOX / 2
    return found


@every_size
def test_nothing_overlaps_and_edges_point_down(n: int, density: float) -> None:
    graph = programs(n, density)
    rng = np.random.default_rng(0)
    layout = lay_out(graph, {node: float(rng.uniform(0.2, 0.6)) for node in graph})
    assert overlaps(layout) == 0
    for path in layout.paths.values():
        assert (np.diff([y for _, y in path]) < 0).all()
    left, right = layout.sides
    assert all(left <= x - BOX / 2 and x + BOX / 2 <= right for x in layout.x.values())
    n_passing = sum(len(path) > 2 for path in layout.paths.values())
    assert right - left <= PER_ROW * (BOX + GAP[0]) + LANE * n_passing
    assert min(layout.y[node] - layout.heights[node] for node in graph) == pytest.approx(-layout.depth)


def crossings(layout: Layout) -> int:
    """Crossings of straight edges between two rows."""
    ends = [(path[0], path[-1]) for path in layout.paths.values()]
    return sum((a[0][0] - b[0][0]) * (a[1][0] - b[1][0]) < 0 for a, b in combinations(ends, 2))


def test_edges_that_need_not_cross_do_not() -> None:
    graph = nx.DiGraph([("a", "z"), ("b", "y"), ("c", "x"), ("d", "w")])
    assert crossings(lay_out(graph, dict.fromkeys(graph, 0.3))) == 0


# --- what edges and nodes say


def test_colour_width_and_opacity() -> None:
    graph = weighted(
        ("a", "b", {"weight": 0.3, "strength": 0.5, "stability": 1.0}),
        ("a", "c", {"weight": -0.2, "strength": 2.0, "stability": 0.0}),
    )
    axis = pl.causal_graph(graph, show=False)
    positive, negative = arrow_of(axis, VERMILION), arrow_of(axis, BLUE)
    ratio = positive.get_linewidth() / negative.get_linewidth()
    low, high = LINE_WIDTH
    assert ratio == pytest.approx((low + (high - low) * 0.25) / high)
    assert positive.get_alpha() == 1.0
    assert negative.get_alpha() == pytest.approx(FAINTEST)
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == [
        *("positive weight", "negative weight", "strength 0.5", "strength 2", "stability 0", "stability 1"),
    ]


def test_strength_is_the_size_of_the_weight_unless_given() -> None:
    plain = weighted(("a", "b", {"weight": 0.4}), ("b", "c", {"weight": -0.8}))
    given = weighted(("a", "b", {"weight": 0.4, "strength": 0.4}), ("b", "c", {"weight": -0.8, "strength": 0.8}))
    widths = [[a.get_linewidth() for a in arrows(pl.causal_graph(graph, show=False))] for graph in (plain, given)]
    assert widths[0] == widths[1]
    axis = pl.causal_graph(plain, show=False)
    assert {arrow.get_alpha() for arrow in arrows(axis)} == {1.0}
    assert not any("stability" in text.get_text() for text in axis.get_legend().get_texts())


@every_size
def test_every_node_and_edge_is_drawn(n: int, density: float) -> None:
    graph = programs(n, density)
    axis = pl.causal_graph(graph, show=False)
    assert len(boxes(axis)) == n
    assert len(arrows(axis)) == graph.number_of_edges()
    assert set(graph) <= set(texts(axis))
    assert (axis.get_legend() is None) == (graph.number_of_edges() == 0)


def test_arrows_end_at_their_nodes() -> None:
    graph = weighted(("a", "b", {"weight": 1.0}))
    axis = pl.causal_graph(graph, show=False)
    (arrow,), (upper, lower) = arrows(axis), boxes(axis)
    drawn = arrow.get_path()
    stops = drawn.vertices[drawn.codes != Path.CLOSEPOLY]
    assert texts(axis) == ["a", "b"]
    assert upper.get_y() > lower.get_y() + lower.get_height()
    assert stops[:, 1].max() <= upper.get_y() + 1e-6
    assert stops[:, 1].min() == pytest.approx(lower.get_y() + lower.get_height(), abs=0.06)


@pytest.mark.parametrize(
    ("n_edges", "threshold", "title"),
    [
        (0, 0.25, "no edge above 0.25"),
        (1, 0.5, "1 edge above 0.5"),
        (2, 0.25, "2 edges above 0.25"),
        (0, None, "no edge"),
    ],
)
def test_title(n_edges: int, threshold: float | None, title: str) -> None:
    graph = weighted(*[("a", "b", {"weight": 1.0}), ("b", "c", {"weight": 1.0})][:n_edges])
    graph.add_nodes_from("abc")
    if threshold is not None:
        graph.graph["threshold"] = threshold
    axis = pl.causal_graph(graph, show=False)
    assert axis.get_title() == title
    assert texts(axis) == ["a", "b", "c"]


def test_treatments_are_named_and_counted() -> None:
    graph = nx.DiGraph()
    graph.add_node("program_01", treatments="G1, G2, G3, G4, G5")
    graph.add_node("program_02", treatments="")
    graph.add_node("program_03", treatments="G6")

    def lines(n: int) -> list[str]:
        return [
            line.replace("\N{NO-BREAK SPACE}", " ")
            for line in texts(pl.causal_graph(graph, n_treatments=n, show=False))
        ]

    assert lines(3) == ["program_01", "G1, G2, G3,", "+2 more", "program_02", "program_03", "G6"]
    assert lines(5) == ["program_01", "G1, G2, G3, G4,", "G5", "program_02", "program_03", "G6"]
    assert lines(0) == ["program_01", "program_02", "program_03"]
    long = nx.DiGraph()
    long.add_node("a name beyond all measure", treatments="a_treatment_beyond_all_measure")
    assert texts(pl.causal_graph(long, show=False)) == ["a name beyon…", "a_treatment_be…"]


@pytest.mark.parametrize("width", [None, 3.5, 6.0])
@pytest.mark.parametrize(("n", "density"), [(4, 0.6), (20, 0.08)])
def test_text_fits_into_its_box_and_is_legible(n: int, density: float, width: float | None) -> None:
    graph = programs(n, density)
    ax = None if width is None else plt.subplots(figsize=(width, 1.3 * width), layout="constrained")[1]
    axis = pl.causal_graph(graph, ax=ax, show=False)
    figure = axis.get_figure()
    figure.canvas.draw()
    frames = [box.get_window_extent() for box in boxes(axis)]
    for text in axis.texts:
        extent = text.get_window_extent()
        around = [f for f in frames if f.x0 <= extent.x0 and extent.x1 <= f.x1 and f.y0 - 1 <= extent.y0]
        assert any(extent.y1 <= f.y1 + 1 for f in around), text.get_text()
    if width is None:
        assert figure.get_figwidth() < 4.0
        assert min(text.get_fontsize() for text in axis.texts) > 4.5


# --- habits of all figures


@pytest.mark.parametrize("density", [0.0, 0.6])
def test_save_writes_and_closes(tmp_path: Any, density: float) -> None:
    path = tmp_path / "new folder" / "figure.png"
    assert pl.causal_graph(programs(4, density), save=path) is not None
    assert path.stat().st_size > 5_000
    assert plt.get_fignums() == []


def test_given_axes_are_used_and_stay_open(tmp_path: Any) -> None:
    figure, axis = plt.subplots()
    assert pl.causal_graph(programs(), ax=axis, save=tmp_path / "figure.png") is axis
    assert plt.get_fignums() == [figure.number]


def test_the_graph_stays_as_it_is_and_calls_repeat() -> None:
    graph = programs(12, 0.3)
    before = copy.deepcopy(nx.node_link_data(graph))
    first, second = (pl.causal_graph(graph, show=False) for _ in range(2))
    assert nx.node_link_data(graph) == before
    assert [text.get_position() for text in first.texts] == [text.get_position() for text in second.texts]


# --- what is refused

EDGE = ("a", "b")


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        (nx.Graph([EDGE]), TypeError, "must be a networkx.DiGraph .*; received Graph: take"),
        (nx.MultiDiGraph([EDGE]), TypeError, "received MultiDiGraph"),
        (np.eye(3), TypeError, "received ndarray"),
        (nx.DiGraph(), ValueError, "at least one node; received none"),
        (nx.DiGraph([EDGE, ("b", "a")]), ValueError, "must not have a cycle; received a -> b -> a: remove"),
        (nx.DiGraph([("a", "a")]), ValueError, "must not have a cycle; received a -> a: remove"),
        (
            nx.DiGraph([EDGE]),
            ValueError,
            "`weight` of every edge must be a finite number; received None for 'a' -> 'b'",
        ),
        (weighted((*EDGE, {"weight": np.nan})), ValueError, "`weight` of every edge .* received nan"),
        (weighted((*EDGE, {"weight": "1"})), ValueError, "`weight` of every edge .* received '1'"),
        (weighted((*EDGE, {"weight": 1.0, "strength": -1.0})), ValueError, "`strength` .* at least 0; received -1.0"),
        (weighted((*EDGE, {"weight": 1.0, "strength": np.inf})), ValueError, "`strength` .* received inf"),
        (weighted((*EDGE, {"weight": 1.0, "stability": 1.5})), ValueError, "`stability` .* from 0 to 1; received 1.5"),
        (weighted((*EDGE, {"weight": 1.0, "stability": np.nan})), ValueError, "`stability` .* received nan"),
    ],
)
def test_bad_graphs(graph: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pl.causal_graph(graph, show=False)
    assert plt.get_fignums() == []


def test_bad_number_of_treatments() -> None:
    with pytest.raises(ValueError, match="`n_treatments` must be a non-negative integer; received -1"):
        pl.causal_graph(programs(), n_treatments=-1, show=False)
