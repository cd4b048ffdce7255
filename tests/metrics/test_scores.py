from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import r2_score

from scvi_cradle.metrics import ate_pearson, ate_r2, jaccard_top_k, pearson_delta, perturbation_discrimination


@pytest.fixture
def pair() -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(0)
    names = {"index": ["A", "B", "C", "D"], "columns": [f"g{i}" for i in range(30)]}
    real = pd.DataFrame(rng.normal(size=(4, 30)), **names)
    return real, real + pd.DataFrame(rng.normal(size=(4, 30)), **names)


SCORES = {
    "ate_pearson": ate_pearson,
    "per perturbation": lambda x, y: ate_pearson(x, y, average="perturbation"),
    "ate_r2": ate_r2,
    "jaccard": lambda x, y: jaccard_top_k(x, y, 5),
    "pearson_delta": pearson_delta,
    "discrimination": perturbation_discrimination,
}
BOUNDED_BELOW_BY_ZERO = {"jaccard", "discrimination"}


def test_pearson_and_r2_are_those_of_flat_vectors(pair) -> None:
    x, y = (f.to_numpy() for f in pair)
    np.testing.assert_allclose(ate_pearson(*pair), np.corrcoef(x.ravel(), y.ravel())[0, 1])
    np.testing.assert_allclose(ate_r2(*pair), r2_score(x.ravel(), y.ravel()))
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ate_pearson(*pair, average="perturbation"), np.mean(rows))
    np.testing.assert_allclose(pearson_delta(*pair), np.mean(rows))


def test_r2_hand_computed() -> None:
    np.testing.assert_allclose(ate_r2(np.array([1.0, 2, 3]), np.array([1.1, 1.9, 3.2])), 0.97)
    np.testing.assert_allclose(ate_r2(np.array([1.1, 1.9, 3.2]), np.array([1.0, 2, 3])), 0.9732938, atol=1e-7)


def test_large_offset_does_not_cost_digits(pair) -> None:
    np.testing.assert_allclose(ate_pearson(pair[0] + 1e6, pair[1] + 1e6), ate_pearson(*pair), atol=1e-8)


def test_jaccard_hand_computed() -> None:
    real = np.array([[5.0, -4, 3, 0, 0.1], [0, 0, 0, 0, 1]])
    predicted = np.array([[-5.0, 0, 3, 4, 0.1], [1, 0, 0, 0, 0]])
    # row 1: {0, 1} and {0, 3} share one of three; row 2: one gene each, none shared
    np.testing.assert_allclose(jaccard_top_k(real, predicted, 2), (1 / 3 + 0) / 2)
    assert jaccard_top_k(real, np.zeros_like(real), 2) == 0.0
    assert jaccard_top_k(np.zeros((1, 3)), np.zeros((1, 3)), 2) == 0.0


def test_jaccard_by_chance() -> None:
    rng = np.random.default_rng(0)
    score = jaccard_top_k(rng.normal(size=(400, 200)), rng.normal(size=(400, 200)), 50)
    np.testing.assert_allclose(score, 50 / (2 * 200 - 50), atol=0.01)


def test_discrimination_hand_computed() -> None:
    real = np.eye(3)
    predicted = np.array([[3.0, 1, 0], [1, 0.5, 0], [1, 1, 1]])
    # own truth first of three; second; tied with both others
    np.testing.assert_allclose(perturbation_discrimination(real, predicted), (1 + 0.5 + 0.5) / 3)


def test_discrimination_of_a_constant_prediction_is_one_half(pair) -> None:
    real = pair[0]
    constant = pd.DataFrame(np.tile(pair[1].iloc[[0]], (4, 1)), index=real.index, columns=real.columns)
    np.testing.assert_allclose(perturbation_discrimination(real, constant), 0.5)
    np.testing.assert_allclose(perturbation_discrimination(real, real * 0), 0.5)
    assert perturbation_discrimination(real.iloc[:1], real.iloc[:1]) == 0.5


