"""Baselines that know nothing about, or just add up, single effects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scvi_cradle.baselines._base import EffectBaseline, SumOfSingles, raw_arrays


class ControlMean(EffectBaseline):
    """Predict that nothing happens: all effects are 0 and generated cells are training controls, drawn again."""

    def _effects(self, labels: Sequence[str], members: Sequence[tuple[int, ...]]) -> np.ndarray:
        return np.zeros((len(labels), self._raw.n_vars))


class PerturbedMean(EffectBaseline):
    """Predict the mean effect of the training perturbations for every perturbation; each counts once.

    The baseline of :func:`scvi_cradle.metrics.evaluate`: it knows what all perturbations have in common and nothing
    about any of them.
    """

    def _effects(self, labels: Sequence[str], members: Sequence[tuple[int, ...]]) -> np.ndarray:
        mean = raw_arrays(self._raw)[0].mean(axis=0)
        return np.stack([mean if parts else np.zeros_like(mean) for parts in members])


class Additive(SumOfSingles):
    """Predict raw training effects: a seen label has its own, an unseen combination the sum of its single effects."""

    def _label_effects(self) -> np.ndarray:
        return raw_arrays(self._raw)[0]
