"""Dask arrays and lazily read files give what counts in memory give, from one graph and a few chunks at a time."""

from __future__ import annotations

import sys
import weakref

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi

from scvi_cradle import SAMSVAE, baselines, datasets, metrics, pp
from scvi_cradle._matrix import check_counts, iter_blocks, map_blocks, rows_of, sum_blocks, to_csr, weighted_sums
from scvi_cradle.pp._doublets import call_doublets

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
zarr = pytest.importorskip("zarr")
TWO_CRITERIA = ("total_counts", "pct_mt")

N_CELLS, N_GENES, ROWS = 260, 40, 37


@pytest.fixture(scope="module")
def counts() -> sp.csr_matrix:
    rng = np.random.default_rng(0)
    return sp.csr_matrix(rng.poisson(rng.gamma(1.0, 1.0, N_GENES), (N_CELLS, N_GENES)).astype(np.float32))


def screen(matrix) -> ad.AnnData:
    """The matrix with labels of four groups and two batches, with gene symbols."""
    labels = np.array(["control", "A", "B", "A+B"])[np.arange(N_CELLS) % 4]
    obs = pd.DataFrame({"perturbation": pd.Categorical(labels)}, index=[f"c{i}" for i in range(N_CELLS)])
    obs["batch"] = pd.Categorical(np.where(np.arange(N_CELLS) < 111, "first", "second"))
    names = [f"{'MT-' if i < 3 else 'RPS' if i < 6 else 'g'}{i}" for i in range(N_GENES)]
    return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=names))


class Chunks:
    """A dask array of CSR chunks that knows how often chunks were made and how many were alive at a time."""

    def __init__(self, counts: sp.csr_matrix) -> None:
        self.alive: set[int] = set()
        self.most, self.n_made, self.counts = 0, 0, counts
        starts = range(0, N_CELLS, ROWS)
        parts = [
            da.from_delayed(
                dask.delayed(self._make)(i), (min(ROWS, N_CELLS - i), N_GENES), meta=sp.csr_matrix((0, 0), dtype="f4")
            )
            for i in starts
        ]
        self.array, self.n_chunks = da.concatenate(parts), len(parts)

    def _make(self, start: int) -> sp.csr_matrix:
        chunk = self.counts[start : start + ROWS].copy()
        self.alive.add(id(chunk))
        weakref.finalize(chunk, self.alive.discard, id(chunk))
        self.n_made, self.most = self.n_made + 1, max(self.most, len(self.alive))
        return chunk


@pytest.mark.parametrize("chunks", [(N_CELLS, N_GENES), (ROWS, N_GENES), (ROWS, 7), ((0, 200, 0, 60), 40)])
@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csr_array, sp.csc_matrix])
def test_blocks_of_chunks(counts, chunks, kind):
    lazy = da.from_array(counts.toarray(), chunks=chunks)
    lazy = lazy if kind is np.asarray else lazy.map_blocks(kind, dtype=lazy.dtype)
    np.testing.assert_array_equal(to_csr(lazy).toarray(), counts.toarray())
    np.testing.assert_array_equal(rows_of(lazy, np.array([200, 3, 3, 77])).toarray(), counts[[200, 3, 3, 77]].toarray())
    starts, sizes = zip(*((start, block.shape[0]) for start, block in iter_blocks(lazy, 16)), strict=True)
    assert max(sizes) <= 16
    np.testing.assert_array_equal(starts, np.cumsum([0, *sizes[:-1]]))
    cells = np.arange(N_CELLS)
    pairs = list(map_blocks(lazy, lambda block, rows: (block.shape[0], rows), cells, block_size=16))
    assert tuple(size for size, _ in pairs) == sizes
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in pairs]), cells)

    def add(totals, block, rows):
        totals[0] += block.sum(axis=0).A1
        totals[1] += rows @ block.toarray()

    found = sum_blocks(lazy, add, [(N_GENES,), (N_GENES,)], cells, block_size=16)
    np.testing.assert_array_equal(found, [counts.sum(axis=0).A1, cells @ counts.toarray()])
    weights = sp.csr_matrix(np.eye(3)[cells % 3])
    np.testing.assert_allclose(weighted_sums(lazy, weights, np.log1p)[0], weights.T @ np.log1p(counts.toarray()))


def test_an_array_without_rows():
    lazy = da.zeros((0, 5), chunks=(3, 5))
    assert to_csr(lazy).shape == (0, 5)
    assert list(map_blocks(lazy, len)) == []
    np.testing.assert_array_equal(sum_blocks(lazy, lambda *args: None, [(2, 5)])[0], np.zeros((2, 5)))


@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan])
def test_values_that_are_no_counts_are_found_in_any_chunk(counts, value):
    wrong = counts.toarray()
    wrong[-1, -1] = value
    with pytest.raises(ValueError, match="raw counts"):
        check_counts(da.from_array(wrong, chunks=(ROWS, 9)), "`X`")


