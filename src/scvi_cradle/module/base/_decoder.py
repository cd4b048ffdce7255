"""Decoder of the CRADLE-VAE and SAMS-VAE family: latent states to negative-binomial counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scvi_cradle.module.base._likelihood import fused_log_prob, negative_binomial_log_prob, softmax_rates
from scvi_cradle.module.base._networks import ResidualLayers, SplitLinear, activation

LOG_THETA_BOUND = 10.0
PARTS = ("basal", "perturbation", "artifact")


class NegativeBinomialDecoder(nn.Module):
    """``rho = softmax(f([z_b, z_p, z_a, covariates]) + W z_p)``, ``x ~ NB(l (rho + 1e-8), theta_g)``.

    Parameters
    ----------
    n_genes, n_latent, n_hidden, n_layers
        Sizes; ``n_layers`` is the number of hidden layers.
    n_covariates
        Width of the covariate design that enters the first layer.
    combine
        ``"concat"``: the latent parts have weights of their own; ``"sum"``: they are added.
    skip
        Add a linear path from ``z_p`` to the logits.
    """

    def __init__(
        self, n_genes: int, n_latent: int, n_hidden: int, n_layers: int, *, n_covariates: int, combine: str, skip: bool
    ) -> None:
        super().__init__()
        self.combine = combine
        self.skip = skip
        latent = dict.fromkeys(PARTS, n_latent) if combine == "concat" else {"latent": n_latent}
        self.first = SplitLinear({**latent, "covariates": n_covariates}, n_hidden)
        self.hidden = ResidualLayers(n_layers - 1, n_hidden)
        self.output = nn.Linear(n_hidden + (n_latent if skip else 0), n_genes)
        self.log_theta = nn.Parameter(torch.zeros(n_genes))

    @property
    def theta(self) -> Tensor:
        """Inverse dispersion of every gene, shape ``(n_genes,)``."""
        return self.log_theta.clamp(-LOG_THETA_BOUND, LOG_THETA_BOUND).exp()

    def project(self, part: str, value: Tensor) -> Tensor:
        """Project one latent part by the first layer."""
        return self.first.project(part if self.combine == "concat" else "latent", value)

    def features(self, hidden: Tensor, z_perturbation: Tensor, covariates: Tensor) -> Tensor:
        """Return the inputs of the output layer, shape ``(n_particles, n_cells, n_features)``.

        Parameters
        ----------
        hidden
            Sum of the projected latent parts, shape ``(n_particles, n_cells, n_hidden)``.
        z_perturbation
            Perturbation effect of every cell, shape ``(n_particles, n_cells, n_latent)``.
        covariates
            Covariate design, shape ``(n_cells, n_covariates)``.
        """
        if covariates.shape[-1]:
            hidden = hidden + self.first.project("covariates", covariates)
        hidden = self.hidden(activation(hidden + self.first.bias))
        return torch.cat([hidden, z_perturbation], dim=-1) if self.skip else hidden

    def forward(self, z_basal: Tensor, z_perturbation: Tensor, z_artifact: Tensor, covariates: Tensor) -> Tensor:
        """Return logits of the gene shares, shape ``(n_particles, n_cells, n_genes)``."""
        parts = zip(PARTS, (z_basal, z_perturbation, z_artifact), strict=True)
        hidden = sum(self.project(part, value) for part, value in parts)
        return self.output(self.features(hidden, z_perturbation.expand_as(z_basal), covariates))  # type: ignore[arg-type]

    def log_prob(self, x: Tensor, features: Tensor, library: Tensor) -> Tensor:
        """Return ``log p(x | features)`` summed over genes, shape ``(n_particles, n_cells)``, in its plain form."""
        mu = softmax_rates(self.output(features), library)
        return negative_binomial_log_prob(x, mu, self.theta).sum(-1)

    def weighted_log_prob(self, x: Tensor, features: Tensor, library: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of ``log p(x | features)`` and, without gradient, its terms (see ``fused_log_prob``)."""
        layer = self.output
        return fused_log_prob(features, layer.weight, layer.bias, self.theta, x, library, weight)

    def initialize_output(self, gene_share: Tensor) -> None:
        """Start the output bias at the log mean gene shares, shape ``(n_genes,)``."""
        with torch.no_grad():
            self.output.bias.copy_((gene_share + RARE_GENE_SHARE).log())


RARE_GENE_SHARE = 1e-6
