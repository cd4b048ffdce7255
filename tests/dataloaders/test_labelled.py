"""Data modules of scvi-tools as cells of our models: statistics, training, saved models, refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from lightning.pytorch import LightningDataModule
from sklearn.preprocessing import LabelEncoder

from scvi_cradle import SAMSVAE, CradleVAE, PerturbedVAE, QuantileHurdleAE
from scvi_cradle.data import _collected, _statistics, label_table, training_statistics
from scvi_cradle.dataloaders import LabelledDataModule

N_GENES, BATCH_SIZE = 12, 32
LABEL, FLAG = "perturbation", "artifact"
TINY = {"n_latent": 3, "n_hidden": 8}
SETUP = {
    "perturbation_key": LABEL,
    "batch_key": "lane",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["depth"],
}


def cells(n_cells=200, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(2.0, 1.0, N_GENES), (n_cells, N_GENES)).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {
            LABEL: rng.permutation(np.resize(["control", "b", "a", "b+a", "a"], n_cells)),
            "lane": rng.permutation(np.resize(["z", "y"], n_cells)),
            "donor": rng.permutation(np.resize(["d2", "d10", "d1"], n_cells)),
            "depth": rng.random(n_cells).astype(np.float32),
        },
        index=[f"c{i}" for i in range(n_cells)],
    )
    obs[FLAG] = np.where(obs.groupby(LABEL).cumcount() % 3 == 0, "True", "False")  # of all labels alike
    for key in (LABEL, FLAG, "lane", "donor"):
        obs[key] = pd.Categorical(obs[key])
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]))


class Fake(LightningDataModule):
    """What both data modules of scvi-tools have in common: raw batches, a hook that makes dictionaries of codes."""

    def __init__(self, adata, val=None, *, covariates=(FLAG, "donor"), continuous=("depth",), batch_size=BATCH_SIZE):
        super().__init__()
        self.adata, self.val, self.batch_size, self.n_passes = adata, val, batch_size, 0
        self._categorical_covariate_keys = list(covariates) or None
        self._continuous_covariate_keys = list(continuous) or None
        self.order = np.random.default_rng(5).permutation(adata.n_obs)  # shuffled, the same in every epoch

    n_vars = N_GENES

    @property
    def n_obs(self):
        return self.adata.n_obs + (0 if self.val is None else self.val.n_obs)

    @property
    def registry(self):
        return {"field_registries": {"X": {"state_registry": {"column_names": self.adata.var_names}}}}

    def train_dataloader(self):
        self.n_passes += 1
        return self.loader(self.adata, self.order)

    def val_dataloader(self):
        return None if self.val is None else self.loader(self.val, np.arange(self.val.n_obs))

    def loader(self, adata, order):
        parts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [(adata.X[rows].toarray(), adata.obs.iloc[rows]) for rows in parts]

    def on_before_batch_transfer(self, batch, dataloader_idx):
        x, obs = batch
        depth = self._continuous_covariate_keys and torch.tensor(obs[self._continuous_covariate_keys].to_numpy())
        return {"X": torch.tensor(x), "extra_continuous_covs": depth, "sample": torch.empty(0)} | self.codes(obs)


class FakeExperiment(Fake):
    """Encodings of ``TileDBDataModule``: sklearn's encoders, and covariates joined into one column."""

    label_keys, batch_column_names = [LABEL], ["lane"]

    def setup(self, stage=None):
        self.is_set_up = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        obs = self.all_obs()
        self.label_encoder = LabelEncoder().fit(obs[LABEL]) if self.label_keys else None
        self.batch_encoder = LabelEncoder().fit(obs["lane"])
        if self._categorical_covariate_keys:
            self.categ_cov_encoder = LabelEncoder().fit(self.joint(obs))

    def all_obs(self):
        return pd.concat([self.adata.obs, *([] if self.val is None else [self.val.obs])]).astype(str)

    def joint(self, obs):
        return obs[self._categorical_covariate_keys].astype(str).agg("//".join, axis=1)

    def codes(self, obs):
        assert self.is_set_up
        found = {"labels": self.label_encoder.transform(obs[LABEL]), "batch": self.batch_encoder.transform(obs["lane"])}
        if self._categorical_covariate_keys:
            found["extra_categorical_covs"] = self.categ_cov_encoder.transform(self.joint(obs))
        return {key: torch.from_numpy(codes).unsqueeze(1) for key, codes in found.items()}


