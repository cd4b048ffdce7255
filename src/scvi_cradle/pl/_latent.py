"""Scatter plots of embeddings of treatments and of cells."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from scvi_cradle._validation import near_matches, preview
from scvi_cradle.pl._style import BLACK, BLUE, GREY, LIGHT, finish, group_colours, group_legend, panels, style

BASIS_NAMES = {"X_umap": "UMAP", "X_tsne": "t-SNE", "X_pca": "PC"}
NAME = (4.8, 9.0)  # points that a letter of a name beside a point takes
MAX_AVOIDED = 1_000  # points; of more, names keep clear of the named ones only
DISTANCES = (4, 12, 22, 34)  # points from a point to its name
DIRECTIONS = ((1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1))


def latent(
    adata: AnnData,
    *,
    basis: str = "X_umap",
    color: str | None = None,
    labels: str | Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw a two-dimensional embedding of treatments or of cells, a point for each.

    Parameters
    ----------
    adata
        Treatments, as of ``model.get_perturbation_effects()``, or cells, of shape ``(n_obs, n_vars)``.
    basis
        Key of ``obsm``, of which the first two columns are drawn.
    color
        Column of ``obs`` or name of a variable (a latent dimension or a gene, with its values in ``X``). Text,
        categories and booleans are drawn as groups, numbers on a scale.
    labels
        Names of observations to write beside their points; ``adata.obs_names`` for all.
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
        If ``basis`` or ``color`` is not there.
    ValueError
        If ``basis`` has fewer than two columns or values that are not finite, or a label is unknown.

    Notes
    -----
    Names that find no place beside the others are left out. Groups have the colours of ``uns[f"{color}_colors"]``, if
    it is there; beyond the 18 largest they are grey.

    As figure 7 of :cite:`bereket2023samsvae`, with UMAP and hierarchical clusters as scanpy and scipy compute them.

    Examples
    --------
    >>> effects = model.get_perturbation_effects()
    >>> sc.pp.neighbors(effects, use_rep="X")
    >>> sc.tl.umap(effects)
    >>> tree = scipy.cluster.hierarchy.linkage(effects.X, method="average")
    >>> clusters = scipy.cluster.hierarchy.fcluster(tree, t=8, criterion="maxclust")
    >>> effects.obs["cluster"] = pd.Categorical(clusters.astype(str))
    >>> cradle.pl.latent(effects, color="cluster", labels=effects.obs_names)
    >>> sc.tl.dendrogram(effects, groupby="cluster", use_rep="X")
    """
    points = embedding_points(adata, basis)
    named = _named(adata, labels)
    values = None if color is None else _colour_values(adata, color)
    size = float(np.clip(15_000 / max(adata.n_obs, 1), 2, 36))
    with style():
        fig, (axis,) = panels(1, ax, size=(4.6 if color is None else 5.8, 4.2))
        draw = partial(axis.scatter, points[:, 0], points[:, 1], s=size, linewidths=0, rasterized=adata.n_obs > 5_000)
        if values is None:
            draw(color=BLUE)
        elif is_numeric_dtype(values) and not is_bool_dtype(values):
            number = values.to_numpy(dtype=np.float64, na_value=np.nan)
            image = draw(c=number, cmap=mpl.colormaps["viridis"].with_extremes(bad=LIGHT), plotnonfinite=True)
            fig.colorbar(image, ax=axis, label=str(color), shrink=0.6, aspect=15)
        else:
            colours, legend = group_colours(values, adata.uns.get(f"{color}_colors"))
            draw(c=colours)
            group_legend(axis, legend, str(color), loc="center left", bbox_to_anchor=(1, 0.5))
        name = BASIS_NAMES.get(basis, basis.removeprefix("X_"))
        axis.set(xlabel=f"{name} 1", ylabel=f"{name} 2", xticks=[], yticks=[])
        axis.margins(0.06)
        _name_points(fig, axis, points, named, list(adata.obs_names[named]))
        return finish(fig, axis, ax=ax, show=show, save=save)


def _colour_values(adata: AnnData, color: str) -> pd.Series:
    if color in adata.obs:
        return adata.obs[color]
    if color not in adata.var_names:
        hint = near_matches(color, [*adata.obs.columns, *adata.var_names])
        msg = f"`color` must be a column of `adata.obs` or a variable; received {color!r}, which is neither{hint}."
        raise KeyError(msg)
    return adata[:, color].to_df()[color]


