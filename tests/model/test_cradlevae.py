"""CradleVAE as a user meets it: training, generation, counterfactuals, effects, persistence."""

from __future__ import annotations

import subprocess
import sys

import anndata as ad
import mudata as md
import numpy as np
import pytest
import scipy.sparse as sp
import scvi
import torch
from lightning.pytorch.callbacks import Callback

from scvi_cradle import CradleVAE, datasets, presets
from scvi_cradle.train import PerturbationTrainingPlan

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
SETUP = {"perturbation_key": "perturbation", "artifact_key": "true_artifact"}


@pytest.fixture(autouse=True)
def _seed():
    before = scvi.settings.seed
    scvi.settings.seed = 0
    yield
    scvi.settings._seed = before


@pytest.fixture(scope="module")
def screen():
    return datasets.simulate_perturbseq(
        n_cells=240, n_genes=60, n_perturbations=4, n_combinations=3, artifact_fraction=0.3, n_batches=2, seed=1
    )


def fit(adata, steps=20, setup=SETUP, split_key="split", **kwargs):
    CradleVAE.setup_anndata(adata, **setup)
    model = CradleVAE(adata, **kwargs)
    model.train(max_steps=steps, split_key=split_key, enable_progress_bar=False)
    return model


@pytest.fixture(scope="module")
def model(screen):
    scvi.settings.seed = 0
    return fit(screen.copy(), setup=SETUP | {"batch_key": "batch"})


@pytest.fixture(scope="module")
def held_out(screen):
    test = screen.obs.loc[screen.obs["split"] == "test", "perturbation"]
    return sorted(set(test) - set(screen.obs.loc[screen.obs["split"] != "test", "perturbation"]))


# ---- training ---------------------------------------------------------------------------------------------------------


def test_history_is_finite_and_named_as_in_scvi_tools(model):
    for key in ("elbo_train", "elbo_validation", "reconstruction_loss_train", "kl_local_train", "kl_global_train"):
        assert np.isfinite(model.history[key].to_numpy(dtype=float)).all(), key
    for key in ("cf_kl_train", "kl_treatment_train", "kl_artifact_train", "cf_kl_validation"):
        assert np.isfinite(model.history[key].to_numpy(dtype=float)).all(), key
    assert (model.history["cf_kl_train"].to_numpy(dtype=float) > 0).all()


def test_history_counts_every_batch(screen, monkeypatch):
    """The metrics, which are told to the trainer once an epoch, are sums over all batches."""
    seen, log = {}, PerturbationTrainingPlan.compute_and_log_metrics

    def spy(plan, output, metrics, mode):
        sums = (output.reconstruction_loss_sum, sum(output.kl_local.values()).sum(), output.n_obs_minibatch)
        seen.setdefault((mode, plan.current_epoch), []).append([float(v) for v in sums])
        return log(plan, output, metrics, mode)

    monkeypatch.setattr(PerturbationTrainingPlan, "compute_and_log_metrics", spy)
    adata = screen.copy()
    CradleVAE.setup_anndata(adata, **SETUP)
    model = CradleVAE(adata, n_latent=5)
    model.train(max_epochs=3, batch_size=16, train_size=0.7, enable_progress_bar=False)
    assert sorted(seen) == [(mode, epoch) for mode in ("train", "validation") for epoch in range(3)]
    for (mode, epoch), batches in seen.items():
        assert len(batches) > 1
        error, local, n = np.sum(batches, axis=0)
        for name, value in (("reconstruction_loss", error), ("kl_local", local)):
            logged = float(model.history[f"{name}_{mode}"].iloc[epoch, 0])
            assert logged == pytest.approx(value / n, rel=1e-5), (name, mode, epoch)