class FakeCollection(Fake):
    """Encodings of ``MappedCollectionDataModule``: a dictionary per column."""

    _label_key, _batch_key = LABEL, "lane"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        keys = [LABEL, "lane", *(self._categorical_covariate_keys or [])]
        seen = pd.concat([d.obs for d in (self.adata, self.val) if d is not None]).astype(str)
        encoders = {key: {name: i for i, name in enumerate(seen[key].unique())} for key in keys}
        self._dataset = SimpleNamespace(encoders=encoders, n_obs=self.adata.n_obs)
        self._validset = None if self.val is None else SimpleNamespace(encoders=encoders, n_obs=self.val.n_obs)

    n_obs = property(lambda self: self._dataset.n_obs)

    def codes(self, obs):
        def of(key):
            return torch.tensor([self._dataset.encoders[key][name] for name in obs[key].astype(str)])[:, None]

        covariates = [of(key) for key in self._categorical_covariate_keys or []]
        joint = torch.cat(covariates, dim=1) if covariates else None
        return {"labels": of(LABEL), "batch": of("lane"), "extra_categorical_covs": joint}


@pytest.fixture(params=[FakeExperiment, FakeCollection])
def fake(request):
    return request.param


def in_memory(adata, order):
    """The same cells as an AnnData, in the order in which they come."""
    data = adata[order].copy()
    data.obs[FLAG] = data.obs[FLAG] == "True"
    return data


def assert_same(ours, theirs):
    for field in fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                np.testing.assert_array_equal(a[key], b[key], err_msg=key)
        elif isinstance(a, tuple):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x.toarray(), y.toarray())
        else:
            np.testing.assert_array_equal(*(v.toarray() if sp.issparse(v) else v for v in (a, b)), err_msg=field.name)


@pytest.mark.parametrize(("log", "statistic"), [(True, "median"), (False, "mean")])
def test_statistics_are_those_of_the_same_cells_in_memory_to_the_digit(fake, monkeypatch, log, statistic):
    monkeypatch.setattr(_statistics, "MAX_REFERENCE_CELLS", 4)  # so that samples are drawn
    monkeypatch.setattr(_statistics, "MAX_LIBRARIES", 9)
    for module in (_statistics, _collected):  # blocks and batches do not end together
        monkeypatch.setattr(module, "BLOCK_SIZE", 50)
    adata = cells()
    module = fake(adata)
    labelled = LabelledDataModule(module, artifact_key=FLAG)
    assert module.n_passes == 1
    memory = in_memory(adata, module.order)
    CradleVAE.setup_anndata(memory, artifact_key=FLAG, **SETUP)
    found = []
    for manager, collected in (
        (labelled.manager, labelled.collected),
        (CradleVAE._get_most_recent_anndata_manager(memory), None),
    ):
        table = label_table(manager.get_state_registry(LABEL))
        assert table.labels == ("a", "a+b", "b", "control")
        found.append(
            training_statistics(
                manager,
                np.arange(adata.n_obs),
                members=table.padded_members(),
                n_treatments=len(table.treatments),
                log=log,
                statistic=statistic,
                collected=collected,
                seed=3,
            )
        )
    assert_same(*found)
    assert found[0].n_failed_per_label.max() > 4
    assert found[0].reference_profiles.nnz > 10


