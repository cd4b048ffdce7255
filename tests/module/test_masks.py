"""Mask distributions: terms in closed form and at draws, tiny priors, point and Beta posteriors of the probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from scvi_cradle.module.base import BernoulliMask, BetaBernoulliMask, FreeGaussian, Pairs, TreatmentEffects

ROWS = torch.arange(2)
START = {"init_logit": 0.0, "temperature": 1.0}
BETA = (1.0, 3.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(module, seed=1, scale=0.7):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator(seed)))
    return module.double()


def bernoulli(prior_logit=-2.0):
    return moved(BernoulliMask(2, 3, prior_logit=prior_logit, **START))


def beta_bernoulli(*, point, concentration=BETA):
    return moved(BetaBernoulliMask(2, 3, concentration=concentration, point=point, **START))


# ---- tiny priors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_cells", [50, 100, 200, 260, 1000])
def test_log_prior_of_a_mask_is_exact_where_its_probability_is_zero_in_single_precision(n_cells):
    """``alpha = 10^(-9 n / 50)``: log-odds fall by 0.4144653167 per cell; from 260 cells on alpha is 0 in float32."""
    logit = -0.4144653167 * n_cells
    mask = BernoulliMask(1, 3, prior_logit=logit, **START)
    drawn = torch.tensor([[[1.0, 0.0, 1.0]]])
    terms = mask.terms(torch.tensor([0]), drawn, sampled=True)
    assert terms.log_prior.item() == pytest.approx(2 * -9 / 50 * n_cells * math.log(10), rel=1e-6)
    q_log = -3 * math.log(2)
    assert terms.kl.item() == pytest.approx(q_log - 2 * logit, rel=1e-6)
    closed = mask.terms(torch.tensor([0]), None, sampled=False)
    assert closed.kl.item() == pytest.approx(q_log - 1.5 * logit, rel=1e-6)
    alpha = torch.tensor(10.0).double().pow(-9 / 50 * n_cells).float()
    assert (alpha.item() == 0) == (n_cells >= 260)


def test_prior_of_1e_36():
    alpha = 1e-36
    mask = BernoulliMask(1, 1, prior_logit=math.log(alpha) - math.log1p(-alpha), **START)
    for drawn, expected in ((1.0, math.log(alpha)), (0.0, -alpha)):
        terms = mask.terms(torch.tensor([0]), torch.full((1, 1, 1), drawn), sampled=True)
        assert terms.log_prior.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.001, 0.3, 0.999])
def test_terms_equal_scipy(alpha):
    mask, drawn = bernoulli(special.logit(alpha)), torch.tensor([[[1.0, 0, 1], [0, 0, 0]], [[0, 1, 1], [1, 1, 1]]])
    q, drawn = mask.probability.detach().numpy(), drawn.double()
    log_prior = stats.bernoulli.logpmf(drawn, alpha).sum(-1)
    sampled = mask.terms(ROWS, drawn, sampled=True)
    np.testing.assert_allclose(sampled.log_prior, log_prior, rtol=1e-10)
    np.testing.assert_allclose(sampled.kl.detach(), stats.bernoulli.logpmf(drawn, q).sum(-1) - log_prior, rtol=1e-10)
    closed = mask.terms(ROWS, drawn, sampled=False)
    cross = q * np.log(alpha) + (1 - q) * np.log(1 - alpha)
    np.testing.assert_allclose(closed.log_prior[0].detach(), cross.sum(-1), rtol=1e-10)
    entropy = -(q * np.log(q) + (1 - q) * np.log(1 - q))
    np.testing.assert_allclose(closed.kl[0].detach(), (-entropy - cross).sum(-1), rtol=1e-10)


# ---- Beta-Bernoulli ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2.0, 10.0])
@pytest.mark.parametrize("sampled", [True, False])
def test_point_posterior_leaves_the_beta_density_alone(sampled, k):
    mask = beta_bernoulli(point=True, concentration=(1.0, k))
    q = mask.probability.detach().numpy()
    expected = -(math.log(k) + (k - 1) * np.log(1 - q)).sum(-1)
    drawn = mask.draw(ROWS, 7, generator())
    terms = mask.terms(ROWS, drawn, sampled=sampled)
    assert terms.kl.shape == (1, 2)
    np.testing.assert_allclose(terms.kl[0].detach(), expected, rtol=1e-10)
    slope = torch.autograd.grad(terms.kl.sum(), mask.logits)[0]
    np.testing.assert_allclose(slope, (k - 1) * q, rtol=1e-10)  # d/dl of -(k - 1) log(1 - sigmoid(l)), nothing else
    value = drawn.detach().numpy() if sampled else q[None]
    log_p = (value * np.log(q) + (1 - value) * np.log(1 - q)).sum(-1)
    np.testing.assert_allclose(terms.log_prior.detach(), log_p, rtol=1e-10)


@pytest.mark.parametrize("logit", [-1e4, -60.0, 60.0, 1e4])
def test_saturated_point_probabilities_are_held_at_1e_6(logit):
    mask = BetaBernoulliMask(1, 1, concentration=(1.5, 10.0), point=True, init_logit=logit, temperature=1.0)
    terms = mask.terms(torch.tensor([0]), mask.draw(torch.tensor([0]), 1, generator()), sampled=True)
    at_bound = 1e-6 if logit < 0 else 1 - 1e-6
    assert terms.kl.item() == pytest.approx(-stats.beta.logpdf(at_bound, 1.5, 10.0), rel=1e-5)
    (slope,) = torch.autograd.grad(terms.kl.sum() + terms.log_prior.sum(), mask.logits)
    assert torch.isfinite(slope).all()


def test_beta_posterior_starts_at_the_prior():
    mask = BetaBernoulliMask(2, 3, concentration=BETA, point=False, **START)
    closed = mask.terms(ROWS, None, sampled=False)
    # q(m) = 1/2 and q(p) = p(p): E log q(m) - E log p(m | p), with E log p = psi(1) - psi(4), E log(1 - p) = psi(3) - psi(4)
    expected = -math.log(2) - 0.5 * (special.digamma(1) + special.digamma(3) - 2 * special.digamma(4))
    np.testing.assert_allclose(closed.kl[0].detach(), 3 * expected, rtol=1e-5)


def test_closed_form_of_the_beta_posterior_equals_its_integral():
    mask = beta_bernoulli(point=False)
    terms = mask.terms(ROWS, None, sampled=False)
    raw, q = mask.raw_concentration.detach().numpy(), mask.probability.detach().numpy()
    concentration = np.log1p(np.exp(raw)) + 1e-4
    for row in range(2):
        kl = log_prior = 0.0
        for d in range(3):
            a, b = concentration[:, row, d]

            def density(p, a=a, b=b):
                return stats.beta.pdf(p, a, b)

            def prior(p, m=q[row, d]):
                return m * np.log(p) + (1 - m) * np.log1p(-p)

            def ratio(p, a=a, b=b):
                return stats.beta.logpdf(p, a, b) - stats.beta.logpdf(p, *BETA)

            cross = integrate.quad(lambda p, f=density, g=prior: f(p) * g(p), 0, 1)[0]
            m = q[row, d]
            log_prior += cross
            kl += m * np.log(m) + (1 - m) * np.log(1 - m) - cross
            kl += integrate.quad(lambda p, f=density, g=ratio: f(p) * g(p), 0, 1)[0]
        assert terms.kl[0, row].item() == pytest.approx(kl, rel=1e-6)
        assert terms.log_prior[0, row].item() == pytest.approx(log_prior, rel=1e-6)


# ---- draws average to the closed form ----------------------------------------------------------------------------------


def close_to(samples, expected, n_sigma=4.5, sharp=0.05):
    """Mean of independent samples against an expectation."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() < n_sigma * error + 1e-12).all()
    assert (error < sharp * expected.abs().max()).all()


