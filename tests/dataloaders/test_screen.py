"""Screens on disk: what is read, what is refused, and how files follow one another."""

from __future__ import annotations

import sys

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scvi_cradle.dataloaders import ScreenDataModule

pytestmark = pytest.mark.filterwarnings("ignore:.*zarr v[23]:UserWarning")
N_CELLS, N_GENES = 60, 6
KEYS = {"perturbation_key": "perturbation"}


def cells(seed=0, n_cells=N_CELLS):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(2.0, (n_cells, N_GENES)).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(rng.permutation(np.resize(["control", "B", "A", "A+B"], n_cells))),
            "artifact": np.arange(n_cells) % 4 == 0,
            "batch": pd.Categorical(np.where(np.arange(n_cells) < n_cells // 2, f"x{seed}", "y")),
            "split": np.where(np.arange(n_cells) % 5 == 0, "val", "train"),
            "depth": rng.random(n_cells),
        },
        index=[f"s{seed}c{i}" for i in range(n_cells)],
    )
    adata = ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]))
    adata.layers["raw"] = sp.csr_matrix(counts * 2)
    doses = obs["perturbation"].astype(str)
    adata.obsm["dose"] = pd.DataFrame({t: doses.str.contains(t).astype(float) for t in "AB"}, index=obs.index)
    adata.uns["note"] = "not read"
    return adata


def stored(folder, adata, kind="zarr", name="screen"):
    path = folder / f"{name}.{kind}"
    (adata.write_zarr if kind == "zarr" else adata.write_h5ad)(path)
    return path


@pytest.mark.parametrize("kind", ["zarr", "h5ad"])
def test_labels_are_read_and_counts_stay_on_disk(tmp_path, kind):
    adata = cells()
    screen = ScreenDataModule(stored(tmp_path, adata, kind), **KEYS, artifact_key="artifact", layer="raw")
    assert (screen.n_obs, screen.n_vars) == adata.shape
    assert sorted(set(screen.obs) - {"_scvi_perturbation", "_scvi_artifact", "_scvi_batch"}) == [
        "artifact",
        "perturbation",
    ]
    np.testing.assert_array_equal(screen.matrix[:].toarray(), adata.layers["raw"].toarray())
    assert screen.manager.adata.X.nnz == 0
    state = screen.registry["field_registries"]["perturbation"]["state_registry"]
    assert state["labels"] == ["A", "A+B", "B", "control"]
    assert state["treatments"] == ["A", "B"]


def test_batches_are_those_of_training_and_validation_cells(tmp_path):
    adata = cells()
    screen = ScreenDataModule(
        stored(tmp_path, adata), **KEYS, split_key="split", batch_size=7, chunk_size=4, n_chunks=3
    )
    for loader, part in ((screen.train_dataloader(), "train"), (screen.val_dataloader(), "val")):
        found = np.concatenate([batch["X"].numpy() for batch in loader])
        wanted = adata.X.toarray()[adata.obs["split"] == part]
        np.testing.assert_array_equal(found[np.lexsort(found.T)], wanted[np.lexsort(wanted.T)])
    assert all(len(batch["X"]) == 7 for batch in list(screen.train_dataloader())[:-1])


def test_a_random_split_is_drawn_once(tmp_path):
    screen = ScreenDataModule(stored(tmp_path, cells()), **KEYS, train_size=0.5, validation_size=0.25)
    assert [len(part) for part in screen.split] == [30, 15, 15]
    assert screen.split is screen.split


def test_several_files_follow_one_another(tmp_path):
    first, second = cells(0), cells(1)
    paths = [stored(tmp_path, first, "zarr", "a"), stored(tmp_path, second, "h5ad", "b")]
    screen = ScreenDataModule(paths, **KEYS, batch_key="batch", obs_keys=["depth"])
    assert list(screen.obs.index) == [*first.obs_names, *second.obs_names]
    np.testing.assert_array_equal(screen.obs["depth"], np.concatenate([first.obs["depth"], second.obs["depth"]]))
    state = screen.registry["field_registries"]["batch"]["state_registry"]
    assert list(state["categorical_mapping"]) == ["x0", "x1", "y"]
    np.testing.assert_array_equal(screen.matrix[55:65].toarray()[5:], second.X[:5].toarray())


def test_dosages_of_several_files_follow_one_another(tmp_path):
    paths = [stored(tmp_path, cells(seed), "zarr", str(seed)) for seed in (0, 1)]
    screen = ScreenDataModule(paths, perturbation_obsm_key="dose")
    batch = next(iter(screen.train_dataloader()))
    assert batch["dosage"].shape == (108, 2)
    other = cells(1)
    other.obsm["dose"] = other.obsm["dose"][["B", "A"]]
    with pytest.raises(ValueError, match="same columns in all files of a screen; received others in file 2"):
        ScreenDataModule([paths[0], stored(tmp_path, other, "zarr", "c")], perturbation_obsm_key="dose")


