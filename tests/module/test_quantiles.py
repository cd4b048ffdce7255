"""Quantiles: pinball loss, heads that do not cross, the distribution between the levels, and empirical starts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import integrate

from scvi_cradle.data import empirical_quantiles
from scvi_cradle.module.base import (
    crossing_penalty,
    increments_of,
    interpolate_quantiles,
    inverse_softplus,
    monotone_quantiles,
    pinball,
    quantile_mean,
    quantile_median,
)

LEVELS = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
KINDS = ("cumsum", "sort", "penalty")


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- pinball -----------------------------------------------------------------------------------------------------------


def test_pinball_of_the_worked_example():
    loss = pinball(double(2.0)[0], double(1.0, 2.0, 3.5), LEVELS)
    np.testing.assert_allclose(loss.numpy(), [0.1, 0.0, 0.15], atol=1e-12)
    assert abs(loss.mean().item() - 0.0833333333) < 1e-9


def test_pinball_is_least_at_the_empirical_quantiles():
    y = torch.as_tensor(np.random.default_rng(0).gamma(2.0, size=2001))
    grid = torch.linspace(0.01, 8.0, 2000, dtype=torch.float64)
    risk = pinball(y[:, None], grid[:, None].expand(-1, 3), LEVELS).mean(0)  # (n_grid, 3)
    np.testing.assert_allclose(grid[risk.argmin(0)].numpy(), np.quantile(y.numpy(), LEVELS.numpy()), atol=8 / 1999)


# ---- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_quantiles_are_positive_and_in_order(kind):
    a = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    q = monotone_quantiles(a, kind)
    assert (q > 0).all()
    penalty = crossing_penalty(q)
    if kind == "penalty":
        torch.testing.assert_close(q, torch.nn.functional.softplus(a))
        expected = np.maximum(-np.diff(q.numpy()), 0).mean(1)
        np.testing.assert_allclose(penalty.numpy(), expected, rtol=1e-12)
        assert (penalty > 0).all()
    else:
        assert (q.diff(dim=-1) >= 0).all()
        assert (penalty == 0).all()


def test_increments_are_summed():
    a = double(0.3, -1.0, 2.0)
    expected = np.cumsum(np.log1p(np.exp(a.numpy())))
    np.testing.assert_allclose(monotone_quantiles(a, "cumsum").numpy(), expected, rtol=1e-12)


def test_starts_give_back_the_quantiles():
    q = double(0.02, 0.5, 0.9, 7.0, 60.0)
    torch.testing.assert_close(monotone_quantiles(increments_of(q), "cumsum"), q, rtol=1e-9, atol=0)
    for kind in ("sort", "penalty"):
        torch.testing.assert_close(monotone_quantiles(inverse_softplus(q), kind), q, rtol=1e-9, atol=0)
    ties = monotone_quantiles(increments_of(double(0.0, 1.0, 1.0, 1.0)), "cumsum")  # increments of at least 1e-4
    np.testing.assert_allclose(ties.numpy(), [1e-4, 1.0001, 1.0002, 1.0003], rtol=1e-9)


# ---- between the levels ------------------------------------------------------------------------------------------------


def test_interpolation_of_the_worked_example():
    u, q = double(0.3, 0.7, 0.05, 0.95, 0.1, 0.5, 0.9), double(1.0, 2.0, 4.0)
    value = interpolate_quantiles(u, LEVELS, q.expand(7, 3))
    np.testing.assert_allclose(value.numpy(), [1.5, 3.0, 1.0, 4.0, 1.0, 2.0, 4.0], atol=1e-12)


def test_interpolation_equals_numpy_row_by_row():
    rng = np.random.default_rng(1)
    levels, q, u = np.sort(rng.random(9)), np.sort(rng.gamma(2.0, size=(4, 6, 9))), rng.random((4, 6))
    value = interpolate_quantiles(*map(torch.as_tensor, (u, levels, q))).numpy()
    for i, j in np.ndindex(4, 6):
        assert value[i, j] == pytest.approx(np.interp(u[i, j], levels, q[i, j]), rel=1e-12)


def test_mean_of_the_worked_example():
    assert abs(quantile_mean(LEVELS, double(1.0, 2.0, 4.0)).item() - 2.3) < 1e-9


@pytest.mark.parametrize("log", [False, True])
def test_mean_is_the_integral_of_the_quantile_function(log):
    levels, q = np.array([0.2, 0.3, 0.7, 0.95]), np.array([0.4, 1.0, 1.0, 3.0])  # with a tie
    back = np.expm1 if log else np.asarray
    expected = integrate.quad(lambda u: back(np.interp(u, levels, q)), 0, 1, points=levels, epsabs=1e-12)[0]
    q = torch.as_tensor(q).requires_grad_()
    value = quantile_mean(torch.as_tensor(levels), q, log=log)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    value.backward()
    assert torch.isfinite(q.grad).all()


def test_median_of_a_hurdle():
    q = double(1.0, 2.0, 4.0)
    assert quantile_median(LEVELS, q).item() == pytest.approx(2.0)
    theta = double(0.0, 0.3, 0.5, 0.6, 0.8, 1.0)
    value = quantile_median(LEVELS, q.expand(6, 3), theta)
    u = [1 - 0.5 / t for t in (0.6, 0.8, 1.0)]  # the lower half is 1 - theta of zeros, then values up to here
    np.testing.assert_allclose(value.numpy(), [0, 0, 0, *np.interp(u, LEVELS.numpy(), q.numpy())], atol=1e-12)
    rng = np.random.default_rng(0)
    draws = np.where(rng.random(200_001) < 0.8, np.interp(rng.random(200_001), LEVELS.numpy(), q.numpy()), 0.0)
    assert np.median(draws) == pytest.approx(value[4].item(), abs=0.02)


# ---- starts from data --------------------------------------------------------------------------------------------------


@pytest.fixture
def expression():
    """Values of 40 cells and 4 genes; the third gene is silent, the fourth never zero."""
    rng = np.random.default_rng(0)
    x = rng.gamma(2.0, size=(40, 4)) * (rng.random((40, 4)) < [0.3, 0.8, 0.0, 1.0])
    x[:, 3] += 0.1
    return x


@pytest.mark.parametrize("storage", [sp.csr_matrix, sp.csc_matrix, sp.csr_array, np.asarray])
def test_empirical_quantiles_are_those_of_the_positive_values(expression, storage):
    levels = np.linspace(0.1, 0.9, 5)
    share, quantiles = empirical_quantiles(storage(expression), levels)
    positive = expression > 0
    np.testing.assert_allclose(share, [*positive[:, :2].mean(0), 1 / 41, 40 / 41], rtol=1e-12)
    for gene in (0, 1, 3):
        np.testing.assert_allclose(quantiles[gene], np.quantile(expression[positive[:, gene], gene], levels))
    np.testing.assert_allclose(quantiles[2], np.quantile(expression[positive], levels))


def test_empirical_quantiles_of_some_rows_and_with_stored_zeros(expression):
    levels, rows = np.array([0.25, 0.75]), np.array([30, 2, 5, 17, 8])
    stored = sp.csr_matrix(np.ones_like(expression))
    stored.data[:] = expression.ravel()  # zeros are stored
    for got, expected in zip(
        empirical_quantiles(stored, levels, rows), empirical_quantiles(expression[rows], levels), strict=True
    ):
        np.testing.assert_allclose(got, expected)


def test_cells_of_zeros_have_no_quantiles():
    with pytest.raises(ValueError, match="must hold positive values; received 3 cells of zeros"):
        empirical_quantiles(sp.csr_matrix((3, 2)), np.array([0.5]))