@pytest.mark.parametrize("make", [bernoulli, lambda: beta_bernoulli(point=False)], ids=["bernoulli", "beta"])
def test_sampled_terms_average_to_the_closed_form(make):
    mask = make()
    with torch.no_grad():
        drawn = mask.draw(ROWS, 60_000, generator(3))
        sampled = mask.terms(ROWS, drawn, sampled=True, generator=generator(4))
        closed = mask.terms(ROWS, None, sampled=False)
    assert sampled.kl.shape == (60_000, 2)
    close_to(sampled.kl, closed.kl[0])
    close_to(sampled.log_prior, closed.log_prior[0])


def test_sampled_gradient_of_the_beta_concentrations_averages_to_the_closed_form():
    """Draws of ``p`` are reparameterised: their gradient has no bias, whatever the masks."""
    mask, n, blocks = beta_bernoulli(point=False), 1000, 60
    (closed,) = torch.autograd.grad(mask.terms(ROWS, None, sampled=False).kl.sum(), mask.raw_concentration)
    rows = []
    for block in range(blocks):
        drawn = mask.draw(ROWS, n, generator(block)).detach()
        kl = mask.terms(ROWS, drawn, sampled=True, generator=generator(1000 + block)).kl.mean(0).sum()
        rows.append(torch.autograd.grad(kl, mask.raw_concentration)[0])
    close_to(torch.stack(rows), closed)


