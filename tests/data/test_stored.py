"""Expression on disk: rows, spilled rows, batches in blocks, and the statistics of training cells, beside memory."""

from __future__ import annotations

from dataclasses import fields

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
import zarr
from anndata.io import sparse_dataset, write_elem

from scvi_cradle import CradleVAE
from scvi_cradle.data import BlockLoader, StoredMatrix, StoredSplitter, _stored, training_statistics
from scvi_cradle.data import _statistics as statistics
from scvi_cradle.data import label_table as read_label_table
from scvi_cradle.data._spill import RowSpill

KEYS = {"perturbation_key": "perturbation", "artifact_key": "artifact", "batch_key": "batch"}
N_CELLS, N_GENES = 90, 7

pytestmark = pytest.mark.filterwarnings("ignore:.*zarr v[23]:UserWarning")


def counts(n_cells=N_CELLS, seed=0):
    rng = np.random.default_rng(seed)
    return sp.csr_matrix(rng.poisson(rng.gamma(0.5, 3.0, (n_cells, N_GENES))).astype(np.float32))


def backed_screen(folder, n_cells=N_CELLS):
    rng = np.random.default_rng(1)
    obs = pd.DataFrame(
        {
            "perturbation": rng.permutation(np.resize(["control", "A", "B", "A+B", "C"], n_cells)),
            "artifact": rng.random(n_cells) < 0.3,
            "batch": rng.choice(["x", "y"], n_cells),
        },
        index=[f"c{i}" for i in range(n_cells)],
    )
    x = counts(n_cells).toarray()
    x[:, 0] = np.arange(n_cells) + 1  # no empty cell, no two alike
    adata = ad.AnnData(sp.csr_matrix(x), obs=obs)
    adata.write_h5ad(folder / "cells.h5ad")
    return adata, ad.read_h5ad(folder / "cells.h5ad", backed="r")


def manager_of(adata):
    CradleVAE.setup_anndata(adata, **KEYS)
    return CradleVAE._get_most_recent_anndata_manager(adata)


@pytest.fixture(params=["zarr", "hdf5"])
def parts(request, tmp_path):
    """Two sparse parts and a dense one, in memory and on disk."""
    matrices = [counts(40, seed=1), counts(30, seed=2), counts(20, seed=3)]
    store = zarr.open_group(tmp_path / "m.zarr") if request.param == "zarr" else h5py.File(tmp_path / "m.h5", "w")
    for i, matrix in enumerate(matrices):
        write_elem(store, str(i), matrix.toarray() if i == 2 else matrix)
    stored = [store["2"] if i == 2 else sparse_dataset(store[str(i)]) for i in range(3)]
    return sp.vstack(matrices, format="csr").toarray(), StoredMatrix(stored)


@pytest.mark.parametrize(
    "rows",
    [
        slice(0, 90),
        slice(35, 45),
        slice(60, 200),
        slice(10, 80, 7),
        slice(5, 5),
        np.array([3]),
        np.array([88, 2, 41, 2, 39]),
        np.arange(90) % 3 == 0,
        np.array([], dtype=int),
    ],
    ids=["all", "across", "beyond", "step", "none", "one", "unordered", "mask", "empty"],
)
def test_rows_of_several_matrices_are_read_as_of_one(parts, rows, monkeypatch):
    dense, stored = parts
    for gap in (256, 2, 0):  # whatever is read for nothing
        monkeypatch.setattr(_stored, "MAX_GAP", gap)
        found = stored[rows]
        assert sp.issparse(found)
        assert found.format == "csr"
        np.testing.assert_array_equal(found.toarray(), dense[rows])
    assert stored.shape == (90, N_GENES)


def test_spilled_rows_come_back_in_any_order():
    matrix = counts()
    kept = np.array([0, 5, 31, 32, 89])
    with RowSpill(kept, N_GENES) as spill:
        for start in range(0, N_CELLS, 32):
            rows = np.arange(start, min(start + 32, N_CELLS))
            spill.keep(rows, matrix[rows])
        for wanted in (kept, np.array([89, 0]), np.array([32]), np.array([], dtype=int)):
            found = spill[wanted]
            np.testing.assert_array_equal(found.toarray(), matrix[wanted].toarray())
            assert found.dtype == matrix.dtype


def block_loader(manager, cells, **options):
    return BlockLoader(
        manager, cells, **({"batch_size": 16, "shuffle": True, "chunk_size": 10, "n_chunks": 2} | options)
    )


def names(batches, adata):
    """Rows of ``adata`` that batches hold, by their counts."""
    known = {tuple(row): i for i, row in enumerate(adata.X.toarray())}
    return [[known[tuple(row)] for row in batch["X"].numpy()] for batch in batches]