def test_a_validation_cell_carries_the_share_of_a_training_cell_in_global_terms(screen):
    adata = screen[screen.obs["split"] != "test"].copy()
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 10 == 0, "val", "train")
    model = fit(adata, steps=2)
    share = {
        k: float(model.history[f"kl_global_{name}"].iloc[-1, 0]) / (adata.obs["split"] == k).sum()
        for k, name in (("train", "train"), ("val", "validation"))
    }
    assert share["val"] == pytest.approx(share["train"], rel=0.3)  # not ten times as large
    elbo, error, local = (
        float(model.history[f"{k}_validation"].iloc[-1, 0]) for k in ("elbo", "reconstruction_loss", "kl_local")
    )
    assert elbo == pytest.approx(error + local + share["val"], rel=1e-4)


def test_the_same_seed_gives_the_same_weights_bit_by_bit(screen):
    weights = []
    for _ in range(2):
        scvi.settings.seed = 3
        weights.append(fit(screen.copy(), steps=5).module.state_dict())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_statistics_come_from_training_cells_only(screen, model):
    train = (screen.obs["split"] == "train").to_numpy()
    log_counts = np.log1p(screen.X[train].toarray().astype(np.float64))
    std = log_counts.std(0, ddof=1)
    np.testing.assert_allclose(model.module.input_mean.numpy(), log_counts.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.module.input_std.numpy(), np.where(std > 0, std, 1), rtol=1e-4)
    members = screen.obs["perturbation"].astype(str).str.split("+")
    counts = [sum(t in m for m, ok in zip(members, train, strict=True) if ok) for t in model._table.treatments]
    np.testing.assert_array_equal(model.module.n_obs_per_treatment.numpy(), counts)
    totals = np.asarray(screen.X[train].sum(1)).ravel()
    np.testing.assert_array_equal(np.sort(model.libraries_["total"]), np.sort(totals))


def test_second_training_goes_on_and_keeps_the_input_scale(screen):
    model = fit(screen.copy(), steps=3)
    mean, epochs = model.module.input_mean.clone(), len(model.history["elbo_train"])
    model.train(max_epochs=2, split_key="split", enable_progress_bar=False)
    assert torch.equal(mean, model.module.input_mean)
    assert len(model.history["elbo_train"]) == epochs + 2


def test_optimizer_has_the_recommended_groups_and_schedule(screen):
    seen = {}

    from lightning.pytorch.callbacks import Callback

    class Record(Callback):
        def on_train_batch_start(self, trainer, plan, batch, batch_idx):
            seen.setdefault("lr", []).append([g["lr"] for g in trainer.optimizers[0].param_groups])
            seen["group"] = trainer.optimizers[0].defaults
            seen["clip"] = trainer.gradient_clip_val

    adata = screen.copy()
    CradleVAE.setup_anndata(adata, **SETUP)
    model = CradleVAE(adata, n_latent=5)
    model.train(max_steps=62, batch_size=16, split_key="split", enable_progress_bar=False, callbacks=[Record()])
    rates = np.array(seen["lr"])
    np.testing.assert_allclose(rates[:, 1], 5 * rates[:, 0])
    assert rates[29, 0] < rates[30, 0] == pytest.approx(3e-3)
    assert (np.diff(rates[:31, 0]) > 0).all()
    assert (np.diff(rates[30:, 0]) < 0).all()
    assert rates[-1, 0] < 1e-5
    assert seen["group"]["eps"] == 1e-8
    assert seen["clip"] == 100


def test_early_stopping_checkpoints_and_loggers_work(screen, tmp_path):
    from lightning.pytorch.loggers import CSVLogger
    from scvi.train import SaveCheckpoint

    adata = screen.copy()
    CradleVAE.setup_anndata(adata, **SETUP)
    model = CradleVAE(adata)
    checkpoint = SaveCheckpoint(dirpath=str(tmp_path / "checkpoints"), monitor="elbo_validation", load_best_on_end=True)
    model.train(
        max_epochs=4,
        split_key="split",
        early_stopping=True,
        early_stopping_patience=1,
        callbacks=[checkpoint],
        logger=CSVLogger(tmp_path),
        enable_progress_bar=False,
    )
    assert any((tmp_path / "checkpoints").iterdir())
    assert list(tmp_path.rglob("metrics.csv"))
    assert model.is_trained