def embedding_points(adata: AnnData, basis: str) -> np.ndarray:
    """Return the first two columns of an embedding in float64."""
    if basis not in adata.obsm:
        found = f"it holds {preview(adata.obsm) or 'nothing'}"
        msg = (
            f"`basis` must be a key of `adata.obsm`; received {basis!r}, which is not there ({found}): compute it first, "
            "e.g. with `sc.pp.neighbors(adata, use_rep='X')` and `sc.tl.umap(adata)`."
        )
        raise KeyError(msg)
    points = np.asarray(adata.obsm[basis], dtype=np.float64)
    if points.ndim != 2 or points.shape[1] < 2:
        msg = f"`adata.obsm[{basis!r}]` must have two columns at least; received shape {points.shape}: choose another `basis`."
        raise ValueError(msg)
    if not np.isfinite(points[:, :2]).all():
        n = int((~np.isfinite(points[:, :2]).all(axis=1)).sum())
        msg = f"`adata.obsm[{basis!r}]` must be finite; received {n} rows that are not: leave them out."
        raise ValueError(msg)
    return points[:, :2]


def _named(adata: AnnData, labels: str | Sequence[str] | None) -> np.ndarray:
    asked = [] if labels is None else [labels] if isinstance(labels, str) else list(labels)
    unknown = [name for name in asked if name not in adata.obs_names]
    if unknown:
        hint = near_matches(unknown[0], adata.obs_names)
        msg = f"`labels` must be among `adata.obs_names`; received {preview(unknown)}{hint}."
        raise ValueError(msg)
    return np.flatnonzero(adata.obs_names.isin(asked))


def _name_points(fig: Figure, ax: Axes, points: np.ndarray, named: np.ndarray, names: list[str]) -> None:
    """Write names beside their points, each where it covers no other one; distant ones have a line to their point."""
    if not names:
        return
    fig.draw_without_rendering()  # the layout is final then
    at, inside = (np.asarray(x) * 72 / fig.dpi for x in (ax.transData.transform(points), ax.bbox.extents))
    avoided = at if len(at) <= MAX_AVOIDED else at[named]
    dots, written = np.hstack([avoided - 2.5, avoided + 2.5]), np.empty((0, 4))
    for row, name in zip(named, names, strict=True):
        near = avoided[np.linalg.norm(avoided - at[row], axis=1) < DISTANCES[-1]]
        outwards = at[row] - near.mean(axis=0)
        directions = sorted(DIRECTIONS, key=lambda d: -np.round(np.dot(d, outwards) / np.linalg.norm(d), 6))
        for distance, (right, up) in product(DISTANCES, directions):
            shift = np.array([right * distance, up * (distance + NAME[1] / 2)])
            half = np.array([NAME[0] * len(name), NAME[1]]) / 2
            middle = at[row] + shift + (right * half[0], 0)
            box = np.hstack([middle - half, middle + half])
            line = at[row] + np.linspace(0.1, 1, 20)[:, None] * shift if distance > DISTANCES[0] else np.empty((0, 2))
            fits = (box[:2] >= inside[:2]).all() and (box[2:] <= inside[2:]).all()
            if (
                fits
                and not _overlap(box[None], np.vstack([dots, written]))
                and not _overlap(line[:, [0, 1, 0, 1]], written)
            ):
                written = np.vstack([written, box, line[:, [0, 1, 0, 1]]])
                _write(ax, name, points[row], shift, leader=len(line) > 0)
                break


def _overlap(some: np.ndarray, others: np.ndarray) -> bool:
    """Whether any box ``(left, bottom, right, top)`` of the first overlaps one of the others."""
    apart = (some[:, None, :2] >= others[:, 2:]) | (some[:, None, 2:] <= others[:, :2])
    return bool((~apart.any(axis=2)).any())


def _write(ax: Axes, name: str, point: np.ndarray, shift: np.ndarray, *, leader: bool) -> None:
    right = int(np.sign(shift[0]))
    edge = (1 - right) / 2  # of the name, where the line ends
    place: dict[str, Any] = {"textcoords": "offset points", "ha": ("center", "left", "right")[right], "va": "center"}
    if leader:
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2, "relpos": (edge, 0.5)}
        place["arrowprops"] = line
    written = ax.annotate(name, (point[0], point[1]), (shift[0], shift[1]), **place)
    written.set(fontsize=7, color=BLACK)
