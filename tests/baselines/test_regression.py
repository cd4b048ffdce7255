"""Nearest neighbours and elastic net: closed forms, and what scikit-learn says."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import ElasticNet as LinearRegressor
from sklearn.neighbors import KNeighborsRegressor

from scvi_cradle.baselines import Additive, ElasticNet, NearestNeighbors, PerturbedMean

LABELS = ("A", "B", "C", "A+B", "A+C+D", "ctrl")


def make_cells(labels=LABELS, n: int = 20, seed: int = 0) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    names = np.repeat(labels, n)
    rate = rng.gamma(1.0, 6.0, size=30) * np.ones((len(names), 1))
    for i, t in enumerate("ABCD"):
        rate[np.ix_([t in name for name in names], 7 * i + np.arange(7))] *= 2.0 ** (1.5, -1.5, 1.0, 0.8)[i]
    obs = pd.DataFrame({"perturbation": names}, index=[f"c{i}" for i in range(len(names))])
    return ad.AnnData(rng.poisson(rate).astype(np.float32), obs=obs)


def effects(model, asked, labels=LABELS) -> np.ndarray:
    return model.fit(make_cells(labels), "perturbation", control="ctrl").get_average_treatment_effects(asked).X


def raw(labels=LABELS) -> dict[str, np.ndarray]:
    table = Additive().fit(make_cells(labels), "perturbation", control="ctrl").get_average_treatment_effects()
    return dict(zip(table.obs_names, table.X, strict=True)) | {"ctrl": np.zeros(table.n_vars)}


def test_one_neighbour_of_a_seen_label_is_itself() -> None:
    np.testing.assert_allclose(effects(NearestNeighbors(1), ["A", "A+B"]), np.stack([raw()["A"], raw()["A+B"]]))


def test_neighbours_by_hand() -> None:
    r = raw()
    # of A: itself, then control and A+B (one treatment apart)
    np.testing.assert_allclose(effects(NearestNeighbors(3), ["A"])[0], (r["A"] + r["A+B"]) / 3)
    # of A+C: A, C and A+C+D are one treatment apart; the control and A+B, two apart, share the fourth place
    pair = (r["A"] + r["C"] + r["A+C+D"] + 0.5 * r["A+B"]) / 4
    np.testing.assert_allclose(effects(NearestNeighbors(4), ["A+C"])[0], pair)
    everything = sum(r.values()) / 6
    np.testing.assert_allclose(effects(NearestNeighbors(50), ["B", "C+D"]), np.stack([everything] * 2))


def test_neighbours_equal_scikit_learn_over_all_orders() -> None:
    rng = np.random.default_rng(1)
    x = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [1, 0, 1, 1]], dtype=float)
    y, asked = rng.normal(size=(6, 3)), np.array([[1.0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]])
    total = np.zeros((3, 3))
    for _ in range(600):
        order = rng.permutation(6)
        total += KNeighborsRegressor(3).fit(x[order], y[order]).predict(asked)
    model = NearestNeighbors(3)
    model._regress(x, y)
    np.testing.assert_allclose(model._predict(asked), total / 600, atol=0.05)


def test_order_and_names_of_labels_do_not_matter() -> None:
    cells = make_cells(("A", "B", "C", "D", "ctrl"))
    other = cells.copy()
    other.obs["perturbation"] = other.obs["perturbation"].replace({"B": "Z"})
    first, second = (NearestNeighbors(3).fit(x, "perturbation", control="ctrl") for x in (cells, other))
    np.testing.assert_allclose(
        first.get_average_treatment_effects(["A"]).X, second.get_average_treatment_effects(["A"]).X
    )


@pytest.mark.parametrize("model", [NearestNeighbors(), ElasticNet()])
def test_one_perturbation(model) -> None:
    predicted = effects(model, ["A", "ctrl"], ("A", "ctrl"))
    assert np.isfinite(predicted).all()
    np.testing.assert_array_equal(predicted[1], 0.0)
    if isinstance(model, NearestNeighbors):
        np.testing.assert_allclose(predicted[0], raw(("A", "ctrl"))["A"] / 2)  # two labels, both are neighbours


def test_large_penalty_predicts_the_mean() -> None:
    labels = ("A", "B", "C", "ctrl")
    mean = PerturbedMean().fit(make_cells(labels), "perturbation", control="ctrl").get_average_treatment_effects(["A"])
    for asked in ("A", "B+C"):
        np.testing.assert_allclose(effects(ElasticNet(10.0), [asked], labels)[0], mean.X[0] * 3 / 4, atol=1e-6)


def test_no_penalty_gives_least_squares() -> None:
    labels = ("A", "B", "C", "ctrl")
    r = raw(labels)
    predicted = effects(ElasticNet(1e-7), ["A", "A+C"], labels)
    np.testing.assert_allclose(predicted, np.stack([r["A"], r["A"] + r["C"]]), atol=1e-3)


def test_elastic_net_is_fitted_once(monkeypatch) -> None:
    calls, original = [], LinearRegressor.fit
    monkeypatch.setattr(LinearRegressor, "fit", lambda self, *a: calls.append(1) or original(self, *a))
    model = ElasticNet().fit(make_cells(), "perturbation", control="ctrl")
    assert len(calls) == 1
    first = model.get_average_treatment_effects(["A", "B+C"]).X
    np.testing.assert_array_equal(model.get_average_treatment_effects(["B+C"]).X, first[1:])
    model.get_generated_expression(["A"], 5, seed=0)
    assert len(calls) == 1
    other = make_cells(seed=1)
    again = model.fit(other, "perturbation", control="ctrl").get_average_treatment_effects(["A", "B+C"]).X
    fresh = ElasticNet().fit(other, "perturbation", control="ctrl").get_average_treatment_effects(["A", "B+C"]).X
    np.testing.assert_array_equal(again, fresh)
    assert not np.array_equal(again, first)


@pytest.mark.parametrize(("alpha", "l1_ratio"), [(0.05, 0.5), (0.2, 0.1), (None, 0.9)])
def test_one_coefficient_in_closed_form(alpha, l1_ratio) -> None:
    """``n`` = 2 labels: centred ``x`` = +-1/2, so that ``x'y / n`` is a quarter of the effect."""
    predicted = effects(ElasticNet(alpha, l1_ratio), ["A"], ("A", "ctrl"))[0]
    penalty = 0.125 if alpha is None else alpha
    raw_effect = raw(("A", "ctrl"))["A"]
    soft = np.sign(raw_effect) * np.maximum(np.abs(raw_effect) / 4 - penalty * l1_ratio, 0)
    weight = soft / (0.25 + penalty * (1 - l1_ratio))
    np.testing.assert_allclose(predicted, (raw_effect + weight) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: NearestNeighbors(0), "`n_neighbors` must be a positive integer", id="neighbours"),
        pytest.param(lambda: ElasticNet(0.0), "`alpha` must be a positive number", id="alpha"),
        pytest.param(lambda: ElasticNet(0.1, 1.5), "`l1_ratio` must lie between 0 and 1; received 1.5", id="ratio"),
    ],
)
def test_bad_arguments(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
