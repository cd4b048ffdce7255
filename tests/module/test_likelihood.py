"""The negative-binomial likelihood: plain form against scipy, fused form against the plain one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from scvi_cradle.module.base import Decoder, _likelihood, fused_log_prob, negative_binomial_log_prob
from scvi_cradle.module.base import softmax_rates as rates


def problem(n_particles=2, n_cells=6, n_genes=5, n_features=3, seed=0, dtype=torch.float64):
    """Features, weight, bias, theta, x, library and weights of cells, with a cell without counts and extreme counts."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(0.4, 5.0, (n_cells, n_genes))).astype(float)
    x[0] = 0
    if n_cells > 2:
        x[1, 0], x[2] = 1e6, 0
        x[2, -1] = 1
    library = np.maximum(x.sum(1, keepdims=True), 1)
    arrays = (
        rng.normal(0, 1.5, (n_particles, n_cells, n_features)),
        rng.normal(0, 1.0, (n_genes, n_features)),
        rng.normal(0, 1.0, n_genes),
        np.exp(rng.uniform(-5, 5, n_genes)),
        x,
        library,
        rng.uniform(0, 2, n_cells),
    )
    return [torch.as_tensor(a, dtype=dtype) for a in arrays]


def plain(features, weight, bias, theta, x, library, row_weight):
    values = negative_binomial_log_prob(x, rates(features @ weight.T + bias, library), theta).sum(-1)
    return (values * row_weight).sum(), values


def gradients(function, arguments, upstream=1.0):
    leaves = [a.clone().requires_grad_() for a in arguments[:4]]
    total, values = function(*leaves, *arguments[4:])
    (upstream * total).backward()
    return total.detach(), values.detach(), [leaf.grad for leaf in leaves]


# ---- plain form --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [1e-3, 0.1, 1.0, 37.0, 1e4])
def test_plain_form_equals_scipy(theta):
    x, mu = np.meshgrid([0, 1, 2, 17, 400, 30_000], np.array([1e-4, 0.5, 12.0, 5e3]) * max(theta, 1))
    expected = stats.nbinom.logpmf(x, theta, theta / (theta + mu))
    value = negative_binomial_log_prob(*(torch.as_tensor(v, dtype=torch.float64) for v in (x, mu, theta)))
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("theta", [1e-4, 0.3, 2e4])
@pytest.mark.parametrize("mu", [1e-8, 1e-3, 30.0])
def test_plain_form_follows_the_recursion_of_probabilities(mu, theta):
    """``p(x + 1) / p(x) = (x + theta) / (x + 1) * mu / (mu + theta)``, also where scipy's 1 - p has no digits left."""
    steps = np.arange(30_000)
    ratios = np.log((steps + theta) / (steps + 1)) + np.log(mu) - np.log(mu + theta)
    expected = -theta * np.log1p(mu / theta) + np.concatenate([[0.0], np.cumsum(ratios)])
    x = torch.arange(30_001, dtype=torch.float64)
    value = negative_binomial_log_prob(x, *torch.tensor([mu, theta], dtype=torch.float64))
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_plain_form_sums_to_one_and_has_the_mean():
    x = torch.arange(4000, dtype=torch.float64)
    p = negative_binomial_log_prob(x, torch.tensor(20.0).double(), torch.tensor(0.7).double()).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-10)
    assert (p * x).sum().item() == pytest.approx(20, abs=1e-7)