def test_discrimination_without_targets() -> None:
    real = pd.DataFrame([[9.0, 0, 1, 0], [0, 9, 0, 1]], index=["A", "B"], columns=["A", "B", "x", "y"])
    predicted = pd.DataFrame([[9.0, 0, 0, 1], [0, 9, 1, 0]], index=["A", "B"], columns=["A", "B", "x", "y"])
    assert perturbation_discrimination(real, predicted) == 1.0
    assert perturbation_discrimination(real, predicted, exclude_genes=["A", "B", "not there"]) == 0.0


def test_perturbed_mean_takes_off_what_is_common(pair) -> None:
    common = np.linspace(-20, 20, 30)
    rng = np.random.default_rng(1)
    real = pd.DataFrame(rng.normal(size=(6, 30)) + common)
    unrelated = pd.DataFrame(rng.normal(size=(6, 30)) + common)
    assert pearson_delta(real, unrelated) > 0.95
    train = pd.DataFrame(np.tile(common, (2, 1)))
    assert abs(pearson_delta(real, unrelated, reference="perturbed_mean", train=train)) < 0.25
    expected = [
        np.corrcoef(a - common, b - common)[0, 1] for a, b in zip(real.to_numpy(), unrelated.to_numpy(), strict=True)
    ]
    np.testing.assert_allclose(
        pearson_delta(real, unrelated, reference="perturbed_mean", train=train), np.mean(expected), atol=1e-12
    )


@pytest.mark.parametrize("name", SCORES)
class TestCommonProperties:
    def test_perfect(self, name, pair) -> None:
        np.testing.assert_allclose(SCORES[name](pair[0], pair[0]), 1.0)

    def test_names_decide_and_order_does_not(self, name, pair) -> None:
        real, predicted = pair
        shuffled = predicted.sample(frac=1.0, random_state=0).sample(frac=1.0, axis=1, random_state=0)
        np.testing.assert_allclose(SCORES[name](real, shuffled), SCORES[name](real, predicted))
        as_anndata = ad.AnnData(shuffled)
        np.testing.assert_allclose(SCORES[name](real, as_anndata), SCORES[name](real, predicted))

    def test_arrays_are_taken_in_order(self, name, pair) -> None:
        real, predicted = pair
        expected = SCORES[name](real, predicted)
        np.testing.assert_allclose(SCORES[name](real.to_numpy(), predicted), expected)
        np.testing.assert_allclose(SCORES[name](real, predicted.to_numpy()), expected)

    def test_undefined_is_a_number(self, name, pair) -> None:
        zero = pair[0] * 0.0
        for call in ((pair[0], zero), (zero, pair[0]), (zero, zero)):
            value = SCORES[name](*call)
            assert np.isfinite(value)
            assert value <= 0.5

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f: f.drop(index="A"), "same perturbations"),
            (lambda f: f.rename(index={"A": "Z"}), "same perturbations"),
            (lambda f: f.rename(columns={"g0": "h"}), "same genes"),
            (lambda f: pd.concat([f, f.iloc[:1]]), "named uniquely"),
            (lambda f: f.to_numpy()[:, 1:], "same shape"),
            (lambda f: f.mask(f == f.loc["A", "g0"]), "finite effects"),
        ],
        ids=["missing", "renamed", "genes", "twice", "shape", "nan"],
    )
    def test_mismatch(self, name, pair, change, message) -> None:
        with pytest.raises(ValueError, match=message):
            SCORES[name](pair[0], change(pair[1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda x: ate_pearson(x, x, average="gene"), "`average` must be one of", id="average"),
        pytest.param(lambda x: jaccard_top_k(x, x, 0), "`k` must be a positive integer", id="k"),
        pytest.param(lambda x: pearson_delta(x, x, reference="perturbed_mean"), "needs the effects", id="no train"),
        pytest.param(lambda x: pearson_delta(x, x, train=x), "does not use", id="train not used"),
        pytest.param(
            lambda x: pearson_delta(x, x, reference="perturbed_mean", train=x.iloc[:, 1:]),
            "genes of `real`",
            id="genes",
        ),
        pytest.param(
            lambda x: perturbation_discrimination(x, x, exclude_genes=x.columns), "At least one gene", id="none left"
        ),
    ],
)
def test_bad_arguments(call, message, pair) -> None:
    with pytest.raises(ValueError, match=message):
        call(pair[0])
