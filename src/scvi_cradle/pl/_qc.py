"""Figures of quality control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes

from scvi_cradle._constants import COLUMNS, QC_CRITERIA, QC_UNS_KEY
from scvi_cradle._labels import LabelRule, canonical_labels
from scvi_cradle._matrix import get_matrix
from scvi_cradle._qc import PCT_CRITERIA, check_record, flag_cells, qc_metrics, record_gene_masks
from scvi_cradle._validation import check_key, near_matches, preview
from scvi_cradle.pl._qc_panels import (
    LOGARITHMIC,
    Quality,
    batch_colours,
    doublet_bars,
    drawable,
    dress_violins,
    histogram,
    is_wide,
    percent,
    violin,
)
from scvi_cradle.pl._style import (
    BLUE,
    FAIL,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    AxesArgument,
    finish,
    panels,
    shade,
    style,
)


def qc_violin(
    adata: AnnData,
    generated: AnnData | Mapping[str, AnnData] | None = None,
    *,
    criteria: Sequence[str] | None = None,
    perturbation: str | Sequence[str] | None = None,
    perturbation_key: str = COLUMNS.PERTURBATION,
    control: str | Sequence[str] = "control",
    sep: str | None = "+",
    layer: str | None = None,
    ncols: int = 3,
    ax: AxesArgument = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> list[Axes] | None:
    """Draw the QC metrics of real cells, beside generated ones, with the thresholds and the share of cells that fail.

    Parameters
    ----------
    adata
        Real cells with raw counts, labelled by :func:`scvi_cradle.pp.qc_label`.
    generated
        Generated cells with raw counts, or several kinds of them by name, e.g.
        ``{"artifact off": ..., "artifact on": ...}``.
    criteria
        Criteria to draw. Default: all that have a threshold (doublet calls have none) and genes to count.
    perturbation
        Draw only the cells of these labels, real and generated.
    perturbation_key
        Column of ``obs`` with the labels; generated cells may have them in ``"perturbation"``.
    control, sep
        How labels are read, as in ``setup_anndata``; needed with ``perturbation`` only.
    layer
        Layer of ``adata`` with the counts. Default: that of the labels, or ``X``. Generated cells: the same layer where
        they have it, else ``X``.
    ncols
        Panels per row.
    ax
        Axes to draw into, one per criterion. Default: a new figure.
    show
        Show the figure. Default: new figures that are not saved, where matplotlib's backend can show any.
    save
        File to write.

    Returns
    -------
    The axes, one per criterion; ``None`` if the figure was shown.

    Raises
    ------
    ValueError
        If there are no thresholds, a criterion has none, or no cell has the label.

    Notes
    -----
    Dashed lines are thresholds (one per batch); the shaded side fails in every batch. Counts and genes over more than a
    factor of ten are on a logarithmic axis, with 0 drawn at 1. A bar marks the quartiles, a point the median.
    """
    record = _record(adata)
    chosen = _criteria(record, criteria)
    kinds = {"generated": generated} if isinstance(generated, AnnData) else dict(generated or {})
    rule = LabelRule.create(control, sep)
    layer = layer or str(record.get("layer", "")) or None
    groups = {"real": _quality(_select(adata, perturbation, perturbation_key, rule, "adata"), record, layer)}
    for name, cells in kinds.items():
        cells = _select(cells, perturbation, perturbation_key, rule, name)
        groups[name] = _quality(cells, record, layer if layer in cells.layers else None)
    colours = [BLUE, ORANGE, GREEN, *PALETTE[3:]]
    with style():
        width = 1.2 + 0.7 * len(groups)
        fig, axes = panels(len(chosen), ax, ncols=ncols, size=(width, 2.6))
        for axis, criterion in zip(axes, chosen, strict=True):
            values = [drawable(quality.metrics[criterion], criterion) for quality in groups.values()]
            log = is_wide(np.concatenate(values), criterion)
            for position, drawn in enumerate(values):
                violin(axis, position, drawn, colours[position % len(colours)], log=log)
            shares = {name: float(quality.flags[criterion].mean()) for name, quality in groups.items()}
            dress_violins(axis, criterion, shares, log=log)
            shade(axis, _bounds(record, criterion), axis="y")
        return finish(fig, axes, ax=ax, show=show, save=save)


def qc_thresholds(
    adata: AnnData,
    *,
    criteria: Sequence[str] | None = None,
    layer: str | None = None,
    ncols: int = 3,
    ax: AxesArgument = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> list[Axes] | None:
    """Draw how the cells are distributed over each QC metric, with the thresholds and the share of flagged cells.

    Parameters
    ----------
    adata
        Cells with raw counts, labelled by :func:`scvi_cradle.pp.qc_label`.
    criteria
        Criteria to draw. Default: all of ``uns["qc_label"]`` that have genes to count.
    layer
        Layer with the counts. Default: that of the labels, or ``X``.
    ncols
        Panels per row.
    ax
        Axes to draw into, one per criterion. Default: a new figure.
    show
        Show the figure. Default: new figures that are not saved, where matplotlib's backend can show any.
    save
        File to write.

    Returns
    -------
    The axes, one per criterion; ``None`` if the figure was shown.

    Raises
    ------
    ValueError
        If there are no thresholds or a criterion is unknown.

    Notes
    -----
    Up to six batches have a curve and a threshold each in their colour; with more, there is one histogram of all cells.
    Dashed lines are thresholds; the shaded side fails in every batch.
    """
    record = _record(adata)
    chosen = _criteria(record, criteria, doublets=f"qc_{QC_CRITERIA.DOUBLET}" in adata.obs)
    quality = _quality(adata, record, layer or str(record.get("layer", "")) or None)
    batches = batch_colours(record, quality)
    with style():
        fig, axes = panels(len(chosen), ax, ncols=ncols, size=(2.6, 2.4))
        for axis, criterion in zip(axes, chosen, strict=True):
            if criterion == QC_CRITERIA.DOUBLET:
                doublet_bars(axis, adata.obs[f"qc_{criterion}"].to_numpy(dtype=bool))
                continue
            histogram(axis, quality, criterion, batches)
            flagged = float(quality.flags[criterion].mean())
            axis.set_title(f"{percent(flagged)} flagged", color=FAIL if flagged else GREY)
            shade(axis, _bounds(record, criterion), axis="x", colours=list(batches.values()) or None)
        if batches:
            handles, _ = axes[0].get_legend_handles_labels()
            place = {"loc": "outside upper center", "ncols": 3} if ax is None else {"loc": "upper right"}
            (fig if ax is None else axes[0]).legend(handles=handles, title=str(record["batch_key"]), **place)
        return finish(fig, axes, ax=ax, show=show, save=save)


def _record(adata: AnnData) -> Mapping[str, Any]:
    if QC_UNS_KEY not in adata.uns:
        msg = f"QC thresholds are needed in `adata.uns[{QC_UNS_KEY!r}]`; it is not there: run `scvi_cradle.pp.qc_label` first."
        raise ValueError(msg)
    record: Mapping[str, Any] = adata.uns[QC_UNS_KEY]
    check_record(record)
    return record


def _criteria(record: Mapping[str, Any], asked: Sequence[str] | None, *, doublets: bool = False) -> list[str]:
    stored = [str(c) for c in np.ravel(record["criteria"])]
    known = [c for c in stored if c in record["thresholds"] or (doublets and c == QC_CRITERIA.DOUBLET)]
    if asked is None:
        empty = {c for c, name in PCT_CRITERIA.items() if not np.size(record["gene_sets"].get(name, ()))}
        chosen = [c for c in known if c not in empty] or known
    else:
        chosen = [asked] if isinstance(asked, str) else list(asked)
    unknown = [c for c in chosen if c not in known]
    if unknown or not chosen:
        msg = f"`criteria` must be among those with a threshold ({preview(known)}); received {preview(unknown) or 'none'}."
        raise ValueError(msg)
    return chosen


def _select(adata: AnnData, perturbation: str | Sequence[str] | None, key: str, rule: LabelRule, name: str) -> AnnData:
    if perturbation is None:
        return adata
    column = key if key in adata.obs else COLUMNS.PERTURBATION
    check_key(adata.obs, column, f"{name}.obs", "perturbation_key")
    asked = [perturbation] if isinstance(perturbation, str) else list(perturbation)
    labels = canonical_labels(adata.obs[column], rule)
    wanted = {rule.canonical(p) for p in asked}
    chosen = np.asarray(labels.isin(sorted(wanted)))
    if not chosen.any():
        hint = near_matches(asked[0], labels.categories)
        msg = (
            f"`perturbation` must name labels with cells; received {preview(asked)}, of which {name!r} has none{hint}."
        )
        raise ValueError(msg)
    return adata[chosen]


def _quality(adata: AnnData, record: Mapping[str, Any], layer: str | None) -> Quality:
    masks = record_gene_masks(record, adata.var_names, "the AnnData")
    metrics = qc_metrics(get_matrix(adata, layer), masks)
    batch_key = str(record.get("batch_key") or "")
    batches = adata.obs[batch_key].astype(str).to_numpy() if batch_key and batch_key in adata.obs else None
    return Quality(metrics, flag_cells(metrics, record, batches), batches)


def _bounds(record: Mapping[str, Any], criterion: str) -> dict[str, np.ndarray]:
    """Return the bounds per batch as they are drawn."""
    bounds = {side: np.asarray(record["thresholds"][criterion][side], dtype=np.float64) for side in ("lower", "upper")}
    if str(record["flavor"]) == "robust" and criterion in LOGARITHMIC:
        bounds = {side: np.expm1(values) for side, values in bounds.items()}
    return bounds
