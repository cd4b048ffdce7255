"""Identities of the objective: sums over an epoch, Monte-Carlo means, awkward batches, references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scvi_cradle.module import CradleVAEModule
from scvi_cradle.module._counterfactual import counterfactual_kl
from scvi_cradle.presets import RECOMMENDED

N_GENES = 6
MEMBERS = np.array([[-1, -1], [0, -1], [1, -1], [0, 1], [2, -1]])  # control, A, B, A+B, C
SETTINGS = {k: v for k, v in RECOMMENDED.items() if k not in ("mask_prior_prob", "mask_init_logits", "output_bias")}
SETTINGS |= {
    "n_latent": 3,
    "n_hidden": 7,
    "embedding_n_layers": 2,
    "embedding_n_hidden": 5,
    "mask_prior_logit": -3.0,
    "mask_init_logit": 0.0,
    "cf_weight": 0.5,
}
EVERY_KIND = [
    {},
    {"kl": "sampled"},
    {"draws": "batch", "n_particles": 3, "posterior": "correlated"},
    {"draws": "batch", "n_particles": 2, "posterior": "correlated", "kl": "sampled", "share_global_samples": False},
    {"posterior": "mean_field"},
    {"artifact_latent": "embedding"},
    {"reconstruction_balance": "batch", "cf_reduction": "sum"},
    {"reconstruction_balance": "dataset", "cf_detach_reference": True},
]


def make_module(labels, failed, **settings):
    """Return a module that knows the training cells ``labels`` and ``failed``."""
    torch.manual_seed(0)
    module = CradleVAEModule(N_GENES, 3, n_levels=(1,), n_continuous=0, **(SETTINGS | settings))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for t in range(3):
            module.n_obs_per_treatment[t] = int((MEMBERS[labels] == t).any(1).sum())
        module.n_failed.fill_(failed.sum())
        module.n_train.fill_(len(labels))
    module.set_labels(MEMBERS)
    known = np.unique(labels[failed])
    module.references.set(known, np.random.default_rng(1).poisson(3.0, (len(known), N_GENES)), ())
    return module


def make_tensors(labels, failed, seed=0):
    x = np.random.default_rng(seed).poisson(2.0, (len(labels), N_GENES))
    return {
        "X": torch.as_tensor(x, dtype=torch.float32),
        "perturbation": torch.as_tensor(labels)[:, None],
        "artifact": torch.as_tensor(failed, dtype=torch.float32)[:, None],
        "batch": torch.zeros(len(labels), 1),
    }


def run(module, tensors, **kwargs):
    outputs = module.inference(**module._get_inference_input(tensors))
    decoded = module.generative(**module._get_generative_input(tensors, outputs))
    return module.loss(tensors, outputs, decoded, **kwargs)


def epoch(seed=0, n=61):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, n)
    return labels, (rng.random(n) < 0.3) & (labels != 2), np.array_split(rng.permutation(n), 9)


@pytest.mark.parametrize("draws", ["cell", "batch"])
def test_an_epoch_counts_every_global_divergence_once(draws):
    labels, failed, batches = epoch()
    module = make_module(labels, failed, draws=draws, n_particles=2)
    treatment = artifact = total = 0.0
    for rows in batches:
        output = run(module, make_tensors(labels[rows], failed[rows]), n_obs=len(labels))
        treatment += float(output.extra_metrics["kl_treatment"]) * len(rows)
        artifact += float(output.extra_metrics["kl_artifact"]) * len(rows)
        total += float(output.kl_global_sum) * len(rows) / len(labels)
    q, p = torch.sigmoid(module.effects.mask.logits).double(), 1 / (1 + math.exp(3))
    mask = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).sum().item()
    embedding = _kl_to_standard_normal(module.effects.embedding)
    assert treatment == pytest.approx(mask + embedding, rel=1e-5)
    assert artifact == pytest.approx(_kl_to_standard_normal(module.artifact.posterior), rel=1e-5)
    assert total == pytest.approx(treatment + artifact, rel=1e-5)


def _kl_to_standard_normal(gaussian):
    std = gaussian.log_scale.double().exp() + 1e-4
    return float((0.5 * (std**2 + gaussian.loc.double() ** 2 - 1) - std.log()).sum().detach())


@pytest.mark.parametrize("draws", ["cell", "batch"])
def test_the_mean_loss_of_an_epoch_is_the_loss_per_cell_of_all_cells(draws):
    """E[l] = ELBO / N: with posterior widths near zero draws do not matter, and batches of one size average exactly."""
    labels, failed, _ = epoch(n=60)
    module = make_module(labels, failed, draws=draws, artifact_latent="embedding", kl="analytic")
    with torch.no_grad():
        module.effects.mask.logits.copy_(torch.sign(module.effects.mask.logits) * 30)
        module.effects.embedding.log_scale.fill_(-30)
        module.decoder.first.weights["basal"].zero_()
    tensors = make_tensors(labels, failed)
    whole = run(module, tensors).loss.item()
    order = np.random.default_rng(2).permutation(60).reshape(6, 10)
    losses = [run(module, {k: v[rows] for k, v in tensors.items()}).loss.item() for rows in order]
    assert np.mean(losses) == pytest.approx(whole, rel=2e-4)  # the floor 1e-4 of the width of q(e) is what is left
    assert np.std(losses) > 1e-2


@pytest.mark.parametrize("posterior", ["correlated", "mean_field"])
@pytest.mark.parametrize("draws", ["cell", "batch"])
def test_sampled_divergences_average_to_the_closed_form(draws, posterior):
    labels, failed, _ = epoch(n=12)
    tensors, means = make_tensors(labels, failed), []
    for kl in ("analytic", "sampled"):
        module = make_module(labels, failed, draws=draws, kl=kl, posterior=posterior, n_particles=100)
        torch.manual_seed(5)
        with torch.no_grad():
            outputs = [run(module, tensors) for _ in range(30)]
        names = ("kl_treatment", "kl_artifact")
        rows = [[float(o.kl_local_sum) / 12, *(float(o.extra_metrics[k]) for k in names)] for o in outputs]
        means.append(np.array(rows))
    difference = means[1] - means[0]
    error = difference.std(0) / math.sqrt(30)
    assert (np.abs(difference.mean(0)) < 5 * error + 1e-6).all()
    assert (error < 0.05 * means[0].mean(0)).all()


# ---- awkward batches ---------------------------------------------------------------------------------------------------

BATCHES = {
    "mixed": ([0, 0, 1, 2, 3, 4], [1, 0, 0, 0, 1, 0]),
    "none failed": ([0, 1, 2, 3], [0, 0, 0, 0]),
    "all failed": ([0, 1, 3], [1, 1, 1]),
    "no controls": ([1, 2, 4], [1, 0, 0]),
    "controls only": ([0, 0, 0], [0, 1, 0]),
    "one passed control": ([0], [0]),
    "one failed cell": ([3], [1]),
    "one cell without reference": ([2], [0]),
}


@pytest.mark.parametrize("settings", EVERY_KIND, ids=lambda s: "-".join(map(str, s.values())) or "recommended")
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_gradients_are_finite_and_reach_every_parameter(batch, settings):
    labels, failed, _ = epoch()
    module = make_module(labels, failed, **settings)
    label, flag = np.array(batch[0]), np.array(batch[1], dtype=bool)
    tensors = make_tensors(label, flag)
    tensors["X"][0] = 0  # a cell without counts
    output = run(module, tensors)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    gradients = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(g).all() for g in gradients.values())
    moved = {k.split(".")[0] for k, g in gradients.items() if g.abs().sum() > 0}
    weightless = module.reconstruction_balance == "batch" and flag.all() == flag.any()  # as published: one kind of cell
    assert "encoder" in moved
    assert ("decoder" in moved) != weightless
    assert ("effects" in moved) == (label != 0).any()
    eligible = module.sees_effects and (~flag & np.isin(label, np.unique(labels[failed]))).any()
    assert ("artifact" in moved) == bool(flag.any() or eligible)


def test_a_batch_without_dose_or_flag_columns_trains():
    labels, failed, _ = epoch()
    module = make_module(labels, np.zeros_like(failed))
    tensors = make_tensors(labels[:8], failed[:8])
    del tensors["artifact"]
    output = run(module, tensors)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert output.extra_metrics["cf_kl"] == 0
    assert output.extra_metrics["kl_artifact"] == 0


# ---- who takes part in the counterfactual term ---------------------------------------------------------------------------


def counterfactual(module, tensors):
    outputs = module.inference(**module._get_inference_input(tensors))
    inputs = module._get_inference_input(tensors)
    return counterfactual_kl(module, outputs["latent"], outputs["pairs"], inputs)


def test_eligible_are_passed_cells_of_labels_with_failed_cells():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3, 4])
    failed = np.array([1, 0, 0, 1, 0, 0, 0, 1, 1, 0], dtype=bool)  # A: one; B, C: none; A+B: all
    module = make_module(labels, failed)
    divergence, eligible = counterfactual(module, make_tensors(labels, failed))
    assert eligible.tolist() == [False, True, True, False, True, False, False, False, False, False]
    assert divergence.shape == (1, 3)
    assert (divergence > 0).all()
    _, eligible = counterfactual(module, make_tensors(np.array([3]), np.array([False])))
    assert eligible.tolist() == [True]  # all training cells failed: a passed query cell has a reference


def test_a_reference_without_counts_is_a_reference():
    labels, failed = np.array([0, 0, 1]), np.array([True, False, False])
    module = make_module(labels, failed)
    module.references.set(np.array([0]), np.zeros((1, N_GENES)), ())
    _, eligible = counterfactual(module, make_tensors(labels, failed))
    assert eligible.tolist() == [False, True, False]


@pytest.mark.parametrize("direction", ["reference_first", "counterfactual_first"])
def test_no_divergence_when_the_cell_is_its_reference(direction):
    labels, failed = np.array([0, 0, 1, 1]), np.array([True, False, True, False])
    module, tensors = make_module(labels, failed, cf_direction=direction), make_tensors(labels, failed)
    module.references.set(np.array([0, 1]), tensors["X"][[1, 3]].numpy(), ())
    divergence, _ = counterfactual(module, tensors)
    torch.testing.assert_close(divergence, torch.zeros(1, 2), atol=1e-5, rtol=0)
    module.share_global_samples = False
    assert counterfactual(module, tensors)[0].max() > 1e-4


def test_mean_and_sum_differ_by_the_size_of_the_batch():
    labels, failed, _ = epoch()
    losses = {}
    for reduction, weight in (("mean", 0.5), ("sum", 0.5), ("mean", 0.0)):
        module = make_module(labels, failed, cf_reduction=reduction, cf_weight=weight)
        torch.manual_seed(1)
        losses[reduction, weight] = run(module, make_tensors(labels, failed)).loss.item()
    base = losses["mean", 0.0]
    assert losses["sum", 0.5] - base == pytest.approx(len(labels) * (losses["mean", 0.5] - base), rel=1e-4)


# ---- resampled references ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["median", "mean"])
def test_resampled_references_come_from_the_pool_of_their_label(statistic):
    labels, failed, _ = epoch()
    module = make_module(labels, failed, cf_resample=True, cf_n_samples=4, cf_statistic=statistic)
    rng = np.random.default_rng(0)
    pools = [
        low + rng.permuted(np.tile(np.arange(n), (N_GENES, 1)), axis=1).T for low, n in ((100, 1), (200, 3), (300, 30))
    ]
    module.references.set(np.array([0, 3, 4]), np.zeros((3, N_GENES)), tuple(map(sp.csr_matrix, pools)))
    wanted = torch.tensor([4, 0, 3])
    draws = torch.stack([module.references(wanted) for _ in range(200)])
    np.testing.assert_array_equal(draws[:, 1].numpy(), np.tile(pools[0][0], (200, 1)))  # one failed cell: itself
    for column, pool in ((0, pools[2]), (2, pools[1])):
        assert draws[:, column].min() >= pool.min()
        assert draws[:, column].max() <= pool.max()
        assert draws[:, column].std(0).min() > 0
    # four draws with replacement (three of the pool of three): the mean profile averages to the pool's mean
    if statistic == "mean":
        np.testing.assert_allclose(draws[:, 0].mean(0), pools[2].mean(0), atol=6 * pools[2].std() / math.sqrt(800))


def test_resampled_medians_are_those_of_numpy():
    labels, failed, _ = epoch()
    module = make_module(labels, failed, cf_resample=True, cf_n_samples=50)
    pool = np.random.default_rng(0).poisson(4.0, (6, N_GENES))
    module.references.set(np.array([1]), np.zeros((1, N_GENES)), (sp.csr_matrix(pool),))
    torch.manual_seed(7)
    profile = module.references(torch.tensor([1]))
    torch.manual_seed(7)
    chosen = torch.randint(6, (6,)).numpy()
    np.testing.assert_array_equal(profile[0].numpy(), np.median(pool[chosen], axis=0))


def test_fixed_references_are_the_stored_profiles():
    labels, failed, _ = epoch()
    module = make_module(labels, failed)
    profiles = np.arange(2 * N_GENES).reshape(2, N_GENES)
    module.references.set(np.array([1, 4]), profiles, ())
    np.testing.assert_array_equal(module.references(torch.tensor([4, 1, 4])).numpy(), profiles[[1, 0, 1]])


@pytest.mark.parametrize("draws", ["cell", "batch"])
def test_reference_profiles_beside_the_cells_or_alone(draws):
    """In training they are projected with the cells, in validation on their own."""
    labels, failed, _ = epoch()
    module, tensors, losses = make_module(labels, failed, draws=draws), make_tensors(labels, failed), []
    for context in (torch.enable_grad, torch.no_grad):
        torch.manual_seed(0)
        with context():
            outputs = module.inference(**module._get_inference_input(tensors))
            assert (outputs["latent"].references is None) == (not torch.is_grad_enabled())
            decoded = module.generative(**module._get_generative_input(tensors, outputs))
            losses.append(float(module.loss(tensors, outputs, decoded).loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
