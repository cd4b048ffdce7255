"""Cells kept on the device of training: the same batches and the same training as with scvi-tools' loaders."""

from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch

from scvi_cradle import CradleVAE, PerturbedVAE, pp
from scvi_cradle.data import BlockLoader, DeviceDataSplitter
from scvi_cradle.data._device import SparseRows, fits

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
N_CELLS, N_GENES = 70, 12
KEYS = {"perturbation_key": "perturbation", "artifact_key": "artifact", "batch_key": "batch"}
COVARIATES = {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
TINY = {"n_latent": 3, "n_hidden": 8}


def screen(dtype=np.float32, storage=sp.csr_matrix):
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 3.0, (N_CELLS, N_GENES)))
    counts[3] = 0
    counts[0] = np.maximum(counts[0], 1)
    obs = pd.DataFrame(
        {
            "perturbation": rng.permutation(np.repeat(["control", "A", "B", "A+B", "C"], N_CELLS // 5)),
            "artifact": rng.random(N_CELLS) < 0.3,
            "batch": rng.choice(["x", "y"], N_CELLS),
            "donor": rng.choice(["d1", "d2", "d3"], N_CELLS),
            "age": rng.random(N_CELLS),
        },
        index=[f"c{i}" for i in range(N_CELLS)],
    )
    adata = ad.AnnData(
        storage(counts.astype(dtype)), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)])
    )
    adata.layers["counts"] = sp.csr_matrix(counts.astype(np.float32))
    doses = pd.DataFrame({t: obs["perturbation"].str.contains(t).astype(float) for t in "AB"}, index=obs.index)
    adata.obsm["dose"] = doses
    adata.obsm["sparse_dose"] = sp.csr_matrix(doses.to_numpy() / 2)
    adata.uns["sparse_dose_names"] = ["A", "B"]
    return adata


def register(adata, **keys):
    with pytest.warns(UserWarning, match="no count at all"):
        CradleVAE.setup_anndata(adata, **({**KEYS, **COVARIATES} | keys))
    return CradleVAE._get_most_recent_anndata_manager(adata)


def splitter(manager, load_on_device, **kwargs):
    split = [np.arange(N_CELLS)[:19:-1], np.array([1, 7, 3, 0]), np.array([2, 4, 5, 6, *range(8, 20)])]
    made = DeviceDataSplitter(
        manager, load_on_device=load_on_device, external_indexing=split, **({"batch_size": 20} | kwargs)
    )
    made.setup()
    return made


def batches(manager, load_on_device, **kwargs):
    made = splitter(manager, load_on_device, **kwargs)
    torch.manual_seed(0)
    found = [*made.train_dataloader(), *made.train_dataloader(), *made.val_dataloader()]
    assert (made.fields is not None) == (load_on_device is True)
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for batch, usual in zip(found, expected, strict=True):
        assert list(batch) == list(usual)
        for key, values in usual.items():
            assert batch[key].dtype == values.dtype, key
            assert torch.equal(batch[key].cpu(), values), key


STORAGES = {
    "csr": (np.float32, sp.csr_matrix, {}),
    "csc": (np.float64, sp.csc_matrix, {}),
    "dense": (np.int64, np.asarray, {}),
    "uint16": (np.uint16, sp.csr_matrix, {}),
    "int64": (np.int64, sp.csr_matrix, {}),
    "layer": (np.float32, np.asarray, {"layer": "counts"}),
    "dosage": (np.float32, sp.csr_matrix, {"perturbation_key": None, "perturbation_obsm_key": "dose"}),
    "sparse dosage": (np.float32, sp.csr_matrix, {"perturbation_key": None, "perturbation_obsm_key": "sparse_dose"}),
}


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_are_those_of_the_usual_loaders(name, drop_last):
    dtype, storage, keys = STORAGES[name]
    manager = register(screen(dtype, storage), **keys)
    expected = batches(manager, False, drop_last=drop_last)
    assert_same(batches(manager, True, drop_last=drop_last), expected)
    assert {"X", "batch", "extra_categorical_covs", "extra_continuous_covs"} < set(expected[0])
    assert not torch.equal(expected[0]["X"], expected[3 - drop_last]["X"])  # epochs are shuffled


def test_batches_of_a_mudata():
    data = md.MuData({"rna": screen()})
    with pytest.warns(UserWarning, match="no count at all"):
        CradleVAE.setup_mudata(data, **KEYS, modalities={"rna": "rna"})
    manager = CradleVAE._get_most_recent_anndata_manager(data)
    assert_same(batches(manager, True), batches(manager, False))


