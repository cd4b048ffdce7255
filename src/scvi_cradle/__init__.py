"""Models of CRISPR screens with single-cell readout (Perturb-seq), built on scvi-tools."""

from importlib.metadata import PackageNotFoundError, version

from scvi_cradle import baselines, benchmark, dataloaders, datasets, metrics, model, module, pl, pp, presets
from scvi_cradle.model import CPAVAE, SAMSVAE, ConditionalVAE, CradleVAE, PerturbedVAE, QuantileHurdleAE, SVAEPlus

try:
    __version__ = version("scvi-cradle")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "CPAVAE",
    "SAMSVAE",
    "ConditionalVAE",
    "CradleVAE",
    "PerturbedVAE",
    "QuantileHurdleAE",
    "SVAEPlus",
    "__version__",
    "baselines",
    "benchmark",
    "dataloaders",
    "datasets",
    "metrics",
    "model",
    "module",
    "pl",
    "pp",
    "presets",
]
