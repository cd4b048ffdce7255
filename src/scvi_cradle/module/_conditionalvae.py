"""Module of the conditional VAE."""

from __future__ import annotations

from typing import Any, Literal

from scvi.module.base import auto_move_data
from torch import Generator, Tensor

from scvi_cradle.module.base import (
    BasalEncoder,
    Decoder,
    LatentDraw,
    Pairs,
    PerturbationModule,
    posterior_of_cells,
    sample_normal,
)


class ConditionalVAEModule(PerturbationModule):
    r"""Conditional VAE, the baseline of SAMS-VAE (Bereket and Karaletsos 2023, sec. 4).

    .. math:: z_i \sim N(0, I),\quad x_i \sim p(x \mid f(z_i, p_i)),\quad q(z_i \mid x_i, p_i)

    Encoder and decoder take the dosages ``p_i`` themselves; there are no latent treatment effects.

    Parameters
    ----------
    n_genes, n_treatments, n_levels, n_continuous
        Sizes of the data (see :class:`~scvi_cradle.module.base.PerturbationModule`).
    n_latent, n_hidden, n_layers_encoder, n_layers_decoder
        Sizes of the networks.
    likelihood
        ``"nb"`` or ``"poisson"``.
    n_particles
        Draws of the latent state per cell.
    kl
        Divergence in closed form or at the draws.
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
        likelihood: Literal["nb", "poisson"],
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
            per_cell=False,
            sampled_kl=kl == "sampled",
        )
        self.encoder = BasalEncoder(n_genes, n_latent, n_hidden, n_layers_encoder, {"dosage": n_treatments})
        self.decoder = Decoder(
            n_genes,
            {"basal": n_latent, "dosage": n_treatments},
            n_hidden,
            n_layers_decoder,
            n_covariates=self.n_covariates,
            likelihood=likelihood,
        )

    @auto_move_data
    def inference(
        self,
        x: Tensor,
        label: Tensor,
        dosage: Tensor | None = None,
        n_samples: int | None = None,
        sample: bool = True,
        generator: Generator | None = None,
    ) -> dict[str, Any]:
        """Draw the latent state of cells (arguments as in :meth:`SAMSVAEModule.inference`)."""
        pairs = self.pairs(label, dosage)
        first = self.encoder.first
        offsets = (pairs.total(first.columns("dosage", pairs.treatment)[None]),)
        q_basal = posterior_of_cells(
            self.encoder, first.project("x", self.standardize(x)), offsets, n_samples or self.n_particles
        )
        z_basal = sample_normal(q_basal, sample=sample, generator=generator)
        return {"latent": LatentDraw(q_basal, z_basal), "pairs": pairs}

    @auto_move_data
    def generative(self, latent: LatentDraw, pairs: Pairs, covariates: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the decoder's output layer, shape ``(n_particles, n_cells, n_features)``."""
        projected = {"basal": self.decoder.project("basal", latent.z_basal)}
        projected["dosage"] = pairs.total(self.decoder.first.columns("dosage", pairs.treatment)[None])
        return {"features": self.decoder.features(projected, None, covariates)}

    # ---- new cells, other treatments --------------------------------------------------------------------------------

    def prior(self, pairs: Pairs, noise: Tensor, *, generator: Generator | None = None) -> dict[str, Tensor]:
        """Return the decoder's inputs for new cells: ``z = noise`` and the dosages."""
        return {"basal": noise, "dosage": pairs.dosage(self.n_treatments).to(noise)[None]}

    def intervene(
        self, latent: LatentDraw, pairs: Pairs, target: Pairs | None, *, generator: Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the decoder's inputs for cells had they received ``target`` (None: their own treatments)."""
        return self.prior(pairs if target is None else target, latent.z_basal)

    def components(self, latent: LatentDraw) -> dict[str, Tensor]:
        """Return the latent state by its name."""
        return {"latent": latent.z_basal}