def test_the_registry_is_that_of_the_same_cells_in_memory(fake):
    adata = cells()
    labelled = LabelledDataModule(fake(adata), artifact_key=FLAG)
    memory = in_memory(adata, labelled.datamodule.order)
    CradleVAE.setup_anndata(memory, artifact_key=FLAG, **SETUP)
    theirs = CradleVAE._get_most_recent_anndata_manager(memory).registry
    ours = CradleVAE(registry=labelled.registry, **TINY).registry_
    assert ours["model_name"] == "CradleVAE"
    for key, entry in theirs["field_registries"].items():
        np.testing.assert_equal(ours["field_registries"][key]["state_registry"], entry["state_registry"], err_msg=key)
        np.testing.assert_equal(ours["field_registries"][key]["summary_stats"], entry["summary_stats"], err_msg=key)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")  # in scvi-tools' loader
def test_batches_are_those_of_an_anndata(fake):
    adata = cells()
    labelled = LabelledDataModule(fake(adata), artifact_key=FLAG)
    memory = in_memory(adata, labelled.datamodule.order)
    CradleVAE.setup_anndata(memory, artifact_key=FLAG, **SETUP)
    usual = scvi.dataloaders.AnnDataLoader(CradleVAE._get_most_recent_anndata_manager(memory), batch_size=BATCH_SIZE)
    loader = labelled.train_dataloader()
    assert len(loader) == len(usual) == labelled.n_batches
    for ours, theirs in zip(loader, usual, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key].float(), theirs[key].float(), rtol=0, atol=0)


def test_validation_cells_that_training_does_not_know_are_left_out(fake):
    val = cells(60, seed=1)
    strange = {LABEL: "new", "lane": "x", "donor": "d9"}
    for row, (key, name) in enumerate(strange.items()):
        val.obs[key] = val.obs[key].cat.add_categories([name])
        val.obs.iloc[row, val.obs.columns.get_loc(key)] = name
    labelled = LabelledDataModule(fake(cells(), val), artifact_key=FLAG)
    found = list(labelled.val_dataloader())
    assert sum(len(batch["X"]) for batch in found) == val.n_obs - len(strange)
    np.testing.assert_array_equal(found[0]["X"], val.X[3 : len(found[0]["X"]) + 3].toarray())
    assert (labelled.n_train, labelled.n_val) == (200, 60)
    state = labelled.registry["field_registries"][LABEL]["state_registry"]
    assert state["treatments"] == ["a", "b"]
    only_strange = fake(cells(), val[:1].copy())
    assert list(LabelledDataModule(only_strange, artifact_key=FLAG).val_dataloader()) == []


@pytest.fixture(scope="module")
def trained():
    before, scvi.settings.seed = scvi.settings.seed, 0
    labelled = LabelledDataModule(FakeExperiment(cells(), cells(60, seed=1)), artifact_key=FLAG)
    model = CradleVAE(registry=labelled.registry, **TINY)
    model.train(max_epochs=4, datamodule=labelled, enable_progress_bar=False)
    scvi.settings._seed = before
    return model, labelled


def test_a_model_trains_and_learns_what_it_would_in_memory(trained):
    model, labelled = trained
    memory = in_memory(labelled.datamodule.adata, labelled.datamodule.order)
    CradleVAE.setup_anndata(memory, artifact_key=FLAG, **SETUP)
    other = CradleVAE(memory, **TINY)
    other._learn_from_training_cells(np.arange(memory.n_obs))
    for (name, ours), (_, theirs) in zip(model.module.named_buffers(), other.module.named_buffers(), strict=True):
        if "running" not in name and "prior" not in name:
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=name)
    assert model.label_counts_ == other.label_counts_
    for key, value in model.references_.items():
        np.testing.assert_equal(value, other.references_[key])
    bounds = model.history["elbo_train"].to_numpy(dtype=float).ravel()
    assert bounds[-1] < bounds[0]
    assert np.isfinite(model.history["elbo_validation"].to_numpy(dtype=float)).all()
    assert (model.adata, model.diagnostics_, model.train_cells_) == (None, None, None)


