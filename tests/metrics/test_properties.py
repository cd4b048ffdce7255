"""What holds for every metric: order does not matter, seeds repeat, equal inputs are perfect, NaN is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scvi_cradle import metrics

N_ROWS, N_COLUMNS = 6, 30
Score = Callable[[np.ndarray, np.ndarray], float]


class Case(NamedTuple):
    """A metric of a pair of matrices (truth first), its best score, and what may be reordered without an effect."""

    score: Score
    best: float
    rows: str = "together"  # or "apart" (a set of cells), "none"
    columns: str = "together"
    symmetric: bool = True
    constant: float | None = None  # score of a prediction of which all values are equal
    degenerate_raises: bool = False  # a truth of zeros has no score
    best_of_constant: float | None = None  # equal inputs without spread; default: best


def welch_p(x: np.ndarray, y: np.ndarray) -> float:
    return float(metrics.weighted_welch(x, np.ones(len(x)), y)["pvalue"].mean())


def delta_perturbed_mean(x: np.ndarray, y: np.ndarray) -> float:
    return metrics.pearson_delta(x, y, reference="perturbed_mean", train=TRAIN)


TRAIN = np.random.default_rng(5).normal(size=(4, N_COLUMNS))
CASES = {
    "ate_pearson": Case(metrics.ate_pearson, 1, constant=0, best_of_constant=0),
    "ate_pearson, each": Case(
        lambda x, y: metrics.ate_pearson(x, y, average="perturbation"), 1, constant=0, best_of_constant=0
    ),
    "ate_pearson, top": Case(
        lambda x, y: metrics.ate_pearson(x, y, top_k=5), 1, symmetric=False, constant=0, best_of_constant=0
    ),
    "ate_r2": Case(metrics.ate_r2, 1, symmetric=False, best_of_constant=0),
    "ate_r2, top": Case(lambda x, y: metrics.ate_r2(x, y, top_k=5), 1, symmetric=False, best_of_constant=0),
    "jaccard_top_k": Case(lambda x, y: metrics.jaccard_top_k(x, y, 5), 1, best_of_constant=0),
    "pearson_delta": Case(metrics.pearson_delta, 1, constant=0, best_of_constant=0),
    "pearson_delta, perturbed mean": Case(delta_perturbed_mean, 1, columns="none"),
    "perturbation_discrimination": Case(
        metrics.perturbation_discrimination, 1, symmetric=False, constant=0.5, best_of_constant=0.5
    ),
    "relative_rmse": Case(metrics.relative_rmse, 0, symmetric=False, degenerate_raises=True),
    "published_relative_rmse": Case(metrics.published_relative_rmse, 0, symmetric=False, degenerate_raises=True),
    "r2_of_means": Case(metrics.r2_of_means, 1, rows="apart", symmetric=False, best_of_constant=0),
    "published_r2_of_means": Case(metrics.published_r2_of_means, 1, rows="apart", symmetric=False, best_of_constant=0),
    "l2_of_means": Case(metrics.l2_of_means, 0, rows="apart"),
    "mmd_rbf": Case(lambda x, y: metrics.mmd_rbf(x, y, bandwidth=3.0), 0, rows="apart"),
    "mmd_multiscale": Case(metrics.mmd_multiscale, 0, rows="apart"),
    "energy_distance": Case(metrics.energy_distance, np.nan, rows="apart", best_of_constant=0),
    "weighted_welch": Case(welch_p, 1, rows="apart"),
}
# what is not a score of a pair of matrices has tests of its own, for these properties, too
ELSEWHERE = {
    *("average_treatment_effects", "bernoulli_kl", "block_r2", "cell_eval_scores", "evaluate", "evaluate_effects"),
    *(
        "gaussian_kl",
        "importance_weighted_bound",
        "iwelbo_summary",
        "jaccard_chance",
        "kish_effective_size",
        "latent_separation",
    ),
    *(
        "linear_probe",
        "marker_score",
        "probability_scores",
        "mask_f1",
        "mean_correlation_coefficient",
        "pathway_accuracy",
        "qc_pass_rate",
    ),
    *("replicate_ceiling", "to_cell_eval", "write_cell_eval"),
}
every_metric = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_every_metric_is_here_or_elsewhere() -> None:
    assert {name.split(",")[0] for name in CASES} | ELSEWHERE == set(metrics.__all__)
    assert not {name.split(",")[0] for name in CASES} & ELSEWHERE


def pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    real = rng.normal(size=(N_ROWS, N_COLUMNS)) * rng.choice([1e-3, 1.0, 50.0])
    return real, real * rng.uniform(-1, 2) + rng.normal(size=real.shape)


@every_metric
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_order_does_not_matter_and_calls_repeat(case: Case, seed: int) -> None:
    real, predicted = pair(seed)
    before = real.copy(), predicted.copy()
    score = case.score(real, predicted)
    assert np.isfinite(score)
    np.testing.assert_allclose(case.score(real, predicted), score, rtol=1e-12)
    np.testing.assert_array_equal((real, predicted), before)
    rng = np.random.default_rng(seed)
    rows, other_rows, columns = rng.permutation(N_ROWS), rng.permutation(N_ROWS), rng.permutation(N_COLUMNS)
    np.testing.assert_allclose(case.score(real[rows], predicted[rows]), score, rtol=1e-9, atol=1e-12)
    if case.rows == "apart":
        np.testing.assert_allclose(case.score(real[rows], predicted[other_rows]), score, rtol=1e-9, atol=1e-12)
    if case.columns == "together":
        turned = case.score(real[:, columns], predicted[:, columns])
        np.testing.assert_allclose(turned, score, rtol=1e-9, atol=1e-12)
    if case.symmetric:
        np.testing.assert_allclose(case.score(predicted, real), score, rtol=1e-9, atol=1e-12)


@every_metric
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_equal_inputs_are_perfect_and_nothing_is_better(case: Case, seed: int) -> None:
    real, predicted = pair(seed)
    if np.isnan(case.best):  # unbiased: zero only on average, below zero for equal cells
        assert case.score(real, real) < 0
        return
    np.testing.assert_allclose(case.score(real, real), case.best, atol=1e-12)
    better = 1 if case.best else -1
    assert better * case.score(real, predicted) <= better * case.best + 1e-9


@every_metric
@pytest.mark.parametrize("real", [np.zeros((4, N_COLUMNS)), np.full((4, N_COLUMNS), 2.0)], ids=["zeros", "constant"])
def test_degenerate_inputs_are_defined(case: Case, real: np.ndarray) -> None:
    other = np.random.default_rng(0).normal(size=real.shape)
    if case.degenerate_raises and not real.any():
        with pytest.raises(ValueError, match="zero"):
            case.score(real, other)
        return
    assert np.isfinite([case.score(real, other), case.score(other, real), case.score(real, real)]).all()
    if case.constant is not None:
        assert case.score(other, real) == pytest.approx(case.constant)
    if case.columns == "together":
        best = case.best if case.best_of_constant is None else case.best_of_constant
        if real.any() and case.score is CASES["jaccard_top_k"].score:
            best = 1.0  # ties go to the same genes
        assert case.score(real, real) == pytest.approx(best, abs=1e-12)


@every_metric
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_infinity_are_refused(case: Case, bad: float, side: int) -> None:
    sides = [np.random.default_rng(i).normal(size=(4, N_COLUMNS)) for i in range(2)]
    sides[side][1, 2] = bad
    with pytest.raises(ValueError, match="finite|NaN"):
        case.score(*sides)


@every_metric
def test_nothing_is_refused_and_one_row_is_defined(case: Case) -> None:
    row = np.random.default_rng(0).normal(size=(1, N_COLUMNS))
    with pytest.raises(ValueError, match="must h"):
        case.score(np.zeros((0, N_COLUMNS)), np.zeros((0, N_COLUMNS)))
    if case is CASES["energy_distance"]:
        with pytest.raises(ValueError, match="at least 2"):
            case.score(row, row)
    else:
        assert np.isfinite(case.score(row, row + 1))


NAMED = ["ate_pearson", "ate_r2", "jaccard_top_k", "pearson_delta", "perturbation_discrimination"]


@pytest.mark.parametrize("name", NAMED)
def test_names_bring_effects_into_order(name: str) -> None:
    real, predicted = pair(3)
    index, columns = [f"p{i}" for i in range(N_ROWS)], [f"g{i}" for i in range(N_COLUMNS)]
    x, y = (pd.DataFrame(v, index=index, columns=columns) for v in (real, predicted))
    score = getattr(metrics, name)
    np.testing.assert_allclose(score(x, y.iloc[::-1, ::-1]), score(real, predicted))
