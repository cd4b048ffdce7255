"""Scores of predicted perturbation effects, always beside a baseline and a ceiling."""

from scvi_cradle.metrics._bounds import importance_weighted_bound, iwelbo_summary
from scvi_cradle.metrics._cell_eval import cell_eval_scores, to_cell_eval, write_cell_eval
from scvi_cradle.metrics._distances import energy_distance, mmd_multiscale, mmd_rbf
from scvi_cradle.metrics._divergences import bernoulli_kl, gaussian_kl
from scvi_cradle.metrics._effects import average_treatment_effects
from scvi_cradle.metrics._evaluate import evaluate
from scvi_cradle.metrics._evaluate_effects import evaluate_effects
from scvi_cradle.metrics._expression import (
    l2_of_means,
    published_r2_of_means,
    published_relative_rmse,
    r2_of_means,
    relative_rmse,
)
from scvi_cradle.metrics._latents import block_r2, mask_f1, mean_correlation_coefficient
from scvi_cradle.metrics._linear_probe import linear_probe
from scvi_cradle.metrics._pathways import pathway_accuracy
from scvi_cradle.metrics._qc import qc_pass_rate
from scvi_cradle.metrics._replicate import replicate_ceiling
from scvi_cradle.metrics._scores import (
    ate_pearson,
    ate_r2,
    jaccard_chance,
    jaccard_top_k,
    pearson_delta,
    perturbation_discrimination,
)
from scvi_cradle.metrics._separation import latent_separation, marker_score, probability_scores
from scvi_cradle.metrics._welch import kish_effective_size, weighted_welch

__all__ = [
    "ate_pearson",
    "ate_r2",
    "average_treatment_effects",
    "bernoulli_kl",
    "block_r2",
    "cell_eval_scores",
    "energy_distance",
    "evaluate",
    "evaluate_effects",
    "gaussian_kl",
    "importance_weighted_bound",
    "iwelbo_summary",
    "jaccard_chance",
    "jaccard_top_k",
    "kish_effective_size",
    "l2_of_means",
    "latent_separation",
    "linear_probe",
    "marker_score",
    "mask_f1",
    "mean_correlation_coefficient",
    "mmd_multiscale",
    "mmd_rbf",
    "pathway_accuracy",
    "pearson_delta",
    "perturbation_discrimination",
    "probability_scores",
    "published_r2_of_means",
    "published_relative_rmse",
    "qc_pass_rate",
    "r2_of_means",
    "relative_rmse",
    "replicate_ceiling",
    "to_cell_eval",
    "weighted_welch",
    "write_cell_eval",
]
