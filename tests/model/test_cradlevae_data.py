"""CradleVAE on splits, layers, batches, queries and loaded models that differ from the plain case."""

from __future__ import annotations

import mudata as md
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_cradle import CradleVAE, datasets, pp

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
SETUP = {"perturbation_key": "perturbation", "artifact_key": "artifact"}
CRITERIA = ("total_counts", "n_genes", "pct_mt", "pct_ribo", "pct_hb")


@pytest.fixture(scope="module")
def screen():
    adata = datasets.simulate_perturbseq(n_cells=400, n_genes=80, n_perturbations=6, n_combinations=6, seed=1)
    adata.obs["artifact"] = adata.obs["true_artifact"]
    return adata


def fit(adata, steps=3, split_key="split", **setup):
    CradleVAE.setup_anndata(adata, **(SETUP | setup))
    model = CradleVAE(adata, n_latent=5, n_hidden=16)
    model.train(max_steps=steps, split_key=split_key, enable_progress_bar=False)
    return model


@pytest.fixture(scope="module")
def model(screen):
    return fit(screen.copy())


def test_unused_cells_are_not_held_out(screen):
    adata = screen.copy()
    pp.split_perturbations(adata, "perturbation", exact_cells=True)
    model = fit(adata)
    np.testing.assert_array_equal(model.test_indices, np.flatnonzero(adata.obs["split"] == "test"))
    combinations = adata.obs.loc[adata.obs["split"] == "test", "perturbation"].unique()
    assert (model.evaluate(n_samples=20, n_bootstrap=0)["n_perturbations"] == len(combinations)).all()


def test_external_indexing_is_taken_as_it_is(screen):
    adata = screen.copy()
    CradleVAE.setup_anndata(adata, **SETUP)
    model = CradleVAE(adata, n_latent=5, n_hidden=16)
    parts = [np.arange(250), np.arange(250, 300), np.arange(300, 400)]
    model.train(max_steps=2, datasplitter_kwargs={"external_indexing": parts}, enable_progress_bar=False)
    for got, wanted in zip((model.train_indices, model.validation_indices, model.test_indices), parts, strict=True):
        np.testing.assert_array_equal(got, wanted)
    with pytest.raises(ValueError, match="received both"):
        model.train(split_key="split", datasplitter_kwargs={"external_indexing": parts})


def test_without_validation_cells_training_and_evaluation_ask_for_cells(screen):
    adata = screen.copy()
    CradleVAE.setup_anndata(adata, **SETUP)
    model = CradleVAE(adata, n_latent=5, n_hidden=16)
    model.train(max_epochs=1, train_size=1.0, enable_progress_bar=False)
    assert len(model.train_indices) == adata.n_obs
    with pytest.raises(ValueError, match="no held-out cells"):
        model.evaluate()


def test_evaluation_takes_controls_from_the_models_own_data(model, screen):
    combinations = screen[screen.obs["split"] == "test"].copy()
    table = model.evaluate(combinations, n_samples=20, n_bootstrap=0)
    assert np.isfinite(table["value"]).all()


def test_counts_in_a_layer_work_everywhere(screen):
    adata = screen.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    pp.qc_label(adata, layer="counts", n_mads=3, criteria=CRITERIA)
    model = fit(adata, layer="counts")
    table = model.qc_pass_rate(n_samples=5)
    assert table.loc["all", "real_passed"] == 1
    assert table.loc["all", "generated"] <= 1
    assert model.evaluate(n_samples=20, n_bootstrap=0).shape[0]
    assert model.get_counterfactual_expression(indices=[0, 1]).n_obs == 2


def test_thresholds_per_batch_are_applied_per_batch():
    adata = datasets.simulate_perturbseq(
        n_cells=400, n_genes=80, n_perturbations=4, n_combinations=2, n_batches=2, seed=3
    )
    shallow = (adata.obs["batch"] == adata.obs["batch"].iloc[0]).to_numpy()
    counts = adata.X.toarray()
    counts[shallow] = np.random.default_rng(0).binomial(counts[shallow].astype(int), 0.3)
    adata.X = sp.csr_matrix(counts.astype(np.float32))
    pp.qc_label(adata, n_mads=3, batch_key="batch", criteria=("total_counts", "n_genes", "pct_mt"))
    table = fit(adata, batch_key="batch").qc_pass_rate(n_samples=20)
    assert table.loc["all", "real_passed"] == 1
    assert table.loc["all", "real"] == pytest.approx(
        1 - adata.obs["artifact"][adata.obs["split"] == "train"].mean(), abs=0.02
    )


def test_labels_that_are_never_split_evaluate(screen):
    adata = screen.copy()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace({"G01": "CD4+"})
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 5 == 0, "test", "train")
    model = fit(adata, sep=None)
    assert "CD4+" in set(model.get_generated_expression(n_samples=1).obs["perturbation"])
    assert model.evaluate(n_samples=20, n_bootstrap=0).shape[0]


def dosages(adata):
    names = [f"G0{i}" for i in range(1, 7)]
    labels = adata.obs["perturbation"].astype(str)
    return pd.DataFrame({n: labels.str.contains(n).astype(float) * 0.5 for n in names}, index=adata.obs_names)


def test_dosages_do_not_need_a_separator_and_are_checked_in_queries(screen):
    adata = screen.copy()
    adata.obsm["dose"] = dosages(adata)
    model = fit(adata, perturbation_key=None, perturbation_obsm_key="dose", sep=None)
    assert any("+" in label for label in model._table.labels)
    for value in (np.nan, -1.0):
        query = screen[:20].copy()
        query.obsm["dose"] = dosages(query)
        query.obsm["dose"].iloc[0, 0] = value
        with pytest.raises(ValueError, match="finite non-negative"):
            model.get_latent_representation(query)


