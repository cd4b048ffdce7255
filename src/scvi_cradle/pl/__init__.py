"""Figures, with scanpy's habits: ``ax=``, ``show=`` and ``save=``."""

from scvi_cradle.pl._causal_graph import causal_graph
from scvi_cradle.pl._effects import evaluation, treatment_effects
from scvi_cradle.pl._latent import latent
from scvi_cradle.pl._mask import mask
from scvi_cradle.pl._qc import qc_thresholds, qc_violin
from scvi_cradle.pl._training import training_history

__all__ = [
    "causal_graph",
    "evaluation",
    "latent",
    "mask",
    "qc_thresholds",
    "qc_violin",
    "training_history",
    "treatment_effects",
]
