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


@pytest.mark.parametrize("variance", ["reliability", "frequency", "biased"])
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix], ids=["dense", "sparse"])
def test_constant_groups_have_no_variance_whatever_the_rounding(form, variance) -> None:
    rng = np.random.default_rng(0)
    constants = rng.gamma(1.0, 3.0, size=(2, 500)) * 10.0 ** rng.integers(-6, 6, size=500)
    constants[:, :100] = [[0.1], [0.7]]
    constants[1, 400:] = constants[0, 400:]
    for _ in range(20):
        n, m = rng.integers(2, 400, size=2)
        x, y = (form(np.tile(c, (k, 1))) for c, k in zip(constants, (n, m), strict=True))
        w, v = 1e-3 + 5 * rng.random(n), 1e-3 + 5 * rng.random(m)
        table = weighted_welch(x, w, y, reference_weights=v, variance=variance)
        assert (table["statistic"] == 0).all()
        assert (table["pvalue"] == 1).all()
        np.testing.assert_allclose(table["mean_difference"], constants[0] - constants[1], atol=1e-12 * constants.max())


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix], ids=["dense", "sparse"])
def test_constant_gene_of_many_cells_with_equal_weights(form) -> None:
    """Running sums of 300,000 times .1 drift by far more than one rounding."""
    x = form(np.full((300_000, 1), 0.3))
    assert weighted_welch(x, np.full(300_000, 0.1), form(np.full((5, 1), 0.2))).loc[0, "pvalue"] == 1


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix], ids=["dense", "sparse"])
def test_small_variances_count(form) -> None:
    """Only rounding is cut off: a spread of 1e-5 of the mean is tested as any other."""
    rng = np.random.default_rng(1)
    x, y = (7.0 * (1 + 1e-5 * rng.normal(size=(n, 4))) for n in (20, 30))
    table = weighted_welch(form(x), np.ones(20), form(y))
    np.testing.assert_allclose(table["pvalue"], ttest_ind(x, y, equal_var=False).pvalue, rtol=1e-6)


@pytest.mark.parametrize("variance", ["reliability", "biased"])
@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200])
def test_scale_of_the_weights_does_not_matter(variance, scale) -> None:
    rng = np.random.default_rng(2)
    x, y, w, v = rng.normal(size=(30, 5)), rng.normal(size=(40, 5)), rng.random(30), rng.random(40)
    expected = weighted_welch(x, w, y, reference_weights=v, variance=variance)
    scaled = weighted_welch(x, w * scale, y, reference_weights=v * scale, variance=variance)
    np.testing.assert_allclose(scaled, expected, rtol=1e-9)


def test_genes_of_two_dataframes_are_paired_by_name() -> None:
    rng = np.random.default_rng(3)
    x, y = (pd.DataFrame(rng.normal(size=(n, 3)) + [0, 5, 9], columns=list("abc")) for n in (10, 12))
    expected = weighted_welch(x, np.ones(10), y)
    pd.testing.assert_frame_equal(weighted_welch(x, np.ones(10), y[["c", "a", "b"]]), expected)
    with pytest.raises(ValueError, match="must have the same features; received DataFrames that differ in .*'c', 'd'"):
        weighted_welch(x, np.ones(10), y.rename(columns={"c": "d"}))
    with pytest.raises(ValueError, match="columns of `x_test` must be unique; received 'a' more than once"):
        weighted_welch(x[["a", "b", "c", "a"]], np.ones(10), y)


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
