"""Pure functions of the objective: divergences in closed form and importance-weighted bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus


def gaussian_kl(mean_q: Tensor, std_q: Tensor, mean_p: Tensor | float, std_p: Tensor | float) -> Tensor:
    r"""Return ``KL(N(mean_q, std_q^2) || N(mean_p, std_p^2))`` elementwise.

    .. math:: \tfrac12\Big[\log\frac{\sigma_p^2}{\sigma_q^2} + \frac{\sigma_q^2 + (\mu_q-\mu_p)^2}{\sigma_p^2} - 1\Big]
    """
    std_p = torch.as_tensor(std_p, dtype=std_q.dtype, device=std_q.device)
    ratio = (std_q / std_p).square()
    return 0.5 * (ratio + ((mean_q - mean_p) / std_p).square() - 1.0 - ratio.log())


def bernoulli_kl_logits(logits_q: Tensor, logit_p: float) -> Tensor:
    """Return ``KL(Bernoulli(sigmoid(logits_q)) || Bernoulli(sigmoid(logit_p)))`` elementwise; priors to 1e-40 are safe."""
    softplus_p = max(logit_p, 0.0) + math.log1p(math.exp(-abs(logit_p)))
    return torch.sigmoid(logits_q) * (logits_q - logit_p) - softplus(logits_q) + softplus_p


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """Return ``logsumexp_k(log w_k) - log K`` over the leading axis (SAMS-VAE, eq. 7 per cell)."""
    return torch.logsumexp(log_weights, dim=0) - math.log(log_weights.shape[0])
