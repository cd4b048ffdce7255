"""Pure functions of the objective: divergences in closed form and importance-weighted bounds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Normal
from torch.nn.functional import softplus


def gaussian_kl(mean_q: Tensor, std_q: Tensor, mean_p: Tensor | float, std_p: Tensor | float) -> Tensor:
    r"""Return ``KL(N(mean_q, std_q^2) || N(mean_p, std_p^2))`` elementwise.

    .. math:: \tfrac12\Big[\log\frac{\sigma_p^2}{\sigma_q^2} + \frac{\sigma_q^2 + (\mu_q-\mu_p)^2}{\sigma_p^2} - 1\Big]
    """
    std_p = torch.as_tensor(std_p, dtype=std_q.dtype, device=std_q.device)
    ratio = (std_q / std_p).square()
    return 0.5 * (ratio + ((mean_q - mean_p) / std_p).square() - 1.0 - ratio.log())


def summed_gaussian_kl(q: Normal, p: Normal) -> Tensor:
    """Return ``KL(q || p)`` of two normals of one shape, summed over the last axis: :func:`gaussian_kl` in fewer passes."""
    return _SummedGaussianKL.apply(q.loc, q.scale, p.loc, p.scale)


class _SummedGaussianKL(torch.autograd.Function):
    """The divergence with its gradient written out."""

    @staticmethod
    def forward(ctx: Any, mean_q: Tensor, std_q: Tensor, mean_p: Tensor, std_p: Tensor) -> Tensor:
        precision = std_p.reciprocal()
        shift, ratio = (mean_q - mean_p).mul_(precision), std_q * precision
        ctx.save_for_backward(precision, shift, ratio)
        terms = ratio.square().sub_(1).sub_(ratio.log(), alpha=2).addcmul_(shift, shift)
        return terms.sum(-1).mul_(0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        precision, shift, ratio = ctx.saved_tensors
        scaled = precision * grads[0][..., None]
        d_mean, d_std = scaled * shift, (ratio - ratio.reciprocal()).mul_(scaled)
        d_std_p = (d_mean * shift).addcmul_(d_std, ratio).neg_()
        return d_mean, d_std, -d_mean, d_std_p


def normal_log_prob(value: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Return ``log N(value; mean, std^2)`` elementwise."""
    std = torch.as_tensor(std, dtype=value.dtype, device=value.device)
    return -0.5 * (((value - mean) / std).square() + math.log(2 * math.pi)) - std.log()


def bernoulli_kl_logits(logits_q: Tensor, logit_p: float) -> Tensor:
    """Return ``KL(Bernoulli(sigmoid(logits_q)) || Bernoulli(sigmoid(logit_p)))`` elementwise; priors to 1e-40 are safe."""
    softplus_p = max(logit_p, 0.0) + math.log1p(math.exp(-abs(logit_p)))
    return torch.sigmoid(logits_q) * (logits_q - logit_p) - softplus(logits_q) + softplus_p


def beta_log_prob(log_p: Tensor, log_not: Tensor, concentration: tuple[Tensor | float, Tensor | float]) -> Tensor:
    """Return ``log Beta(p; a, b)`` elementwise, from ``log p`` and ``log(1 - p)``."""
    a, b = (torch.as_tensor(c, dtype=log_p.dtype, device=log_p.device) for c in concentration)
    return (a - 1) * log_p + (b - 1) * log_not + torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)


def beta_kl(concentration_q: tuple[Tensor, Tensor], concentration_p: tuple[Tensor | float, Tensor | float]) -> Tensor:
    """Return ``KL(Beta(a_q, b_q) || Beta(a_p, b_p))`` elementwise."""
    a, b = concentration_q
    total = torch.digamma(a + b)
    log_p, log_not = torch.digamma(a) - total, torch.digamma(b) - total  # expectations of log p and log(1 - p)
    return beta_log_prob(log_p, log_not, concentration_q) - beta_log_prob(log_p, log_not, concentration_p)


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """Return ``logsumexp_k(log w_k) - log K`` over the leading axis (SAMS-VAE, eq. 7 per cell)."""
    return torch.logsumexp(log_weights, dim=0) - math.log(log_weights.shape[0])
