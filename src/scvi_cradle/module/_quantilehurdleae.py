"""Module of QuantileHurdleAE."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import LossOutput, auto_move_data
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from scvi_cradle.module.base import (
    HurdleQuantiles,
    Pairs,
    PerturbationModule,
    QuantileHurdleDecoder,
    interpolate_quantiles,
    perceptron,
    quantile_mean,
    quantile_median,
    start_output,
)

MIN_PROBABILITY = 1e-6


class LatentCode(NamedTuple):
    """The latent states of cells, shape ``(1, n_cells, n_latent)``; there is no posterior."""

    z: Tensor


class QuantileHurdleModule(PerturbationModule):
    r"""Autoencoder with a quantile-hurdle decoder (quantile-hurdle paper, sec. 4.1).

    .. math::
        z = h(x),\quad P(x_j > 0) = \sigma(\ell_j(z)),\quad x_j \mid x_j > 0 \text{ has quantiles } q_j^{(\tau)}(z)

    Encoder and decoder see neither treatments nor covariates, the encoder sees ``x`` as it is.

    Parameters
    ----------
    n_genes, n_treatments, n_levels, n_continuous
        Sizes of the data (see :class:`~scvi_cradle.module.base.PerturbationModule`).
    n_latent, n_hidden, n_layers
        Sizes of encoder and decoder; ``n_layers`` is the number of hidden layers of each.
    quantiles
        Levels of the quantiles: at least two, increasing, between 0 and 1.
    quantile_rank
        Width of a linear bottleneck before the quantiles, or None.
    monotone
        What keeps quantiles in order: ``"cumsum"``, ``"sort"``, or ``"penalty"`` (training adds the mean crossing of
        neighbours to the loss of every value, and quantiles are sorted outside training).
    hurdle_weight, latent_l2
        Weights of the cross-entropy and of the mean squared norm of the latent states.
    quant_normalization
        ``"all"``: the quantile loss is averaged over all entries, 0 where ``x = 0`` (eq. 4); ``"positive"``: over the
        positive ones (eq. 2).
    magnitude_transform
        ``"log1p"``: quantiles are those of ``log(1 + x)``; reconstructions are on the scale of ``x`` either way.
    reconstruction
        ``"mse"``: a decoder with one output per gene, trained by the weighted squared error, for comparison.
    """

    gene_weights: Tensor
    levels: Tensor
    objectives = ("elbo",)

    def __init__(
        self,
        n_genes: int,
        n_treatments: int,
        *,
        n_levels: tuple[int, ...],
        n_continuous: int,
        n_latent: int = 50,
        n_hidden: int = 512,
        n_layers: int = 2,
        quantiles: tuple[float, ...],
        quantile_rank: int | None,
        monotone: Literal["cumsum", "sort", "penalty"],
        hurdle_weight: float,
        latent_l2: float,
        quant_normalization: Literal["all", "positive"] = "all",
        magnitude_transform: Literal["log1p"] | None = None,
        reconstruction: Literal["quantile-hurdle", "mse"] = "quantile-hurdle",
    ) -> None:
        super().__init__(
            n_genes,
            n_treatments,
            n_levels=n_levels,
            n_continuous=n_continuous,
            n_latent=n_latent,
            n_particles=1,
            per_cell=False,
            sampled_kl=False,
            log_input=False,
        )
        self.hurdle_weight, self.latent_l2 = hurdle_weight, latent_l2
        self.quant_normalization, self.magnitude_transform = quant_normalization, magnitude_transform
        self.reconstruction = reconstruction
        self.register_buffer("gene_weights", torch.ones(n_genes))
        self.register_buffer("levels", torch.tensor(quantiles, dtype=torch.get_default_dtype()))
        self.encoder = perceptron(n_genes, n_hidden, n_layers, n_latent, negative_slope=0.0)
        if reconstruction == "mse":
            self.decoder = nn.Sequential(
                perceptron(n_latent, n_hidden, n_layers, negative_slope=0.0), nn.Linear(n_hidden, n_genes)
            )
        else:
            self.decoder = QuantileHurdleDecoder(
                n_latent, n_hidden, n_layers, n_genes, len(quantiles), rank=quantile_rank, monotone=monotone
            )

    @torch.no_grad()
    def initialize_output(self, probability: Tensor, quantiles: Tensor) -> None:
        """Start the output biases at the data, and the last layer's weights at a tenth.

        Parameters
        ----------
        probability
            Share of positive values of every gene, shape ``(n_genes,)``.
        quantiles
            Quantiles of the positive values of every gene, shape ``(n_genes, n_levels)``.
        """
        magnitude = self._magnitude(quantiles)
        if self.reconstruction == "mse":
            start_output(self.decoder[1], probability * quantile_mean(self.levels, magnitude))
            return
        start_output(self.decoder.hurdle, probability.clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY).logit())
        self.decoder.quantiles.initialize(magnitude)

    def _magnitude(self, x: Tensor) -> Tensor:
        return x.log1p() if self.magnitude_transform == "log1p" else x

    # ---- latent states and outputs ----------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """Return the latent states of cells, shape ``(n_cells, n_latent)``."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> HurdleQuantiles:
        """Return log-odds and quantiles, in order, of latent states ``(n_cells, n_latent)``."""
        return self.decoder(z)

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
        """Return the latent states of cells; they are no draws, and ``n_samples``, ``sample`` and ``generator`` idle."""
        return {"latent": LatentCode(self.encode(x)[None]), "pairs": self.pairs(label, dosage)}

    @auto_move_data
    def generative(self, latent: LatentCode, pairs: Pairs, covariates: Tensor) -> dict[str, Tensor]:
        """Return the decoder's last hidden layer (its output for ``reconstruction="mse"``), ``(n_cells, ...)``."""
        z = latent.z[0]
        return {"features": self.decoder(z) if self.reconstruction == "mse" else self.decoder.hidden(z)}

    def components(self, latent: LatentCode) -> dict[str, Tensor]:
        """Return the latent state by its name."""
        return {"latent": latent.z}

    def divergences(self, latent: LatentCode) -> dict[str, Tensor]:
        """Return nothing: there is no posterior."""
        return {}

    # ---- objective --------------------------------------------------------------------------------------------------

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Tensor],
        kl_weight: float = 1.0,
        n_obs: int = 1,
    ) -> LossOutput:
        """Return ``L_quant + hurdle_weight L_hurdle + latent_l2 mean |z|^2`` (eq. 5), averaged over the batch.

        ``kl_weight`` and ``n_obs`` are there for scvi-tools: nothing diverges from a prior.
        """
        # under autocast the networks work in bfloat16, the losses of the quantiles do not
        x, features = tensors[REGISTRY_KEYS.X_KEY], generative_outputs["features"]
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        weights = self.gene_weights / self.gene_weights.sum()  # (G,), w_j / (G mean w)
        latent_l2 = inference_outputs["latent"].z.square().sum(-1).mean()
        if self.reconstruction == "mse":
            error = (self._magnitude(x) - features).square() @ weights
            value, parts = error.mean(), {"mse": error}
        else:
            with torch.autocast(x.device.type, enabled=False):
                value, parts = self._quantile_hurdle(x, features, weights)
            error = parts["quantile"] + self.hurdle_weight * parts["hurdle"]
        extra = {name: part.mean().detach() for name, part in parts.items()} | {"latent_l2": latent_l2.detach()}
        return LossOutput(
            loss=value + self.latent_l2 * latent_l2, reconstruction_loss=error.detach(), extra_metrics=extra
        )

    def _quantile_hurdle(self, x: Tensor, features: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective but for its penalty, and its two parts per cell, each ``(n_cells,)``."""
        positive = x > 0
        logits = self.decoder.hurdle(features)
        hurdle = binary_cross_entropy_with_logits(logits, positive.to(x), reduction="none") @ weights
        gene, cell = positive.t().nonzero(as_tuple=True)
        weight = weights[gene] / len(x)
        if self.quant_normalization == "positive":
            weight = weight / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
        total, values = self.decoder.quantiles.weighted_loss(
            features, self.levels, cell, gene, self._magnitude(x[cell, gene]), weight
        )
        of_cell = torch.zeros_like(x[:, 0]).index_add_(0, cell, values * weight) * len(x)
        return total + self.hurdle_weight * hurdle.mean(), {"quantile": of_cell, "hurdle": hurdle}

    # ---- reconstruction ---------------------------------------------------------------------------------------------

    def reconstruct(
        self, z: Tensor, kind: Literal["sample", "mean", "median"], generator: Generator | None = None
    ) -> Tensor:
        """Return values of cells on the scale of the input, shape ``(n_cells, n_genes)``.

        Parameters
        ----------
        z
            Latent states, shape ``(n_cells, n_latent)``.
        kind
            ``"sample"``: a draw, 0 or a value between the quantiles; ``"mean"`` and ``"median"`` of such draws. For
            ``reconstruction="mse"`` the decoder's output is the ``"mean"``, and there is nothing else.
        generator
            Source of randomness of a draw; default: torch's global one.
        """
        log = self.magnitude_transform == "log1p"
        if self.reconstruction == "mse":
            if kind != "mean":
                msg = f"`kind` must be 'mean' for a model with reconstruction='mse'; received {kind!r}."
                raise ValueError(msg)
            value = self.decoder(z)
            return value.expm1() if log else value
        logits, quantiles = self.decode(z)
        probability = logits.sigmoid()
        if kind == "mean":
            return probability * quantile_mean(self.levels, quantiles, log=log)
        if kind == "median":
            value = quantile_median(self.levels, quantiles, probability)
        else:
            keep, u = (torch.rand(logits.shape, generator=generator, device=z.device, dtype=z.dtype) for _ in range(2))
            value = torch.where(keep < probability, interpolate_quantiles(u, self.levels, quantiles), 0.0)
        return value.expm1() if log else value