def test_columns_may_come_from_memory(tmp_path):
    adata = cells()
    path = stored(tmp_path, adata[:, :].copy())
    obs = adata.obs.assign(flag=np.arange(N_CELLS) % 2 == 0)
    screen = ScreenDataModule(path, **KEYS, obs=obs, artifact_key="flag")
    flag_of = {tuple(row): flag for row, flag in zip(adata.X.toarray(), obs["flag"], strict=True)}
    for batch in screen.train_dataloader():
        assert [flag_of[tuple(row)] for row in batch["X"].numpy()] == (batch["artifact"][:, 0] > 0).tolist()
    assert "_scvi_artifact" not in obs  # the user's frame is as it was
    for keys in ({"artifact_key": "none"}, {"split_key": "none"}, {"obs_keys": ["none"]}):
        with pytest.raises(KeyError, match="must be a key of `obs`; received 'none'"):
            ScreenDataModule(path, **KEYS, obs=obs, **keys)
    with pytest.raises(ValueError, match="in the order of the files; received their names in another order"):
        ScreenDataModule(path, **KEYS, obs=obs.iloc[::-1])
    short = obs.set_axis([str(i) for i in range(N_CELLS)])
    assert list(ScreenDataModule(path, perturbation_obsm_key="dose", obs=short).obs.index) == list(short.index)
    with pytest.raises(ValueError, match="must have a row for every cell of the files; received 59 rows for 60 cells"):
        ScreenDataModule(path, **KEYS, obs=obs.iloc[1:])


def write_columns_first(adata):
    adata.X = sp.csc_matrix(adata.X)
    return adata


def other_genes(adata):
    adata.var_names = [f"h{i}" for i in range(N_GENES)]
    return adata


@pytest.mark.parametrize(
    ("change", "arguments", "error", "message"),
    [
        (None, {"perturbation_key": "perturbatoin"}, KeyError, "did you mean 'perturbation'"),
        (None, KEYS | {"split_key": "fold"}, KeyError, "'fold', which is not there"),
        (None, KEYS | {"layer": "counts"}, KeyError, "`layer` must be a key of `screen.zarr/layers`"),
        (None, {"perturbation_obsm_key": "doses"}, KeyError, "did you mean 'dose'"),
        (None, KEYS | {"control": "NT"}, ValueError, "control"),
        (None, KEYS | {"artifact_key": "depth"}, ValueError, "artifact|boolean|0/1"),
        (None, KEYS | {"batch_size": 0}, ValueError, "`batch_size` must be a positive integer"),
        (None, KEYS | {"engine": "tiledb"}, ValueError, "`engine` must be one of"),
        (None, {}, ValueError, "Pass either `perturbation_key`"),
        (write_columns_first, KEYS, ValueError, "stored by cells .CSR or dense.*received CSC"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(tmp_path, change, arguments, error, message):
    adata = cells()
    path = stored(tmp_path, adata if change is None else change(adata))
    with pytest.raises(error, match=message):
        ScreenDataModule(path, **arguments)


def test_files_that_are_no_screen_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is not there"):
        ScreenDataModule(tmp_path / "none.zarr", **KEYS)
    (tmp_path / "text.csv").write_text("a,b")
    with pytest.raises(ValueError, match="neither: write it with"):
        ScreenDataModule(tmp_path / "text.csv", **KEYS)
    for name in ("empty.zarr", "other.h5ad"):
        if name.endswith("zarr"):
            (tmp_path / name).mkdir()
        else:
            h5py.File(tmp_path / name, "w").close()
        with pytest.raises(ValueError, match="must hold `obs`, `var` and the expression as AnnData writes them"):
            ScreenDataModule(tmp_path / name, **KEYS)
    path = stored(tmp_path, cells(), name="once")
    with pytest.raises(ValueError, match="named once; received 'once.zarr' again"):
        ScreenDataModule([path, path], **KEYS)
    with pytest.raises(ValueError, match="at least one file; received none"):
        ScreenDataModule([], **KEYS)
    paths = [stored(tmp_path, cells(), name="a"), stored(tmp_path, other_genes(cells(1)), name="b")]
    with pytest.raises(ValueError, match="same genes in the same order; received other genes .*in file 2"):
        ScreenDataModule(paths, **KEYS)


def test_a_store_that_lacks_parts_is_refused(tmp_path):
    path = stored(tmp_path, cells())
    chunk = next(p for p in (path / "X" / "data").rglob("*") if p.is_file() and not p.name.startswith((".z", "zarr")))
    chunk.unlink()
    with pytest.raises(ValueError, match="reads lacking ones as zeros; received .* 0 of 1 chunks of `data`"):
        ScreenDataModule(path, **KEYS)


def test_categories_of_other_types_are_texts(tmp_path):
    first, second = cells(0), cells(1)
    second.obs["batch"] = pd.Categorical(np.arange(N_CELLS) % 2)
    screen = ScreenDataModule(
        [stored(tmp_path, first, name="a"), stored(tmp_path, second, name="b")], **KEYS, batch_key="batch"
    )
    assert set(screen.obs["batch"]) == {"x0", "y", "0", "1"}


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="annbatch may be installed")
def test_annbatch_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="needs annbatch .Python 3.12 and later. and zarr stores"):
        ScreenDataModule(stored(tmp_path, cells()), **KEYS, engine="annbatch")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_annbatch_reads_the_same_batches(tmp_path):
    pytest.importorskip("annbatch", reason="Python 3.12 and later: pip install 'scvi-cradle[streaming]'")
    paths = [stored(tmp_path, cells(seed), "zarr", str(seed)) for seed in (0, 1)]
    epochs = []
    for engine in ("annbatch", "anndata"):
        screen = ScreenDataModule(
            paths, **KEYS, artifact_key="artifact", split_key="split", chunk_size=8, n_chunks=3, engine=engine
        )
        assert screen.reading["engine"] == engine
        with torch.random.fork_rng():
            torch.manual_seed(0)
            epochs.append(list(screen.train_dataloader()))
    for ours, theirs in zip(*epochs, strict=True):
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    assert ScreenDataModule(paths, **KEYS).reading["engine"] == "anndata"
    with pytest.raises(ValueError, match="zarr stores"):
        ScreenDataModule(stored(tmp_path, cells(), "h5ad"), **KEYS, engine="annbatch")
