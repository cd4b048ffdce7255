"""Plain perceptrons, and PerturbedVAE's decoder made of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scvi_cradle.module.base._decoder import OutputHead
from scvi_cradle.module.base._observation import NEGATIVE_SLOPE


def perceptron(
    n_in: int, n_hidden: int, n_layers: int, n_out: int | None = None, *, negative_slope: float = NEGATIVE_SLOPE
) -> nn.Sequential:
    """Return hidden layers with leaky rectifiers (slope 0: plain ones) and, for ``n_out``, a linear layer behind them."""
    layers: list[nn.Module] = []
    for i in range(n_layers):
        layers += [nn.Linear(n_hidden if i else n_in, n_hidden), nn.LeakyReLU(negative_slope)]
    if n_out is not None:
        layers.append(nn.Linear(n_hidden if n_layers else n_in, n_out))
    return nn.Sequential(*layers)


class PerceptronDecoder(OutputHead):
    """``output = f([parts, covariates])`` with a perceptron ``f``.

    Parameters
    ----------
    n_genes
        Number of genes.
    parts
        Width of every latent part by name.
    n_hidden, n_layers
        Sizes; ``n_layers`` is the number of hidden layers.
    n_covariates
        Width of the covariate design.
    likelihood
        Name of the observation model.
    **options
        Further arguments of the observation model.
    """

    def __init__(
        self,
        n_genes: int,
        parts: dict[str, int],
        n_hidden: int,
        n_layers: int,
        *,
        n_covariates: int,
        likelihood: str,
        **options: Any,
    ) -> None:
        super().__init__(n_hidden, n_genes, likelihood, **options)
        self.parts = tuple(parts)
        self.hidden = perceptron(sum(parts.values()) + n_covariates, n_hidden, n_layers)

    def features_of(self, parts: dict[str, Tensor], covariates: Tensor) -> Tensor:
        """Return the inputs of the output layer, shape ``(n_particles, n_cells, n_hidden)``."""
        shape = torch.broadcast_shapes(*(z.shape[:-1] for z in parts.values()))
        z = torch.cat([parts[name].expand(*shape, -1) for name in self.parts], dim=-1)
        return self.hidden(torch.cat([z, covariates.expand(*z.shape[:-1], -1)], dim=-1))

    def forward(self, parts: dict[str, Tensor], covariates: Tensor) -> Tensor:
        """Return the output, shape ``(n_particles, n_cells, n_genes)``."""
        return self.output(self.features_of(parts, covariates))
