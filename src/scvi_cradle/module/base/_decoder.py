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

    Either way of ``z_p`` can be left out.

    Parameters
    ----------
    n_genes, n_latent, n_hidden, n_layers
        Sizes; ``n_layers`` is the number of hidden layers.
    n_covariates
        Width of the covariate design that enters the first layer.
    combine
        ``"concat"``: the latent parts have weights of their own; ``"sum"``: they are added.
    effect_path
        How ``z_p`` acts: ``"decoder"``: through the hidden layers; ``"linear"``: by a linear map on the logits alone,
        so that effects add up on the log scale; ``"both"``.
    """

    def __init__(
        self,
        n_genes: int,
        n_latent: int,
        n_hidden: int,
        n_layers: int,
        *,
        n_covariates: int,
        combine: str,
        effect_path: str,
    ) -> None:
        super().__init__()
        self.combine = combine
        self.skip = effect_path != "decoder"
        self.hidden_parts = tuple(part for part in PARTS if part != "perturbation" or effect_path != "linear")
        latent = dict.fromkeys(self.hidden_parts, n_latent) if combine == "concat" else {"latent": n_latent}
        self.first = SplitLinear({**latent, "covariates": n_covariates}, n_hidden)
        self.hidden = ResidualLayers(n_layers - 1, n_hidden)
        self.output = nn.Linear(n_hidden + (n_latent if self.skip else 0), n_genes)
        self.log_theta = nn.Parameter(torch.zeros(n_genes))

    @property
    def theta(self) -> Tensor:
        """Inverse dispersion of every gene, shape ``(n_genes,)``."""
        return self.log_theta.clamp(-LOG_THETA_BOUND, LOG_THETA_BOUND).exp()

    def project(self, part: str, value: Tensor) -> Tensor:
        """Project one latent part by the first hidden layer, shape ``(..., n_hidden)``."""
        return self.first.project(part if self.combine == "concat" else "latent", value)

    def features(self, projected: dict[str, Tensor], z_perturbation: Tensor, covariates: Tensor) -> Tensor:
        """Return the inputs of the output layer, shape ``(n_particles, n_cells, n_features)``.

        Parameters
        ----------
        projected
            The projection of every part in ``hidden_parts``, each broadcasting to
            ``(n_particles, n_cells, n_hidden)``.
        z_perturbation
            Perturbation effects, shape ``(n_particles, n_cells, n_latent)``, for the linear path.
        covariates
            Covariate design, shape ``(n_cells, n_covariates)``.
        """
        hidden: Tensor = self.first.bias
        for part in self.hidden_parts:
            hidden = hidden + projected[part]
        if covariates.shape[-1]:
            hidden = hidden + self.first.project("covariates", covariates)
        hidden = self.hidden(activation(hidden))
        if not self.skip:
            return hidden
        return torch.cat([hidden, z_perturbation.expand(*hidden.shape[:-1], -1)], dim=-1)

    def features_of(self, z_basal: Tensor, z_perturbation: Tensor, z_artifact: Tensor, covariates: Tensor) -> Tensor:
        """Return :meth:`features` of latent parts that are given cell by cell."""
        parts = dict(zip(PARTS, (z_basal, z_perturbation, z_artifact), strict=True))
        projected = {part: self.project(part, parts[part]) for part in self.hidden_parts}
        return self.features(projected, z_perturbation, covariates)

    def forward(self, z_basal: Tensor, z_perturbation: Tensor, z_artifact: Tensor, covariates: Tensor) -> Tensor:
        """Return logits of the gene shares, shape ``(n_particles, n_cells, n_genes)``."""
        return self.output(self.features_of(z_basal, z_perturbation, z_artifact, covariates))

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
