"""Observation models: from the decoder's outputs to the likelihood of the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import leaky_relu, softplus

from scvi_cradle.module.base._elbo import normal_log_prob
from scvi_cradle.module.base._likelihood import fused_log_prob, negative_binomial_log_prob, softmax_rates

LOG_THETA_BOUND = 10.0
RARE_GENE_SHARE = 1e-6
STD_FLOOR = 1e-3
NEGATIVE_SLOPE = 0.2
SOFTPLUS_FLOOR = 1e-3  # least mean that an output starts at: its slope there is about as small


class Activation(NamedTuple):
    """From the outputs of the last layer to means, and back."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


def _inverse_softplus(mean: Tensor) -> Tensor:
    mean = mean.clamp_min(SOFTPLUS_FLOOR)
    return mean + (-torch.expm1(-mean)).log()


ACTIVATIONS = {
    "identity": Activation(lambda output: output, lambda mean: mean),
    "softplus": Activation(softplus, _inverse_softplus),
    "leaky_relu": Activation(
        lambda output: leaky_relu(output, NEGATIVE_SLOPE), lambda mean: leaky_relu(mean, 1 / NEGATIVE_SLOPE)
    ),
}


class Likelihood(nn.Module):
    """An observation model of ``n_genes`` genes; a subclass adds ``mean``, ``log_prob``, ``sample`` and ``initialize``."""

    counts: bool
    is_density = True  # whether ``log_prob`` is one
    log_prob: Callable[[Tensor, Tensor, Tensor], Tensor]
    initialize: Callable[[nn.Linear, Tensor, Tensor, Tensor], None]

    def weighted_log_prob(
        self, x: Tensor, features: Tensor, layer: nn.Linear, library: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of ``log p(x)`` and, without gradient, its terms ``(n_particles, n_cells)``."""
        value = self.log_prob(x, layer(features), library)
        return (value * weight).sum(), value.detach()


class CountLikelihood(Likelihood):
    """Counts with mean ``l (softmax(output) + 1e-8)``."""

    counts = True
    theta: Tensor

    def mean(self, output: Tensor, library: Tensor) -> Tensor:
        """Return expected counts, shape ``(..., n_cells, n_genes)``."""
        return softmax_rates(output, library)

    def initialize(self, layer: nn.Linear, gene_share: Tensor, mean: Tensor, std: Tensor) -> None:
        """Start the output bias at the log mean gene shares, shape ``(n_genes,)``."""
        layer.bias.data.copy_((gene_share + RARE_GENE_SHARE).log())


class NegativeBinomialLikelihood(CountLikelihood):
    """``x ~ NB(mean l (softmax(output) + 1e-8), inverse dispersion theta_g)``."""

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.log_theta = nn.Parameter(torch.zeros(n_genes))

    @property
    def theta(self) -> Tensor:  # type: ignore[override]
        """Inverse dispersion of every gene, shape ``(n_genes,)``."""
        return self.log_theta.clamp(-LOG_THETA_BOUND, LOG_THETA_BOUND).exp()

    def log_prob(self, x: Tensor, output: Tensor, library: Tensor) -> Tensor:
        """Return ``log p(x)`` summed over genes, shape ``(n_particles, n_cells)``, in its plain form."""
        return negative_binomial_log_prob(x, self.mean(output, library), self.theta).sum(-1)

    def weighted_log_prob(
        self, x: Tensor, features: Tensor, layer: nn.Linear, library: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of ``log p(x)`` and, without gradient, its terms (see ``fused_log_prob``)."""
        return fused_log_prob(features, layer.weight, layer.bias, self.theta, x, library, weight)

    def draw_dispersion(self, shape: torch.Size, generator: Generator) -> Tensor:
        """Draw the factors ``Gamma(theta) / theta`` between expected counts and Poisson rates."""
        theta = self.theta.expand(shape).contiguous()
        return torch._standard_gamma(theta, generator=generator).div_(theta)

    def sample(self, mean: Tensor, generator: Generator, dispersion: Tensor | None = None) -> Tensor:
        """Draw counts: ``Poisson(Gamma(theta) / theta * mean)``, with factors drawn before if they are given."""
        if dispersion is None:
            rate = self.draw_dispersion(mean.shape, generator).mul_(mean)  # in place: cells x genes
        else:
            rate = dispersion * mean
        return torch.poisson(rate, generator=generator)


class PoissonLikelihood(CountLikelihood):
    """``x ~ Poisson(l (softmax(output) + 1e-8))``."""

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("theta", torch.full((n_genes,), torch.inf), persistent=False)  # no overdispersion

    def log_prob(self, x: Tensor, output: Tensor, library: Tensor) -> Tensor:
        """Return ``log p(x)`` summed over genes, shape ``(n_particles, n_cells)``."""
        mean = self.mean(output, library)
        return (torch.xlogy(x, mean) - mean - torch.lgamma(x + 1)).sum(-1)

    def sample(self, mean: Tensor, generator: Generator) -> Tensor:
        """Draw counts."""
        return torch.poisson(mean, generator=generator)


class ValueLikelihood(Likelihood):
    """Values that are no counts, with mean ``activation(output)``; library sizes play no part.

    Parameters
    ----------
    activation
        ``"identity"``, ``"softplus"`` (no mean below 0) or ``"leaky_relu"`` (slope 0.2).
    """

    counts = False

    def __init__(self, activation: str = "identity") -> None:
        super().__init__()
        self.activation = activation

    def mean(self, output: Tensor, library: Tensor | None = None) -> Tensor:
        """Return expected values, shape ``(..., n_cells, n_genes)``."""
        return ACTIVATIONS[self.activation].forward(output)

    def initialize(self, layer: nn.Linear, gene_share: Tensor, mean: Tensor, std: Tensor) -> None:
        """Start the output bias where expected values are the means of the data, shape ``(n_genes,)``.

        Means below 1e-3 count as 1e-3 where no expected value can be below 0.
        """
        layer.bias.data.copy_(ACTIVATIONS[self.activation].inverse(mean))


class GaussianLikelihood(ValueLikelihood):
    """``x ~ N(activation(output), sigma_g^2)``.

    Parameters
    ----------
    n_genes
        Number of genes.
    activation
        See :class:`ValueLikelihood`.
    variance
        The variance of every gene; None: learned, one per gene.
    """

    fixed_std: Tensor

    def __init__(self, n_genes: int, activation: str = "identity", variance: float | None = None) -> None:
        super().__init__(activation)
        self.variance = variance
        if variance is None:
            self.log_std = nn.Parameter(torch.zeros(n_genes))
        else:
            self.register_buffer("fixed_std", torch.full((n_genes,), math.sqrt(variance)), persistent=False)

    @property
    def std(self) -> Tensor:
        """Standard deviation of every gene, shape ``(n_genes,)``."""
        return self.log_std.exp() + STD_FLOOR if self.variance is None else self.fixed_std

    def log_prob(self, x: Tensor, output: Tensor, library: Tensor) -> Tensor:
        """Return ``log p(x)`` summed over genes, shape ``(n_particles, n_cells)``."""
        return normal_log_prob(x, self.mean(output), self.std).sum(-1)

    def sample(self, mean: Tensor, generator: Generator) -> Tensor:
        """Draw values."""
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + self.std * noise

    def initialize(self, layer: nn.Linear, gene_share: Tensor, mean: Tensor, std: Tensor) -> None:
        """Start the output bias and, if they are learned, the standard deviations at those of the data."""
        super().initialize(layer, gene_share, mean, std)
        if self.variance is None:
            self.log_std.data.copy_(std.log())


class MeanSquaredError(ValueLikelihood):
    """The squared error, averaged over genes; no likelihood, and nothing is drawn."""

    is_density = False

    def __init__(self, n_genes: int, activation: str = "identity") -> None:
        super().__init__(activation)

    def log_prob(self, x: Tensor, output: Tensor, library: Tensor) -> Tensor:
        """Return the negative mean squared error over genes, shape ``(n_particles, n_cells)``."""
        return -(x - self.mean(output)).square().mean(-1)

    def sample(self, mean: Tensor, generator: Generator) -> Tensor:
        """Return the mean: the objective has no observation noise."""
        return mean


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "nb": NegativeBinomialLikelihood,
    "poisson": PoissonLikelihood,
    "gaussian": GaussianLikelihood,
    "mse": MeanSquaredError,
}
