from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_cradle import baselines
from scvi_cradle.baselines import (
    Additive,
    ControlMean,
    ElasticNet,
    MultivariateShrinkage,
    NearestNeighbors,
    PerturbedMean,
    ShrunkenEffects,
)
from scvi_cradle.baselines._shrinkage import shrink_effects
from scvi_cradle.metrics import average_treatment_effects, evaluate

ALL = [ControlMean, PerturbedMean, Additive, ShrunkenEffects, MultivariateShrinkage, NearestNeighbors, ElasticNet]


def make_cells(seed: int = 0, labels=("ctrl", "KLF1", "MAP2K6", "CEBPA", "CEBPA+KLF1"), n: int = 60) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    names = np.repeat(labels, n)
    rate = np.random.default_rng(1).gamma(1.0, 4.0, size=40) * rng.lognormal(0, 0.2, size=(len(names), 1))
    for i, t in enumerate(("KLF1", "MAP2K6", "CEBPA")):
        rate[np.ix_(np.array([t in name for name in names]), 10 * i + np.arange(10))] *= 2.0 ** (1.2, -1.5, 0.9)[i]
    obs = pd.DataFrame({"target": names}, index=[f"c{i}" for i in range(len(names))])
    var = pd.DataFrame(index=[f"g{i}" for i in range(40)])
    return ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs, var=var)


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    return make_cells()


@pytest.fixture(scope="module")
def raw(cells) -> ad.AnnData:
    return average_treatment_effects(cells, "target", control="ctrl")


def fitted(cls, cells):
    return cls().fit(cells, "target", control="ctrl")


def test_public_names() -> None:
    assert set(baselines.__all__) == {cls.__name__ for cls in ALL}


def test_control_mean_is_zero(cells) -> None:
    assert not fitted(ControlMean, cells).get_average_treatment_effects().X.any()


def test_perturbed_mean_is_the_mean_over_labels(cells, raw) -> None:
    effects = fitted(PerturbedMean, cells).get_average_treatment_effects(["KLF1", "KLF1+MAP2K6", "ctrl"])
    np.testing.assert_allclose(effects.X[:2], np.tile(raw.X.mean(axis=0), (2, 1)))
    np.testing.assert_array_equal(effects.X[2], 0.0)


def test_additive_is_raw_where_seen_and_a_sum_where_not(cells, raw) -> None:
    model = fitted(Additive, cells)
    np.testing.assert_allclose(model.get_average_treatment_effects().X, raw.X)
    pair = model.get_average_treatment_effects(["MAP2K6+KLF1"])
    np.testing.assert_allclose(pair.X, raw["KLF1"].X + raw["MAP2K6"].X)
    seen = model.get_average_treatment_effects("CEBPA+KLF1")
    np.testing.assert_allclose(seen.X, raw["CEBPA+KLF1"].X)


def test_shrunken_effects_by_hand(cells, raw) -> None:
    model = fitted(ShrunkenEffects, cells)
    r, v = raw["KLF1"].X[0], raw["KLF1"].layers["sem"][0] ** 2
    s = np.mean(r**2 - v)
    assert s > 0
    expected = r * s / (s + v)
    np.testing.assert_allclose(model.get_average_treatment_effects(["KLF1"]).X[0], expected)
    single = model.get_average_treatment_effects(["KLF1", "MAP2K6"]).X
    np.testing.assert_allclose(model.get_average_treatment_effects(["KLF1+MAP2K6"]).X[0], single.sum(axis=0))


def test_shrinkage_limits() -> None:
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(3, 200))
    np.testing.assert_array_equal(shrink_effects(raw, np.zeros_like(raw)), raw)
    np.testing.assert_allclose(shrink_effects(raw, np.full_like(raw, 1e-12)), raw, rtol=1e-10)
    np.testing.assert_array_equal(shrink_effects(raw, np.full_like(raw, 4.0)), 0.0)
    np.testing.assert_array_equal(shrink_effects(raw * 0, np.zeros_like(raw)), 0.0)
    np.testing.assert_array_equal(shrink_effects(raw, np.full_like(raw, np.inf)), 0.0)
    np.testing.assert_allclose(shrink_effects(np.array([[2.0, 2.0]]), np.array([[1.0, 3.0]])), [[2 * 2 / 3, 2 * 2 / 5]])


