"""Knobs of SAMSVAE and of its relatives, their presets, the importance-weighted objective and unique combinations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scvi_cradle import CPAVAE, SAMSVAE, ConditionalVAE, CradleVAE, SVAEPlus, presets

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
SMALL = {"n_latent": 4, "n_hidden": 8, "embedding_n_hidden": 8, "embedding_n_layers": 2}
TINY = {"n_latent": 4, "n_hidden": 8}
KEYS = {"perturbation_key": "perturbation"}


def build(adata, model=SAMSVAE, **settings):
    model.setup_anndata(adata, **KEYS)
    return model(adata, **((SMALL if model is SAMSVAE else TINY) | settings))


def fit(adata, model=SAMSVAE, epochs=2, train=None, **settings):
    fitted = build(adata, model, **settings)
    fitted.train(max_epochs=epochs, split_key="split", enable_progress_bar=False, **(train or {}))
    return fitted


def works(model, tmp_path):
    """Assert that a model trained, answers, and is the same after loading."""
    assert np.isfinite(model.history["elbo_train"].to_numpy(dtype=float)).all()
    assert np.isfinite(model.history["elbo_validation"].to_numpy(dtype=float)).all()
    model.save(tmp_path / "m")
    again = type(model).load(tmp_path / "m", adata=False)
    cells, same = (m.get_generated_expression(["G01"], n_samples=3, seed=0).X for m in (model, again))
    assert abs(cells - same).sum() == 0
    assert np.isfinite(model.get_average_treatment_effects(["G01"], n_particles=5, seed=0).X).all()
    assert np.isfinite(model.get_iwelbo(n_particles=2, score_global=True)).all()
    assert np.isfinite(model.get_elbo())


@pytest.fixture(scope="module")
def logged(shared_screen):
    """Values that are not counts."""
    adata = shared_screen.copy()
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    return adata


# ---- every pair of choices ---------------------------------------------------------------------------------------------

FACTORS = ("posterior", "mask_prior", "likelihood", "effect_path", "draws", "kl", "combine", "n_particles")
TABLE = [
    row.split()
    for row in (
        "correlated           bernoulli gaussian linear  cell  analytic sum    2",
        "correlated           point     poisson  both    batch analytic concat 2",
        "correlated           beta      nb       decoder cell  sampled  sum    1",
        "correlated_basal     bernoulli poisson  decoder cell  analytic sum    1",
        "correlated_basal     point     nb       linear  batch sampled  concat 2",
        "correlated_basal     beta      gaussian both    batch sampled  concat 2",
        "correlated_embedding bernoulli nb       both    batch sampled  concat 1",
        "correlated_embedding point     gaussian decoder cell  analytic sum    2",
        "correlated_embedding beta      poisson  linear  batch sampled  sum    1",
        "mean_field           bernoulli gaussian linear  cell  sampled  concat 1",
        "mean_field           point     poisson  both    cell  analytic sum    1",
        "mean_field           beta      nb       decoder batch analytic concat 2",
    )
]


def test_the_table_holds_every_pair_of_choices():
    for i, j in itertools.combinations(range(len(FACTORS)), 2):
        pairs = {(row[i], row[j]) for row in TABLE}
        assert len(pairs) == len({row[i] for row in TABLE}) * len({row[j] for row in TABLE}), (FACTORS[i], FACTORS[j])


@pytest.mark.parametrize("row", TABLE, ids=" ".join)
def test_every_choice_trains_answers_and_survives_saving(shared_screen, logged, row, tmp_path):
    settings = dict(zip(FACTORS, row, strict=True)) | {"n_particles": int(row[-1])}
    if settings["mask_prior"] != "bernoulli":
        settings |= {"mask_prior": "beta_bernoulli", "mask_prob_posterior": settings["mask_prior"]}
    adata = logged if settings["likelihood"] == "gaussian" else shared_screen
    works(fit(adata.copy(), **settings), tmp_path)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (SAMSVAE, {"prior_weight_per_cell": 0.01, "mask_prior_logit": -1000.0}),
        (SAMSVAE, {"n_layers_encoder": 3, "n_layers_decoder": 2, "output_bias": "random", "mask_init_logits": 2.0}),
        (CPAVAE, {"likelihood": "poisson", "posterior": "mean_field", "combine": "sum", "effect_path": "both"}),
        (CPAVAE, {"draws": "batch", "kl": "sampled", "n_particles": 2, "effect_path": "decoder"}),
        (ConditionalVAE, {"likelihood": "poisson", "n_particles": 2, "kl": "sampled", "output_bias": "random"}),
        (SVAEPlus, {"likelihood": "poisson", "draws": "batch", "kl": "sampled", "n_particles": 2}),
        (SVAEPlus, {"variant": "lopez", "likelihood": "poisson", "mask_beta": (1.0, 50.0)}),
    ],
    ids=str,
)
def test_other_choices_train_answer_and_survive_saving(shared_screen, model, settings, tmp_path):
    works(fit(shared_screen.copy(), model, **settings), tmp_path)


# ---- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [SAMSVAE, CPAVAE, ConditionalVAE, SVAEPlus])
def test_the_papers_settings_train(shared_screen, model):
    fitted = build(shared_screen.copy(), model, preset="paper")
    assert fitted._training_settings["max_steps"] == 150_000
    assert fitted._training_settings["batch_size"] == 512
    assert fitted.module.n_particles == 5
    assert fitted.module.sampled_kl
    if model is SAMSVAE:
        assert fitted._architecture["mask_prior_prob"] == 0.001
        assert type(fitted.module.effects.embedding).__name__ == "AmortizedEmbedding"
    fitted.train(max_steps=3, split_key="split", enable_progress_bar=False)
    assert len(fitted.history["elbo_train"]) == 3  # one step an epoch
    assert np.isfinite(fitted.get_elbo())


@pytest.mark.parametrize("model", [SAMSVAE, CPAVAE, ConditionalVAE])
@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_a_preset_can_be_copied_and_changed(shared_screen, model, preset):
    settings, _ = presets.MODELS[model.__name__][preset]
    changed = build(shared_screen.copy(), model, **{**settings, "n_latent": 7})
    assert changed._architecture == {**settings, "n_latent": 7}


# ---- what the constructor refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (SAMSVAE, {"n_latent": 0}, ValueError, "`n_latent` must be a positive integer"),
        (SAMSVAE, {"mask_prior": "beta"}, ValueError, "`mask_prior` must be one of"),
        (SAMSVAE, {"mask_prior": "none"}, ValueError, "`mask_prior` must be one of"),
        (SAMSVAE, {"mask_prior_prob": 0.0}, ValueError, "strictly between 0 and 1"),
        (SAMSVAE, {"mask_prior_logit": float("nan")}, ValueError, "must be a finite number"),
        (SAMSVAE, {"mask_prior_logit": "x"}, ValueError, "must be a finite number"),
        (SAMSVAE, {"mask_init_logits": float("inf")}, ValueError, "`mask_init_logits` must be a finite number"),
        (SAMSVAE, {"mask_prior_prob": 0.1, "mask_prior_logit": -2.0}, ValueError, "given once"),
        (SAMSVAE, {"mask_prior": "beta_bernoulli", "mask_prior_prob": 0.2}, ValueError, "has no meaning"),
        (SAMSVAE, {"mask_beta": (1.0, 3.0)}, ValueError, "has no meaning"),
        (CradleVAE, {"mask_prior_prob": 0.1, "mask_prior_logit": -2.0}, ValueError, "given once"),
        (SAMSVAE, {"mask_beta": (1.0, 0.0)}, ValueError, "two positive numbers"),
        (SAMSVAE, {"mask_beta": 3.0}, ValueError, "two positive numbers"),
        (SAMSVAE, {"mask_prob_posterior": "gamma"}, ValueError, "`mask_prob_posterior` must be one of"),
        (SAMSVAE, {"mask_prior": "beta_bernoulli", "prior_weight_per_cell": 1.0}, ValueError, "leave it at 0"),
        (SAMSVAE, {"prior_weight_per_cell": -1.0}, ValueError, "`prior_weight_per_cell`"),
        (SAMSVAE, {"likelihood": "normal"}, ValueError, "`likelihood` must be one of"),
        (SAMSVAE, {"encode_combinations": "uniq"}, ValueError, "did you mean 'unique'"),
        (SAMSVAE, {"preset": "published"}, ValueError, "`preset` must be one of"),
        (SAMSVAE, {"cf_weight": 1.0}, TypeError, "cf_weight"),
        (CPAVAE, {"posterior": "correlated"}, ValueError, "`posterior` must be one of"),
        (CPAVAE, {"likelihood": "gaussian"}, ValueError, "`likelihood` must be one of"),
        (CPAVAE, {"mask_prior_prob": 0.1}, TypeError, "mask_prior_prob"),
        (ConditionalVAE, {"likelihood": "gaussian"}, ValueError, "`likelihood` must be one of"),
        (ConditionalVAE, {"n_particles": 0}, ValueError, "`n_particles`"),
        (SVAEPlus, {"variant": "lopes"}, ValueError, "did you mean 'lopez'"),
        (SVAEPlus, {"likelihood": "gaussian"}, ValueError, "`likelihood` must be one of"),
        (SVAEPlus, {"mask_beta": (1.0, -2.0)}, ValueError, "two positive numbers"),
        (SVAEPlus, {"encode_combinations": "addive"}, ValueError, "did you mean 'additive'"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else getattr(v, "__name__", ""),
)
def test_bad_architecture_is_refused(shared_screen, model, arguments, error, message):
    adata = shared_screen.copy()
    model.setup_anndata(adata, **KEYS, **({"artifact_key": "artifact"} if model is CradleVAE else {}))
    with pytest.raises(error, match=message):
        model(adata, **arguments)


# ---- objective --------------------------------------------------------------------------------------------------------


def test_the_importance_weighted_objective_is_refused_where_it_cannot_be(shared_screen):
    with pytest.raises(ValueError, match="several particles; received `n_particles=1`"):
        fit(shared_screen.copy(), train={"objective": "iwelbo"})
    with pytest.raises(ValueError, match="did you mean 'iwelbo'"):
        fit(shared_screen.copy(), train={"objective": "iwae"})
    adata = shared_screen.copy()
    CradleVAE.setup_anndata(adata, **KEYS, artifact_key="artifact")
    model = CradleVAE(adata, n_particles=3, **SMALL)
    with pytest.raises(ValueError, match="`objective` must be one of"):
        model.train(objective="iwelbo")


def test_the_importance_weighted_objective_raises_its_bound(shared_screen, with_seed, tmp_path):
    adata = shared_screen.copy()
    with with_seed(0):
        model = fit(adata, n_particles=3, train={"objective": "iwelbo"})
        before = model.get_iwelbo(n_particles=10, score_global=True).mean()
        model.train(max_epochs=12, split_key="split", objective="iwelbo", enable_progress_bar=False, batch_size=64)
        after = model.get_iwelbo(n_particles=10, score_global=True).mean()
    assert after > before + 1
    model.save(tmp_path / "m")
    loaded = SAMSVAE.load(tmp_path / "m", adata=adata.copy())
    bounds = []
    for each in (model, loaded):
        with with_seed(1):
            bounds.append(each.get_elbo(return_mean=False))
    np.testing.assert_array_equal(*bounds)


# ---- combinations as treatments of their own ----------------------------------------------------------------------------


def test_unique_combinations_are_treatments_of_their_own(shared_screen, with_seed):
    with with_seed(0):
        model = fit(shared_screen.copy(), encode_combinations="unique")
    labels = sorted(set(shared_screen.obs["perturbation"]) - {"control"})
    effects = model.get_perturbation_effects().to_df()
    assert list(effects.index) == labels
    assert not np.allclose(effects.loc["G01+G02"], effects.loc["G01"] + effects.loc["G02"])
    assert set(model.get_generated_expression(["G01+G02"], n_samples=2).obs["seen"]) == {"seen"}
    query = shared_screen[:30].copy()
    query.obs["perturbation"] = "G03+G01"
    for call in (
        lambda: model.get_latent_representation(query),
        lambda: model.get_generated_expression(["G01+G03"]),
        lambda: model.get_average_treatment_effects("G03+G01"),
    ):
        with pytest.raises(NotImplementedError, match="encode_combinations='additive'"):
            call()


@pytest.mark.parametrize("model", [SAMSVAE, CPAVAE, SVAEPlus])
def test_without_combinations_unique_is_additive(shared_screen, with_seed, model):
    single = shared_screen[~shared_screen.obs["perturbation"].astype(str).str.contains("+", regex=False)].copy()
    weights = []
    for encoding in ("additive", "unique"):
        with with_seed(0):
            fitted = fit(single.copy(), model, epochs=1, encode_combinations=encoding)
        weights.append(fitted.module.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


# ---- masks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prior",
    [
        {"mask_prior": "bernoulli"},
        {"mask_prior": "beta_bernoulli", "mask_beta": (1.5, 4.0)},
        {"mask_prior": "beta_bernoulli", "mask_beta": (1.5, 4.0), "mask_prob_posterior": "beta"},
    ],
    ids=["bernoulli", "point", "beta"],
)
def test_masks_can_be_put_back_to_their_start(shared_screen, prior):
    start = build(shared_screen.copy(), mask_init_logits=2.0, **prior).module.effects.mask.state_dict()
    model = fit(shared_screen.copy(), mask_init_logits=2.0, **prior)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    assert not np.allclose(model.get_perturbation_effects().layers["mask_prob"], 1 / (1 + np.exp(-2.0)))
    model.reset_masks()
    np.testing.assert_allclose(model.get_perturbation_effects().layers["mask_prob"], 1 / (1 + np.exp(-2.0)), rtol=1e-6)
    after = model.module.state_dict()
    assert all(torch.equal(after[f"effects.mask.{k}"], v) for k, v in start.items())
    assert {k for k in after if not torch.equal(after[k], before[k])} == {f"effects.mask.{k}" for k in start}
    model.train(max_epochs=1, split_key="split", enable_progress_bar=False)
    assert not np.allclose(model.get_perturbation_effects().layers["mask_prob"], 1 / (1 + np.exp(-2.0)))
