"""What every model answers, on data that all of them can use."""

from __future__ import annotations

import random

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import scvi_cradle as cradle

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
HELD_OUT, NEW = "G02+G04", "G01+G03"
CELLS = np.array([20, 1, 13, 150, 210])  # of four labels and the control, none held out


def dense(adata):
    return adata.X.toarray() if sp.issparse(adata.X) else np.asarray(adata.X)


def test_every_public_model_is_under_contract(cases):
    others = {"QuantileHurdleAE"}  # of normalised values: test_quantilehurdle.py
    assert {case.model.__name__ for case in cases} | others == set(cradle.model.__all__)


# ---- training ---------------------------------------------------------------------------------------------------------


def test_history_is_finite_and_named_as_in_scvi_tools(trained):
    for name in ("elbo", "reconstruction_loss", "kl_local", "kl_global"):
        for part in ("train", "validation"):
            values = trained.history[f"{name}_{part}"].to_numpy(dtype=float)
            assert values.shape == (2, 1)
            assert np.isfinite(values).all(), name


def test_the_same_seed_gives_the_same_weights_and_touches_nothing_else(case, trained, shared_screen, with_seed):
    def state():
        flags = (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
        )
        return *flags, np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    with with_seed(0):  # sets the global generators, as the user asked
        before = state()
        model = case.model(trained.adata, **case.architecture)
        model.train(max_epochs=2, split_key="split", enable_progress_bar=False)
        assert state() == before
    weights, again = trained.module.state_dict(), model.module.state_dict()
    assert all(torch.equal(weights[k], again[k]) for k in weights)
    other = case.fit(shared_screen.copy(), epochs=1, seed=1).module.state_dict()
    assert any((weights[k] != other[k]).any() for k in weights)


def test_an_untrained_model_says_so(case, shared_screen):
    model = case.build(shared_screen.copy())
    calls = ["generated_expression", "average_treatment_effects", "counterfactual_expression", "perturbation_effects"]
    for name in (*calls, "latent_representation", "iwelbo", "elbo", "reconstruction_error"):
        with pytest.raises(RuntimeError, match="trained"):
            getattr(model, f"get_{name}")()


# ---- persistence ------------------------------------------------------------------------------------------------------


def answers(model, with_seed, *, data=True):
    """Every answer of a model, at fixed seeds."""
    with with_seed(7):
        result = {
            "generated": dense(model.get_generated_expression(n_samples=4, seed=3)),
            "effects": model.get_average_treatment_effects(["G01"], n_particles=20, seed=3).X,
        }
        if data:
            result["latent"] = model.get_latent_representation(component="full")
            result["iwelbo"] = model.get_iwelbo(n_particles=2, score_global=True)
            result["elbo"] = model.get_elbo(return_mean=False)
            counterfactual = model.get_counterfactual_expression(indices=CELLS, perturbation="G03", seed=3)
            result["counterfactual"] = dense(counterfactual)
    return result


def test_a_loaded_model_gives_the_same_answers(case, trained, shared_screen, with_seed, tmp_path):
    trained.save(tmp_path / "model")
    expected = answers(trained, with_seed)
    loaded = case.model.load(tmp_path / "model", adata=shared_screen.copy())
    for name, values in answers(loaded, with_seed).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    without = case.model.load(tmp_path / "model", adata=False)
    for name, values in answers(without, with_seed, data=False).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    assert without.diagnostics_ == trained.diagnostics_
    with pytest.raises(ValueError, match="pass `adata`"):
        without.get_latent_representation()
    z = without.get_latent_representation(shared_screen.copy(), component="full")
    np.testing.assert_array_equal(z, expected["latent"])


# ---- generation -------------------------------------------------------------------------------------------------------


def test_generated_cells_are_counts_in_the_order_of_the_request(case, trained, shared_screen):
    wanted = ["G04", "control", "G02+G01", "G03"]
    cells = trained.get_generated_expression(wanted, n_samples=6, seed=0)
    canonical = ["G04", "control", "G01+G02", "G03"]
    assert list(cells.obs["perturbation"]) == [w for w in canonical for _ in range(6)]
    assert set(cells.obs["seen"]) == {"seen"}
    assert not cells.obs["artifact"].any()
    assert cells.obs_names.is_unique
    assert list(cells.var_names) == list(shared_screen.var_names)
    assert isinstance(cells.X, sp.csr_matrix)
    assert cells.X.dtype == np.float32
    np.testing.assert_array_equal(cells.X.data, np.round(cells.X.data))
    assert (cells.X.data > 0).all()
    assert cells.uns["control"] == "control"
    libraries = cells.obs["library_size"].to_numpy().reshape(4, 6)
    np.testing.assert_array_equal(libraries, np.tile(libraries[0], (4, 1)))
    source = (shared_screen.obs["split"] == "train").to_numpy()
    if case.artifact:
        source = source & ~shared_screen.obs["artifact"].to_numpy()
    assert set(libraries.ravel()) <= set(np.asarray(shared_screen.X[source].sum(1)).ravel())
    everything = trained.get_generated_expression(n_samples=1).obs["perturbation"]
    assert list(everything) == sorted(set(shared_screen.obs["perturbation"]) - {HELD_OUT})


