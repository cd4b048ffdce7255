"""Non-negative negative-unlabeled risk, and many small classifiers in one module."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from scvi_cradle._validation import check_one_of

Correction: TypeAlias = Literal["clamp", "ascent"]
CORRECTIONS = ("clamp", "ascent")


def nnnu_risk(
    g_unlabeled: Tensor,
    g_negative: Tensor,
    prevalence: Tensor | float,
    *,
    mask_unlabeled: Tensor | None = None,
    mask_negative: Tensor | None = None,
    correction: Correction = "clamp",
    beta: float = 0.0,
    gamma: float = 1.0,
) -> Tensor:
    r"""Return the non-negative risk of classifiers that know negatives and a mixture (quantile-hurdle paper, eq. 6).

    With :math:`\ell^+(g) = \mathrm{softplus}(-g)`, :math:`\ell^-(g) = \mathrm{softplus}(g)` and the share
    :math:`\alpha` of positives among the unlabeled cells,

    .. math::
        \hat R = \bigl(\hat E_U[\ell^+] - (1-\alpha) \hat E_N[\ell^+]\bigr)_+ + (1-\alpha) \hat E_N[\ell^-],

    the risk on the unlabeled cells; the bracket estimates the part of the positives. Its minimiser is the log odds of
    being positive among them, :math:`g^* = \log \alpha p_+ / ((1-\alpha) p_-)`.

    Parameters
    ----------
    g_unlabeled, g_negative
        Logits of the unlabeled and of the negative cells, shapes ``(n_heads, n)`` and ``(n_heads, m)``.
    prevalence
        Share :math:`\alpha` of positives among the unlabeled cells, a number or shape ``(n_heads,)``.
    mask_unlabeled, mask_negative
        True for cells that count, shapes of the logits (or shapes that broadcast to them); ``None``: all. A mean over
        no cell is 0.
    correction
        ``"clamp"``: as above, without gradient of the bracket where it is negative. ``"ascent"``: where the bracket
        lies below :math:`-\beta`, the gradient is :math:`-\gamma` times its gradient and nothing else, so that a step
        leads back (Kiryo et al. 2017, algorithm 1); the value is that of the bracket clamped at :math:`-\beta`.
    beta, gamma
        Tolerance and step of ``"ascent"``.

    Returns
    -------
    The risk of every head, shape ``(n_heads,)``.
    """
    check_one_of("correction", correction, CORRECTIONS)
    certain = 1.0 - torch.as_tensor(prevalence, dtype=g_negative.dtype, device=g_negative.device)
    rest = certain * _mean(softplus(g_negative), mask_negative)
    bracket = _mean(softplus(-g_unlabeled), mask_unlabeled) - certain * _mean(softplus(-g_negative), mask_negative)
    if correction == "clamp":
        return bracket.clamp_min(0.0) + rest
    value = bracket.clamp_min(-beta) + rest
    surrogate = torch.where(bracket < -beta, -gamma * bracket, bracket + rest)
    return value.detach() + surrogate - surrogate.detach()


def _mean(losses: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return losses.mean(-1) if losses.shape[-1] else losses.sum(-1)
    mask = mask.expand_as(losses)
    return torch.where(mask, losses, 0.0).sum(-1) / mask.sum(-1).clamp_min(1)


class ClassifierBank(nn.Module):
    r"""Classifiers :math:`g(z) = w_2 \cdot \mathrm{relu}(W_1 z + b_1) + b_2` of the same size, side by side.

    All parameters of a classifier are one row of ``weights``, shape ``(n_heads, (n_in + 2) n_hidden + 1)``: heads are
    taken out, stored and put back by indexing rows.

    Parameters
    ----------
    n_heads
        Number of classifiers.
    n_in, n_hidden
        Width of their input and of their hidden layer.
    dropout
        Probability with which a hidden unit of a cell is left out in training mode.
    generators
        One per head, for its start (the start of a head then does not depend on the others); ``None``: torch's global
        generator. The start is that of :class:`torch.nn.Linear`.
    """

    def __init__(
        self,
        n_heads: int,
        n_in: int,
        n_hidden: int = 16,
        dropout: float = 0.5,
        *,
        generators: list[torch.Generator] | None = None,
    ) -> None:
        super().__init__()
        self.n_in, self.n_hidden, self.dropout = n_in, n_hidden, dropout
        start = torch.empty(n_heads, (n_in + 2) * n_hidden + 1)
        for head, row in enumerate(start):
            row.uniform_(-1.0, 1.0, generator=None if generators is None else generators[head])
        inner = (n_in + 1) * n_hidden
        start[:, :inner] /= math.sqrt(n_in)
        start[:, inner:] /= math.sqrt(n_hidden)
        self.weights = nn.Parameter(start)

    @property
    def hidden(self) -> Tensor:
        """Weights of the hidden layers, shape ``(n_heads, n_in + 1, n_hidden)``; the last row is the bias."""
        return hidden_part(self.weights, self.n_hidden)

    @property
    def output(self) -> Tensor:
        """Weights of the outputs, shape ``(n_heads, n_hidden + 1)``; the last column is the bias."""
        return self.weights[:, -(self.n_hidden + 1) :]

    def forward(self, z: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the logits of ``z``, shape ``(n_heads, n, n_in)`` or ``(n, n_in)``, as ``(n_heads, n)``."""
        h = torch.relu(z @ self.hidden[:, :-1] + self.hidden[:, -1:])
        if self.training and self.dropout:
            keep = torch.rand(h.shape, generator=generator, device=h.device) >= self.dropout
            h = h * keep / (1.0 - self.dropout)
        return (h @ self.output[:, :-1, None]).squeeze(-1) + self.output[:, -1:]


def hidden_part(weights: Tensor, n_hidden: int) -> Tensor:
    """Return the hidden layers within rows of weights, shape ``(n_heads, n_in + 1, n_hidden)``, as a view."""
    return weights[:, : -(n_hidden + 1)].unflatten(1, (-1, n_hidden))
