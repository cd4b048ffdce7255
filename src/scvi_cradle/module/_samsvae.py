"""Module of SAMS-VAE and, without masks, of CPA-VAE."""

from __future__ import annotations

from typing import Any, Literal

from scvi.module.base import auto_move_data
from torch import Generator, Tensor

from scvi_cradle.module.base import (
    AmortizedEmbedding,
    BasalEncoder,
    BernoulliMask,
    BetaBernoulliMask,
    Decoder,
    EffectDraw,
    EffectNoise,
    FreeGaussian,
    LatentDraw,
    Pairs,
    PerturbationModule,
    TreatmentEffects,
    posterior_of_cells,
    sample_normal,
)


class SAMSVAEModule(PerturbationModule):
    r"""SAMS-VAE (Bereket and Karaletsos 2023, eqs. 1-5); with masks fixed to one, CPA-VAE (sec. 2.4).

    .. math::
        m_t \sim \mathrm{Bern}(\alpha),\quad e_t \sim N(0, s^2 I),\quad z^b_i \sim N(0, I),\quad
        z^p_i = \sum_t p_{it}\, (e_t \circ m_t),\quad x_i \sim p(x \mid f(z^b_i, z^p_i))

    The objective is the negative ELBO per cell; global terms carry the weight ``1{p_it != 0} / n_t`` per cell, so that
    one epoch counts each once.

    Parameters
    ----------
    n_genes, n_treatments, n_levels, n_continuous
        Sizes of the data (see :class:`~scvi_cradle.module.base.PerturbationModule`).
    n_latent, n_hidden, n_layers_encoder, n_layers_decoder
        Sizes of the networks.
    mask_prior
        ``"bernoulli"``, ``"beta_bernoulli"`` or ``"none"`` (masks fixed to one).
    mask_prior_logit
        Log-odds of a mask entry being one, for ``"bernoulli"``.
    mask_beta, mask_prob_posterior
        ``(a, b)`` of the Beta prior and kind of its posterior (``"point"`` or ``"beta"``), for ``"beta_bernoulli"``.
    mask_init_logit, gs_temperature
        Start of the mask posterior and temperature of its relaxed draws.
    prior_weight_per_cell
        Weight of ``log p(m)`` per cell in addition to ``1 / n_t``.
    embedding_prior_scale
        Standard deviation ``s``.
    posterior
        ``"correlated_basal"``: the encoder of ``z_b`` sees ``z_p``; ``"correlated_embedding"``: ``q(e | m)`` is a
        network; ``"correlated"``: both; ``"mean_field"``: neither.
    embedding_n_layers, embedding_n_hidden, embedding_init_scale
        That network, or the start of the free Gaussian that stands in its place.
    likelihood
        ``"nb"``, ``"poisson"`` or ``"gaussian"``.
    combine, effect_path
        How the decoder takes the latent parts (see :class:`~scvi_cradle.module.base.Decoder`).
    draws, n_particles
        One draw of the global variables per cell or per batch, and the number of particles.
    kl
        Divergences in closed form or at the draws.
    """

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
        mask_prior: Literal["bernoulli", "beta_bernoulli", "none"],
        mask_prior_logit: float = 0.0,
        mask_beta: tuple[float, float] = (1.0, 2.0),
        mask_prob_posterior: Literal["point", "beta"] = "point",
        mask_init_logit: float = 0.0,
        gs_temperature: float = 1.0,
        prior_weight_per_cell: float = 0.0,
        embedding_prior_scale: float,
        posterior: Literal["correlated", "correlated_basal", "correlated_embedding", "mean_field"],
        embedding_n_layers: int = 4,
        embedding_n_hidden: int = 400,
        embedding_init_scale: float,
        likelihood: Literal["nb", "poisson", "gaussian"],
        combine: Literal["concat", "sum"],
        effect_path: Literal["linear", "decoder", "both"],
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
            log_input=likelihood != "gaussian",
        )
        self.prior_weight_per_cell = prior_weight_per_cell
        self.sees_effects = posterior in ("correlated", "correlated_basal")
        self.encoder = BasalEncoder(
            n_genes, n_latent, n_hidden, n_layers_encoder, {"perturbation": n_latent} if self.sees_effects else {}
        )
        self.decoder = Decoder(
            n_genes,
            {"basal": n_latent, "perturbation": n_latent},
            n_hidden,
            n_layers_decoder,
            n_covariates=self.n_covariates,
            likelihood=likelihood,
            combine=combine,
            effect_path=effect_path,
        )
        shape = (n_treatments, n_latent)
        start: dict[str, Any] = {"init_logit": mask_init_logit, "temperature": gs_temperature}
        mask: BernoulliMask | BetaBernoulliMask | None = None
        if mask_prior == "bernoulli":
            mask = BernoulliMask(*shape, prior_logit=mask_prior_logit, **start)
        elif mask_prior == "beta_bernoulli":
            mask = BetaBernoulliMask(*shape, concentration=mask_beta, point=mask_prob_posterior == "point", **start)
        amortized = posterior in ("correlated", "correlated_embedding")
        self.effects = TreatmentEffects(
            mask,
            AmortizedEmbedding(*shape, embedding_n_layers, embedding_n_hidden)
            if amortized
            else FreeGaussian(shape, embedding_init_scale),
            prior_scale=embedding_prior_scale,
            sampled_kl=self.sampled_kl,
        )

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
        """Draw the latent variables of cells.

        Parameters
        ----------
        x, label, dosage
            Data ``(n, n_genes)``, label codes ``(n,)``, dosages ``(n, n_treatments)`` or None.
        n_samples
            Number of particles; default: the module's.
        sample
            Whether to draw, or to take posterior means.
        effects
            A draw of all treatments to use instead of a new one.
        generator
            Source of randomness; default: torch's global one.
        """
        n_particles, pairs = n_samples or self.n_particles, self.pairs(label, dosage)
        x_projected = self.encoder.first.project("x", self.standardize(x))  # (n, H), once for all particles
        draw = self.draw_effects(pairs, n_particles, sample=sample, effects=effects, generator=generator)
        offsets: tuple[Tensor, ...] = ()
        if self.sees_effects:  # each row is projected once, then summed per cell
            offsets = (draw.to_cells(self.encoder.first.project("perturbation", draw.rows), pairs),)  # (P, n, H)
        q_basal = posterior_of_cells(self.encoder, x_projected, offsets, n_particles)
        z_basal = sample_normal(q_basal, sample=sample, generator=generator)
        z_perturbation = draw.to_cells(draw.rows, pairs)  # (P, n, D)
        return {"latent": LatentDraw(q_basal, z_basal, 0.0, draw, z_perturbation), "pairs": pairs}

    @auto_move_data
    def generative(self, latent: LatentDraw, pairs: Pairs, covariates: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the decoder's output layer, shape ``(n_particles, n_cells, n_features)``."""
        decoder, draw = self.decoder, latent.effects
        projected = {"basal": decoder.project("basal", latent.z_basal)}
        if "perturbation" in decoder.hidden_parts:
            projected["perturbation"] = draw.to_cells(decoder.project("perturbation", draw.rows), pairs)
        return {"features": decoder.features(projected, latent.z_perturbation, covariates)}

    # ---- new cells, other treatments --------------------------------------------------------------------------------

    def prior(
        self,
        pairs: Pairs,
        noise: Tensor,
        *,
        effect_noise: EffectNoise | None = None,
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        """Return latent parts of new cells: ``z_b = noise``, effects drawn, each ``(P, n_cells, n_latent)``."""
        return {"basal": noise, "perturbation": self.new_effects(pairs, len(noise), effect_noise, generator)}

    def intervene(
        self, latent: LatentDraw, pairs: Pairs, target: Pairs | None, *, generator: Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the latent parts of cells had they received ``target`` (None: their own treatments)."""
        if target is None:
            return {"basal": latent.z_basal, "perturbation": latent.z_perturbation}
        return self.prior(target, latent.z_basal, generator=generator)

    def components(self, latent: LatentDraw) -> dict[str, Tensor]:
        """Return the latent parts by name."""
        return {"basal": latent.z_basal, "perturbation": latent.z_perturbation}
