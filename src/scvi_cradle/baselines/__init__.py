"""Predictions without a model: what every model has to be compared with."""

from scvi_cradle.baselines._mean import Additive, ControlMean, PerturbedMean
from scvi_cradle.baselines._multivariate import MultivariateShrinkage
from scvi_cradle.baselines._regression import ElasticNet, NearestNeighbors
from scvi_cradle.baselines._shrinkage import ShrunkenEffects

__all__ = [
    "Additive",
    "ControlMean",
    "ElasticNet",
    "MultivariateShrinkage",
    "NearestNeighbors",
    "PerturbedMean",
    "ShrunkenEffects",
]