@pytest.mark.parametrize("preset", ["paper", "published"])
def test_presets_train_with_the_published_settings(screen, preset):
    adata = screen.copy()
    CradleVAE.setup_anndata(adata, **SETUP)
    small = {"n_hidden": 16, "embedding_n_hidden": 16, "n_latent": 8}
    if preset == "published":
        with pytest.warns(UserWarning, match="summed over cells"):
            model = CradleVAE(adata, preset=preset, **small)
        assert model.module.cf_reduction == "sum"
        assert model.module.reconstruction_balance == "batch"
        assert not model.module.share_global_samples
    else:
        model = CradleVAE(adata, preset=preset, **small)
        assert model.module.cf_reduction == "mean"
    assert model.module.n_particles == 5
    assert model.module.cf_weight == 0.5
    assert len(model.module.decoder.hidden.layers) == 1  # two hidden layers
    assert model._training_settings["lr"] == 3e-4
    model.train(max_steps=4, split_key="split", enable_progress_bar=False)
    assert np.isfinite(float(model.history["elbo_train"].iloc[-1, 0]))


@pytest.mark.parametrize(
    "settings",
    [
        {"posterior": "mean_field"},
        {"posterior": "correlated", "draws": "batch", "n_particles": 2},
        {"posterior": "correlated_embedding", "kl": "sampled"},
        {"combine": "sum", "effect_path": "both"},
        {"combine": "sum", "effect_path": "linear"},
        {"artifact_latent": "embedding"},
        {"cf_weight": 0.0},
        {"cf_resample": True, "cf_statistic": "mean", "cf_direction": "counterfactual_first"},
        {"reconstruction_balance": "dataset", "cf_detach_reference": True, "mask_prior_logit": -92.0},
        {"n_layers_encoder": 3, "n_layers_decoder": 3, "output_bias": "random", "mask_prior_prob": 0.2},
    ],
    ids=str,
)
def test_every_choice_trains_generates_and_survives_saving(screen, settings, tmp_path):
    adata = screen.copy()
    model = fit(adata, steps=3, n_latent=5, n_hidden=8, embedding_n_hidden=8, embedding_n_layers=2, **settings)
    model.save(tmp_path / "m")
    again = CradleVAE.load(tmp_path / "m", adata=False)
    first, second = (m.get_generated_expression(n_samples=3, seed=0).X.toarray() for m in (model, again))
    np.testing.assert_array_equal(first, second)
    assert np.isfinite(model.get_average_treatment_effects(n_particles=5, seed=0).X).all()
    assert np.isfinite(model.get_iwelbo(n_particles=3)).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_latent": 0}, ValueError, "`n_latent` must be a positive integer"),
        ({"n_latent": 2.5}, ValueError, "`n_latent` must be a positive integer"),
        ({"mask_prior_prob": 1.0}, ValueError, "strictly between 0 and 1"),
        ({"mask_prior_logit": float("-inf")}, ValueError, "must be a finite number"),
        ({"cf_weight": -1.0}, ValueError, "`cf_weight` must be a non-negative number"),
        ({"cf_weight": float("nan")}, ValueError, "`cf_weight`"),
        ({"combine": "concatenate"}, ValueError, "did you mean 'concat'"),
        ({"posterior": "meanfield"}, ValueError, "did you mean 'mean_field'"),
        ({"draws": "particle"}, ValueError, "`draws` must be one of"),
        ({"preset": "papers"}, ValueError, "did you mean 'paper'"),
        ({"embedding_prior_scale": 0}, ValueError, "`embedding_prior_scale`"),
        ({"n_latents": 3}, TypeError, "n_latents"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_bad_architecture_is_refused(screen, arguments, error, message):
    adata = screen.copy()
    CradleVAE.setup_anndata(adata, **SETUP)
    with pytest.raises(error, match=message):
        CradleVAE(adata, **arguments)


def test_presets_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        presets.CRADLE_VAE["paper"][0]["n_latent"] = 3


def test_an_untrained_model_says_so(screen):
    adata = screen.copy()
    CradleVAE.setup_anndata(adata, **SETUP)
    model = CradleVAE(adata)
    for call in (
        model.get_generated_expression,
        model.get_average_treatment_effects,
        model.get_counterfactual_reference,
    ):
        with pytest.raises(RuntimeError, match="trained"):
            call()


# ---- generation -------------------------------------------------------------------------------------------------------


def test_generated_cells_are_counts_in_the_order_of_the_request(model, screen, held_out):
    wanted = [held_out[0], "control", "G01"]
    cells = model.get_generated_expression(wanted, n_samples=7, seed=0)
    assert list(cells.obs["perturbation"]) == [w for w in wanted for _ in range(7)]
    assert list(cells.obs["seen"]) == ["unseen combination"] * 7 + ["seen"] * 14
    assert not cells.obs["artifact"].any()
    assert set(cells.obs["batch"]) <= set(screen.obs["batch"])
    assert list(cells.var_names) == list(screen.var_names)
    assert isinstance(cells.X, sp.csr_matrix)
    assert cells.X.dtype == np.float32
    np.testing.assert_array_equal(cells.X.data, np.round(cells.X.data))
    assert (cells.X.data > 0).all()
    assert cells.uns["control"] == "control"
    libraries = cells.obs["library_size"].to_numpy().reshape(3, 7)
    np.testing.assert_array_equal(libraries[0], libraries[1])
    passed = ~screen.obs["true_artifact"].to_numpy() & (screen.obs["split"] == "train").to_numpy()
    assert set(libraries.ravel()) <= set(np.asarray(screen.X[passed].sum(1)).ravel())
    assert list(model.get_generated_expression(n_samples=1).obs["perturbation"]) == sorted(
        screen.obs.loc[screen.obs["split"] == "train", "perturbation"].unique()
    )


def test_seeds_govern_generation_and_leave_global_randomness_alone(model):
    state = torch.random.get_rng_state()
    first = model.get_generated_expression(["G01"], n_samples=20, seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    np.testing.assert_array_equal(
        first.X.toarray(), model.get_generated_expression(["G01"], n_samples=20, seed=5).X.toarray()
    )
    assert (first.X != model.get_generated_expression(["G01"], n_samples=20, seed=6).X).nnz
    drawn = []
    for _ in range(2):
        scvi.settings.seed = 4
        drawn.append(model.get_generated_expression(["G01"], n_samples=20).X.toarray())
    np.testing.assert_array_equal(*drawn)
    assert (drawn[0] != model.get_generated_expression(["G01"], n_samples=20).X.toarray()).any()


def test_outputs_agree_with_each_other(model):
    mean = model.get_generated_expression(["G02"], n_samples=50, seed=1, output="mean")
    np.testing.assert_allclose(mean.X.sum(1), mean.obs["library_size"], rtol=1e-4)
    share = model.get_generated_expression(["G02"], n_samples=50, seed=1, output="normalized", library_size=123.0)
    np.testing.assert_allclose(share.X.sum(1), 1e4, rtol=1e-4)
    fixed = model.get_generated_expression(["G02"], n_samples=400, seed=1, library_size=5000)
    assert fixed.X.sum(1).mean() == pytest.approx(5000, rel=0.05)
    assert (fixed.obs["library_size"] == 5000).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"perturbations": ["G01+G99"]}, "'G99' is unknown"),
        ({"perturbations": ["g01"]}, "did you mean 'G01'"),
        ({"perturbations": []}, "at least one"),
        ({"perturbations": ["G01+"]}, "Every part"),
        ({"n_samples": 0}, "`n_samples`"),
        ({"output": "log"}, "`output` must be one of"),
        ({"library_size": "latent"}, "'observed' or a positive number"),
        ({"library_size": -1.0}, "`library_size`"),
        ({"batch": "no"}, "`batch` must be one of"),
    ],
    ids=str,
)
def test_bad_requests_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.get_generated_expression(**arguments)


