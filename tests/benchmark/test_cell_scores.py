"""Scores of generated cells: closed forms, and what a repeat and a copy score."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from scvi_cradle import metrics
from scvi_cradle.benchmark._cell_scores import (
    OF_EFFECT,
    SIGNS,
    draw,
    effect_score,
    generated_scores,
    label_scores,
    references,
)


def cells(mean: np.ndarray, label: str, n: int, seed: int) -> AnnData:
    counts = np.random.default_rng(seed).poisson(mean, size=(n, len(mean))).astype(np.float32)
    return AnnData(counts, obs=pd.DataFrame({"perturbation": [label] * n}, index=[str(i) for i in range(n)]))


def test_expression() -> None:
    adata = AnnData(np.array([[1.0, 3.0], [0.0, 0.0]], dtype=np.float32))
    found = draw(adata, None, np.random.default_rng(0))
    np.testing.assert_allclose(sorted(found.tolist()), [[0, 0], [np.log2(2501), np.log2(7501)]])
    values = AnnData(np.array([[-0.5, 3.0], [-0.5, 3.0]]))  # generated on the log scale
    np.testing.assert_array_equal(draw(values, None, np.random.default_rng(0), on_log=True), values.X)


def test_scores_of_a_label() -> None:
    real, predicted = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 1.0], [3.0, 5.0], [9.0, 9.0]])
    scores = label_scores(real, predicted, 1.0)
    assert set(scores) == set(SIGNS)
    assert scores["relative_rmse"] == pytest.approx(0.2581988897)  # specified example, on the pairs
    mean = np.tile(predicted.mean(axis=0), (2, 1))
    assert scores["relative_rmse_of_mean"] == pytest.approx(metrics.relative_rmse(real, mean))
    assert scores["published_relative_rmse"] == scores["relative_rmse"]  # one batch
    assert scores["published_r2_of_means"] == metrics.published_r2_of_means(real, predicted[:2])
    assert scores["l2_of_means"] == pytest.approx(np.linalg.norm(real.mean(0) - predicted.mean(0)))
    assert scores["energy_distance"] == pytest.approx(metrics.energy_distance(real, predicted[:2]))
    one = label_scores(real[:1], predicted, 1.0)
    assert np.isnan(one["energy_distance"])
    assert np.isnan(one["mmd_rbf"])
    assert np.isfinite(one["relative_rmse"])


def test_a_true_sampler_reaches_the_ceiling_and_the_others_do_not() -> None:
    rng = np.random.default_rng(0)
    control = rng.uniform(1, 6, 30)
    effect = np.where(np.arange(30) < 8, 4.0, 1.0)
    real, other = cells(control * effect, "A", 200, 1), cells(control / effect, "B", 100, 2)
    known = references(real, other, cells(control, "control", 60, 3), ["A"], seed=0)
    assert known["n_cells"].tolist() == [100]

    def scores(predicted: AnnData) -> pd.DataFrame:
        return pd.DataFrame(generated_scores(real, predicted, ["A"], known, 0)).set_index("metric")

    sampler = scores(cells(control * effect, "A", 100, 4))
    nothing = scores(cells(control / effect, "A", 100, 5))
    assert list(sampler.index) == list(SIGNS)
    for name, sign in SIGNS.items():
        assert sign * (sampler.loc[name, "value"] - nothing.loc[name, "value"]) > 0
        assert abs(nothing.loc[name, "scaled"]) < 0.1
        assert sampler.loc[name, "scaled"] > 0.9
    # without pairs a constant beats a sample of the truth, by the factor sqrt(2) of two independent noises
    means = sampler["value"]
    assert means["relative_rmse"] / means["relative_rmse_of_mean"] == pytest.approx(np.sqrt(2), rel=0.05)


def test_a_repeat_and_a_true_sampler_score_the_same_with_few_cells() -> None:
    """Distances of means fall with the number of cells: value, baseline and ceiling must have as many."""
    rng = np.random.default_rng(0)
    mean, nothing = rng.uniform(1, 6, 30), rng.uniform(1, 6, 30)
    labels = [f"A{i}" for i in range(40)]
    real = anndata.concat([cells(mean, label, 8, i) for i, label in enumerate(labels)], index_unique="-")
    sampler = anndata.concat([cells(mean, label, 100, 100 + i) for i, label in enumerate(labels)], index_unique="-")
    known = references(real, cells(nothing, "B", 100, 2), cells(mean, "control", 60, 3), labels, seed=0)
    assert known["n_cells"].tolist() == [4] * 40
    table = pd.DataFrame(generated_scores(real, sampler, labels, known, 0)).set_index("metric")
    for name in ("l2_of_means", "relative_rmse_of_mean", "relative_rmse", "r2_of_means"):
        assert table.loc[name, "value"] == pytest.approx(table.loc[name, "ceiling"], rel=0.05), name


def test_draws_are_of_the_label_and_seeded() -> None:
    both = AnnData(
        np.vstack([np.full((150, 2), 1.0), np.full((5, 2), [1.0, 3.0])]).astype(np.float32),
        obs=pd.DataFrame({"perturbation": ["A"] * 150 + ["B"] * 5}, index=[str(i) for i in range(155)]),
    )
    assert draw(both, "A", np.random.default_rng(0)).shape == (100, 2)
    np.testing.assert_allclose(
        draw(both, "B", np.random.default_rng(0)), [[np.log2(2501), np.log2(7501)]] * 5, rtol=1e-6
    )
    assert draw(both, None, np.random.default_rng(0)).shape == (100, 2)


def test_batches_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    real, predicted = rng.uniform(1, 3, (80, 6)), rng.uniform(1, 3, (90, 6)) + np.linspace(0, 2, 6)
    scores = label_scores(real, predicted, 1.0)
    parts = [slice(0, 32), slice(32, 64), slice(64, 80)]
    rmse = [metrics.relative_rmse(real[p], predicted[p]) for p in parts]
    assert scores["published_relative_rmse"] == pytest.approx(np.mean(rmse))
    assert abs(scores["published_relative_rmse"] - scores["relative_rmse"]) > 1e-5
    assert scores["published_r2_of_means"] == pytest.approx(metrics.published_r2_of_means(real, predicted[:80]))
    assert scores["published_r2_of_means"] > scores["r2_of_means"]  # clipped at 0


def test_generated_values_on_the_log_scale_score_as_their_counts() -> None:
    rng = np.random.default_rng(0)
    mean = rng.uniform(1, 6, 30)
    real, made = cells(mean, "A", 60, 1), cells(mean, "A", 60, 2)
    known = references(real, cells(mean, "B", 60, 3), cells(mean, "control", 60, 4), ["A"], seed=0)
    counts = pd.DataFrame(generated_scores(real, made, ["A"], known, 0))
    values = made.copy()
    values.X = np.log2(1 + 1e4 * made.X / made.X.sum(1, keepdims=True))
    logs = pd.DataFrame(generated_scores(real, values, ["A"], known, 0, on_log=True))
    np.testing.assert_allclose(logs["value"], counts["value"], rtol=1e-5)
    assert (pd.DataFrame(generated_scores(real, values, ["A"], known, 0))["value"] != counts["value"]).all()


def test_the_score_of_an_effect_is_that_of_a_constant() -> None:
    """Nothing is drawn: a sampler and its mean have one score, the noise floor for the true effect."""
    rng = np.random.default_rng(0)
    control, other = rng.uniform(1, 6, 30), rng.uniform(1, 6, 30)
    real = anndata.concat([cells(other, "A", 50, 1), cells(control, "B", 70, 2)], index_unique="-")
    log = {x: draw(real, x, np.random.default_rng(0)) for x in ("A", "B")}
    level = log["B"].mean(axis=0) + 0.5
    truth = {x: values.mean(axis=0) - level for x, values in log.items()}
    train = AnnData(np.array([truth["A"], 0 * level]), var=pd.DataFrame({"control_mean": level}, index=real.var_names))
    asked = AnnData(np.array([truth["B"], truth["A"]]), obs=pd.DataFrame(index=["B", "A"]))
    row = effect_score(real, asked, train)
    floor = [np.sqrt(x.var(axis=0).sum() / (x**2).mean(axis=0).sum()) for x in log.values()]
    assert row["metric"] == OF_EFFECT
    assert row["value"] == pytest.approx(np.mean(floor))
    guess = [metrics.relative_rmse(x, np.tile(level + truth["A"] / 2, (len(x), 1))) for x in log.values()]
    assert row["baseline"] == pytest.approx(np.mean(guess))
    assert row["value"] < row["baseline"] - 0.02
    assert np.isnan(row["ceiling"])