@pytest.mark.parametrize("label", [HELD_OUT, NEW])
def test_unseen_combinations_are_predicted_or_refused_with_the_reason(case, trained, label):
    if case.combines:
        cells = trained.get_generated_expression(["G01", label], n_samples=3, seed=0)
        assert list(cells.obs["seen"]) == ["seen"] * 3 + ["unseen combination"] * 3
        assert list(trained.get_average_treatment_effects([label], n_particles=5).obs_names) == [label]
        return
    calls = (
        lambda: trained.get_generated_expression([label]),
        lambda: trained.get_average_treatment_effects([label]),
        lambda: trained.get_counterfactual_expression(indices=CELLS[:1], perturbation=label),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match="cannot predict"):
            call()


def test_seeds_govern_generation(trained, with_seed):
    def draw(seed=None):
        return dense(trained.get_generated_expression(["G01"], n_samples=20, seed=seed))

    state = torch.random.get_rng_state()
    first = draw(5)
    trained.get_average_treatment_effects(["G01"], n_particles=5, seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    np.testing.assert_array_equal(first, draw(5))
    assert (first != draw(6)).any()
    drawn = []
    for _ in range(2):
        with with_seed(4):
            drawn.append(draw())
    np.testing.assert_array_equal(*drawn)
    assert (drawn[0] != draw()).any()


def test_outputs_agree_with_each_other(trained):
    mean = trained.get_generated_expression(["G02"], n_samples=30, seed=1, output="mean")
    np.testing.assert_allclose(mean.X.sum(1), mean.obs["library_size"], rtol=1e-4)
    per_10k = trained.get_generated_expression(["G02"], n_samples=30, seed=1, output="normalized")
    np.testing.assert_allclose(per_10k.X.sum(1), 1e4, rtol=1e-4)
    np.testing.assert_allclose(mean.X / mean.obs["library_size"].to_numpy()[:, None] * 1e4, per_10k.X, rtol=1e-3)
    fixed = trained.get_generated_expression(["G02"], n_samples=400, seed=1, library_size=5000)
    assert (fixed.obs["library_size"] == 5000).all()
    assert fixed.X.sum(1).mean() == pytest.approx(5000, rel=0.06)
    # counts scatter around the means of the same cells
    means = trained.get_generated_expression(["G02"], n_samples=400, seed=1, library_size=5000, output="mean").X
    error = fixed.X.toarray().std(0) / np.sqrt(400)
    assert (np.abs(fixed.X.toarray().mean(0) - means.mean(0)) < 4.5 * np.sqrt(2) * error + 1e-2).all()


def test_batches_can_be_asked_for(trained, shared_screen):
    batch = str(shared_screen.obs["batch"].iloc[0])
    cells = trained.get_generated_expression(["G01"], n_samples=20, batch=batch, seed=0)
    assert set(cells.obs["batch"]) == {batch}
    with pytest.raises(ValueError, match="`batch` must be one of"):
        trained.get_generated_expression(["G01"], batch="no")


def test_the_artifact_belongs_to_models_that_have_one(case, trained):
    calls = (
        lambda: trained.get_generated_expression(["G01"], n_samples=2, artifact=True),
        lambda: trained.get_counterfactual_expression(indices=CELLS, artifact=True),
    )
    for call in calls:
        if case.artifact:
            assert call().obs["artifact"].all()
        else:
            with pytest.raises(NotImplementedError, match="use CradleVAE"):
                call()


# ---- counterfactuals --------------------------------------------------------------------------------------------------


def test_counterfactuals_are_the_same_cells_in_the_same_order(trained, shared_screen):
    cells = trained.get_counterfactual_expression(indices=CELLS, perturbation="G02+G01", seed=0)
    assert list(cells.obs_names) == list(shared_screen.obs_names[CELLS])
    assert set(cells.obs["perturbation"]) == {"G01+G02"}
    assert list(cells.obs["perturbation_observed"]) == list(shared_screen.obs["perturbation"].iloc[CELLS])
    assert set(shared_screen.obs) <= set(cells.obs)
    assert not any(str(c).startswith("_scvi") for c in cells.obs)
    assert isinstance(cells.X, sp.csr_matrix)
    own = trained.get_counterfactual_expression(indices=CELLS, output="mean", seed=0)
    assert list(own.obs["perturbation"]) == list(shared_screen.obs["perturbation"].iloc[CELLS])
    totals = np.asarray(shared_screen.X[CELLS].sum(1)).ravel()
    np.testing.assert_allclose(own.X.sum(1), totals, rtol=1e-4)
    fixed = trained.get_counterfactual_expression(indices=CELLS, output="mean", seed=0, library_size=100.0)
    np.testing.assert_allclose(fixed.X, own.X / totals[:, None] * 100, rtol=1e-3, atol=1e-5)
    labels = ["G01", "control", "G03", "G04", "G02"]
    each = trained.get_counterfactual_expression(indices=CELLS, perturbation=labels, output="mean", seed=0)
    assert list(each.obs["perturbation"]) == labels
    with pytest.raises(ValueError, match="2 labels for 5 cells"):
        trained.get_counterfactual_expression(indices=CELLS, perturbation=["G01", "G02"])


# ---- effects ----------------------------------------------------------------------------------------------------------


def standard_error(*effects, n):
    return np.sqrt(sum(e.layers["std"] ** 2 for e in effects) / n)


def test_effects_come_in_the_order_of_the_request(trained, shared_screen):
    effects = trained.get_average_treatment_effects(["G04", "G02+G01"], n_particles=30, seed=0)
    assert list(effects.obs_names) == ["G04", "G01+G02"]
    assert list(effects.var_names) == list(shared_screen.var_names)
    assert effects.uns["control"] == "control"
    assert effects.layers["std"].shape == effects.shape
    assert (effects.layers["std"] >= 0).all()
    seen = sorted(set(shared_screen.obs["perturbation"]) - {HELD_OUT, "control"})
    assert list(trained.get_average_treatment_effects(n_particles=2).obs_names) == seen
    nothing = trained.get_average_treatment_effects("control", n_particles=30)
    assert (nothing.X == 0).all()  # common random numbers


@pytest.mark.parametrize("method", ["perturbseq", "mean"])
def test_exact_sampled_and_unshared_effects_agree(trained, method):
    n, labels = 3000, ["G03", "G01+G02"]
    common = {"n_particles": n, "method": method, "library_size": 3000.0}
    exact = trained.get_average_treatment_effects(labels, seed=0, **common)
    sampled = trained.get_average_treatment_effects(labels, seed=1, expectation="sample", **common)
    unshared = trained.get_average_treatment_effects(labels, seed=2, share_basal=False, **common)
    assert (sampled.layers["std"] > exact.layers["std"]).mean() > 0.9
    assert (unshared.layers["std"] > exact.layers["std"]).mean() > 0.9
    for other in (sampled, unshared):
        allowed = 4.5 * standard_error(exact, other, n=n) + (2e-3 if method == "perturbseq" else 0)
        assert (np.abs(exact.X - other.X) < allowed).all()


def test_mean_effects_are_differences_of_generated_cells(trained):
    n = 3000
    for library_size in ("observed", 1000.0):
        effect = trained.get_average_treatment_effects(
            ["G02"], n_particles=n, method="mean", seed=0, library_size=library_size
        )
        treated, control = (
            dense(trained.get_generated_expression([x], n_samples=n, seed=1 + i, library_size=library_size))
            for i, x in enumerate(("G02", "control"))
        )
        variance = treated.var(0) + control.var(0) + effect.layers["std"][0] ** 2
        difference = effect.X[0] - (treated.mean(0) - control.mean(0))
        assert (np.abs(difference) < 4.5 * np.sqrt(variance / n) + 1e-6).all()


def test_latent_effects_or_the_reason(case, trained):
    if not case.latent_effects:
        with pytest.raises(NotImplementedError, match="no latent treatment effects"):
            trained.get_perturbation_effects()
        return
    effects = trained.get_perturbation_effects()
    assert effects.shape == (len(trained._table.treatments), 5)
    assert {"G01", "G04"} <= set(effects.obs_names)
    assert set(effects.layers) - {None} == {"mask_prob", "embedding_mean", "embedding_std"}
    mask = effects.layers["mask_prob"]
    assert ((mask >= 0) & (mask <= 1)).all()
    np.testing.assert_allclose(effects.X, mask * effects.layers["embedding_mean"], rtol=1e-5)
    assert effects.obs["n_cells"].sum() > 0


# ---- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_is_a_table_with_baseline_and_ceiling(case, trained):
    train = trained.adata.obs["split"] != "test"
    if not case.combines:
        with pytest.raises(NotImplementedError, match="cannot predict"):
            trained.evaluate(n_samples=10, n_bootstrap=0)
    indices = None if case.combines else np.flatnonzero(train)
    table = trained.evaluate(indices=indices, n_samples=30, n_bootstrap=5, seed=0)
    assert {"value", "ci_low", "ci_high", "baseline", "ceiling", "scaled", "n_perturbations", "note"} <= set(table)
    assert "pearson_delta" in table.index
    assert np.isfinite(table["value"].astype(float)).all()
    assert table.attrs["diagnostics"] == trained.diagnostics_
    again = trained.evaluate(indices=indices, n_samples=30, n_bootstrap=5, seed=0)
    np.testing.assert_array_equal(table["value"], again["value"])
