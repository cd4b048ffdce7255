"""Module of CRADLE-VAE."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scvi.module.base import LossOutput, auto_move_data
from torch import Generator, Tensor
from torch.distributions import Normal

from scvi_cradle._constants import KEYS
from scvi_cradle.module._counterfactual import EligibleCells, counterfactual_kl, project_with_references
from scvi_cradle.module.base import (
    AmortizedEmbedding,
    ArtifactLatent,
    BasalEncoder,
    BernoulliMask,
    Decoder,
    EffectDraw,
    EffectNoise,
    FreeGaussian,
    Pairs,
    PerturbationModule,
    References,
    TreatmentEffects,
    posterior_of_cells,
    sample_normal,
)

Posterior = Literal["correlated", "correlated_basal", "correlated_embedding", "mean_field"]


class LatentDraw(NamedTuple):
    """What :meth:`CradleVAEModule.inference` draws; the leading axis is the particle."""

    q_basal: Normal  # (P, n, D)
    z_basal: Tensor  # (P, n, D)
    effects: EffectDraw
    z_perturbation: Tensor  # (P, n, D)
    artifact_vector: Tensor  # (P, n or 1, D)
    kl_artifact: Tensor  # ()
    z_artifact: Tensor  # (P, n, D)
    x_projected: Tensor  # (n, H), the expression in the encoder's first layer
    references: EligibleCells | None  # in training: the cells with a counterfactual term and their references
    offsets: tuple[Tensor, ...]  # what the encoder adds for effects (P, n, H) and for the artifact; empty: mean field
    prior_mean: float = 0.0  # of z_b


class CradleVAEModule(PerturbationModule):
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
    n_genes, n_treatments, n_levels, n_continuous
        Sizes of the data (see :class:`~scvi_cradle.module.base.PerturbationModule`).
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
        How the decoder takes the latent parts (see :class:`~scvi_cradle.module.base.Decoder`).
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

    n_failed: Tensor
    has_artifact = True
    objectives = ("elbo",)

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
        super().__init__(
            n_genes,
            n_treatments,
            n_levels=n_levels,
            n_continuous=n_continuous,
            n_latent=n_latent,
            n_particles=n_particles,
            per_cell=draws == "cell",
            sampled_kl=kl == "sampled",
        )
        self.cf_weight, self.cf_reduction, self.cf_direction = cf_weight, cf_reduction, cf_direction
        self.cf_detach_reference, self.share_global_samples = cf_detach_reference, share_global_samples
        self.reconstruction_balance = reconstruction_balance

        self.sees_effects = posterior in ("correlated", "correlated_basal")
        offsets = dict.fromkeys(("perturbation", "artifact"), n_latent) if self.sees_effects else {}
        self.encoder = BasalEncoder(n_genes, n_latent, n_hidden, n_layers_encoder, offsets)
        self.decoder = Decoder(
            n_genes,
            dict.fromkeys(("basal", "perturbation", "artifact"), n_latent),
            n_hidden,
            n_layers_decoder,
            n_covariates=self.n_covariates,
            combine=combine,
            effect_path=effect_path,
        )
        shape, amortized = (n_treatments, n_latent), posterior in ("correlated", "correlated_embedding")
        self.effects = TreatmentEffects(
            BernoulliMask(*shape, prior_logit=mask_prior_logit, init_logit=mask_init_logit, temperature=gs_temperature),
            AmortizedEmbedding(*shape, embedding_n_layers, embedding_n_hidden)
            if amortized
            else FreeGaussian(shape, embedding_init_scale),
            prior_scale=embedding_prior_scale,
            sampled_kl=self.sampled_kl,
        )
        self.artifact = ArtifactLatent(
            n_latent,
            gaussian=artifact_latent == "gaussian",
            prior_scale=embedding_prior_scale,
            init_scale=artifact_init_scale,
            sampled_kl=self.sampled_kl,
        )
        self.register_buffer("n_failed", torch.zeros(()))
        self.references = References(n_genes, resample=cf_resample, n_samples=cf_n_samples, statistic=cf_statistic)

    def set_labels(self, members: np.ndarray) -> None:
        """Set the treatments of every label code, and make room for their reference profiles."""
        super().set_labels(members)
        self.references.resize(len(members))

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:
        inputs = super()._get_inference_input(tensors)
        artifact = tensors[KEYS.ARTIFACT] if KEYS.ARTIFACT in tensors else inputs["x"].new_zeros(len(inputs["x"]), 1)
        return inputs | {"artifact": artifact}

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        artifact = self._get_inference_input(tensors)["artifact"]
        return super()._get_generative_input(tensors, inference_outputs) | {"artifact": artifact}

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
        effects: EffectDraw | None = None,
        vector: tuple[Tensor, Tensor] | None = None,
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
        effects, vector
            A draw of all treatments, and of the artifact vector with its divergence, to use instead of new ones.
        generator
            Source of randomness; default: torch's global one.
        """
        n_particles, pairs = n_samples or self.n_particles, self.pairs(label, dosage)
        x_projected, references = project_with_references(self, x, label, artifact)  # once for all passes
        draw = self.draw_effects(pairs, n_particles, sample=sample, effects=effects, generator=generator)
        n_vectors = len(x) if self.per_cell else 1
        u, kl_artifact = vector or self.artifact.draw(n_particles, n_vectors, sample=sample, generator=generator)
        offsets = self._encoder_offsets(draw, pairs, u, artifact)
        q_basal = posterior_of_cells(self.encoder, x_projected, offsets, n_particles)
        z_basal = sample_normal(q_basal, sample=sample, generator=generator)
        z_perturbation, z_artifact = draw.to_cells(draw.rows, pairs), u * artifact  # (P, n, D)
        latent = LatentDraw(
            q_basal, z_basal, draw, z_perturbation, u, kl_artifact, z_artifact, x_projected, references, offsets
        )
        return {"latent": latent, "pairs": pairs}

    def _encoder_offsets(self, draw: EffectDraw, pairs: Pairs, vector: Tensor, artifact: Tensor) -> tuple[Tensor, ...]:
        """Project effects (once per row) and the artifact vector (once per draw) into the encoder's first layer."""
        if not self.sees_effects:
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

    # ---- new cells, other treatments --------------------------------------------------------------------------------

    def draw_globals(self, generator: Generator | None = None) -> dict[str, Any]:
        """Draw all global variables once; the result is an argument of ``inference``."""
        vector = self.artifact.draw(1, 1, sampled_kl=True, generator=generator)
        return super().draw_globals(generator) | {"vector": vector}

    def prior(
        self,
        pairs: Pairs,
        noise: Tensor,
        *,
        artifact: bool = False,
        effect_noise: EffectNoise | None = None,
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        """Return latent parts of new cells: ``z_b = noise``, effects and, if any, ``u`` drawn, ``(P, n_cells, n_latent)``."""
        parts = {"basal": noise, "perturbation": self.new_effects(pairs, len(noise), effect_noise, generator)}
        if artifact:
            parts["artifact"], _ = self.artifact.draw(len(noise), pairs.n_cells, generator=generator)
        return parts

    def intervene(
        self,
        latent: LatentDraw,
        pairs: Pairs,
        target: Pairs | None,
        *,
        artifact: bool = False,
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        """Return the latent parts of cells had they received ``target`` (None: their own treatments)."""
        z_perturbation = latent.z_perturbation
        if target is not None:
            z_perturbation = self.prior(target, latent.z_basal, generator=generator)["perturbation"]
        z_artifact = latent.artifact_vector * float(artifact) + torch.zeros_like(latent.z_basal)
        return {"basal": latent.z_basal, "perturbation": z_perturbation, "artifact": z_artifact}

    def components(self, latent: LatentDraw) -> dict[str, Tensor]:
        """Return the latent parts by name."""
        return {"basal": latent.z_basal, "perturbation": latent.z_perturbation, "artifact": latent.z_artifact}

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
        output = super().loss(tensors, inference_outputs, generative_outputs, kl_weight=kl_weight, n_obs=n_obs)
        latent, inputs = inference_outputs["latent"], self._get_inference_input(tensors)
        counterfactual, eligible = counterfactual_kl(self, latent, inference_outputs["pairs"], inputs)
        cf_total = counterfactual.mean(0).sum()
        output.loss = output.loss + self.cf_weight * (
            cf_total if self.cf_reduction == "sum" else cf_total / len(eligible)
        )
        kl_artifact = self._artifact_share(latent, inputs).mean().detach()
        output.extra_metrics = {
            "kl_treatment": output.extra_metrics["kl_treatment"] - kl_artifact,
            "kl_artifact": kl_artifact,
            "cf_kl": (cf_total / eligible.sum().clamp_min(1)).detach(),
        }
        return output

    def global_shares(self, latent: Any, pairs: Pairs, inputs: dict[str, Any]) -> Tensor:
        """Return what every cell carries of the global divergences: effects, and the artifact vector if it failed."""
        return super().global_shares(latent, pairs, inputs) + self._artifact_share(latent, inputs)

    def _artifact_share(self, latent: LatentDraw, inputs: dict[str, Any]) -> Tensor:
        return latent.kl_artifact * inputs["artifact"][:, 0] / self.n_failed.clamp_min(1)

    def reconstruction_weights(self, inputs: dict[str, Any]) -> Tensor:
        """Return the weight of every cell in the reconstruction term, shape ``(n_cells,)``."""
        artifact = inputs["artifact"][:, 0]
        if self.reconstruction_balance == "none":
            return torch.ones_like(artifact)
        if self.reconstruction_balance == "batch":
            failed = artifact.mean()
            return torch.where(artifact > 0, 1 - failed, failed)
        failed = (self.n_failed / self.n_train.clamp_min(1)).clamp(1e-6, 1 - 1e-6)
        return torch.where(artifact > 0, 0.5 / failed, 0.5 / (1 - failed))
