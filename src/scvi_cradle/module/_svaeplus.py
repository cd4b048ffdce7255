"""Module of sVAE+."""

from __future__ import annotations

from typing import Any, Literal

import torch
from scvi.module.base import auto_move_data
from torch import Generator, Tensor
from torch.distributions import Normal

from scvi_cradle.module.base import (
    BasalEncoder,
    BatchNormDecoder,
    BatchNormEncoder,
    BetaBernoulliMask,
    Decoder,
    EffectDraw,
    EffectNoise,
    LatentDraw,
    Pairs,
    PerturbationModule,
    PointEmbedding,
    TreatmentEffects,
    posterior_of_cells,
    sample_normal,
)


class SVAEPlusModule(PerturbationModule):
    r"""sVAE+ (Lopez et al. 2023; as compared in Bereket and Karaletsos 2023, sec. 4).

    .. math::
        p_{td} \sim \mathrm{Beta}(1, K),\quad m_{td} \sim \mathrm{Bern}(p_{td}),\quad
        z_i \sim N\Big(\sum_t d_{it}\, m_t \circ \mu_t, I\Big),\quad x_i \sim p(x \mid f(z_i))

    In the papers a cell has one intervention, and a combination is one of its own; given several treatments, the module
    adds their masked shifts. Controls have mean zero. ``mu`` are parameters, ``q(p)`` is a point, ``q(z | x)`` does not see
    the intervention.

    Parameters
    ----------
    n_genes, n_treatments, n_levels, n_continuous
        Sizes of the data (see :class:`~scvi_cradle.module.base.PerturbationModule`).
    n_latent, n_hidden, n_layers_encoder, n_layers_decoder
        Sizes of the networks.
    variant
        ``"sams"``: residual perceptrons and plate weights ``1 / n_t``, as in the comparison; ``"lopez"``: batch
        normalisation and dropout, and the whole global term with every batch, as in the original.
    mask_beta
        ``(1, K)``.
    mask_init_logit, embedding_init_scale, gs_temperature
        Start of mask logits and of ``mu``; temperature of the relaxed masks.
    likelihood
        ``"nb"`` or ``"poisson"``.
    draws, n_particles, kl
        As in :class:`SAMSVAEModule`.
    """

    global_weight: Tensor

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
        variant: Literal["sams", "lopez"],
        mask_beta: tuple[float, float],
        mask_init_logit: float,
        embedding_init_scale: float,
        gs_temperature: float,
        likelihood: Literal["nb", "poisson"],
        draws: Literal["cell", "batch"],
        n_particles: int,
        kl: Literal["analytic", "sampled"],
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
        self.variant = variant
        sizes: dict[str, Any] = {"n_covariates": self.n_covariates, "likelihood": likelihood}
        if variant == "lopez":
            self.encoder = BatchNormEncoder(n_genes, n_latent, n_hidden, n_layers_encoder)
            self.decoder = BatchNormDecoder(n_genes, n_latent, n_hidden, n_layers_decoder, **sizes)
        else:
            self.encoder = BasalEncoder(n_genes, n_latent, n_hidden, n_layers_encoder, {})
            self.decoder = Decoder(n_genes, {"basal": n_latent}, n_hidden, n_layers_decoder, **sizes)
        mask = BetaBernoulliMask(
            n_treatments,
            n_latent,
            concentration=mask_beta,
            point=True,
            init_logit=mask_init_logit,
            temperature=gs_temperature,
        )
        self.effects = TreatmentEffects(
            mask,
            PointEmbedding(n_treatments, n_latent, embedding_init_scale),
            prior_scale=1.0,
            sampled_kl=self.sampled_kl,
        )
        self.register_buffer("global_weight", torch.ones(()))  # 0 once a transfer has fixed the masks

    @auto_move_data
    def inference(
        self,
        x: Tensor,
        label: Tensor,
        dosage: Tensor | None = None,
        n_samples: int | None = None,
        sample: bool = True,
        effects: EffectDraw | None = None,
        generator: Generator | None = None,
    ) -> dict[str, Any]:
        """Draw the latent state of cells (arguments as in :meth:`SAMSVAEModule.inference`)."""
        n_particles, pairs = n_samples or self.n_particles, self.pairs(label, dosage)
        draw = self.draw_effects(pairs, n_particles, sample=sample, effects=effects, generator=generator)
        q_basal = posterior_of_cells(self._encode, self.standardize(x), (), n_particles)
        z_basal = sample_normal(q_basal, sample=sample, generator=generator)
        shift = draw.to_cells(draw.rows, pairs)  # (P, n, D), the mean of p(z)
        return {"latent": LatentDraw(q_basal, z_basal, shift, draw, shift), "pairs": pairs}

    def _encode(self, x: Tensor) -> Normal:
        return self.encoder(x if self.variant == "lopez" else self.encoder.first.project("x", x))

    @auto_move_data
    def generative(self, latent: LatentDraw, pairs: Pairs, covariates: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the decoder's output layer, shape ``(n_particles, n_cells, n_features)``."""
        return {"features": self.decoder.features_of({"basal": latent.z_basal}, covariates)}

    def global_shares(self, latent: Any, pairs: Pairs, inputs: dict[str, Any]) -> Tensor:
        """Return every cell's share of ``-log Beta(p; 1, K)``; ``"lopez"``: an equal share of all of it."""
        if self.global_weight == 0:
            return latent.z_basal.new_zeros(1, pairs.n_cells)
        if self.variant == "sams":
            return super().global_shares(latent, pairs, inputs)
        treatments = torch.arange(self.n_treatments, device=latent.z_basal.device)
        mask = self.effects.mask
        total = mask.terms(treatments, mask.probability[None], sampled=False).kl.sum()
        return (total / self.n_train.clamp_min(1)).expand(1, pairs.n_cells)

    # ---- new cells, other interventions -----------------------------------------------------------------------------

    def prior(
        self,
        pairs: Pairs,
        noise: Tensor,
        *,
        effect_noise: EffectNoise | None = None,
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        """Return the latent state of new cells: mask times mean, summed over treatments, plus ``noise``."""
        return {"basal": self.new_effects(pairs, len(noise), effect_noise, generator) + noise}

    def intervene(
        self, latent: LatentDraw, pairs: Pairs, target: Pairs | None, *, generator: Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the latent state of cells had they received ``target``: their deviation from the mean is kept."""
        if target is None:
            return {"basal": latent.z_basal}
        return self.prior(target, latent.z_basal - latent.prior_mean, generator=generator)

    def components(self, latent: LatentDraw) -> dict[str, Tensor]:
        """Return the latent state by its name."""
        return {"latent": latent.z_basal}
