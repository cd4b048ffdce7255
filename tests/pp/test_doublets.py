import importlib.util
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from scvi_cradle import pp
from scvi_cradle.pp._doublets import call_doublets


def mixture(n_cells=400, n_genes=300, n_doublets=40, seed=0) -> sp.csr_matrix:
    """Four well separated cell types; the first ``n_doublets`` cells are sums of two types."""
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.5, 2.0, (4, n_genes))
    kinds = rng.integers(4, size=n_cells)
    counts = rng.poisson(rates[kinds])
    counts[:n_doublets] += rng.poisson(rates[(kinds[:n_doublets] + 2) % 4])
    return sp.csr_matrix(counts.astype(np.float32))


def global_state() -> np.ndarray:
    return np.random.get_state()[1].copy()  # noqa: NPY002 - nobody else's generator may be moved


def test_scrublet_finds_doublets_and_repeats_itself():
    counts = mixture()
    state = global_state()
    calls, notes = call_doublets(counts, "scrublet", batches=None, seed=0)
    assert calls[:40].mean() > 0.7
    assert calls[40:].mean() < 0.1
    assert notes == []
    np.testing.assert_array_equal(calls, call_doublets(counts, "scrublet", batches=None, seed=0)[0])
    np.testing.assert_array_equal(global_state(), state)


def test_more_cells_than_scanpys_approximate_neighbours_can_take():
    adata = AnnData(mixture(n_cells=3000, n_genes=60, n_doublets=150))
    adata.obs_names = [f"c{i}" for i in range(3000)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pp.qc_label(adata, criteria=("doublet",))
    assert adata.obs["qc_doublet"].dtype == bool
    assert adata.obs["qc_doublet"].equals(adata.obs["artifact"].rename("qc_doublet"))
    assert set(adata.obs.columns) >= {"qc_doublet", "artifact"}
    assert adata.uns["qc_label"]["doublets"] == "scrublet"


def test_batches_are_called_apart():
    counts = sp.vstack([mixture(seed=1), mixture(seed=2)], format="csr")
    batches = np.array(["b"] * 400 + ["a"] * 400)
    calls, _ = call_doublets(counts, "scrublet", batches=batches, seed=0)
    np.testing.assert_array_equal(calls[:400], call_doublets(counts[:400], "scrublet", batches=None, seed=0)[0])
    np.testing.assert_array_equal(calls[400:], call_doublets(counts[400:], "scrublet", batches=None, seed=0)[0])
    assert calls.any()


def test_large_batches_are_called_in_chunks():
    calls, notes = call_doublets(mixture(), "scrublet", batches=None, seed=0, max_cells=250)
    assert notes[0] == "`doublet`, batch 'all': above 250 cells, called in 2 chunks."
    assert calls[:40].mean() > calls[40:].mean()


@pytest.mark.parametrize("shape", [(29, 100), (100, 29)])
def test_too_few_cells_or_genes_are_not_called(shape):
    counts = mixture(*shape, n_doublets=5)
    adata = AnnData(counts)
    adata.obs_names = [f"c{i}" for i in range(shape[0])]
    with pytest.warns(UserWarning, match=r"`doublet`, batch 'all': .* fewer than 30 of one; none of these"):
        pp.qc_label(adata, criteria=("doublet",))
    assert not adata.obs["artifact"].any()


def test_cells_without_counts_do_not_make_a_batch_large_enough():
    counts = sp.vstack([mixture(25, n_doublets=5), sp.csr_matrix((20, 300), dtype=np.float32)], format="csr")
    calls, notes = call_doublets(counts, "scrublet", batches=None, seed=0)
    assert notes[0].startswith("`doublet`, batch 'all': 25 cells and ")
    assert not calls.any()


def test_few_variable_genes_do_not_stop_the_call():
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(np.repeat([2.0, 30.0], 20), size=(60, 40)).astype(np.float32))
    calls, _ = call_doublets(counts, "scrublet", batches=None, seed=0)
    assert calls.shape == (60,)
    assert calls.mean() < 0.5


def test_cells_without_enough_genes_are_no_doublets():
    counts, poor = mixture(), np.zeros((20, 300), dtype=np.float32)
    poor[:10, 0] = 4
    calls, _ = call_doublets(sp.vstack([counts, sp.csr_matrix(poor)], format="csr"), "scrublet", batches=None, seed=0)
    alone, _ = call_doublets(counts, "scrublet", batches=None, seed=0)
    assert alone.any()
    np.testing.assert_array_equal(calls, np.concatenate([alone, np.zeros(20, dtype=bool)]))


def test_the_package_finds_doublets():
    pytest.importorskip("scrublet")
    counts = mixture(n_cells=1500, n_doublets=150)
    state = global_state()
    calls, notes = call_doublets(counts, "scrublet-package", batches=None, seed=0)
    assert calls[:150].mean() > 0.7
    assert calls[150:].mean() < 0.1
    assert notes == []
    np.testing.assert_array_equal(global_state(), state)


@pytest.mark.skipif(importlib.util.find_spec("scrublet") is not None, reason="scrublet is installed")
def test_without_the_package_the_message_names_the_extra():
    adata = AnnData(mixture())
    adata.obs_names = [f"c{i}" for i in range(400)]
    before = adata.obs.copy()
    with pytest.raises(ImportError, match=r"pip install 'scvi-cradle\[scrublet\]'"):
        pp.qc_label(adata, criteria=("doublet",), doublets="scrublet-package")
    pd.testing.assert_frame_equal(adata.obs, before)


def test_the_thread_count_of_torch_is_left_as_it_was():
    import torch

    rng = np.random.default_rng(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call_doublets(sp.csr_matrix(rng.poisson(1.0, (200, 120))), "scrublet", batches=None, seed=0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
