"""Simulated and published Perturb-seq data sets."""

from scvi_cradle.datasets._simulate_perturbseq import simulate_perturbseq

__all__ = ["simulate_perturbseq"]
