"""Figures, with scanpy's habits: ``ax=``, ``show=`` and ``save=``."""

from scvi_cradle.pl._causal_graph import causal_graph
from scvi_cradle.pl._effects import evaluation, treatment_effects
from scvi_cradle.pl._latent import latent
from scvi_cradle.pl._mask import mask
from scvi_cradle.pl._probability import perturbation_probability, probability_by_guides, probability_calibration
from scvi_cradle.pl._qc import qc_thresholds, qc_violin
from scvi_cradle.pl._quantile_qq import quantile_qq
from scvi_cradle.pl._training import training_history

__all__ = [
    "causal_graph",
    "evaluation",
    "latent",
    "mask",
    "perturbation_probability",
    "probability_by_guides",
    "probability_calibration",
    "qc_thresholds",
    "qc_violin",
    "quantile_qq",
    "training_history",
    "treatment_effects",
]
