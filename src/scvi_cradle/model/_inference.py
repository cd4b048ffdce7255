"""Latent representations and bounds of the likelihood of given cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.model._base import LabelledModel
from scvi_cradle.model._draws import as_module_input
from scvi_cradle.module.base import importance_weighted_bound


class InferenceMixin(LabelledModel):
    """Posterior queries."""

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        component: str | None = None,
        give_mean: bool = True,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Return latent variables of cells.

        Parameters
        ----------
        adata, indices
            Cells; default: the model's own.
        component
            ``"basal"`` (default), ``"perturbation"``, ``"artifact"`` or ``"full"`` (the three side by side).
        give_mean
            Posterior means instead of a draw.
        batch_size
            Cells encoded at once.

        Returns
        -------
        Array of shape ``(n_cells, n_latent)``, or ``(n_cells, 3 * n_latent)`` for ``"full"``.

        Raises
        ------
        ValueError
            For an unknown component.
        """
        component = component or "basal"
        check_one_of("component", component, ("basal", "perturbation", "artifact", "full"))
        parts = []
        for _, latent in self._latent_batches(adata, indices, batch_size, n_samples=1, sample=not give_mean):
            values = {"basal": latent.z_basal, "perturbation": latent.z_perturbation, "artifact": latent.z_artifact}
            chosen = values.values() if component == "full" else [values[component]]
            parts.append(torch.cat([v[0] for v in chosen], dim=-1).cpu().numpy())
        return np.concatenate(parts)

    @torch.inference_mode()
    def get_iwelbo(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        n_particles: int = 100,
        score_global: bool = False,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Return the importance-weighted bound of every cell (SAMS-VAE, eq. 7, per cell as in its evaluation).

        ``logsumexp_k [log p(x | .) + log p(z_b) - log q(z_b)] - log K``, with K draws of the global variables that all
        cells share.

        Parameters
        ----------
        adata, indices
            Cells; default: the model's own.
        n_particles
            K.
        score_global
            Add each cell's share of the global terms, ``1{dosage != 0} / n_t`` and ``artifact / n_failed``.
        batch_size
            Cells at once.

        Returns
        -------
        Array of shape ``(n_cells,)``, in nats.
        """
        check_positive("n_particles", n_particles, integer=True)
        seed = int(torch.randint(2**31 - 1, (1,)))
        device, bounds = self.module.device, []
        loader = self._loader(adata, indices, batch_size)
        weights: list[list[Tensor]] = []
        for particle in range(n_particles):
            globals_ = _draw_globals(self.module, torch.Generator(device=device).manual_seed(seed + particle))
            local = torch.Generator(device=device).manual_seed(seed + n_particles + particle)
            for i, tensors in enumerate(loader):
                log_weight = _log_weight(
                    self.module, as_module_input(tensors, device), globals_, local, score_global=score_global
                )
                if particle == 0:
                    weights.append([])
                weights[i].append(log_weight)
        for batch in weights:
            bounds.append(importance_weighted_bound(torch.stack(batch)).cpu().numpy())
        return np.concatenate(bounds)

    @torch.inference_mode()
    def get_elbo(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        n_particles: int = 1,
        batch_size: int | None = None,
    ) -> float:
        """Return the mean ELBO per cell in nats (higher is better), each cell with its share of the global terms.

        Parameters
        ----------
        adata, indices
            Cells; default: the model's own.
        n_particles
            Draws per cell.
        batch_size
            Cells at once.
        """
        total, n = 0.0, 0
        module = self.module
        for tensors, outputs in self._batches_with_outputs(adata, indices, batch_size, n_samples=n_particles):
            decoded = module.generative(**module._get_generative_input(tensors, outputs))
            loss = module.loss(tensors, outputs, decoded, n_obs=1)
            n_cells = len(tensors[REGISTRY_KEYS.X_KEY])
            total += float(loss.reconstruction_loss_sum + loss.kl_local_sum + loss.kl_global_sum * n_cells)
            n += n_cells
        return -total / n

    @torch.inference_mode()
    def get_reconstruction_error(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        n_particles: int = 1,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """Return ``{"reconstruction_loss": ...}``: the mean of ``-log p(x | z)`` per cell in nats, at draws of the posterior.

        Parameters
        ----------
        adata, indices
            Cells; default: the model's own.
        n_particles
            Draws per cell.
        batch_size
            Cells at once.
        """
        total, n = 0.0, 0
        module = self.module
        for tensors, outputs in self._batches_with_outputs(adata, indices, batch_size, n_samples=n_particles):
            decoded = module.generative(**module._get_generative_input(tensors, outputs))
            loss = module.loss(tensors, outputs, decoded)
            total += float(loss.reconstruction_loss_sum)
            n += len(tensors[REGISTRY_KEYS.X_KEY])
        return {"reconstruction_loss": total / n}

    def _batches_with_outputs(self, adata: AnnData | None, indices: Any, batch_size: int | None, **kwargs: Any) -> Any:
        self._check_if_trained(warn=False)
        self.module.eval()
        for tensors in self._loader(adata, indices, batch_size):
            tensors = as_module_input(tensors, self.module.device)
            yield tensors, self.module.inference(**self.module._get_inference_input(tensors), **kwargs)

    def _latent_batches(self, adata: AnnData | None, indices: Any, batch_size: int | None, **kwargs: Any) -> Any:
        for tensors, outputs in self._batches_with_outputs(adata, indices, batch_size, **kwargs):
            yield tensors, outputs["latent"]


def _draw_globals(module: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw one set of masks, embeddings and the artifact vector, with their log-density ratios ``log p - log q``."""
    effects, artifact = module.effects, module.artifact
    probability = torch.sigmoid(effects.mask_logits)
    mask = (torch.rand(probability.shape, generator=generator, device=probability.device) < probability).float()
    treatment = torch.arange(len(mask), device=mask.device)
    posterior = effects.embedding_posterior(treatment, mask[None])
    loc, scale = posterior.loc.reshape(mask.shape), posterior.scale.reshape(mask.shape)
    embedding = loc + scale * torch.randn(mask.shape, generator=generator, device=mask.device)
    prior_logit = torch.full_like(effects.mask_logits, effects.mask_prior_logit)
    ratio = (
        Bernoulli(logits=prior_logit, validate_args=False).log_prob(mask)
        - Bernoulli(logits=effects.mask_logits, validate_args=False).log_prob(mask)
        + Normal(0.0, effects.embedding_prior_scale, validate_args=False).log_prob(embedding)
        - Normal(loc, scale, validate_args=False).log_prob(embedding)
    ).sum(-1)
    vector, _ = artifact.draw(1, 1, generator=generator)
    vector_ratio = vector.new_zeros(())
    if artifact.posterior is not None:
        prior = Normal(0.0, artifact.prior_scale, validate_args=False)
        vector_ratio = (prior.log_prob(vector) - artifact.posterior().log_prob(vector)).sum()
    return {"effects": mask * embedding, "ratio": ratio, "vector": vector[0], "vector_ratio": vector_ratio}


def _log_weight(
    module: Any,
    tensors: dict[str, Tensor],
    globals_: dict[str, Tensor],
    generator: torch.Generator,
    *,
    score_global: bool,
) -> Tensor:
    """Return ``log p(x | .) + log p(z_b) - log q(z_b)`` of cells at one draw of the global variables, ``(n_cells,)``."""
    inputs = module._get_inference_input(tensors)
    x, artifact = inputs["x"], inputs["artifact"]
    pairs = module.pairs(inputs["label"], inputs["dosage"])
    z_perturbation = x.new_zeros(len(x), globals_["effects"].shape[1])
    z_perturbation = z_perturbation.index_add(
        0, pairs.cell, globals_["effects"][pairs.treatment] * pairs.dose[:, None]
    )[None]
    z_artifact = (globals_["vector"] * artifact)[None]
    first = module.encoder.first
    offsets = [
        first.project(k, v)
        for k, v in (("perturbation", z_perturbation), ("artifact", z_artifact))
        if k in module.offsets
    ]
    q = module.encoder(first.project("x", module.standardize(x))[None], *offsets)
    noise = torch.randn(q.loc.shape, generator=generator, device=x.device)
    z_basal = q.loc + q.scale * noise
    features = module.decoder.features_of(z_basal, z_perturbation, z_artifact, module.covariates(tensors))
    library = x.sum(1, keepdim=True).clamp_min(1)
    log_weight = module.decoder.log_prob(x, features, library)
    log_weight = log_weight + (-0.5 * (z_basal.square() + math.log(2 * math.pi)) - q.log_prob(z_basal)).sum(-1)
    if score_global:
        n_obs = module.n_obs_per_treatment
        share = torch.where(n_obs > 0, globals_["ratio"] / n_obs.clamp_min(1), torch.zeros_like(n_obs))
        log_weight = log_weight.index_add(1, pairs.cell, share[pairs.treatment][None])
        log_weight = log_weight + globals_["vector_ratio"] * artifact[:, 0] / module.n_failed.clamp_min(1)
    return log_weight[0]
