"""Gradients through drawn masks and embeddings: what the straight-through estimator averages to, and where it is biased.

A mask is ``m = 1{l + g > 0}`` with logistic ``g``, relaxed to ``r = sigmoid((l + g) / tau)``. The estimator of the slope of
``E f(m)`` is ``f'(m) dr/dl``; the slope itself is ``q (1 - q) (f(1) - f(0))`` with ``q = sigmoid(l)``. As ``tau -> 0``,
``dr/dl`` is a spike at ``g = -l`` half of which has ``m = 1``, so that the estimator averages to
``q (1 - q) (f'(0) + f'(1)) / 2``: the trapezoid rule for ``f(1) - f(0)``, exact for quadratics and not beyond.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special

from scvi_cradle.module.base import (
    BernoulliMask,
    BetaBernoulliMask,
    FreeGaussian,
    Pairs,
    TreatmentEffects,
    straight_through_bernoulli,
)

N_DRAWS = 200_000
LOGITS = [-1.5, 0.0, 0.8]
FUNCTIONS = {  # value, slope
    "linear": (lambda m: 1.7 * m - 0.4, lambda m: 1.7 + 0 * m),
    "quadratic": (lambda m: (2.0 * m - 0.6) ** 2, lambda m: 4.0 * (2.0 * m - 0.6)),
    "cubic": (lambda m: m**3, lambda m: 3.0 * m**2),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def exact_slope(f, logit):
    """Slope of ``E f(m)``, by enumeration of the two masks."""
    q = special.expit(logit)
    return q * (1 - q) * (f(1.0) - f(0.0))


def expected_estimate(slope, logit, temperature):
    """``E[f'(m) dr/dl]`` by quadrature over ``h = (l + g) / tau``."""

    def relaxed_slope(h):
        g = temperature * h - logit
        return special.expit(h) * special.expit(-h) * special.expit(g) * special.expit(-g)

    off, _ = integrate.quad(relaxed_slope, -80, 0, limit=200)
    on, _ = integrate.quad(relaxed_slope, 0, 80, limit=200)
    return slope(0.0) * off + slope(1.0) * on


def mean_and_error(f, logit, temperature, seed=0):
    """Average of the estimator over draws, and its standard error."""
    logits = torch.full((N_DRAWS,), logit, dtype=torch.float64, requires_grad=True)
    f(straight_through_bernoulli(logits, temperature, generator(seed))).sum().backward()
    return logits.grad.mean().item(), logits.grad.std().item() / math.sqrt(N_DRAWS)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_estimator_averages_to_its_integral(function, logit, temperature):
    f, slope = FUNCTIONS[function]
    mean, error = mean_and_error(f, logit, temperature)
    expected = expected_estimate(slope, logit, temperature)
    assert abs(mean - expected) < 4.5 * error
    assert error < 0.02 * abs(slope(0.0)) + 0.02 * abs(slope(1.0))


def test_bias_for_a_linear_function_at_temperature_one():
    """``E[dr/dl]`` is the density of the sum of two logistic variables, 1/6 at 0, where the slope is 1/4."""
    f, slope = FUNCTIONS["linear"]
    for logit in (-2.0, 0.7, 3.0):
        e = math.exp(logit)
        density = e * ((logit - 2) * e + logit + 2) / (e - 1) ** 3
        assert expected_estimate(slope, logit, 1.0) == pytest.approx(1.7 * density, rel=1e-8)
    assert expected_estimate(slope, 0.0, 1.0) / exact_slope(f, 0.0) == pytest.approx(2 / 3, rel=1e-8)
    mean, error = mean_and_error(f, 0.0, 1.0)
    assert abs(mean - 1.7 / 4) > 20 * error  # sharp enough to see the bias
    assert abs(mean - 1.7 / 6) < 4.5 * error


@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_bias_at_low_temperature_is_that_of_the_trapezoid_rule(function, logit):
    f, slope = FUNCTIONS[function]
    q, exact = special.expit(logit), exact_slope(f, logit)
    limit = q * (1 - q) * (slope(0.0) + slope(1.0)) / 2
    distance = np.array([abs(expected_estimate(slope, logit, t) - limit) for t in (0.05, 0.025, 0.0125, 0.00625)])
    assert (distance[1:] < 0.55 * distance[:-1]).all()  # linear in the temperature, or faster
    assert distance[-1] < 0.01 * (abs(slope(0.0)) + abs(slope(1.0)))
    if function == "cubic":  # 3/2 of the slope, however low the temperature
        assert limit == pytest.approx(1.5 * exact, rel=1e-12)
    else:
        assert limit == pytest.approx(exact, rel=1e-12)


# ---- divergences of masks at the draws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_sampled_mask_divergence_has_the_slope_of_the_closed_form_but_for_the_relaxation(temperature):
    """It is linear in ``m``: the slope is ``E[dr/dl] (l - l_p)`` where the closed form has ``q (1 - q) (l - l_p)``."""
    logits, prior = torch.tensor([[-1.5, 0.0, 0.8, 2.5]]), -2.0
    mask = BernoulliMask(1, 4, prior_logit=prior, init_logit=0.0, temperature=temperature).double()
    mask.logits.data.copy_(logits)
    row = torch.tensor([0])
    (closed,) = torch.autograd.grad(mask.terms(row, None, sampled=False).kl.sum(), mask.logits)
    values, q = logits[0].double().numpy(), special.expit(logits[0].double().numpy())
    np.testing.assert_allclose(closed[0], q * (1 - q) * (values - prior), rtol=1e-10)
    density = np.array([expected_estimate(lambda m: 1.0 + 0 * m, v, temperature) for v in values])
    slopes = []
    for block in range(50):
        terms = mask.terms(row, mask.draw(row, 4000, generator(block)), sampled=True)
        slopes.append(torch.autograd.grad(terms.kl.mean(0).sum(), mask.logits)[0][0])
    slopes = torch.stack(slopes).numpy()
    error = slopes.std(0) / math.sqrt(50)
    assert (np.abs(slopes.mean(0) - density * (values - prior)) < 5 * error).all()
    assert (error < 0.03 * closed[0].numpy()).all()
    if temperature == 0.1:  # nearly without bias
        np.testing.assert_allclose(density, q * (1 - q), rtol=0.02)
    else:
        assert (density[:3] < 0.9 * (q * (1 - q))[:3]).all()


def test_sampled_mask_divergence_of_the_beta_posterior_has_the_slope_of_the_closed_form_but_for_the_relaxation():
    """As above, with ``E log p - E log(1 - p)`` of ``q(p)`` in the place of the prior's log-odds."""
    mask = BetaBernoulliMask(1, 3, concentration=(2.0, 5.0), point=False, init_logit=0.5, temperature=1.0).double()
    row, prior = torch.tensor([0]), special.digamma(2.0) - special.digamma(5.0)
    (closed,) = torch.autograd.grad(mask.terms(row, None, sampled=False).kl.sum(), mask.logits)
    q = special.expit(0.5)
    np.testing.assert_allclose(closed[0], q * (1 - q) * (0.5 - prior), rtol=1e-4)
    slopes = []
    for block in range(50):
        terms = mask.terms(row, mask.draw(row, 4000, generator(block)), sampled=True, generator=generator(99 + block))
        slopes.append(torch.autograd.grad(terms.kl.mean(0).sum(), mask.logits)[0][0])
    slopes = torch.stack(slopes).numpy()
    error = slopes.std(0) / math.sqrt(50)
    expected = expected_estimate(lambda m: 1.0 + 0 * m, 0.5, 1.0) * (0.5 - prior)
    assert (np.abs(slopes.mean(0) - expected) < 5 * error).all()
    assert (error < 0.03 * expected).all()
    assert expected < 0.8 * closed.max()


# ---- embeddings ------------------------------------------------------------------------------------------------------------


def test_sampled_gaussian_divergence_has_the_slope_of_the_closed_form():
    """Reparameterised draws: no bias, with masks fixed to one so that nothing else moves."""
    effects = TreatmentEffects(None, FreeGaussian((2, 3), 0.4), prior_scale=1.5, sampled_kl=False).double()
    with torch.no_grad():
        effects.embedding.loc.copy_(torch.linspace(-2, 2, 6).reshape(2, 3))
        effects.embedding.log_scale.add_(torch.linspace(-1, 1, 6).reshape(2, 3))
    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.ones(2), 2)
    leaves, n_blocks = tuple(effects.parameters()), 50
    closed = torch.autograd.grad(effects.draw(pairs, 1, per_cell=False).kl.sum(), leaves)
    std = effects.embedding().scale.detach()
    torch.testing.assert_close(closed[0], effects.embedding.loc.detach() / 1.5**2)
    torch.testing.assert_close(closed[1], (std / 1.5**2 - 1 / std) * (std - 1e-4))
    slopes = []
    for block in range(n_blocks):
        draw = effects.draw(pairs, 4000, per_cell=False, sampled_kl=True, generator=generator(block))
        slopes.append(torch.autograd.grad(draw.kl.mean(0).sum(), leaves))
    for values, expected in zip(zip(*slopes, strict=True), closed, strict=True):
        stacked = torch.stack(values)
        error = stacked.std(0) / math.sqrt(n_blocks)
        assert ((stacked.mean(0) - expected).abs() < 5 * error + 1e-12).all()
        assert (error < 0.02).all()
