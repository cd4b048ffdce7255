"""Nothing of size cells x genes becomes dense, and nothing of the user's is copied, on the way to training."""

from __future__ import annotations

import tracemalloc

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_cradle import CradleVAE, pp
from scvi_cradle._constants import KEYS
from scvi_cradle.data import label_table, training_statistics

N_CELLS, N_GENES, PER_CELL = 6_000, 5_000, 100


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_memory_stays_with_the_stored_counts(dtype):
    rng = np.random.default_rng(0)
    indices = (50 * np.arange(PER_CELL) + rng.integers(0, 50, (N_CELLS, PER_CELL))).ravel().astype(np.int32)
    data = rng.integers(1, 9, len(indices)).astype(dtype)
    counts = sp.csr_matrix((data, indices, PER_CELL * np.arange(N_CELLS + 1)), shape=(N_CELLS, N_GENES))
    obs = pd.DataFrame(
        {"perturbation": rng.choice(["control", "A", "B"], N_CELLS), "failed": rng.random(N_CELLS) < 0.9},
        index=[f"c{i}" for i in range(N_CELLS)],
    )
    adata = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]))
    stored, dense = 8 * len(indices), 4 * N_CELLS * N_GENES

    def peak(function, *args, **kwargs):
        tracemalloc.start()
        result = function(*args, **kwargs)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, result

    assert dense > 20 * stored
    of_labels, _ = peak(pp.qc_label, adata, n_mads=0.1, criteria=["total_counts"], doublets=None)
    of_setup, _ = peak(CradleVAE.setup_anndata, adata, perturbation_key="perturbation", artifact_key="failed")
    manager = CradleVAE._get_most_recent_anndata_manager(adata)
    members = label_table(manager.get_state_registry(KEYS.PERTURBATION)).padded_members()
    of_statistics, found = peak(
        training_statistics, manager, rng.permutation(N_CELLS), members=members, n_treatments=2, keep_pools=False
    )
    assert found.n_failed > 5_000  # many cells per profile
    assert max(of_labels, of_setup, of_statistics) < 1.3 * stored < dense / 15
    assert adata.X.dtype == dtype