# ---- weight of the prior per cell --------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_cell", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
def test_prior_weight_per_cell_adds_the_cross_entropy_of_every_cell(sampled, per_cell):
    """The weight of ``log p(m_t)`` over all cells becomes ``1 + w n_t``; that of ``log q`` stays 1."""
    mask, w = bernoulli(-4.0), 0.03
    effects = TreatmentEffects(mask, FreeGaussian((2, 3), 0.4), prior_scale=1.0, sampled_kl=sampled).double()
    dosage = torch.zeros(12, 2, dtype=torch.float64)
    dosage[:5, 0], dosage[3:10, 1] = 1.0, 0.5  # 5 and 7 cells, two of both treatments, two controls
    cell, treatment = dosage.nonzero(as_tuple=True)
    pairs, n_obs = Pairs(cell, treatment, dosage[cell, treatment], 12), torch.tensor([5.0, 7.0]).double()
    draw = effects.draw(pairs, 4, per_cell=per_cell, generator=generator(5))
    plain, difference = draw.shares(pairs, n_obs), -w * draw.log_priors(pairs, n_obs).detach()
    heavy = plain + difference
    extra = torch.zeros(difference.shape[0], 12, dtype=torch.float64)
    extra.index_add_(1, cell, -w * draw.log_prior.detach()[:, draw.row_of_pair])
    torch.testing.assert_close(difference, extra, rtol=1e-12, atol=1e-12)
    assert (difference[:, :10] > 0).all()
    assert (difference[:, 10:] == 0).all()
    if not sampled:
        q, alpha = mask.probability.detach().numpy(), special.expit(-4.0)
        cross_entropy = -(q * np.log(alpha) + (1 - q) * np.log(1 - alpha)).sum(-1)
        expected = w * dosage.bool().numpy() @ cross_entropy
        np.testing.assert_allclose(difference[0], expected, rtol=1e-10)
        entropy = -(q * np.log(q) + (1 - q) * np.log(1 - q)).sum(-1)
        std = 0.4 + 1e-4
        gaussian = 3 * (0.5 * (std**2 - 1) - math.log(std))
        total = (1 + w * np.array([5, 7])) @ cross_entropy - entropy.sum() + 2 * gaussian
        assert heavy.sum().item() == pytest.approx(total, rel=1e-6)


def test_prior_weight_spares_treatments_without_training_cells():
    effects = TreatmentEffects(bernoulli(), FreeGaussian((2, 3), 0.4), prior_scale=1.0, sampled_kl=False)
    pairs = Pairs(torch.tensor([0]), torch.tensor([1]), torch.ones(1), 1)
    draw = effects.draw(pairs, 1, per_cell=True)
    n_obs = torch.tensor([4.0, 0.0])
    assert draw.shares(pairs, n_obs).tolist() == draw.log_priors(pairs, n_obs).tolist() == [[0.0]]
