"""Models: what users train and ask."""

from scvi_cradle.model._conditionalvae import ConditionalVAE
from scvi_cradle.model._cpavae import CPAVAE
from scvi_cradle.model._cradlevae import CradleVAE
from scvi_cradle.model._perturbedvae import PerturbedVAE
from scvi_cradle.model._quantilehurdleae import QuantileHurdleAE
from scvi_cradle.model._samsvae import SAMSVAE
from scvi_cradle.model._svaeplus import SVAEPlus

__all__ = ["CPAVAE", "SAMSVAE", "ConditionalVAE", "CradleVAE", "PerturbedVAE", "QuantileHurdleAE", "SVAEPlus"]
