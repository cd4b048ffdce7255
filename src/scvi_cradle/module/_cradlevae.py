"""Module of CRADLE-VAE."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import Generator, Tensor
from torch.distributions import Normal
from torch.nn.functional import one_hot

from scvi_cradle._constants import KEYS
from scvi_cradle.module.base import (
    ArtifactLatent,
    BasalEncoder,
    EffectDraw,
    NegativeBinomialDecoder,
    Pairs,
    References,
    SparseEffects,
    gaussian_kl,
    library_size,
    normal_like,
)

Posterior = Literal["correlated", "correlated_basal", "correlated_embedding", "mean_field"]


class LatentDraw(NamedTuple):
    """What :meth:`CradleVAEModule.inference` draws; the leading axis is the particle."""

    effects: EffectDraw
    z_perturbation: Tensor  # (P, n, D)
    artifact_vector: Tensor  # (P, n or 1, D)
    kl_artifact: Tensor  # ()
    z_artifact: Tensor  # (P, n, D)
    q_basal: Normal  # (P, n, D)
    z_basal: Tensor  # (P, n, D)
    offsets: tuple[Tensor, ...]  # what the encoder adds for effects (P, n, H) and for the artifact; empty: mean field


class CradleVAEModule(BaseModuleClass):
    r"""CRADLE-VAE (Baek et al. 2024, eqs. 1-5 and Alg. 1-3).

    .. math::
        m_t \sim \mathrm{Bern}(\alpha),\quad e_t \sim N(0, s^2 I),\quad u \sim N(0, s^2 I),\quad z^b_i \sim N(0, I)

        z^p_i = \sum_t p_{it}\, (e_t \circ m_t),\quad z^a_i = a_i u,\quad
        x_i \sim \mathrm{NB}\big(l_i\, \mathrm{softmax}(f(z^b_i, z^p_i, z^a_i)), \theta\big)

    The objective is ``-ELBO + cf_weight * KL(q(z_b | reference, z_p, u) || q(z_b | x, z_p, u))``, the second term over
    cells that passed QC and whose label has failed training cells. Global terms carry the weights
    ``1{p_it != 0} / n_t`` and ``a_i / n_failed`` per cell, so that one epoch counts each once.

    Parameters
    ----------
    n_genes, n_treatments
        Sizes of the data.
    n_levels
        Numbers of categories of the batch and of each categorical covariate (one-hot inputs of the decoder).
    n_continuous
        Number of continuous covariates.
    n_latent, n_hidden, n_layers_encoder, n_layers_decoder
        Sizes of the networks.
    mask_prior_logit
        Log-odds of a mask entry being one.
    embedding_prior_scale
        Standard deviation ``s`` of embeddings and of ``u``.
    posterior
        ``"correlated_basal"``: the encoder of ``z_b`` sees ``z_p`` and ``z_a``; ``"correlated_embedding"``:
        ``q(e | m)`` is a network; ``"correlated"``: both; ``"mean_field"``: neither.
    embedding_n_layers, embedding_n_hidden
        Size of that network.
    embedding_init_scale, artifact_init_scale, mask_init_logit
        Start of the posteriors of ``e``, ``u`` and ``m``.
    gs_temperature
        Temperature of the relaxed Bernoulli.
    combine, effect_path
        How the decoder takes the latent parts (see :class:`NegativeBinomialDecoder`).
    artifact_latent
        ``"gaussian"``, or ``"embedding"`` for a plain vector ("w/o Causal").
    draws, n_particles
        One draw of the global variables per cell or per batch, and the number of particles.
    kl
        Divergences in closed form or at the draws.
    cf_weight, cf_reduction, cf_direction, cf_detach_reference, share_global_samples
        The counterfactual term (see the user guide).
    cf_resample, cf_n_samples, cf_statistic
        Draw a new reference of ``cf_n_samples`` failed cells for every batch instead of one fixed profile per label.
    reconstruction_balance
        ``"none"``, ``"batch"`` (published code) or ``"dataset"`` (0.5 over the frequency of the flag).
    """

    input_mean: Tensor
    input_std: Tensor
    n_obs_per_treatment: Tensor
    n_failed: Tensor
    n_train: Tensor
    label_members: Tensor

    def __init__(
        self,
        n_genes: int,
        n_treatments: int,
        *,
        n_levels: tuple[int, ...],
        n_continuous: int,
        n_latent: int,
        n_hidden: int,
        n_layers_encoder: int,
        n_layers_decoder: int,
        mask_prior_logit: float,
        embedding_prior_scale: float,
        posterior: Posterior,
        embedding_n_layers: int,
        embedding_n_hidden: int,
        embedding_init_scale: float,
        artifact_init_scale: float,
        mask_init_logit: float,
        gs_temperature: float,
        combine: Literal["concat", "sum"],
        effect_path: Literal["linear", "decoder", "both"],
        artifact_latent: Literal["gaussian", "embedding"],
        draws: Literal["cell", "batch"],
        n_particles: int,
        kl: Literal["analytic", "sampled"],
        cf_weight: float,
        cf_reduction: Literal["mean", "sum"],
        cf_direction: Literal["reference_first", "counterfactual_first"],
        cf_detach_reference: bool,
        cf_resample: bool,
        cf_n_samples: int,
        cf_statistic: Literal["median", "mean"],
        share_global_samples: bool,
        reconstruction_balance: Literal["none", "batch", "dataset"],
    ) -> None:
        super().__init__()
        self.n_levels = tuple(n if n > 1 else 0 for n in n_levels)
        self.per_cell, self.n_particles, self.sampled_kl = draws == "cell", n_particles, kl == "sampled"
        self.cf_weight, self.cf_reduction, self.cf_direction = cf_weight, cf_reduction, cf_direction
        self.cf_detach_reference, self.share_global_samples = cf_detach_reference, share_global_samples
        self.reconstruction_balance = reconstruction_balance

        sees_effects = posterior in ("correlated", "correlated_basal")
        self.offsets = ("perturbation", "artifact") if sees_effects else ()
        self.encoder = BasalEncoder(n_genes, n_latent, n_hidden, n_layers_encoder, self.offsets)
        self.decoder = NegativeBinomialDecoder(
            n_genes,
            n_latent,
            n_hidden,
            n_layers_decoder,
            n_covariates=sum(self.n_levels) + n_continuous,
            combine=combine,
            effect_path=effect_path,
        )
        self.effects = SparseEffects(
            n_treatments,
            n_latent,
            mask_prior_logit=mask_prior_logit,
            embedding_prior_scale=embedding_prior_scale,
            amortized=posterior in ("correlated", "correlated_embedding"),
            n_layers=embedding_n_layers,
            n_hidden=embedding_n_hidden,
            mask_init_logit=mask_init_logit,
            embedding_init_scale=embedding_init_scale,
            temperature=gs_temperature,
            sampled_kl=self.sampled_kl,
        )
        self.artifact = ArtifactLatent(
            n_latent,
            gaussian=artifact_latent == "gaussian",
            prior_scale=embedding_prior_scale,
            init_scale=artifact_init_scale,
            sampled_kl=self.sampled_kl,
        )
        self.register_buffer("input_mean", torch.zeros(n_genes))
        self.register_buffer("input_std", torch.ones(n_genes))
        self.register_buffer("n_obs_per_treatment", torch.zeros(n_treatments))
        self.register_buffer("n_failed", torch.zeros(()))
        self.register_buffer("n_train", torch.zeros(()))
        self.register_buffer("label_members", torch.full((1, 1), -1), persistent=False)
        self.references = References(n_genes, resample=cf_resample, n_samples=cf_n_samples, statistic=cf_statistic)

    # ---- what comes from training cells -----------------------------------------------------------------------------

    def set_labels(self, members: np.ndarray) -> None:
        """Set the treatments of every label code, padded with -1, shape ``(n_labels, width)``.

        The codes of training labels come first and never change; those of a query's new combinations follow.
        """
        self.label_members = torch.as_tensor(members, device=self.input_mean.device)
        self.references.resize(len(members))

    # ---- inputs -----------------------------------------------------------------------------------------------------

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:
        x = tensors[REGISTRY_KEYS.X_KEY]
        label = tensors[KEYS.PERTURBATION].reshape(-1).long()
        artifact = tensors[KEYS.ARTIFACT] if KEYS.ARTIFACT in tensors else x.new_zeros(len(x), 1)
        return {"x": x, "label": label, "artifact": artifact, "dosage": tensors.get(KEYS.DOSAGE)}

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        return {
            "latent": inference_outputs["latent"],
            "pairs": inference_outputs["pairs"],
            "artifact": self._get_inference_input(tensors)["artifact"],
            "covariates": self.covariates(tensors),
        }

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

    def standardize(self, x: Tensor) -> Tensor:
        """Return ``(log(1 + x) - mean) / sd`` with the moments of the training cells."""
        return (x.log1p() - self.input_mean) / self.input_std

    # ---- inference --------------------------------------------------------------------------------------------------

    @auto_move_data
    def inference(
        self,
        x: Tensor,
        label: Tensor,
        artifact: Tensor,
        dosage: Tensor | None = None,
        n_samples: int | None = None,
        sample: bool = True,
        generator: Generator | None = None,
    ) -> dict[str, Any]:
        """Draw the latent variables of cells.

        Parameters
        ----------
        x, label, artifact, dosage
            Counts ``(n, n_genes)``, label codes ``(n,)``, flags ``(n, 1)``, dosages ``(n, n_treatments)`` or None.
        n_samples
            Number of particles; default: the module's.
        sample
            Whether to draw, or to take posterior means.
        generator
            Source of randomness; default: torch's global one.
        """
        n_particles = n_samples or self.n_particles
        pairs = self.pairs(label, dosage)
        x_projected = self.encoder.first.project("x", self.standardize(x))  # (n, H), once for all passes
        draw = self.effects.draw(pairs, n_particles, per_cell=self.per_cell, sample=sample, generator=generator)
        n_vectors = len(x) if self.per_cell else 1
        vector, kl_artifact = self.artifact.draw(n_particles, n_vectors, sample=sample, generator=generator)
        z_perturbation = draw.to_cells(draw.rows, pairs)  # (P, n, D)
        z_artifact = vector * artifact  # (P, n, D)
        offsets = self._encoder_offsets(draw, pairs, vector, artifact)
        q_basal = self.encoder(x_projected, *offsets)
        q_basal = q_basal.expand((n_particles, *q_basal.batch_shape[-2:]))
        z_basal = q_basal.loc + q_basal.scale * normal_like(q_basal.loc, generator) if sample else q_basal.loc
        latent = LatentDraw(draw, z_perturbation, vector, kl_artifact, z_artifact, q_basal, z_basal, offsets)
        return {"latent": latent, "pairs": pairs, "x_projected": x_projected}

    def _encoder_offsets(self, draw: EffectDraw, pairs: Pairs, vector: Tensor, artifact: Tensor) -> tuple[Tensor, ...]:
        """Project effects (once per row) and the artifact vector (once per draw) into the encoder's first layer."""
        if not self.offsets:
            return ()
        first = self.encoder.first
        effects = draw.to_cells(first.project("perturbation", draw.rows), pairs)  # (P, n, H)
        return effects, first.project("artifact", vector) * artifact

    @auto_move_data
    def generative(self, latent: LatentDraw, pairs: Pairs, artifact: Tensor, covariates: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the decoder's output layer, shape ``(n_particles, n_cells, n_features)``.

        Effects are projected once per row of their draw, the artifact vector once per draw.
        """
        decoder, projected = self.decoder, {"basal": self.decoder.project("basal", latent.z_basal)}
        projected["artifact"] = decoder.project("artifact", latent.artifact_vector) * artifact
        if "perturbation" in decoder.hidden_parts:
            projected["perturbation"] = latent.effects.to_cells(
                decoder.project("perturbation", latent.effects.rows), pairs
            )
        return {"features": decoder.features(projected, latent.z_perturbation, covariates)}

    # ---- objective --------------------------------------------------------------------------------------------------

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Tensor],
        kl_weight: float = 1.0,
        n_obs: int = 1,
    ) -> LossOutput:
        """Return the negative ELBO per cell plus the weighted counterfactual term, averaged over the batch."""
        x, latent, pairs = tensors[REGISTRY_KEYS.X_KEY], inference_outputs["latent"], inference_outputs["pairs"]
        inputs = self._get_inference_input(tensors)
        artifact, label = inputs["artifact"][:, 0], inputs["label"]
        n_particles, n_cells = latent.z_basal.shape[:2]
        weight = self.reconstruction_weights(artifact)
        weighted, log_prob = self.decoder.weighted_log_prob(
            x, generative_outputs["features"], library_size(x), weight / (n_particles * n_cells)
        )
        kl_basal = self.kl_basal(latent).mean(0)  # (n,)
        kl_treatment = (latent.effects.kl.mean(0) * latent.effects.weights(pairs, self.n_obs_per_treatment)).sum()
        kl_artifact = latent.kl_artifact * artifact.sum() / self.n_failed.clamp_min(1)
        kl_global = kl_treatment + kl_artifact  # of this batch
        counterfactual, eligible = self.counterfactual_kl(
            latent, pairs, inference_outputs["x_projected"], label, artifact
        )
        cf_total = counterfactual.mean(0).sum()
        cf = cf_total if self.cf_reduction == "sum" else cf_total / n_cells
        loss = -weighted + kl_weight * (kl_basal.mean() + kl_global / n_cells) + self.cf_weight * cf
        return LossOutput(
            loss=loss,
            reconstruction_loss=-log_prob.mean(0),
            kl_local={"kl_basal": kl_basal.detach()},
            kl_global=(kl_global * n_obs / n_cells).detach(),  # unbiased for the whole data set
            extra_metrics={
                "kl_treatment": (kl_treatment / n_cells).detach(),
                "kl_artifact": (kl_artifact / n_cells).detach(),
                "cf_kl": (cf_total / eligible.sum().clamp_min(1)).detach(),
            },
        )

    def kl_basal(self, latent: LatentDraw) -> Tensor:
        """Return ``KL(q(z_b) || N(0, I))`` of every cell, shape ``(n_particles, n_cells)``."""
        q = latent.q_basal
        if self.sampled_kl:
            log_prior = -0.5 * (latent.z_basal.square() + math.log(2 * math.pi))
            return (q.log_prob(latent.z_basal) - log_prior).sum(-1)
        return gaussian_kl(q.loc, q.scale, 0.0, 1.0).sum(-1)

    def reconstruction_weights(self, artifact: Tensor) -> Tensor:
        """Return the weight of every cell in the reconstruction term, shape ``(n_cells,)``."""
        if self.reconstruction_balance == "none":
            return torch.ones_like(artifact)
        if self.reconstruction_balance == "batch":
            failed = artifact.mean()
            return torch.where(artifact > 0, 1 - failed, failed)
        failed = (self.n_failed / self.n_train.clamp_min(1)).clamp(1e-6, 1 - 1e-6)
        return torch.where(artifact > 0, 0.5 / failed, 0.5 / (1 - failed))

    def counterfactual_kl(
        self, latent: LatentDraw, pairs: Pairs, x_projected: Tensor, label: Tensor, artifact: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the divergence between reference and counterfactual basal states of eligible cells.

        Eligible is a cell that passed QC and whose label has a failed training cell.

        Returns
        -------
        The divergences, shape ``(n_particles, n_eligible)``, and the eligible cells, boolean, shape ``(n_cells,)``.
        """
        eligible = (artifact == 0) & self.references.available(label)
        if self.cf_weight == 0 or not self.offsets or not bool(eligible.any()):
            return x_projected.new_zeros(1, 0), torch.zeros_like(eligible)
        cells = eligible.nonzero()[:, 0]
        labels, inverse = torch.unique(label[cells], return_inverse=True)
        reference = self.encoder.first.project("x", self.standardize(self.references(labels)))
        reference = reference.index_select(0, inverse)
        effects = latent.offsets[0].index_select(1, cells)
        vector = self._artifact_on(latent.artifact_vector, cells)
        counterfactual = self.encoder(x_projected.index_select(0, cells), effects, vector)
        if not self.share_global_samples:
            draw = self.effects.draw(pairs, len(effects), per_cell=self.per_cell)
            redrawn, _ = self.artifact.draw(*latent.artifact_vector.shape[:2])
            effects = draw.to_cells(self.encoder.first.project("perturbation", draw.rows), pairs).index_select(1, cells)
            vector = self._artifact_on(redrawn, cells)
        target = self.encoder(reference, effects, vector)
        if self.cf_detach_reference:
            target = Normal(target.loc.detach(), target.scale.detach(), validate_args=False)
        first, second = (target, counterfactual) if self.cf_direction == "reference_first" else (counterfactual, target)
        return gaussian_kl(first.loc, first.scale, second.loc, second.scale).sum(-1), eligible

    def _artifact_on(self, vector: Tensor, cells: Tensor) -> Tensor:
        """Return the encoder offset of cells with the artifact switched on, shape ``(P, n_cells or 1, H)``."""
        return self.encoder.first.project("artifact", vector if vector.shape[1] == 1 else vector.index_select(1, cells))
