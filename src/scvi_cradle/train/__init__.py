"""Training plans, and the training of many classifiers."""

from scvi_cradle.train._classifier_settings import ClassifierSettings
from scvi_cradle.train._classifiers import ClassifierFit, fit_classifiers, score
from scvi_cradle.train._discriminants import fit_discriminants
from scvi_cradle.train._plan import (
    ALIGN_WARMUP,
    KL_WARMUP,
    ContinuedTrainingPlan,
    PairedTrainingPlan,
    PerturbationTrainingPlan,
)
from scvi_cradle.train._runner import StepsRunner

__all__ = [
    "ALIGN_WARMUP",
    "KL_WARMUP",
    "ClassifierFit",
    "ClassifierSettings",
    "ContinuedTrainingPlan",
    "PairedTrainingPlan",
    "PerturbationTrainingPlan",
    "StepsRunner",
    "fit_classifiers",
    "fit_discriminants",
    "score",
]
