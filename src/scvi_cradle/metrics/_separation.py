"""How far perturbed cells are from controls in a latent space, and what a probability of perturbation is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import ArrayLike
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, roc_auc_score

from scvi_cradle._labels import LabelRule, canonical_labels, check_has_control
from scvi_cradle._validation import check_positive, check_unique_names, preview
from scvi_cradle.metrics._distances import as_cells, median_distance


def latent_separation(
    latents: Any,
    labels: Sequence[object] | pd.Series,
    *,
    control: str | Sequence[str | None] = "control",
    n_draws: int = 100,
    n_cells: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Measure for every label how far its cells are from controls, with equally many cells (quantile-hurdle paper, 9.3).

    Parameters
    ----------
    latents
        Latent codes, shape ``(n_cells, n_latent)``: array, DataFrame or sparse matrix. The paper takes validation
        cells.
    labels
        Label of every cell; labels are not split.
    control
        Label (or labels) of controls.
    n_draws
        Draws to average over.
    n_cells
        Cells of a draw, of the label and of the controls. ``None``: as many as the smallest group has, the controls
        included, as published. Groups that have fewer are drawn from with replacement, the others without.
    seed
        Seed of the draws.

    Returns
    -------
    DataFrame over labels (sorted, without the control): ``mmd``, the squared discrepancy of
    :func:`scvi_cradle.metrics.mmd_rbf` (biased, three widths set by at most 500 of the controls); ``l2``, the Euclidean
    distance of the means; ``n_cells`` of the label; ``n_drawn``.

    Raises
    ------
    ValueError
        For NaN, no control, no other label, fewer than two cells to draw, or controls that are all equal.

    Notes
    -----
    Both numbers are above 0 for groups that do not differ, by an amount that falls with ``n_drawn``: compare tables of
    one ``n_drawn``. All labels are compared with the same draws of controls.

    Examples
    --------
    >>> table = cradle.metrics.latent_separation(model.get_latent_representation(), adata.obs["perturbation"])
    """
    z = as_cells(latents, "latents", 2)
    rule = LabelRule.create(control, None)
    cells = canonical_labels(pd.Series(labels).reset_index(drop=True), rule)
    if len(cells) != len(z):
        msg = f"`labels` must hold one label for every cell, {len(z)} of them; received {len(cells)}."
        raise ValueError(msg)
    check_has_control(cells, rule, "`labels`")
    check_positive("n_draws", n_draws, integer=True)
    groups = {str(name): np.flatnonzero(cells.codes == code) for code, name in enumerate(cells.categories)}
    controls = z[groups.pop(rule.control_name)]
    if not groups:
        msg = f"`labels` must hold a label beside the control; received {rule.control_name!r} only."
        raise ValueError(msg)
    n = min(len(controls), *map(len, groups.values())) if n_cells is None else n_cells
    check_positive("n_cells", n, integer=True)
    if n < 2 or len(controls) < 2:
        smallest = min(groups, key=lambda name: len(groups[name]))
        msg = f"Groups must have at least 2 cells; received {n} to draw of {len(controls)} controls, {smallest!r} having {len(groups[smallest])}: leave small labels out, or pass `n_cells`."
        raise ValueError(msg)
    width = median_distance(controls, z.shape[1])
    if width == 0:
        msg = f"Controls must differ from each other; received a median distance of 0 between {len(controls)} of them: pass another representation."
        raise ValueError(msg)
    z, controls = z - controls.mean(axis=0), controls - controls.mean(axis=0)
    rng = np.random.default_rng(seed)
    drawn = [_draw(controls, n, rng) for _ in range(n_draws)]
    among = np.mean([_mean_kernel(x, x, width) for x in drawn])
    rows = {}
    for name, members in groups.items():
        mmd, l2 = 0.0, 0.0
        for x in drawn:
            y = _draw(z[members], n, rng)
            mmd += _mean_kernel(y, y, width) - 2.0 * _mean_kernel(x, y, width)
            l2 += float(np.linalg.norm(x.mean(axis=0) - y.mean(axis=0)))
        rows[name] = {"mmd": among + mmd / n_draws, "l2": l2 / n_draws, "n_cells": len(members), "n_drawn": n}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index="perturbation")


