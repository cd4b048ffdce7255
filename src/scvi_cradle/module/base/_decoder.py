"""Decoders: latent states and covariates to the outputs of an observation model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from scvi_cradle.module.base._networks import ResidualLayers, SplitLinear, activation
from scvi_cradle.module.base._observation import LIKELIHOODS

PERTURBATION = "perturbation"


class OutputHead(nn.Module):
    """Last layer of a decoder with its observation model.

    Parameters
    ----------
    n_features
        Width of the features that enter the layer.
    n_genes
        Number of genes.
    likelihood
        ``"nb"``, ``"poisson"``, ``"gaussian"`` or ``"mse"``.
    **options
        Further arguments of the observation model.
    """

    def __init__(self, n_features: int, n_genes: int, likelihood: str, **options: Any) -> None:
        super().__init__()
        self.output = nn.Linear(n_features, n_genes)
        self.likelihood = LIKELIHOODS[likelihood](n_genes, **options)

    def log_prob(self, x: Tensor, features: Tensor, library: Tensor) -> Tensor:
        """Return ``log p(x | features)`` summed over genes, shape ``(n_particles, n_cells)``, in its plain form."""
        return self.likelihood.log_prob(x, self.output(features), library)

    def weighted_log_prob(self, x: Tensor, features: Tensor, library: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of ``log p(x | features)`` and, without gradient, its terms ``(n_particles, n_cells)``."""
        return self.likelihood.weighted_log_prob(x, features, self.output, library, weight)

    def initialize_output(self, gene_share: Tensor, mean: Tensor, std: Tensor) -> None:
        """Start the output layer at the data's gene shares, or at its means and standard deviations, ``(n_genes,)``."""
        self.likelihood.initialize(self.output, gene_share, mean, std)


class Decoder(OutputHead):
    """``output = f([parts, covariates]) + W z_p`` with a residual perceptron ``f``.

    Either way of the perturbation part ``z_p`` can be left out.

    Parameters
    ----------
    n_genes
        Number of genes.
    parts
        Width of every latent part by name; the one named ``"perturbation"`` is ``z_p``.
    n_hidden, n_layers
        Sizes; ``n_layers`` is the number of hidden layers.
    n_covariates
        Width of the covariate design that enters the first layer.
    likelihood
        ``"nb"``, ``"poisson"`` or ``"gaussian"``.
    combine
        ``"concat"``: the parts have weights of their own; ``"sum"``: they are added.
    effect_path
        How ``z_p`` acts: ``"decoder"``: through the hidden layers; ``"linear"``: by a linear map on the output alone,
        so that effects add up on the scale of the output; ``"both"``.
    """

    def __init__(
        self,
        n_genes: int,
        parts: dict[str, int],
        n_hidden: int,
        n_layers: int,
        *,
        n_covariates: int,
        likelihood: str = "nb",
        combine: str = "concat",
        effect_path: str = "decoder",
    ) -> None:
        skip = effect_path != "decoder"
        super().__init__(n_hidden + (parts[PERTURBATION] if skip else 0), n_genes, likelihood)
        self.combine, self.skip = combine, skip
        self.hidden_parts = tuple(part for part in parts if part != PERTURBATION or effect_path != "linear")
        latent = {part: parts[part] for part in self.hidden_parts}
        latent = latent if combine == "concat" else {"latent": next(iter(latent.values()))}
        self.first = SplitLinear({**latent, "covariates": n_covariates}, n_hidden)
        self.hidden = ResidualLayers(n_layers - 1, n_hidden)

    def project(self, part: str, value: Tensor) -> Tensor:
        """Project one latent part by the first hidden layer, shape ``(..., n_hidden)``."""
        return self.first.project(part if self.combine == "concat" else "latent", value)

    def features(self, projected: dict[str, Tensor], z_perturbation: Tensor | None, covariates: Tensor) -> Tensor:
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
        hidden = self._hidden_features(projected, covariates)
        if not self.skip or z_perturbation is None:
            return hidden
        return torch.cat([hidden, z_perturbation.expand(*hidden.shape[:-1], -1)], dim=-1)

    def _hidden_features(self, projected: dict[str, Tensor], covariates: Tensor) -> Tensor:
        hidden: Tensor = self.first.bias
        for part in self.hidden_parts:
            if part in projected:
                hidden = hidden + projected[part]
        if covariates.shape[-1]:
            hidden = hidden + self.first.project("covariates", covariates)
        return self.hidden(activation(hidden))

    def features_of(self, parts: dict[str, Tensor], covariates: Tensor) -> Tensor:
        """Return :meth:`features` of latent parts that are given cell by cell, each ``(n_particles, n_cells, width)``."""
        return self.features(self._projected(parts), parts.get(PERTURBATION), covariates)

    def _projected(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {part: self.project(part, parts[part]) for part in self.hidden_parts if part in parts}

    def forward(self, parts: dict[str, Tensor], covariates: Tensor) -> Tensor:
        """Return the output (for counts: logits of gene shares), shape ``(n_particles, n_cells, n_genes)``.

        Parts and covariates, shape ``(n_cells, n_covariates)``, may broadcast over particles and cells: what they share is
        computed once. A part that is left out is zero.
        """
        hidden = self._hidden_features(self._projected(parts), covariates)
        if not self.skip:
            return self.output(hidden)
        of_hidden, of_effects = self.output.weight.split([hidden.shape[-1], parts[PERTURBATION].shape[-1]], dim=1)
        return linear(hidden, of_hidden, self.output.bias) + linear(parts[PERTURBATION], of_effects)