def test_cells_of_a_loader_are_encoded_as_those_of_an_anndata(trained):
    model, labelled = trained
    memory = in_memory(labelled.datamodule.adata, labelled.datamodule.order)
    for component in ("basal", "full"):
        streamed = model.get_latent_representation(dataloader=labelled.train_dataloader(), component=component)
        np.testing.assert_allclose(
            streamed, model.get_latent_representation(memory, component=component), rtol=1e-5, atol=1e-6
        )
    assert np.isfinite(model.get_elbo(dataloader=labelled.val_dataloader()))


def test_a_model_is_saved_loaded_and_trained_on_without_data(trained, tmp_path):
    model, labelled = trained
    model.save(tmp_path / "model")
    loaded = CradleVAE.load(tmp_path / "model", adata=False)
    ours, theirs = (m.get_generated_expression(["a+b", "control"], n_samples=5, seed=1) for m in (loaded, model))
    np.testing.assert_array_equal(ours.X.toarray(), theirs.X.toarray())
    assert list(ours.var_names) == [f"g{i}" for i in range(N_GENES)]
    effects = [m.get_average_treatment_effects(["a"], n_particles=5, seed=1).X for m in (loaded, model)]
    np.testing.assert_allclose(*effects, rtol=1e-5)
    np.testing.assert_array_equal(
        loaded.get_counterfactual_reference().X.toarray(), model.get_counterfactual_reference().X.toarray()
    )
    loaded.train(max_epochs=1, datamodule=labelled, enable_progress_bar=False)
    other = LabelledDataModule(
        FakeExperiment(cells()[:, :].copy(), None), artifact_key=FLAG, genes=list("abcdefghijkl")
    )
    with pytest.raises(ValueError, match="genes, labels, categories and flags that the model was built for"):
        loaded.train(max_epochs=1, datamodule=other)


def test_a_model_trains_without_flags_covariates_and_validation(fake):
    labelled = LabelledDataModule(fake(cells(), covariates=(), continuous=()))
    assert labelled.val_dataloader() is None
    model = SAMSVAE(registry=labelled.registry, **TINY)
    model.train(max_epochs=1, datamodule=labelled, enable_progress_bar=False)
    assert model.get_generated_expression(["a"], n_samples=3).shape == (3, N_GENES)
    with pytest.raises(ValueError, match="Diagnostics need the data of training"):
        model.get_diagnostics()
    with pytest.raises(ValueError, match="The model holds no data"):
        model.get_latent_representation()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"artifact_key": "flag"}, "`artifact_key` must be one of .*'artifact', 'donor'.*received 'flag'"),
        ({"artifact_key": "donor"}, "must hold True/False or 0/1; received 'd"),
        ({"control": "NT"}, "At least one cell must be a control; received control=\\['NT'\\]"),
        ({"genes": ["g0"]}, "`genes` must name every gene of the datamodule; received 1 names for 12 genes"),
    ],
)
def test_arguments_that_cannot_be_are_refused(fake, settings, message):
    with pytest.raises(ValueError, match=message):
        LabelledDataModule(fake(cells()), **settings)


