"""Association of QC failure with perturbations: when it is strong, the "artifact" is biology. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Sequence


def association_table(
    labels: pd.Categorical,
    flags: np.ndarray,
    control_name: str,
    criteria: pd.DataFrame | None = None,
    batches: Sequence[object] | np.ndarray | None = None,
) -> pd.DataFrame:
    """Test for every perturbation whether its cells fail QC more or less often than controls.

    Parameters
    ----------
    labels
        Canonical label of every cell, shape ``(n_cells,)``.
    flags
        True for failed cells, shape ``(n_cells,)``.
    control_name
        Label of controls.
    criteria
        Boolean columns, one per criterion, for ``main_criterion``.
    batches
        Batch of every cell. Without: Fisher's exact test, two-sided. With: the Cochran-Mantel-Haenszel test over
        batches (chi-squared, 1 degree of freedom, no continuity correction), the Mantel-Haenszel odds ratio, and
        control rates weighted by the perturbation's cells per batch; a batch without controls tells nothing.

    Returns
    -------
    Indexed by perturbation (without the control): ``n_cells, fail_rate, control_fail_rate, odds_ratio, pvalue, qvalue``
    (Benjamini-Hochberg), ``main_criterion`` (largest excess over the control; empty if there is none) and
    ``confounded``: qvalue < 0.05, odds ratio > 2 and a failure rate more than 0.1 above the control's.
    Where a cell of the pooled table is empty, 0.5 is added to all (Haldane-Anscombe), so the odds ratio is finite.
    """
    names = labels.categories.astype(str).to_numpy(dtype=object)
    strata = np.zeros(len(labels), dtype=np.int64)
    if batches is not None:
        strata = np.unique(np.asarray(batches, dtype=str), return_inverse=True)[1].ravel()
    counts = _CellCounts(np.asarray(labels.codes), strata, names == control_name)
    failed, control_failed = counts.of(flags)
    rate, control_rate = counts.rates(flags)
    if batches is None:
        odds_ratio, pvalue = _fisher(failed[:, 0], counts.n[:, 0], control_failed[0], counts.n_control[0])
    else:
        odds_ratio, pvalue = _mantel_haenszel(failed, counts.n, control_failed, counts.n_control)
    qvalue = stats.false_discovery_control(pvalue) if len(pvalue) else pvalue
    table = {
        "n_cells": counts.n.sum(axis=1).astype(np.int64),
        "fail_rate": rate,
        "control_fail_rate": control_rate,
        "odds_ratio": odds_ratio,
        "pvalue": pvalue,
        "qvalue": qvalue,
        "main_criterion": _main_criterion(counts, criteria),
        "confounded": (qvalue < 0.05) & (rate - control_rate > 0.1) & (odds_ratio > 2),
    }
    return pd.DataFrame(table, index=pd.Index(names[counts.rows], name="perturbation"))


class _CellCounts:
    """Cells per label and stratum, labels without cells and the control left out."""

    def __init__(self, codes: np.ndarray, strata: np.ndarray, is_control: np.ndarray) -> None:
        self._shape = (len(is_control), int(strata.max(initial=0)) + 1)
        self._position = codes * self._shape[1] + strata
        total = self._count(np.ones(len(codes)))
        if not total[is_control].sum():
            msg = "At least one cell must be a control; received none: pass `control=`."
            raise ValueError(msg)
        self._control = is_control
        self.rows = np.flatnonzero(~is_control & (total.sum(axis=1) > 0))
        self.n, self.n_control = total[self.rows], total[is_control][0]

    def _count(self, weights: np.ndarray) -> np.ndarray:
        size = self._shape[0] * self._shape[1]
        return np.bincount(self._position, weights=weights, minlength=size).reshape(self._shape)

    def of(self, flags: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return flagged cells of the perturbations ``(n_labels, n_strata)`` and of the control ``(n_strata,)``."""
        flagged = self._count(np.asarray(flags, dtype=np.float64))
        return flagged[self.rows], flagged[self._control][0]

    def rates(self, flags: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the flagged share of every perturbation and of the control at the perturbation's strata."""
        flagged, control = self.of(flags)
        weights = self.n * (self.n_control > 0)
        with np.errstate(invalid="ignore"):
            expected = (weights * (control / np.maximum(self.n_control, 1))).sum(axis=1) / weights.sum(axis=1)
        return flagged.sum(axis=1) / self.n.sum(axis=1), expected


def _fisher(a: np.ndarray, n: np.ndarray, c: float, k: float) -> tuple[np.ndarray, np.ndarray]:
    known: dict[tuple[int, int], float] = {}
    for cell in zip(a.astype(int).tolist(), n.astype(int).tolist(), strict=True):
        if cell not in known:
            failed, total = cell
            known[cell] = float(stats.fisher_exact([[failed, total - failed], [int(c), int(k - c)]])[1])
    pvalue = np.array([known[int(x), int(y)] for x, y in zip(a, n, strict=True)])
    return _odds_ratio(a, n - a, np.full_like(a, c), np.full_like(a, k - c)), pvalue


def _odds_ratio(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    shift = 0.5 * (np.minimum.reduce([a, b, c, d]) == 0)
    return (a + shift) * (d + shift) / ((b + shift) * (c + shift))


def _mantel_haenszel(a: np.ndarray, n: np.ndarray, c: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total, failed, both = n + k, a + c, (n > 0) & (k > 0)
    safe = np.maximum(total, 2)
    excess = np.where(both, a - n * failed / safe, 0.0).sum(axis=1)
    variance = np.where(both, n * k * failed * (total - failed) / (safe**2 * (safe - 1)), 0.0).sum(axis=1)
    statistic = np.divide(excess**2, variance, out=np.zeros(len(a)), where=variance > 0)
    over = np.where(both, a * (k - c) / safe, 0.0).sum(axis=1)
    under = np.where(both, (n - a) * c / safe, 0.0).sum(axis=1)
    pooled = [np.where(both, x, 0.0).sum(axis=1) for x in (a, n - a, c * np.ones_like(a), (k - c) * np.ones_like(a))]
    plain = (over > 0) & (under > 0)
    return np.where(plain, over / np.where(plain, under, 1.0), _odds_ratio(*pooled)), stats.chi2.sf(statistic, 1)


def _main_criterion(counts: _CellCounts, criteria: pd.DataFrame | None) -> list[str]:
    if criteria is None or criteria.empty:
        return [""] * len(counts.rows)
    rates = [counts.rates(criteria[c]) for c in criteria.columns]
    excess = np.nan_to_num(np.column_stack([rate - control for rate, control in rates]))
    best = excess.argmax(axis=1) if len(excess) else np.zeros(0, dtype=np.int64)
    return [str(criteria.columns[j]) if excess[i, j] > 0 else "" for i, j in enumerate(best)]
