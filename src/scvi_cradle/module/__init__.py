"""Torch modules of the models."""

from scvi_cradle.module._conditionalvae import ConditionalVAEModule
from scvi_cradle.module._cradlevae import CradleVAEModule
from scvi_cradle.module._perturbedvae import PerturbedVAEModule
from scvi_cradle.module._quantilehurdleae import QuantileHurdleModule
from scvi_cradle.module._samsvae import SAMSVAEModule
from scvi_cradle.module._svaeplus import SVAEPlusModule

__all__ = [
    "ConditionalVAEModule",
    "CradleVAEModule",
    "PerturbedVAEModule",
    "QuantileHurdleModule",
    "SAMSVAEModule",
    "SVAEPlusModule",
]
