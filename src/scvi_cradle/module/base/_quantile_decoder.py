"""Decoder of hurdle probabilities and quantiles, and its last layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from scvi_cradle.module.base._perceptron import perceptron
from scvi_cradle.module.base._quantiles import (
    Monotone,
    crossing_penalty,
    increments_of,
    inverse_softplus,
    monotone_quantiles,
    pinball,
)

START_SHRINKAGE = 0.1  # of the last layer's weights, so that the outputs start close to their biases


class HurdleQuantiles(NamedTuple):
    """What the decoder predicts of every cell and gene.

    Parameters
    ----------
    logits
        Log-odds of a positive value, shape ``(n_cells, n_genes)``.
    quantiles
        Quantiles of the value where it is positive, shape ``(n_cells, n_genes, n_levels)``.
    """

    logits: Tensor
    quantiles: Tensor


class QuantileHead(nn.Module):
    """Last layer that gives every gene quantiles.

    Parameters
    ----------
    n_features
        Width of the features that enter the layer.
    n_genes, n_levels
        Numbers of genes and of levels.
    rank
        Width of a linear bottleneck that all genes share; None: none, ``n_features n_levels`` weights per gene.
    monotone
        How quantiles are made of the outputs (see ``monotone_quantiles``).
    """

    def __init__(self, n_features: int, n_genes: int, n_levels: int, *, rank: int | None, monotone: Monotone) -> None:
        super().__init__()
        self.n_genes, self.n_levels, self.monotone = n_genes, n_levels, monotone
        self.basis = nn.Identity() if rank is None else nn.Linear(n_features, rank, bias=False)
        self.output = nn.Linear(rank or n_features, n_genes * n_levels)

    def forward(self, features: Tensor) -> Tensor:
        """Return quantiles in order, shape ``(n_cells, n_genes, n_levels)``."""
        a = self.output(self.basis(features)).unflatten(-1, (self.n_genes, self.n_levels))
        return monotone_quantiles(a, "sort" if self.monotone == "penalty" else self.monotone)

    def weighted_loss(
        self, features: Tensor, levels: Tensor, cell: Tensor, gene: Tensor, y: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the quantile losses of given values and, without gradient, the losses.

        Parameters
        ----------
        features
            Shape ``(n_cells, n_features)``.
        levels
            Shape ``(n_levels,)``.
        cell, gene, y, weight
            Position, value and weight of every positive value, each ``(n_values,)``, in the order of the genes.

        Returns
        -------
        The sum (a scalar) and the loss of every value, its mean over levels, shape ``(n_values,)``.
        """
        a = self.output(self.basis(features)).unflatten(-1, (self.n_genes, self.n_levels))[cell, gene]
        q = monotone_quantiles(a, self.monotone)
        values = pinball(y, q, levels).mean(-1)
        if self.monotone == "penalty":
            values = values + crossing_penalty(q)
        return (values * weight).sum(), values.detach()

    @torch.no_grad()
    def initialize(self, quantiles: Tensor) -> None:
        """Start the biases at given quantiles ``(n_genes, n_levels)`` and shrink the weights."""
        start = increments_of(quantiles) if self.monotone == "cumsum" else inverse_softplus(quantiles)
        start_output(self.output, start.flatten())


@torch.no_grad()
def start_output(layer: nn.Linear, bias: Tensor) -> None:
    """Set the bias of an output layer and shrink its weights to a tenth."""
    layer.bias.copy_(bias)
    layer.weight.mul_(START_SHRINKAGE)


class QuantileHurdleDecoder(nn.Module):
    """Perceptron with a log-odds and quantiles per gene.

    Parameters
    ----------
    n_latent, n_hidden, n_layers
        Sizes of the perceptron.
    n_genes, n_levels, rank, monotone
        See :class:`QuantileHead`.
    """

    def __init__(
        self,
        n_latent: int,
        n_hidden: int,
        n_layers: int,
        n_genes: int,
        n_levels: int,
        *,
        rank: int | None,
        monotone: Monotone,
    ) -> None:
        super().__init__()
        self.hidden = perceptron(n_latent, n_hidden, n_layers, negative_slope=0.0)
        self.hurdle = nn.Linear(n_hidden, n_genes)
        self.quantiles = QuantileHead(n_hidden, n_genes, n_levels, rank=rank, monotone=monotone)

    def forward(self, z: Tensor) -> HurdleQuantiles:
        """Return log-odds and quantiles of latent states ``(n_cells, n_latent)``."""
        features = self.hidden(z)
        return HurdleQuantiles(self.hurdle(features), self.quantiles(features))