def test_counterfactuals_need_trained_treatments(screen):
    adata = screen.copy()
    has = adata.obs["perturbation"].astype(str).str.contains("G03")
    adata.obs["split"] = np.where(has, "test", "train")
    model = fit(adata)
    cells = np.flatnonzero(has)[:3]
    with pytest.raises(ValueError, match="'G03' has none in the training split"):
        model.get_counterfactual_expression(indices=cells)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("artifact", "x", "True/False or 0/1"),
        ("batch", "new", "categories seen in training"),
        ("perturbation", "G9", "unknown"),
    ],
)
def test_a_refused_query_is_left_as_it_was(column, value, message):
    adata = datasets.simulate_perturbseq(n_cells=200, n_genes=60, n_perturbations=3, n_combinations=1, n_batches=2)
    adata.obs["artifact"] = adata.obs["true_artifact"]
    model = fit(adata, batch_key="batch")
    query = datasets.simulate_perturbseq(n_cells=200, n_genes=60, n_perturbations=3, n_combinations=1, n_batches=2)
    query.obs["artifact"] = query.obs["true_artifact"]
    query.obs[column] = value
    columns, uns = list(query.obs), set(query.uns)
    with pytest.raises(ValueError, match=message):
        model.get_latent_representation(query)
    assert list(query.obs) == columns
    assert set(query.uns) == uns


def test_mudata_queries_are_checked(screen):
    def mudata(rna):
        data = md.MuData({"rna": rna})
        data.obs["split"] = rna.obs["split"].to_numpy()
        return data

    CradleVAE.setup_mudata(data := mudata(screen.copy()), **SETUP)
    model = CradleVAE(data, n_latent=5, n_hidden=16)
    model.train(max_steps=2, split_key="split", enable_progress_bar=False)
    assert model.get_latent_representation(mudata(screen[:20].copy())).shape == (20, 5)
    with pytest.raises(ValueError, match="another order"):
        model.get_latent_representation(mudata(screen[:20, ::-1].copy()))
    logged = screen[:20].copy()
    logged.X = sp.csr_matrix(np.log1p(logged.X.toarray()))
    with pytest.raises(ValueError, match="fractional"):
        model.get_latent_representation(mudata(logged))


def test_positions_of_training_mean_the_data_of_training_only(model, screen, tmp_path):
    adata = screen.copy()
    pp.qc_label(adata, n_mads=3, criteria=CRITERIA)
    fitted = fit(adata)
    fitted.save(tmp_path / "m")
    permuted = adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    for other in (permuted, adata[:200].copy()):
        loaded = CradleVAE.load(tmp_path / "m", adata=other)
        with pytest.raises(ValueError, match="no held-out cells"):
            loaded.evaluate()
        with pytest.raises(ValueError, match="data of training"):
            loaded.get_diagnostics()
        assert not any(str(c).startswith("real") for c in loaded.qc_pass_rate(n_samples=3))
        assert loaded.evaluate(other, n_samples=10, n_bootstrap=0).shape[0]
    without = CradleVAE.load(tmp_path / "m", adata=False)
    without.get_latent_representation(adata[:30].copy())
    assert not any(str(c).startswith("real") for c in without.qc_pass_rate(n_samples=3))
    again = CradleVAE.load(tmp_path / "m", adata=adata.copy())
    assert "real_passed" in again.qc_pass_rate(n_samples=3)
    with pytest.raises(ValueError, match="pass `adata`"):
        CradleVAE.load(tmp_path / "m", adata=False).train()


def test_a_given_size_needs_no_failed_cell_in_the_batch():
    adata = datasets.simulate_perturbseq(n_cells=200, n_genes=60, n_perturbations=3, n_combinations=1, n_batches=2)
    batches = sorted(adata.obs["batch"].unique())
    adata.obs["artifact"] = adata.obs["true_artifact"] & (adata.obs["batch"] == batches[1])
    model = fit(adata, batch_key="batch")
    asked = {"artifact": True, "batch": batches[0], "n_samples": 4}
    single = sorted(set(adata.obs["perturbation"]) - {"control"})[0]
    assert model.get_generated_expression([single], library_size=1e3, **asked).n_obs == 4
    with pytest.raises(ValueError, match="none in this batch"):
        model.get_generated_expression(**asked)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"categorical_covariate_keys": "split"}, TypeError, "must be a list of columns"),
        ({"control": 0}, ValueError, "At least one cell must be a control"),
    ],
)
def test_slips_are_named(screen, keys, error, message):
    with pytest.raises(error, match=message):
        CradleVAE.setup_anndata(screen.copy(), **(SETUP | keys))


def test_no_cells_is_an_error(model):
    for call in (
        model.get_latent_representation,
        model.get_counterfactual_expression,
        model.get_elbo,
        model.get_iwelbo,
    ):
        with pytest.raises(ValueError, match="at least one cell"):
            call(indices=[])


def test_bounds_per_cell(model, screen):
    values = model.get_elbo(indices=np.arange(30), return_mean=False)
    assert values.shape == (30,)
    loader = model._make_data_loader(model.adata, indices=np.arange(30), batch_size=10)
    assert model.get_elbo(dataloader=loader, return_mean=False).shape == (30,)
    errors = model.get_reconstruction_error(indices=np.arange(30), return_mean=False)["reconstruction_loss"]
    assert errors.shape == (30,)
    assert model.get_elbo(indices=np.arange(30), n_particles=200) == pytest.approx(values.mean(), rel=0.05)
