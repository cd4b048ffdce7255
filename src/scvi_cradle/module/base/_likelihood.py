"""Negative-binomial likelihood behind a softmax layer: a plain form and a form that stores no (cells x genes) tensor.

With ``rho = softmax(W f + b)``, ``mu = l (rho + 1e-8)`` and inverse dispersion ``theta``,

``log p(x) = sum_g lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) - x log theta
+ x log mu - (x + theta) log(1 + mu / theta)``.

The first line depends on the cell alone and is read from a table of small counts (:class:`_CountTable`), once for all
particles. The second is computed tile by tile together with its gradient (:func:`_differentiate`). No term is as large as
``theta log theta``, which would leave no digits in single precision where a gene is nearly Poisson.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RATE_FLOOR = 1e-8
# of (particles x cells x genes): logits that are held at once, and what is worked on at once: on a CPU what stays in the
# cache (28 and 0.5 MB in float32; from 32 MB glibc gives fresh pages every time), elsewhere as much as possible for a kernel
BLOCK_ELEMENTS, TILE_ELEMENTS = 7 << 20, 1 << 17
DEVICE_ELEMENTS = 1 << 26
SMALL_COUNTS = 64


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


class _CountTable:
    """Terms of the log-likelihood that do not depend on the mean, with their derivatives by ``theta``.

    Derivatives are those of ``lgamma(x + theta) - lgamma(theta) - min(x, 64) log theta``: small for nearly Poisson genes,
    and not as large as ``x / theta`` for large counts, which would leave no digits in single precision.
    ``lgamma(x + theta) - lgamma(theta) - x log theta = sum_{j<x} log(1 + j / theta)`` is a sum over ``j`` for counts below
    64; others are evaluated one by one in double precision.

    Parameters
    ----------
    x, theta
        Counts ``(n_cells, n_genes)`` and inverse dispersions ``(n_genes,)``.
    """

    def __init__(self, x: Tensor, theta: Tensor) -> None:
        self.theta, self.genes = theta, torch.arange(len(theta), device=theta.device)
        largest = int(x.max()) if x.numel() else 0
        steps = torch.arange(min(largest, SMALL_COUNTS - 1), dtype=theta.dtype, device=theta.device)[:, None]
        factorials = torch.lgamma(steps.double() + 2).to(theta)
        self.terms = _from_zero((steps / theta).log1p_().cumsum(0) - factorials, large=largest >= SMALL_COUNTS)
        self.slopes = _from_zero((-steps / (theta * (steps + theta))).cumsum_(0), large=largest >= SMALL_COUNTS)
        self.has_large = largest >= SMALL_COUNTS

    def __call__(self, x: Tensor, weight: Tensor, d_theta: Tensor | None) -> Tensor:
        """Return the terms of cells, shape ``(n_cells,)``; their weighted derivatives are added to ``d_theta``."""
        small = x.clamp(max=len(self.terms) - 1).long()
        place = torch.add(self.genes, small, alpha=len(self.genes)).view(-1)  # in the flat table
        values = self.terms.view(-1).index_select(0, place).view_as(x).sum(-1)
        if d_theta is not None:
            slopes = self.slopes.view(-1).index_select(0, place).view_as(x)
            d_theta += slopes.mul_(weight[:, None]).sum(0)
        if self.has_large:
            self._add_large(x, weight, values, d_theta)
        return values

    def _add_large(self, x: Tensor, weight: Tensor, values: Tensor, d_theta: Tensor | None) -> None:
        cell, gene = (x >= SMALL_COUNTS).nonzero(as_tuple=True)
        counts, theta = x[cell, gene].double(), self.theta[gene].double()
        terms = torch.lgamma(counts + theta) - torch.lgamma(theta) - torch.lgamma(counts + 1) - counts * theta.log()
        values.index_add_(0, cell, terms.to(values))
        if d_theta is not None:
            slopes = torch.digamma(counts + theta) - torch.digamma(theta) - SMALL_COUNTS / theta
            d_theta.index_add_(0, gene, slopes.to(d_theta) * weight[cell])


def _from_zero(sums: Tensor, *, large: bool) -> Tensor:
    """Put the row of count 0 before a table and, for counts beyond it, a row of zeros behind it."""
    zeros = sums.new_zeros(1, sums.shape[1])
    return torch.cat([zeros, sums, zeros] if large else [zeros, sums])


def _differentiate(
    logits: Tensor, counts: Tensor, library: Tensor, theta: Tensor, weight: Tensor, d_theta: Tensor | None
) -> Tensor:
    """Return ``sum_g x log mu - (x + theta) log(1 + mu / theta)``; logits become its gradient times the weights of cells.

    With ``d = (x - mu) / (mu + theta)`` and the floor's share ``c = 1e-8 l / mu``, the gradient is that of the softmax
    applied to ``theta d (1 - c)``. The weighted sum over rows of ``min(x, 64) / theta - d - log(1 + mu / theta)`` is added to
    ``d_theta`` (None: no gradients): the derivative by ``theta`` less that of the table of counts. Shapes: logits ``(n_particles, n_cells, n_genes)``, counts
    ``(n_cells, n_genes)``, the value ``(n_particles, n_cells)``.
    """
    rho = torch.softmax(logits, dim=-1)
    floor = library * RATE_FLOOR
    log_rate = (rho / RATE_FLOOR).log1p_()  # log(mu / floor), which is twice as fast as log(mu)
    value = torch.linalg.vecdot(counts, log_rate) + counts.sum(-1) * floor[:, 0].log()
    mu = torch.add(rho, RATE_FLOOR, out=log_rate).mul_(library)
    shifted = counts + theta
    log_total = (mu / theta).log1p_()  # log((mu + theta) / theta)
    value -= torch.linalg.vecdot(shifted, log_total)
    if d_theta is None:
        return value
    weight = weight[:, None]
    slope = counts - mu
    slope /= mu + theta
    log_total.add_(slope).sub_(counts.clamp(max=SMALL_COUNTS).div_(theta))
    d_theta -= log_total.mul_(weight).sum((0, 1))
    slope *= theta
    slope.addcmul_(slope, torch.div(floor, mu, out=mu), value=-1)
    torch.addcmul(slope, rho, slope.sum(-1, keepdim=True), value=-1, out=logits).mul_(weight)
    return value


class _FusedLogProb(torch.autograd.Function):
    """Log-likelihoods, their weighted sum with the sign of a loss, and its gradient, in one pass.

    Matrix products are in bfloat16 under autocast.

    Logits are made for as many cells as ``BLOCK_ELEMENTS`` allows, so that matrix products are large. What is elementwise
    goes over tiles of ``TILE_ELEMENTS`` that stay in the cache and leaves the gradient where the logits were.
    """

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
        features, x = features.to(weight), x.contiguous()  # batches of CSC data are stored by columns
        device = x.device.type
        low = torch.bfloat16 if torch.is_autocast_enabled(device) else weight.dtype  # of matrix products
        with torch.autocast(device, enabled=False):
            values, slopes = _values_and_slopes(
                features,
                weight,
                bias,
                theta,
                x,
                library,
                -row_weight,
                low=low,
                needs_slopes=any(ctx.needs_input_grad[:4]),
            )
        ctx.save_for_backward(*slopes)
        ctx.mark_non_differentiable(values)
        return -(values * row_weight).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        upstream = grads[0]
        if upstream.device.type == "cpu" and upstream == 1:  # as in training: no copies as large as the weights
            return (*ctx.saved_tensors, None, None, None)
        return (*(upstream * slope for slope in ctx.saved_tensors), None, None, None)


def _values_and_slopes(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    theta: Tensor,
    x: Tensor,
    library: Tensor,
    row_weight: Tensor,
    *,
    low: torch.dtype,
    needs_slopes: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the log-likelihoods and, if needed, the gradient of their weighted sum by the first four arguments."""
    n_particles, n_cells, n_features = features.shape
    n_genes, values = len(bias), features.new_empty(n_particles, n_cells)
    slopes = tuple(torch.zeros_like(v) for v in (features, weight, bias, theta)) if needs_slopes else ()
    d_theta = slopes[3] if slopes else None
    count_terms, low_weight = _CountTable(x, theta), weight.to(low)
    on_cpu = x.device.type == "cpu"
    block = max(1, min((BLOCK_ELEMENTS if on_cpu else DEVICE_ELEMENTS) // (n_particles * n_genes), n_cells))
    tile, n_together = (max(1, TILE_ELEMENTS // n_genes), 1) if on_cpu else (block, n_particles)
    buffer = features.new_empty(n_particles * block * n_genes)
    for start in range(0, n_cells, block):
        cells = slice(start, min(start + block, n_cells))
        inputs = features[:, cells].reshape(-1, n_features)
        logits = buffer[: len(inputs) * n_genes].view(-1, n_genes)
        if low == weight.dtype:
            torch.addmm(bias, inputs, weight.t(), out=logits)
        else:
            torch.add(inputs.to(low) @ low_weight.t(), bias, out=logits)
        for first in range(start, cells.stop, tile):
            part = slice(first, min(first + tile, cells.stop))
            counts, w = x[part], row_weight[part]
            values[:, part] = count_terms(counts, w * n_particles, d_theta)
            pieces = logits.view(n_particles, -1, n_genes)[:, part.start - start : part.stop - start]
            for i in range(0, n_particles, n_together):
                piece = pieces[i : i + n_together]
                values[i : i + n_together, part] += _differentiate(piece, counts, library[part], theta, w, d_theta)
                if slopes:
                    slopes[2].add_(piece.sum((0, 1)))
        if slopes:
            low_logits = logits.to(low)  # by now the weighted gradient
            slopes[0][:, cells] = (low_logits @ low_weight).view(n_particles, -1, n_features)
            if low == weight.dtype:
                slopes[1].addmm_(logits.t(), inputs)
            else:
                slopes[1].add_(low_logits.t() @ inputs.to(low))
    return values, slopes


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
    loss, values = _FusedLogProb.apply(features, weight, bias, theta, x, library, row_weight)
    return -loss, values
