"""Where the nodes and edges of an acyclic graph are drawn: rows by the longest path, few crossings."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
import numpy as np
from scipy.optimize import isotonic_regression

PER_ROW = 4  # nodes; what a column of a page takes
BOX = 0.8  # width in inches, as all sizes
GAP = (0.1, 0.36)  # between neighbours in a row; between rows
LANE = 0.075  # width that an edge takes where it passes a row
PORTS = (0.1, 0.6)  # distance of the ends of edges at a node; share of the node's width that they take
SWEEPS = 12

Point = tuple[float, float]


@dataclass(frozen=True)
class Lane:
    """An edge in one of the rows that it passes."""

    cause: Any
    effect: Any
    row: int


@dataclass(frozen=True)
class Layout:
    """Places in inches; y is 0 at the top and falls.

    Parameters
    ----------
    x, y
        Centres and tops of the nodes.
    heights
        Heights of the nodes; all have the same width.
    depth
        Height of all rows.
    paths
        Points through which every edge runs, from the bottom of its cause to the top of its effect.
    """

    x: dict[Any, float]
    y: dict[Any, float]
    heights: dict[Any, float]
    depth: float
    paths: dict[tuple[Any, Any], list[Point]]

    @property
    def sides(self) -> tuple[float, float]:
        """Left and right side of the drawing."""
        of_paths = [x for path in self.paths.values() for x, _ in path]
        of_boxes = [x + side * BOX / 2 for x in self.x.values() for side in (-1, 1)]
        return min(of_paths + of_boxes), max(of_paths + of_boxes)

    def box(self, node: Any) -> tuple[float, float, float, float]:
        """Return centre, top, width and height of a node."""
        return self.x[node], self.y[node], BOX, self.heights[node]


def lay_out(graph: nx.DiGraph, heights: dict[Any, float]) -> Layout:
    """Place the nodes in rows, so that edges point down and pass between nodes."""
    rows: list[list[Hashable]] = [list(row) for row in node_rows(graph)]
    level = {node: i for i, row in enumerate(rows) for node in row}
    chains = {}
    for cause, effect in graph.edges:
        lanes = [Lane(cause, effect, i) for i in range(level[cause] + 1, level[effect])]
        chains[cause, effect] = [cause, *lanes, effect]
        for lane in lanes:
            rows[lane.row].append(lane)
    x = _settled(rows, list(chains.values()))
    row_heights = [max(heights[item] for item in row if item in heights) for row in rows]
    tops = -np.cumsum([0.0, *(height + GAP[1] for height in row_heights)])
    y = {node: float(tops[i]) for node, i in level.items()}

    leaving, entering = _ports(chains, x, cause=True), _ports(chains, x, cause=False)
    paths = {}
    for (cause, effect), chain in chains.items():
        start = (leaving[cause, effect], y[cause] - heights[cause])
        passed = [
            (x[lane], float(tops[lane.row]) - depth) for lane in chain[1:-1] for depth in (0.0, row_heights[lane.row])
        ]
        paths[cause, effect] = [start, *passed, (entering[cause, effect], y[effect])]
    return Layout({node: x[node] for node in level}, y, heights, float(-tops[-1]) - GAP[1], paths)


def node_rows(graph: nx.DiGraph) -> list[list[Any]]:
    """Return the nodes by the length of the longest path to them, at most four a row; those without edges are last."""
    position = {node: i for i, node in enumerate(graph)}
    alone = set(nx.isolates(graph))
    layers = [[node for node in layer if node not in alone] for layer in nx.topological_generations(graph)]
    rows = []
    for layer in (*layers, list(alone)):
        ordered = sorted(layer, key=lambda node: position[node])
        n_rows = -(-len(ordered) // PER_ROW)
        rows += [
            [ordered[i] for i in part] for part in np.array_split(np.arange(len(ordered)), max(n_rows, 1)) if len(part)
        ]
    return rows


def _settled(rows: list[list[Hashable]], chains: list[list[Hashable]]) -> dict[Hashable, float]:
    """Move every item towards the mean of its neighbours in the row above, then below, and so on."""
    above: dict[Hashable, list[Hashable]] = {item: [] for row in rows for item in row}
    below: dict[Hashable, list[Hashable]] = {item: [] for row in rows for item in row}
    for chain in chains:
        for upper, lower in pairwise(chain):
            above[lower].append(upper)
            below[upper].append(lower)
    width = max(sum(_width(item) for item in row) for row in rows)
    x: dict[Hashable, float] = {}
    for row in rows:
        x.update(_placed(row, np.zeros(len(row)), width))
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        near = above if down else below
        for row in rows if down else rows[::-1]:
            wanted = np.array([np.mean([x[other] for other in near[item]]) if near[item] else x[item] for item in row])
            order = np.argsort(wanted, kind="stable")
            row[:] = [row[i] for i in order]
            x.update(_placed(row, wanted[order], width))
    return x


def _width(item: Hashable) -> float:
    return LANE if isinstance(item, Lane) else BOX + GAP[0]


def _placed(row: list[Hashable], wanted: np.ndarray, width: float) -> dict[Hashable, float]:
    """Return the places nearest to the wanted ones, by least squares, where the items of a row do not overlap.

    Places are centres, within ``width`` about 0.
    """
    half = np.array([_width(item) / 2 for item in row])
    offsets = half[0] + np.concatenate([[0.0], np.cumsum(half[:-1] + half[1:])])  # in a row packed from 0
    spare = width - 2 * half.sum()
    places = isotonic_regression(wanted - offsets).x.clip(-width / 2, spare - width / 2) + offsets
    return dict(zip(row, places.tolist(), strict=True))


def _ports(
    chains: dict[tuple[Any, Any], list[Hashable]], x: dict[Hashable, float], *, cause: bool
) -> dict[tuple[Any, Any], float]:
    """Return where edges leave their cause, or enter their effect: side by side, in the order in which they come."""
    end, following = (0, 1) if cause else (-1, -2)
    at: dict[Any, list[tuple[Any, Any]]] = {}
    for pair, chain in chains.items():
        at.setdefault(chain[end], []).append(pair)
    ports = {}
    for node, pairs in at.items():
        span = min(PORTS[0] * (len(pairs) - 1), PORTS[1] * BOX)
        places = np.linspace(-0.5, 0.5, len(pairs)) * span if len(pairs) > 1 else np.zeros(1)
        for pair, place in zip(sorted(pairs, key=lambda pair: x[chains[pair][following]]), places, strict=True):
            ports[pair] = x[node] + float(place)
    return ports
