"""Figure of reconstructed marginals: histograms of single genes, and quantiles against quantiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes

from scvi_cradle._matrix import get_matrix, to_csr
from scvi_cradle._validation import check_positive, near_matches, preview
from scvi_cradle.pl._style import GREY, LIGHT, MARKERS, PALETTE, AxesArgument, finish, panels, style

N_BINS = 40
N_QUANTILES = 200
MIN_SHARE = 0.05  # of cells with a positive value, for a gene that is chosen by itself
LINE = 0.085  # height of a line of text, of the height of the axes
TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


class _Cells(NamedTuple):
    values: Any  # CSR, cells x genes
    genes: pd.Index | None


def quantile_qq(
    real: Any,
    reconstructed: Any,
    genes: Sequence[Any] | None = None,
    *,
    n_genes: int = 3,
    ax: AxesArgument = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> list[Axes] | None:
    """Draw the marginals of genes, real and reconstructed: histograms above, quantiles against quantiles below.

    Parameters
    ----------
    real
        Expression of real cells, shape ``(n_cells, n_genes)``: AnnData (its ``X``), DataFrame, array or sparse matrix,
        on the scale of the reconstruction (log-normalised values for ``QuantileHurdleAE``).
    reconstructed
        Reconstruction of the same genes, in the same forms, or several by name. Where both name their genes, these are
        paired by name, else by position.
    genes
        Genes to draw: names, or positions if ``real`` has none. Default: ``n_genes`` of those that at least 5 % of the
        cells express, evenly spaced from the highest mean (few zeros) to the lowest (many zeros).
    n_genes
        Number of genes that are chosen by default.
    ax
        Axes to draw into, two per gene: first all histograms, then all below. Default: a new figure.
    show
        Show the figure. Default: new figures that are not saved, where matplotlib's backend can show any.
    save
        File to write.

    Returns
    -------
    The axes, histograms first; ``None`` if the figure was shown.

    Raises
    ------
    ValueError
        For values that are not finite, genes that do not fit or are unknown, and nothing to draw.

    Notes
    -----
    Shares have a square-root scale, so that a peak at zero leaves the rest visible. Zero is in the middle of a bin; the
    text gives the share of values that are exactly zero. Below, the grey line is the identity, and up to 200 evenly spaced quantiles are
    drawn.

    As figure 2 of the quantile-hurdle paper.
    """
    truth = _cells(real, "real")
    named = reconstructed if isinstance(reconstructed, Mapping) else {"reconstructed": reconstructed}
    if not named or "real" in named:
        msg = f"`reconstructed` must hold at least one reconstruction, none of them named 'real'; received {preview(named) or 'an empty mapping'}: rename it."
        raise ValueError(msg)
    models = {str(name): _cells(values, f"reconstruction {name!r}") for name, values in named.items()}
    check_positive("n_genes", n_genes, integer=True)
    columns = _spread(truth, n_genes) if genes is None else _positions(truth, genes)
    partners = [{name: _partner(truth, cells, c, name) for name, cells in models.items()} for c in columns]
    with style():
        fig, axes = panels(2 * len(columns), ax, ncols=len(columns), size=(2.5, 2.4))
        for i, (column, partner) in enumerate(zip(columns, partners, strict=True)):
            series = {"real": _column(truth.values, column)}
            series |= {name: _column(models[name].values, position) for name, position in partner.items()}
            top, bottom = axes[i], axes[len(columns) + i]
            _histograms(top, series)
            _quantiles(bottom, series)
            top.set_title(str(column) if truth.genes is None else str(truth.genes[column]))
            top.set(xlabel="expression", ylabel="share of cells (root scale)" if i == 0 else "")
            bottom.set(xlabel="quantiles of real values", ylabel="of reconstructed values" if i == 0 else "")
        return finish(fig, axes, ax=ax, show=show, save=save)


def _cells(values: Any, name: str) -> _Cells:
    names = None
    if isinstance(values, AnnData):
        names, values = values.var_names, get_matrix(values, None)
    elif isinstance(values, pd.DataFrame):
        names, values = values.columns, values.to_numpy(dtype=np.float64)
    matrix = to_csr(values if hasattr(values, "shape") else np.asarray(values, dtype=np.float64))
    if not matrix.shape[0] or not matrix.shape[1] or not np.isfinite(matrix.data).all():
        msg = f"`{name}` must hold finite values of cells x genes; received shape {matrix.shape}, or NaN or infinite values."
        raise ValueError(msg)
    return _Cells(matrix, names)


def _spread(cells: _Cells, n: int) -> list[int]:
    """Positions of ``n`` genes from the highest to the lowest mean, of those that enough cells express."""
    mean = np.asarray(cells.values.mean(axis=0)).ravel()
    share = np.asarray((cells.values > 0).mean(axis=0)).ravel()
    expressed = np.flatnonzero(share >= min(MIN_SHARE, share.max()))
    ranked = expressed[np.argsort(-mean[expressed], kind="stable")]
    return [int(g) for g in ranked[np.unique(np.linspace(0, len(ranked) - 1, n).round().astype(int))]]


def _positions(cells: _Cells, genes: Sequence[Any]) -> list[int]:
    asked = [genes] if isinstance(genes, str) else list(genes)
    known = pd.RangeIndex(cells.values.shape[1]) if cells.genes is None else cells.genes
    unknown = [g for g in asked if g not in known]
    if unknown or not asked:
        hint = near_matches(unknown[0], known) if unknown else ""
        msg = (
            f"`genes` must name genes of `real`; received {preview(unknown) or 'none'}{hint} (it has {preview(known)})."
        )
        raise ValueError(msg)
    return [int(np.flatnonzero(known == g)[0]) for g in asked]


def _partner(real: _Cells, other: _Cells, column: int, name: str) -> int:
    """Position of the same gene in a reconstruction."""
    if real.genes is not None and other.genes is not None:
        gene = real.genes[column]
        if gene not in other.genes:
            msg = f"Every gene must be in every reconstruction; received {gene!r}, which {name!r} lacks: leave it out of `genes`."
            raise ValueError(msg)
        return int(np.flatnonzero(other.genes == gene)[0])
    if real.values.shape[1] != other.values.shape[1]:
        msg = f"Reconstructions without names must have the genes of `real`, {real.values.shape[1]} of them; received {other.values.shape[1]} in {name!r}."
        raise ValueError(msg)
    return column


def _column(matrix: Any, column: int) -> np.ndarray:
    return np.asarray(matrix[:, [column]].toarray(), dtype=np.float64).ravel()


def _colours(series: Mapping[str, np.ndarray]) -> dict[str, Any]:
    models = [name for name in series if name != "real"]
    return {"real": GREY} | {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(models)}


def _histograms(axis: Axes, series: Mapping[str, np.ndarray]) -> None:
    low, high = min(v.min() for v in series.values()), max(v.max() for v in series.values())
    width = (max(high, 0.0) - min(low, 0.0)) / N_BINS or 1.0
    first, last = (int(np.floor(edge / width + 0.5)) for edge in (low, high))
    edges = (np.arange(first, last + 2) - 0.5) * width
    share = {name: np.histogram(values, edges)[0] / len(values) for name, values in series.items()}
    colours = _colours(series)
    for name, height in share.items():
        if name == "real":
            axis.stairs(height, edges, fill=True, color=LIGHT)
        else:
            axis.stairs(height, edges, color=colours[name], linewidth=1.4)
    lines = ["share of zeros", *(f"{name} {_percent((values == 0).mean())}" for name, values in series.items())]
    highest = max(height.max() for height in share.values())
    axis.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0.0)), np.square))
    axis.set_ylim(0, highest / max(0.97 - LINE * len(lines), 0.3) ** 2)  # the text is above all bins
    shown = [tick for tick in TICKS if tick <= 1.3 * highest]
    axis.set_yticks(shown, [f"{tick:g}" for tick in shown])
    for i, (line, colour) in enumerate(zip(lines, [GREY, *colours.values()], strict=True)):
        text = axis.text(0.98, 0.99 - LINE * i, line, transform=axis.transAxes, ha="right", va="top", fontsize=8)
        text.set_color(colour)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"


def _quantiles(axis: Axes, series: Mapping[str, np.ndarray]) -> None:
    real, colours = series["real"], _colours(series)
    low, high = min(v.min() for v in series.values()), max(v.max() for v in series.values())
    margin = 0.04 * (high - low) or 1.0
    axis.axline((low, low), slope=1, color=LIGHT, linewidth=1, zorder=0)
    for marker, (name, values) in zip(MARKERS * len(series), series.items(), strict=False):
        if name == "real":
            continue
        n = min(N_QUANTILES, len(real), len(values))
        levels = (np.arange(n) + 0.5) / n
        axis.scatter(
            np.quantile(real, levels),
            np.quantile(values, levels),
            s=7,
            marker=marker,
            color=colours[name],
            linewidths=0,
            label=name,
        )
    limits = (low - margin, high + margin)
    axis.set(xlim=limits, ylim=limits, box_aspect=1)
