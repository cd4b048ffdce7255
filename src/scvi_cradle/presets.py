"""Settings of the models: what was measured to work (the defaults), the papers', and the published code's."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from scvi_cradle import _perturbedvae_settings as perturbedvae
from scvi_cradle._loop_settings import QUANTILE_PUBLISHED, QUANTILE_RECOMMENDED, TRAINING_QUANTILE
from scvi_cradle._validation import check_one_of, check_positive, check_probability

MIN_LATENT, MAX_LATENT = 50, 800
RECOMMENDED: dict[str, Any] = {
    "n_latent": None,  # `latent_size` of the data
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

ARTIFACT_SETTINGS = ("artifact_init_scale", "artifact_latent", "share_global_samples", "reconstruction_balance")


def _select(settings: dict[str, Any], *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the settings that do not belong to the artifact, to its counterfactual term, or to ``without``."""
    left_out = (*ARTIFACT_SETTINGS, *without)
    return {k: v for k, v in settings.items() if not k.startswith("cf_") and k not in left_out}


SAMS_RECOMMENDED: dict[str, Any] = _select(RECOMMENDED) | {
    "mask_prior": "bernoulli",
    "mask_beta": (1.0, 2.0),
    "mask_prob_posterior": "point",
    "prior_weight_per_cell": 0.0,
    "likelihood": "nb",
    "encode_combinations": "additive",
}
SAMS_PAPER: dict[str, Any] = SAMS_RECOMMENDED | {
    "n_latent": 100,
    "n_hidden": 400,
    "mask_prior_prob": 0.001,
    "posterior": "correlated",
    "embedding_init_scale": 1.0,
    "combine": "sum",
    "effect_path": "decoder",
    "draws": "batch",
    "n_particles": 5,
    "kl": "sampled",
    "output_bias": "random",
}
MASK_SETTINGS = (
    *("mask_prior", "mask_prior_prob", "mask_beta", "mask_prob_posterior", "mask_init_logits", "gs_temperature"),
    *("prior_weight_per_cell", "embedding_n_layers", "embedding_n_hidden"),
)
CPA_RECOMMENDED = _select(SAMS_RECOMMENDED, without=MASK_SETTINGS)
CPA_PAPER = _select(SAMS_PAPER, without=MASK_SETTINGS) | {"posterior": "correlated_basal"}
EFFECT_SETTINGS = (
    *("posterior", "embedding_prior_scale", "embedding_init_scale", "combine", "effect_path", "draws"),
    "encode_combinations",
)
CONDITIONAL_RECOMMENDED = _select(CPA_RECOMMENDED, without=EFFECT_SETTINGS) | {"n_latent": MIN_LATENT}
CONDITIONAL_PAPER = _select(CPA_PAPER, without=EFFECT_SETTINGS)
SVAE_RECOMMENDED = CONDITIONAL_RECOMMENDED | {
    "variant": "sams",
    "mask_beta": (1.0, 2.0),
    "mask_init_logits": 0.0,
    "embedding_init_scale": 0.1,
    "gs_temperature": 1.0,
    "draws": "cell",
    "encode_combinations": "unique",
}
SVAE_PAPER = SVAE_RECOMMENDED | CONDITIONAL_PAPER | {"draws": "batch"}
#: What ``variant="lopez"`` changes: the original's start, networks and closed-form divergence.
LOPEZ = MappingProxyType(
    {
        "mask_init_logits": 5.0,
        "embedding_init_scale": 1.0,
        "n_layers_encoder": 2,
        "n_layers_decoder": 2,
        "draws": "cell",
        "n_particles": 1,
        "kl": "analytic",
    }
)
TRAINING_LOPEZ = MappingProxyType({"n_epochs_kl_warmup": 50})
TRAINING_SAMS_PAPER: dict[str, Any] = TRAINING_PAPER | {"max_epochs": None, "max_steps": 150_000}