def test_shrinkage_is_closer_to_the_truth() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(scale=0.5, size=(20, 300))
    variance = rng.gamma(1.0, 0.5, size=truth.shape)
    raw = truth + rng.normal(size=truth.shape) * np.sqrt(variance)
    assert np.mean((shrink_effects(raw, variance) - truth) ** 2) < 0.6 * np.mean((raw - truth) ** 2)


@pytest.mark.parametrize("cls", ALL)
class TestContract:
    def test_fit_returns_self_and_leaves_the_data_alone(self, cls, cells) -> None:
        before = cells.copy()
        model = cls()
        assert model.fit(cells, "target", control="ctrl") is model
        pd.testing.assert_frame_equal(cells.obs, before.obs)
        assert (cells.X != before.X).nnz == 0
        assert not cells.uns

    def test_default_request(self, cls, cells) -> None:
        model = fitted(cls, cells)
        effects = model.get_average_treatment_effects()
        assert list(effects.obs_names) == ["CEBPA", "CEBPA+KLF1", "KLF1", "MAP2K6"]
        assert effects.uns["control"] == "ctrl"
        assert list(effects.obs["n_cells"]) == [60] * 4
        generated = model.get_generated_expression(n_samples=3, seed=0)
        assert list(generated.obs["perturbation"].unique()) == ["CEBPA", "CEBPA+KLF1", "KLF1", "MAP2K6", "ctrl"]

    def test_order_of_the_request_and_canonical_names(self, cls, cells) -> None:
        model = fitted(cls, cells)
        request = ["MAP2K6", " KLF1 + CEBPA", "ctrl", "MAP2K6+KLF1", "KLF1+ctrl"]
        names = ["MAP2K6", "CEBPA+KLF1", "ctrl", "KLF1+MAP2K6", "KLF1"]
        seen = ["seen", "seen", "seen", "unseen combination", "seen"]
        effects = model.get_average_treatment_effects(request)
        assert list(effects.obs_names) == names
        assert list(effects.obs["seen"]) == seen
        assert list(effects.obs["n_cells"]) == [60, 60, 60, 0, 60]
        assert list(effects.var_names) == list(cells.var_names)
        generated = model.get_generated_expression(request, n_samples=4, seed=0)
        assert list(generated.obs["perturbation"]) == list(np.repeat(names, 4))
        assert list(generated.obs["target"]) == list(np.repeat(names, 4))
        assert list(generated.obs["seen"]) == list(np.repeat(seen, 4))
        np.testing.assert_array_equal(effects.X[2], 0.0)

    def test_generated_counts(self, cls, cells) -> None:
        model = fitted(cls, cells)
        generated = model.get_generated_expression(n_samples=50, seed=1)
        assert sp.issparse(generated.X)
        assert generated.X.format == "csr"
        assert generated.X.dtype == np.float32
        assert (generated.X.data > 0).all()
        np.testing.assert_array_equal(generated.X.data, np.round(generated.X.data))
        assert not generated.obs["artifact"].any()
        assert generated.obs["artifact"].dtype == bool
        assert generated.obs_names.is_unique
        again = model.get_generated_expression(n_samples=50, seed=1)
        assert (generated.X != again.X).nnz == 0
        other = model.get_generated_expression(n_samples=50, seed=2)
        assert (generated.X != other.X).nnz > 0

    def test_generated_controls_are_training_controls(self, cls, cells) -> None:
        drawn = fitted(cls, cells).get_generated_expression(["ctrl"], n_samples=30, seed=0).X.toarray()
        training = {tuple(row) for row in cells[cells.obs["target"] == "ctrl"].X.toarray()}
        assert {tuple(row) for row in drawn} <= training

    def test_generated_cells_show_the_effects(self, cls, cells) -> None:
        model = fitted(cls, cells)
        expected = model.get_average_treatment_effects().X
        generated = model.get_generated_expression(n_samples=1500, seed=0)
        shown = average_treatment_effects(generated, "target", control="ctrl").X
        if cls is ControlMean:
            np.testing.assert_allclose(shown, 0.0, atol=1e-12)
        else:
            assert np.corrcoef(shown.ravel(), expected.ravel())[0, 1] > 0.97
            np.testing.assert_allclose((shown * expected).sum() / (expected**2).sum(), 1.0, atol=0.1)

    def test_survives_a_file(self, cls, cells, tmp_path) -> None:
        model = fitted(cls, cells)
        for i, table in enumerate((model.get_average_treatment_effects(), model.get_generated_expression(n_samples=2))):
            table.write_h5ad(tmp_path / f"{i}.h5ad")
            pd.testing.assert_index_equal(ad.read_h5ad(tmp_path / f"{i}.h5ad").obs_names, table.obs_names, exact=False)

    def test_can_be_evaluated(self, cls, cells) -> None:
        generated = fitted(cls, cells).get_generated_expression(n_samples=60, seed=0)
        table = evaluate(
            make_cells(seed=5), generated, perturbation_key="target", control="ctrl", train=cells, n_bootstrap=20
        )
        assert np.isfinite(table["value"]).all()
        if cls in (Additive, ShrunkenEffects, MultivariateShrinkage):
            assert table.loc["perturbation_discrimination", "value"] > 0.9
        if cls in (ControlMean,):
            assert table.loc["perturbation_discrimination", "value"] == 0.5

    def test_not_fitted(self, cls) -> None:
        for call in (cls().get_average_treatment_effects, cls().get_generated_expression):
            with pytest.raises(RuntimeError, match="must be fitted"):
                call()

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            pytest.param(
                lambda m: m.get_average_treatment_effects(["KLF2"]),
                r"'KLF2' is unknown \(did you mean 'KLF1'",
                id="unknown",
            ),
            pytest.param(
                lambda m: m.get_generated_expression(["KLF1+XYZ"]), "'XYZ' is unknown", id="unknown in a pair"
            ),
            pytest.param(
                lambda m: m.get_average_treatment_effects(["KLF1", "KLF1+ctrl"]), "more than once", id="twice"
            ),
            pytest.param(lambda m: m.get_average_treatment_effects([]), "received no label", id="nothing"),
            pytest.param(lambda m: m.get_average_treatment_effects(["KLF1+"]), "must have a name", id="empty part"),
            pytest.param(
                lambda m: m.get_generated_expression(n_samples=0),
                "`n_samples` must be a positive integer",
                id="no cells",
            ),
        ],
    )
    def test_bad_requests(self, cls, call, message, cells) -> None:
        with pytest.raises(ValueError, match=message):
            call(fitted(cls, cells))

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            pytest.param({"control": "NT"}, ValueError, "'ctrl' looks like one", id="control"),
            pytest.param({"control": "ctrl", "layer": "raw"}, KeyError, "`layer`", id="layer"),
        ],
    )
    def test_bad_fit(self, cls, kwargs, error, message, cells) -> None:
        with pytest.raises(error, match=message):
            cls().fit(cells, "target", **kwargs)
        assert not cells.uns


