"""Settings of PerturbedVAE, and the checks of its arguments."""

from __future__ import annotations

import math
from typing import Any

from scvi_cradle._validation import check_positive

RESPONSIVE_SHARE = 0.19
PAPER: dict[str, Any] = {
    "n_latent_responsive": 20,
    "n_latent_invariant": 85,
    "n_hidden": 256,
    "n_layers": 2,
    "mechanism": "mlp",
    "noise_scale": "learned",
    "lambda_bound": None,
    "noise_encoder": "mlp",
    "likelihood": "mse",
    "output_activation": "identity",
    "output_variance": "learned",
    "alignment": "l2",
    "alignment_weight": None,  # 0.05; see `PerturbedVAE`
    "align_stop_grad": None,
    "kl_weight_responsive": 1e-2,
    "kl_weight_invariant": 1e-2,
    "n_epochs_kl_warmup": None,  # from 10 % to 50 % of the epochs: (10, 50) of 100
    "n_epochs_align_warmup": None,  # from 5 % to 50 %: (5, 50) of 100
    "control_cells": "included",
    "control_pairing": "random",
    "sample_latents": True,
}
RECOMMENDED: dict[str, Any] = PAPER | {
    "alignment": None,  # "l2" with shared partners, else "none"
    "kl_weight_responsive": None,  # those of a Gaussian bound; see `PerturbedVAE`
    "kl_weight_invariant": None,
}
TRAINING_PAPER: dict[str, Any] = {
    "batch_size": 64,
    "lr": 1e-4,
    "weight_decay": 0.0,
    "gradient_clip_val": None,
    "lr_schedule": "constant",
    "effect_lr_scale": 1.0,
    "max_epochs": 100,
}
TRAINING_RECOMMENDED: dict[str, Any] = TRAINING_PAPER | {
    "lr": 1e-3,
    "gradient_clip_val": 100.0,
    "lr_schedule": "cosine",
    "effect_lr_scale": 5.0,
}
CHOICES: dict[str, tuple[str | None, ...]] = {
    "mechanism": ("mlp", "linear"),
    "noise_scale": ("learned", "fixed"),
    "lambda_bound": ("tanh", None),
    "noise_encoder": ("mlp", "linear"),
    "output_activation": ("identity", "softplus", "leaky_relu"),
    "control_cells": ("included", "partners"),
    "alignment": ("l2", "mmd", "none", None),
    "align_stop_grad": ("control", None),
}
COUNTS = ("n_latent_responsive", "n_latent_invariant", "n_layers")
WEIGHTS = ("alignment_weight", "kl_weight_responsive", "kl_weight_invariant")


def split_latent(
    n_latent: int | None, n_responsive: int | None, n_invariant: int | None, preset: dict[str, Any]
) -> dict[str, int]:
    """Return the sizes of PerturbedVAE's blocks: those given, those of the preset, or 19 % and 81 % of a total.

    Raises
    ------
    ValueError
        If the total is given beside a block, or does not leave a variable for either block.
    """
    if n_latent is None:
        return {name: preset[name] for name in ("n_latent_responsive", "n_latent_invariant")}
    check_positive("n_latent", n_latent, integer=True)
    if n_responsive is not None or n_invariant is not None or n_latent < 2:
        msg = f"`n_latent` is the total, at least 2, of both blocks and is given instead of them; received n_latent={n_latent}, n_latent_responsive={n_responsive}, n_latent_invariant={n_invariant}."
        raise ValueError(msg)
    responsive = max(1, round(RESPONSIVE_SHARE * n_latent))
    return {"n_latent_responsive": responsive, "n_latent_invariant": n_latent - responsive}


def check_output(likelihood: str, activation: str, variance: Any) -> None:
    """Raise ``ValueError`` for an activation or a variance of PerturbedVAE's output that the likelihood does not have."""
    if likelihood == "nb" and activation != "identity":
        msg = f"`output_activation` is one of values, while the output of likelihood='nb' are shares of genes; received {activation!r}: leave it out, or take likelihood='mse' or 'gaussian'."
        raise ValueError(msg)
    if isinstance(variance, str):
        if variance == "learned":
            return
        msg = f"`output_variance` must be 'learned' or a positive number; received {variance!r}."
        raise ValueError(msg)
    check_positive("output_variance", variance)
    if likelihood != "gaussian":
        msg = f"`output_variance` is that of likelihood='gaussian'; received {variance!r} with likelihood={likelihood!r}: leave one of them out."
        raise ValueError(msg)


def check_warmup(name: str, epochs: Any) -> None:
    """Raise ``ValueError`` unless a warm-up is None or a start and an end in epochs."""
    if epochs is None:
        return
    try:
        start, end = (float(e) for e in epochs)
    except (TypeError, ValueError):
        start, end = math.nan, math.nan
    if not (math.isfinite(end) and 0 <= start <= end):
        msg = f"`{name}` must be the first and the last epoch of a warm-up, (start, end) with 0 <= start <= end; received {epochs!r}."
        raise ValueError(msg)
