"""Sparse masks of treatment effects: which latent dimensions a treatment moves, with Bernoulli or Beta-Bernoulli priors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from scvi_cradle.module.base._elbo import bernoulli_kl_logits, beta_kl, beta_log_prob

PROBABILITY_FLOOR = 1e-6
CONCENTRATION_FLOOR = 1e-4


class MaskTerms(NamedTuple):
    """Terms of masks in the bound, summed over latent dimensions; the leading axis is 1 where particles agree.

    Parameters
    ----------
    kl
        ``log q(m) - log p(m)`` with everything that the prior brings along, shape ``(n_particles or 1, n_rows)``.
    log_prior
        ``log p(m)``, same shape.
    """

    kl: Tensor
    log_prior: Tensor


def straight_through_bernoulli(logits: Tensor, temperature: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Draw 0/1 masks from relaxed Bernoullis: hard values forward, the gradient of the relaxed ones backward."""
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
    uniform = uniform.clamp(1e-7, 1 - 1e-7)
    relaxed = torch.sigmoid((logits + uniform.logit()) / temperature)
    return (relaxed > 0.5).to(relaxed) + (relaxed - relaxed.detach())


class FreeMask(nn.Module):
    """Masks with a free posterior ``q(m) = Bernoulli(sigmoid(logits))`` (SAMS-VAE, eq. 4).

    Parameters
    ----------
    n_treatments, n_latent
        Shape of the masks.
    init_logit
        Start of the posterior.
    temperature
        Temperature of the relaxed Bernoulli.
    """

    def __init__(self, n_treatments: int, n_latent: int, *, init_logit: float, temperature: float) -> None:
        super().__init__()
        self.temperature, self.init_logit = temperature, float(init_logit)
        self.logits = nn.Parameter(torch.empty(n_treatments, n_latent))
        FreeMask.reset(self)

    @torch.no_grad()
    def reset(self) -> None:
        """Put the posterior back to its start."""
        self.logits.fill_(self.init_logit)

    @property
    def probability(self) -> Tensor:
        """Posterior probability of every entry, shape ``(n_treatments, n_latent)``."""
        return torch.sigmoid(self.logits)

    def draw(self, treatment: Tensor, n_particles: int, generator: Generator | None = None) -> Tensor:
        """Draw masks of rows, shape ``(n_particles, n_rows, n_latent)``."""
        logits = self.logits[treatment].expand(n_particles, -1, -1)
        return straight_through_bernoulli(logits, self.temperature, generator)


class BernoulliMask(FreeMask):
    """``m ~ Bernoulli(alpha)`` (SAMS-VAE, eq. 1).

    Parameters
    ----------
    n_treatments, n_latent, init_logit, temperature
        As in :class:`FreeMask`.
    prior_logit
        Log-odds of ``alpha``: the log-odds of a probability of 1e-40 are exact, the probability is not.
    """

    def __init__(
        self, n_treatments: int, n_latent: int, *, prior_logit: float, init_logit: float, temperature: float
    ) -> None:
        super().__init__(n_treatments, n_latent, init_logit=init_logit, temperature=temperature)
        self.prior_logit = prior_logit

    def terms(self, treatment: Tensor, mask: Tensor, *, sampled: bool, generator: Generator | None = None) -> MaskTerms:
        """Return the terms of rows, in closed form or at the drawn ``mask``."""
        logits = self.logits[treatment][None]
        value = mask if sampled else torch.sigmoid(logits)
        normalizer = softplus(torch.as_tensor(self.prior_logit, dtype=torch.float64)).to(logits)
        log_prior = value * self.prior_logit - normalizer
        if sampled:
            kl = mask * logits - softplus(logits) - log_prior
        else:
            kl = bernoulli_kl_logits(logits, self.prior_logit)
        return MaskTerms(kl.sum(-1), log_prior.sum(-1))


