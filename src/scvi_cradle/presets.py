"""Settings of the models: what was measured to work (the defaults), the papers', and the published code's."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

from scvi_cradle._validation import check_one_of, check_positive, check_probability, near_matches

RECOMMENDED: dict[str, Any] = {
    "n_latent": 50,
    "n_hidden": 128,
    "n_layers_encoder": 1,
    "n_layers_decoder": 1,
    "mask_prior_prob": 0.01,
    "embedding_prior_scale": 1.0,
    "posterior": "correlated_basal",
    "embedding_n_layers": 4,
    "embedding_n_hidden": 400,
    "embedding_init_scale": 0.1,
    "artifact_init_scale": 0.1,
    "mask_init_logits": 0.0,
    "gs_temperature": 1.0,
    "combine": "concat",
    "effect_path": "linear",
    "artifact_latent": "gaussian",
    "draws": "cell",
    "n_particles": 1,
    "kl": "analytic",
    "cf_weight": 0.05,
    "cf_reduction": "mean",
    "cf_direction": "reference_first",
    "cf_detach_reference": False,
    "cf_resample": False,
    "cf_n_samples": 50,
    "cf_statistic": "median",
    "share_global_samples": True,
    "reconstruction_balance": "none",
    "output_bias": "data",
}
PAPER: dict[str, Any] = RECOMMENDED | {
    "n_latent": 200,
    "n_hidden": 400,
    "n_layers_decoder": 2,
    "posterior": "correlated",
    "embedding_init_scale": 1.0,
    "artifact_init_scale": 1.0,
    "effect_path": "decoder",
    "draws": "batch",
    "n_particles": 5,
    "kl": "sampled",
    "cf_weight": 0.5,
    "output_bias": "random",
}
PUBLISHED: dict[str, Any] = PAPER | {
    "cf_reduction": "sum",
    "share_global_samples": False,
    "reconstruction_balance": "batch",
}
TRAINING_RECOMMENDED: dict[str, Any] = {
    "batch_size": 128,
    "lr": 3e-3,
    "weight_decay": 1e-6,
    "gradient_clip_val": 100.0,
    "lr_schedule": "cosine",
    "effect_lr_scale": 5.0,
    "max_epochs": None,
}
TRAINING_PAPER: dict[str, Any] = TRAINING_RECOMMENDED | {
    "batch_size": 512,
    "lr": 3e-4,
    "lr_schedule": "constant",
    "effect_lr_scale": 1.0,
    "max_epochs": 2000,
}

#: Settings by preset: the constructor's and ``train``'s. Mappings are read-only; copy them to change them.
CRADLE_VAE = MappingProxyType(
    {
        "recommended": (MappingProxyType(RECOMMENDED), MappingProxyType(TRAINING_RECOMMENDED)),
        "paper": (MappingProxyType(PAPER), MappingProxyType(TRAINING_PAPER)),
        "published": (MappingProxyType(PUBLISHED), MappingProxyType(TRAINING_PAPER)),
    }
)


CHOICES = {
    "posterior": ("correlated", "correlated_basal", "correlated_embedding", "mean_field"),
    "combine": ("concat", "sum"),
    "effect_path": ("linear", "decoder", "both"),
    "artifact_latent": ("gaussian", "embedding"),
    "draws": ("cell", "batch"),
    "kl": ("analytic", "sampled"),
    "cf_reduction": ("mean", "sum"),
    "cf_direction": ("reference_first", "counterfactual_first"),
    "cf_statistic": ("median", "mean"),
    "reconstruction_balance": ("none", "batch", "dataset"),
    "output_bias": ("data", "random"),
}
COUNTS = (
    "n_latent",
    "n_hidden",
    "n_layers_encoder",
    "n_layers_decoder",
    "embedding_n_layers",
    "embedding_n_hidden",
    "n_particles",
    "cf_n_samples",
)
POSITIVE = ("embedding_prior_scale", "embedding_init_scale", "artifact_init_scale", "gs_temperature")


def resolve(preset: str | None, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constructor's and the training settings of a preset, with what the user gave in place.

    Raises
    ------
    ValueError
        For an unknown preset.
    TypeError
        For an unknown argument; the message names near matches.
    """
    name = preset or "recommended"
    check_one_of("preset", name, tuple(CRADLE_VAE))
    architecture, training = CRADLE_VAE[name]
    unknown = [key for key in given if key not in architecture]
    if unknown:
        msg = f"The constructor takes no argument {unknown[0]!r}{near_matches(unknown[0], architecture)}."
        raise TypeError(msg)
    return {**architecture, **{k: v for k, v in given.items() if v is not None}}, dict(training)


def check(architecture: dict[str, Any], mask_prior_logit: float | None = None) -> None:
    """Raise ``ValueError`` for an argument of the constructor that cannot be."""
    for name, allowed in CHOICES.items():
        check_one_of(name, architecture[name], allowed)
    for name in COUNTS:
        check_positive(name, architecture[name], integer=True)
    for name in POSITIVE:
        check_positive(name, architecture[name])
    check_positive("cf_weight", architecture["cf_weight"], allow_zero=True)
    check_probability("mask_prior_prob", architecture["mask_prior_prob"])
    if mask_prior_logit is not None and not math.isfinite(mask_prior_logit):
        msg = f"`mask_prior_logit` must be finite; received {mask_prior_logit!r}."
        raise ValueError(msg)
