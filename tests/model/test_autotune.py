"""scvi-tools' search over hyper-parameters trains these models as `train` does."""

from __future__ import annotations

import numpy as np
import pytest
import scvi

from scvi_cradle import CradleVAE, datasets, pp

tune = pytest.importorskip("ray.tune", exc_type=ImportError)
autotune = pytest.importorskip("scvi.autotune")
for package in ("hyperopt", "scib_metrics", "muon"):
    pytest.importorskip(package, exc_type=ImportError)

EPOCHS = 4


@pytest.fixture
def ray(monkeypatch):
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    yield ray
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")
def test_the_best_of_a_search_is_what_training_gives(ray, tmp_path):
    adata = datasets.simulate_perturbseq(n_cells=600, n_genes=50, n_perturbations=4, n_combinations=2, seed=0)
    pp.qc_label(adata, doublets=None)
    pp.split_perturbations(adata, "perturbation", scheme="cells")
    CradleVAE.setup_anndata(adata, perturbation_key="perturbation", artifact_key="artifact")
    experiment = autotune.run_autotune(
        CradleVAE,
        adata,
        metrics="elbo_validation",
        mode="min",
        search_space={
            "model_params": {"n_latent": 8},
            "train_params": {
                "lr": tune.grid_search([1e-8, 5e-3]),
                "max_epochs": EPOCHS,
                "split_key": "split",
                "early_stopping": True,
            },
        },
        num_samples=1,
        searcher="random",
        scheduler="fifo",
        seed=1,  # 0 would be taken for no seed
        resources={"cpu": 1},
        logging_dir=str(tmp_path),
        ignore_reinit_error=True,
    )
    assert not experiment.result_grid.errors
    table = experiment.result_grid.get_dataframe().set_index("config/train_params/lr")
    assert table["training_iteration"].tolist() == [EPOCHS, EPOCHS]  # one report an epoch
    best = experiment.result_grid.get_best_result("elbo_validation", "min")
    assert best.config["train_params"]["lr"] == 5e-3
    assert best.metrics["elbo_validation"] < table.loc[1e-8, "elbo_validation"]

    scvi.settings.seed = 1
    model = CradleVAE(adata, **best.config["model_params"])
    model.train(**best.config["train_params"], enable_progress_bar=False)
    np.testing.assert_allclose(best.metrics["elbo_validation"], model.history["elbo_validation"].iloc[-1, 0], rtol=1e-5)
