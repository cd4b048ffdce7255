"""Modules as wholes: shares of an epoch, importance weights, other treatments for given cells, finite gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scvi_cradle.module import ConditionalVAEModule, SAMSVAEModule, SVAEPlusModule
from scvi_cradle.module.base import importance_weighted_bound

N_GENES, N_LATENT = 6, 3
MEMBERS = np.array([[-1, -1], [0, -1], [1, -1], [0, 1], [2, -1]])  # control, A, B, A+B, C
SIZES = {"n_latent": N_LATENT, "n_hidden": 7, "n_layers_encoder": 1, "n_layers_decoder": 1}
SAMS = {
    "mask_prior": "bernoulli",
    "mask_prior_logit": -3.0,
    "embedding_prior_scale": 1.0,
    "posterior": "correlated",
    "embedding_n_layers": 2,
    "embedding_n_hidden": 5,
    "embedding_init_scale": 0.4,
    "combine": "concat",
    "effect_path": "both",
    "draws": "cell",
    "mask_beta": (1.0, 3.0),
}
SVAE = {"mask_beta": (1.0, 3.0), "mask_init_logit": 0.0, "embedding_init_scale": 1.0, "gs_temperature": 1.0}
KINDS = {
    "sams": (SAMSVAEModule, SAMS),
    "sams-batch": (SAMSVAEModule, SAMS | {"draws": "batch"}),
    "sams-weight": (SAMSVAEModule, SAMS | {"prior_weight_per_cell": 0.02}),
    "sams-point": (SAMSVAEModule, SAMS | {"mask_prior": "beta_bernoulli", "mask_prob_posterior": "point"}),
    "sams-beta": (
        SAMSVAEModule,
        SAMS | {"mask_prior": "beta_bernoulli", "mask_prob_posterior": "beta", "posterior": "mean_field"},
    ),
    "cpa": (SAMSVAEModule, SAMS | {"mask_prior": "none", "posterior": "correlated_basal"}),
    "svae": (SVAEPlusModule, SVAE | {"variant": "sams", "draws": "cell"}),
    "svae-lopez": (SVAEPlusModule, SVAE | {"variant": "lopez", "draws": "batch"}),
    "conditional": (ConditionalVAEModule, {}),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def epoch(n=61, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 5, n), np.array_split(rng.permutation(n), 9)


def make_module(kind, labels, **settings):
    """Return a module that knows the training cells ``labels``."""
    torch.manual_seed(0)
    cls, chosen = KINDS[kind]
    chosen = {"likelihood": "nb", "kl": "analytic", "n_particles": 1} | chosen | settings
    module = cls(N_GENES, 3, n_levels=(1,), n_continuous=0, **SIZES, **chosen)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
        members = MEMBERS[labels]
        module.n_obs_per_treatment.copy_(torch.tensor([(members == t).any(1).sum() for t in range(3)]))
        module.n_train.fill_(len(labels))
    module.set_labels(MEMBERS)
    return module.eval()


def make_tensors(labels, seed=0):
    x = np.random.default_rng(seed).poisson(2.0, (len(labels), N_GENES))
    return {
        "X": torch.as_tensor(x, dtype=torch.float32),
        "perturbation": torch.as_tensor(labels)[:, None],
        "batch": torch.zeros(len(labels), 1),
    }


def infer(module, tensors, **settings):
    return module.inference(**module._get_inference_input(tensors), **settings)


def run(module, tensors, **kwargs):
    outputs = infer(module, tensors)
    decoded = module.generative(**module._get_generative_input(tensors, outputs))
    return module.loss(tensors, outputs, decoded, **kwargs)


# ---- an epoch counts each divergence once ------------------------------------------------------------------------------


def total_divergence(module, labels):
    """Sum over treatments of the closed forms, plain."""
    if isinstance(module, ConditionalVAEModule):
        return 0.0
    effects, rows, total = module.effects, torch.arange(3), 0.0
    if effects.mask is not None:
        terms = effects.mask.terms(rows, None, sampled=False)
        total = terms.kl.double().sum().item()
    if hasattr(effects.embedding, "log_scale"):
        mean, std = effects.embedding.loc.double(), effects.embedding.log_scale.double().exp() + 1e-4
        total += (0.5 * (std**2 + mean**2 - 1) - std.log()).sum().item()
    return total


@EVERY_KIND
def test_shares_of_all_cells_add_up_to_the_divergence(kind):
    labels, batches = epoch()
    settings = {"posterior": "correlated_basal"} if kind in ("sams", "sams-batch", "sams-weight", "sams-point") else {}
    module, total = make_module(kind, labels, n_particles=2, **settings), 0.0
    for rows in batches:
        output = run(module, make_tensors(labels[rows]), n_obs=len(labels))
        total += float(output.kl_global_sum) * len(rows) / len(labels)
    expected = total_divergence(module, labels)
    assert total == pytest.approx(expected, rel=1e-5)
    assert (expected > 1) == (kind != "conditional")


# ---- importance weights ------------------------------------------------------------------------------------------------


def bounds(module, tensors, n_particles, seeds=1, **settings):
    """Return log-weights of many sets of particles, shape ``(seeds, n_particles, n_cells)``."""
    module.objective, rows = "iwelbo", []
    with torch.no_grad():
        for seed in range(seeds):
            outputs = infer(module, tensors, n_samples=n_particles, generator=generator(seed))
            decoded = module.generative(**module._get_generative_input(tensors, outputs))
            rows.append(module.log_weights(tensors, outputs, decoded["features"], **settings))
    return torch.stack(rows)


@EVERY_KIND
def test_more_particles_tighten_the_bound(kind):
    """``E IW_1 = ELBO <= E IW_2 <= E IW_16``, and one particle alone is the ELBO at the draw."""
    labels, _ = epoch(20)
    module, tensors = make_module(kind, labels), make_tensors(labels)
    weights = bounds(module, tensors, 4096, score_global=True)[0]
    assert torch.equal(importance_weighted_bound(weights[:1]), weights[0])
    means, errors = [], []
    for k in (1, 2, 16):
        groups = weights.reshape(k, -1, len(labels))  # draws of a cell are independent
        bound = importance_weighted_bound(groups).mean(1)
        means.append(bound.mean().item())
        errors.append((bound.std() / math.sqrt(len(bound))).item())
    assert means[0] == pytest.approx(weights.mean().item(), rel=1e-5)
    assert means[1] - means[0] > 5 * math.hypot(errors[0], errors[1])
    assert means[2] - means[1] > 5 * math.hypot(errors[1], errors[2])


@EVERY_KIND
def test_one_particle_of_either_objective_is_the_elbo_at_the_draw(kind):
    labels, _ = epoch(20)
    tensors, losses = make_tensors(labels), []
    for objective in ("elbo", "iwelbo"):
        module = make_module(kind, labels, kl="sampled")
        module.objective = objective
        torch.manual_seed(4)
        losses.append(run(module, tensors).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@EVERY_KIND
def test_global_terms_can_be_left_out_of_the_weights(kind):
    labels, _ = epoch(20)
    module, tensors = make_module(kind, labels), make_tensors(labels)
    module.objective = "iwelbo"
    outputs = infer(module, tensors, n_samples=3)
    features = module.generative(**module._get_generative_input(tensors, outputs))["features"]
    with_shares, without = (module.log_weights(tensors, outputs, features, score_global=s) for s in (True, False))
    shares = module.global_shares(outputs["latent"], outputs["pairs"], module._get_inference_input(tensors))
    torch.testing.assert_close(without - with_shares, shares.expand(3, -1), atol=2e-5, rtol=1e-5)
    assert (shares.abs().max() > 0) == (kind != "conditional")


# ---- other treatments --------------------------------------------------------------------------------------------------


def decided(module):
    """Make draws of effects repeat: masks as decided as single precision allows, embeddings without width."""
    with torch.no_grad():
        if getattr(module.effects, "mask", None) is not None:
            module.effects.mask.logits.copy_(torch.sign(module.effects.mask.logits) * 60)
        if hasattr(module.effects, "embedding") and hasattr(module.effects.embedding, "head"):
            module.effects.embedding.head.linear.bias[N_LATENT:].fill_(-60)
            module.effects.embedding.head.linear.weight[N_LATENT:].zero_()
        elif hasattr(module.effects, "embedding") and hasattr(module.effects.embedding, "log_scale"):
            module.effects.embedding.log_scale.fill_(-60)
    return module


def width(module):
    """Standard deviation that is left of an effect: the floor of the posterior."""
    return 1e-2 if hasattr(getattr(module.effects, "embedding", None), "head") else 1e-4


@EVERY_KIND
def test_the_own_treatment_changes_nothing(kind):
    labels = np.array([0, 1, 2, 3, 4, 3])
    module, tensors = decided(make_module(kind, labels)), make_tensors(labels)
    outputs = infer(module, tensors, generator=generator())
    latent, pairs = outputs["latent"], outputs["pairs"]
    kept = module.intervene(latent, pairs, None, generator=generator(1))
    redrawn = module.intervene(latent, pairs, pairs, generator=generator(2))
    assert kept.keys() == redrawn.keys()
    for part, value in kept.items():
        torch.testing.assert_close(redrawn[part], value, atol=10 * width(module), rtol=1e-5)
    assert torch.equal(kept["basal"], latent.z_basal)
    covariates = module.covariates(tensors)
    factual = module.generative(latent, pairs, covariates)["features"]
    torch.testing.assert_close(module.decoder.features_of(kept, covariates), factual, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sams", "sams-beta", "cpa"])
def test_another_treatment_exchanges_the_effect_and_keeps_the_cell(kind):
    labels, targets = np.array([0, 1, 2, 3, 4]), np.array([3, 0, 4, 1, 3])
    module = decided(make_module(kind, labels))
    outputs, target = infer(module, make_tensors(labels)), module.pairs(torch.as_tensor(targets))
    parts = module.intervene(outputs["latent"], outputs["pairs"], target, generator=generator())
    assert torch.equal(parts["basal"], outputs["latent"].z_basal)
    effect = module.effects.summary(torch.arange(3))["expected"].detach()
    expected = torch.stack([effect[MEMBERS[t][MEMBERS[t] >= 0]].sum(0) for t in targets])
    torch.testing.assert_close(parts["perturbation"][0].detach(), expected, atol=10 * width(module), rtol=1e-5)
    assert (parts["perturbation"][0, 1] == 0).all()  # control
    assert expected[0].abs().max() > 0.1


@pytest.mark.parametrize("kind", ["svae", "svae-lopez"])
def test_another_intervention_moves_the_mean_of_svae_and_keeps_the_deviation(kind):
    """``z - m mu + m' mu'``; controls have mean 0."""
    labels, targets = np.array([0, 1, 2, 4, 1]), np.array([2, 0, 4, 4, 2])
    module = decided(make_module(kind, labels))
    outputs, target = infer(module, make_tensors(labels)), module.pairs(torch.as_tensor(targets))
    latent = outputs["latent"]
    parts = module.intervene(latent, outputs["pairs"], target, generator=generator())
    means = torch.zeros(5, N_LATENT)
    means[[1, 2, 4]] = (module.effects.mask.probability.round() * module.effects.embedding.loc).detach()
    torch.testing.assert_close(latent.prior_mean[0].detach(), means[labels])
    torch.testing.assert_close(parts["basal"].detach(), (latent.z_basal - means[labels] + means[targets]).detach())
    assert (means[targets] - means[labels]).abs().amax(1).gt(0.1).tolist() == [True, True, True, False, True]


def test_the_conditional_vae_exchanges_the_dosages_alone():
    labels, targets = np.array([0, 1, 3]), np.array([3, 0, 4])
    module = make_module("conditional", labels)
    outputs, target = infer(module, make_tensors(labels)), module.pairs(torch.as_tensor(targets))
    parts = module.intervene(outputs["latent"], outputs["pairs"], target)
    assert torch.equal(parts["basal"], outputs["latent"].z_basal)
    assert parts["dosage"][0].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


@EVERY_KIND
def test_new_cells_have_the_prior_moments(kind):
    """``z_b ~ N(0, I)`` and effects as of the posterior; sVAE+: ``z ~ N(m mu, I)``."""
    n, labels = 4000, np.array([0, 1, 3, 4])
    module = decided(make_module(kind, labels))
    noise = torch.randn((1, n, N_LATENT), generator=generator())
    parts = module.prior(module.pairs(torch.full((n,), 1)), noise, generator=generator(1))
    if kind == "conditional":
        effect = torch.zeros(N_LATENT)
        assert (parts["dosage"] == torch.tensor([1.0, 0, 0])).all()
    else:
        effect = module.effects.summary(torch.arange(3))["expected"][0].detach()
    moved = sum(parts[k] for k in ("basal", "perturbation") if k in parts).detach() - noise
    torch.testing.assert_close(moved[0], effect.expand(n, -1), atol=10 * width(module), rtol=1e-5)


# ---- gradients -----------------------------------------------------------------------------------------------------------

BATCHES = {"mixed": [0, 1, 2, 3, 4], "controls": [0, 0, 0], "one control": [0], "one cell": [3]}


@pytest.mark.parametrize("objective", ["elbo", "iwelbo"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@EVERY_KIND
def test_gradients_are_finite_and_reach_every_part(kind, batch, objective):
    labels, _ = epoch()
    module, tensors = make_module(kind, labels, n_particles=2), make_tensors(np.array(batch))
    module.objective = objective
    tensors["X"][0] = 0  # a cell without counts
    output = run(module, tensors)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    gradients = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(g).all() for g in gradients.values())
    reached = {k.split(".")[0] for k, g in gradients.items() if g.abs().sum() > 0}
    treated = any(batch) or kind == "svae-lopez"  # the whole global term comes with every batch
    assert reached == {"encoder", "decoder"} | ({"effects"} if treated and kind != "conditional" else set())
