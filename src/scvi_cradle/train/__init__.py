"""Training plans."""

from scvi_cradle.train._plan import ALIGN_WARMUP, KL_WARMUP, PairedTrainingPlan, PerturbationTrainingPlan

__all__ = ["ALIGN_WARMUP", "KL_WARMUP", "PairedTrainingPlan", "PerturbationTrainingPlan"]
