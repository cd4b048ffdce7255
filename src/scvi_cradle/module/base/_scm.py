"""A linear Gaussian causal model of latent variables whose mechanisms depend on the treatments (PerturbedVAE)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from scvi_cradle.module.base._elbo import gaussian_kl
from scvi_cradle.module.base._perceptron import perceptron

LOG_VARIANCE_BOUND = 5.0
INIT_SCALE = 0.1


class Mechanism(NamedTuple):
    """Mechanisms of cells (or of labels), one per leading index.

    Parameters
    ----------
    mean, variance
        Of the noise ``n_nu``, shape ``(..., n_responsive)``.
    weights
        ``Lambda_nunu``: effects of responsive variables on later ones, strictly lower triangular, shape
        ``(..., n_responsive, n_responsive)``.
    context
        ``Lambda_nuiota``: effects of invariant on responsive variables, shape ``(..., n_responsive, n_invariant)``.
    """

    mean: Tensor
    variance: Tensor
    weights: Tensor
    context: Tensor

    def respond(self, noise: Tensor, z_invariant: Tensor) -> Tensor:
        """Return ``z_nu`` with ``z_nu = Lambda_nuiota z_iota + Lambda_nunu z_nu + mean + noise``, ``(..., n_responsive)``."""
        return solve_in_order(self.weights, noise + self.modulation(z_invariant) + self.mean)

    def reduced_context(self) -> Tensor:
        """Return the total effects of invariant on responsive variables, ``(I - Lambda_nunu)^-1 Lambda_nuiota``."""
        return solve_columns(self.weights, self.context)

    def modulation(self, z_invariant: Tensor) -> Tensor:
        """Return ``Lambda_nuiota z_iota``, shape ``(..., n_responsive)``."""
        return (self.context @ z_invariant[..., None])[..., 0]


class CausalDraw(NamedTuple):
    """What ``inference`` draws; the leading axis of latent variables is the particle.

    Parameters
    ----------
    q_basal, z_basal
        Posterior of the invariant variables ``z_iota`` and a draw, shape ``(n_particles, n_cells, n_invariant)``.
    q_noise, noise
        Posterior of the noise of the responsive variables beside its prior mean, and a draw, shape
        ``(n_particles, n_cells, n_responsive)``.
    mechanism
        :class:`Mechanism` of every cell.
    z_responsive
        ``z_nu``, shape ``(n_particles, n_cells, n_responsive)``.
    hidden
        Output of the shared encoder, shape ``(1, n_cells, n_hidden)``.
    q_partner
        Posterior of the invariant variables of the cells' control partners, if they are given, shape
        ``(n_particles, n_cells, n_invariant)``.
    prior_mean, effects
        0, the mean of the prior of ``z_iota``, and None: there are no global variables.
    """

    q_basal: Normal
    z_basal: Tensor
    q_noise: Normal
    noise: Tensor
    mechanism: Mechanism
    z_responsive: Tensor
    hidden: Tensor
    q_partner: Normal | None = None
    prior_mean: float = 0.0
    effects: Any = None


def solve_in_order(weights: Tensor, inputs: Tensor) -> Tensor:
    """Return ``z`` with ``z = weights z + inputs``, variable after variable, shape ``(..., d)``.

    Parameters
    ----------
    weights
        Strictly lower triangular, shape ``(..., d, d)``.
    inputs
        What enters every variable from outside, shape ``(..., d)``.
    """
    return solve_columns(weights, inputs[..., None])[..., 0]


def solve_columns(weights: Tensor, inputs: Tensor) -> Tensor:
    """Return :func:`solve_in_order` of every column of ``inputs``, shape ``(..., d, k)``."""
    # nothing is solved in less than single precision
    wide = torch.promote_types(torch.promote_types(weights.dtype, inputs.dtype), torch.float32)
    system = torch.eye(weights.shape[-1], dtype=wide, device=weights.device) - weights
    return torch.linalg.solve_triangular(system, inputs.to(wide), upper=False, unitriangular=True)


def noise_kl(mean: Tensor, std: Tensor, variance: Tensor) -> Tensor:
    r"""Return ``KL(q(z_nu | z_iota, x, u) || p(z_nu | z_iota, u))`` in closed form, shape ``(...)``.

    Prior and posterior are images of :math:`N(0, \beta)` and :math:`N(m, s^2)` under the same affine bijection of unit
    Jacobian, and a divergence does not change under a bijection:

    .. math:: \tfrac12 \sum_i \Big[\frac{s_i^2 + m_i^2}{\beta_i} - 1 - \log\frac{s_i^2}{\beta_i}\Big].

    Parameters
    ----------
    mean, std
        Of the posterior of the noise beside its prior mean, shape ``(..., n_responsive)``.
    variance
        Of the prior of the noise, same shape.
    """
    return gaussian_kl(mean, std, 0.0, variance.sqrt()).sum(-1)


class LatentCausalModel(nn.Module):
    """Networks from dosages to mechanisms (PerturbedVAE, eqs. 6-9 and 59).

    Parameters
    ----------
    n_treatments, n_responsive, n_invariant, n_hidden
        Sizes.
    mechanism
        ``"mlp"``: every parameter is a network of the dosages with one hidden layer; ``"linear"``: a constant plus a term
        per treatment, so that the mechanisms of a combination are sums of those of its treatments.
    noise_scale
        Variances of the noise are ``"learned"``, as functions of the dosages, or ``"fixed"`` at 1.
    lambda_bound
        ``"tanh"`` keeps all weights within (-1, 1).
    """

    def __init__(
        self,
        n_treatments: int,
        n_responsive: int,
        n_invariant: int,
        n_hidden: int,
        *,
        mechanism: Literal["mlp", "linear"],
        noise_scale: Literal["learned", "fixed"],
        lambda_bound: Literal["tanh"] | None,
    ) -> None:
        super().__init__()
        self.n_responsive, self.n_invariant, self.bounded = n_responsive, n_invariant, lambda_bound == "tanh"
        sizes = {
            "mean": n_responsive,
            "weights": n_responsive**2,
            "context": n_responsive * n_invariant,
            "log_variance": n_responsive if noise_scale == "learned" else 0,
        }
        n_layers = 1 if mechanism == "mlp" else 0
        self.networks = nn.ModuleDict(
            {name: perceptron(n_treatments, n_hidden, n_layers, n_out) for name, n_out in sizes.items() if n_out}
        )
        for network in self.networks.values():
            for parameter in list(network.children())[-1].parameters():
                parameter.data.mul_(INIT_SCALE)

    def forward(self, dosage: Tensor) -> Mechanism:
        """Return the mechanisms of dosages of shape ``(..., n_treatments)``."""
        values = {name: network(dosage) for name, network in self.networks.items()}
        weights = values["weights"].unflatten(-1, (self.n_responsive, self.n_responsive)).tril(-1)
        context = values["context"].unflatten(-1, (self.n_responsive, self.n_invariant))
        if self.bounded:
            weights, context = weights.tanh(), context.tanh()
        if "log_variance" in values:
            variance = values["log_variance"].clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND).exp()
        else:
            variance = torch.ones_like(values["mean"])
        return Mechanism(values["mean"], variance, weights, context)
