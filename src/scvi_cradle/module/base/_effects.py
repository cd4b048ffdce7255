"""Global latent variables: sparse treatment effects and the artifact vector, drawn per batch or per cell."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Normal

from scvi_cradle.module.base._elbo import bernoulli_kl_logits, gaussian_kl
from scvi_cradle.module.base._networks import GaussianHead, ResidualLayers, activation

SCALE_FLOOR = 1e-4


class Pairs(NamedTuple):
    """The non-zero dosages of a batch: cell, treatment and dose of each, all of shape ``(n_pairs,)``."""

    cell: Tensor
    treatment: Tensor
    dose: Tensor
    n_cells: int

    @classmethod
    def from_members(cls, members: Tensor) -> Pairs:
        """Return the pairs of cells with dose 1, from the treatments of each cell padded with -1."""
        cell, slot = (members >= 0).nonzero(as_tuple=True)
        return cls(cell, members[cell, slot], torch.ones(len(cell), device=cell.device), len(members))


class EffectDraw(NamedTuple):
    """Draws of treatment effects.

    Parameters
    ----------
    rows
        Sampled effects ``e * m``, shape ``(n_particles, n_rows, n_latent)``: one row per treatment of the batch
        (``draws="batch"``) or one per pair (``draws="cell"``).
    kl
        Divergence of the posterior of each row's treatment, shape ``(n_particles or 1, n_rows)``.
    row_of_pair
        Row of every pair, shape ``(n_pairs,)``.
    treatment
        Treatment of every row, shape ``(n_rows,)``.
    """

    rows: Tensor
    kl: Tensor
    row_of_pair: Tensor
    treatment: Tensor

    def to_cells(self, values: Tensor, pairs: Pairs) -> Tensor:
        """Sum dose times row over the pairs of each cell: ``(P, n_rows, k)`` to ``(P, n_cells, k)``."""
        cells = values.new_zeros(values.shape[0], pairs.n_cells, values.shape[2])
        return cells.index_add(1, pairs.cell, values[:, self.row_of_pair] * pairs.dose[:, None])

    def weights(self, pairs: Pairs, n_obs_per_treatment: Tensor) -> Tensor:
        """Return the plate weight of every row: its pairs over the training cells of its treatment, ``1/0 -> 0``."""
        n_obs = n_obs_per_treatment[self.treatment]
        in_batch = torch.zeros_like(n_obs).index_add(0, self.row_of_pair, torch.ones_like(pairs.dose))
        return torch.where(n_obs > 0, in_batch / n_obs.clamp_min(1), torch.zeros_like(n_obs))


def normal_like(value: Tensor, generator: Generator | None = None) -> Tensor:
    """Return standard normal noise of the shape of ``value``."""
    return torch.randn(value.shape, generator=generator, device=value.device, dtype=value.dtype)


def straight_through_bernoulli(logits: Tensor, temperature: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Draw 0/1 masks from relaxed Bernoullis: hard values forward, the gradient of the relaxed ones backward."""
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
    uniform = uniform.clamp(1e-7, 1 - 1e-7)
    relaxed = torch.sigmoid((logits + uniform.logit()) / temperature)
    return (relaxed > 0.5).to(relaxed) + (relaxed - relaxed.detach())


