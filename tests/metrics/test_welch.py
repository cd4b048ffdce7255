from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import ttest_ind

from scvi_cradle.metrics import kish_effective_size, weighted_welch

TEST = np.array([[1.0], [2], [3], [4]])
REFERENCE = np.array([[2.0], [3], [4], [5], [7]])
WEIGHTS = np.array([0.2, 0.5, 0.9, 1.0])


def test_kish_by_hand() -> None:
    assert kish_effective_size([1, 1, 1, 1]) == 4
    np.testing.assert_allclose(kish_effective_size([1, 0.5, 0.5]), 2.6666667, atol=1e-7)
    np.testing.assert_allclose(kish_effective_size(WEIGHTS), 3.2190476, atol=1e-7)
    np.testing.assert_allclose(kish_effective_size([0.5] * 3), 3)
    np.testing.assert_allclose(kish_effective_size([1e-200] * 3), 3)
    assert kish_effective_size([0.0, 0.0]) == 0


@pytest.mark.parametrize("weight", [1.0, 0.37])
def test_equal_weights_are_welchs_test(weight) -> None:
    row = weighted_welch(TEST, np.full(4, weight), REFERENCE).iloc[0]
    expected = ttest_ind(TEST[:, 0], REFERENCE[:, 0], equal_var=False)
    np.testing.assert_allclose([row["statistic"], row["pvalue"]], [expected.statistic, expected.pvalue])
    np.testing.assert_allclose(row[["statistic", "df", "pvalue"]], [-1.5806831048, 6.8690005324, 0.1587760580])
    assert row["n_eff"] == pytest.approx(4)


def test_unequal_weights_by_hand() -> None:
    row = weighted_welch(TEST, WEIGHTS, REFERENCE).iloc[0]
    np.testing.assert_allclose(row[["statistic", "df", "pvalue"]], [-1.0888456521, 6.2176857767, 0.3166150144])
    np.testing.assert_allclose(row["mean_difference"], 3.0384615385 - 4.2)
    frequency = weighted_welch(TEST, WEIGHTS, REFERENCE, variance="frequency").iloc[0]
    np.testing.assert_allclose(frequency[["statistic", "pvalue"]], [-1.0666583260, 0.3258341194])
    scaled = weighted_welch(TEST, np.full(4, 0.5), REFERENCE, variance="frequency").iloc[0]
    np.testing.assert_allclose(scaled["statistic"], -1.4550656746)  # this form depends on the scale of the weights
    biased = weighted_welch(TEST, np.ones(4), REFERENCE, variance="biased").iloc[0]
    np.testing.assert_allclose(biased["statistic"], (2.5 - 4.2) / np.sqrt(1.25 / 4 + 2.96 / 5))


def test_reference_weights_mirror_the_test_weights() -> None:
    one = weighted_welch(TEST, WEIGHTS, REFERENCE, reference_weights=[1, 2, 1, 0.5, 0.1]).iloc[0]
    other = weighted_welch(REFERENCE, [1, 2, 1, 0.5, 0.1], TEST, reference_weights=WEIGHTS).iloc[0]
    np.testing.assert_allclose(one["statistic"], -other["statistic"])
    np.testing.assert_allclose(one[["df", "pvalue"]], other[["df", "pvalue"]])


def test_sparse_equals_dense_and_genes_are_named() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.poisson(0.7, size=(n, 12)).astype(np.float32) for n in (30, 50))
    w, v = rng.random(30), rng.random(50)
    genes = [f"g{i}" for i in range(12)]
    dense = weighted_welch(pd.DataFrame(x, columns=genes), w, y, reference_weights=v)
    assert list(dense.index) == genes
    sparse = weighted_welch(sp.csr_matrix(x), w, sp.csc_matrix(y), reference_weights=v)
    np.testing.assert_allclose(sparse, dense, rtol=1e-9)


def test_nothing_to_test_is_one_and_never_nan() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3))
    for table in (
        weighted_welch(np.ones((4, 3)), np.ones(4), np.ones((5, 3))),
        weighted_welch(x, [0, 0, 0, 1.0], x),
        weighted_welch(x, np.zeros(4), x),
        weighted_welch(x, np.full(4, 0.1), x, variance="frequency"),
        weighted_welch(x, np.ones(4), x[:1]),
    ):
        assert (table["pvalue"] == 1).all()
        assert np.isfinite(table.to_numpy()).all()


def test_weights_from_expression_need_weighted_controls() -> None:
    """Null data, weights from an uninformative score of expression: only weighting the controls alike is calibrated."""
    rng = np.random.default_rng(0)
    hits = {"plain": [], "test weighted": [], "both weighted": []}
    for _ in range(40):
        x = rng.normal(size=(500, 60))
        x += rng.normal(size=(500, 1))  # genes share a factor
        score = 1 / (1 + np.exp(-2 * x[:, :20].mean(axis=1)))  # of other cells' making: any direction will do
        test, reference = slice(0, 100), slice(100, None)
        ones, w, v = np.ones(100), score[test], score[reference]
        genes = x[:, 20:]
        for name, table in {
            "plain": weighted_welch(genes[test], ones, genes[reference]),
            "test weighted": weighted_welch(genes[test], w, genes[reference]),
            "both weighted": weighted_welch(genes[test], w, genes[reference], reference_weights=v),
        }.items():
            hits[name].append((table["pvalue"] < 0.05).mean())
    rate = {name: np.mean(values) for name, values in hits.items()}
    se = {name: np.std(values) / np.sqrt(len(values)) for name, values in hits.items()}
    assert abs(rate["plain"] - 0.05) < 3 * se["plain"]
    assert abs(rate["both weighted"] - 0.05) < 3 * se["both weighted"]
    assert rate["test weighted"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TEST, WEIGHTS[:3], REFERENCE), "4 of them"),
        ((TEST, -WEIGHTS, REFERENCE), "not negative"),
        ((TEST, WEIGHTS, np.ones((5, 2))), "same genes"),
        ((TEST * np.nan, WEIGHTS, REFERENCE), "finite"),
    ],
)
def test_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_welch(*arguments)