def test_rows_are_the_rows_of_the_matrix():
    rng = np.random.default_rng(0)
    dense = rng.integers(-3, 4, (9, 6)) * (rng.random((9, 6)) < 0.4)
    dense[4] = 0
    twice = sp.csr_matrix(dense.astype(np.float32))
    twice = sp.csr_matrix(  # every entry stored in two halves
        (
            np.repeat(twice.data / 2, 2),
            np.repeat(twice.indices, 2),
            2 * twice.indptr,
        ),
        shape=dense.shape,
    )
    kept = np.array([8, 4, 0, 2, 3])
    for matrix in (twice, sp.csc_matrix(dense), dense):
        rows = SparseRows(matrix, kept, np.float32, torch.device("cpu"))
        for positions in ([0, 1, 2, 3, 4], [3, 3, 1], [1], [4, 0]):
            found = rows.take(np.array(positions), torch.tensor(positions))
            np.testing.assert_array_equal(found.numpy(), dense[kept[positions]])
    np.testing.assert_array_equal(twice.toarray(), dense)  # what was given is left as it was
    assert twice.nnz == 2 * np.count_nonzero(dense)


def train(adata, seed=0, **kwargs):
    with pytest.warns(UserWarning, match="no count at all"):
        CradleVAE.setup_anndata(adata, **KEYS)
    before, scvi.settings.seed = scvi.settings.seed, seed
    model = CradleVAE(adata, **TINY)
    settings = {"max_epochs": 2, "batch_size": 16, "accelerator": "cpu", "enable_progress_bar": False}
    model.train(**(settings | kwargs))
    scvi.settings._seed = before
    return model


def history(model):
    return np.stack([model.history[k].to_numpy(dtype=float).ravel() for k in ("elbo_train", "elbo_validation")])


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int64])
def test_training_is_the_same_wherever_and_however_counts_are_stored(dtype):
    adata = screen(dtype)
    pp.qc_label(adata, n_mads=0.5, doublets=None, criteria=["total_counts"], key_added="quality")
    model = train(adata, load_on_device=True)
    np.testing.assert_array_equal(history(model), history(train(screen())))
    assert adata.X.dtype == dtype
    assert model.trainer.datamodule.fields is None
    assert not model.trainer.train_dataloader.dataset.fields  # freed, though the trainer lives on
    model.train(max_epochs=1, load_on_device=True, enable_progress_bar=False, accelerator="cpu")


def test_a_cpu_takes_the_usual_loaders_by_default():
    assert type(train(screen()).trainer.train_dataloader) is scvi.dataloaders.AnnDataLoader
    assert type(train(screen(), load_on_device=True).trainer.train_dataloader) is torch.utils.data.DataLoader


def test_data_move_to_a_gpu_if_they_take_at_most_half_of_its_free_memory(monkeypatch):
    adata = screen()
    manager = register(adata)
    data, cells = manager.create_torch_dataset().data, np.arange(40)
    narrow = sum(len(cells) * v.shape[1] for k, v in data.items() if k != "X")
    n_bytes = 8 * (adata.X[:40].nnz + narrow)
    for free, expected in ((2 * n_bytes, True), (2 * n_bytes - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert fits(data, cells, torch.device("cuda")) is expected
    assert not fits(data, cells, torch.device("mps"))


@pytest.mark.parametrize(
    ("obstacle", "options"),
    [("backed", {}), ("several processes", {"distributed_sampler": True}), ("options", {"load_sparse_tensor": True})],
)
def test_what_cannot_be_kept_is_loaded_batch_by_batch(tmp_path, obstacle, options):
    adata = screen()
    if obstacle == "backed":
        del adata.obsm["dose"]
        adata.write_h5ad(tmp_path / "cells.h5ad")
        adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    made = splitter(register(adata), True, **options)
    with pytest.warns(UserWarning, match=obstacle):
        assert not made._is_loaded()
    made.load_on_device = "auto"  # no word about what was not asked for
    if obstacle != "several processes":  # which needs them
        usual = BlockLoader if obstacle == "backed" else scvi.dataloaders.AnnDataLoader
        assert type(made.train_dataloader()) is usual
        assert type(made.val_dataloader()) is usual


def test_refusals():
    adata = screen()
    register(adata)
    model = CradleVAE(adata, **TINY)
    with pytest.raises(ValueError, match="load_on_device"):
        model.train(max_epochs=1, load_on_device="gpu")
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    PerturbedVAE.setup_anndata(adata, perturbation_key="perturbation")
    model = PerturbedVAE(adata)
    with pytest.raises(ValueError, match="PerturbedVAE loads cells in its own way"):
        model.train(max_epochs=1, load_on_device=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu():
    adata = screen(np.uint16)
    cells = np.random.default_rng(0).permutation(N_CELLS)
    rows = SparseRows(adata.X, cells, np.float32, torch.device("cuda"))
    positions = np.array([5, 5, 0, 33])
    found = rows.take(positions, torch.tensor(positions, device="cuda"))
    assert found.device.type == "cuda"
    np.testing.assert_array_equal(found.cpu().numpy(), adata.X[cells[positions]].toarray())
    models = [train(screen(), load_on_device=choice, accelerator="cuda") for choice in ("auto", False)]
    kinds = [type(model.trainer.train_dataloader) for model in models]
    assert kinds == [torch.utils.data.DataLoader, scvi.dataloaders.AnnDataLoader]
    np.testing.assert_allclose(*(history(model) for model in models), rtol=1e-4)