def test_a_pass_is_one_graph(counts):
    lazy, n_results = Chunks(counts), []
    adata = screen(lazy.array)

    def scheduler(graph, keys, **kwargs):
        n_results.append(len(keys))
        return dask.get(graph, keys, **kwargs)

    with dask.config.set(scheduler=scheduler):
        pp.qc_label(adata, n_mads=3, criteria=TWO_CRITERIA, doublets=None)
        metrics.average_treatment_effects(adata, "perturbation")
    n = lazy.n_chunks
    assert n_results == [n, n, n, 1]  # twice: are these counts; then values of cells, and sums over cells
    assert lazy.n_made == 4 * n


def test_a_chunk_leaves_memory_before_the_next_comes(counts):
    lazy = Chunks(counts)
    adata = screen(lazy.array)
    with dask.config.set(scheduler="synchronous"):
        pp.qc_label(adata, n_mads=3, criteria=TWO_CRITERIA, doublets=None)
        metrics.average_treatment_effects(adata, "perturbation")
    assert lazy.n_chunks == 8
    assert lazy.most <= 2


def stores(folder, counts):
    """Ways to hold counts outside memory, by name."""
    for name, matrix in {"csr": counts, "csc": counts.tocsc(), "dense": counts.toarray()}.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            ad.io.write_elem(file, "X", matrix)
        ad.io.write_elem(zarr.open_group(folder / f"{name}.zarr", mode="w"), "X", matrix)
        for kind, group in {
            "h5ad": h5py.File(folder / f"{name}.h5", "r"),
            "zarr": zarr.open_group(folder / f"{name}.zarr", mode="r"),
        }.items():
            yield f"lazy {name} {kind}", ad.experimental.read_elem_lazy(group["X"])
            yield f"on disk {name} {kind}", group["X"] if name == "dense" else ad.io.sparse_dataset(group["X"])
    dense = da.from_array(counts.toarray(), chunks=(ROWS, 11))
    yield "dask dense", dense
    yield "dask csr_array", dense.map_blocks(sp.csr_array, dtype=dense.dtype)
    yield "dask csr", Chunks(counts).array


@pytest.mark.filterwarnings("ignore:`(pct|total|n_genes):UserWarning")
@pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning")
def test_every_storage_gives_the_same(counts, tmp_path):
    predicted = baselines.Additive().fit(screen(counts), "perturbation").get_generated_expression(n_samples=30, seed=0)

    def results(matrix):
        adata = screen(matrix)
        pp.qc_label(adata, n_mads=2, criteria=TWO_CRITERIA, doublets=None)
        yield adata.obs, pp.qc_report(adata, "perturbation")
        effects = metrics.average_treatment_effects(adata, "perturbation")
        model = baselines.MultivariateShrinkage().fit(adata, "perturbation")
        yield effects.X, effects.layers["sem"], model.get_average_treatment_effects().X
        yield (model.get_generated_expression(n_samples=5, seed=0).X.toarray(),)
        tables = metrics.evaluate(adata, predicted, n_bootstrap=0), metrics.replicate_ceiling(adata, "perturbation")
        yield tuple(table.select_dtypes("number").to_numpy() for table in tables)

    expected = list(results(counts))
    for name, matrix in stores(tmp_path, counts):
        (labels, report), *arrays = results(matrix)
        pd.testing.assert_frame_equal(labels, expected[0][0], obj=name)
        pd.testing.assert_frame_equal(report, expected[0][1], obj=name)
        for found, wanted in zip(arrays, expected[1:], strict=True):
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12, err_msg=name)


def test_doublets_are_called_from_the_cells_of_a_batch():
    rng = np.random.default_rng(1)
    rates = rng.gamma(0.5, 2.0, (3, N_GENES))
    counts = sp.csr_matrix(rng.poisson(rates[rng.integers(3, size=N_CELLS)]).astype(np.float32))
    lazy = Chunks(counts)
    batches = np.where(np.arange(N_CELLS) < 3 * ROWS, "first", "second")
    with dask.config.set(scheduler="synchronous"):
        calls, notes = call_doublets(lazy.array, "scrublet", batches=batches, seed=0, max_cells=100)
    wanted, wanted_notes = call_doublets(counts, "scrublet", batches=batches, seed=0, max_cells=100)
    np.testing.assert_array_equal(calls, wanted)
    assert notes == wanted_notes
    assert [n for n in notes if "in 2 chunks" in n]
    # either batch is called in two random parts, each from the chunks of that batch; the last chunk has one cell
    assert lazy.n_made == 2 * (lazy.n_chunks - 1) + 1
    assert lazy.most <= 5