def test_rates_sum_to_the_library_but_for_the_floor():
    logits = torch.tensor([[0.0, 200.0, -300.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    mu = rates(logits, torch.tensor([[1e4], [50.0]], dtype=torch.float64))
    np.testing.assert_allclose(mu.sum(-1).numpy(), [1e4 * (1 + 3e-8), 50 * (1 + 3e-8)], rtol=1e-14)
    assert mu.min() >= 1e-8 * 50


# ---- fused form --------------------------------------------------------------------------------------------------------

SHAPES = {
    "several blocks": {"n_cells": 23, "n_genes": 11},
    "one cell": {"n_cells": 1},
    "one gene": {"n_genes": 1},
    "one of all": {"n_cells": 1, "n_genes": 1, "n_particles": 1, "n_features": 1},
    "five particles": {"n_particles": 5},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("block", [1, 40, 1 << 23])
@pytest.mark.parametrize("tile", [1, 20, 1 << 17])
def test_fused_form_equals_the_plain_form(shape, block, tile, monkeypatch):
    monkeypatch.setattr(_likelihood, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(_likelihood, "TILE_ELEMENTS", tile)
    arguments = problem(**shape)
    total, values, slopes = gradients(fused_log_prob, arguments, upstream=-0.3)
    expected_total, expected_values, expected_slopes = gradients(plain, arguments, upstream=-0.3)
    np.testing.assert_allclose(total, expected_total, rtol=1e-10)
    np.testing.assert_allclose(values, expected_values, rtol=1e-10)
    for slope, expected in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(slope, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max() + 1e-3))


@pytest.mark.parametrize("largest", [0, 1, 5, 62, 63, 64, 65, 200])
def test_terms_of_counts_on_both_sides_of_the_table(largest):
    arguments = problem(n_cells=40, n_genes=7)
    arguments[4] = torch.randint(largest + 1, (40, 7), generator=torch.Generator().manual_seed(0)).double()
    arguments[4][0, 0] = largest
    _, values, slopes = gradients(fused_log_prob, arguments)
    _, expected_values, expected_slopes = gradients(plain, arguments)
    np.testing.assert_allclose(values, expected_values, rtol=1e-10)
    np.testing.assert_allclose(slopes[3], expected_slopes[3], rtol=1e-9, atol=1e-12)


def test_fused_form_in_single_precision():
    """Errors: 5e-6 of the log-likelihood (a cell of 1e6 counts), 0.01 nat where it is small, 1e-5 of the largest slope."""
    arguments = problem(n_cells=64, n_genes=200, n_features=16, seed=3)
    arguments[3] = arguments[3].clamp(0.05, 50)
    single = [a.float() for a in arguments]
    _, values, slopes = gradients(fused_log_prob, single)
    _, expected_values, expected_slopes = gradients(plain, arguments)
    np.testing.assert_allclose(values.double(), expected_values, rtol=5e-6, atol=1e-2)
    for slope, expected in zip(slopes, expected_slopes, strict=True):
        assert (slope.double() - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("theta", [0.1, 1.0, 30.0, 1000.0])
def test_fused_form_in_single_precision_for_nearly_poisson_genes(theta):
    """Terms of size ``theta log theta`` must not meet: 0.02 nat over 1,187 genes, 1e-4 of the slopes of theta (5e-4 at 1,000)."""
    rng = np.random.default_rng(0)
    shapes = ((1, 32, 8), (1187, 8), (1187,))
    features, weight, bias = (torch.as_tensor(rng.normal(0, 0.3, shape)) for shape in shapes)
    x = torch.as_tensor(rng.poisson(1.0, (32, 1187)) * (np.arange(32)[:, None] > 0), dtype=torch.float64)
    rest = [torch.full((1187,), theta).double(), x, x.sum(1, keepdim=True).clamp_min(1), torch.ones(32).double()]
    arguments = [v.float().double() for v in (features, weight, bias, *rest)]
    _, values, slopes = gradients(fused_log_prob, [a.float() for a in arguments])
    _, expected_values, expected_slopes = gradients(plain, arguments)
    assert (values - expected_values).abs().max() < 2e-2
    assert (slopes[3] - expected_slopes[3]).norm() < (5e-4 if theta > 100 else 1e-4) * expected_slopes[3].norm()


def test_values_without_gradient_compute_none():
    """Validation and inference do not pay for slopes: one matrix product of three."""
    arguments = problem()
    leaves = [torch.nn.Parameter(a) for a in arguments[:4]]
    n_products = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fused_log_prob(*leaves, *arguments[4:])
        names = ("aten::addmm", "aten::addmm_", "aten::mm")
        n_products.append(sum(event.count for event in profile.key_averages() if event.key in names))
    assert n_products == [3, 1, 1]


def test_fused_form_passes_gradcheck():
    features, weight, bias, theta, *rest = problem(n_particles=2, n_cells=2, n_genes=3, n_features=2, seed=4)
    leaves = [a.requires_grad_() for a in (features, weight, bias, theta.clamp(0.2, 4))]
    assert torch.autograd.gradcheck(lambda *a: fused_log_prob(*a, *rest)[0], leaves)


def test_cells_of_weight_zero_move_nothing():
    *arguments, row_weight = problem()
    row_weight[3:] = 0
    _, _, (d_features, *_) = gradients(fused_log_prob, [*arguments, row_weight])
    assert (d_features[:, 3:] == 0).all()
    assert (d_features[:, 1] != 0).any()


def test_values_carry_no_gradient_and_need_none():
    arguments = problem()
    with torch.no_grad():
        total, values = fused_log_prob(*arguments)
    expected, expected_values = plain(*arguments)
    np.testing.assert_allclose(total, expected, rtol=1e-10)
    np.testing.assert_allclose(values, expected_values, rtol=1e-10)
    leaves = [a.requires_grad_() for a in arguments[:4]]
    assert not fused_log_prob(*leaves, *arguments[4:])[1].requires_grad


def test_extreme_logits_and_dispersions_stay_finite():
    arguments = [a.float() for a in problem()]
    arguments[2] = torch.tensor([300.0, 0.0, -300.0, 0.0, 0.0])
    arguments[3] = torch.tensor([np.exp(-10.0), np.exp(10.0), 1.0, np.exp(-10.0), np.exp(10.0)], dtype=torch.float32)
    total, values, slopes = gradients(fused_log_prob, arguments)
    for result in (total, values, *slopes):
        assert torch.isfinite(result).all()


# ---- decoder -----------------------------------------------------------------------------------------------------------

PARTS = {"basal": 3, "perturbation": 3, "artifact": 3}


@pytest.mark.parametrize("effect_path", ["linear", "decoder", "both"])
@pytest.mark.parametrize("combine", ["concat", "sum"])
def test_decoder_forms_agree(combine, effect_path):
    torch.manual_seed(0)
    decoder = Decoder(7, PARTS, 5, 2, n_covariates=2, combine=combine, effect_path=effect_path).double()
    with torch.no_grad():
        decoder.likelihood.log_theta.copy_(torch.linspace(-20, 20, 7))
    assert decoder.likelihood.theta.log().abs().max() <= 10 + 1e-12
    x = torch.poisson(torch.full((4, 7), 3.0)).double()
    z = {part: torch.randn(2, 4, 3).double() for part in PARTS}
    covariates = torch.randn(4, 2).double()
    features = decoder.features_of(z, covariates)
    library, weight = x.sum(1, keepdim=True), torch.tensor([1.0, 0.5, 2.0, 0.0]).double()
    log_prob = decoder.log_prob(x, features, library)
    mu = rates(decoder(z, covariates), library)
    torch.testing.assert_close(log_prob, negative_binomial_log_prob(x, mu, decoder.likelihood.theta).sum(-1))
    total, values = decoder.weighted_log_prob(x, features, library, weight)
    torch.testing.assert_close(values, log_prob)
    torch.testing.assert_close(total, (log_prob * weight).sum())


@pytest.mark.parametrize("combine", ["concat", "sum"])
def test_linear_effects_add_on_the_log_scale(combine):
    torch.manual_seed(0)
    decoder = Decoder(7, PARTS, 5, 1, n_covariates=0, combine=combine, effect_path="linear")
    z_basal, a, b = torch.randn(3, 1, 4, 3)
    none = torch.zeros(1, 4, 3)
    logits = {
        name: decoder({"basal": z_basal, "perturbation": z, "artifact": none}, torch.zeros(4, 0))
        for name, z in (("0", none), ("a", a), ("b", b), ("ab", a + b))
    }
    torch.testing.assert_close(logits["ab"] - logits["0"], logits["a"] + logits["b"] - 2 * logits["0"])
    assert (logits["a"] - logits["0"]).abs().min() > 0


@pytest.mark.parametrize("theta", [-10.0, -5.0, -2.0, 2.0, 7.0])
@pytest.mark.parametrize("count", [30.0, 64.0, 1e4, 1e6])
def test_slopes_of_dispersions_in_single_precision_at_large_counts(theta, count):
    """Error of the slope by log theta: 1e-5 of its size and 1e-3 at most, as in the plain form."""
    rng = np.random.default_rng(0)
    features, weight, bias = (torch.as_tensor(rng.normal(0, 0.3, shape)) for shape in ((1, 4, 8), (50, 8), (50,)))
    x = torch.as_tensor(rng.poisson(1.0, (4, 50))).double()
    x[:, 0] = count
    theta = torch.full((50,), theta).double().exp()
    rest = [theta, x, x.sum(1, keepdim=True), torch.ones(4).double()]
    arguments = [v.float().double() for v in (features, weight, bias, *rest)]
    slope = gradients(fused_log_prob, [a.float() for a in arguments])[2][3].double() * theta
    expected = gradients(plain, arguments)[2][3] * theta
    assert ((slope - expected).abs() < 1e-5 * expected.abs() + 1e-3).all()


@pytest.mark.parametrize("upstream", [1.0, -2.0])
def test_gradients_add_up_over_passes(upstream):
    """Returned as they are stored where nothing scales them, they must not be shared between passes."""
    arguments = problem()
    leaves = [a.clone().requires_grad_() for a in arguments[:4]]
    loss = -upstream * fused_log_prob(*leaves, *arguments[4:])[0]
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, first in zip(leaves, once, strict=True):
        np.testing.assert_allclose(leaf.grad, 3 * first, rtol=1e-12)


def test_tiles_of_all_particles_are_those_of_one():
    """Elsewhere than on a CPU all particles are worked on at once."""
    features, weight, bias, theta, x, library, row_weight = problem(n_particles=3, n_cells=8)
    logits = features @ weight.T + bias
    one, all_ = logits.clone(), logits.clone()
    d_one, d_all = torch.zeros_like(theta), torch.zeros_like(theta)
    arguments = (x, library, theta, row_weight)
    values = [_likelihood._differentiate(one[i : i + 1], *arguments, d_one) for i in range(3)]
    together = _likelihood._differentiate(all_, *arguments, d_all)
    np.testing.assert_allclose(torch.cat(values), together, rtol=1e-12)
    np.testing.assert_allclose(one, all_, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(d_one, d_all, rtol=1e-10)


def test_counts_stored_by_columns():
    arguments = problem()
    expected = gradients(fused_log_prob, arguments)
    arguments[4] = arguments[4].t().contiguous().t()
    found = gradients(fused_log_prob, arguments)
    np.testing.assert_array_equal(found[1], expected[1])


def test_products_in_bfloat16_under_autocast():
    """Stated error: 1e-3 of the log-likelihood, 1 % of the norms of slopes; and not the result in single precision."""
    arguments = [a.float() for a in problem(n_cells=64, n_genes=200, n_features=16, seed=3)]
    arguments[0] *= 0.2
    _, expected, expected_slopes = gradients(fused_log_prob, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, values, slopes = gradients(fused_log_prob, arguments)
    assert values.dtype == torch.float32
    assert not torch.equal(values, expected)
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1.0)
    for slope, other in zip(slopes, expected_slopes, strict=True):
        assert slope.dtype == torch.float32
        assert 0 < (slope - other).norm() < 1e-2 * other.norm()
