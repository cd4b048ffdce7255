"""Latent representations and bounds of the likelihood of given cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.model._base import LabelledModel
from scvi_cradle.model._draws import as_module_input
from scvi_cradle.module.base import importance_weighted_bound, library_size


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
        self._trained_counts()
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
        batch_size: int | None = None,
        *,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
        return_mean: bool = True,
        n_particles: int = 1,
    ) -> float | np.ndarray:
        """Return the ELBO in nats (higher is better), each cell with its share of the global terms.

        Parameters
        ----------
        adata, indices
            Cells; default: the model's own.
        batch_size
            Cells at once.
        dataloader
            Batches of tensors, instead of ``adata``.
        return_mean
            The mean over cells, or one value per cell, shape ``(n_cells,)``.
        n_particles
            Draws per cell.
        """
        values = []
        for tensors, outputs in self._batches_with_outputs(
            adata, indices, batch_size, dataloader, n_samples=n_particles
        ):
            error, kl_basal, kl_global = _elbo_terms(self.module, tensors, outputs)
            values.append((-error - kl_basal - kl_global).cpu().numpy())
        elbo = np.concatenate(values)
        return float(elbo.mean(dtype=np.float64)) if return_mean else elbo

    @torch.inference_mode()
    def get_reconstruction_error(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
        return_mean: bool = True,
        n_particles: int = 1,
    ) -> dict[str, Any]:
        """Return ``{"reconstruction_loss": ...}``: ``-log p(x | z)`` in nats, at draws of the posterior.

        Parameters
        ----------
        adata, indices, batch_size, dataloader, return_mean, n_particles
            As in :meth:`get_elbo`.
        """
        values = []
        for tensors, outputs in self._batches_with_outputs(
            adata, indices, batch_size, dataloader, n_samples=n_particles
        ):
            values.append(_elbo_terms(self.module, tensors, outputs)[0].cpu().numpy())
        error = np.concatenate(values)
        return {"reconstruction_loss": float(error.mean(dtype=np.float64)) if return_mean else error}

    def _batches_with_outputs(
        self,
        adata: AnnData | None,
        indices: Any,
        batch_size: int | None,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        self._trained_counts()
        self.module.eval()
        for tensors in self._loader(adata, indices, batch_size) if dataloader is None else dataloader:
            moved = as_module_input(tensors, self.module.device)
            yield moved, self.module.inference(**self.module._get_inference_input(moved), **kwargs)

    def _latent_batches(
        self, adata: AnnData | None, indices: Any, batch_size: int | None, **kwargs: Any
    ) -> Iterator[tuple[dict[str, Tensor], Any]]:
        for tensors, outputs in self._batches_with_outputs(adata, indices, batch_size, **kwargs):
            yield tensors, outputs["latent"]


def _elbo_terms(module: Any, tensors: dict[str, Tensor], outputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return reconstruction error, divergence of ``z_b`` and share of the global divergences of every cell, ``(n_cells,)``."""
    latent, pairs = outputs["latent"], outputs["pairs"]
    loss = module.loss(tensors, outputs, module.generative(**module._get_generative_input(tensors, outputs)))
    n_obs = module.n_obs_per_treatment[pairs.treatment]
    share = torch.where(n_obs > 0, latent.effects.kl.mean(0)[latent.effects.row_of_pair] / n_obs.clamp_min(1), 0.0)
    error = loss.reconstruction_loss["reconstruction_loss"]
    kl_global = torch.zeros_like(error).index_add(0, pairs.cell, share)
    artifact = module._get_inference_input(tensors)["artifact"][:, 0]
    return error, loss.kl_local["kl_basal"], kl_global + latent.kl_artifact * artifact / module.n_failed.clamp_min(1)


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
    log_weight = module.decoder.log_prob(x, features, library_size(x))
    log_weight = log_weight + (-0.5 * (z_basal.square() + math.log(2 * math.pi)) - q.log_prob(z_basal)).sum(-1)
    if score_global:
        n_obs = module.n_obs_per_treatment
        share = torch.where(n_obs > 0, globals_["ratio"] / n_obs.clamp_min(1), torch.zeros_like(n_obs))
        log_weight = log_weight.index_add(1, pairs.cell, share[pairs.treatment][None])
        log_weight = log_weight + globals_["vector_ratio"] * artifact[:, 0] / module.n_failed.clamp_min(1)
    return log_weight[0]