@pytest.mark.parametrize("cls", [Additive, ShrunkenEffects, MultivariateShrinkage])
def test_treatment_seen_in_combinations_only(cls) -> None:
    model = fitted(cls, make_cells(labels=("ctrl", "KLF1", "CEBPA+MAP2K6")))
    assert model.get_average_treatment_effects(["CEBPA+MAP2K6"]).n_obs == 1
    with pytest.raises(ValueError, match="'MAP2K6' is seen in combinations only"):
        model.get_average_treatment_effects(["KLF1+MAP2K6"])
    assert (
        fitted(PerturbedMean, make_cells(labels=("ctrl", "KLF1", "CEBPA+MAP2K6")))
        .get_average_treatment_effects(["KLF1+MAP2K6"])
        .X.any()
    )


def test_labels_are_not_split_without_a_separator() -> None:
    model = Additive().fit(make_cells(), "target", control="ctrl", sep=None)
    with pytest.raises(ValueError, match="is unknown"):
        model.get_average_treatment_effects(["KLF1+MAP2K6"])


def test_many_controls_are_thinned(monkeypatch) -> None:
    monkeypatch.setattr(baselines._base, "MAX_CONTROLS", 7)
    drawn = fitted(ControlMean, make_cells()).get_generated_expression(["ctrl"], n_samples=200, seed=0).X.toarray()
    assert len({tuple(row) for row in drawn}) == 7
