"""Average treatment effects of raw counts, streamed over blocks of cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from scvi_cradle._constants import CONTROL_UNS_KEY
from scvi_cradle._labels import LabelRule, canonical_labels, check_has_control
from scvi_cradle._matrix import check_counts, get_matrix, log_normalize, sum_blocks
from scvi_cradle._validation import check_key, check_one_of, check_unique_names, preview

EffectMethod: TypeAlias = Literal["perturbseq", "mean"]
Effects: TypeAlias = AnnData | pd.DataFrame | np.ndarray


@dataclass(frozen=True)
class GroupMoments:
    """Number of cells, mean and unbiased variance of every gene in every group of cells.

    Parameters
    ----------
    n_cells
        Shape ``(n_groups,)``.
    mean
        Shape ``(n_groups, n_genes)``; zero for a group without cells.
    variance
        Shape ``(n_groups, n_genes)``. A group of one cell takes the pooled variance within all groups; it is infinite
        (unknown) when no group holds two cells.
    """

    n_cells: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


def group_sums(matrix: Any, codes: np.ndarray, n_groups: int, *, method: EffectMethod) -> tuple[np.ndarray, np.ndarray]:
    """Sum (transformed) counts, and their squares, over groups of cells.

    Parameters
    ----------
    matrix
        Counts in any storage, shape ``(n_cells, n_genes)``.
    codes
        Group of every cell, shape ``(n_cells,)``; cells with a negative code are left out.
    n_groups
        Number of groups.
    method
        ``"perturbseq"``: log2 of counts per 1e4; ``"mean"``: counts.

    Returns
    -------
    Two float64 arrays of shape ``(n_groups, n_genes)``.
    """

    def add(totals: list[np.ndarray], raw: sp.csr_matrix, group: np.ndarray) -> None:
        cells = np.flatnonzero(group >= 0)
        if not len(cells):
            return
        block = log_normalize(raw) if method == "perturbseq" else raw.astype(np.float64)
        member = sp.csr_matrix((np.ones(len(cells)), (group[cells], cells)), shape=(n_groups, raw.shape[0]))
        totals[0] += (member @ block).toarray()
        block.sum_duplicates()
        totals[1] += (member @ block.power(2)).toarray()

    total, total_of_squares = sum_blocks(matrix, add, [(n_groups, matrix.shape[1])] * 2, codes)
    return total, total_of_squares


def group_moments(matrix: Any, codes: np.ndarray, n_groups: int, *, method: EffectMethod) -> GroupMoments:
    """Return number of cells, mean and variance of every group; parameters as in :func:`group_sums`."""
    n_cells = np.bincount(codes[codes >= 0], minlength=n_groups)
    total, squares = group_sums(matrix, codes, n_groups, method=method)
    mean = total / np.maximum(n_cells, 1)[:, None]
    spread = np.maximum(squares - total * mean, 0.0)  # sum of squared deviations, (n_groups, n_genes)
    dof = np.maximum(n_cells - 1, 0)
    pooled = spread.sum(axis=0) / dof.sum() if dof.sum() else np.full(matrix.shape[1], np.inf)
    variance = np.where(dof[:, None] > 0, spread / np.maximum(dof, 1)[:, None], pooled)
    return GroupMoments(n_cells, mean, variance)


def read_counts(adata: AnnData, layer: str | None, name: str) -> Any:
    """Return the counts of ``adata`` after checking that they are raw counts of uniquely named genes."""
    if not isinstance(adata, AnnData):
        msg = f"`{name}` must be an AnnData of cells; received {type(adata).__name__}."
        raise TypeError(msg)
    matrix = get_matrix(adata, layer)
    check_unique_names(adata.var_names, "Gene")
    check_counts(matrix, f"`{name}.X`" if layer is None else f"`{name}.layers[{layer!r}]`")
    return matrix


def read_labels(adata: AnnData, perturbation_key: str, rule: LabelRule, *, need_control: bool = True) -> pd.Categorical:
    """Return canonical labels of the cells, after checking that the column is there and that it holds controls."""
    check_key(adata.obs, perturbation_key, "adata.obs", "perturbation_key")
    labels = canonical_labels(adata.obs[perturbation_key], rule)
    if need_control:
        check_has_control(labels, rule, f"`obs[{perturbation_key!r}]`")
    return labels


def average_treatment_effects(
    adata: AnnData,
    perturbation_key: str,
    *,
    control: str | Sequence[str] = "control",
    sep: str | None = "+",
    layer: str | None = None,
    method: EffectMethod = "perturbseq",
) -> AnnData:
    r"""Estimate the effect of every perturbation on every gene from raw counts.

    Parameters
    ----------
    adata
        Cells with raw counts; sparse, dense, backed or dask-backed.
    perturbation_key
        Column of ``adata.obs`` with one label per cell.
    control
        Token, or tokens, of control cells.
    sep
        Text between the treatments of a combination; ``None``: labels are never split.
    layer
        Layer with the counts; ``None``: ``adata.X``.
    method
        ``"perturbseq"``: difference of the means of :math:`\log_2(1 + 10^4 x / L)` with :math:`L` the total of the
        cell; ``"mean"``: difference of mean counts.

    Returns
    -------
    AnnData of shape ``(n_labels, n_genes)``, labels sorted, the control left out; ``X`` is float64 and

    - ``obs["n_cells"]``: cells of the label,
    - ``layers["sem"]``: standard error of the effect, :math:`\sqrt{s_{tg}^2 / n_t + s_{0g}^2 / n_0}` with unbiased
      variances between cells. A label of a single cell takes the pooled variance within all labels,
    - ``var["control_mean"]``, ``var["control_sem"]``: mean of the controls and its standard error, which all effects
      share,
    - ``uns["control"]``: name of the control, ``uns["n_control_cells"]``, ``uns["method"]``.

    Raises
    ------
    KeyError
        If the column or the layer is not there.
    ValueError
        If there is no control cell, no perturbed cell, a missing label or a value that is not a count.

    Notes
    -----
    A cell without counts contributes 0 and is counted. Effects of one call share the sampling error of the control, so
    that two sets of effects that were taken against the same control cells are correlated even where nothing happened.
    """
    check_one_of("method", method, ("perturbseq", "mean"))
    rule = LabelRule.create(control, sep)
    matrix = read_counts(adata, layer, "adata")
    labels = read_labels(adata, perturbation_key, rule)
    names = [c for c in labels.categories if c != rule.control_name]
    if not names:
        msg = f"`obs[{perturbation_key!r}]` must hold at least one perturbation; received only {rule.control_name!r}."
        raise ValueError(msg)
    moments = group_moments(matrix, np.asarray(labels.codes), len(labels.categories), method=method)
    sem = np.sqrt(moments.variance / moments.n_cells[:, None])
    row = labels.categories.get_loc(rule.control_name)
    rows = [labels.categories.get_loc(n) for n in names]
    return AnnData(
        moments.mean[rows] - moments.mean[row],
        obs=pd.DataFrame({"n_cells": moments.n_cells[rows]}, index=pd.Index(names, name=None)),
        var=pd.DataFrame({"control_mean": moments.mean[row], "control_sem": sem[row]}, index=adata.var_names.copy()),
        layers={"sem": np.hypot(sem[rows], sem[row])},
        uns={CONTROL_UNS_KEY: rule.control_name, "n_control_cells": int(moments.n_cells[row]), "method": method},
    )


def as_frame(effects: Effects, name: str) -> tuple[pd.DataFrame, bool]:
    """Return effects as a float64 DataFrame, and whether its rows and columns have names."""
    named = isinstance(effects, AnnData | pd.DataFrame)
    if isinstance(effects, AnnData):
        values = effects.X.toarray() if sp.issparse(effects.X) else np.asarray(effects.X)
        frame = pd.DataFrame(values, index=effects.obs_names, columns=effects.var_names)
    else:
        frame = effects if isinstance(effects, pd.DataFrame) else pd.DataFrame(np.atleast_2d(np.asarray(effects)))
    frame = frame.astype(np.float64)
    if frame.empty or not np.isfinite(frame.to_numpy()).all():
        what = "nothing" if frame.empty else "NaN or infinite values"
        msg = f"`{name}` must hold finite effects of shape (perturbations, genes); received {what}."
        raise ValueError(msg)
    return frame, named


def align_effects(real: Effects, predicted: Effects) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Bring two sets of effects into the order of the first.

    Parameters
    ----------
    real, predicted
        AnnData, DataFrame or array of shape ``(n_perturbations, n_genes)``. Named rows and columns are matched by
        name; an array is taken as it is and has to have the shape of the other one.

    Raises
    ------
    ValueError
        If names differ or occur twice, if shapes differ, or if a value is not finite.
    """
    (first, named), (second, also_named) = as_frame(real, "real"), as_frame(predicted, "predicted")
    if named and also_named:
        _check_same_names(first.index, second.index, "perturbations")
        _check_same_names(first.columns, second.columns, "genes")
        return first, second.loc[first.index, first.columns]
    if first.shape != second.shape:
        msg = f"`real` and `predicted` must have the same shape; received {first.shape} and {second.shape}."
        raise ValueError(msg)
    source = first if named else second
    names = {"index": source.index, "columns": source.columns}
    return pd.DataFrame(first.to_numpy(), **names), pd.DataFrame(second.to_numpy(), **names)


def _check_same_names(real: pd.Index, predicted: pd.Index, what: str) -> None:
    for index, name in ((real, "real"), (predicted, "predicted")):
        if not index.is_unique:
            doubled = preview(index[index.duplicated()].unique())
            msg = f"The {what} of `{name}` must be named uniquely; received {doubled} more than once."
            raise ValueError(msg)
    missing, extra = real.difference(predicted), predicted.difference(real)
    if len(missing) or len(extra):
        msg = (
            f"`real` and `predicted` must hold the same {what}; received {len(missing)} only in `real` "
            f"({preview(missing)}) and {len(extra)} only in `predicted` ({preview(extra)}): keep those in common."
        )
        raise ValueError(msg)
