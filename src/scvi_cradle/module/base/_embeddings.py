"""Posteriors of treatment embeddings: free Gaussians, a network of the mask, or points."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Normal

from scvi_cradle.module.base._networks import GaussianHead, ResidualLayers, activation

SCALE_FLOOR = 1e-4


def normal_like(value: Tensor, generator: Generator | None = None) -> Tensor:
    """Return standard normal noise of the shape of ``value``."""
    return torch.randn(value.shape, generator=generator, device=value.device, dtype=value.dtype)


class FreeGaussian(nn.Module):
    """Free Gaussian parameters, ``N(loc, (exp(log_scale) + 1e-4)^2)``, started at mean 0."""

    def __init__(self, shape: tuple[int, ...], init_scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.full(shape, math.log(init_scale)))

    def forward(self, rows: Tensor | None = None, mask: Tensor | None = None) -> Normal:
        """Return the Gaussian, of some rows only when given; it does not depend on the mask."""
        loc, log_scale = (self.loc, self.log_scale) if rows is None else (self.loc[rows], self.log_scale[rows])
        return Normal(loc, log_scale.exp() + SCALE_FLOOR, validate_args=False)


class AmortizedEmbedding(nn.Module):
    """``q(e_t | m_t) = N(f([m_t, onehot_t]))`` with a residual perceptron ``f`` (SAMS-VAE, sec. 2.3)."""

    def __init__(self, n_treatments: int, n_latent: int, n_layers: int, n_hidden: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_latent + n_treatments)
        self.mask_layer = nn.Linear(n_latent, n_hidden)
        self.treatment = nn.Parameter(torch.empty(n_treatments, n_hidden).uniform_(-bound, bound))
        self.hidden = ResidualLayers(n_layers - 1, n_hidden)
        self.head = GaussianHead(n_hidden, n_latent)

    def forward(self, rows: Tensor, mask: Tensor) -> Normal:
        """Return the posterior of treatments ``rows``, shape ``(P, n_rows, n_latent)``."""
        return self.head(self.hidden(activation(self.mask_layer(mask) + self.treatment[rows])))


class PointEmbedding(nn.Module):
    """Embeddings that are parameters, without prior or posterior (sVAE+: type-II maximum likelihood)."""

    def __init__(self, n_treatments: int, n_latent: int, init_scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(init_scale * torch.randn(n_treatments, n_latent))
