"""What the models choose by themselves from the numbers of cells, genes and treatments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

from scvi_cradle import CPAVAE, SAMSVAE, ConditionalVAE, CradleVAE, SVAEPlus, presets
from scvi_cradle.model._run_arguments import resolve_epochs
from scvi_cradle.presets import latent_size


def screen(n_treatments, n_genes, seed=0):
    """Return three cells of every treatment and of the control."""
    labels = np.repeat(["control", *(f"T{i:03d}" for i in range(n_treatments))], 3)
    counts = np.random.default_rng(seed).poisson(1.0, (len(labels), n_genes)).astype(np.float32)
    adata = AnnData(sp.csr_matrix(counts))
    adata.obs_names = adata.obs_names.astype(str)
    adata.obs["perturbation"] = labels
    adata.obs["artifact"] = np.arange(len(labels)) % 2 == 0
    return adata


def registered(model, adata):
    model.setup_anndata(
        adata, perturbation_key="perturbation", **({"artifact_key": "artifact"} if model is CradleVAE else {})
    )
    return adata


@pytest.mark.parametrize(
    ("n_treatments", "n_genes", "size"),
    [
        (20, 500, 100),
        (60, 2_000, 346),
        (200, 500, 316),
        (20, 5_000, 316),
        (10, 250, 50),
        (5, 100, 50),
        (0, 5_000, 50),
        (1, 2_601, 51),
    ],
)
def test_latent_size_is_the_root_of_treatments_times_genes_and_at_least_50(n_treatments, n_genes, size):
    assert latent_size(n_treatments, n_genes) == size


def test_latent_size_is_capped():
    assert latent_size(200, 5_000) == latent_size(10_000, 30_000) == presets.MAX_LATENT
    sizes = [latent_size(t, 1_000) for t in range(2_000)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("model", [SAMSVAE, CPAVAE, CradleVAE])
def test_models_take_their_latent_size_from_the_data(model):
    adata = registered(model, screen(30, 120))
    chosen = model(adata)
    assert chosen.module.n_latent == chosen._architecture["n_latent"] == 60
    assert chosen.module.effects.embedding.loc.shape == (30, 60)
    assert "n_latent: 60" in chosen._model_summary_string
    assert model(adata, n_latent=7).module.n_latent == 7
    paper = presets.MODELS[model.__name__]["paper"][0]["n_latent"]
    assert model(adata, preset="paper").module.n_latent == paper
    assert presets.MODELS[model.__name__]["recommended"][0]["n_latent"] is None  # read-only, not changed by a model


@pytest.mark.parametrize("model", [ConditionalVAE, SVAEPlus])
def test_models_without_additive_effects_keep_50(model):
    assert model(registered(model, screen(30, 120))).module.n_latent == 50


@pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning")  # one step
@pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning")
def test_a_saved_model_keeps_its_size_when_the_rule_changes(tmp_path, monkeypatch):
    model = SAMSVAE(registered(SAMSVAE, screen(30, 120)), n_hidden=8)
    model.train(max_steps=1, enable_progress_bar=False)
    assert model.init_params_["non_kwargs"]["n_latent"] == 60
    model.save(tmp_path / "m")
    monkeypatch.setattr(presets, "latent_size", lambda *_: 11)
    again = SAMSVAE.load(tmp_path / "m", adata=False)
    assert again.module.n_latent == 60
    cells, same = (m.get_generated_expression(["T001"], n_samples=3, seed=0).X for m in (model, again))
    assert abs(cells - same).sum() == 0


def test_default_budget_grows_with_the_cells():
    assert resolve_epochs(None, None, math.ceil(3000 / 128), 3000) * math.ceil(3000 / 128) == pytest.approx(
        1200, rel=0.03
    )
    assert resolve_epochs(None, None, math.ceil(15000 / 128), 15000) * 118 == pytest.approx(2050, rel=0.05)
    assert resolve_epochs(None, None, 782, 100_000) == 5
    assert resolve_epochs(None, None, 1, 50) == 307
    assert resolve_epochs(None, None, 2, 200) == 244
    assert resolve_epochs(None, None, 2000, 4_000_000) == 2
    assert resolve_epochs(None, 7, 3, 300) == 3
    assert resolve_epochs(9, None, 3, 300) == 9