def test_a_treatment_without_training_cells_cannot_be_generated(screen):
    adata = screen.copy()
    adata.obs["split"] = np.where(adata.obs["perturbation"].astype(str).str.contains("G03"), "test", "train")
    model = fit(adata, steps=2)
    with pytest.raises(ValueError, match="'G03' has none in the training split"):
        model.get_generated_expression(["G01+G03"])
    assert not any("G03" in p for p in model.get_generated_expression(n_samples=1).obs["perturbation"])


def test_without_failed_cells_there_is_no_artifact_to_generate(screen):
    adata = screen[~screen.obs["true_artifact"]].copy()
    with pytest.warns(UserWarning, match="No cell failed QC"):
        CradleVAE.setup_anndata(adata, **SETUP)
    model = CradleVAE(adata)
    model.train(max_steps=3, split_key="split", enable_progress_bar=False)
    assert (model.history["cf_kl_train"].to_numpy(dtype=float) == 0).all()
    assert not model.get_counterfactual_reference().obs["has_reference"].any()
    with pytest.raises(ValueError, match="there is none"):
        model.get_generated_expression(artifact=True)
    assert model.get_generated_expression(n_samples=2).n_obs


def test_batches_can_be_asked_for(model, screen):
    cells = model.get_generated_expression(
        ["G01"],
        n_samples=40,
        batch=str(screen.obs["batch"].iloc[0]),
        seed=0,
    )
    assert set(cells.obs["batch"]) == {screen.obs["batch"].iloc[0]}


