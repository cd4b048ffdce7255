"""Observation models: log-likelihoods against scipy, draws against moments, starts against the data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from scvi_cradle.module.base import (
    Decoder,
    GaussianLikelihood,
    MeanSquaredError,
    NegativeBinomialLikelihood,
    PerceptronDecoder,
    PoissonLikelihood,
)

N_GENES, N_DRAWS = 4, 200_000
KINDS = {"nb": NegativeBinomialLikelihood, "poisson": PoissonLikelihood, "gaussian": GaussianLikelihood}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(dtype=torch.float64):
    """Counts (one cell without any), outputs of two particles and library sizes."""
    rng = np.random.default_rng(0)
    x = rng.poisson(4.0, (5, N_GENES))
    x[0] = 0
    library = np.maximum(x.sum(1, keepdims=True), 1)
    return [torch.as_tensor(v, dtype=dtype) for v in (x, rng.normal(0, 1.5, (2, 5, N_GENES)), library)]


def shares(output):
    """Softmax over genes, in numpy."""
    weight = np.exp(output - output.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


# ---- log-likelihoods ---------------------------------------------------------------------------------------------------


def test_poisson_equals_scipy():
    x, output, library = problem()
    value = PoissonLikelihood(N_GENES).log_prob(x, output, library)
    rate = library.numpy() * (shares(output.numpy()) + 1e-8)
    np.testing.assert_allclose(value.numpy(), stats.poisson.logpmf(x.numpy(), rate).sum(-1), rtol=1e-12)


def test_gaussian_equals_scipy_and_knows_no_library():
    x, output, library = problem()
    likelihood = GaussianLikelihood(N_GENES).double()
    with torch.no_grad():
        likelihood.log_std.copy_(torch.tensor([-12.0, -1.0, 0.0, 2.0]))
    value = likelihood.log_prob(x, output, library).detach()
    std = np.exp([-12.0, -1.0, 0.0, 2.0]) + 1e-3  # the floor leaves a density to a gene without spread
    np.testing.assert_allclose(value.numpy(), stats.norm.logpdf(x.numpy(), output.numpy(), std).sum(-1), rtol=1e-12)
    assert torch.equal(value, likelihood.log_prob(x, output, 7 * library))


def test_negative_binomial_equals_scipy_and_tends_to_poisson():
    x, output, library = problem()
    likelihood = NegativeBinomialLikelihood(N_GENES).double()
    with torch.no_grad():
        likelihood.log_theta.copy_(torch.tensor([-3.0, -1.0, 0.0, 2.0]))
    theta, rate = np.exp([-3.0, -1.0, 0.0, 2.0]), library.numpy() * (shares(output.numpy()) + 1e-8)
    expected = stats.nbinom.logpmf(x.numpy(), theta, theta / (theta + rate)).sum(-1)
    np.testing.assert_allclose(likelihood.log_prob(x, output, library).detach().numpy(), expected, rtol=1e-10)
    poisson, distance = PoissonLikelihood(N_GENES).log_prob(x, output, library), []
    for log_theta in (4.0, 7.0, 10.0):
        likelihood.log_theta.data.fill_(log_theta)
        distance.append((likelihood.log_prob(x, output, library) - poisson).abs().max().item())
    ratios = np.divide(distance[:-1], distance[1:])  # the distance falls as 1 / theta
    np.testing.assert_allclose(ratios, math.exp(3.0), rtol=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_form_has_the_value_and_slopes_of_the_plain_form(kind):
    torch.manual_seed(0)
    x, _, library = problem()
    decoder = Decoder(N_GENES, {"basal": 3}, 6, 1, n_covariates=0, likelihood=kind).double()
    features = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 0.3], dtype=torch.float64)
    log_prob = decoder.log_prob(x, features, library)
    weighted, values = decoder.weighted_log_prob(x, features, library, weight)
    torch.testing.assert_close(values, log_prob.detach())
    torch.testing.assert_close(weighted, (log_prob * weight).sum())
    assert not values.requires_grad
    leaves = [features, *decoder.output.parameters(), *decoder.likelihood.parameters()]
    expected = torch.autograd.grad((log_prob * weight).sum(), leaves)
    for slope, plain in zip(torch.autograd.grad(weighted, leaves), expected, strict=True):
        torch.testing.assert_close(slope, plain)
        assert slope.abs().max() > 0


def test_extreme_outputs_stay_finite():
    output = torch.tensor([[[200.0, 0.0, -300.0, 0.0]]], requires_grad=True)
    x, library = torch.tensor([[0.0, 3.0, 2.0, 0.0]]), torch.tensor([[5.0]])
    for kind in (PoissonLikelihood, GaussianLikelihood, NegativeBinomialLikelihood):
        value = kind(N_GENES).log_prob(x, output, library)
        (slope,) = torch.autograd.grad(value.sum(), output)
        assert torch.isfinite(value).all()
        assert torch.isfinite(slope).all()


# ---- draws -------------------------------------------------------------------------------------------------------------


def within_error(x, mean, variance):
    """Compare mean and variance of draws with their expectations, within 4.5 standard errors."""
    x, n = x.detach().double(), len(x)
    fourth = ((x - x.mean(0)) ** 4).mean(0)
    assert ((x.mean(0) - mean).abs() < 4.5 * (variance / n).sqrt()).all()
    assert ((x.var(0) - variance).abs() < 4.5 * ((fourth - variance**2) / n).sqrt()).all()


def test_sampled_counts_have_the_moments_of_the_negative_binomial():
    likelihood, theta = NegativeBinomialLikelihood(2), torch.tensor([0.5, 20.0])
    with torch.no_grad():
        likelihood.log_theta.copy_(theta.log())
        x = likelihood.sample(torch.full((N_DRAWS, 2), 3.0), generator())
    np.testing.assert_allclose(x.mean(0), [3, 3], rtol=0.02)
    np.testing.assert_allclose(x.var(0), 3 + 9 / theta, rtol=0.04)
    within_error(x, torch.full((2,), 3.0), 3 + 9 / theta)


def test_sampled_counts_have_the_moments_and_frequencies_of_the_poisson():
    mean = torch.tensor([0.1, 3.0, 40.0])
    x = PoissonLikelihood(3).sample(mean.expand(N_DRAWS, -1), generator(1))
    within_error(x, mean, mean)
    frequency = np.bincount(x[:, 1].int().numpy(), minlength=12)[:12] / N_DRAWS
    np.testing.assert_allclose(frequency, stats.poisson.pmf(np.arange(12), 3.0), atol=0.005)


def test_sampled_values_have_the_moments_of_the_gaussian():
    likelihood, mean = GaussianLikelihood(3), torch.tensor([-2.0, 0.0, 5.0])
    with torch.no_grad():
        likelihood.log_std.copy_(torch.tensor([-2.0, 0.0, 1.0]))
    x = likelihood.sample(mean.expand(N_DRAWS, -1), generator(2))
    within_error(x, mean, likelihood.std.detach() ** 2)
    known = GaussianLikelihood(3, variance=0.01)
    within_error(known.sample(mean.expand(N_DRAWS, -1), generator(2)), mean, torch.full((3,), 0.01))
    assert not list(known.parameters())
    assert not known.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_their_generator_alone(kind):
    likelihood, mean = KINDS[kind](3), torch.full((50, 3), 4.0)
    first, again, other = (likelihood.sample(mean, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- starts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nb", "poisson"])
def test_counts_start_at_the_mean_gene_shares(kind):
    decoder = Decoder(N_GENES, {"basal": 3}, 6, 1, n_covariates=0, likelihood=kind)
    share = torch.tensor([0.6, 0.3, 0.1, 0.0])
    decoder.initialize_output(share, torch.full((4,), 9.0), torch.full((4,), 9.0))
    mean = decoder.likelihood.mean(decoder.output.bias, torch.tensor([1000.0])).detach()
    torch.testing.assert_close(mean, 1000 * share, atol=2e-3, rtol=1e-5)
    assert mean[3] > 0  # a gene not seen in training keeps a finite likelihood


def test_values_start_at_the_mean_and_spread_of_the_data():
    decoder = Decoder(N_GENES, {"basal": 3}, 6, 1, n_covariates=0, likelihood="gaussian")
    mean, std = torch.tensor([-1.0, 0.0, 2.0, 5.0]), torch.tensor([0.5, 1.0, 2.0, 0.1])
    decoder.initialize_output(torch.full((4,), 0.25), mean, std)
    assert torch.equal(decoder.output.bias.detach(), mean)
    torch.testing.assert_close(decoder.likelihood.std.detach(), std + 1e-3)


@pytest.mark.parametrize("kind", ["gaussian", "mse"])
@pytest.mark.parametrize(
    ("activation", "start"),
    [
        ("identity", [-1.0, 0.0, 1e-5, 2.0, 300.0]),
        ("softplus", [1e-3, 1e-3, 1e-3, 2.0, 300.0]),  # the least mean that is started at
        ("leaky_relu", [-1.0, 0.0, 1e-5, 2.0, 300.0]),
    ],
)
def test_values_start_at_the_mean_under_every_activation(kind, activation, start):
    mean = torch.tensor([-1.0, 0.0, 1e-5, 2.0, 300.0])
    decoder = PerceptronDecoder(5, {"z": 3}, 6, 1, n_covariates=0, likelihood=kind, activation=activation)
    decoder.initialize_output(torch.full((5,), 0.2), mean, torch.ones(5))
    torch.testing.assert_close(decoder.likelihood.mean(decoder.output.bias).detach(), torch.tensor(start))


@pytest.mark.parametrize(
    ("activation", "by_hand"),
    [("softplus", lambda v: np.logaddexp(0, v)), ("leaky_relu", lambda v: np.where(v > 0, v, 0.2 * v))],
)
def test_activations_enter_the_density_and_the_error(activation, by_hand):
    x, output, library = problem()
    mean = by_hand(output.numpy())
    value = GaussianLikelihood(N_GENES, activation, 0.04).double().log_prob(x, output, library)
    np.testing.assert_allclose(value.numpy(), stats.norm.logpdf(x.numpy(), mean, 0.2).sum(-1), rtol=1e-6)
    value = MeanSquaredError(N_GENES, activation).log_prob(x, output, library)
    np.testing.assert_allclose(value.numpy(), -((x.numpy() - mean) ** 2).mean(-1), rtol=1e-12)