def test_datamodules_that_cannot_be_used_are_refused():
    with pytest.raises(
        TypeError, match="`TileDBDataModule` or `MappedCollectionDataModule` of scvi-tools; received Fake"
    ):
        LabelledDataModule(Fake(cells()))
    unlabelled = FakeCollection(cells())
    unlabelled._label_key = None
    with pytest.raises(ValueError, match="received one without a label: pass it the column"):
        LabelledDataModule(unlabelled)
    recoded = FakeCollection(cells(), cells(60))
    recoded._validset.encoders = {key: {"x": 0} for key in recoded._dataset.encoders}
    with pytest.raises(ValueError, match="received other categories of 'perturbation' in `collection_val`"):
        LabelledDataModule(recoded)
    coded = FakeCollection(cells())
    coded._dataset.encoders["depth"] = {}
    with pytest.raises(ValueError, match="received codes of 'depth': pass `encode_labels=`"):
        LabelledDataModule(coded)
    adata = cells()
    adata.obs["donor"] = adata.obs["donor"].cat.rename_categories({"d1": "d//1"})
    with pytest.raises(ValueError, match="must not hold '//', which joins them; received 'False//d//1'"):
        LabelledDataModule(FakeExperiment(adata))
    unknown = FakeCollection(cells())
    unknown._dataset.encoders["lane"]["y"] = -1
    with pytest.raises(ValueError, match="Every training cell must have a category of `lane`; received codes below 0"):
        LabelledDataModule(unknown)
    empty = FakeExperiment(cells())
    empty.order = empty.order[:0]
    with pytest.raises(ValueError, match="must yield training cells; received none"):
        LabelledDataModule(empty)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN or infinite values"), (0.5, "the screen holds other")])
def test_values_that_are_no_counts_never_train(monkeypatch, value, message):
    monkeypatch.setattr(_collected, "BLOCK_SIZE", 64)
    adata = cells()
    adata.X[180, 0] = value
    with pytest.raises(ValueError, match=message):
        CradleVAE(registry=LabelledDataModule(FakeCollection(adata), artifact_key=FLAG).registry)


def test_models_and_arguments_of_training_that_cannot_be_are_refused(trained):
    model, labelled = trained
    plain = LabelledDataModule(FakeCollection(cells()))
    memory = in_memory(cells(), np.arange(200))
    memory.X = memory.X.log1p()
    QuantileHurdleAE.setup_anndata(memory, perturbation_key=LABEL)
    for other in (PerturbedVAE(registry=plain.registry, likelihood="nb"), QuantileHurdleAE(memory)):
        with pytest.raises(ValueError, match=f"{type(other).__name__} looks cells up while .*ScreenDataModule"):
            other.train(max_epochs=1, datamodule=plain)
    for argument in ({"batch_size": 5}, {"split_key": "split"}, {"train_size": 0.5}, {"load_on_device": True}):
        name = next(iter(argument))
        with pytest.raises(ValueError, match=f"has its own loaders and split; received `{name}="):
            model.train(max_epochs=1, datamodule=labelled, **argument)
    for argument in ({"strategy": "ddp", "accelerator": "cpu", "devices": 2}, {"checkpoint_dir": "run"}):
        with pytest.raises(ValueError, match=f"has its own loaders and split; received `{next(iter(argument))}="):
            model.train(max_epochs=1, datamodule=labelled, **argument)
    with pytest.raises(ValueError, match="CradleVAE needs `artifact_key`"):
        CradleVAE(registry=plain.registry)
    memory = in_memory(cells(), np.arange(200))
    CradleVAE.setup_anndata(memory, artifact_key=FLAG, **SETUP)
    with pytest.raises(ValueError, match="received one for a model with data of its own"):
        CradleVAE(memory, **TINY).train(max_epochs=1, datamodule=labelled)


# ---- the data modules themselves ------------------------------------------------------------------------------------


def assert_trains_as_in_memory(module, memory, genes):
    """Train on a data module whose cells come in the order of ``memory``; compare what is learnt outside training."""
    labelled = LabelledDataModule(module, artifact_key=FLAG, genes=genes)
    model = CradleVAE(registry=labelled.registry, **TINY)
    model.train(max_epochs=2, datamodule=labelled, enable_progress_bar=False)
    CradleVAE.setup_anndata(memory, artifact_key=FLAG, **SETUP)
    other = CradleVAE(memory, **TINY)
    other._learn_from_training_cells(np.arange(memory.n_obs))
    for (name, ours), (_, theirs) in zip(model.module.named_buffers(), other.module.named_buffers(), strict=True):
        if "running" not in name and "prior" not in name:
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=name)
    np.testing.assert_allclose(
        model.get_latent_representation(dataloader=labelled.train_dataloader()),
        model.get_latent_representation(memory),
        rtol=1e-5,
        atol=1e-6,
    )
    return model, labelled


