"""Training plans."""

from scvi_cradle.train._plan import PairedTrainingPlan, PerturbationTrainingPlan

__all__ = ["PairedTrainingPlan", "PerturbationTrainingPlan"]