def _presets(**settings: tuple[dict[str, Any], dict[str, Any]]) -> Mapping[str, Any]:
    return MappingProxyType({k: (MappingProxyType(a), MappingProxyType(t)) for k, (a, t) in settings.items()})


#: Settings by preset: the constructor's and ``train``'s. Mappings are read-only; copy them to change them.
CRADLE_VAE = _presets(
    recommended=(RECOMMENDED, TRAINING_RECOMMENDED),
    paper=(PAPER, TRAINING_PAPER),
    published=(PUBLISHED, TRAINING_PAPER),
)
SAMS_VAE = _presets(recommended=(SAMS_RECOMMENDED, TRAINING_RECOMMENDED), paper=(SAMS_PAPER, TRAINING_SAMS_PAPER))
CPA_VAE = _presets(recommended=(CPA_RECOMMENDED, TRAINING_RECOMMENDED), paper=(CPA_PAPER, TRAINING_SAMS_PAPER))
CONDITIONAL_VAE = _presets(
    recommended=(CONDITIONAL_RECOMMENDED, TRAINING_RECOMMENDED), paper=(CONDITIONAL_PAPER, TRAINING_SAMS_PAPER)
)
SVAE_PLUS = _presets(recommended=(SVAE_RECOMMENDED, TRAINING_RECOMMENDED), paper=(SVAE_PAPER, TRAINING_SAMS_PAPER))
PERTURBED_VAE = _presets(
    recommended=(perturbedvae.RECOMMENDED, perturbedvae.TRAINING_RECOMMENDED),
    paper=(perturbedvae.PAPER, perturbedvae.TRAINING_PAPER),
)
QUANTILE_HURDLE = _presets(
    recommended=(QUANTILE_RECOMMENDED, TRAINING_QUANTILE),
    paper=(QUANTILE_PUBLISHED, TRAINING_QUANTILE),
    published=(QUANTILE_PUBLISHED, TRAINING_QUANTILE),
)
#: Presets by the name of the model.
MODELS = MappingProxyType(
    {
        "CradleVAE": CRADLE_VAE,
        "SAMSVAE": SAMS_VAE,
        "CPAVAE": CPA_VAE,
        "ConditionalVAE": CONDITIONAL_VAE,
        "SVAEPlus": SVAE_PLUS,
        "PerturbedVAE": PERTURBED_VAE,
        "QuantileHurdleAE": QUANTILE_HURDLE,
    }
)
#: What was published for data sets, on top of the preset ``"paper"``: CRADLE-VAE (appendix H), and SAMS-VAE with the
#: models it was compared with (appendix A.4 for norman and replogle; the sizes of CRADLE-VAE for the other two).
DATA_SETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        name: _presets(
            CradleVAE=({"n_latent": n_latent, "mask_prior_prob": prior, "cf_weight": cf_weight}, {"lr": lr}),
            SAMSVAE=({"n_latent": n_latent_sams, "mask_prior_prob": prior}, {"max_steps": max_steps}),
        )
        for name, n_latent, prior, cf_weight, lr, n_latent_sams, max_steps in (
            ("norman", 200, 0.01, 0.5, 3e-4, 200, 30_000),
            ("dixit", 200, 0.01, 0.5, 3e-4, 200, 30_000),
            ("replogle", 200, 0.001, 0.05, 1e-3, 100, 150_000),
            ("adamson", 100, 0.001, 0.1, 1e-4, 100, 150_000),
        )
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
    "mask_prior": ("bernoulli", "beta_bernoulli"),
    "mask_prob_posterior": ("point", "beta"),
    "likelihood": ("nb", "poisson", "gaussian"),
    "encode_combinations": ("additive", "unique"),
    "variant": ("sams", "lopez"),
    **perturbedvae.CHOICES,
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
    *perturbedvae.COUNTS,
)
POSITIVE = ("embedding_prior_scale", "embedding_init_scale", "artifact_init_scale", "gs_temperature")


