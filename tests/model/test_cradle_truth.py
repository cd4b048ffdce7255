"""What CradleVAE recovers where the truth is known, and on a real screen."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scvi

from scvi_cradle import CradleVAE, baselines, datasets, metrics, pp

pytestmark = pytest.mark.slow
CRITERIA = ("total_counts", "n_genes", "pct_mt", "pct_ribo", "pct_hb")


def fit(adata, steps, seed=0, setup=None, **kwargs):
    CradleVAE.setup_anndata(adata, perturbation_key="perturbation", artifact_key="artifact", **(setup or {}))
    before, scvi.settings.seed = scvi.settings.seed, seed
    model = CradleVAE(adata, **kwargs)
    model.train(max_steps=steps, split_key="split", enable_progress_bar=False)
    scvi.settings._seed = before
    return model


@pytest.fixture(scope="module")
def screen():
    adata = datasets.simulate_perturbseq(n_cells=2500, n_genes=300, artifact_fraction=0.3, seed=2)
    pp.qc_label(adata, n_mads=3, criteria=CRITERIA, reference=(adata.obs["split"] != "test").to_numpy())
    return adata


@pytest.fixture(scope="module")
def model(screen):
    return fit(screen.copy(), steps=900)  # warnings are errors: the diagnostics must be silent


def test_generated_cells_pass_quality_control_like_clean_cells(model, screen):
    clean = screen[~screen.obs["true_artifact"]].copy()
    known = metrics.qc_pass_rate(clean, clean, thresholds=screen.uns["qc_label"]).loc["all"]
    off = model.qc_pass_rate(n_samples=150, seed=0).loc["all"]
    on = model.qc_pass_rate(n_samples=150, seed=0, artifact=True).loc["all"]
    assert off["generated"] == pytest.approx(known["generated"], abs=0.04)
    for criterion in CRITERIA:
        assert off[f"generated_{criterion}"] == pytest.approx(known[f"generated_{criterion}"], abs=0.04), criterion
    assert on["generated"] < 0.4
    assert 0.7 < model.diagnostics_["variance_ratio"] < 1.4
    assert 0.7 < model.diagnostics_["state_variance_ratio"] < 1.4


def test_a_failed_cell_moves_towards_its_clean_twin(model, screen):
    cells = np.flatnonzero(screen.obs["artifact"] & screen.obs["true_artifact"] & (screen.obs["split"] == "train"))

    def profiles(x):
        return np.log2(1 + 1e4 * x / np.maximum(x.sum(1, keepdims=True), 1))

    twin = profiles(screen.layers["clean_counts"][cells].toarray())
    off, on = (
        profiles(model.get_counterfactual_expression(indices=cells, artifact=a, output="mean", seed=0).X)
        for a in (False, True)
    )
    nearer = ((off - twin) ** 2).mean(1) < ((on - twin) ** 2).mean(1)
    assert nearer.mean() > 0.75
    mt = screen.var_names.str.startswith("MT-")
    share = {
        k: x[:, mt].sum() / x.sum()
        for k, x in {"seen": screen.X[cells], "twin": screen.layers["clean_counts"][cells]}.items()
    }
    cleaned = model.get_counterfactual_expression(indices=cells, seed=0).X
    left = cleaned[:, mt].sum() / cleaned.sum() - share["twin"]
    assert abs(left) < 0.35 * (share["seen"] - share["twin"])


def test_effects_are_those_of_clean_cells(model, screen):
    truth = screen.uns["truth"]["population_effects"]
    held_out = [p for p in truth.index if (screen.obs.loc[screen.obs["perturbation"] == p, "split"] == "test").all()]
    seen = [p for p in truth.index if p not in held_out]
    effects = model.get_average_treatment_effects(list(truth.index), seed=0).to_df()
    mean = baselines.PerturbedMean()
    mean.fit(screen[screen.obs["split"] != "test"].copy(), "perturbation")
    trivial = mean.get_average_treatment_effects(list(truth.index)).to_df()
    for labels, least in ((seen, 0.9), (held_out, 0.8)):
        score, baseline = (
            np.corrcoef(truth.loc[labels].to_numpy().ravel(), e.loc[labels].to_numpy().ravel())[0, 1]
            for e in (effects, trivial)
        )
        assert score > least
        assert score > baseline + 0.2


def test_diagnostics_fire_on_the_published_scaling(screen):
    with pytest.warns(UserWarning, match="vary too little|basal state is unused"):
        model = fit(screen.copy(), steps=500, cf_weight=0.5, cf_reduction="sum", draws="cell")
    assert min(model.diagnostics_["kl_basal"], model.diagnostics_["state_variance_ratio"]) < 0.5


def test_effects_on_a_real_screen_are_clearly_better_than_the_mean_effect(papalexi_path):
    adata = ad.read_h5ad(papalexi_path)
    rng = np.random.default_rng(0)
    test = np.zeros(adata.n_obs, dtype=bool)
    for rows in adata.obs.groupby("perturbation", observed=True).indices.values():
        test[rng.choice(rows, round(0.2 * len(rows)), replace=False)] = True
    adata.obs["split"] = np.where(test, "test", "train")
    pp.qc_label(adata, n_mads=2, criteria=("total_counts", "n_genes", "pct_mt"), reference=~test)
    truth = metrics.average_treatment_effects(adata[test].copy(), "perturbation", control="NT")
    mean = baselines.PerturbedMean()
    mean.fit(adata[~test].copy(), "perturbation", control="NT")
    labels = list(truth.obs_names)
    trivial = metrics.ate_pearson(truth, mean.get_average_treatment_effects(labels))
    model = fit(adata, steps=None, setup={"control": "NT"})  # the default budget; its diagnostics are silent
    score = metrics.ate_pearson(truth, model.get_average_treatment_effects(labels, seed=0))
    assert trivial < 0.3
    assert score > 0.5