# ---- counterfactuals --------------------------------------------------------------------------------------------------


def test_counterfactuals_are_the_same_cells_in_the_same_order(model, screen):
    indices = np.array([20, 3, 7, 150])
    cells = model.get_counterfactual_expression(indices=indices, perturbation="G02+G01", seed=0)
    assert list(cells.obs_names) == list(screen.obs_names[indices])
    assert set(cells.obs["perturbation"]) == {"G01+G02"}
    assert list(cells.obs["perturbation_observed"]) == list(screen.obs["perturbation"].iloc[indices])
    assert list(cells.obs["true_artifact_observed"]) == list(screen.obs["true_artifact"].iloc[indices])
    assert not cells.obs["true_artifact"].any()
    mean = model.get_counterfactual_expression(indices=indices, output="mean", seed=0)
    np.testing.assert_allclose(mean.X.sum(1), np.asarray(screen.X[indices].sum(1)).ravel(), rtol=1e-4)
    assert list(mean.obs["perturbation"]) == list(screen.obs["perturbation"].iloc[indices])
    labels = ["G01", "control", "G03", "G04"]
    assert list(model.get_counterfactual_expression(indices=indices, perturbation=labels).obs["perturbation"]) == labels
    with pytest.raises(ValueError, match="2 labels for 4 cells"):
        model.get_counterfactual_expression(indices=indices, perturbation=["G01", "G02"])
    with pytest.raises(ValueError, match="did you mean"):
        model.get_counterfactual_expression(indices=indices, perturbation="G1")


# ---- effects and bounds -----------------------------------------------------------------------------------------------


def test_exact_effects_agree_with_sampled_ones(model):
    labels = ["G02", "G01", "G01+G04"]
    exact = model.get_average_treatment_effects(labels, n_particles=400, seed=0)
    assert list(exact.obs_names) == labels
    assert exact.uns["control"] == "control"
    assert (exact.layers["std"] >= 0).all()
    sampled = model.get_average_treatment_effects(labels, n_particles=20_000, expectation="sample", seed=1)
    error = sampled.layers["std"] / np.sqrt(20_000) * 1.5 + exact.layers["std"] / np.sqrt(400)
    assert (np.abs(exact.X - sampled.X) < 5 * error + 5e-3).mean() > 0.995
    alone = model.get_average_treatment_effects(["G01"], n_particles=400, share_basal=False, seed=0)
    assert np.abs(alone.X).mean() > 0
    mean = model.get_average_treatment_effects(["G01"], n_particles=4000, method="mean", seed=0, library_size=1000.0)
    cells = [
        model.get_generated_expression([x], n_samples=4000, seed=0, library_size=1000.0).X.toarray()
        for x in ("G01", "control")
    ]
    error = np.sqrt((cells[0].var(0) + cells[1].var(0)) / 4000) + mean.layers["std"][0] / np.sqrt(4000)
    assert (np.abs(mean.X[0] - (cells[0].mean(0) - cells[1].mean(0))) < 4 * error + 1e-3).mean() > 0.98