def test_an_epoch_holds_every_cell_once_in_another_order_each_time(tmp_path):
    adata, backed = backed_screen(tmp_path)
    cells = np.random.default_rng(0).permutation(N_CELLS)[:77]
    loader = block_loader(manager_of(backed), cells)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = (names(loader, adata) for _ in range(2))
        torch.manual_seed(0)
        again = names(loader, adata)
    assert first == again != second
    for epoch in (first, second):
        assert [len(batch) for batch in epoch] == [16, 16, 16, 16, 13]
        assert sorted(sum(epoch, [])) == sorted(cells)
    # cells that stand together in the file do not come together
    assert len({i // 10 for i in first[0]}) > 2
    assert len(loader) == 5
    dropped = block_loader(manager_of(backed), cells, drop_last=True)
    assert [len(batch) for batch in names(dropped, adata)] == [16] * 4 == [16] * len(dropped)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")  # in scvi-tools' loader
def test_batches_hold_what_scvi_tools_would_load(tmp_path):
    adata, backed = backed_screen(tmp_path)
    cells = np.array([1, 4, 30, 31, 32, 60, 88])
    loader = block_loader(manager_of(backed), cells, shuffle=False, batch_size=3)
    usual = scvi.dataloaders.AnnDataLoader(manager_of(adata), indices=cells, batch_size=3)
    for ours, theirs in zip(loader, usual, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_processes_share_an_epoch_in_equal_numbers_of_batches(tmp_path, n_ranks):
    adata, backed = backed_screen(tmp_path)
    cells = np.arange(N_CELLS - 1)
    epochs = []
    for rank in range(n_ranks):
        torch.manual_seed(rank)  # processes do not draw alike
        loaders = [
            block_loader(manager_of(backed), cells, batch_size=8, rank=rank, n_ranks=n_ranks, epoch=lambda e=e: e)
            for e in range(2)
        ]
        epochs.append([names(loader, adata) for loader in loaders])
        loader = loaders[0]
        assert [len(batch) for batch in epochs[-1]] == [len(loader)] * 2
    for epoch in range(2):
        seen = [row for of_rank in epochs for batch in of_rank[epoch] for row in batch]
        assert set(seen) == set(cells)
        assert len(seen) - len(cells) < n_ranks
    assert epochs[0][0] != epochs[0][1]


def test_a_splitter_reads_cells_on_disk_in_blocks(tmp_path):
    _, backed = backed_screen(tmp_path)
    splitter = StoredSplitter(
        manager_of(backed),
        batch_size=20,
        external_indexing=[np.arange(60), np.arange(60, 90), np.array([], dtype=int)],
        reading={"chunk_size": 5, "n_chunks": 3},
    )
    splitter.setup()
    training, validation = splitter.train_dataloader(), splitter.val_dataloader()
    assert (training.shuffle, training.chunk_size, training.n_chunks, training.batch_size) == (True, 5, 3, 20)
    assert not validation.shuffle
    assert sum(len(batch["X"]) for batch in validation) == 30


@pytest.mark.parametrize("statistic", ["median", "mean"])
def test_statistics_of_cells_on_disk_are_those_in_memory_to_the_digit(tmp_path, monkeypatch, statistic):
    monkeypatch.setattr(statistics, "MAX_REFERENCE_CELLS", 4)  # so that samples are drawn
    monkeypatch.setattr(statistics, "MAX_LIBRARIES", 9)
    monkeypatch.setattr(statistics, "BLOCK_SIZE", 16)
    cells = np.random.default_rng(3).permutation(N_CELLS)[:71]
    found = []
    for adata in backed_screen(tmp_path):
        manager = manager_of(adata)
        table = read_label_table(manager.get_state_registry("perturbation"))
        found.append(
            training_statistics(
                manager,
                cells,
                members=table.padded_members(),
                n_treatments=len(table.treatments),
                statistic=statistic,
            )
        )
    memory, disk = found
    for field in fields(memory):
        ours, theirs = getattr(disk, field.name), getattr(memory, field.name)
        if field.name == "libraries":
            assert ours.keys() == theirs.keys()
            for key in ours:
                np.testing.assert_array_equal(ours[key], theirs[key])
        elif field.name == "pools":
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a.toarray(), b.toarray())
        elif sp.issparse(ours):
            np.testing.assert_array_equal(ours.toarray(), theirs.toarray())
        else:
            np.testing.assert_array_equal(ours, theirs)
    assert memory.n_failed_per_label.max() > 4