@pytest.mark.filterwarnings("ignore")  # those of the other packages
@pytest.mark.parametrize("train_size", [1.0, 0.8])
def test_a_soma_experiment_trains_a_model(tmp_path, train_size):
    soma = pytest.importorskip("tiledbsoma", reason="pip install tiledbsoma tiledbsoma-ml")
    pytest.importorskip("tiledbsoma_ml", reason="pip install tiledbsoma-ml")
    io = pytest.importorskip("tiledbsoma.io")
    adata = in_memory(cells(), np.arange(200))  # flags are True and False
    io.from_anndata(str(tmp_path / "screen"), adata.copy(), measurement_name="RNA")
    with soma.Experiment.open(str(tmp_path / "screen")) as experiment:
        query = experiment.axis_query(measurement_name="RNA")
        module = scvi.dataloaders.TileDBDataModule(
            query,
            layer_name="data",
            shuffle=train_size < 1,
            batch_size=BATCH_SIZE,
            batch_column_names=["lane"],
            label_keys=[LABEL],
            categorical_covariate_keys=[FLAG, "donor"],
            continuous_covariate_keys=["depth"],
            train_size=train_size,
        )
        if train_size == 1:
            assert_trains_as_in_memory(module, adata, adata.var_names)
            return
        labelled = LabelledDataModule(module, artifact_key=FLAG)
        assert (labelled.n_train, labelled.n_val) == (160, 40)
        rows = {tuple(row) for row in adata.X.toarray()}
        for _ in range(2):
            loaders = (labelled.train_dataloader(), labelled.val_dataloader())
            found = [tuple(row) for loader in loaders for batch in loader for row in batch["X"].numpy()]
            assert len(found) == 200
            assert set(found) == rows
        model = CradleVAE(registry=labelled.registry, **TINY)
        model.train(max_epochs=1, datamodule=labelled, enable_progress_bar=False)
        assert np.isfinite(model.history["elbo_validation"].to_numpy(dtype=float)).all()
        assert model._genes == [str(i) for i in range(N_GENES)]  # join ids, unless `genes` are given


@pytest.mark.filterwarnings("ignore")
def test_a_collection_of_lamindb_trains_a_model(tmp_path, monkeypatch):
    if find_spec("lamindb") is None:
        pytest.skip("pip install lamindb")
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    lamin = Path(sys.executable).with_name("lamin")
    subprocess.run([lamin, "init", "--storage", tmp_path / "store"], check=True)  # before it is imported
    ln = import_module("lamindb")
    screens = [cells(), cells(60, seed=1)]
    artifacts = [ln.Artifact.from_anndata(s, key=f"{i}.h5ad").save() for i, s in enumerate(screens)]
    collections = [ln.Collection([a], key=f"screen {i}").save() for i, a in enumerate(artifacts)]
    module = scvi.dataloaders.MappedCollectionDataModule(
        collections[0],
        collection_val=collections[1],
        label_key=LABEL,
        batch_key="lane",
        categorical_covariate_keys=[FLAG, "donor"],
        continuous_covariate_keys=["depth"],
        encode_labels=[LABEL, "lane", FLAG, "donor"],
        batch_size=BATCH_SIZE,
        shuffle=False,
        parallel=False,
    )
    model, labelled = assert_trains_as_in_memory(module, in_memory(screens[0], np.arange(200)), None)
    assert labelled.n_val == 60
    assert np.isfinite(model.history["elbo_validation"].to_numpy(dtype=float)).all()
    module.close()