def test_bounds_are_ordered_and_consistent(model):
    cells = np.arange(40)
    scvi.settings.seed = 0
    elbo = model.get_elbo(indices=cells, n_particles=200)
    one = np.mean([model.get_iwelbo(indices=cells, n_particles=1, score_global=True).mean() for _ in range(60)])
    assert one == pytest.approx(elbo, abs=0.6)  # both estimate the same expectation
    many = model.get_iwelbo(indices=cells, n_particles=50, score_global=True)
    assert many.shape == (40,)
    assert many.mean() > one
    control = np.flatnonzero((model.adata.obs["perturbation"] == "control") & ~model.adata.obs["true_artifact"])[:10]
    scvi.settings.seed = 1
    plain = model.get_iwelbo(indices=control, n_particles=3)
    scvi.settings.seed = 1
    np.testing.assert_allclose(plain, model.get_iwelbo(indices=control, n_particles=3, score_global=True), rtol=1e-6)


def test_latent_components(model):
    indices = np.arange(30)
    parts = [
        model.get_latent_representation(indices=indices, component=c) for c in ("basal", "perturbation", "artifact")
    ]
    np.testing.assert_allclose(
        model.get_latent_representation(indices=indices, component="full"), np.hstack(parts), rtol=1e-5
    )
    controls = (model.adata.obs["perturbation"].iloc[indices] == "control").to_numpy()
    failed = model.adata.obs["true_artifact"].to_numpy()[indices]
    assert (parts[1][controls] == 0).all()
    assert (parts[1][~controls] != 0).any(1).all()
    assert (parts[2][~failed] == 0).all()
    assert len(np.unique(parts[2][failed], axis=0)) == 1
    draws = [model.get_latent_representation(indices=indices, give_mean=False) for _ in range(2)]
    assert (draws[0] != draws[1]).any()
    with pytest.raises(ValueError, match="component"):
        model.get_latent_representation(component="z")


def test_references_are_medians_of_failed_training_cells(model, screen):
    reference = model.get_counterfactual_reference()
    train = (screen.obs["split"] == "train").to_numpy()
    failed = train & screen.obs["true_artifact"].to_numpy()
    for label in reference.obs_names:
        rows = failed & (screen.obs["perturbation"] == label).to_numpy()
        assert reference.obs.loc[label, "n_failed"] == rows.sum()
        expected = np.median(screen.X[rows].toarray(), axis=0) if rows.any() else np.zeros(screen.n_vars)
        np.testing.assert_array_equal(reference[label].X.toarray()[0], expected)


# ---- persistence and data forms ---------------------------------------------------------------------------------------


def test_a_fresh_process_without_data_generates_the_same_cells(model, tmp_path):
    model.save(tmp_path / "model")
    expected = model.get_generated_expression(["G01+G02", "control"], n_samples=9, seed=11)
    script = (
        "import sys, scvi_cradle as cradle\n"
        "model = cradle.CradleVAE.load(sys.argv[1], adata=False)\n"
        "model.get_generated_expression(['G01+G02', 'control'], n_samples=9, seed=11).write_h5ad(sys.argv[2])\n"
        "model.get_average_treatment_effects(['G01'], seed=1).write_h5ad(sys.argv[3])\n"
    )
    files = [str(tmp_path / name) for name in ("model", "cells.h5ad", "effects.h5ad")]
    subprocess.run([sys.executable, "-c", script, *files], check=True, capture_output=True)
    cells = ad.read_h5ad(files[1])
    np.testing.assert_array_equal(cells.X.toarray(), expected.X.toarray())
    assert list(cells.obs["perturbation"]) == list(expected.obs["perturbation"])
    np.testing.assert_allclose(
        ad.read_h5ad(files[2]).X, model.get_average_treatment_effects(["G01"], seed=1).X, rtol=1e-5, atol=1e-6
    )


