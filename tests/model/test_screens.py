"""Models that are built from the registry of a screen on disk: the same as with an AnnData."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import scipy.sparse as sp
from lightning.pytorch import Callback

from scvi_cradle import SAMSVAE, CradleVAE, PerturbedVAE, QuantileHurdleAE, metrics
from scvi_cradle.data import _setup
from scvi_cradle.dataloaders import ScreenDataModule
from scvi_cradle.model import _quality

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
    pytest.mark.filterwarnings("ignore:.*zarr v[23]:UserWarning"),
]


SMALL = {"likelihood": "nb", "n_latent_responsive": 4, "n_latent_invariant": 3}


@pytest.fixture(scope="module")
def path(shared_screen, tmp_path_factory):
    path = tmp_path_factory.mktemp("screens") / "screen.zarr"
    adata = shared_screen.copy()
    adata.layers["log"] = sp.csr_matrix(adata.X.log1p())
    adata.write_zarr(path)
    return path


def screen_for(case, path, **settings):
    return ScreenDataModule(path, **case.keys(), **({"split_key": "split", "chunk_size": 32, "n_chunks": 4} | settings))


def fit(case, screen, with_seed, **kwargs):
    with with_seed(0):
        model = case.model(registry=screen.registry, **case.architecture)
        model.train(max_epochs=2, datamodule=screen, enable_progress_bar=False, **kwargs)
    return model


@pytest.fixture(scope="module")
def streamed(case, path, with_seed):
    screen = screen_for(case, path)
    return fit(case, screen, with_seed), screen


def test_what_is_learnt_outside_training_is_the_same_to_the_digit(case, trained, streamed):
    model, _ = streamed
    # what gradient descent does not touch
    of_data = [name for name, _ in model.module.named_buffers() if "prior" not in name and "running" not in name]
    assert {"n_obs_per_treatment", "input_mean", "input_std"} <= set(of_data)
    ours, theirs = dict(model.module.named_buffers()), dict(trained.module.named_buffers())
    for name in of_data:
        np.testing.assert_array_equal(ours[name].numpy(), theirs[name].numpy(), err_msg=name)
    assert model.label_counts_ == trained.label_counts_
    for key in ("cell", "total", "artifact", "batch", "weight"):
        np.testing.assert_array_equal(model.libraries_[key], trained.libraries_[key])
    for part in ("train_indices_", "validation_indices_", "test_indices_"):
        np.testing.assert_array_equal(np.sort(getattr(model, part)), np.sort(getattr(trained, part)))


def test_training_goes_as_well_as_in_memory(trained, streamed):
    model, _ = streamed
    ours, theirs = (m.history["elbo_validation"].iloc[-1].item() for m in (model, trained))
    assert list(model.history) == list(trained.history)
    assert abs(ours / theirs - 1) < 0.05


def test_queries_take_a_screen_in_the_place_of_an_anndata(streamed, shared_screen):
    model, screen = streamed
    for method in (model.get_latent_representation, lambda data: model.get_elbo(data, return_mean=False)):
        np.random.default_rng(0)
        own, on_disk, in_memory = method(None), method(screen), method(shared_screen.copy())
        if method == model.get_latent_representation:  # no draws
            np.testing.assert_array_equal(own, on_disk)
            np.testing.assert_allclose(on_disk, in_memory, rtol=1e-5, atol=1e-6)
        assert len(own) == screen.n_obs
    indices = np.array([300, 2, 2, 77])
    np.testing.assert_allclose(
        model.get_latent_representation(screen, indices),
        model.get_latent_representation()[indices],
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_model_is_saved_and_loaded_without_data(case, streamed, path, tmp_path):
    model, screen = streamed
    model.save(tmp_path / "model")
    loaded = case.model.load(tmp_path / "model", adata=False)
    assert loaded.adata is None
    labels = [label for label, n in loaded.label_counts_.items() if n][:2]
    ours, theirs = (m.get_generated_expression(labels, n_samples=4, seed=1) for m in (loaded, model))
    np.testing.assert_array_equal(ours.X.toarray(), theirs.X.toarray())
    effects = [m.get_average_treatment_effects(labels[:1], n_particles=5, seed=1).X for m in (loaded, model)]
    np.testing.assert_allclose(*effects, rtol=1e-5)
    again = screen_for(case, path)
    np.testing.assert_allclose(
        loaded.get_latent_representation(again), model.get_latent_representation(), rtol=1e-5, atol=1e-6
    )


def test_training_goes_on_from_a_loaded_model(case, streamed, path, tmp_path):
    model, _ = streamed
    model.save(tmp_path / "model")
    loaded = case.model.load(tmp_path / "model", adata=False)
    loaded.train(max_epochs=1, datamodule=screen_for(case, path), enable_progress_bar=False)
    assert loaded.train_cells_ == model.train_cells_


# ---- one model stands for all ---------------------------------------------------------------------------------------


def test_scores_diagnostics_and_pass_rates_read_what_they_need(path, with_seed):
    screen = ScreenDataModule(path, perturbation_key="perturbation", artifact_key="artifact", split_key="split")
    with with_seed(0):
        model = CradleVAE(registry=screen.registry, n_latent=4, n_hidden=8)
        model.train(max_epochs=2, datamodule=screen, enable_progress_bar=False)
    assert model.diagnostics_ == model.get_diagnostics()
    assert "pearson_delta" in model.evaluate(n_samples=20, n_bootstrap=5).index
    assert model.qc_pass_rate(n_samples=5).loc["all", "real_passed"] >= 0
    cells = model.get_counterfactual_expression(screen, [5, 3], perturbation="G01", seed=0)
    assert list(cells.obs_names) == [screen.obs.index[5], screen.obs.index[3]]


def test_scores_of_many_cells_on_disk_read_as_many_of_every_label(path, with_seed, monkeypatch):
    monkeypatch.setattr(_quality, "MAX_READ", 40)
    screen = ScreenDataModule(path, perturbation_key="perturbation", split_key="split")
    with with_seed(0):
        model = SAMSVAE(registry=screen.registry, n_latent=4, n_hidden=8)
        model.train(max_epochs=1, datamodule=screen, enable_progress_bar=False)
    cells = model._training_cells()
    n_labels = sum(n > 0 for n in model.label_counts_.values())
    counts = cells.obs["perturbation"].value_counts()
    expected = {label: min(n, 40 // n_labels) for label, n in model.label_counts_.items() if n}
    assert counts.to_dict() == expected
    assert set(cells.obs_names) <= set(screen.obs.index[model.train_indices_])
    assert model.evaluate(n_samples=20, n_bootstrap=5)["value"].notna().any()


@pytest.mark.parametrize("settings", [{"steps_per_call": 3}, {"checkpoint_dir": "run"}])
def test_a_screen_goes_with_other_ways_to_train(path, with_seed, tmp_path, settings):
    if "checkpoint_dir" in settings:
        settings = {"checkpoint_dir": tmp_path / "run"}
    losses = []
    for more in ({}, settings):
        screen = ScreenDataModule(path, perturbation_key="perturbation", split_key="split", chunk_size=32, n_chunks=4)
        with with_seed(0):
            model = SAMSVAE(registry=screen.registry, n_latent=4, n_hidden=8)
            if "checkpoint_dir" in more:  # interrupted after an epoch
                stop = Callback()
                stop.on_train_epoch_start = lambda trainer, plan: trainer.current_epoch and interrupt()
                with contextlib.suppress(KeyboardInterrupt, SystemExit):
                    model.train(max_epochs=3, datamodule=screen, enable_progress_bar=False, callbacks=[stop], **more)
                model = SAMSVAE(registry=screen.registry, n_latent=4, n_hidden=8)
            model.train(max_epochs=3, datamodule=screen, enable_progress_bar=False, **more)
        losses.append(model.history["train_loss"].to_numpy(dtype=float))
    np.testing.assert_array_equal(*losses)


def interrupt():
    raise KeyboardInterrupt


def test_quantile_hurdle_autoencoder_trains_from_disk(path, with_seed):
    screen = ScreenDataModule(path, perturbation_key="perturbation", layer="log", split_key="split")
    with with_seed(0):
        model = QuantileHurdleAE(registry=screen.registry, n_latent=4, n_hidden=8)
        model.train(max_steps=4, datamodule=screen, enable_progress_bar=False)
    assert model.get_latent_representation(screen).shape == (screen.n_obs, 4)


@pytest.mark.filterwarnings("ignore:.*guide.*:UserWarning")
def test_the_perturbation_loop_reads_a_screen_into_memory(path, shared_screen):
    keys = {"perturbation_key": "perturbation", "layer": "log", "guide_counts_key": "guide_counts"}
    keys["guide_targets"] = "guide_targets"
    screen = ScreenDataModule(path, **keys, split_key="split")
    on_disk = QuantileHurdleAE(registry=screen.registry, n_latent=4, n_hidden=8)
    adata = shared_screen.copy()
    adata.layers["log"] = sp.csr_matrix(adata.X.log1p())
    QuantileHurdleAE.setup_anndata(adata, **keys)
    in_memory = QuantileHurdleAE(adata, n_latent=4, n_hidden=8)
    for model, source in ((on_disk, {"datamodule": screen}), (in_memory, {"split_key": "split"})):
        model.fit_perturbation_loop(n_outer=1, max_steps=2, progress=False, **source)
    assert on_disk.get_perturbation_probability().shape == in_memory.get_perturbation_probability().shape
    assert list(on_disk.screening_["target"]) == list(in_memory.screening_["target"])
    assert len(on_disk.train_indices_) == len(in_memory.train_indices_)


@pytest.mark.parametrize(
    "settings", [{}, {"control_pairing": "fixed"}, {"control_pairing": "within:batch"}, {"control_cells": "partners"}]
)
def test_control_partners_come_from_memory(path, with_seed, shared_screen, settings):
    screen = ScreenDataModule(
        path, perturbation_key="perturbation", split_key="split", obs_keys=["batch"], batch_size=32
    )
    with with_seed(0):
        model = PerturbedVAE(registry=screen.registry, n_hidden=8, alignment="l2", **SMALL, **settings)
        model.train(max_epochs=1, datamodule=screen, enable_progress_bar=False)
    loader = model.trainer.train_dataloader
    partners = loader.controls
    obs = shared_screen.obs.iloc[partners]
    assert (obs["perturbation"] == "control").all()
    assert (obs["split"] == "train").all()
    batch = next(iter(loader))
    known = {tuple(row) for row in shared_screen.X[partners].toarray()}
    assert all(tuple(row) in known for row in batch["control_partner"].numpy())


def test_values_that_are_no_counts_never_train(path, tmp_path, shared_screen, monkeypatch):
    monkeypatch.setattr(_setup, "N_CHECKED", 8)
    adata = shared_screen.copy()
    counts = adata.X.toarray()
    counts[350, 3] = np.nan
    adata.X = sp.csr_matrix(counts)
    adata.write_zarr(tmp_path / "bad.zarr")
    adata.obs["split"] = "train"
    screen = ScreenDataModule(tmp_path / "bad.zarr", perturbation_key="perturbation", obs=adata.obs, split_key="split")
    model = SAMSVAE(registry=screen.registry, n_latent=3, n_hidden=8)
    before = [p.clone() for p in model.module.parameters()]
    with pytest.raises(ValueError, match="The screen on disk must hold raw counts; received NaN"):
        model.train(max_epochs=1, datamodule=screen, enable_progress_bar=False)
    assert all((a == b).all() for a, b in zip(before, model.module.parameters(), strict=True))
    assert not model.is_trained_


def two_files(folder, shared_screen, change):
    """The same cells in two files, the second changed."""
    paths = []
    for i, rows in enumerate((slice(0, 250), slice(250, 400))):
        adata = shared_screen[rows].copy()
        if i:
            change(adata)
        paths.append(folder / f"{i}.h5ad")
        adata.write_h5ad(paths[-1])
    return paths


@pytest.mark.parametrize("dtypes", [("float64", "float32"), ("int32", "float64"), ("float32", "uint16")])
def test_files_may_hold_their_counts_in_other_types(path, shared_screen, tmp_path, dtypes):
    screen = shared_screen.copy()
    screen.X = screen.X.astype(dtypes[0])
    paths = two_files(tmp_path, screen, lambda adata: setattr(adata, "X", adata.X.astype(dtypes[1])))
    found = []
    for files in (path, paths):
        screen = ScreenDataModule(
            files, perturbation_key="perturbation", artifact_key="artifact", obs=shared_screen.obs, split_key="split"
        )
        model = CradleVAE(registry=screen.registry, n_latent=3, n_hidden=8)
        model._attach(screen)
        model._learn_from_training_cells(screen.split[0])
        found.append(model.references_)
    np.testing.assert_array_equal(found[0]["data"], found[1]["data"])
    np.testing.assert_array_equal(found[0]["indices"], found[1]["indices"])


def test_what_files_say_of_their_columns_must_be_the_same(shared_screen, tmp_path):
    screen = shared_screen.copy()
    doses = screen.obs["perturbation"].astype(str)
    names = ["G01", "G02", "G03", "G04"]
    screen.obsm["dose"] = sp.csr_matrix(np.stack([doses.str.contains(t) for t in names], axis=1).astype(float))
    screen.uns["dose_names"] = names
    paths = two_files(tmp_path, screen, lambda adata: adata.uns.update({"dose_names": names[::-1]}))
    with pytest.raises(ValueError, match="`uns.'dose_names'.` must be the same in all files"):
        ScreenDataModule(paths, perturbation_obsm_key="dose")
    paths = two_files(tmp_path, shared_screen, lambda adata: adata.uns["qc_label"].update({"n_mads": 1.0}))
    with pytest.warns(UserWarning, match="different QC thresholds"):
        screen = ScreenDataModule(paths, perturbation_key="perturbation", artifact_key="artifact")
    assert "qc_label" not in screen.manager.adata.uns


def test_the_frame_of_a_screen_is_never_taken_for_cells_without_counts(path, with_seed):
    screen = ScreenDataModule(path, perturbation_key="perturbation")
    model = SAMSVAE(registry=screen.registry, n_latent=3, n_hidden=8)
    with with_seed(0):
        model.train(max_epochs=1, datamodule=screen, enable_progress_bar=False)
    for use in (
        lambda: model.get_latent_representation(model.adata[:10]),
        lambda: model.get_elbo(model.adata.copy()),
        lambda: metrics.average_treatment_effects(model.adata, "perturbation"),
        lambda: SAMSVAE.setup_anndata(model.adata.copy(), perturbation_key="perturbation"),
    ):
        with pytest.raises(ValueError, match="counts of these cells are on disk and not in this AnnData"):
            use()
    chosen = [30, 1, 7, 200, 100, 5, 399, 12]
    cells = screen.to_memory(chosen)
    np.testing.assert_allclose(
        model.get_latent_representation(cells), model.get_latent_representation()[chosen], rtol=1e-5, atol=1e-6
    )


def test_a_screen_keeps_its_own_codes_when_a_model_asks_about_it(path, shared_screen, tmp_path):
    other = shared_screen.copy()
    other.obs["perturbation"] = other.obs["perturbation"].astype(str).replace({"G02": "A00"})
    other.write_zarr(tmp_path / "other.zarr")
    small = shared_screen[~shared_screen.obs["perturbation"].astype(str).str.contains("G02")].copy()
    small.write_zarr(tmp_path / "small.zarr")
    wide = ScreenDataModule(path, perturbation_key="perturbation", split_key="split")
    model = SAMSVAE(registry=wide.registry, n_latent=3, n_hidden=8)
    model.train(max_epochs=1, datamodule=wide, enable_progress_bar=False)
    narrow = ScreenDataModule(tmp_path / "small.zarr", perturbation_key="perturbation", split_key="split")
    labels = narrow.registry["field_registries"]["perturbation"]["state_registry"]["labels"]
    model.get_latent_representation(narrow)
    codes = np.concatenate([b["perturbation"].numpy().ravel() for b in narrow.train_dataloader()])
    names, numbers = np.unique(np.array(labels)[codes.astype(int)], return_counts=True)
    expected = small.obs.loc[small.obs["split"] == "train", "perturbation"].value_counts()
    assert dict(zip(names, numbers, strict=True)) == {k: v for k, v in expected.items() if v}
    with pytest.raises(ValueError, match="did you mean|must be a known treatment|received"):
        model.get_latent_representation(ScreenDataModule(tmp_path / "other.zarr", perturbation_key="perturbation"))


def test_queries_are_checked_as_they_are_read(path, shared_screen, tmp_path):
    screen = ScreenDataModule(path, perturbation_key="perturbation", split_key="split")
    model = SAMSVAE(registry=screen.registry, n_latent=3, n_hidden=8)
    model.train(max_epochs=1, datamodule=screen, enable_progress_bar=False)
    bad = shared_screen.copy()
    counts = bad.X.toarray()
    counts[399, 0] = np.nan
    bad.X = sp.csr_matrix(counts)
    bad.layers["half"] = sp.csr_matrix(np.nan_to_num(counts) / 2)
    bad.write_zarr(tmp_path / "bad.zarr")
    bad.obs["split"] = np.where(np.arange(400) == 399, "val", "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_setup, "N_CHECKED", 8)
        query = ScreenDataModule(tmp_path / "bad.zarr", perturbation_key="perturbation", obs=bad.obs, split_key="split")
        flawed = SAMSVAE(registry=query.registry, n_latent=3, n_hidden=8)
    for use in (
        lambda: model.get_latent_representation(query),
        lambda: flawed.train(max_epochs=1, datamodule=query, enable_progress_bar=False),  # a validation cell
    ):
        with pytest.raises(ValueError, match="The screen on disk must hold raw counts; received NaN"):
            use()
    half = ScreenDataModule(tmp_path / "bad.zarr", perturbation_key="perturbation", layer="half")
    with pytest.raises(ValueError, match="opened with the layer of the model; received layer='half'"):
        model.get_latent_representation(half)
    unlabelled = ScreenDataModule(path, perturbation_key="batch", control="batch_1")
    with pytest.raises(KeyError, match="without 'perturbation': pass `perturbation_key`"):
        model.get_latent_representation(unlabelled)


def test_a_model_is_loaded_with_a_screen_and_goes_on_with_another(path, tmp_path):
    screens = [ScreenDataModule(path, perturbation_key="perturbation", split_key="split") for _ in range(2)]
    model = SAMSVAE(registry=screens[0].registry, n_latent=3, n_hidden=8)
    model.train(max_epochs=1, datamodule=screens[0], enable_progress_bar=False)
    model.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", adata=screens[0])
    np.testing.assert_allclose(
        loaded.get_latent_representation(), model.get_latent_representation(), rtol=1e-5, atol=1e-6
    )
    assert loaded.get_diagnostics() == model.diagnostics_
    loaded.train(max_epochs=1, datamodule=screens[1], enable_progress_bar=False)
    assert loaded.adata is screens[1].manager.adata


def test_early_stopping_needs_validation_cells(path):
    screen = ScreenDataModule(path, perturbation_key="perturbation", train_size=1.0)
    model = SAMSVAE(registry=screen.registry, n_latent=3, n_hidden=8)
    with pytest.raises(ValueError, match="`early_stopping` needs validation cells"):
        model.train(max_epochs=1, datamodule=screen, early_stopping=True)


def test_screens_that_a_model_cannot_use_are_refused(path, shared_screen):
    plain = ScreenDataModule(path, perturbation_key="perturbation")
    flagged = ScreenDataModule(path, perturbation_key="perturbation", artifact_key="artifact")
    logged = ScreenDataModule(path, perturbation_key="perturbation", artifact_key="artifact", layer="log")
    with pytest.raises(ValueError, match="CradleVAE needs `artifact_key`"):
        CradleVAE(registry=plain.registry)
    with pytest.raises(ValueError, match="SAMSVAE does not use `artifact_key`"):
        SAMSVAE(registry=flagged.registry)
    with pytest.raises(ValueError, match="CradleVAE needs raw counts; the screen holds other values"):
        CradleVAE(registry=logged.registry)
    model = CradleVAE(registry=flagged.registry, n_latent=3, n_hidden=8)
    with pytest.raises(ValueError, match="A screen brings its own split; received `split_key='split'`"):
        model.train(max_epochs=1, datamodule=flagged, split_key="split")
    with pytest.raises(TypeError, match="must be a `ScreenDataModule` or `LabelledDataModule` of .*; received list"):
        model.train(max_epochs=1, datamodule=[])
    with pytest.raises(ValueError, match="built from a registry, without"):
        model.train(max_epochs=1)
    adata = shared_screen.copy()
    CradleVAE.setup_anndata(adata, perturbation_key="perturbation", artifact_key="artifact")
    with pytest.raises(ValueError, match="for a model with data of its own"):
        CradleVAE(adata, n_latent=3, n_hidden=8).train(max_epochs=1, datamodule=flagged)


def test_a_screen_on_disk_is_not_saved_with_the_model(path, tmp_path, with_seed):
    screen = ScreenDataModule(path, perturbation_key="perturbation")
    model = SAMSVAE(registry=screen.registry, n_latent=3, n_hidden=8)
    model.train(max_epochs=1, datamodule=screen, enable_progress_bar=False)
    with pytest.raises(ValueError, match="is not saved with a model; received save_anndata=True"):
        model.save(tmp_path / "model", save_anndata=True)
    assert not (tmp_path / "model").exists()


def test_an_anndata_can_be_asked_about_after_a_screen(path, shared_screen, with_seed):
    screen = ScreenDataModule(path, perturbation_key="perturbation")
    model = SAMSVAE(registry=screen.registry, n_latent=3, n_hidden=8)
    model.train(max_epochs=1, datamodule=screen, enable_progress_bar=False)
    query = shared_screen[:50].copy()
    np.testing.assert_allclose(
        model.get_latent_representation(query), model.get_latent_representation()[:50], rtol=1e-5, atol=1e-6
    )
    assert model.adata.n_obs == screen.n_obs  # its own cells stay its own
