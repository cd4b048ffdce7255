"""Simulated and published Perturb-seq data sets."""

from scvi_cradle.datasets._simulate_perturbseq import simulate_perturbseq
from scvi_cradle.datasets._simulate_sams import simulate_sams
from scvi_cradle.datasets._simulate_svae import simulate_svae

__all__ = ["simulate_perturbseq", "simulate_sams", "simulate_svae"]
