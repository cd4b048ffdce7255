"""Quantiles as outputs of a network: pinball loss, heads that do not cross, and the distribution between the levels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

Monotone = Literal["cumsum", "sort", "penalty"]

START_FLOOR = 1e-4


def pinball(y: Tensor, q: Tensor, levels: Tensor) -> Tensor:
    """Return ``rho_tau(u) = tau max(0, u) + (1 - tau) max(0, -u)`` with ``u = y - q`` (quantile-hurdle paper, eq. 3).

    Parameters
    ----------
    y
        Values, shape ``(...)``.
    q
        Predicted quantiles, shape ``(..., n_levels)``.
    levels
        Levels ``tau``, shape ``(n_levels,)``.

    Returns
    -------
    Loss of every value at every level, shape ``(..., n_levels)``.
    """
    u = y[..., None] - q
    return levels * u + relu(-u)


def monotone_quantiles(a: Tensor, kind: Monotone) -> Tensor:
    """Return positive quantiles from unconstrained outputs, both ``(..., n_levels)``.

    ``"cumsum"``: sums of softplus increments, ``q_1 = s(a_1)`` and ``q_(i+1) = q_i + s(a_(i+1))``; ``"sort"``: ``s(a)``
    in order; ``"penalty"``: ``s(a)`` as it is, kept in order by :func:`crossing_penalty` alone.
    """
    positive = softplus(a)
    if kind == "cumsum":
        return positive.cumsum(-1)
    return positive.sort(-1).values if kind == "sort" else positive


def crossing_penalty(q: Tensor) -> Tensor:
    """Return the mean of ``max(0, q_i - q_(i+1))`` over neighbouring levels, shape ``(...)``; 0 where they are in order."""
    return relu(q[..., :-1] - q[..., 1:]).mean(-1)


def inverse_softplus(value: Tensor) -> Tensor:
    """Return ``a`` with ``softplus(a) = value``; values below 1e-4 count as 1e-4, which leaves ``a`` a gradient."""
    value = value.clamp_min(START_FLOOR)
    return value + (-torch.expm1(-value)).log()


def increments_of(quantiles: Tensor) -> Tensor:
    """Return the outputs ``a`` from which ``monotone_quantiles(a, "cumsum")`` makes given quantiles.

    Increments below 1e-4 become 1e-4. Both shapes are ``(..., n_levels)``.
    """
    return inverse_softplus(torch.diff(quantiles, dim=-1, prepend=torch.zeros_like(quantiles[..., :1])))


def interpolate_quantiles(u: Tensor, levels: Tensor, q: Tensor) -> Tensor:
    """Return the value at ``u`` of the quantile function that is linear between the levels and flat beyond them.

    Parameters
    ----------
    u
        Probabilities, shape ``(...)``.
    levels
        At least two increasing levels, shape ``(n_levels,)``.
    q
        Quantiles in order, shape ``(..., n_levels)``.
    """
    upper = torch.searchsorted(levels, u.contiguous()).clamp(1, len(levels) - 1)
    low, high = levels[upper - 1], levels[upper]
    share = ((u - low) / (high - low)).clamp(0, 1)
    q_low, q_high = (q.gather(-1, i[..., None]).squeeze(-1) for i in (upper - 1, upper))
    return torch.lerp(q_low, q_high, share)


def quantile_mean(levels: Tensor, q: Tensor, *, log: bool = False) -> Tensor:
    """Return the mean of the distribution of :func:`interpolate_quantiles` with ``u`` uniform, shape ``(...)``.

    Parameters
    ----------
    levels, q
        Levels ``(n_levels,)`` and quantiles in order ``(..., n_levels)``.
    log
        The quantiles are those of ``log(1 + x)``, and the mean of ``x`` is wanted.
    """
    if log:  # of exp over a segment of width d: (exp(d) - 1) / d, and 1 for d = 0
        d = torch.diff(q, dim=-1)
        of_segment = q[..., :-1].exp() * torch.where(d > 0, torch.expm1(d) / d.clamp_min(torch.finfo(d.dtype).tiny), 1)
        ends = q[..., [0, -1]].exp()
    else:
        of_segment, ends = (q[..., :-1] + q[..., 1:]) / 2, q[..., [0, -1]]
    tails = torch.stack([levels[0], 1 - levels[-1]])
    return (of_segment * torch.diff(levels)).sum(-1) + (ends * tails).sum(-1) - float(log)


def quantile_median(levels: Tensor, q: Tensor, probability: Tensor | None = None) -> Tensor:
    """Return the median of a value that is positive with some probability and else 0, shape ``(...)``.

    Parameters
    ----------
    levels, q
        Levels ``(n_levels,)`` and quantiles, in order, of the value where it is positive, ``(..., n_levels)``.
    probability
        Probability of a positive value, shape ``(...)``; default 1.
    """
    if probability is None:
        return interpolate_quantiles(q.new_full(q.shape[:-1], 0.5), levels, q)
    u = 1 - 0.5 / probability.clamp_min(0.5)
    return torch.where(probability > 0.5, interpolate_quantiles(u, levels, q), 0.0)
