"""Effects of models averaged with multivariate shrinkage."""

from __future__ import annotations

import numpy as np
import pytest

from scvi_cradle import SAMSVAE
from scvi_cradle.baselines import MultivariateShrinkage
from scvi_cradle.model import _effects

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
ASK = {"n_particles": 10, "seed": 0}


def shrinkage_of(model) -> MultivariateShrinkage:
    cells = model.adata[model.train_indices_].copy()
    if model._artifact_key is not None:
        cells = cells[~cells.obs["artifact"].astype(bool)].copy()
    return MultivariateShrinkage().fit(cells, "perturbation")


@pytest.fixture(scope="module")
def sams(cases, shared_screen):
    return next(c for c in cases if c.model is SAMSVAE).fit(shared_screen.copy(), epochs=1)


def test_default_weights(trained, case):
    asked = ["G03", "G01+G03", "G01"] if case.combines else ["G03", "G01"]
    plain = trained.get_average_treatment_effects(asked, **ASK)
    stacked = trained.get_average_treatment_effects(asked, stack=True, **ASK)
    other = shrinkage_of(trained).get_average_treatment_effects(asked)
    weight = np.array([0.75, 0.5, 0.75] if case.combines else [0.75, 0.75])[:, None]
    np.testing.assert_allclose(stacked.X, weight * other.X + (1 - weight) * plain.X, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(stacked.obs["shrinkage_weight"], weight[:, 0])
    np.testing.assert_array_equal(stacked.layers["model"], plain.X)
    np.testing.assert_array_equal(stacked.layers["std"], plain.layers["std"])
    np.testing.assert_allclose(stacked.layers["shrinkage"], other.X)
    np.testing.assert_allclose(stacked.layers["shrinkage_std"], other.layers["std"])
    np.testing.assert_allclose(stacked.layers["lfsr"], other.layers["lfsr"])
    assert set(plain.layers) - {None} == {"std"}


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_given_weight(sams, weight):
    stacked = sams.get_average_treatment_effects(["G01", "G01+G03", "control"], stack=weight, **ASK)
    expected = weight * stacked.layers["shrinkage"] + (1 - weight) * stacked.layers["model"]
    np.testing.assert_allclose(stacked.X, expected, atol=1e-6)
    np.testing.assert_array_equal(stacked.X[2], 0.0)


@pytest.mark.parametrize("flag", [np.False_, np.True_])
def test_flags_of_numpy(sams, flag):
    result, expected = (sams.get_average_treatment_effects(["G01"], stack=x, **ASK) for x in (flag, bool(flag)))
    np.testing.assert_array_equal(result.X, expected.X)
    assert set(result.layers) == set(expected.layers)
    assert ("shrinkage_weight" in result.obs) == bool(flag)


def test_fitted_once_per_training(cases, shared_screen, monkeypatch):
    model = next(c for c in cases if c.model is SAMSVAE).fit(shared_screen.copy(), epochs=1)
    calls, original = [], _effects.fit_shrinkage
    monkeypatch.setattr(_effects, "fit_shrinkage", lambda m: calls.append(1) or original(m))
    for _ in range(2):
        model.get_average_treatment_effects(["G01"], stack=True, **ASK)
    assert len(calls) == 1
    model.train(max_epochs=1, split_key="split", enable_progress_bar=False)
    model.get_average_treatment_effects(["G01"], stack=0.5, **ASK)
    assert len(calls) == 2


def test_a_loaded_model_needs_its_data(sams, tmp_path, monkeypatch):
    sams.save(tmp_path / "model")
    without = SAMSVAE.load(tmp_path / "model", adata=False, accelerator="cpu")
    without.get_average_treatment_effects(["G01"], **ASK)
    with monkeypatch.context() as patch:
        patch.setattr(_effects, "draw_libraries", None)  # fails before anything is drawn
        with pytest.raises(
            ValueError, match="`stack` needs the training cells; received a SAMSVAE without its own data"
        ):
            without.get_average_treatment_effects(["G01"], stack=True, **ASK)
    again = SAMSVAE.load(tmp_path / "model", adata=sams.adata, accelerator="cpu")
    first, second = (m.get_average_treatment_effects(["G01"], stack=True, **ASK).X for m in (sams, again))
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"stack": 1.5}, "weight of the shrunken effects from 0 to 1; received 1.5", id="weight"),
        pytest.param({"stack": -0.5}, "`stack` must be a non-negative number", id="negative"),
        pytest.param({"stack": "shrinkage"}, "`stack` must be a non-negative number", id="text"),
        pytest.param({"stack": True, "method": "mean"}, "received method='mean'", id="method"),
        pytest.param({"stack": True, "library_size": 1e4}, "library_size=10000.0", id="library"),
    ],
)
def test_bad_arguments(sams, arguments, message):
    with pytest.raises(ValueError, match=message):
        sams.get_average_treatment_effects(["G01"], **(ASK | arguments))


@pytest.mark.filterwarnings("ignore:The registered data are raw counts:UserWarning")
def test_values_that_are_not_counts_have_no_shrinkage(shared_screen):
    adata = shared_screen.copy()
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", layer=None)
    model = SAMSVAE(adata, likelihood="gaussian", n_latent=5, n_hidden=16)
    model.train(max_epochs=1, split_key="split", enable_progress_bar=False)
    with pytest.raises(ValueError, match="`stack` needs effects on the scale"):
        model.get_average_treatment_effects(["G01"], stack=True, **ASK)


@pytest.mark.filterwarnings("ignore:QC failure goes with the perturbation:UserWarning")
def test_treatments_whose_cells_all_failed(cases, shared_screen):
    case = next(c for c in cases if c.artifact)
    adata = shared_screen.copy()
    adata.obs.loc[adata.obs["perturbation"].astype(str).str.contains("G04"), "artifact"] = True
    model = case.fit(adata, epochs=1)
    with pytest.raises(ValueError, match="`stack` needs training cells that passed QC.*received 'G04' without"):
        model.get_average_treatment_effects(["G01", "G04"], stack=True, **ASK)


def test_treatments_known_from_combinations_only(cases, shared_screen, monkeypatch):
    case = next(c for c in cases if c.model is SAMSVAE)
    model = case.fit(shared_screen[shared_screen.obs["perturbation"] != "G01"].copy(), epochs=1)
    seen = "G01+G02"
    assert model.get_average_treatment_effects([seen], stack=True, **ASK).obs["shrinkage_weight"].tolist() == [0.75]
    model.get_average_treatment_effects(["G01"], **ASK)
    monkeypatch.setattr(_effects, "draw_libraries", None)  # fails before anything is drawn
    message = r"each of its treatments alone; received 'G01', 'G01\+G04' without: ask for them with `stack=False`"
    with pytest.raises(ValueError, match=message):
        model.get_average_treatment_effects(["G01", seen, "G01+G04"], stack=True, **ASK)
