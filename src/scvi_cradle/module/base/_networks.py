"""Networks shared by the modules: residual perceptrons whose first layer takes its inputs one by one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import Normal

NEGATIVE_SLOPE = 0.01
VARIANCE_FLOOR = 1e-4
MAX_LOG_VARIANCE = 15.0


class SplitLinear(nn.Module):
    """Linear layer over the concatenation of named inputs, applied to one input at a time.

    ``W [a, b] + c = W_a a + W_b b + c``: an input that is shared (by particles, passes or cells) is projected once,
    and the sum is broadcast. The weights start as those of :class:`torch.nn.Linear` over the concatenation.

    Parameters
    ----------
    sizes
        Width of every named input; a width of 0 leaves the input out.
    n_out
        Width of the output.
    """

    def __init__(self, sizes: dict[str, int], n_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(max(sum(sizes.values()), 1))
        self.weights = nn.ParameterDict(
            {k: nn.Parameter(torch.empty(n_out, n).uniform_(-bound, bound)) for k, n in sizes.items() if n > 0}
        )
        self.bias = nn.Parameter(torch.empty(n_out).uniform_(-bound, bound))

    def project(self, name: str, value: Tensor) -> Tensor:
        """Return ``W_name value``, shape ``(..., n_out)``, without the bias."""
        return nn.functional.linear(value, self.weights[name])

    def columns(self, name: str, index: Tensor) -> Tensor:
        """Return the projections of unit vectors, shape ``(len(index), n_out)``: of a sparse input only what is not 0."""
        return self.weights[name].t().index_select(0, index)


class ResidualLayers(nn.Module):
    """Hidden layers after the first: ``h <- h + LeakyReLU(W h + b)``; none for ``n_layers = 0``."""

    def __init__(self, n_layers: int, n_hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n_hidden, n_hidden) for _ in range(n_layers))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(..., n_hidden)`` to the same shape."""
        for layer in self.layers:
            hidden = hidden + activation(layer(hidden))
        return hidden


class GaussianHead(nn.Module):
    """Mean and variance of a Gaussian: ``var = exp(logvar) + 1e-4``."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.n_out = n_out
        self.linear = nn.Linear(n_in, 2 * n_out)

    def forward(self, hidden: Tensor) -> Normal:
        """Map ``(..., n_in)`` to a normal of shape ``(..., n_out)``."""
        output = self.linear(hidden)
        output = output.to(torch.promote_types(output.dtype, torch.float32))  # also in mixed precision
        mean, log_variance = output.split(self.n_out, dim=-1)
        return Normal(mean, _Scale.apply(log_variance), validate_args=False)


class _Scale(torch.autograd.Function):
    """``sqrt(exp(min(logvar, 15)) + 1e-4)`` with its gradient written out: half of the scale less its floor's part."""

    @staticmethod
    def forward(ctx: Any, log_variance: Tensor) -> Tensor:
        scale = log_variance.clamp(max=MAX_LOG_VARIANCE).exp_().add_(VARIANCE_FLOOR).sqrt_()
        ctx.save_for_backward(scale, log_variance)
        return scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        scale, log_variance = ctx.saved_tensors
        slope = (scale - VARIANCE_FLOOR / scale).mul_(grads[0]).mul_(0.5)
        return slope.masked_fill_(log_variance > MAX_LOG_VARIANCE, 0.0)


class BasalEncoder(nn.Module):
    """Posterior of a cell's latent state, e.g. ``q(z_b | x, z_p, z_a)``: a residual perceptron over the concatenated inputs.

    Parameters
    ----------
    n_genes, n_latent, n_hidden, n_layers
        Sizes; ``n_layers`` is the number of hidden layers.
    offsets
        Width of the inputs beside the expression, by name (``"perturbation"``, ``"artifact"``, ``"dosage"``);
        empty: mean field.
    """

    def __init__(self, n_genes: int, n_latent: int, n_hidden: int, n_layers: int, offsets: dict[str, int]) -> None:
        super().__init__()
        self.first = SplitLinear({"x": n_genes} | offsets, n_hidden)
        self.hidden = ResidualLayers(n_layers - 1, n_hidden)
        self.head = GaussianHead(n_hidden, n_latent)

    def forward(self, x_projected: Tensor, *offsets: Tensor) -> Normal:
        """Return the posterior, shape ``(n_particles, n_cells, n_latent)``.

        Parameters
        ----------
        x_projected
            ``first.project("x", x)``, shape ``(n_cells, n_hidden)``.
        offsets
            Projected further inputs, each broadcasting to ``(n_particles, n_cells, n_hidden)``.
        """
        hidden = x_projected + self.first.bias
        for offset in offsets:
            hidden = hidden + offset
        return self.head(self.hidden(activation(hidden)))


def activation(value: Tensor) -> Tensor:
    """Leaky rectifier with slope 0.01."""
    return nn.functional.leaky_relu(value, NEGATIVE_SLOPE)
