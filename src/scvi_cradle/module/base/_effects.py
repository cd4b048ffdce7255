"""Global latent variables: treatment effects, a mask times an embedding, drawn per batch or per cell."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Normal

from scvi_cradle.module.base._elbo import gaussian_kl, normal_log_prob
from scvi_cradle.module.base._embeddings import AmortizedEmbedding, FreeGaussian, PointEmbedding, normal_like
from scvi_cradle.module.base._masks import BernoulliMask, BetaBernoulliMask

N_MASK_DRAWS = 128


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

    def dosage(self, n_treatments: int) -> Tensor:
        """Return the dosage matrix, shape ``(n_cells, n_treatments)``."""
        dosage = self.dose.new_zeros(self.n_cells, n_treatments)
        return dosage.index_put((self.cell, self.treatment), self.dose, accumulate=True)

    def total(self, values: Tensor) -> Tensor:
        """Sum dose times value over the pairs of each cell: ``(P, n_pairs, k)`` to ``(P, n_cells, k)``."""
        cells = values.new_zeros(values.shape[0], self.n_cells, values.shape[2])
        return cells.index_add(1, self.cell, values * self.dose[:, None].to(values))


class EffectNoise(NamedTuple):
    """What drawn effects are functions of, each ``(n_particles or half of them, n_pairs, n_latent)``, or of width 0.

    Parameters
    ----------
    mask
        Uniform on (0, 1).
    embedding
        Standard normal.
    """

    mask: Tensor
    embedding: Tensor


class EffectDraw(NamedTuple):
    """Draws of treatment effects.

    Parameters
    ----------
    rows
        Sampled effects ``e * m``, shape ``(n_particles, n_rows, n_latent)``: one row per treatment of the batch
        (``draws="batch"``) or one per pair (``draws="cell"``).
    kl
        Divergence of the posterior of each row's treatment, shape ``(n_particles or 1, n_rows)``.
    log_prior
        ``log p(m)`` of each row's treatment, same shape.
    row_of_pair
        Row of every pair, shape ``(n_pairs,)``.
    treatment
        Treatment of every row, shape ``(n_rows,)``.
    """

    rows: Tensor
    kl: Tensor
    log_prior: Tensor
    row_of_pair: Tensor
    treatment: Tensor

    def to_cells(self, values: Tensor, pairs: Pairs) -> Tensor:
        """Sum dose times row over the pairs of each cell: ``(P, n_rows, k)`` to ``(P, n_cells, k)``."""
        return pairs.total(values.index_select(1, self.row_of_pair))

    def shares(self, pairs: Pairs, n_obs_per_treatment: Tensor) -> Tensor:
        """Return what every cell carries of the divergences of its treatments, shape ``(n_particles or 1, n_cells)``.

        The weight of a pair is one over the training cells of its treatment, ``1/0 -> 0``: one epoch counts each
        treatment once.
        """
        n_obs = n_obs_per_treatment[pairs.treatment]
        weight = torch.where(n_obs > 0, 1 / n_obs.clamp_min(1), torch.zeros_like(n_obs))
        return _sum_by_cell(self.kl[:, self.row_of_pair] * weight, pairs)

    def log_priors(self, pairs: Pairs, n_obs_per_treatment: Tensor) -> Tensor:
        """Return ``log p(m)`` of the treatments of every cell that have training cells, shape ``(n_particles or 1, n_cells)``."""
        return _sum_by_cell(self.log_prior[:, self.row_of_pair] * (n_obs_per_treatment[pairs.treatment] > 0), pairs)


def _sum_by_cell(values: Tensor, pairs: Pairs) -> Tensor:
    return values.new_zeros(values.shape[0], pairs.n_cells).index_add(1, pairs.cell, values)


class TreatmentEffects(nn.Module):
    """Posterior of treatment effects ``e_t * m_t`` (SAMS-VAE, eqs. 1-5).

    Parameters
    ----------
    mask
        Posterior of the masks, or None for masks fixed to one (CPA-VAE).
    embedding
        Posterior of the embeddings, whose prior is ``N(0, prior_scale^2 I)``; a :class:`PointEmbedding` has none.
    prior_scale
        Standard deviation of that prior.
    sampled_kl
        Estimate the divergences at the draws instead of in closed form.
    """

    def __init__(
        self,
        mask: BernoulliMask | BetaBernoulliMask | None,
        embedding: FreeGaussian | AmortizedEmbedding | PointEmbedding,
        *,
        prior_scale: float,
        sampled_kl: bool,
    ) -> None:
        super().__init__()
        self.mask, self.embedding = mask, embedding
        self.prior_scale, self.sampled_kl = prior_scale, sampled_kl

    def draw(
        self,
        pairs: Pairs,
        n_particles: int,
        *,
        per_cell: bool,
        sample: bool = True,
        sampled_kl: bool | None = None,
        generator: Generator | None = None,
    ) -> EffectDraw:
        """Draw effects of the treatments of a batch; ``sample=False`` takes posterior means and no divergence."""
        if per_cell and sample:
            treatment = pairs.treatment
            row_of_pair = torch.arange(len(treatment), device=treatment.device)
        else:
            treatment, row_of_pair = torch.unique(pairs.treatment, return_inverse=True)
        if not sample:
            rows = self._mean(treatment).expand(n_particles, -1, -1)
            nothing = rows.new_zeros(1, len(treatment))
            return EffectDraw(rows, nothing, nothing, row_of_pair, treatment)
        return self._draw_rows(treatment, row_of_pair, n_particles, sampled_kl, generator)

    def draw_noise(self, shape: tuple[int, int, int], generator: Generator | None = None) -> EffectNoise:
        """Draw what :meth:`at` needs for effects of a shape ``(n_particles, n_pairs, n_latent)``."""
        device, none = next(self.parameters()).device, (*shape[:2], 0)
        is_point = isinstance(self.embedding, PointEmbedding)
        return EffectNoise(
            torch.rand(none if self.mask is None else shape, generator=generator, device=device),
            torch.randn(none if is_point else shape, generator=generator, device=device),
        )

    @property
    def is_amortized(self) -> bool:
        """Whether the posterior of an embedding is a network of its mask."""
        return isinstance(self.embedding, AmortizedEmbedding)

    def at(self, treatment: Tensor, noise: EffectNoise, n_particles: int) -> Tensor:
        """Return the effects ``e * m`` of pairs at given noise, ``(n_particles, n_pairs, n_latent)``; no gradient of masks.

        With noise for half of the particles, two neighbours share a mask and have embeddings on opposite sides of its mean.
        """
        mask = None
        if self.mask is not None:
            mask = (noise.mask > torch.sigmoid(-self.mask.logits[treatment])).to(self.mask.logits)
        if isinstance(self.embedding, PointEmbedding):
            embedding = self.embedding.loc[treatment]
        else:
            posterior = self.embedding(treatment, mask)
            embedding = torch.addcmul(posterior.loc, posterior.scale, noise.embedding)
            if len(noise.embedding) < n_particles:
                opposite = torch.addcmul(posterior.loc, posterior.scale, noise.embedding, value=-1)
                embedding = torch.stack([embedding, opposite], 1)  # (n_particles / 2, 2, n_pairs, n_latent)
                embedding = embedding if mask is None else embedding * mask[:, None]
                return embedding.flatten(0, 1)[:n_particles]
        return embedding if mask is None else mask * embedding

    def draw_all(self, n_treatments: int, generator: Generator | None = None) -> EffectDraw:
        """Draw every treatment once, with divergences at the draw; ``row_of_pair`` is to be set to the pairs' treatments."""
        treatment = torch.arange(n_treatments, device=next(self.parameters()).device)
        return self._draw_rows(treatment, treatment, 1, sampled_kl=True, generator=generator)

    def _draw_rows(
        self,
        treatment: Tensor,
        row_of_pair: Tensor,
        n_particles: int,
        sampled_kl: bool | None,
        generator: Generator | None,
    ) -> EffectDraw:
        sampled = self.sampled_kl if sampled_kl is None else sampled_kl
        mask = None if self.mask is None else self.mask.draw(treatment, n_particles, generator)
        if isinstance(self.embedding, PointEmbedding):
            embedding = self.embedding.loc[treatment].expand(n_particles, -1, -1)
            kl = embedding.new_zeros(1, len(treatment))
        else:
            posterior = self.embedding(treatment, mask)
            loc = posterior.loc.expand(n_particles, *posterior.loc.shape[-2:])
            embedding = loc + posterior.scale * normal_like(loc, generator)
            kl = self._embedding_kl(posterior, embedding, sampled=sampled)
        if self.mask is None or mask is None:
            return EffectDraw(embedding, kl, torch.zeros_like(kl), row_of_pair, treatment)
        terms = self.mask.terms(treatment, mask, sampled=sampled, generator=generator)
        return EffectDraw(mask * embedding, kl + terms.kl, terms.log_prior, row_of_pair, treatment)

    def _embedding_kl(self, posterior: Normal, embedding: Tensor, *, sampled: bool) -> Tensor:
        if sampled:
            log_prior = normal_log_prob(embedding, 0.0, self.prior_scale)
            return (posterior.log_prob(embedding) - log_prior).sum(-1)
        kl = gaussian_kl(posterior.loc, posterior.scale, 0.0, self.prior_scale).sum(-1)
        return kl if kl.dim() == 2 else kl[None]

    def _mean(self, treatment: Tensor) -> Tensor:
        """Return the expected effects of rows, shape ``(1, n_rows, n_latent)``."""
        return self.summary(treatment)["expected"][None]

    def summary(self, treatment: Tensor) -> dict[str, Tensor]:
        """Return ``expected`` effect, ``mask_prob``, ``embedding_mean`` and ``embedding_std``, shape ``(n_rows, n_latent)``.

        Where the embedding depends on the mask, its moments are averages over 128 drawn masks, the same at every call.
        """
        if isinstance(self.embedding, AmortizedEmbedding):
            return self._amortized_summary(treatment)
        if isinstance(self.embedding, PointEmbedding):
            mean = self.embedding.loc[treatment]
            std = torch.zeros_like(mean)
        else:
            posterior = self.embedding(treatment)
            mean, std = posterior.mean, posterior.stddev
        probability = torch.ones_like(mean) if self.mask is None else self.mask.probability[treatment]
        return {"expected": probability * mean, "mask_prob": probability, "embedding_mean": mean, "embedding_std": std}

    def _amortized_summary(self, treatment: Tensor) -> dict[str, Tensor]:
        probability = self.mask.probability  # type: ignore[union-attr]
        generator = torch.Generator(probability.device).manual_seed(0)
        half = torch.rand((N_MASK_DRAWS // 2, *probability.shape), generator=generator, device=probability.device)
        probability = probability[treatment]
        mask = (torch.cat([half, 1 - half])[:, treatment] < probability).float()
        posterior = self.embedding(treatment, mask)
        return {
            "expected": (mask * posterior.mean).mean(0),
            "mask_prob": probability,
            "embedding_mean": posterior.mean.mean(0),
            "embedding_std": (posterior.variance.mean(0) + posterior.mean.var(0, unbiased=False)).sqrt(),
        }
