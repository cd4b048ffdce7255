"""The global artifact vector of CRADLE-VAE."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from scvi_cradle.module.base._elbo import gaussian_kl, normal_log_prob
from scvi_cradle.module.base._embeddings import FreeGaussian, normal_like


class ArtifactLatent(nn.Module):
    """The global artifact vector ``u`` (CRADLE-VAE, Alg. 1): a free Gaussian, or a plain vector ("w/o Causal")."""

    def __init__(
        self, n_latent: int, *, gaussian: bool, prior_scale: float, init_scale: float, sampled_kl: bool
    ) -> None:
        super().__init__()
        self.prior_scale = prior_scale
        self.sampled_kl = sampled_kl
        self.posterior = FreeGaussian((n_latent,), init_scale) if gaussian else None
        self.vector = None if gaussian else nn.Parameter(torch.zeros(n_latent))

    @property
    def mean(self) -> Tensor:
        """Posterior mean of ``u``, shape ``(n_latent,)``."""
        return self.posterior.loc if self.posterior is not None else self.vector  # type: ignore[return-value]

    def draw(
        self,
        n_particles: int,
        n_rows: int,
        *,
        sample: bool = True,
        sampled_kl: bool | None = None,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw ``u``, shape ``(n_particles, n_rows, n_latent)``, and its divergence (a scalar)."""
        if self.posterior is None or not sample:
            return self.mean.expand(n_particles, n_rows, -1), self.mean.new_zeros(())
        posterior = self.posterior()
        loc = posterior.loc.expand(n_particles, n_rows, -1)
        value = loc + posterior.scale * normal_like(loc, generator)
        if self.sampled_kl if sampled_kl is None else sampled_kl:
            ratio = posterior.log_prob(value) - normal_log_prob(value, 0.0, self.prior_scale)
            return value, ratio.sum(-1).mean()
        return value, gaussian_kl(posterior.loc, posterior.scale, 0.0, self.prior_scale).sum()
