"""Draws of masks, embeddings and the artifact vector: plate weights, straight-through gradients, Monte-Carlo divergences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scvi_cradle.module.base import (
    AmortizedEmbedding,
    ArtifactLatent,
    BernoulliMask,
    FreeGaussian,
    Pairs,
    TreatmentEffects,
    straight_through_bernoulli,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs_of(dosage):
    dosage = torch.as_tensor(dosage, dtype=torch.float32)
    cell, treatment = dosage.nonzero(as_tuple=True)
    return Pairs(cell, treatment, dosage[cell, treatment], len(dosage))


def make_effects(n_treatments=3, n_latent=4, *, amortized=False, sampled_kl=False):
    torch.manual_seed(0)
    shape = (n_treatments, n_latent)
    mask = BernoulliMask(*shape, prior_logit=-2.0, init_logit=0.3, temperature=1.0)
    embedding = AmortizedEmbedding(*shape, 2, 6) if amortized else FreeGaussian(shape, 0.4)
    effects = TreatmentEffects(mask, embedding, prior_scale=1.5, sampled_kl=sampled_kl)
    with torch.no_grad():
        for parameter in effects.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator(1)))
    return effects


# ---- plate weights ----------------------------------------------------------------------------------------------------


def weights(draw, n_treatments, pairs, n_obs):
    """Weight of every treatment's divergence in every cell: the cells' shares when that divergence is one, others zero."""
    one_hot = torch.nn.functional.one_hot(draw.treatment, n_treatments).T.float()  # (n_treatments, n_rows)
    return draw._replace(kl=one_hot).shares(pairs, n_obs).T


def test_plate_weights_count_a_treatment_once():
    pairs, n_obs = pairs_of([[1, 0], [1, 1], [0, 0]]), torch.tensor([4.0, 2.0])
    effects = make_effects(2)
    for per_cell in (False, True):
        draw = effects.draw(pairs, 1, per_cell=per_cell)
        cells = weights(draw, 2, pairs, n_obs)
        assert cells.tolist() == [[0.25, 0.0], [0.25, 0.5], [0.0, 0.0]]
        assert cells.sum(0).tolist() == [0.5, 0.5]
    assert effects.draw(pairs, 1, per_cell=False).treatment.tolist() == [0, 1]


@pytest.mark.parametrize("per_cell", [True, False])
def test_doses_count_as_one_and_treatments_without_training_cells_as_zero(per_cell):
    pairs = pairs_of([[0.3, 2.0], [0.0, 5.0]])
    draw = make_effects(2).draw(pairs, 1, per_cell=per_cell)
    assert weights(draw, 2, pairs, torch.tensor([0.0, 4.0])).tolist() == [[0.0, 0.25], [0.0, 0.25]]


@pytest.mark.parametrize("per_cell", [True, False])
def test_weighted_divergence_summed_over_minibatches_is_the_plain_sum(per_cell):
    rng = np.random.default_rng(0)
    dosage = (rng.random((53, 4)) < 0.3) * rng.choice([0.5, 1.0, 2.0], (53, 4))
    n_obs = torch.as_tensor((dosage != 0).sum(0), dtype=torch.float32)
    effects = make_effects(4)
    total = 0.0
    for rows in np.array_split(rng.permutation(53), 7):
        pairs = pairs_of(dosage[rows])
        draw = effects.draw(pairs, 3, per_cell=per_cell)
        total += float(draw.shares(pairs, n_obs).mean(0).sum().detach())
    every = effects.draw(pairs_of(np.eye(4)), 1, per_cell=False)
    assert total == pytest.approx(float(every.kl.sum().detach()), rel=1e-5)


# ---- draws ------------------------------------------------------------------------------------------------------------


def test_batch_draws_share_a_row_and_cell_draws_do_not():
    pairs = pairs_of([[1, 0], [1, 1], [0, 0], [0, 2]])
    effects = make_effects(2)
    shared = effects.draw(pairs, 5, per_cell=False)
    cells = shared.to_cells(shared.rows, pairs)
    assert cells.shape == (5, 4, 4)
    torch.testing.assert_close(cells[:, 1] - cells[:, 0], shared.rows[:, 1])
    torch.testing.assert_close(cells[:, 3], 2 * shared.rows[:, 1])
    assert (cells[:, 2] == 0).all()
    own = effects.draw(pairs, 5, per_cell=True)
    assert own.rows.shape == (5, 4, 4)
    assert not torch.equal(own.rows[:, 0], own.rows[:, 1])


def test_posterior_mean_draw_is_probability_times_location():
    pairs = pairs_of([[1, 0], [1, 1]])
    effects = make_effects(2)
    draw = effects.draw(pairs, 1, per_cell=True, sample=False)
    expected = torch.sigmoid(effects.mask.logits) * effects.embedding.loc
    torch.testing.assert_close(draw.to_cells(draw.rows, pairs)[0], torch.stack([expected[0], expected.sum(0)]))


def test_summary_of_the_network_posterior_has_the_moments_of_draws():
    """Moments over masks, the variance of the mean over masks included; posterior means of cells are the same numbers."""
    effects = make_effects(amortized=True)
    with torch.no_grad():
        effects.embedding.mask_layer.weight.mul_(4)  # an embedding that depends on its mask
        rows, n = torch.arange(3), 40_000
        mask = effects.mask.draw(rows, n, generator(2))
        posterior = effects.embedding(rows, mask)
        embedding = posterior.loc + posterior.scale * torch.randn(posterior.loc.shape, generator=generator(3))
        found, tolerance = effects.summary(rows), {"rtol": 0.0, "atol": 4 * embedding.std().item() / math.sqrt(128)}
        assert posterior.loc.std(0).max() > 0.3
        torch.testing.assert_close(found["expected"], (mask * embedding).mean(0), **tolerance)
        torch.testing.assert_close(found["embedding_mean"], embedding.mean(0), **tolerance)
        torch.testing.assert_close(found["embedding_std"], embedding.std(0), rtol=0.15, atol=0.0)
        assert ((posterior.variance.mean(0).sqrt() - embedding.std(0)).abs() > 0.15 * embedding.std(0)).any()
        pairs = pairs_of([[0, 1, 0], [1, 0, 0]])
        draw = effects.draw(pairs, 1, per_cell=True, sample=False)
        torch.testing.assert_close(draw.rows[0, draw.row_of_pair], found["expected"][[1, 0]])


def test_masks_are_exactly_zero_or_one():
    logits = torch.randn(400, 500, generator=generator())
    masks = straight_through_bernoulli(logits.requires_grad_(), generator=generator(1))
    assert set(masks.detach().unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_masks_have_the_posterior_mean(temperature):
    logits = torch.tensor([-4.0, -1.0, 0.0, 0.7, 3.0])
    n = 200_000
    masks = straight_through_bernoulli(logits.expand(n, -1), temperature, generator(2))
    q = torch.sigmoid(logits)
    error = (masks.mean(0) - q).abs() / (q * (1 - q) / n).sqrt()
    assert error.max() < 4.5


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_mask_gradient_is_that_of_the_relaxed_mask(temperature):
    logits = torch.randn(300, generator=generator(), dtype=torch.float64).requires_grad_()
    masks = straight_through_bernoulli(logits, temperature, generator(3))
    weight = torch.randn(300, generator=generator(4), dtype=torch.float64)
    (masks * weight).sum().backward()
    uniform = torch.rand(300, generator=generator(3), dtype=torch.float64).numpy()
    relaxed = 1 / (1 + np.exp(-(logits.detach().numpy() + np.log(uniform / (1 - uniform))) / temperature))
    np.testing.assert_allclose(logits.grad.numpy(), weight.numpy() * relaxed * (1 - relaxed) / temperature, rtol=1e-9)
    assert ((masks > 0.5).detach().numpy() == (relaxed > 0.5)).all()


@pytest.mark.parametrize("per_cell", [True, False])
def test_effects_pass_gradients_to_masks_and_embeddings(per_cell):
    """``d (e m) / d logit = e dr/dlogit`` with the relaxed mask ``r``, and ``d (e m) / d loc = m``."""
    effects, pairs = make_effects().double(), pairs_of(np.eye(3))
    draw = effects.draw(pairs, 5, per_cell=per_cell, generator=generator(8))
    weight = torch.randn(draw.rows.shape, generator=generator(9), dtype=torch.float64)
    leaves = (effects.mask.logits, effects.embedding.loc)
    slope_mask, slope_loc = torch.autograd.grad((draw.rows * weight).sum(), leaves)
    again, logits = generator(8), effects.mask.logits.detach()
    uniform = torch.rand(draw.rows.shape, generator=again, dtype=torch.float64)
    noise = torch.randn(draw.rows.shape, generator=again, dtype=torch.float64)
    posterior, relaxed = effects.embedding(), torch.sigmoid(logits + uniform.logit())
    embedding = (posterior.loc + posterior.scale * noise).detach()
    torch.testing.assert_close(slope_mask, (weight * embedding * relaxed * (1 - relaxed)).sum(0))
    torch.testing.assert_close(slope_loc, (weight * (relaxed > 0.5)).sum(0))


def test_draws_survive_uniform_noise_at_its_ends(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.linspace(0, 1, shape[0]))
    logits = torch.zeros(5, requires_grad=True)
    masks = straight_through_bernoulli(logits)
    masks.sum().backward()
    assert torch.isfinite(masks).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("per_cell", [True, False])
@pytest.mark.parametrize("amortized", [True, False])
def test_a_batch_of_controls_draws_nothing(per_cell, amortized):
    pairs = pairs_of(np.zeros((3, 2)))
    draw = make_effects(2, amortized=amortized).draw(pairs, 2, per_cell=per_cell)
    assert draw.rows.shape == (2, 0, 4)
    assert draw.to_cells(draw.rows, pairs).abs().sum() == 0
    assert draw.shares(pairs, torch.ones(2)).tolist() == [[0.0] * 3] * len(draw.kl)


# ---- divergences at the draws average to the closed form ---------------------------------------------------------------


def within_error(samples, expected, n_sigma=4.5):
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() < n_sigma * error).all()
    assert (error < 0.05 * expected.abs()).all()  # sharp enough to notice a wrong term


def test_sampled_divergence_of_free_posteriors_averages_to_the_closed_form():
    pairs = pairs_of(np.eye(3))
    closed = make_effects().draw(pairs, 1, per_cell=False).kl[0].detach()
    sampled = make_effects(sampled_kl=True).draw(pairs, 40_000, per_cell=False, generator=generator(5)).kl.detach()
    within_error(sampled, closed)


def test_sampled_divergence_of_the_network_posterior_averages_to_the_mean_closed_form():
    pairs, n = pairs_of(np.eye(3)), 40_000
    closed = make_effects(amortized=True).draw(pairs, n, per_cell=False, generator=generator(6)).kl.detach()
    sampled = make_effects(amortized=True, sampled_kl=True)
    sampled = sampled.draw(pairs, n, per_cell=False, generator=generator(6)).kl.detach()
    assert closed.shape == (n, 3)
    error = (sampled - closed).std(0) / math.sqrt(n)
    assert ((sampled - closed).mean(0).abs() < 4.5 * error).all()
    assert (error < 0.05 * closed.mean(0)).all()


def test_closed_form_divergence_of_the_network_posterior_enumerates_masks():
    """With two latent dimensions the expectation over the four masks can be summed."""
    effects = make_effects(1, 2, amortized=True)
    masks = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    q = torch.sigmoid(effects.mask.logits[0]).detach().double()
    alpha = 1 / (1 + math.exp(2.0))
    probability = (q * masks + (1 - q) * (1 - masks)).prod(-1)
    posterior = effects.embedding(torch.tensor([0]), masks[:, None])
    mean, std = posterior.loc[:, 0].detach().double(), posterior.scale[:, 0].detach().double()
    gaussian = (torch.log(1.5 / std) + (std**2 + mean**2) / (2 * 1.5**2) - 0.5).sum(-1)
    expected = (q * (q / alpha).log() + (1 - q) * ((1 - q) / (1 - alpha)).log()).sum() + (probability * gaussian).sum()
    kl = effects.draw(pairs_of([[1.0]]), 40_000, per_cell=False, generator=generator(7)).kl[:, 0].detach().double()
    assert abs(kl.mean() - expected) < 4.5 * kl.std() / 200 + 1e-6


@pytest.mark.parametrize("n_rows", [1, 50])
def test_artifact_divergence(n_rows):
    torch.manual_seed(0)
    settings = {"gaussian": True, "prior_scale": 1.5, "init_scale": 0.4}
    closed, sampled = ArtifactLatent(4, **settings, sampled_kl=False), ArtifactLatent(4, **settings, sampled_kl=True)
    with torch.no_grad():
        closed.posterior.loc.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
        sampled.load_state_dict(closed.state_dict())
    value, kl = closed.draw(1, n_rows)
    assert value.shape == (1, n_rows, 4)
    std = 0.4 + 1e-4
    expected = 4 * (math.log(1.5 / std) + std**2 / 4.5 - 0.5) + (0.25 + 1 + 4) / 4.5
    assert kl.item() == pytest.approx(expected, rel=1e-6)
    draws = torch.stack([sampled.draw(40, n_rows, generator=generator(i))[1].detach() for i in range(300)])
    assert abs(draws.mean() - expected) < 4.5 * draws.std() / math.sqrt(300)


def test_a_plain_artifact_vector_costs_nothing():
    artifact = ArtifactLatent(4, gaussian=False, prior_scale=1.0, init_scale=0.1, sampled_kl=True)
    with torch.no_grad():
        artifact.vector.fill_(0.7)
    value, kl = artifact.draw(2, 3)
    assert value.shape == (2, 3, 4)
    assert (value == 0.7).all()
    assert kl == 0
