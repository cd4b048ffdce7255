"""The negative-unlabeled risk: worked numbers, gradients, what it estimates and what minimises it; the bank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn
from torch.autograd import gradcheck

from scvi_cradle.module.base import ClassifierBank, nnnu_risk

UNLABELED = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
NEGATIVE = torch.tensor([[-2.0, 0.0]], dtype=torch.float64)
NOTHING = torch.zeros(1, 2, dtype=torch.float64)


def risk_and_gradients(prevalence, **kwargs):
    unlabeled, negative = UNLABELED.clone().requires_grad_(), NEGATIVE.clone().requires_grad_()
    (risk,) = nnnu_risk(unlabeled, negative, prevalence, **kwargs)
    return float(risk.detach()), *torch.autograd.grad(risk, [unlabeled, negative])


def close(tensor, values, tolerance=1e-9):
    np.testing.assert_allclose(tensor.numpy(), [values], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("prevalence", "risk", "by_unlabeled", "by_negative"),
    [
        pytest.param(0.4, 0.2460225575, [0.0, 0.0], [0.0357608766, 0.15], id="bracket clamped"),
        pytest.param(0.9, 0.6200948493, [-0.059601461, -0.3655292893], [0.05, 0.05], id="bracket counts"),
        pytest.param(0.05, 0.3895357160, [0.0, 0.0], [0.0566213880, 0.2375], id="few positives"),
    ],
)
def test_worked_numbers(prevalence, risk, by_unlabeled, by_negative):
    value, of_unlabeled, of_negative = risk_and_gradients(prevalence)
    assert value == pytest.approx(risk, abs=1e-9)
    close(of_unlabeled, by_unlabeled)
    close(of_negative, by_negative)


def test_parts_of_the_worked_example():
    assert float(nnnu_risk(UNLABELED, NOTHING, 1.0)) == pytest.approx(0.7200948493, abs=1e-9)  # E_U of positives
    # without unlabeled cells the bracket is -E_N of positives, and clamped
    assert float(nnnu_risk(NOTHING[:, :0], NEGATIVE, 0.0)) == pytest.approx(0.4100375958, abs=1e-9)
    bracket = {a: 0.7200948493 - (1 - a) * 1.4100375958 for a in (0.4, 0.9)}
    assert bracket[0.4] == pytest.approx(-0.1259277082, abs=1e-9)
    assert bracket[0.9] == pytest.approx(0.5790910897, abs=1e-9)
    assert bracket[0.4] + 0.6 * 0.4100375958 == pytest.approx(0.1200948493, abs=1e-9)
    value, *_ = risk_and_gradients(0.4, correction="ascent", beta=1.0)  # a bracket above -beta counts in full
    assert value == pytest.approx(0.1200948493, abs=1e-9)


def test_ascent_steps_back_along_the_bracket():
    value, of_unlabeled, of_negative = risk_and_gradients(0.4, correction="ascent", beta=0.1, gamma=0.5)
    assert value == pytest.approx(-0.1 + 0.6 * 0.4100375958, abs=1e-9)
    bracket_by_unlabeled = -torch.sigmoid(-UNLABELED) / 2
    bracket_by_negative = 0.6 * torch.sigmoid(-NEGATIVE) / 2
    torch.testing.assert_close(of_unlabeled, -0.5 * bracket_by_unlabeled)
    torch.testing.assert_close(of_negative, -0.5 * bracket_by_negative)
    for a, b in zip(risk_and_gradients(0.9, correction="ascent"), risk_and_gradients(0.9), strict=True):
        torch.testing.assert_close(a, b)  # the same where the bracket is positive


def test_gradients_agree_with_differences():
    generator = torch.Generator().manual_seed(0)
    unlabeled, negative = (
        torch.randn(3, n, generator=generator, dtype=torch.float64, requires_grad=True) for n in (5, 4)
    )
    masks = {
        "mask_unlabeled": torch.tensor([True, False, True, True, False]),
        "mask_negative": torch.rand(3, 4, generator=generator) < 0.7,
    }
    prevalence = torch.tensor([0.2, 0.5, 0.9])
    assert gradcheck(lambda u, v: nnnu_risk(u, v, prevalence, **masks), (unlabeled, negative))


def test_masked_cells_do_not_count():
    u, v = torch.cat([UNLABELED, torch.full((1, 2), torch.inf)], 1), torch.cat([torch.full((1, 1), -50.0), NEGATIVE], 1)
    mask_u, mask_v = torch.tensor([True, True, False, False]), torch.tensor([False, True, True])
    risk = nnnu_risk(u, v, 0.9, mask_unlabeled=mask_u, mask_negative=mask_v)
    assert float(risk) == pytest.approx(0.6200948493, abs=1e-9)


def test_heads_do_not_mix():
    unlabeled, negative = torch.randn(4, 6), torch.randn(4, 7)
    prevalence = torch.tensor([0.1, 0.4, 0.6, 0.9])
    together = nnnu_risk(unlabeled, negative, prevalence)
    alone = [nnnu_risk(unlabeled[i : i + 1], negative[i : i + 1], float(prevalence[i])) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_unknown_correction():
    with pytest.raises(ValueError, match="`correction` must be one of 'clamp', 'ascent'; received 'abs'"):
        nnnu_risk(UNLABELED, NEGATIVE, 0.5, correction="abs")


def best_logit(x, prevalence):
    """Log odds of N(2, 1) against N(0, 1) in a mixture."""
    return 2 * x - 2 + np.log(prevalence / (1 - prevalence))


def test_it_estimates_the_risk_on_the_unlabeled():
    prevalence, n = 0.3, 500_000
    of_positives = quad(lambda x: norm.pdf(x, 2) * np.logaddexp(0, -best_logit(x, prevalence)), -10, 12)[0]
    of_negatives = quad(lambda x: norm.pdf(x) * np.logaddexp(0, best_logit(x, prevalence)), -10, 12)[0]
    rng = np.random.default_rng(0)
    unlabeled = rng.normal(2.0 * (rng.random(n) < prevalence))
    g_u, g_v = (torch.from_numpy(best_logit(x, prevalence))[None] for x in (unlabeled, rng.normal(size=n)))
    estimate = float(nnnu_risk(g_u, g_v, prevalence))
    assert prevalence * of_positives + (1 - prevalence) * of_negatives == pytest.approx(0.3190, abs=1e-4)
    assert estimate == pytest.approx(prevalence * of_positives + (1 - prevalence) * of_negatives, abs=0.008)
    rest = (1 - prevalence) * float(nn.functional.softplus(g_v).mean())
    assert estimate - rest == pytest.approx(prevalence * of_positives, abs=0.008)  # the bracket: positives alone


def test_the_minimiser_is_the_posterior():
    """A straight line in x is enough for two Gaussians: its slope and intercept are known."""
    prevalence, n = 0.3, 200_000
    rng = np.random.default_rng(1)
    unlabeled = torch.from_numpy(rng.normal(2.0 * (rng.random(n) < prevalence)))
    negative = torch.from_numpy(rng.normal(size=n))
    line = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([line], max_iter=50, line_search_fn="strong_wolfe")

    def objective():
        optimiser.zero_grad()
        risk = nnnu_risk(*((line[0] * x + line[1])[None] for x in (unlabeled, negative)), prevalence).sum()
        risk.backward()
        return risk

    optimiser.step(objective)
    x = np.linspace(-2, 4, 13)
    found = 1 / (1 + np.exp(-(line[0].item() * x + line[1].item())))
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-best_logit(x, prevalence))), atol=0.03)


def test_a_head_is_a_small_network():
    bank = ClassifierBank(3, 5, 4, dropout=0.5)
    z = torch.randn(3, 7, 5)
    for head in range(3):
        network = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
        with torch.no_grad():
            network[0].weight.copy_(bank.hidden[head, :-1].T)
            network[0].bias.copy_(bank.hidden[head, -1])
            network[2].weight.copy_(bank.output[head, None, :-1])
            network[2].bias.copy_(bank.output[head, -1:])
        torch.testing.assert_close(bank.eval()(z)[head], network(z[head]).squeeze(-1))
        torch.testing.assert_close(bank(z[0])[head], network(z[0]).squeeze(-1))  # the same cells for all heads
    assert sum(p.numel() for p in bank.parameters()) == 3 * sum(p.numel() for p in network.parameters())


def test_heads_start_as_linear_layers_and_from_their_own_generator():
    generators = lambda seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    before = torch.get_rng_state()
    bank = ClassifierBank(200, 9, 16, generators=generators(range(200)))
    assert torch.equal(before, torch.get_rng_state())
    for part, bound in ((bank.hidden.detach(), 1 / 3), (bank.output.detach(), 1 / 4)):
        assert float(part.abs().max()) <= bound
        assert float(part.std()) == pytest.approx(bound / np.sqrt(3), rel=0.05)
    alone = ClassifierBank(1, 9, 16, generators=generators([7]))
    assert torch.equal(alone.weights[0], bank.weights[7])


def test_dropout_keeps_the_mean_and_uses_the_generator():
    bank = ClassifierBank(1, 2, 64, dropout=0.25, generators=[torch.Generator().manual_seed(1)])
    z = torch.tensor([1.0, -2.0]).expand(1, 20_000, 2)
    drawn = bank(z, generator=torch.Generator().manual_seed(0)).detach()
    again = bank(z, generator=torch.Generator().manual_seed(0)).detach()
    assert torch.equal(drawn, again)
    assert float(drawn.std()) > 0.01
    assert float(drawn.mean()) == pytest.approx(
        float(bank.eval()(z)[0, 0].detach()), abs=4 * float(drawn.std()) / 20_000**0.5
    )
