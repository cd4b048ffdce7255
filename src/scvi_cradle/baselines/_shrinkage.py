"""Effects shrunk as far as their sampling error asks for."""

from __future__ import annotations

import numpy as np

from scvi_cradle.baselines._base import SumOfSingles, raw_arrays


class ShrunkenEffects(SumOfSingles):
    r"""Predict training effects shrunk by empirical Bayes; unseen combinations get the sum of shrunken single effects.

    With :math:`r_{tg}` the raw effect, :math:`V_{tg}` its sampling variance (difference of two means) and
    :math:`S_t = \max(0, \overline{r_{tg}^2 - V_{tg}})`, the mean over genes, the estimate is
    :math:`r_{tg} S_t / (S_t + V_{tg})`: the posterior mean under :math:`N(0, S_t)`.
    A strong baseline for seen perturbations, and the one that a model has to beat first.
    """

    def _label_effects(self) -> np.ndarray:
        raw, sem = raw_arrays(self._raw)
        return shrink_effects(raw, sem**2)


def shrink_effects(raw: np.ndarray, variance: np.ndarray) -> np.ndarray:
    r"""Shrink effects towards zero by empirical Bayes.

    Parameters
    ----------
    raw
        Effects :math:`r`, shape ``(n_labels, n_genes)``.
    variance
        Their sampling variances :math:`V`, same shape; infinite where unknown.

    Returns
    -------
    :math:`r S / (S + V)` with :math:`S = \max(0, \overline{r^2 - V})` per row: ``raw`` where ``variance`` is 0, zero
    where a row does not vary more than its sampling error.
    """
    excess = np.maximum((raw**2 - variance).mean(axis=1, keepdims=True), 0.0)  # (n_labels, 1)
    total = excess + variance
    return raw * np.divide(excess, total, out=np.zeros_like(total), where=excess > 0)
