"""What the modules share: inputs, statistics of the training cells, terms of the bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import BaseModuleClass, LossOutput
from torch import Generator, Tensor
from torch.distributions import Normal
from torch.nn.functional import one_hot

from scvi_cradle._constants import KEYS
from scvi_cradle.module.base._effects import EffectDraw, EffectNoise, Pairs
from scvi_cradle.module.base._elbo import gaussian_kl, importance_weighted_bound, normal_log_prob
from scvi_cradle.module.base._embeddings import normal_like
from scvi_cradle.module.base._likelihood import library_size

Objective = Literal["elbo", "iwelbo"]


class LatentDraw(NamedTuple):
    """What ``inference`` draws; the leading axis is the particle.

    Parameters
    ----------
    q_basal, z_basal
        Posterior of the cell's latent state and a draw from it, shape ``(n_particles, n_cells, n_latent)``.
    prior_mean
        Mean of the prior of that state, same shape (or 0); its standard deviation is 1.
    effects
        :class:`EffectDraw` of the treatments, if the model has effects.
    z_perturbation
        Their sum per cell, shape ``(n_particles, n_cells, n_latent)``.
    """

    q_basal: Normal
    z_basal: Tensor
    prior_mean: Tensor | float = 0.0
    effects: Any = None
    z_perturbation: Any = None


class PerturbationModule(BaseModuleClass):
    """Inputs and bounds of the models with a latent state per cell and global treatment effects.

    A module adds the parts ``encoder``, ``decoder`` and ``effects`` and, beside scvi-tools' methods, the answers to three
    questions: which latent parts a new cell has (``prior``), which ones a given cell would have under another treatment
    (``intervene``), and what a cell's latent parts are called (``components``).

    Parameters
    ----------
    n_genes, n_treatments
        Sizes of the data.
    n_levels
        Numbers of categories of the batch and of each categorical covariate (one-hot inputs of the decoder).
    n_continuous
        Number of continuous covariates.
    n_latent
        Width of the latent state.
    n_particles
        Draws per cell in training.
    per_cell
        Draw the global variables per cell instead of per batch.
    sampled_kl
        Estimate divergences at the draws instead of in closed form.
    log_input
        Whether the encoder sees ``log(1 + x)`` (counts) or ``x``, both standardised.
    """

    input_mean: Tensor
    input_std: Tensor
    n_obs_per_treatment: Tensor
    n_train: Tensor
    label_members: Tensor
    effects: Any
    encoder: Any
    decoder: Any
    has_artifact = False
    objectives: tuple[str, ...] = ("elbo", "iwelbo")
    beside_full: tuple[str, ...] = ()  # components that are no latent variables

    def __init__(
        self,
        n_genes: int,
        n_treatments: int,
        *,
        n_levels: tuple[int, ...],
        n_continuous: int,
        n_latent: int,
        n_particles: int,
        per_cell: bool,
        sampled_kl: bool,
        log_input: bool = True,
    ) -> None:
        super().__init__()
        self.n_treatments, self.n_latent = n_treatments, n_latent
        self.n_particles, self.per_cell = n_particles, per_cell
        self.sampled_kl, self.log_input = sampled_kl, log_input
        self.n_levels = tuple(n if n > 1 else 0 for n in n_levels)
        self.n_covariates = sum(self.n_levels) + n_continuous
        self.objective: Objective = "elbo"
        self.effects = None
        self.prior_weight_per_cell = 0.0
        self.register_buffer("input_mean", torch.zeros(n_genes))
        self.register_buffer("input_std", torch.ones(n_genes))
        self.register_buffer("n_obs_per_treatment", torch.zeros(n_treatments))
        self.register_buffer("n_train", torch.zeros(()))
        self.register_buffer("label_members", torch.full((1, 1), -1), persistent=False)

    # ---- inputs -----------------------------------------------------------------------------------------------------

    def set_labels(self, members: np.ndarray) -> None:
        """Set the treatments of every label code, padded with -1, shape ``(n_labels, width)``.

        The codes of training labels come first and never change; those of a query's new combinations follow.
        """
        self.label_members = torch.as_tensor(members, device=self.input_mean.device)

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:
        label = tensors[KEYS.PERTURBATION].reshape(-1).long()
        return {"x": tensors[REGISTRY_KEYS.X_KEY], "label": label, "dosage": tensors.get(KEYS.DOSAGE)}

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        outputs = {key: inference_outputs[key] for key in ("latent", "pairs")}
        return outputs | {"covariates": self.covariates(tensors)}

    def covariates(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the covariate design of the decoder, shape ``(n_cells, n_covariates)``."""
        codes = [tensors[REGISTRY_KEYS.BATCH_KEY]]
        if REGISTRY_KEYS.CAT_COVS_KEY in tensors:
            codes.append(tensors[REGISTRY_KEYS.CAT_COVS_KEY])
        columns = torch.cat([c.long() for c in codes], dim=1).unbind(1)
        parts = [one_hot(c, n).float() for c, n in zip(columns, self.n_levels, strict=True) if n]
        if REGISTRY_KEYS.CONT_COVS_KEY in tensors:
            parts.append(tensors[REGISTRY_KEYS.CONT_COVS_KEY])
        return torch.cat(parts, dim=1) if parts else codes[0].new_zeros(len(codes[0]), 0).float()

    def pairs(self, label: Tensor, dosage: Tensor | None = None) -> Pairs:
        """Return the non-zero dosages of cells, from their label codes or from a dosage matrix."""
        if dosage is not None:
            cell, treatment = dosage.nonzero(as_tuple=True)
            return Pairs(cell, treatment, dosage[cell, treatment], len(dosage))
        return Pairs.from_members(self.label_members[label])

    def standardize(self, *blocks: Tensor) -> Tensor:
        """Return ``log(1 + x)`` (or ``x``) minus mean over standard deviation of the training cells, of blocks of rows."""
        if len(blocks) > 1:
            values = torch.cat(blocks)
            values = values.log1p_() if self.log_input else values
        else:
            values = blocks[0].log1p() if self.log_input else blocks[0].clone()
        return values.sub_(self.input_mean).div_(self.input_std)

    # ---- draws ------------------------------------------------------------------------------------------------------

    def draw_effects(
        self,
        pairs: Pairs,
        n_particles: int,
        *,
        sample: bool = True,
        effects: EffectDraw | None = None,
        generator: Generator | None = None,
    ) -> EffectDraw:
        """Return a draw of the treatment effects for the pairs of a batch; a given draw of all treatments is used as it is."""
        if effects is not None:
            return effects._replace(row_of_pair=pairs.treatment)
        sampled_kl = True if self.objective == "iwelbo" else None
        return self.effects.draw(
            pairs, n_particles, per_cell=self.per_cell, sample=sample, sampled_kl=sampled_kl, generator=generator
        )

    def new_effects(
        self, pairs: Pairs, n_particles: int, noise: EffectNoise | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Return the effects of new cells, drawn pair by pair or at given noise, ``(n_particles, n_cells, n_latent)``."""
        if noise is None:
            noise = self.effects.draw_noise((n_particles, len(pairs.treatment), self.n_latent), generator)
        return pairs.total(self.effects.at(pairs.treatment, noise, n_particles))

    def draw_globals(self, generator: Generator | None = None) -> dict[str, Any]:
        """Draw all global variables once; the result is an argument of ``inference``."""
        return {} if self.effects is None else {"effects": self.effects.draw_all(self.n_treatments, generator)}

    # ---- bounds -----------------------------------------------------------------------------------------------------

    def kl_basal(self, latent: Any, *, sampled: bool | None = None) -> Tensor:
        """Return the divergence of the cells' latent states from their prior, shape ``(n_particles, n_cells)``."""
        q, mean = latent.q_basal, latent.prior_mean
        if self.sampled_kl if sampled is None else sampled:
            return (q.log_prob(latent.z_basal) - normal_log_prob(latent.z_basal, mean, 1.0)).sum(-1)
        return gaussian_kl(q.loc, q.scale, mean, 1.0).sum(-1)

    def divergences(self, latent: Any) -> dict[str, Tensor]:
        """Return the divergence of every latent part in closed form, by name, each ``(n_particles, n_cells)``."""
        return {"kl_basal": self.kl_basal(latent, sampled=False)}

    def global_shares(self, latent: Any, pairs: Pairs, inputs: dict[str, Any]) -> Tensor:
        """Return what every cell carries of the global divergences, shape ``(n_particles or 1, n_cells)``.

        Over the training cells the shares add up to the divergences.
        """
        if latent.effects is None:
            return latent.z_basal.new_zeros(1, pairs.n_cells)
        return latent.effects.shares(pairs, self.n_obs_per_treatment)

    def reconstruction_weights(self, inputs: dict[str, Any]) -> Tensor:
        """Return the weight of every cell in the reconstruction term, shape ``(n_cells,)``."""
        return torch.ones_like(inputs["x"][:, 0])

    def log_weights(
        self, tensors: dict[str, Tensor], outputs: dict[str, Any], features: Tensor, *, score_global: bool
    ) -> Tensor:
        """Return ``log p(x | .) + log p(z) - log q(z)`` at the draws, shape ``(n_particles, n_cells)``.

        ``score_global`` adds each cell's share of the global terms, which must have been evaluated at the draws.
        """
        x, latent = tensors[REGISTRY_KEYS.X_KEY], outputs["latent"]
        value = self.decoder.log_prob(x, features, library_size(x)) - self.kl_basal(latent, sampled=True)
        if not score_global:
            return value
        return value - self.global_shares(latent, outputs["pairs"], self._get_inference_input(tensors))

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Tensor],
        kl_weight: float = 1.0,
        n_obs: int = 1,
    ) -> LossOutput:
        """Return the negative bound per cell, averaged over the batch: the ELBO, or the importance-weighted ELBO."""
        x, latent, pairs = tensors[REGISTRY_KEYS.X_KEY], inference_outputs["latent"], inference_outputs["pairs"]
        features = generative_outputs["features"]
        n_particles, n_cells = latent.z_basal.shape[:2]
        inputs = self._get_inference_input(tensors)
        kl_basal = self.kl_basal(latent).mean(0)
        shares = self.global_shares(latent, pairs, inputs).mean(0)  # (n,)
        extra: Tensor | float = 0.0
        if self.prior_weight_per_cell:  # of training alone, no part of the bound
            log_priors = latent.effects.log_priors(pairs, self.n_obs_per_treatment)
            extra = -self.prior_weight_per_cell * log_priors.mean()
        if self.objective == "iwelbo":
            log_weights = self.log_weights(tensors, inference_outputs, features, score_global=True)
            loss = -importance_weighted_bound(log_weights).mean() + extra
            error = -(log_weights.mean(0) + shares + self.kl_basal(latent, sampled=True).mean(0)).detach()
        else:
            weight = self.reconstruction_weights(inputs) / (n_particles * n_cells)
            weighted, log_prob = self.decoder.weighted_log_prob(x, features, library_size(x), weight)
            loss = -weighted + kl_weight * ((kl_basal + shares).mean() + extra)
            error = -log_prob.mean(0)
        return LossOutput(
            loss=loss,
            reconstruction_loss=error,
            kl_local={"kl_basal": kl_basal.detach()},
            kl_global=(shares.mean() * n_obs).detach(),  # unbiased for the whole data set
            extra_metrics={"kl_treatment": shares.mean().detach()},
        )


def posterior_of_cells(
    encoder: Callable[..., Normal], x_projected: Tensor, offsets: tuple[Tensor, ...], n_particles: int
) -> Normal:
    """Return the posterior of the cells' latent states with all particles, shape ``(n_particles, n_cells, n_latent)``."""
    q = encoder(x_projected, *offsets)
    return q.expand((n_particles, *q.batch_shape[-2:]))


def sample_normal(q: Normal, *, sample: bool, generator: Generator | None) -> Tensor:
    """Draw from a normal, or return its mean."""
    return q.loc + q.scale * normal_like(q.loc, generator) if sample else q.loc
