"""SAMSVAE with a Gaussian likelihood, for values that are not counts."""

from __future__ import annotations

import numpy as np
import pytest

from scvi_cradle import SAMSVAE, datasets

KEYS = {"perturbation_key": "perturbation"}


@pytest.fixture(scope="module")
def simulated():
    return datasets.simulate_sams(
        n_treatments=5, n_latent=3, n_genes=12, n_samples_per_treatment=60, mask_prob=0.4, seed=0
    )


@pytest.fixture(scope="module")
def model(simulated, with_seed):
    adata = simulated.copy()
    SAMSVAE.setup_anndata(adata, **KEYS)
    with with_seed(0):
        model = SAMSVAE(
            adata,
            likelihood="gaussian",
            n_latent=3,
            n_hidden=32,
            mask_prior_prob=0.4,
            embedding_prior_scale=5.0,
            effect_path="decoder",  # effects on these values are not additive
        )
        model.train(max_steps=200, lr=1e-2, split_key="split", check_val_every_n_epoch=20, enable_progress_bar=False)
    return model


def test_effects_are_those_of_the_simulation(model, simulated):
    truth = simulated.uns["truth"]["effects"]
    effects = model.get_average_treatment_effects(seed=0)
    assert list(effects.obs_names) == list(truth.index)
    assert np.corrcoef(effects.X.ravel(), truth.to_numpy().ravel())[0, 1] > 0.95
    explicit = model.get_average_treatment_effects(seed=0, method="mean", library_size=7.0)
    np.testing.assert_allclose(explicit.X, effects.X, atol=1e-6)  # values have no library size
    n = 500
    sampled = model.get_average_treatment_effects(seed=1, n_particles=n, expectation="sample")
    allowed = 4.5 * np.sqrt((sampled.layers["std"] ** 2 + effects.layers["std"] ** 2) / n)
    assert (np.abs(sampled.X - effects.X) < allowed).all()


def test_generated_values_have_the_means_and_the_spread_of_the_data(model, simulated):
    generated = model.get_generated_expression(n_samples=400, seed=0)
    assert isinstance(generated.X, np.ndarray)
    assert generated.X.dtype == np.float32
    train = simulated[simulated.obs["split"] == "train"]
    labels = ["control", *simulated.uns["truth"]["effects"].index]
    real, made = (
        np.array([x.X[(x.obs["perturbation"] == label).to_numpy()].mean(0) for label in labels])
        for x in (train, generated)
    )
    assert np.corrcoef(real.ravel(), made.ravel())[0, 1] > 0.98
    assert np.abs(real - made).mean() < 0.15  # of a standard deviation
    values, mean = (
        model.get_generated_expression("T01", n_samples=2000, seed=0, output=output, batch_size=2000).X
        for output in ("counts", "mean")
    )
    noise = (values - mean).std(0)
    np.testing.assert_allclose(noise, model.module.decoder.likelihood.std.detach(), rtol=0.08)
    np.testing.assert_allclose(noise, simulated.uns["truth"]["noise_sd"], rtol=0.4)


def test_what_only_counts_have_is_refused_with_the_reason(model):
    for call in (
        model.evaluate,
        lambda: model.get_generated_expression(output="normalized"),
        lambda: model.get_counterfactual_expression(indices=[0], output="normalized"),
        lambda: model.get_average_treatment_effects(method="perturbseq"),
    ):
        with pytest.raises(NotImplementedError, match="needs counts"):
            call()


def test_counterfactuals_and_bounds_of_values(model, simulated):
    cells = np.flatnonzero(simulated.obs["perturbation"] == "control")[:40]
    label = simulated.uns["truth"]["effects"].abs().sum(axis=1).idxmax()
    moved, own = (
        model.get_counterfactual_expression(indices=cells, perturbation=p, output="mean", seed=0).X
        for p in (label, None)
    )
    truth = simulated.uns["truth"]["effects"].loc[label]
    assert np.corrcoef((moved - own).mean(0), truth)[0, 1] > 0.9
    assert np.isfinite(model.get_iwelbo(indices=cells, n_particles=3)).all()
    assert set(model.get_diagnostics()) == {
        "kl_basal",
        "variance_ratio",
        "expected_variance_ratio",
        "state_variance_ratio",
    }


def test_a_loaded_model_gives_the_same_values(model, simulated, tmp_path):
    model.save(tmp_path / "m")
    loaded = SAMSVAE.load(tmp_path / "m", adata=False)
    first, second = (m.get_generated_expression(n_samples=3, seed=0).X for m in (model, loaded))
    np.testing.assert_array_equal(first, second)
    query = simulated[:40].copy()
    z = loaded.get_latent_representation(query)
    np.testing.assert_array_equal(z, model.get_latent_representation(indices=np.arange(40)))
    query = simulated[:40].copy()
    query.X[0, 0] = np.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        loaded.get_latent_representation(query)


# ---- likelihoods and data that do not fit each other ---------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", [None, "nb", "poisson"])
def test_likelihoods_of_counts_refuse_other_values(simulated, likelihood):
    adata = simulated.copy()
    SAMSVAE.setup_anndata(adata, **KEYS)
    with pytest.raises(ValueError, match="needs raw counts; the registered data are not"):
        SAMSVAE(adata, likelihood=likelihood)


def test_a_gaussian_on_counts_warns_the_user(shared_screen):
    adata = shared_screen.copy()
    SAMSVAE.setup_anndata(adata, **KEYS)
    with pytest.warns(UserWarning, match="treats them as Gaussian") as caught:
        SAMSVAE(adata, likelihood="gaussian")
    assert caught[0].filename == __file__
    adata.X = adata.X * 1.5
    SAMSVAE.setup_anndata(adata, **KEYS)
    SAMSVAE(adata, likelihood="gaussian")


def test_infinite_values_are_refused(simulated):
    adata = simulated.copy()
    adata.X[3, 4] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        SAMSVAE.setup_anndata(adata, **KEYS)
    assert "_scvi_perturbation" not in adata.obs
