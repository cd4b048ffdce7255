"""Negative-binomial likelihood behind a softmax layer: a plain form and a form that stores no (cells x genes) tensor.

With ``rho = softmax(W f + b)``, ``mu = l (rho + 1e-8)`` and inverse dispersion ``theta``,

``log p(x) = sum_g lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) - x log theta
+ x log mu - (x + theta) log(1 + mu / theta)``.

The first line depends on the cell alone (:func:`count_terms`, at non-zero counts, once for all particles, in double
precision). The second is computed block by block together with its gradient (:class:`_RateTerms`). No term is as large as
``theta log theta``, which would leave no digits in single precision where a gene is nearly Poisson.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

RATE_FLOOR = 1e-8
BLOCK_ELEMENTS = 1 << 17


def library_size(x: Tensor) -> Tensor:
    """Return the total count of every cell, shape ``(n_cells, 1)``; 1 for a cell without counts."""
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 0, total, torch.ones_like(total))


def softmax_rates(logits: Tensor, library: Tensor) -> Tensor:
    """Return ``l (softmax(logits) + 1e-8)``, shape ``(..., n_cells, n_genes)``."""
    return (torch.softmax(logits, dim=-1) + RATE_FLOOR) * library


def negative_binomial_log_prob(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Return ``log NB(x; mean mu, inverse dispersion theta)`` elementwise: the reference for the fused form."""
    log_total = (theta + mu).log()
    counts = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return counts + theta * (theta.log() - log_total) + x * (mu.log() - log_total)


def count_terms(x: Tensor, theta: Tensor) -> Tensor:
    """Return the terms of the log-likelihood that do not depend on the mean, shape ``(n_cells,)``."""
    cell, gene = x.nonzero(as_tuple=True)
    counts, wide = x[cell, gene].double(), theta.double()
    terms = torch.lgamma(counts + wide.index_select(0, gene)) - torch.lgamma(counts + 1)
    terms = terms - wide.lgamma().index_select(0, gene) - counts * wide.log().index_select(0, gene)
    return terms.new_zeros(len(x)).index_add(0, cell, terms).to(x)


class _RateTerms(torch.autograd.Function):
    """``sum_g x log mu - (x + theta) log(1 + mu / theta)`` per row, and the gradient of its weighted sum, in one pass."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        theta: Tensor,
        x: Tensor,
        library: Tensor,
        row_weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        n_particles, n_cells, _ = features.shape
        needs = ctx.needs_input_grad[:4]
        values = features.new_empty(n_particles, n_cells)
        d_features = torch.empty_like(features) if any(needs) else None
        d_weight, d_bias, d_theta = torch.zeros_like(weight), torch.zeros_like(bias), torch.zeros_like(theta)
        inverse = theta.reciprocal()
        block = max(1, BLOCK_ELEMENTS // x.shape[1])
        for start in range(0, n_cells, block):
            cells = slice(start, start + block)
            counts, scale = x[cells], library[cells]
            shifted = counts + theta
            for particle in range(n_particles):
                f = features[particle, cells]
                rho = torch.softmax(linear(f, weight, bias), dim=-1)
                mu = (rho + RATE_FLOOR).mul_(scale)
                total = mu + theta
                relative = mu * inverse
                log_total = relative.log1p()  # log((theta + mu) / theta)
                value = torch.einsum("cg,cg->c", counts, mu.log()) - torch.einsum("cg,cg->c", shifted, log_total)
                values[particle, cells] = value
                if d_features is None:
                    continue
                w = row_weight[cells, None]
                ratio = torch.div(shifted, total, out=total)
                d_theta.sub_(log_total.sub_(relative.mul_(ratio)).mul_(w).sum(0))
                slope = torch.div(counts, mu, out=mu).sub_(ratio).mul_(rho).mul_(scale * w)
                slope.sub_(rho.mul_(slope.sum(-1, keepdim=True)))  # d value / d logits, weighted
                d_features[particle, cells] = slope @ weight
                d_weight.addmm_(slope.t(), f)
                d_bias.add_(slope.sum(0))
        ctx.save_for_backward(d_features, d_weight, d_bias, d_theta)
        ctx.mark_non_differentiable(values)
        return (values * row_weight).sum(), values

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        d_features, d_weight, d_bias, d_theta = ctx.saved_tensors
        upstream = grads[0]
        return upstream * d_features, upstream * d_weight, upstream * d_bias, upstream * d_theta, None, None, None


def fused_log_prob(
    features: Tensor, weight: Tensor, bias: Tensor, theta: Tensor, x: Tensor, library: Tensor, row_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of log-likelihoods, with its gradient, and the log-likelihoods, without one.

    Parameters
    ----------
    features
        Inputs of the output layer, shape ``(n_particles, n_cells, n_features)``.
    weight, bias
        Output layer, shapes ``(n_genes, n_features)`` and ``(n_genes,)``.
    theta
        Inverse dispersions, shape ``(n_genes,)``.
    x, library
        Counts ``(n_cells, n_genes)`` and library sizes ``(n_cells, 1)``.
    row_weight
        Weight of every cell in the sum, shape ``(n_cells,)``; particles are summed.

    Returns
    -------
    The sum (a scalar) and the log-likelihoods, shape ``(n_particles, n_cells)``.
    """
    if not torch.is_grad_enabled():  # a Function sees parameters that require a gradient there as well
        features, weight, bias, theta = (v.detach() for v in (features, weight, bias, theta))
    rates, values = _RateTerms.apply(features, weight, bias, theta, x, library, row_weight)
    counts = count_terms(x, theta)
    return rates + (counts * row_weight).sum() * features.shape[0], values + counts.detach()
