"""Module of PerturbedVAE."""

from __future__ import annotations

from typing import Any, Literal

import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import LossOutput, auto_move_data
from torch import Generator, Tensor
from torch.distributions import Normal

from scvi_cradle._constants import KEYS, partner_key
from scvi_cradle.module.base import (
    CausalDraw,
    GaussianHead,
    LatentCausalModel,
    Pairs,
    PerceptronDecoder,
    PerturbationModule,
    gaussian_kl,
    library_size,
    multiscale_mmd,
    noise_kl,
    normal_like,
    normal_log_prob,
    perceptron,
    sample_normal,
)

COVARIATES = (REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.CAT_COVS_KEY, REGISTRY_KEYS.CONT_COVS_KEY)


class PerturbedVAEModule(PerturbationModule):
    r"""PerturbedVAE: invariant and responsive latent variables, the latter in a linear causal model.

    .. math::
        z_\iota \sim N(0, I),\quad n_\nu \sim N(\mu(u), \mathrm{diag}\,\beta(u)),\quad
        z_\nu = \Lambda_{\nu\iota}(u) z_\iota + \Lambda_{\nu\nu}(u) z_\nu + n_\nu,\quad x \sim p(x \mid g(z_\nu, z_\iota))

    with strictly lower triangular :math:`\Lambda_{\nu\nu}`; the decoder does not see the treatments ``u``.

    Parameters
    ----------
    n_genes, n_treatments, n_levels, n_continuous
        Sizes of the data (see :class:`~scvi_cradle.module.base.PerturbationModule`).
    n_latent_responsive, n_latent_invariant, n_hidden, n_layers
        Sizes of the latent blocks and of the networks.
    mechanism, noise_scale, lambda_bound
        How mechanisms depend on treatments (see :class:`~scvi_cradle.module.base.LatentCausalModel`).
    noise_encoder
        Posterior of the responsive variables' noise from the hidden layer and the treatments: ``"mlp"``, with one hidden
        layer, or ``"linear"``.
    likelihood
        ``"mse"``, ``"gaussian"`` or ``"nb"``.
    output_activation
        From the decoder's outputs to means of values: ``"identity"``, ``"softplus"`` or ``"leaky_relu"``.
    output_variance
        Of the Gaussian: ``"learned"`` for every gene, or a number.
    alignment, alignment_weight, align_stop_grad
        What aligns a cell with its control partner: ``"l2"``, the squared distance of the posterior means of
        ``z_iota``; ``"mmd"``, the discrepancy between a batch and cells predicted from its partners, in place of the
        reconstruction of the batch; or ``"none"``. ``align_stop_grad="control"`` keeps the partner's mean out of the
        gradient.
    kl_weight_responsive, kl_weight_invariant
        Weights of the divergences (buffer ``kl_weights``).
    """

    kl_weights: Tensor
    objectives = ("elbo",)
    beside_full = ("hidden",)

    def __init__(
        self,
        n_genes: int,
        n_treatments: int,
        *,
        n_levels: tuple[int, ...],
        n_continuous: int,
        n_latent_responsive: int,
        n_latent_invariant: int,
        n_hidden: int,
        n_layers: int,
        mechanism: Literal["mlp", "linear"],
        noise_scale: Literal["learned", "fixed"],
        lambda_bound: Literal["tanh"] | None,
        noise_encoder: Literal["mlp", "linear"],
        likelihood: Literal["mse", "gaussian", "nb"],
        output_activation: Literal["identity", "softplus", "leaky_relu"],
        output_variance: Literal["learned"] | float,
        alignment: Literal["l2", "mmd", "none"],
        alignment_weight: float,
        align_stop_grad: Literal["control"] | None,
        kl_weight_responsive: float,
        kl_weight_invariant: float,
    ) -> None:
        super().__init__(
            n_genes,
            n_treatments,
            n_levels=n_levels,
            n_continuous=n_continuous,
            n_latent=n_latent_invariant + n_latent_responsive,
            n_particles=1,
            per_cell=True,
            sampled_kl=False,
            log_input=likelihood == "nb",
        )
        self.n_responsive, self.n_invariant = n_latent_responsive, n_latent_invariant
        self.alignment, self.alignment_weight, self.align_stop_grad = alignment, alignment_weight, align_stop_grad
        self.register_buffer("kl_weights", torch.tensor([kl_weight_responsive, kl_weight_invariant]))
        self.encoder = perceptron(n_genes, n_hidden, n_layers)
        self.invariant_head = GaussianHead(n_hidden, n_latent_invariant)
        n_layers_noise, n_inputs = int(noise_encoder == "mlp"), n_hidden + n_treatments
        self.noise_encoder = perceptron(n_inputs, n_hidden, n_layers_noise)
        self.noise_head = GaussianHead(n_hidden if n_layers_noise else n_inputs, n_latent_responsive)
        self.causal = LatentCausalModel(
            n_treatments,
            n_latent_responsive,
            n_latent_invariant,
            n_hidden,
            mechanism=mechanism,
            noise_scale=noise_scale,
            lambda_bound=lambda_bound,
        )
        observation: dict[str, Any] = {} if likelihood == "nb" else {"activation": output_activation}
        if output_variance != "learned":
            observation["variance"] = float(output_variance)
        self.decoder = PerceptronDecoder(
            n_genes,
            {"invariant": n_latent_invariant, "responsive": n_latent_responsive},
            n_hidden,
            n_layers,
            n_covariates=self.n_covariates,
            likelihood=likelihood,
            **observation,
        )

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:
        return super()._get_inference_input(tensors) | {"x_partner": tensors.get(KEYS.PARTNER)}

    @auto_move_data
    def inference(
        self,
        x: Tensor,
        label: Tensor,
        dosage: Tensor | None = None,
        x_partner: Tensor | None = None,
        n_samples: int | None = None,
        sample: bool = True,
        generator: Generator | None = None,
    ) -> dict[str, Any]:
        """Draw the latent variables of cells.

        Parameters
        ----------
        x, label, dosage
            Data ``(n, n_genes)``, label codes ``(n,)``, dosages ``(n, n_treatments)`` or None.
        x_partner
            Control cells that the cells are paired with, ``(n, n_genes)``, or None.
        n_samples
            Number of particles; default: one.
        sample
            Whether to draw, or to take posterior means.
        generator
            Source of randomness; default: torch's global one.
        """
        n_particles, pairs = n_samples or self.n_particles, self.pairs(label, dosage)
        doses = pairs.dosage(self.n_treatments).to(x)
        hidden = self.encoder(self.standardize(x))  # (n, H)
        q_invariant = self.invariant_head(hidden).expand((n_particles, len(x), self.n_invariant))
        q_noise = self._noise_posterior(hidden, doses).expand((n_particles, len(x), self.n_responsive))
        q_partner = None
        if x_partner is not None:
            q_partner = self.invariant_head(self.encoder(self.standardize(x_partner))).expand(q_invariant.batch_shape)
        z_invariant, noise = q_invariant.loc, q_noise.loc
        if sample:  # in one draw, so that cells of batches of any size get the same numbers
            unit = normal_like(torch.cat([z_invariant, noise], dim=-1), generator)
            z_invariant = z_invariant + q_invariant.scale * unit[..., : self.n_invariant]
            noise = noise + q_noise.scale * unit[..., self.n_invariant :]
        mechanism = self.causal(doses)
        z_responsive = mechanism.respond(noise, z_invariant)
        latent = CausalDraw(
            q_invariant, z_invariant, q_noise, noise, mechanism, z_responsive, hidden[None], q_partner=q_partner
        )
        return {"latent": latent, "pairs": pairs}

    def _noise_posterior(self, hidden: Tensor, doses: Tensor) -> Normal:
        return self.noise_head(self.noise_encoder(torch.cat([hidden, doses], dim=-1)))

    @auto_move_data
    def generative(self, latent: CausalDraw, pairs: Pairs, covariates: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the decoder's output layer, shape ``(n_particles, n_cells, n_hidden)``."""
        return {"features": self.decoder.features_of(self.components(latent), covariates)}

    # ---- objective --------------------------------------------------------------------------------------------------

    def divergences(self, latent: CausalDraw) -> dict[str, Tensor]:
        """Return the divergence of either block from its prior, unweighted, each ``(n_particles, n_cells)``."""
        return {
            "kl_invariant": standard_kl(latent.q_basal),
            "kl_responsive": noise_kl(latent.q_noise.loc, latent.q_noise.scale, latent.mechanism.variance),
        }

    def kl_basal(self, latent: CausalDraw, *, sampled: bool | None = None) -> Tensor:
        """Return the divergence of all latent variables from their priors, unweighted, ``(n_particles, n_cells)``."""
        if not sampled:
            return torch.stack(list(self.divergences(latent).values())).sum(0)
        prior = normal_log_prob(latent.z_basal, 0.0, 1.0).sum(-1)
        prior = prior + normal_log_prob(latent.noise, 0.0, latent.mechanism.variance.sqrt()).sum(-1)
        posterior = latent.q_basal.log_prob(latent.z_basal).sum(-1) + latent.q_noise.log_prob(latent.noise).sum(-1)
        return posterior - prior

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Tensor],
        kl_weight: float = 1.0,
        n_obs: int = 1,
        alignment_ramp: float = 1.0,
    ) -> LossOutput:
        """Return the objective per cell, averaged over the batch.

        Parameters
        ----------
        tensors, inference_outputs, generative_outputs, n_obs
            As in scvi-tools.
        kl_weight, alignment_ramp
            Warm-up factors, from 0 to 1, of the divergences and of the alignment.
        """
        latent = inference_outputs["latent"]
        kl = {name: value.mean(0) for name, value in self.divergences(latent).items()}
        kl_invariant, kl_responsive = kl["kl_invariant"], kl["kl_responsive"]
        aligned: Tensor = latent.z_basal.new_zeros(())
        if latent.q_partner is not None:
            kl_invariant = kl_invariant + standard_kl(latent.q_partner).mean(0)
        if self.alignment == "mmd":
            error, kl_noise, aligned = self._discrepancy(tensors, inference_outputs)
            kl_responsive = kl_responsive + kl_noise
        else:
            error = self._reconstruction(tensors[REGISTRY_KEYS.X_KEY], generative_outputs["features"])
            if latent.q_partner is not None:
                partner = latent.q_partner.loc.detach() if self.align_stop_grad else latent.q_partner.loc
                aligned = (latent.q_basal.loc - partner).square().sum(-1).mean()
        divergence = self.kl_weights[0] * kl_responsive + self.kl_weights[1] * kl_invariant
        loss = error.mean() + kl_weight * divergence.mean() + alignment_ramp * self.alignment_weight * aligned
        return LossOutput(
            loss=loss,
            reconstruction_loss=error.detach(),
            kl_local={name: value.detach() for name, value in kl.items()},
            extra_metrics={"alignment": aligned.detach()} | {name: value.mean().detach() for name, value in kl.items()},
        )

    def _reconstruction(self, x: Tensor, features: Tensor) -> Tensor:
        """Return the error of every cell, shape ``(n_cells,)``."""
        return -self.decoder.log_prob(x, features, library_size(x)).mean(0)

    def _discrepancy(self, tensors: dict[str, Tensor], outputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what stands for the reconstruction of a batch of one perturbation.

        Returns
        -------
        Error and divergence of the responsive variables of the control partners, each ``(n_cells,)``, and the discrepancy
        between the cells and those predicted from the partners.
        """
        latent, pairs = outputs["latent"], outputs["pairs"]
        x, partner, covariates = tensors[REGISTRY_KEYS.X_KEY], tensors[KEYS.PARTNER], self.covariates(tensors)
        of_partner = self.covariates({k: tensors[partner_key(k)] for k in COVARIATES if partner_key(k) in tensors})
        hidden = self.encoder(self.standardize(partner))
        z_invariant = sample_normal(latent.q_partner, sample=True, generator=None)
        doses = pairs.dosage(self.n_treatments).to(x)
        controls = torch.zeros_like(doses)
        q_noise, mechanism = self._noise_posterior(hidden, controls), self.causal(controls)
        kl_noise = noise_kl(q_noise.loc, q_noise.scale, mechanism.variance)
        noise = sample_normal(q_noise, sample=True, generator=None)[None]
        parts = {"invariant": z_invariant, "responsive": mechanism.respond(noise, z_invariant)}
        error = self._reconstruction(partner, self.decoder.features_of(parts, of_partner))
        noise = latent.mechanism.variance.sqrt() * normal_like(latent.noise)
        parts["responsive"] = latent.mechanism.respond(noise, z_invariant)
        predicted = self.decoder.likelihood.mean(self.decoder(parts, covariates), library_size(x))[0]
        real = x
        if self.log_input:
            predicted, real = predicted.log1p(), x.log1p()
        return error, kl_noise, multiscale_mmd(predicted, real)

    # ---- new cells, other treatments --------------------------------------------------------------------------------

    def prior(self, pairs: Pairs, noise: Tensor, *, generator: Generator | None = None) -> dict[str, Tensor]:
        """Return latent parts of new cells, each ``(1, n_cells, width)``.

        Parameters
        ----------
        pairs
            Treatments of the cells.
        noise
            Invariant variables, and behind them standard normal noise of the responsive ones, shape
            ``(1, n_cells, n_invariant + n_responsive)``.
        generator
            Not used: all randomness is in ``noise``.
        """
        z_invariant, unit = noise.split([self.n_invariant, self.n_responsive], dim=-1)
        mechanism = self.causal(pairs.dosage(self.n_treatments).to(noise))
        return {
            "invariant": z_invariant,
            "responsive": mechanism.respond(mechanism.variance.sqrt() * unit, z_invariant),
        }

    def intervene(
        self, latent: CausalDraw, pairs: Pairs, target: Pairs | None, *, generator: Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the latent parts of cells had they received ``target`` (None: their own treatments).

        Cells keep their invariant variables and their noise in units of its prior standard deviation.
        """
        if target is None:
            return {name: z for name, z in self.components(latent).items() if name != "hidden"}
        unit = latent.noise / latent.mechanism.variance.sqrt()
        return self.prior(target, torch.cat([latent.z_basal, unit], dim=-1))

    def components(self, latent: CausalDraw) -> dict[str, Tensor]:
        """Return the latent parts by name."""
        return {"invariant": latent.z_basal, "responsive": latent.z_responsive, "hidden": latent.hidden}


def standard_kl(q: Normal) -> Tensor:
    """Return ``KL(q || N(0, I))``, shape ``(n_particles, n_cells)``."""
    return gaussian_kl(q.loc, q.scale, 0.0, 1.0).sum(-1)