def test_filters_of_the_papers(counts):
    lazy, here = screen(Chunks(counts).array), screen(counts)
    for adata in (lazy, here):
        adata.uns["control"] = "control"
    options = {"min_de_genes": 1, "min_perturbations": 1, "min_cells": 5, "fdr_level": 0.9, "n_controls": 20}
    found, wanted = (datasets.prepare_replogle(adata, **options) for adata in (lazy, here))
    np.testing.assert_array_equal(found.X.toarray(), wanted.X.toarray())
    many = sp.csr_matrix(np.tile(counts.toarray(), (1, 8)))
    names = [f"g{i}" for i in range(many.shape[1])]
    prepared = []
    for x in (da.from_array(many.toarray(), chunks=(ROWS, 100)).map_blocks(sp.csr_matrix, dtype="f4"), many):
        adata = ad.AnnData(x, obs=here.obs, var=pd.DataFrame(index=names))
        prepared.append(datasets.prepare_norman(adata, paper="perturbedvae"))
    assert isinstance(prepared[0].X, da.Array)
    assert isinstance(prepared[0].layers["counts"], da.Array)
    assert prepared[0].n_obs > 10
    np.testing.assert_allclose(prepared[0].X.compute().toarray(), prepared[1].X.toarray(), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*(Xarray|xarray|lazy).*")
def test_tables_that_are_read_lazily(counts, tmp_path):
    pytest.importorskip("xarray")
    expected = screen(counts)
    expected.write_h5ad(tmp_path / "screen.h5ad")
    lazy = ad.experimental.read_lazy(tmp_path / "screen.h5ad")
    predicted = baselines.Additive().fit(expected, "perturbation").get_generated_expression(n_samples=5, seed=0)
    for function in (
        lambda: pp.qc_label(lazy, doublets=None),
        lambda: pp.qc_report(lazy, "perturbation"),
        lambda: pp.split_perturbations(lazy, "perturbation"),
        lambda: metrics.qc_pass_rate(lazy, predicted),
        lambda: SAMSVAE.setup_anndata(lazy, perturbation_key="perturbation"),
    ):
        with pytest.raises(TypeError, match=r"a table in memory; received Dataset2D.*to_memory\(\)"):
            function()
    lazy.obs, lazy.var = lazy.obs.to_memory(), lazy.var.to_memory()
    for adata in (lazy, expected):
        pp.qc_label(adata, n_mads=3, criteria=TWO_CRITERIA, doublets=None)
    pd.testing.assert_frame_equal(lazy.obs, expected.obs)
    assert isinstance(lazy.X, da.Array)


def test_models_read_dense_chunks_and_say_so_of_sparse_ones(counts):
    dense = da.from_array(counts.toarray(), chunks=(ROWS, 11))
    sparse = dense.map_blocks(sp.csr_matrix, dtype=dense.dtype)
    adata = screen(sparse)
    with pytest.raises(ValueError, match=r"received adata.X with sparse chunks.*`adata.X = adata.X.compute\(\)`"):
        SAMSVAE.setup_anndata(adata, perturbation_key="perturbation")
    assert list(adata.obs) == ["perturbation", "batch"]
    adata.layers["raw"] = sparse
    with pytest.raises(ValueError, match=r"adata.layers\['raw'\] = adata.layers\['raw'\].compute\(\)`"):
        SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", layer="raw")

    losses = {}
    for name, matrix in {"memory": counts.toarray(), "dask": dense}.items():
        cells = screen(matrix)
        SAMSVAE.setup_anndata(cells, perturbation_key="perturbation")
        scvi.settings.seed = 0
        model = SAMSVAE(cells, n_latent=4)
        model.train(max_epochs=2, enable_progress_bar=False)
        losses[name] = model.history["elbo_train"]
        with pytest.raises(ValueError, match="sparse chunks"):
            model.get_latent_representation(screen(sparse))
    pd.testing.assert_frame_equal(losses["dask"], losses["memory"])


@pytest.mark.filterwarnings("ignore")
def test_on_a_cluster(counts):
    distributed = pytest.importorskip("distributed")
    expected, lazy = screen(counts), screen(da.from_array(counts.toarray(), chunks=(ROWS, N_GENES)))
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster):
        pp.qc_label(lazy, n_mads=3, doublets=None)
        effects = metrics.average_treatment_effects(lazy, "perturbation")
    pp.qc_label(expected, n_mads=3, doublets=None)
    pd.testing.assert_frame_equal(lazy.obs, expected.obs)
    np.testing.assert_allclose(effects.X, metrics.average_treatment_effects(expected, "perturbation").X, atol=1e-12)


def test_dask_need_not_be_there(counts, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask", None)
    adata = screen(counts)
    pp.qc_label(adata, n_mads=3, criteria=TWO_CRITERIA, doublets=None)
    assert metrics.average_treatment_effects(adata, "perturbation").n_obs == 3