def test_a_loaded_model_works_on_data(model, screen, tmp_path):
    model.save(tmp_path / "model")
    z = model.get_latent_representation()
    with_data = CradleVAE.load(tmp_path / "model", adata=screen.copy())
    np.testing.assert_allclose(with_data.get_latent_representation(), z, atol=1e-6)
    without = CradleVAE.load(tmp_path / "model", adata=False)
    np.testing.assert_allclose(without.get_latent_representation(screen.copy()), z, atol=1e-6)
    assert without.diagnostics_ == model.diagnostics_
    with pytest.raises(ValueError, match="pass `adata`"):
        CradleVAE.load(tmp_path / "model", adata=False).get_latent_representation()


def test_a_model_can_be_built_from_a_registry_alone(model):
    again = CradleVAE(registry=model.registry)
    again.module.load_state_dict(model.module.state_dict())


def test_two_models_share_one_anndata(screen):
    adata = screen.copy()
    first = fit(adata, steps=2)
    second = fit(adata, steps=2, setup=SETUP | {"batch_key": "batch"})
    assert first.get_latent_representation().shape == second.get_latent_representation().shape
    assert first.module.n_levels == (0,)
    assert second.module.n_levels == (2,)


@pytest.mark.parametrize("where", ["rna", "global"])
def test_mudata_trains_like_anndata(screen, where):
    adata = screen.copy()
    weights = fit(adata, steps=4).module.state_dict()
    rna = screen.copy()
    guide = ad.AnnData(
        sp.csr_matrix(screen.obsm["guide_counts"].to_numpy().astype(np.float32)), obs=screen.obs[[]].copy()
    )
    guide.var_names = [f"guide{i}" for i in range(guide.n_vars)]
    columns = ["perturbation", "true_artifact", "split"]
    obs = rna.obs[columns].copy()
    if where == "global":
        rna.obs = rna.obs.drop(columns=columns[:2])
    mdata = md.MuData({"rna": rna, "guide": guide})
    mdata.obs["split"] = obs["split"].to_numpy()
    if where == "global":
        for column in columns[:2]:
            mdata.obs[column] = obs[column].to_numpy()
    CradleVAE.setup_mudata(mdata, **SETUP, modalities={"rna": "rna", "guide": "guide"})
    scvi.settings.seed = 0
    model = CradleVAE(mdata)
    model.train(max_steps=4, split_key="split", enable_progress_bar=False)
    again = model.module.state_dict()
    assert all(torch.equal(weights[k], again[k]) for k in weights)
    cells = model.get_counterfactual_expression(indices=[1, 2], perturbation="G01", seed=0)
    assert list(cells.obs_names) == list(screen.obs_names[[1, 2]])
    assert list(cells.var_names) == list(screen.var_names)


def test_mudata_without_the_modality_is_refused(screen):
    mdata = md.MuData({"gex": screen.copy()})
    with pytest.raises(KeyError, match="modalities"):
        CradleVAE.setup_mudata(mdata, **SETUP)
    with pytest.raises(ValueError, match="does not use `guide_counts_key`"):
        CradleVAE.setup_mudata(mdata, **SETUP, modalities={"rna": "gex"}, guide_counts_key="guides")
    with pytest.raises(ValueError, match="must not be a view"):
        CradleVAE.setup_mudata(mdata[:50], **SETUP, modalities={"rna": "gex"})