class BetaBernoulliMask(FreeMask):
    r"""``p ~ Beta(a, b)`` per entry, ``m ~ Bernoulli(p)`` (SAMS-VAE, sec. 2.1; sVAE+ with ``a = 1``).

    ``point=True``: ``q(p)`` is a point ``sigmoid(logits)`` and ``q(m) = Bernoulli(p)``; the Bernoulli terms cancel and
    ``-log Beta(p; a, b)`` remains. ``point=False``: ``q(p)`` is a Beta distribution, ``q(m)`` a free Bernoulli.

    Parameters
    ----------
    n_treatments, n_latent, init_logit, temperature
        As in :class:`FreeMask`.
    concentration
        ``(a, b)``.
    point
        Kind of ``q(p)``.
    """

    def __init__(
        self,
        n_treatments: int,
        n_latent: int,
        *,
        concentration: tuple[float, float],
        point: bool,
        init_logit: float,
        temperature: float,
    ) -> None:
        super().__init__(n_treatments, n_latent, init_logit=init_logit, temperature=temperature)
        self.concentration, self.point = concentration, point
        if not point:
            self.raw_concentration = nn.Parameter(torch.empty(2, n_treatments, n_latent))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Put the posteriors of masks and of their probabilities back to their start, the latter's prior."""
        super().reset()
        if not self.point:
            start = [math.log(math.expm1(c - CONCENTRATION_FLOOR)) for c in self.concentration]
            self.raw_concentration.copy_(torch.tensor(start)[:, None, None].expand_as(self.raw_concentration))

    def terms(self, treatment: Tensor, mask: Tensor, *, sampled: bool, generator: Generator | None = None) -> MaskTerms:
        """Return the terms of rows, in closed form or at draws."""
        logits = self.logits[treatment][None]
        if self.point:
            floor = math.log(PROBABILITY_FLOOR)
            log_p, log_not = logsigmoid(logits).clamp_min(floor), logsigmoid(-logits).clamp_min(floor)
            value = mask if sampled else torch.sigmoid(logits)
            log_prior = value * log_p + (1 - value) * log_not
            return MaskTerms(-beta_log_prob(log_p, log_not, self.concentration).sum(-1), log_prior.sum(-1))
        alpha, beta = (softplus(self.raw_concentration[:, treatment]) + CONCENTRATION_FLOOR)[:, None]  # (1, R, D)
        if sampled:
            return self._sampled_terms(alpha, beta, logits, mask, generator)
        total = torch.digamma(alpha + beta)
        log_p, log_not = torch.digamma(alpha) - total, torch.digamma(beta) - total  # expectations under q(p)
        q = torch.sigmoid(logits)
        log_prior = q * log_p + (1 - q) * log_not
        negative_entropy = q * logsigmoid(logits) + (1 - q) * logsigmoid(-logits)
        kl = negative_entropy - log_prior + beta_kl((alpha, beta), self.concentration)
        return MaskTerms(kl.sum(-1), log_prior.sum(-1))

    def _sampled_terms(
        self, alpha: Tensor, beta: Tensor, logits: Tensor, mask: Tensor, generator: Generator | None
    ) -> MaskTerms:
        """Return the terms at one draw of ``p`` per particle (implicit reparameterisation of the two Gamma draws)."""
        shape = mask.shape
        one, two = (torch._standard_gamma(c.expand(shape).contiguous(), generator=generator) for c in (alpha, beta))
        p = (one / (one + two)).clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
        log_p, log_not = p.log(), (1 - p).log()
        log_prior = mask * log_p + (1 - mask) * log_not
        log_q = mask * logsigmoid(logits) + (1 - mask) * logsigmoid(-logits)
        ratio = beta_log_prob(log_p, log_not, (alpha, beta)) - beta_log_prob(log_p, log_not, self.concentration)
        return MaskTerms((log_q - log_prior + ratio).sum(-1), log_prior.sum(-1))
