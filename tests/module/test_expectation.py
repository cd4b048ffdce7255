"""Expected log-normalised expression: the integral and its table against sums over counts and against draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from scvi_cradle.module.base import LogNormalizedExpectation, total_count_bias
from scvi_cradle.module.base._expectation import expected_log1p_scaled

THETAS = np.array([0.02, 0.3, 1.0, 7.0, 300.0])
RATES = np.array([1e-6, 1e-3, 0.04, 0.7, 5.0, 60.0, 900.0])
LIBRARIES = np.array([300.0, 5_000.0, 60_000.0])


def brute_force(mu, theta, scale):
    """``sum_x NB(x; mu, theta) log(1 + scale x)`` by the recursion of probabilities, to a tail below 1e-12."""
    n = int(mu + 60 * math.sqrt(mu + mu**2 / theta) + 30 / math.log1p(theta / mu) + 50)
    x = np.arange(n)
    steps = np.log((x[:-1] + theta) / (x[:-1] + 1)) + math.log(mu / (mu + theta))
    log_p = -theta * math.log1p(mu / theta) + np.concatenate([[0.0], np.cumsum(steps)])
    p = np.exp(log_p)
    assert abs(p.sum() - 1) < 1e-9
    return float(p @ np.log1p(scale * x))


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_integral_equals_the_sum(theta, library):
    scale = 1e4 / library
    expected = np.array([brute_force(mu, theta, scale) for mu in RATES])
    value = expected_log1p_scaled(RATES, np.array(theta), np.array(scale))
    np.testing.assert_allclose(value, expected, atol=1e-8, rtol=0)


def test_integral_broadcasts_as_the_table_does():
    value = expected_log1p_scaled(RATES[None, None], THETAS[None, :, None], (1e4 / LIBRARIES)[:, None, None])
    assert value.shape == (3, 5, 7)
    single = expected_log1p_scaled(RATES[4:5], THETAS[1:2], 1e4 / LIBRARIES[2:])
    assert value[2, 1, 4] == pytest.approx(single.item(), abs=1e-9)


def test_integral_has_the_limits_of_small_rates_and_of_a_constant():
    # one count at most: P(1) log(1 + c); no spread: log(1 + c mu)
    assert expected_log1p_scaled(np.array(1e-7), np.array(2.0), np.array(10.0)) == pytest.approx(
        1e-7 * math.log(11), rel=1e-6
    )
    assert expected_log1p_scaled(np.array(1e6), np.array(1e9), np.array(1.0)) == pytest.approx(
        math.log1p(1e6), abs=1e-6
    )


def read(table, mu, index):
    """Read a table at rates, shape ``(n_cells, n_genes)``, of one library size."""
    log_share = torch.as_tensor(mu / table.libraries[index], dtype=torch.float32).log()
    return table(log_share, torch.tensor(index)).numpy()


def test_table_is_within_a_thousandth_of_the_sum():
    rng = np.random.default_rng(0)
    theta = np.exp(rng.uniform(math.log(0.02), math.log(300), 12))
    table = LogNormalizedExpectation(torch.as_tensor(theta), LIBRARIES)
    worst = 0.0
    for index, library in enumerate(LIBRARIES):
        shares = np.exp(rng.uniform(math.log(1e-6), math.log(0.2), (4, 12)))
        mu = shares * library
        value = read(table, mu, index)
        expected = [
            [brute_force(m, t, 1e4 / library) / math.log(2) for m, t in zip(row, theta, strict=True)] for row in mu
        ]
        worst = max(worst, float(np.abs(value - expected).max()))
    assert worst < 1e-3


def test_table_is_within_a_thousandth_of_the_integral_everywhere():
    theta = np.exp(np.linspace(-10, 10, 61))  # all that the decoder can reach
    libraries = np.array([200.0, 3_000.0, 1e5])
    table = LogNormalizedExpectation(torch.as_tensor(theta), libraries)
    for index, library in enumerate(libraries):
        mu = np.exp(np.linspace(math.log(2e-6), math.log(library), 157))
        value = read(table, np.repeat(mu[:, None], 61, 1), index)
        expected = expected_log1p_scaled(mu[:, None], theta[None], np.array(1e4 / library)) / math.log(2)
        assert np.abs(value - expected).max() < 1e-3, library


def test_table_of_one_dispersion_and_rates_outside_its_range():
    table = LogNormalizedExpectation(torch.ones(2), np.array([1e4]))
    value = read(table, np.array([[0.0, 1e-12], [1e4, 1e4]]), 0)
    assert np.isfinite(value).all()
    assert (np.abs(value[0]) < 2e-6).all()
    expected = brute_force(1e4, 1.0, 1.0) / math.log(2)
    assert value[1, 0].item() == pytest.approx(expected, abs=1e-3)


def test_table_agrees_with_draws():
    rng = np.random.default_rng(3)
    theta, library, n = np.array([0.2, 2.0, 50.0]), 4_000.0, 200_000
    mu = np.array([0.3, 8.0, 200.0])
    x = rng.poisson(rng.gamma(theta, mu / theta, (n, 3)))
    draws = np.log2(1 + 1e4 * x / library)
    table = LogNormalizedExpectation(torch.as_tensor(theta), np.array([library]))
    value = read(table, mu[None], 0)[0]
    error = draws.std(0) / math.sqrt(n)
    assert (np.abs(draws.mean(0) - value) < 4.5 * error + 1e-3).all()
    assert (error < 0.01).all()


def test_brute_force_agrees_with_scipy():
    x = np.arange(2_000)
    expected = stats.nbinom.pmf(x, 0.7, 0.7 / 12.7) @ np.log1p(3 * x)
    assert brute_force(12.0, 0.7, 3.0) == pytest.approx(expected, abs=1e-12)


# ---- Poisson counts: theta = inf ---------------------------------------------------------------------------------------


def poisson_sum(mu, scale):
    """``sum_x Poisson(x; mu) log(1 + scale x)``."""
    x = np.arange(int(mu + 15 * math.sqrt(mu) + 60))
    return float(stats.poisson.pmf(x, mu) @ np.log1p(scale * x))


@pytest.mark.parametrize("library", LIBRARIES)
def test_integral_of_poisson_counts_equals_the_sum(library):
    scale = 1e4 / library
    value = expected_log1p_scaled(RATES, np.array(np.inf), np.array(scale))
    np.testing.assert_allclose(value, [poisson_sum(mu, scale) for mu in RATES], atol=1e-8, rtol=0)


def test_integral_tends_to_that_of_poisson_counts():
    mu, scale, thetas = np.array(5.0), np.array(2.0), np.array([1e2, 1e4, 1e6])
    distance = expected_log1p_scaled(mu, np.array(np.inf), scale) - expected_log1p_scaled(mu, thetas, scale)
    assert (distance > 0).all()  # overdispersion lowers the mean of a concave function
    np.testing.assert_allclose(distance[:-1] / distance[1:], 100, rtol=0.05)


def test_table_of_poisson_counts_is_within_a_thousandth_of_the_sum():
    table = LogNormalizedExpectation(torch.full((5,), torch.inf), LIBRARIES)
    rng = np.random.default_rng(1)
    for index, library in enumerate(LIBRARIES):
        mu = library * np.exp(rng.uniform(math.log(1e-6), math.log(0.2), (20, 5)))
        value = read(table, mu, index)
        expected = np.vectorize(poisson_sum)(mu, 1e4 / library) / math.log(2)
        assert np.abs(value - expected).max() < 1e-3, library


@pytest.mark.parametrize(("theta", "library", "low", "high"), [(0.2, 500.0, 0.04, 0.09), (20.0, 5000.0, 0.0, 0.01)])
def test_nominal_and_realised_library_sizes_differ_where_totals_vary(theta, library, low, high):
    """``x / L`` in the place of ``x / sum(x)``: the price of the integral, up to .06 at few, strongly overdispersed genes."""
    rng, n = np.random.default_rng(0), 200_000
    share = rng.dirichlet(np.ones(60))
    exact = read(LogNormalizedExpectation(torch.full((60,), theta), np.array([library])), share[None] * library, 0)[0]
    counts = rng.poisson(rng.gamma(theta, 1 / theta, (n, 60)) * share * library)
    sampled = np.log2(1 + 1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1))
    gap = np.abs(sampled.mean(0) - exact)
    assert low <= gap.max() < high
    assert (sampled.std(0) / np.sqrt(n)).max() < 0.02


@pytest.mark.parametrize(("n_holding", "theta"), [(3, 4.0), (3, 12.0), (40, 1.0)])
def test_predicted_bias_of_well_expressed_genes_is_that_of_draws(n_holding, theta):
    """Genes that hold little of the library: the difference is the square of the total's variation over 2 log 2."""
    rng, n, library = np.random.default_rng(1), 100_000, 1e5
    share = np.r_[np.full(n_holding, 0.9 / n_holding), np.full(10, 0.01)]
    dispersion = np.r_[np.full(n_holding, theta), np.full(10, 50.0)]
    predicted = total_count_bias(torch.as_tensor(share), torch.as_tensor(dispersion), torch.tensor(library)).item()
    counts = rng.poisson(rng.gamma(dispersion, 1 / dispersion, (n, len(share))) * share * library)
    nominal = np.log2(1 + 1e4 * counts[:, n_holding:] / library)
    gap = (np.log2(1 + 1e4 * counts[:, n_holding:] / counts.sum(1, keepdims=True)) - nominal).mean(1)
    variance = counts.sum(1).var() / library**2
    assert predicted == pytest.approx(variance / (2 * math.log(2)), rel=0.03)
    assert gap.mean() == pytest.approx(predicted, rel=4 * variance, abs=4 * gap.std() / math.sqrt(n))


def test_table_knows_its_values():
    theta = torch.tensor([0.5, 2.0])
    table = LogNormalizedExpectation(theta, LIBRARIES, 1e-8)
    assert table.is_of(theta.clone(), LIBRARIES.copy(), 1e-8)
    assert not table.is_of(theta + 1e-3, LIBRARIES, 1e-8)
    assert not table.is_of(theta, LIBRARIES[:2], 1e-8)
    assert not table.is_of(theta, LIBRARIES, 0.0)


def test_table_adds_the_floor_to_shares():
    table = LogNormalizedExpectation(torch.ones(1), np.array([1e5]), 1e-4)
    value = table(torch.tensor([[-40.0], [math.log(2e-4)]]), torch.tensor(0))[:, 0].numpy()
    expected = [brute_force(mu, 1.0, 0.1) / math.log(2) for mu in (10.0, 30.0)]
    np.testing.assert_allclose(value, expected, atol=1e-3)
