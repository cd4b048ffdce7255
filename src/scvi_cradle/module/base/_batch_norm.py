"""Encoder and decoder with batch normalisation and dropout, as the original sVAE+ takes them from scvi-tools."""

from __future__ import annotations

import torch
from scvi.nn import FCLayers
from torch import Tensor, nn
from torch.distributions import Normal

from scvi_cradle.module.base._decoder import OutputHead
from scvi_cradle.module.base._networks import GaussianHead

DROPOUT = 0.1


class BatchNormEncoder(nn.Module):
    """``q(z | x)`` from standardised expression, shape ``(n_cells, n_latent)``."""

    def __init__(self, n_genes: int, n_latent: int, n_hidden: int, n_layers: int) -> None:
        super().__init__()
        self.hidden = FCLayers(n_genes, n_hidden, n_layers=n_layers, n_hidden=n_hidden, dropout_rate=DROPOUT)
        self.head = GaussianHead(n_hidden, n_latent)

    def forward(self, x: Tensor) -> Normal:
        """Return the posterior of cells."""
        return self.head(self.hidden(x))


class BatchNormDecoder(OutputHead):
    """``output = f([z, covariates])``; arguments as in :class:`Decoder`."""

    def __init__(
        self, n_genes: int, n_latent: int, n_hidden: int, n_layers: int, *, n_covariates: int, likelihood: str
    ) -> None:
        super().__init__(n_hidden, n_genes, likelihood)
        self.hidden = FCLayers(
            n_latent + n_covariates, n_hidden, n_layers=n_layers, n_hidden=n_hidden, dropout_rate=DROPOUT
        )

    def features_of(self, parts: dict[str, Tensor], covariates: Tensor) -> Tensor:
        """Return the inputs of the output layer, shape ``(n_particles, n_cells, n_hidden)``."""
        z = parts["basal"]
        inputs = torch.cat([z, covariates.expand(*z.shape[:-1], -1)], dim=-1)
        if self.training:  # statistics of one particle at a time
            return self.hidden(inputs)
        return self.hidden(inputs.flatten(0, -2)).unflatten(0, z.shape[:-1])

    def forward(self, parts: dict[str, Tensor], covariates: Tensor) -> Tensor:
        """Return the output, shape ``(n_particles, n_cells, n_genes)``."""
        return self.output(self.features_of(parts, covariates))
