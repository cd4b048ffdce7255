"""Scores of cells, by either kind of classifier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scvi_cradle._loop_settings import LoopSettings
from scvi_cradle.train import ClassifierFit, ClassifierSettings, fit_classifiers, fit_discriminants


def fit_scores(
    z: np.ndarray,
    unlabeled: Sequence[np.ndarray],
    negative: Sequence[np.ndarray],
    is_train: np.ndarray,
    chosen: LoopSettings,
    *,
    groups: Sequence[np.ndarray] | None = None,
    seed: int,
) -> ClassifierFit:
    """Fit the classifiers that the settings name (see :func:`scvi_cradle.train.fit_classifiers`)."""
    settings = ClassifierSettings(**chosen.classifier)
    if chosen.scores == "nnnu":
        return fit_classifiers(z, unlabeled, negative, is_train, settings, groups=groups, seed=seed)
    return fit_discriminants(z, unlabeled, negative, n_folds=settings.n_folds, groups=groups, seed=seed)
