"""Decoder of hurdle probabilities and quantiles, and its last layer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

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
BLOCK_VALUES = 4096  # values whose quantiles fit into the processor's cache


class HurdleQuantiles(NamedTuple):
    """What the decoder predicts of every cell and gene.

    Parameters
    ----------
    logits
        Log-odds of a positive value, shape ``(n_cells, n_genes)``.
    quantiles
        Quantiles, in order, of the value where it is positive, shape ``(n_cells, n_genes, n_levels)``.
    """

    logits: Tensor
    quantiles: Tensor


def quantile_loss(a: Tensor, y: Tensor, levels: Tensor, monotone: Monotone) -> Tensor:
    """Return the loss of values from the outputs ``(n_values, n_levels)`` of their genes: the pinball's mean over levels.

    ``monotone="penalty"`` adds the mean crossing of neighbouring quantiles.
    """
    q = monotone_quantiles(a, monotone)
    loss = pinball(y, q, levels).mean(-1)
    return loss + crossing_penalty(q) if monotone == "penalty" else loss


class _GatheredLoss(torch.autograd.Function):
    """Weighted sum of ``quantile_loss`` over given values, without the outputs of the cells and genes in between.

    Every gene's outputs are computed for the cells that have a value, block by block, and so are the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        cell: Tensor,
        gene: Tensor,
        y: Tensor,
        value_weight: Tensor,
        levels: Tensor,
        monotone: Monotone,
    ) -> tuple[Tensor, Tensor]:
        counts = torch.bincount(gene, minlength=len(weight)).tolist()
        cells, losses, learns = cell.split(counts), torch.empty_like(y), any(ctx.needs_input_grad[:3])
        d_features, d_weight, d_bias = (torch.zeros_like(v) if learns else v for v in (features, weight, bias))
        start = 0
        for genes in _blocks(counts):
            sizes = counts[genes]
            values = slice(start, start + sum(sizes))
            start = values.stop
            inputs = [features.index_select(0, c) for c in cells[genes]]
            a = features.new_empty(sum(sizes), len(levels))
            for out, f, w, b in zip(a.split(sizes), inputs, weight[genes], bias[genes], strict=True):
                torch.addmm(b, f, w.t(), out=out)
            with torch.set_grad_enabled(learns):
                loss = quantile_loss(a.requires_grad_(learns), y[values], levels, monotone)
            losses[values] = loss.detach()
            if not learns:
                continue
            (slopes,) = torch.autograd.grad(loss, a, value_weight[values])
            d_bias.index_add_(0, gene[values], slopes)
            for s, f, w, c, d_w in zip(
                slopes.split(sizes), inputs, weight[genes], cells[genes], d_weight[genes], strict=True
            ):
                torch.mm(s.t(), f, out=d_w)
                d_features.index_add_(0, c, s @ w)
        if learns:
            ctx.save_for_backward(d_features, d_weight, d_bias)
        ctx.mark_non_differentiable(losses)
        return losses @ value_weight, losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return (*(grads[0] * d for d in ctx.saved_tensors), *[None] * 6)


def _blocks(counts: list[int]) -> list[slice]:
    """Return runs of genes that have some 4,096 values together."""
    bounds, size = [0], 0
    for gene, n in enumerate(counts):
        if size and size + n > BLOCK_VALUES:
            bounds, size = [*bounds, gene], 0
        size += n
    return [slice(*pair) for pair in pairwise([*bounds, len(counts)])]


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
        The sum (a scalar) and the loss of every value, shape ``(n_values,)``.
        """
        if features.device.type != "cpu":
            return self.dense_loss(features, levels, cell, gene, y, weight)
        shape = (self.n_genes, self.n_levels)
        parts = self.basis(features), self.output.weight.unflatten(0, shape), self.output.bias.unflatten(0, shape)
        if not torch.is_grad_enabled():  # a Function sees parameters that require a gradient there as well
            parts = tuple(v.detach() for v in parts)
        return _GatheredLoss.apply(*parts, cell, gene, y, weight, levels, self.monotone)

    def dense_loss(
        self, features: Tensor, levels: Tensor, cell: Tensor, gene: Tensor, y: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what ``weighted_loss`` returns, in its plain form: one product for all cells and genes, as suits a GPU."""
        a = self.output(self.basis(features)).unflatten(-1, (self.n_genes, self.n_levels))
        losses = quantile_loss(a[cell, gene], y, levels, self.monotone)
        return losses @ weight, losses.detach()

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
