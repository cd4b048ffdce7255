"""Training plan."""

from scvi_cradle.train._plan import PerturbationTrainingPlan

__all__ = ["PerturbationTrainingPlan"]
