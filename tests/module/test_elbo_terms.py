"""Divergences and bounds against closed-form numbers (hand-computed) and float64 formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from scvi_cradle.module.base import (
    bernoulli_kl_logits,
    beta_kl,
    beta_log_prob,
    gaussian_kl,
    importance_weighted_bound,
    normal_log_prob,
)

DOUBLE = {"dtype": torch.float64}


def tensor(*values):
    return torch.tensor(values, **DOUBLE)


@pytest.mark.parametrize(
    ("mean_q", "std_q", "mean_p", "std_p", "expected"),
    [
        (1.0, 0.5, 0.0, 2.0, 1.0425443611),
        (0.0, 2.0, 1.0, 0.5, 8.1137056389),
        (0.5, 0.2, 0.0, 1.0, 1.2544379124),
        (0.3, 0.7, 0.3, 0.7, 0.0),
    ],
)
def test_gaussian_divergence(mean_q, std_q, mean_p, std_p, expected):
    for prior in ((mean_p, std_p), (tensor(mean_p), tensor(std_p))):
        kl = gaussian_kl(tensor(mean_q), tensor(std_q), *prior)
        assert kl.item() == pytest.approx(expected, abs=1e-10)
    q, p = stats.norm(mean_q, std_q), stats.norm(mean_p, std_p)
    integral, _ = integrate.quad(
        lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), mean_q - 12 * std_q, mean_q + 12 * std_q
    )
    assert integral == pytest.approx(expected, abs=1e-8)


def test_bernoulli_divergence_by_hand():
    kl = bernoulli_kl_logits(tensor(math.log(0.3 / 0.7)), math.log(0.01 / 0.99))
    assert kl.item() == pytest.approx(0.3 * math.log(0.3 / 0.01) + 0.7 * math.log(0.7 / 0.99), rel=1e-14)
    assert kl.item() == pytest.approx(0.7777219888, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.5, 0.1, 1e-3, 1e-9, 1e-18, 1e-36, 1e-40])
def test_bernoulli_divergence_survives_tiny_priors(alpha, dtype):
    logits = torch.linspace(-30, 30, 25, dtype=dtype)
    q = 1 / (1 + np.exp(-logits.double().numpy()))
    not_q = 1 / (1 + np.exp(logits.double().numpy()))
    expected = q * np.log(q / alpha) + not_q * (np.log(not_q) - np.log1p(-alpha))
    kl = bernoulli_kl_logits(logits.requires_grad_(), math.log(alpha) - math.log1p(-alpha))
    # torch's softplus is linear above 20, which moves value and slope by up to exp(-20); in float32 the error follows
    # the terms of the sum, which are as large as the larger log-odds
    atol = 3e-9 if dtype == torch.float64 else 4e-7 * max(30.0, -math.log(alpha))
    np.testing.assert_allclose(kl.detach().double().numpy(), expected, rtol=1e-12, atol=atol)
    kl.sum().backward()
    slope = q * not_q * (logits.detach().double().numpy() - math.log(alpha) + math.log1p(-alpha))  # d KL / d logit
    np.testing.assert_allclose(logits.grad.double().numpy(), slope, rtol=1e-12, atol=atol)


def test_equal_bernoullis_do_not_diverge():
    assert bernoulli_kl_logits(tensor(-4.6), -4.6).item() == pytest.approx(0.0, abs=1e-15)


def test_normal_log_density_equals_scipy():
    value, mean, std = tensor(-3.0, 0.0, 2.5), tensor(0.5, 0.0, -1.0), tensor(0.01, 1.0, 7.0)
    expected = stats.norm.logpdf(value, mean, std)
    np.testing.assert_allclose(normal_log_prob(value, mean, std), expected, rtol=1e-13)
    np.testing.assert_allclose(normal_log_prob(value, 0.5, 2.0), stats.norm.logpdf(value, 0.5, 2.0), rtol=1e-13)


# ---- Beta distributions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "k", "expected"),
    [(0.9, 2, -1.6094379124), (0.1, 2, 0.5877866649), (0.9, 10, -18.4206807440), (0.1, 10, 1.3543404521)],
)
def test_log_beta_density_of_one_and_k(q, k, expected):
    """``log Beta(q; 1, K) = log K + (K - 1) log(1 - q)`` (Lopez et al. 2023)."""
    value = beta_log_prob(tensor(math.log(q)), tensor(math.log1p(-q)), (1.0, float(k)))
    assert value.item() == pytest.approx(expected, abs=1e-10)
    assert value.item() == pytest.approx(math.log(k) + (k - 1) * math.log1p(-q), rel=1e-13)


@pytest.mark.parametrize("concentration", [(1.0, 1.0), (0.3, 0.7), (1.0, 50.0), (20.0, 3.0)])
def test_log_beta_density_equals_scipy(concentration):
    q = np.array([1e-12, 1e-3, 0.2, 0.5, 0.97])
    expected = stats.beta.logpdf(q, *concentration)
    for c in (concentration, tuple(tensor(v).expand(5) for v in concentration)):
        value = beta_log_prob(torch.as_tensor(np.log(q)), torch.as_tensor(np.log1p(-q)), c)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("q", [(1.0, 1.0), (0.4, 0.6), (3.0, 1.5), (0.5, 40.0)])
@pytest.mark.parametrize("p", [(1.0, 2.0), (1.0, 10.0), (0.5, 0.5), (6.0, 2.0)])
def test_beta_divergence_equals_its_integral(q, p):
    def integrand(s):  # over the log-odds s of the probability
        log_p, log_not = special.log_expit(s), special.log_expit(-s)
        log_q = q[0] * log_p + q[1] * log_not - special.betaln(*q)
        log_prior = p[0] * log_p + p[1] * log_not - special.betaln(*p)
        return np.exp(log_q) * (log_q - log_prior)

    expected, _ = integrate.quad(integrand, -250, 250, points=[0.0], limit=500)
    kl = beta_kl((tensor(q[0]), tensor(q[1])), p)
    assert kl.item() == pytest.approx(expected, rel=1e-8, abs=1e-9)
    assert kl.item() >= 0


def test_equal_betas_do_not_diverge_and_slopes_are_those_of_differences():
    a, b = tensor(2.5).requires_grad_(), tensor(0.7).requires_grad_()
    assert beta_kl((a, b), (2.5, 0.7)).item() == pytest.approx(0.0, abs=1e-14)
    assert torch.autograd.gradcheck(lambda a, b: beta_kl((a, b), (1.0, 4.0)), (a, b))


# ---- importance-weighted bounds ----------------------------------------------------------------------------------------


def test_importance_weighted_bound_of_two_particles():
    bound = importance_weighted_bound(tensor([-1.0, -2.0], [-3.0, -2.5]))  # two particles of two cells
    np.testing.assert_allclose(bound.numpy(), [-1.5662191695, -2.2190701964], atol=1e-10)
    assert bound.mean().item() == pytest.approx(-1.8926446829, abs=1e-10)


def test_importance_weighted_bound_of_one_particle_and_of_extreme_weights():
    assert importance_weighted_bound(tensor([-7.5])).item() == -7.5
    assert importance_weighted_bound(tensor(-2000.0, -3000.0)).item() == pytest.approx(-2000 - math.log(2))
