"""Simulated and published Perturb-seq data sets."""

from scvi_cradle.datasets._prepare import prepare_dixit, prepare_norman, prepare_replogle, prepare_santinha
from scvi_cradle.datasets._published import adamson, dixit, norman, papalexi, replogle, santinha
from scvi_cradle.datasets._simulate_perturbseq import simulate_perturbseq
from scvi_cradle.datasets._simulate_sams import simulate_sams
from scvi_cradle.datasets._simulate_scm import simulate_scm
from scvi_cradle.datasets._simulate_svae import simulate_svae

__all__ = [
    "adamson",
    "dixit",
    "norman",
    "papalexi",
    "prepare_dixit",
    "prepare_norman",
    "prepare_replogle",
    "prepare_santinha",
    "replogle",
    "santinha",
    "simulate_perturbseq",
    "simulate_sams",
    "simulate_scm",
    "simulate_svae",
]
