"""Scores of predicted perturbation effects, always beside a baseline and a ceiling."""

from scvi_cradle.metrics._divergences import bernoulli_kl, gaussian_kl
from scvi_cradle.metrics._effects import average_treatment_effects
from scvi_cradle.metrics._evaluate import evaluate
from scvi_cradle.metrics._latents import block_r2, mask_f1, mean_correlation_coefficient
from scvi_cradle.metrics._pathways import pathway_accuracy
from scvi_cradle.metrics._qc import qc_pass_rate
from scvi_cradle.metrics._replicate import replicate_ceiling
from scvi_cradle.metrics._scores import ate_pearson, ate_r2, jaccard_top_k, pearson_delta, perturbation_discrimination

__all__ = [
    "ate_pearson",
    "ate_r2",
    "average_treatment_effects",
    "bernoulli_kl",
    "block_r2",
    "evaluate",
    "gaussian_kl",
    "jaccard_top_k",
    "mask_f1",
    "mean_correlation_coefficient",
    "pathway_accuracy",
    "pearson_delta",
    "perturbation_discrimination",
    "qc_pass_rate",
    "replicate_ceiling",
]
