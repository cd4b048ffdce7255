"""Summaries of importance-weighted bounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import logsumexp

ALL = "all"


def importance_weighted_bound(log_weights: ArrayLike) -> np.ndarray:
    r"""Return :math:`\log \frac1K \sum_k w_k` of every cell from its log importance weights.

    Parameters
    ----------
    log_weights
        :math:`\log p(x, z_k) - \log q(z_k)`, shape ``(n_particles, n_cells)``, in nats. ``-inf`` is a weight of 0.

    Returns
    -------
    Shape ``(n_cells,)``.

    Raises
    ------
    ValueError
        For NaN, ``+inf``, another shape, or a cell whose weights are all 0.

    References
    ----------
    Burda et al. 2016; SAMS-VAE, eq. 7 and the per-cell form of its evaluation.
    """
    values = np.asarray(log_weights, dtype=np.float64)
    if values.ndim != 2 or not values.size or np.isnan(values).any() or np.isposinf(values).any():
        msg = f"`log_weights` must hold numbers below infinity of shape (n_particles, n_cells); received shape {values.shape}"
        msg += "." if values.ndim != 2 or not values.size else " with NaN or infinite values."
        raise ValueError(msg)
    if np.isneginf(values).all(axis=0).any():
        msg = "Every cell must have a particle of positive weight; received a cell whose log weights are all -inf."
        raise ValueError(msg)
    return np.asarray(logsumexp(values, axis=0) - np.log(len(values)))


def iwelbo_summary(bounds: ArrayLike, groups: Sequence[str] | pd.Series | None = None) -> pd.DataFrame:
    """Summarise bounds of cells by group.

    Parameters
    ----------
    bounds
        ``model.get_iwelbo(...)``, shape ``(n_cells,)``, in nats per cell.
    groups
        Group of every cell, e.g. its perturbation or batch.

    Returns
    -------
    Rows: groups, sorted, then ``"all"``. Columns: ``mean``, ``sem`` (standard error over cells; 0 for one cell),
    ``n_cells``. Bounds can be compared only for the same cells, genes, likelihood, number of particles and treatment of
    the shared latent variables.

    Raises
    ------
    ValueError
        For NaN or infinite bounds, no cell, another number of groups, a cell without a group, or a group of the name
        ``"all"``.
    """
    values = np.asarray(bounds, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        msg = f"`bounds` must hold one finite number for every cell; received shape {values.shape}"
        msg += " with NaN or infinite values." if values.ndim == 1 and len(values) else "."
        raise ValueError(msg)
    names = np.full(len(values), "") if groups is None else _names(groups, len(values))
    parts = {} if groups is None else {name: values[names == name] for name in sorted(set(names))}
    rows = {name: _row(part) for name, part in (parts | {ALL: values}).items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "sem", "n_cells"]).astype({"n_cells": int})


def _names(groups: Sequence[str] | pd.Series, n_cells: int) -> np.ndarray:
    """Return the group of every cell as text."""
    given = np.asarray(groups, dtype=object)
    if given.shape != (n_cells,):
        msg = f"`groups` must hold one name for every cell, {n_cells} of them; received shape {given.shape}."
        raise ValueError(msg)
    if pd.isna(given).any():
        msg = f"`groups` must name the group of every cell; received {int(pd.isna(given).sum())} missing names: leave these cells out or name their group."
        raise ValueError(msg)
    names = given.astype(str)
    if (names == ALL).any():
        msg = f"`groups` must not hold {ALL!r}, the name of the row of all cells; received it for {int((names == ALL).sum())} cells: rename the group."
        raise ValueError(msg)
    return names


def _row(values: np.ndarray) -> list[float]:
    n = len(values)
    return [float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0, n]
