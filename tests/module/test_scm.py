"""The causal model of latent variables: solving in order, divergences, mechanisms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import MultivariateNormal, kl_divergence

from scvi_cradle import metrics
from scvi_cradle.module.base import LatentCausalModel, Mechanism, multiscale_mmd, noise_kl, solve_in_order

WEIGHTS = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [-0.25, 0.8, 0]], dtype=torch.float64)
CONTEXT = torch.tensor([[1.0, 0], [0, 1], [0.5, -0.5]], dtype=torch.float64)
MEAN = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
VARIANCE = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
STATE = torch.tensor([1.0, 2.0], dtype=torch.float64)
POSTERIOR = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64), torch.tensor([0.8, 1.2, 0.5], dtype=torch.float64)
MECHANISM = Mechanism(MEAN, VARIANCE, WEIGHTS, CONTEXT)
KL = 1.2889691750802


def random_mechanism(d, n_invariant, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return Mechanism(draw(d), draw(d).exp(), draw(d, d).tril(-1), draw(d, n_invariant)), draw(n_invariant)


def full_gaussian(mechanism, state, noise_mean, noise_variance):
    """The responsive variables as one Gaussian, through the inverse of ``I - weights``."""
    inverse = torch.linalg.inv(torch.eye(len(mechanism.mean), dtype=torch.float64) - mechanism.weights)
    mean = inverse @ (noise_mean + mechanism.context @ state + mechanism.mean)
    return MultivariateNormal(mean, inverse @ noise_variance.diag() @ inverse.T)


def test_the_worked_example():
    inverse = solve_in_order(WEIGHTS, torch.eye(3, dtype=torch.float64)).T  # the rows are columns of the inverse
    torch.testing.assert_close(inverse, torch.tensor([[1.0, 0, 0], [0.5, 1, 0], [0.15, 0.8, 1]], dtype=torch.float64))
    mean, std = POSTERIOR
    torch.testing.assert_close(MECHANISM.respond(mean, STATE), torch.tensor([1.6, 2.6, 0.48], dtype=torch.float64))
    assert float(noise_kl(mean, std, VARIANCE)) == pytest.approx(KL, abs=1e-12)
    posterior = full_gaussian(MECHANISM, STATE, mean, std**2)
    prior = full_gaussian(MECHANISM, STATE, torch.zeros(3, dtype=torch.float64), VARIANCE)
    assert float(kl_divergence(posterior, prior)) == pytest.approx(KL, abs=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_the_divergence_is_that_of_full_covariances_on_random_graphs(seed):
    d = 1 + 2 * seed
    mechanism, state = random_mechanism(d, 3, seed)
    other, _ = random_mechanism(d, 3, 100 + seed)
    mean, std = other.mean, other.variance.sqrt()
    posterior = full_gaussian(mechanism, state, mean, std**2)
    prior = full_gaussian(mechanism, state, torch.zeros(d, dtype=torch.float64), mechanism.variance)
    diagonal = float(noise_kl(mean, std, mechanism.variance))
    assert diagonal == pytest.approx(float(kl_divergence(posterior, prior)), rel=1e-6)


def test_the_divergence_is_that_of_monte_carlo():
    mean, std = POSTERIOR
    posterior = full_gaussian(MECHANISM, STATE, mean, std**2)
    prior = full_gaussian(MECHANISM, STATE, torch.zeros(3, dtype=torch.float64), VARIANCE)
    torch.manual_seed(0)
    noise = mean + std * torch.randn(200_000, 3, dtype=torch.float64)
    z = MECHANISM.respond(noise, STATE)
    ratios = posterior.log_prob(z) - prior.log_prob(z)
    assert float(ratios.mean()) == pytest.approx(KL, abs=4 * float(ratios.std()) / len(z) ** 0.5)
    # unit Jacobian: the densities of the noise have the same ratio as those of its images
    unit = torch.distributions.Normal(mean, std).log_prob(noise) - torch.distributions.Normal(
        0.0, VARIANCE.sqrt()
    ).log_prob(noise)
    torch.testing.assert_close(unit.sum(-1), ratios)


def test_responses_satisfy_the_structural_equations():
    mechanism, state = random_mechanism(7, 4, 3)
    noise = torch.randn(5, 7, dtype=torch.float64)
    z = mechanism.respond(noise, state)
    by_hand = torch.zeros_like(z)
    for i in range(7):  # variable after variable
        by_hand[:, i] = noise[:, i] + mechanism.mean[i] + mechanism.context[i] @ state
        by_hand[:, i] += by_hand[:, :i] @ mechanism.weights[i, :i]
    torch.testing.assert_close(z, by_hand)
    torch.testing.assert_close(
        z, z @ mechanism.weights.T + noise + mechanism.mean + (mechanism.context @ state), rtol=1e-10, atol=1e-10
    )


def test_gradients():
    torch.manual_seed(1)
    weights = torch.randn(2, 4, 4, dtype=torch.float64)
    inputs = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    free = weights.requires_grad_()
    assert gradcheck(lambda w, x: solve_in_order(w.tril(-1), x), (free, inputs))
    mean, log_std, log_variance = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert gradcheck(lambda m, s, v: noise_kl(m, s.exp(), v.exp()), (mean, log_std, log_variance))
    cells = [torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (3, 4)]
    assert gradcheck(multiscale_mmd, tuple(cells))
    model = causal_model(mechanism="mlp").double()
    dosage, state = torch.eye(4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    noise = torch.randn(4, 5, dtype=torch.float64)
    parameters = tuple(model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def response(*values):
        mechanism = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (dosage,))
        return mechanism.respond(noise * mechanism.variance.sqrt(), state)

    assert gradcheck(response, parameters, fast_mode=True)


# ---- mechanisms -----------------------------------------------------------------------------------------------------


def causal_model(seed=0, **settings):
    torch.manual_seed(seed)
    return LatentCausalModel(
        4, 5, 3, 8, **{"mechanism": "mlp", "noise_scale": "learned", "lambda_bound": None, **settings}
    )


@pytest.mark.parametrize("mechanism", ["mlp", "linear"])
@pytest.mark.parametrize("bound", [None, "tanh"])
def test_weights_are_strictly_lower_triangular_and_depend_on_the_treatments(mechanism, bound):
    model = causal_model(mechanism=mechanism, lambda_bound=bound)
    for parameter in model.parameters():
        parameter.data.mul_(30)
    result = model(torch.eye(4))
    assert result.weights.shape == (4, 5, 5)
    assert result.context.shape == (4, 5, 3)
    assert (result.weights.triu() == 0).all()
    assert (result.weights[0] != result.weights[1]).tril(-1).sum() == 10
    assert (result.weights.abs().max() <= 1) == (bound == "tanh")
    assert (result.context.abs().max() <= 1) == (bound == "tanh")
    assert result.variance.min() >= np.exp(-5) * (1 - 1e-6)
    assert result.variance.max() <= np.exp(5) * (1 + 1e-6)


def test_mechanisms_of_combinations_add_up_where_they_are_linear():
    single = torch.eye(4)
    pair = single[:1] + single[1:2]
    for mechanism, additive in (("linear", True), ("mlp", False)):
        model = causal_model(mechanism=mechanism)
        both, a, b, none = (model(x) for x in (pair, single[:1], single[1:2], torch.zeros(1, 4)))
        for name in ("mean", "weights", "context"):
            values = [getattr(x, name) for x in (both, a, b, none)]
            assert torch.allclose(values[0], values[1] + values[2] - values[3], atol=1e-7) == additive
        assert torch.allclose(both.variance, a.variance * b.variance / none.variance, atol=1e-6) == additive


def test_fixed_noise_has_variance_one():
    model = causal_model(noise_scale="fixed")
    assert (model(torch.eye(4)).variance == 1).all()
    assert "log_variance" not in model.networks


# ---- alignments -----------------------------------------------------------------------------------------------------


def test_the_discrepancy_is_that_of_the_metric():
    x, y = np.array([[0.0, 0], [1, 0]]), np.array([[0.0, 1], [2, 2]])
    value = float(multiscale_mmd(torch.as_tensor(x), torch.as_tensor(y)))
    assert value == pytest.approx(0.2980084419, abs=1e-7)  # a value of single precision
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 30)), rng.normal(1, 2, size=(5, 30))
    assert float(multiscale_mmd(torch.as_tensor(x), torch.as_tensor(y))) == pytest.approx(metrics.mmd_multiscale(x, y))