class SparseEffects(nn.Module):
    """Posterior of sparse treatment effects: masks ``m_t`` and embeddings ``e_t`` (SAMS-VAE, eqs. 1-5).

    Priors: ``m_t ~ Bernoulli(alpha)``, ``e_t ~ N(0, s^2 I)``. Posteriors: ``q(m_t)`` a free Bernoulli;
    ``q(e_t)`` a free Gaussian (``amortized=False``) or ``q(e_t | m_t)`` a perceptron of the mask and the treatment.

    Parameters
    ----------
    n_treatments, n_latent
        Shape of masks and embeddings.
    mask_prior_logit
        Log-odds of ``alpha``.
    embedding_prior_scale
        Standard deviation ``s``.
    amortized, n_layers, n_hidden
        Whether ``q(e_t | m_t)`` is a network, and its size.
    mask_init_logit, embedding_init_scale
        Start of the posteriors.
    temperature
        Temperature of the relaxed Bernoulli.
    sampled_kl
        Estimate the divergences at the draws instead of in closed form.
    """

    def __init__(
        self,
        n_treatments: int,
        n_latent: int,
        *,
        mask_prior_logit: float,
        embedding_prior_scale: float,
        amortized: bool,
        n_layers: int,
        n_hidden: int,
        mask_init_logit: float,
        embedding_init_scale: float,
        temperature: float,
        sampled_kl: bool,
    ) -> None:
        super().__init__()
        self.mask_prior_logit = mask_prior_logit
        self.embedding_prior_scale = embedding_prior_scale
        self.temperature = temperature
        self.sampled_kl = sampled_kl
        self.mask_logits = nn.Parameter(torch.full((n_treatments, n_latent), float(mask_init_logit)))
        self.amortized = amortized
        self.embedding: AmortizedEmbedding | FreeGaussian
        if amortized:
            self.embedding = AmortizedEmbedding(n_treatments, n_latent, n_layers, n_hidden)
        else:
            self.embedding = FreeGaussian((n_treatments, n_latent), embedding_init_scale)

    def embedding_posterior(self, treatment: Tensor, mask: Tensor) -> Normal:
        """Return ``q(e | m)`` of rows; ``mask`` has shape ``(P, n_rows, n_latent)``."""
        return self.embedding(treatment, mask) if self.amortized else self.embedding(treatment)

    def draw(
        self,
        pairs: Pairs,
        n_particles: int,
        *,
        per_cell: bool,
        sample: bool = True,
        generator: Generator | None = None,
    ) -> EffectDraw:
        """Draw masks and embeddings of the treatments of a batch; ``sample=False`` takes posterior means."""
        if per_cell and sample:
            treatment = pairs.treatment
            row_of_pair = torch.arange(len(treatment), device=treatment.device)
        else:
            treatment, row_of_pair = torch.unique(pairs.treatment, return_inverse=True)
        logits = self.mask_logits[treatment].expand(n_particles, -1, -1)  # (P, R, D)
        if not sample:
            probability = torch.sigmoid(logits)
            rows = probability * self.embedding_posterior(treatment, probability).mean
            return EffectDraw(rows, rows.new_zeros(1, len(treatment)), row_of_pair, treatment)
        mask = straight_through_bernoulli(logits, self.temperature, generator)
        posterior = self.embedding_posterior(treatment, mask)
        embedding = posterior.loc + posterior.scale * normal_like(mask, generator)
        kl = self._kl(logits, mask, posterior, embedding)
        return EffectDraw(mask * embedding, kl, row_of_pair, treatment)

    def _kl(self, logits: Tensor, mask: Tensor, posterior: Normal, embedding: Tensor) -> Tensor:
        prior_logit, scale = self.mask_prior_logit, self.embedding_prior_scale
        if self.sampled_kl:
            softplus = nn.functional.softplus
            mask_term = (
                mask * (logits - prior_logit) - softplus(logits) + softplus(torch.tensor(prior_logit).to(logits))
            )
            prior = Normal(torch.zeros_like(embedding), scale, validate_args=False)
            return (mask_term + posterior.log_prob(embedding) - prior.log_prob(embedding)).sum(-1)
        kl = bernoulli_kl_logits(logits[:1], prior_logit) + gaussian_kl(posterior.loc, posterior.scale, 0.0, scale)
        return kl.sum(-1)  # (P or 1, R)


class FreeGaussian(nn.Module):
    """Free Gaussian parameters, ``N(loc, (exp(log_scale) + 1e-4)^2)``, started at mean 0."""

    def __init__(self, shape: tuple[int, ...], init_scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.full(shape, math.log(init_scale)))

    def forward(self, rows: Tensor | None = None) -> Normal:
        """Return the Gaussian, of some rows only when given."""
        loc, log_scale = (self.loc, self.log_scale) if rows is None else (self.loc[rows], self.log_scale[rows])
        return Normal(loc, log_scale.exp() + SCALE_FLOOR, validate_args=False)


class AmortizedEmbedding(nn.Module):
    """``q(e_t | m_t) = N(f([m_t, onehot_t]))`` with a residual perceptron ``f`` (SAMS-VAE, App. A.4)."""

    def __init__(self, n_treatments: int, n_latent: int, n_layers: int, n_hidden: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_latent + n_treatments)
        self.mask_layer = nn.Linear(n_latent, n_hidden)
        self.treatment = nn.Parameter(torch.empty(n_treatments, n_hidden).uniform_(-bound, bound))
        self.hidden = ResidualLayers(n_layers - 1, n_hidden)
        self.head = GaussianHead(n_hidden, n_latent)

    def forward(self, treatment: Tensor, mask: Tensor) -> Normal:
        """Return the posterior of rows, shape ``(P, n_rows, n_latent)``."""
        return self.head(self.hidden(activation(self.mask_layer(mask) + self.treatment[treatment])))


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
        self, n_particles: int, n_rows: int, *, sample: bool = True, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw ``u``, shape ``(n_particles, n_rows, n_latent)``, and its divergence (a scalar)."""
        if self.posterior is None or not sample:
            return self.mean.expand(n_particles, n_rows, -1), self.mean.new_zeros(())
        posterior = self.posterior()
        loc = posterior.loc.expand(n_particles, n_rows, -1)
        value = loc + posterior.scale * normal_like(loc, generator)
        if self.sampled_kl:
            prior = Normal(torch.zeros_like(value), self.prior_scale, validate_args=False)
            return value, (posterior.log_prob(value) - prior.log_prob(value)).sum(-1).mean()
        return value, gaussian_kl(posterior.loc, posterior.scale, 0.0, self.prior_scale).sum()
