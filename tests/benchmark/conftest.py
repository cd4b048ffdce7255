"""A small screen as a user's file: other names than the package's, and a layer that holds no counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scvi_cradle import datasets
from scvi_cradle.benchmark import BenchmarkSettings


@pytest.fixture(scope="session")
def screen_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    adata = datasets.simulate_perturbseq(n_cells=600, n_genes=60, n_perturbations=5, n_combinations=6, seed=0)
    adata.obs["gene"] = adata.obs["perturbation"].astype(str).replace("control", "NT").str.replace("+", "_")
    adata.obs["bad"] = adata.obs["true_artifact"].astype(int)
    adata.obs["part"] = adata.obs["split"].astype(str)
    adata.obs["lane"] = np.where(np.arange(adata.n_obs) % 2, "one", "two")
    del adata.obs["perturbation"], adata.obs["split"], adata.uns, adata.obsm, adata.layers["clean_counts"]
    adata.layers["log"] = np.log1p(adata.X)
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def settings(screen_file: Path) -> BenchmarkSettings:
    return BenchmarkSettings(
        data=screen_file, perturbation_key="gene", control=("NT",), sep="_", thresholds=(4.0, 5.0), max_steps=10
    )