def test_warnings_point_at_the_users_line(screen, monkeypatch):
    adata = screen[~screen.obs["true_artifact"]].copy()
    with pytest.warns(UserWarning, match="No cell failed QC") as caught:
        CradleVAE.setup_anndata(adata, **SETUP)
    assert caught[0].filename == __file__
    empty = screen.copy()
    kept = sp.diags((np.arange(empty.n_obs) != 5).astype(np.float32))
    empty.X = sp.csr_matrix(kept @ empty.X)
    with pytest.warns(UserWarning, match="no count at all") as caught:
        CradleVAE.setup_anndata(empty, **SETUP)
    assert caught[0].filename == __file__
    model = CradleVAE(empty)
    monkeypatch.setattr(model, "get_diagnostics", lambda: {"kl_basal": 0.01, "variance_ratio": 0.4})
    with pytest.warns(UserWarning, match="basal state is unused|vary too little") as caught:
        model.train(max_steps=2, enable_progress_bar=False)
    assert __file__ in {w.filename for w in caught}


def test_backed_data_keep_the_order_of_cells(model, screen, tmp_path):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    backed = ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    z = model.get_latent_representation(backed, np.array([3, 50, 120]))
    np.testing.assert_allclose(z, model.get_latent_representation(indices=[3, 50, 120]), atol=1e-5)
    with pytest.raises(ValueError, match="must ascend"):
        model.get_latent_representation(backed, np.array([50, 3]))
    with pytest.raises(ValueError, match="between 0 and 239"):
        model.get_latent_representation(indices=[240])


def test_covariates_enter_the_decoder(screen):
    adata = screen.copy()
    adata.obs["lane"] = np.where(np.arange(adata.n_obs) % 3 == 0, "x", "y")
    adata.obs["depth"] = np.linspace(-1, 1, adata.n_obs)
    keys = {"batch_key": "batch", "categorical_covariate_keys": ["lane"], "continuous_covariate_keys": ["depth"]}
    model = fit(adata, steps=3, setup=SETUP | keys)
    assert model.module.n_levels == (2, 2)
    assert model.module.decoder.first.weights["covariates"].shape[1] == 5
    assert model.get_generated_expression(["G01"], n_samples=5).n_obs == 5
    query = adata[:9].copy()
    assert model.get_latent_representation(query).shape == (9, 50)


@pytest.mark.parametrize("posterior", ["correlated", "correlated_basal"])
def test_mixed_precision_trains_nearly_as_single_precision(screen, posterior):
    adata, elbos = screen.copy(), {}
    CradleVAE.setup_anndata(adata, **SETUP)
    for precision in ("32-true", "bf16-mixed"):
        scvi.settings.seed = 0
        model = CradleVAE(adata, n_latent=5, posterior=posterior)
        model.train(max_steps=5, batch_size=32, precision=precision, enable_progress_bar=False)
        assert {p.dtype for p in model.module.parameters()} == {torch.float32}
        elbos[precision] = float(model.history["elbo_train"].iloc[-1].item())
    assert elbos["bf16-mixed"] != elbos["32-true"]
    assert elbos["bf16-mixed"] == pytest.approx(elbos["32-true"], rel=0.01)


def test_metrics_of_steps_on_request(screen):
    adata = screen.copy()
    CradleVAE.setup_anndata(adata, **SETUP)
    model = CradleVAE(adata, n_latent=5)
    model.train(max_epochs=2, batch_size=32, enable_progress_bar=False, plan_kwargs={"on_step": True})
    n_steps = 2 * -(-len(model.train_indices) // 32)
    assert len(model.history["train_loss_step"]) == n_steps
    assert {"train_loss_epoch", "elbo_train_epoch"} <= set(model.history)


def test_callbacks_see_the_epoch_that_ends(screen):
    seen = []

    class Spy(Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append(float(trainer.callback_metrics["train_loss"]))

    adata = screen.copy()
    CradleVAE.setup_anndata(adata, **SETUP)
    model = CradleVAE(adata, n_latent=5)
    model.train(max_epochs=3, batch_size=32, enable_progress_bar=False, callbacks=[Spy()])
    np.testing.assert_allclose(seen, model.history["train_loss"].to_numpy(dtype=float).ravel(), rtol=1e-6)
