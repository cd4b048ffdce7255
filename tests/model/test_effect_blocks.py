"""Treatment effects in blocks: against particle by particle, whatever the blocks, with a table that is never stale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scvi_cradle import SAMSVAE, CradleVAE
from scvi_cradle.model import _effect_blocks
from scvi_cradle.model._draws import library_grid
from scvi_cradle.model._effects import MAX_BIAS
from scvi_cradle.module.base import EffectNoise, Pairs
from scvi_cradle.module.base._expectation import expected_log1p_scaled

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
LABELS = ["G04", "G01+G02", "G03"]
TINY = {"n_latent": 5, "n_hidden": 16}


def with_strong_effects(cls, adata, **settings):
    cls.setup_anndata(adata, perturbation_key="perturbation", batch_key="batch", artifact_key="artifact")
    model = cls(adata, **(TINY | settings))
    model.train(max_epochs=1, enable_progress_bar=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.module.effects.parameters():
            parameter.normal_()
        model.module.decoder.output.weight.normal_(0, 0.4)
        model.module.decoder.likelihood.log_theta.normal_()
    return model


def one_by_one(model, labels, n, seed):
    """Effects and their standard deviations, each label cell by cell through the decoder's training path, by the integral."""
    module, particles = model.module.eval(), model._draw_particles(n, "observed", seed)
    noise, covariates = particles.draw_noise(), particles.covariates[:, 0]
    library = particles.libraries[particles.library[:, 0, 0]][:, None]
    theta = module.decoder.likelihood.theta.double().numpy()

    def expression(label):
        members = torch.as_tensor(model._members([label])).expand(n, -1)
        pairs = Pairs.from_members(members)
        n_slots = len(pairs.cell) // n
        paired = module.effects.is_amortized  # two neighbours share a mask, their embeddings lie opposite
        drawn = module.effects.draw_noise((n // 2 if paired else n, n_slots, module.n_latent), particles.generator)
        if paired:
            mask, embedding = (x.repeat_interleave(2, 0) for x in drawn)
            embedding[1::2] *= -1
            drawn = EffectNoise(mask, embedding)
        drawn = EffectNoise(*(x.reshape(1, n * n_slots, module.n_latent) for x in drawn))  # cell by cell, slot by slot
        parts = module.prior(pairs, noise, effect_noise=drawn) | {"artifact": torch.zeros_like(noise)}
        output = module.decoder.output(module.decoder.features_of(parts, covariates))[0]
        mean = module.decoder.likelihood.mean(output, torch.ones(n, 1)).double().numpy() * library
        return expected_log1p_scaled(mean, theta, 1e4 / library) / math.log(2)

    base = expression("control")
    differences = [expression(label) - base for label in labels]
    return np.array([d.mean(0) for d in differences]), np.array([d.std(0) for d in differences])


@pytest.mark.parametrize(("combine", "effect_path"), [("concat", "decoder"), ("sum", "both"), ("concat", "linear")])
def test_effects_are_means_over_particles_of_the_integral(shared_screen, combine, effect_path):
    posterior = "correlated" if combine == "concat" else "mean_field"
    model = with_strong_effects(
        CradleVAE, shared_screen.copy(), combine=combine, effect_path=effect_path, posterior=posterior
    )
    effects = model.get_average_treatment_effects(LABELS, n_particles=40, expectation="exact", seed=3)
    with torch.inference_mode():
        mean, std = one_by_one(model, LABELS, 40, 3)
    assert np.abs(mean).max() > 0.5
    np.testing.assert_allclose(effects.X, mean, atol=1e-3)
    np.testing.assert_allclose(effects.layers["std"], std, atol=1e-3)


@pytest.mark.parametrize("share_basal", [True, False])
def test_sizes_of_blocks_change_nothing(trained, monkeypatch, share_basal):
    def effects():
        return trained.get_average_treatment_effects(
            LABELS[1:], n_particles=70, share_basal=share_basal, expectation="exact", seed=1
        )

    whole = effects()
    for rows, labels in ((1, 1), (33, 2)):
        monkeypatch.setattr(_effect_blocks, "MAX_ROWS", rows)
        monkeypatch.setattr(_effect_blocks, "BLOCK_LABELS", labels)
        parts = effects()
        np.testing.assert_allclose(parts.X, whole.X, atol=1e-5)
        np.testing.assert_allclose(parts.layers["std"], whole.layers["std"], atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_antithetic_particles(shared_screen, n):
    model = with_strong_effects(CradleVAE, shared_screen.copy(), posterior="correlated")
    effects, treatment = model.module.effects, torch.tensor([0, 1])
    noise = effects.draw_noise(((n + 1) // 2, 2, model.module.n_latent))
    drawn = effects.at(treatment, noise, n)
    mask = (noise.mask > torch.sigmoid(-effects.mask.logits[treatment])).float()
    posterior = effects.embedding(treatment, mask)
    for particle in range(n):
        sign = 1 - 2 * (particle % 2)
        embedding = (posterior.loc + sign * posterior.scale * noise.embedding)[particle // 2]
        torch.testing.assert_close(drawn[particle], embedding * mask[particle // 2])
    assert drawn.shape == (n, 2, model.module.n_latent)


def test_table_is_built_once_and_never_stale(shared_screen):
    model = with_strong_effects(CradleVAE, shared_screen.copy())

    def effects(**arguments):
        return model.get_average_treatment_effects(LABELS, n_particles=20, expectation="exact", seed=0, **arguments).X

    before, table = effects(), model._table_kept
    effects()
    model.get_average_treatment_effects(LABELS, n_particles=30, seed=1)
    assert model._table_kept is table  # neither the seed nor the number of particles matters
    fixed = effects(library_size=2000.0)
    assert model._table_kept is not table
    np.testing.assert_array_equal(effects(), before)
    model.module.decoder.likelihood.log_theta.data += 1.0
    after = effects()
    assert np.abs(after - before).max() > 1e-3
    assert np.abs(effects(library_size=2000.0) - fixed).max() > 1e-3
    model.train(max_epochs=1, enable_progress_bar=False)
    trained = effects()
    model._table_kept = None
    np.testing.assert_array_equal(effects(), trained)


def test_counts_are_sampled_where_three_genes_hold_the_library(shared_screen):
    used = {}
    for name in ("usual", "three"):
        adata = shared_screen.copy()
        if name == "three":
            counts, rng = adata.X.toarray(), np.random.default_rng(0)
            counts[:, 5:8] = rng.poisson(rng.gamma(1.5, 20_000 / 1.5, (len(counts), 3)))
            adata.X = counts
        SAMSVAE.setup_anndata(adata, perturbation_key="perturbation")
        model = SAMSVAE(adata, **TINY)
        model.train(max_epochs=2, enable_progress_bar=False)
        effects = model.get_average_treatment_effects(LABELS, n_particles=40, seed=0)
        used[name] = effects.uns["expectation"], effects.uns["total_count_bias"] > MAX_BIAS
        asked = model.get_average_treatment_effects(LABELS, n_particles=40, seed=0, expectation=used[name][0])
        np.testing.assert_array_equal(asked.X, effects.X)
        mean = model.get_average_treatment_effects(LABELS, n_particles=40, seed=0, method="mean")
        assert mean.uns["expectation"] == "exact"
        assert "total_count_bias" not in mean.uns
    assert used == {"usual": ("exact", False), "three": ("sample", True)}


def test_library_sizes_are_represented_by_those_of_the_training_cells():
    rng = np.random.default_rng(0)
    total = np.round(rng.lognormal(8, 0.5, 4000))
    pool = {"total": total, "artifact": rng.random(4000) < 0.3, "weight": np.ones(4000)}
    drawn = rng.choice(total[~pool["artifact"]], 3000)
    grid, group = library_grid(pool, drawn, "observed")
    expected = np.quantile(total[~pool["artifact"]], (np.arange(8) + 0.5) / 8)
    np.testing.assert_allclose(grid, expected, rtol=0.02)
    nearest = np.abs(np.log(drawn[:, None] / grid)).argmin(1)
    np.testing.assert_array_equal(group, nearest)
    np.testing.assert_array_equal(library_grid(pool, drawn[:5], "observed")[0], grid)
    few = {"total": np.array([5.0, 5.0, 9.0]), "artifact": np.zeros(3, bool), "weight": np.ones(3)}
    assert list(library_grid(few, np.array([9.0, 5.0]), "observed")[1]) == [1, 0]
    assert list(library_grid(few, np.array([7.0, 7.0]), 7.0)[0]) == [7.0]