def _draw(cells: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return cells[rng.choice(len(cells), n, replace=n > len(cells))]


def _mean_kernel(x: np.ndarray, y: np.ndarray, width: float) -> float:
    """Mean over all pairs of cells, and over the widths 1/2, 1 and 2 times ``width``, of the Gaussian kernel."""
    d2 = x @ y.T
    d2 *= -2.0
    d2 += (x**2).sum(axis=1)[:, None]
    d2 += (y**2).sum(axis=1)
    wide = np.exp(np.maximum(d2, 0.0, out=d2) / (-8.0 * width**2), out=d2)
    total = wide.sum()
    for _ in range(2):  # half the width: the fourth power
        wide *= wide
        wide *= wide
        total += wide.sum()
    return float(total / (3 * wide.size))


def marker_score(x: AnnData | pd.DataFrame, markers: pd.Series, *, n_markers: int = 25) -> np.ndarray:
    """Score cells by published marker genes of a perturbation: the signed mean of z-scores.

    Parameters
    ----------
    x
        Log-normalised expression of the cells that are compared, e.g. controls and cells of one label: DataFrame of
        cells x genes, or AnnData with the values in ``X``.
    markers
        Published log fold change of every marker, indexed by gene; its sign is what counts.
    n_markers
        Markers to use: those with the largest absolute changes among the genes of ``x``.

    Returns
    -------
    Score of every cell, shape ``(n_cells,)``, of mean 0. Genes are scaled over the given cells (standard deviation with
    denominator n); constant genes count as 0.

    Raises
    ------
    TypeError
        If ``x`` does not name its genes.
    ValueError
        For NaN, doubled genes, or no marker among the genes.

    References
    ----------
    The quantile-hurdle paper, section 6.3; that it is the sign of the published change that orients a marker is
    inferred.
    """
    if not isinstance(x, AnnData | pd.DataFrame):
        msg = f"`x` must name its genes; received {type(x).__name__}: pass a DataFrame of cells x genes or an AnnData."
        raise TypeError(msg)
    check_positive("n_markers", n_markers, integer=True)
    genes = x.var_names if isinstance(x, AnnData) else x.columns
    changes = pd.Series(markers, dtype=np.float64)
    check_unique_names(genes, "Gene")
    check_unique_names(changes.index, "Marker")
    if not np.isfinite(changes).all():
        msg = f"`markers` must hold finite log fold changes; received none for {preview(changes.index[~np.isfinite(changes)])}."
        raise ValueError(msg)
    changes = changes[changes.index.isin(genes) & (changes != 0)]
    if changes.empty:
        msg = f"`markers` must hold genes of `x` with a change that is not 0; received {preview(pd.Series(markers).index)}, where `x` has {preview(genes)}."
        raise ValueError(msg)
    largest = changes.abs().sort_values(ascending=False, kind="stable").index[:n_markers]
    values = as_cells(x[:, largest].X if isinstance(x, AnnData) else x[largest], "x", 1)
    moved = values - values.mean(axis=0)
    spread = np.sqrt((moved**2).mean(axis=0))
    known = spread > 1e-12 * np.abs(values).max(axis=0)
    scores = np.where(known, moved / np.where(known, spread, 1.0), 0.0)
    return scores @ np.sign(changes[largest].to_numpy()) / len(largest)


def probability_scores(truth: ArrayLike, probability: ArrayLike, *, n_bins: int = 10) -> dict[str, Any]:
    """Compare probabilities with what is true: ranking, squared error and calibration.

    Parameters
    ----------
    truth
        Whether each cell is perturbed, boolean or 0/1, shape ``(n_cells,)``.
    probability
        Probability of it, shape ``(n_cells,)``.
    n_bins
        Bins of equal width between 0 and 1.

    Returns
    -------
    ``auroc``; ``brier``, the mean squared difference; and ``calibration``, a DataFrame over the bins that hold cells:
    ``low, high`` (their edges), ``n`` cells, ``mean_probability``, ``share_perturbed`` and its 95 % interval
    ``ci_low, ci_high`` (Wilson).

    Raises
    ------
    ValueError
        For values out of range, other lengths, or a truth that is the same for all cells (no AUROC).
    """
    y, p = np.asarray(truth), np.asarray(probability, dtype=np.float64)
    if y.ndim != 1 or y.shape != p.shape or not len(y):
        msg = f"`truth` and `probability` must hold one value for every cell; received the shapes {y.shape} and {p.shape}."
        raise ValueError(msg)
    if not np.isin(y, (0, 1)).all() or not ((p >= 0) & (p <= 1)).all():
        msg = "`truth` must be True/False or 0/1 and `probability` between 0 and 1; received other or missing values."
        raise ValueError(msg)
    check_positive("n_bins", n_bins, integer=True)
    y = y.astype(bool)
    if y.all() or not y.any():
        msg = f"`truth` must hold cells of both kinds; received {y[0]} for all {len(y)}: AUROC is not defined."
        raise ValueError(msg)
    bins = np.minimum((p * n_bins).astype(np.int64), n_bins - 1)
    rows = []
    for b in np.unique(bins):
        inside = bins == b
        n, k = int(inside.sum()), int(y[inside].sum())
        interval = binomtest(k, n).proportion_ci(method="wilson")
        row = {"low": b / n_bins, "high": (b + 1) / n_bins, "n": n, "mean_probability": p[inside].mean()}
        rows.append(row | {"share_perturbed": k / n, "ci_low": interval.low, "ci_high": interval.high})
    brier = brier_score_loss(y, p)
    return {"auroc": float(roc_auc_score(y, p)), "brier": float(brier), "calibration": pd.DataFrame(rows)}
