"""QuantileHurdleAE: set-up, loop, and what it answers, on a small screen with guide counts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch
from mudata import MuData
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from scvi_cradle import SAMSVAE, QuantileHurdleAE, datasets, pp, presets
from scvi_cradle._loop_settings import LOOP, QUANTILE_LEVELS, LoopSettings, loop_settings
from scvi_cradle.model._categories import Screen, gene_tests, sampling_weights

pytestmark = [pytest.mark.filterwarnings("ignore:.*categories have fewer than 10 cells:UserWarning")]
GUIDES = {"guide_counts_key": "guide_counts", "guide_targets": "guide_targets"}
KEYS = {"perturbation_key": "perturbation"} | GUIDES
TINY = {"n_latent": 8, "n_hidden": 32, "quantiles": np.linspace(0.05, 0.95, 10)}
QUICK = {"max_steps": 40, "progress": False, "classifier": {"max_steps": 300, "patience": 100, "lr": 1e-2}}


@pytest.fixture(scope="module")
def screen():
    """600 cells x 50 genes, three targets and the pair G01+G02, log-normalised."""
    adata = datasets.simulate_perturbseq(
        n_cells=600, n_genes=50, n_perturbations=3, n_combinations=1, artifact_fraction=0.0, efficiency=0.6, seed=2
    )
    adata.layers["counts"] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


def build(adata, **keys):
    QuantileHurdleAE.setup_anndata(adata, **(KEYS | keys))
    return QuantileHurdleAE(adata, **TINY)


@pytest.fixture(scope="module")
def fitted(screen):
    model = build(screen.copy())
    model.fit_perturbation_loop(**QUICK)
    return model


# ---- set-up -----------------------------------------------------------------------------------------------------------


def test_counts_and_negative_values_are_refused(screen):
    adata = screen.copy()
    QuantileHurdleAE.setup_anndata(adata, layer="counts", **KEYS)
    with pytest.raises(ValueError, match="raw counts: call"):
        QuantileHurdleAE(adata)
    adata.X = sp.csr_matrix(adata.X.toarray() - 1.0)
    with pytest.raises(ValueError, match="not negative; received -1"):
        QuantileHurdleAE.setup_anndata(adata, **KEYS)


@pytest.mark.parametrize(
    ("keys", "error", "text"),
    [
        ({"guide_counts_key": "guides"}, KeyError, "guide_counts_key"),
        ({"guide_targets": "nothing"}, KeyError, "guide_targets"),
        ({"guide_targets": None}, ValueError, "Guide counts need `guide_targets`"),
        ({"guide_counts_key": None}, ValueError, "without `guide_counts_key`"),
        ({"guide_targets": {"nothing": "G01"}}, ValueError, "Every guide must have a target"),
        ({"cell_type_key": "nothing"}, KeyError, "cell_type_key"),
        ({"batch_key": "batch"}, ValueError, "does not use `batch_key`"),
        ({"artifact_key": "true_artifact"}, ValueError, "does not use `artifact_key`"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(screen, keys, error, text):
    adata = screen.copy()
    columns = list(adata.obs)
    with pytest.raises(error, match=text):
        QuantileHurdleAE.setup_anndata(adata, **(KEYS | keys))
    assert list(adata.obs) == columns
    assert "_scvi_uuid" not in adata.uns


def test_a_treatment_without_guides_is_refused_and_a_target_without_cells_is_named(screen):
    adata = screen.copy()
    targets = adata.uns["guide_targets"].copy()
    targets["target"] = targets["target"].replace({"G03": "G3"})
    with pytest.raises(ValueError, match="received 'G03' without"):
        QuantileHurdleAE.setup_anndata(adata, **(KEYS | {"guide_targets": targets}))
    few = adata[~adata.obs["perturbation"].isin(["G03"])].copy()
    with pytest.warns(UserWarning, match="No cell is labelled with 'G03'"):
        QuantileHurdleAE.setup_anndata(few, **KEYS)


def test_guide_counts_are_read_from_a_frame_an_array_or_a_modality(screen):
    frame = screen.copy()
    array = screen.copy()
    array.uns["guide_counts_names"] = list(array.obsm["guide_counts"].columns)
    array.obsm["guide_counts"] = array.obsm["guide_counts"].to_numpy()
    mapping = dict(screen.uns["guide_targets"].to_numpy())
    models = [build(frame), build(array, guide_targets=mapping)]
    rna, counts = screen.copy(), screen.obsm["guide_counts"]
    guide = sc.AnnData(sp.csr_matrix(counts.to_numpy(dtype=float)), obs=rna.obs[[]].copy())
    guide.var_names = list(counts.columns)
    mdata = MuData({"rna": rna, "guide": guide[::-1].copy()})
    QuantileHurdleAE.setup_mudata(mdata, perturbation_key="perturbation", guide_targets=screen.uns["guide_targets"])
    models.append(QuantileHurdleAE(mdata, **TINY))
    priors = []
    for model in models:
        split = model._loop_split(None, 0)
        cells = model._make_screen(split)
        priors.append(pd.Series(cells.prior, index=pd.MultiIndex.from_arrays([cells.row, cells.category])))
    expected = pp.guide_prior(screen.obsm["guide_counts"], screen.obs["perturbation"], screen.uns["guide_targets"])
    first = models[0]._make_screen(models[0]._loop_split(None, 0))
    target = first.target[first.category]
    np.testing.assert_allclose(first.prior, [expected[t].iloc[r] for r, t in zip(first.row, target, strict=True)])
    for prior in priors[1:]:
        pd.testing.assert_series_equal(prior, priors[0])


# ---- pieces of a round ------------------------------------------------------------------------------------------------


def test_fusion_in_log_odds():
    assert expit(np.array(1 + 0.5 * -5.0)) == pytest.approx(0.1824255238, abs=1e-10)
    assert expit(np.array(0 + 0.5 * 1.1503493804)) == pytest.approx(0.6399563485, abs=1e-10)
    assert expit(np.array(-5.0)) == pytest.approx(0.0066928509, abs=1e-10)
    assert np.isfinite(expit(np.array([-1e4, 1e4]))).all()


def test_schedules_and_the_published_preset():
    recommended, published = LOOP["recommended"], LOOP["published"]
    assert [published.feature_weight(t) for t in range(5)] == [1e2, 1e3, 1e4, 1e4, 1e4]
    assert [published.guide_scale(t) for t in range(4)] == [1.0, 0.5, 0.0, 0.0]
    assert [recommended.guide_scale(t) for t in range(4)] == [1.0, 0.5, 0.5, 0.5]
    assert (recommended.scores, published.scores) == ("discriminant", "nnnu")
    assert (published.n_outer, published.control_weights, published.max_genes) == (6, "equal", 100)
    assert published.classifier == {"lr": 1e-4, "patience": None}
    assert (recommended.n_outer, recommended.control_weights) == (3, "score")
    architecture, training = presets.MODELS["QuantileHurdleAE"]["paper"]
    assert (len(architecture["quantiles"]), architecture["quantile_rank"]) == (44, 0)
    assert (training["max_steps"], training["batch_size"], training["lr"]) == (500, 256, 1e-3)
    np.testing.assert_allclose(QUANTILE_LEVELS, np.linspace(0.001, 0.999, 44))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"n_outer": 0}, "n_outer"),
        ({"feature_weights": (0.5, 10, 100)}, "three numbers from 1 on"),
        ({"guide_scales": ()}, "non-negative numbers"),
        ({"fdr_level": 1.0}, "fdr_level"),
        ({"folds": "donors"}, "folds"),
        ({"gamma": -1.0}, "gamma"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, text):
    with pytest.raises(ValueError, match=text):
        loop_settings("recommended", **given)


def small_screen():
    """Two categories of 15 cells with 30 shared controls; gene 0 differs in the first, gene 1 in the second, gene 2 in neither."""
    rng = np.random.default_rng(0)
    x = rng.normal(5.0, 1.0, (60, 3))
    x[:15, 0] += 4.0
    x[15:30, 1] += 4.0
    controls = np.arange(30, 60)
    cells = Screen(
        target=np.array(["A", "B"], dtype=object),
        cell_type=np.array(["all", "all"], dtype=object),
        row=np.arange(30),
        category=np.repeat([0, 1], 15),
        prior=np.zeros(30),
        guide=np.zeros(30, dtype=int),
        control_row=np.tile(controls, 2),
        control_category=np.repeat([0, 1], 30),
        is_train=np.ones(60, dtype=bool),
    )
    return sp.csr_matrix(x), cells


def test_selection_caps_and_oversampling():
    x, cells = small_screen()
    tests = gene_tests(x, cells, np.ones(30), None, LoopSettings())
    np.testing.assert_array_equal(tests["significant"], [[True, False, False], [False, True, False]])
    np.testing.assert_allclose(tests["padj"], np.minimum(tests["pvalue"] * 3, 1))
    one = gene_tests(x, cells, np.ones(30), None, LoopSettings(max_genes=1, fdr_level=0.999))
    assert (one["selected"].sum(1) <= 1).all()
    assert one["selected"][0, 0]
    weights = sampling_weights(cells, np.array([10, 9]), LoopSettings())
    np.testing.assert_array_equal(weights, np.repeat([10.0, 1.0], [15, 45]))


def test_cells_of_weight_zero_do_not_count_and_gamma_is_a_power():
    x, cells = small_screen()
    p = np.where(np.arange(30) % 15 < 7, 1.0, 1e-12)
    first = gene_tests(x, cells, p, None, LoopSettings())
    assert first["n_eff"][0] == pytest.approx(7.0)
    squared = gene_tests(x, cells, np.full(30, 0.5) ** p, None, LoopSettings(gamma=2.0))
    direct = gene_tests(x, cells, (np.full(30, 0.5) ** p) ** 2, None, LoopSettings())
    np.testing.assert_allclose(squared["pvalue"], direct["pvalue"])


def test_sparse_genes_without_variance_are_not_significant():
    rng = np.random.default_rng(0)
    x, cells = small_screen()
    sparse = (rng.random((60, 3)) < [0.0, 0.4, 0.0]) * 3.0
    sparse[:30, 1] = 0.0  # no labelled cell expresses gene 1, 12 of 30 controls do
    sparse[0, 0] = 3.0
    published = gene_tests(sp.csr_matrix(sparse), cells, np.ones(30), None, LoopSettings(variance_floor=False))
    bounded = gene_tests(sp.csr_matrix(sparse), cells, np.ones(30), None, LoopSettings())
    assert published["padj"][0, 1] < 0.01
    control = sparse[30:, 1]
    expected = (control.mean() / np.sqrt(control.var(ddof=1) * (1 / 15 + 1 / 30)),)
    np.testing.assert_allclose(-bounded["statistic"][:, 1], np.repeat(expected, 2))
    assert (bounded["pvalue"] >= published["pvalue"]).all()


# ---- the loop ---------------------------------------------------------------------------------------------------------


def test_probabilities_have_a_column_per_target_and_no_gaps(fitted, screen):
    p = fitted.get_perturbation_probability()
    assert list(p.columns) == ["G01", "G02", "G03"]
    assert p.index.equals(screen.obs_names)
    assert p.notna().all(axis=None)
    assert ((p >= 0) & (p <= 1)).all(axis=None)
    labels = screen.obs["perturbation"].astype(str)
    for target in p:
        carries = labels.str.split("+").map(lambda parts, t=target: t in parts)
        assert (p.loc[~carries, target] == 0).all()
        assert (p.loc[carries, target] > 0).all()


def test_evidence_is_fused_in_log_odds(fitted):
    loop, cells = fitted.loop_, fitted._screen()
    both = fitted.get_perturbation_probability(evidence="both", guide_scale=0.7)
    target = pd.Index(both.columns).get_indexer(cells.target)[cells.category]
    np.testing.assert_allclose(both.to_numpy()[cells.row, target], expit(loop["logit"] + 0.7 * cells.prior))
    guides = fitted.get_perturbation_probability(evidence="guides")
    np.testing.assert_allclose(guides.to_numpy()[cells.row, target], expit(cells.prior))


def test_it_finds_perturbed_cells_and_affected_genes(fitted, screen):
    labelled = (screen.obs["perturbation"] != "control").to_numpy()
    truth = screen.obs["true_perturbed"].to_numpy()[labelled]
    p = fitted.get_perturbation_probability(evidence="expression").max(axis=1).to_numpy()[labelled]
    assert roc_auc_score(truth, p) > 0.75
    genes = fitted.get_affected_genes()
    effects = screen.uns["truth"]["effects"]
    affected = [abs(effects.loc[t, g]) > 0.1 for t, g in zip(genes["target"], genes["gene"], strict=True)]
    assert len(genes) >= 3
    assert np.mean(affected) > 0.7


def test_tables_of_the_loop(fitted, screen):
    history, screening = fitted.loop_history_, fitted.screening_
    assert list(history.index) == [0, 1, 2]
    assert (history["n_genes"].diff().dropna() >= 0).all()  # a monotone union
    assert history["n_genes"].iloc[-1] == (fitted.get_gene_weights()["priority"] > 0).sum()
    assert list(history["feature_weight"]) == [1e2, 1e3, 1e4]
    assert list(screening.columns[:7]) == [
        "target", "cell_type", "prevalence", "calibrated", "control_score", "gap", "kept",
    ]  # fmt: skip
    assert screening["prevalence"].between(0.0, 1.0).all()
    weights = fitted.get_gene_weights()
    np.testing.assert_allclose(weights["weight"], 1 + 9_999 * weights["priority"])
    assert list(weights.index) == list(screen.var_names)
    everything = fitted.get_affected_genes(all_genes=True)
    assert len(everything) == 3 * screen.n_vars
    assert set(fitted.separation_["round"]) == {0, 1, 2}


def test_an_interrupted_loop_goes_on_to_the_same_results(fitted, screen, tmp_path):
    first = build(screen.copy())
    first.fit_perturbation_loop(**QUICK, n_outer=2, checkpoint_dir=tmp_path)
    again = build(screen.copy())
    again.fit_perturbation_loop(**QUICK, checkpoint_dir=tmp_path)
    pd.testing.assert_frame_equal(again.get_perturbation_probability(), fitted.get_perturbation_probability())
    for name, weight in fitted.module.state_dict().items():
        assert torch.equal(weight, again.module.state_dict()[name]), name
    np.testing.assert_array_equal(again.get_latent_representation(), fitted.get_latent_representation())
    with pytest.raises(ValueError, match="received other settings: name another folder"):
        again.fit_perturbation_loop(**QUICK, gamma=np.float64(2.0), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="`n_outer` must not be below"):
        again.fit_perturbation_loop(**QUICK, n_outer=2, checkpoint_dir=tmp_path)
    other = screen.copy()
    QuantileHurdleAE.setup_anndata(other, **KEYS)
    with pytest.raises(ValueError, match="received other architecture"):
        QuantileHurdleAE(other, **TINY, latent_l2=0.1).fit_perturbation_loop(**QUICK, checkpoint_dir=tmp_path)
    other = screen.copy()
    other.obs["perturbation"] = other.obs["perturbation"].astype(str).replace({"G03": "G02"})
    with (
        pytest.warns(UserWarning, match="No cell is labelled with 'G03'"),
        pytest.raises(ValueError, match="received other data"),
    ):
        build(other).fit_perturbation_loop(**QUICK, checkpoint_dir=tmp_path)


def test_the_loop_leaves_global_generators_alone(screen):
    model = build(screen.copy())
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    model.fit_perturbation_loop(**(QUICK | {"max_steps": 3}), n_outer=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before  # noqa: NPY002


def test_cell_types_have_categories_and_controls_of_their_own(screen):
    adata = screen.copy()
    adata.obs["type"] = np.where(np.arange(adata.n_obs) % 2, "b", "a")
    model = build(adata, cell_type_key="type")
    cells = model._make_screen(model._loop_split(None, 0))
    assert list(zip(cells.target, cells.cell_type, strict=True)) == [
        (t, c) for t in ("G01", "G02", "G03") for c in "ab"
    ]
    types = adata.obs["type"].to_numpy()
    assert (types[cells.row] == cells.cell_type[cells.category]).all()
    assert (types[cells.control_row] == cells.cell_type[cells.control_category]).all()
    assert set(adata.obs["perturbation"].iloc[cells.control_row]) == {"control"}
    model.fit_perturbation_loop(**(QUICK | {"max_steps": 5}), n_outer=2, folds="guides")
    generated = model.get_generated_expression("G01", n_samples=10, cell_type="b", seed=0)
    assert set(generated.obs["type"]) == {"b"}


def test_the_split_is_stratified(screen):
    model = build(screen.copy())
    train, val, rest = model._loop_split(None, 0)
    assert len(train) + len(val) == screen.n_obs
    assert not len(rest)
    share = screen.obs["perturbation"].iloc[val].value_counts() / screen.obs["perturbation"].value_counts()
    assert share.between(0.15, 0.2).all()


def test_splits_with_test_cells_and_without_validation_cells(screen):
    adata = screen.copy()
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 4 == 0, "test", "train")
    quick = QUICK | {"max_steps": 3, "n_outer": 2, "split_key": "split"}
    model = build(adata)
    model.fit_perturbation_loop(**quick)
    unused = (adata.obs["split"] == "test") & (adata.obs["perturbation"] == "G01")
    p = model.get_perturbation_probability()
    np.testing.assert_array_equal(p.loc[unused, "G01"], 0.5)  # not 0, which would make them controls
    cells = model._screen()
    assert not np.isin(cells.row, np.flatnonzero(adata.obs["split"] == "test")).any()
    for c in range(cells.n_categories):
        assert cells.prior[cells.category == c].mean() == pytest.approx(0, abs=1e-9)
    changed = adata.copy()
    counts = changed.obsm["guide_counts"]
    counts.loc[(changed.obs["split"] == "test").to_numpy()] = 1_000  # of no consequence
    other = build(changed)._make_screen([model.train_indices_, model.validation_indices_])
    np.testing.assert_array_equal(other.prior, cells.prior)
    assert (model.separation_.shape[0], model.loop_history_["mean_mmd"].sum()) == (0, 0)
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str)  # what happens to the data later
    adata.obs["split"] = "train"
    pd.testing.assert_frame_equal(model.get_perturbation_probability(), p)
    adata.obs["split"] = np.where(adata.obs["perturbation"] == "control", "train", "test")
    with pytest.raises(ValueError, match="received only controls"):
        build(adata).fit_perturbation_loop(**quick)


def test_types_without_controls_give_no_nan(screen):
    adata = screen.copy()
    is_control = (adata.obs["perturbation"] == "control").to_numpy()
    adata.obs["type"] = np.where((np.arange(adata.n_obs) % 3 == 0) & ~is_control, "b", "a")
    model = build(adata, cell_type_key="type")
    model.fit_perturbation_loop(**(QUICK | {"max_steps": 3}), n_outer=2)
    assert np.isfinite(model.get_perturbation_effects().X).all()
    assert np.isfinite(model.get_average_treatment_effects(n_particles=10).X).all()
    assert model.get_perturbation_probability().notna().all(axis=None)
    with pytest.raises(ValueError, match="`cell_type` must be one of 'a'"):
        model.get_generated_expression("G01", n_samples=3, cell_type="b")


def test_what_the_loop_sets_itself_is_refused(screen):
    model = build(screen.copy())
    with pytest.raises(TypeError, match="received 'n_fold'"):
        model.fit_perturbation_loop(classifier={"n_fold": 4})
    with pytest.raises(ValueError, match="seed"):
        model.fit_perturbation_loop(seed=-1)
    with pytest.raises(TypeError, match="received 'datasplitter_kwargs', 'max_epochs'"):
        model.fit_perturbation_loop(**QUICK, max_epochs=3, datasplitter_kwargs={"drop_last": True})
    plain = screen.copy()
    QuantileHurdleAE.setup_anndata(plain, perturbation_key="perturbation")
    with pytest.raises(ValueError, match="needs guide counts"):
        QuantileHurdleAE(plain, **TINY).fit_perturbation_loop(**QUICK, folds="guides")


def test_a_backed_file_trains(screen, tmp_path):
    dense = screen.copy()
    dense.X = dense.X.toarray()
    dense.write_h5ad(tmp_path / "screen.h5ad")
    adata = sc.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    QuantileHurdleAE.setup_anndata(adata, perturbation_key="perturbation")
    model = QuantileHurdleAE(adata, **TINY)
    model.fit_perturbation_loop(**(QUICK | {"max_steps": 3}), n_outer=2)
    assert model.get_perturbation_probability().shape == (600, 3)


def test_small_categories_keep_the_guide_prior(screen):
    adata = screen[np.r_[np.flatnonzero(screen.obs["perturbation"] == "G03")[:6],
                         np.flatnonzero(screen.obs["perturbation"] != "G03")]].copy()  # fmt: skip
    model = build(adata)
    with pytest.warns(UserWarning, match=r"fewer than 10 cells or controls for training \(G03 \(all\)\)"):
        model.fit_perturbation_loop(**(QUICK | {"max_steps": 3}), n_outer=2)
    p = model.get_perturbation_probability(evidence="expression")["G03"].to_numpy()[:6]
    np.testing.assert_allclose(p, 0.5)
    assert not model.screening_.set_index("target").loc["G03", "kept"]


def test_without_guide_counts_all_cells_start_alike(screen):
    adata = screen.copy()
    QuantileHurdleAE.setup_anndata(adata, perturbation_key="perturbation")
    model = QuantileHurdleAE(adata, **TINY)
    model.fit_perturbation_loop(**(QUICK | {"max_steps": 3}), n_outer=1)
    assert set(np.unique(model.get_perturbation_probability())) == {0.0, 0.5}


def test_methods_of_the_loop_ask_for_it_first(screen):
    model = build(screen.copy())
    assert model.screening_ is None
    for call in (model.get_perturbation_probability, model.get_gene_weights, model.get_affected_genes):
        with pytest.raises(RuntimeError, match="fit_perturbation_loop"):
            call()


# ---- decoding and moved cells -----------------------------------------------------------------------------------------


def test_reconstructions(fitted, screen):
    cells = [5, 1, 200]
    mean = fitted.get_reconstructed_expression(indices=cells, kind="mean")
    assert list(mean.obs_names) == list(screen.obs_names[cells])
    sample = fitted.get_reconstructed_expression(kind="sample", seed=0)
    again = fitted.get_reconstructed_expression(kind="sample", seed=0)
    np.testing.assert_array_equal(sample.X, again.X)
    zeros = (sample.X == 0).mean(0), (screen.X.toarray() == 0).mean(0)
    assert np.abs(zeros[0] - zeros[1]).mean() < 0.05
    assert np.isfinite(mean.X).all()
    with pytest.raises(ValueError, match="kind"):
        fitted.get_reconstructed_expression(kind="mode")


def test_moved_controls_come_to_the_perturbed_population(fitted, screen):
    effects = fitted.get_perturbation_effects()
    z, cells = fitted.get_latent_representation(), fitted._screen()
    alone = (screen.obs["perturbation"].to_numpy()[cells.row] == "G01") & (cells.category == 0)
    assert alone.sum() < (cells.category == 0).sum()  # cells with G01+G02 do not shift G01
    p = expit(fitted.loop_["logit"] + 0.5 * cells.prior)[alone]
    shift = np.average(z[cells.row[alone]], axis=0, weights=p) - z[fitted._controls()[0]].mean(0)
    np.testing.assert_allclose(effects["G01"].X[0], shift, atol=1e-5)
    draws, rng = np.linspace(0, 0.999, 40), np.random.default_rng(0)
    pair, _, start = fitted._moved("G01+G02", draws, "shift", None, rng)
    np.testing.assert_allclose(pair - start, np.tile(effects[["G01", "G02"]].X.sum(0), (40, 1)), atol=1e-5)
    moved, _, _ = fitted._moved("G01", draws, "transport", None, rng)
    of_target = z[cells.row[alone]]
    nearest = np.abs(moved[:, None] - of_target[None]).max(-1).min(1)
    assert nearest.max() < 1e-5
    same, _, start = fitted._moved("control", draws, "shift", None, rng)
    np.testing.assert_array_equal(same, start)


def test_generated_cells_and_effects(fitted, screen):
    cells = fitted.get_generated_expression(["G02", "control", "G01+G03"], n_samples=7, seed=1)
    assert list(cells.obs["perturbation"]) == ["G02"] * 7 + ["control"] * 7 + ["G01+G03"] * 7
    assert set(cells.obs["seen"][-7:]) == {"unseen combination"}
    assert (cells.X >= 0).all()
    assert fitted.get_generated_expression(["G02"], n_samples=5, method="transport", seed=1).shape == (5, screen.n_vars)
    effects = fitted.get_average_treatment_effects(["G01", "G02"], n_particles=100, seed=0)
    truth = screen.uns["truth"]["effects"].loc[["G01", "G02"]].to_numpy()
    assert np.corrcoef(effects.X.ravel(), truth.ravel())[0, 1] > 0.4
    with pytest.raises(NotImplementedError, match="combination"):
        fitted.get_generated_expression("G01+G02", method="transport")
    for arguments in ({"artifact": True}, {"library_size": 1e4}, {"batch": "1"}, {"output": "normalized"}):
        with pytest.raises(NotImplementedError):
            fitted.get_generated_expression("G01", **arguments)
    with pytest.raises(ValueError, match="did you mean"):
        fitted.get_generated_expression("G1")


def test_counterfactuals_of_controls(fitted, screen):
    controls = np.flatnonzero(screen.obs["perturbation"] == "control")[:9]
    moved = fitted.get_counterfactual_expression(indices=controls, perturbation="G02", output="mean")
    assert list(moved.obs_names) == list(screen.obs_names[controls])
    assert set(moved.obs["perturbation"]) == {"G02"}
    own = fitted.get_counterfactual_expression(indices=controls, output="mean")
    np.testing.assert_allclose(own.X, fitted.get_reconstructed_expression(indices=controls, kind="mean").X, rtol=1e-5)
    with pytest.raises(ValueError, match="Only control cells"):
        fitted.get_counterfactual_expression(indices=[int(np.flatnonzero(screen.obs["perturbation"] == "G01")[0])],
                                             perturbation="G02")  # fmt: skip


def test_probabilities_serve_as_doses_of_other_models(fitted, screen):
    adata = screen.copy()
    adata.X = adata.layers["counts"]
    adata.obsm["dose"] = fitted.get_perturbation_probability()
    SAMSVAE.setup_anndata(adata, perturbation_obsm_key="dose")
    model = SAMSVAE(adata, n_latent=5, n_hidden=16)
    model.train(max_epochs=1, enable_progress_bar=False)
    assert (
        sorted(model.label_counts_) == ["G01", "G01+G02", "G02", "G03", "control"] or "control" in model.label_counts_
    )


def test_saved_models_answer_alike(fitted, screen, tmp_path):
    fitted.save(str(tmp_path / "model"))
    loaded = QuantileHurdleAE.load(str(tmp_path / "model"), adata=screen.copy())
    pd.testing.assert_frame_equal(loaded.get_perturbation_probability(), fitted.get_perturbation_probability())
    pd.testing.assert_frame_equal(loaded.get_affected_genes(), fitted.get_affected_genes())
    np.testing.assert_array_equal(
        loaded.get_generated_expression("G01", n_samples=5, seed=0).X,
        fitted.get_generated_expression("G01", n_samples=5, seed=0).X,
    )
    alone = QuantileHurdleAE.load(str(tmp_path / "model"), adata=False)
    pd.testing.assert_frame_equal(alone.screening_, fitted.screening_)
    with pytest.raises(RuntimeError, match="load it with `adata`"):
        alone.get_perturbation_probability()
    np.testing.assert_array_equal(
        alone.get_generated_expression("G01+G03", n_samples=5, seed=0).X,
        fitted.get_generated_expression("G01+G03", n_samples=5, seed=0).X,
    )
    query = screen[:20].copy()
    del query.obsm["guide_counts"]
    assert alone.get_latent_representation(query).shape == (20, 8)


def test_what_the_model_cannot_answer_has_a_reason(fitted):
    for call in (fitted.get_elbo, fitted.get_iwelbo, fitted.get_diagnostics, fitted.evaluate):
        with pytest.raises(NotImplementedError, match=r"likelihood|posterior|counts"):
            call()


def test_plain_training_with_weights_and_the_comparison_model(screen):
    adata = screen.copy()
    QuantileHurdleAE.setup_anndata(adata, perturbation_key="perturbation")
    model = QuantileHurdleAE(adata, **TINY, reconstruction="mse")
    model.set_gene_weights(pd.Series(1.0, index=adata.var_names[::-1]), 10.0)
    model.train(max_steps=60, enable_progress_bar=False)
    before = model.get_reconstruction_error()["reconstruction_loss"]
    state = model.module.optimizer_state
    assert state["state"][0]["step"] == 60
    model.train(max_steps=60, enable_progress_bar=False)
    assert model.module.optimizer_state["state"][0]["step"] == 120  # the optimiser goes on
    weights = [w.detach().clone() for w in model.module.parameters()]
    model.train(max_steps=2, lr=1e-12, enable_progress_bar=False)  # at the rate of this training
    assert all(torch.allclose(w, v, atol=1e-6) for w, v in zip(weights, model.module.parameters(), strict=True))
    assert model.get_reconstruction_error()["reconstruction_loss"] < before
    with pytest.raises(ValueError, match="`kind` must be 'mean'"):
        model.get_reconstructed_expression(kind="sample")
    with pytest.raises(ValueError, match="every gene once"):
        model.set_gene_weights(pd.Series(0.0, index=[*adata.var_names[:-1], "other"]), 10.0)
    for bad in (np.full(50, 2.0), np.zeros(3)):
        with pytest.raises(ValueError, match="number from 0 to 1"):
            model.set_gene_weights(bad, 10.0)
    with pytest.raises(ValueError, match="1 or more"):
        model.set_gene_weights(np.zeros(50), 0.5)


# ---- null runs --------------------------------------------------------------------------------------------------------


def test_null_runs_call_controls_perturbed(fitted):
    table = fitted.get_null_calibration(4, n_cells=25, seed=0)
    assert len(table) == 4 * 3
    assert set(table["weights"]) == {"score", "equal", "unweighted"}
    assert table["share_below_005"].between(0, 1).all()
    whole = fitted.get_null_calibration(1, n_cells=20, n_targets=2, whole_loop=True, max_steps=3, n_outer=2)
    assert len(whole) == 2 * 3
    published = fitted.get_null_calibration(2, n_cells=25, scores="nnnu", variance_floor=False)
    assert published["prevalence"].between(0.05, 0.9).all()
    with pytest.raises(TypeError, match="received 'max_stepz'"):
        fitted.get_null_calibration(1, n_cells=25, max_stepz=3)
    with pytest.raises(ValueError, match="half of the controls"):
        fitted.get_null_calibration(1, n_cells=10_000)
