"""Settings of the perturbation-probability loop: what was measured to work, and what was published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from scvi_cradle._validation import check_one_of, check_positive, check_probability

QUANTILE_LEVELS = tuple(float(q) for q in np.linspace(0.001, 0.999, 44))
FULL_HEAD_GENES, QUANTILE_RANK = 1_000, 64

QUANTILE_RECOMMENDED: dict[str, Any] = {
    "n_latent": 50,
    "n_hidden": 512,
    "n_layers": 2,
    "quantiles": QUANTILE_LEVELS,
    "quantile_rank": None,  # the full head up to 1,000 genes, else 64
    "hurdle_weight": 0.5,
    "latent_l2": 1e-5,
    "quant_normalization": "all",
    "magnitude_transform": None,
    "monotone": "cumsum",
    "reconstruction": "quantile-hurdle",
}
QUANTILE_PUBLISHED = QUANTILE_RECOMMENDED | {"quantile_rank": 0}
TRAINING_QUANTILE: dict[str, Any] = {
    "batch_size": 256,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "gradient_clip_val": None,
    "lr_schedule": "constant",
    "effect_lr_scale": 1.0,
    "max_epochs": None,
    "max_steps": 500,
}


@dataclass(frozen=True)
class LoopSettings:
    """Settings of ``QuantileHurdleAE.fit_perturbation_loop`` (see there).

    Parameters
    ----------
    n_outer, max_steps
        Rounds, and optimiser steps of the autoencoder in each.
    feature_weights
        Weight of selected genes in the first round, its factor per round and its upper bound.
    guide_scales
        Weight of the guide prior in the classifier rounds; the last one holds for all later rounds.
    scores
        ``"discriminant"`` or ``"nnnu"``.
    gamma
        Power of the probability as weight of a cell in tests.
    control_weights
        Weights of controls in tests: ``"score"`` or ``"equal"``.
    variance_floor
        Whether tests of sparse genes take the variance of controls where that of perturbed cells is smaller.
    folds
        What out-of-fold scores leave out: ``"cells"`` or ``"guides"``.
    fdr_level, max_genes
        Level of Bonferroni's correction, and genes that a category may select.
    oversample, oversample_min_genes
        Sampling weight of the cells of categories with at least so many significant genes.
    min_gap
        Least difference of top halves that keeps a category.
    classifier
        What differs from the defaults of :class:`scvi_cradle.train.ClassifierSettings`.
    """

    n_outer: int = 3
    max_steps: int = 500
    feature_weights: tuple[float, float, float] = (1e2, 10.0, 1e4)
    guide_scales: tuple[float, ...] = (0.5,)
    scores: str = "discriminant"
    gamma: float = 1.0
    control_weights: str = "score"
    variance_floor: bool = True
    folds: str = "cells"
    fdr_level: float = 0.05
    max_genes: int = 100
    oversample: float = 10.0
    oversample_min_genes: int = 10
    min_gap: float = 0.15
    classifier: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ``ValueError`` for a setting that cannot be."""
        for name in ("n_outer", "max_steps", "max_genes", "oversample_min_genes"):
            check_positive(name, getattr(self, name), integer=True)
        for name in ("gamma", "oversample"):
            check_positive(name, getattr(self, name))
        check_positive("min_gap", self.min_gap, allow_zero=True)
        check_probability("fdr_level", self.fdr_level)
        check_one_of("variance_floor", self.variance_floor, (True, False))
        check_one_of("scores", self.scores, ("discriminant", "nnnu"))
        check_one_of("control_weights", self.control_weights, ("score", "equal"))
        check_one_of("folds", self.folds, ("cells", "guides"))
        weights = _as_tuple(self.feature_weights)
        if len(weights) != 3 or not all(
            isinstance(w, int | float | np.number) and np.isfinite(w) and w >= 1 for w in weights
        ):
            msg = f"`feature_weights` must be three numbers from 1 on: the first weight, its factor per round, its bound; received {self.feature_weights!r}."
            raise ValueError(msg)
        scales = _as_tuple(self.guide_scales)
        if not scales or not all(isinstance(s, int | float | np.number) and np.isfinite(s) and s >= 0 for s in scales):
            msg = f"`guide_scales` must be non-negative numbers, one per classifier round; received {self.guide_scales!r}."
            raise ValueError(msg)

    def feature_weight(self, round_: int) -> float:
        """Return the weight of selected genes in a round, counted from 0."""
        first, factor, bound = self.feature_weights
        return min(first * factor**round_, bound)

    def guide_scale(self, round_: int) -> float:
        """Return the weight of the guide prior in a round; the first one, 0, has the prior alone."""
        return 1.0 if round_ == 0 else self.guide_scales[min(round_ - 1, len(self.guide_scales) - 1)]

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list | np.ndarray) else ()


def plain(value: Any) -> Any:
    """Return nested settings as plain values: dictionaries, lists, numbers and text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list | np.ndarray):
        return [plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


LOOP: Mapping[str, LoopSettings] = MappingProxyType(
    {
        "recommended": LoopSettings(),
        "published": LoopSettings(
            n_outer=6,
            guide_scales=(0.5, 0.0),
            scores="nnnu",
            control_weights="equal",
            variance_floor=False,
            classifier={"lr": 1e-4, "patience": None},
        ),
    }
)


def loop_settings(preset: str, **given: Any) -> LoopSettings:
    """Return the settings of a preset with what the user gave in place, checked."""
    check_one_of("preset", preset, tuple(LOOP))
    chosen = {name: value for name, value in given.items() if value is not None}
    if "classifier" in chosen:
        chosen["classifier"] = {**LOOP[preset].classifier, **chosen["classifier"]}
    settings = replace(LOOP[preset], **chosen)
    settings.check()
    return settings