def resolve(model: str, preset: str | None, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constructor's and the training settings of a preset, with what the user gave in place.

    Raises
    ------
    ValueError
        For an unknown preset.
    """
    name = preset or "recommended"
    check_one_of("preset", name, tuple(MODELS[model]))
    architecture, training = MODELS[model][name]
    return {**architecture, **{k: v for k, v in given.items() if k in architecture and v is not None}}, dict(training)


def latent_size(n_treatments: int, n_genes: int) -> int:
    """Return the latent size of the recommended settings: ``sqrt(n_treatments * n_genes)``, rounded down, within limits.

    Measured on simulated screens (``benchmarks/RESULTS.md``): with fewer dimensions masks close before treatments have
    found theirs, the sooner the more genes there are; 800 is the largest size that was tried.
    """
    return min(max(math.isqrt(n_treatments * n_genes), MIN_LATENT), MAX_LATENT)


def check(architecture: dict[str, Any], mask_prior_logit: float | None = None, **allowed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` for an argument of the constructor that cannot be; ``allowed`` narrows the choices."""
    for name, choices in (CHOICES | allowed).items():
        if name in architecture:
            check_one_of(name, architecture[name], choices)
    for name in COUNTS:
        if architecture.get(name) is not None:
            check_positive(name, architecture[name], integer=True)
    for name in POSITIVE:
        if name in architecture:
            check_positive(name, architecture[name])
    for name in ("cf_weight", "prior_weight_per_cell", *perturbedvae.WEIGHTS):
        if architecture.get(name) is not None:
            check_positive(name, architecture[name], allow_zero=True)
    if "mask_prior_prob" in architecture:
        check_probability("mask_prior_prob", architecture["mask_prior_prob"])
    _check_finite("mask_prior_logit", mask_prior_logit)
    _check_finite("mask_init_logits", architecture.get("mask_init_logits"))
    if "mask_beta" in architecture:
        _check_beta(architecture["mask_beta"])
    if architecture.get("prior_weight_per_cell") and architecture["mask_prior"] != "bernoulli":
        msg = f"`prior_weight_per_cell` weighs a Bernoulli prior; received mask_prior={architecture['mask_prior']!r}: leave it at 0."
        raise ValueError(msg)


def check_mask_prior(kind: str, given: dict[str, Any]) -> None:
    """Raise ``ValueError`` for an argument of the other prior of masks, and for a prior given twice.

    A whole preset may be given: what has no meaning may take its value there.
    """
    usual = [architecture for architecture, _ in SAMS_VAE.values()]
    unused = {
        "bernoulli": ("mask_beta", "mask_prob_posterior"),
        "beta_bernoulli": ("mask_prior_prob", "mask_prior_logit"),
    }
    for name in unused[kind]:
        if given.get(name) is not None and all(given[name] != settings.get(name) for settings in usual):
            msg = f"`{name}` has no meaning with mask_prior={kind!r}; received {given[name]!r}: leave it out."
            raise ValueError(msg)
    if given.get("mask_prior_prob") is not None and given.get("mask_prior_logit") is not None:
        msg = f"The prior of masks is given once; received mask_prior_prob={given['mask_prior_prob']!r} and mask_prior_logit={given['mask_prior_logit']!r}: leave one out."
        raise ValueError(msg)


def _check_finite(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        msg = f"`{name}` must be a finite number; received {value!r}."
        raise ValueError(msg)


def _check_beta(concentration: Any) -> None:
    try:
        values = [float(c) for c in concentration]
    except (TypeError, ValueError):
        values = []
    if len(values) != 2 or not all(math.isfinite(c) and c > 0 for c in values):
        msg = f"`mask_beta` must be two positive numbers (a, b) of the Beta prior; received {concentration!r}."
        raise ValueError(msg)


def prior_logit(architecture: dict[str, Any], mask_prior_logit: float | None) -> float:
    """Return the log-odds of a mask entry: the given ones, else those of ``mask_prior_prob``."""
    if mask_prior_logit is not None:
        return float(mask_prior_logit)
    probability = architecture["mask_prior_prob"]
    return math.log(probability) - math.log1p(-probability)
