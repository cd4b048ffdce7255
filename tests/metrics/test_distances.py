from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_cradle.metrics import (
    energy_distance,
    l2_of_means,
    mmd_multiscale,
    mmd_rbf,
    published_r2_of_means,
    published_relative_rmse,
    r2_of_means,
    relative_rmse,
)


def test_mmd_by_hand() -> None:
    x, y = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    single = {0.5: 1.0673321714, 1.0: 1.1623755484, 2.0: 0.6723915579}
    np.testing.assert_allclose(mmd_rbf(x, y, bandwidth=1.0), np.mean(list(single.values())), atol=1e-10)
    np.testing.assert_allclose(mmd_rbf(x, y, bandwidth=1.0), 0.9673664259, atol=1e-10)
    # the only pair of the default reference, the real cells, is 1 apart
    np.testing.assert_allclose(mmd_rbf(x, y), 0.9673664259, atol=1e-10)
    np.testing.assert_allclose(mmd_rbf(x, y, reference=np.array([[0.0], [2.0]])), mmd_rbf(x, y, bandwidth=2.0))


def test_mmd_of_the_fixed_kernels_by_hand() -> None:
    x, y = np.array([[0.0, 0], [1, 0]]), np.array([[0.0, 1], [2, 2]])
    np.testing.assert_allclose(mmd_multiscale(x, y), 0.2980084419, atol=1e-7)  # a value of single precision
    within = {"x": 1.0, "y": 5.0}  # squared distances of the two cells of a side
    between = [1.0, 8.0, 2.0, 5.0]
    widths = [31.25 * 2**i for i in range(10)]
    expected = sum(
        sum((1 + np.exp(-d / b)) / 2 for d in within.values()) - 2 * np.mean(np.exp(-np.array(between) / b))
        for b in widths
    )
    np.testing.assert_allclose(mmd_multiscale(x, y), expected, rtol=1e-12)


def test_energy_distance_by_hand() -> None:
    x, y = np.array([[0.0], [1.0]]), np.array([[2.0], [5.0]])
    # between: (2 + 5 + 1 + 4) / 4 = 3; within: 1 and 3
    np.testing.assert_allclose(energy_distance(x, y), 2 * 3 - 1 - 3)
    # squared: between (4 + 25 + 1 + 16) / 4 = 11.5; within 1 and 9
    np.testing.assert_allclose(energy_distance(x, y, squared=True), 23 - 1 - 9)


def test_squared_energy_distance_is_twice_the_distance_of_means() -> None:
    """Unbiased: over many samples the mean is 2 |difference|^2, whatever the spread."""
    rng = np.random.default_rng(0)
    values = [
        energy_distance(rng.normal(size=(8, 3)), 1.0 + 2.0 * rng.normal(size=(8, 3)), squared=True) for _ in range(800)
    ]
    se = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - 2 * 3.0) < 4 * se
    assert se < 0.3


@pytest.mark.parametrize("distance", [energy_distance, lambda x, y: mmd_rbf(x, y, bandwidth=1.5, unbiased=True)])
def test_samples_of_one_distribution_are_zero_on_average(distance) -> None:
    rng = np.random.default_rng(1)
    values = [distance(rng.normal(size=(6, 4)), rng.normal(size=(9, 4))) for _ in range(600)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    biased = [mmd_rbf(rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), bandwidth=1.5) for _ in range(100)]
    assert np.mean(biased) > 0.1  # as published: rises as cells get fewer


def test_energy_distance_takes_equal_numbers_and_chunks_do_not_matter(monkeypatch) -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(50, 3)), rng.normal(size=(30, 3)) + 1
    assert energy_distance(x, y, seed=0) == energy_distance(x, y, seed=0, n_cells=30)
    assert energy_distance(x, y, seed=0) != energy_distance(x, y, seed=1)
    whole = energy_distance(x, y), mmd_rbf(x, y), mmd_multiscale(x, y)
    monkeypatch.setattr("scvi_cradle.metrics._distances.CHUNK", 7)
    np.testing.assert_allclose((energy_distance(x, y), mmd_rbf(x, y), mmd_multiscale(x, y)), whole)
    np.testing.assert_allclose(energy_distance(sp.csr_matrix(x), sp.csc_matrix(y)), whole[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: energy_distance(x, x[:1]), "at least 2 cells"),
        (lambda x: energy_distance(x, x, n_cells=99), "between 2 and"),
        (lambda x: energy_distance(x, x[:, :2]), "same features"),
        (lambda x: mmd_rbf(np.ones_like(x), x), "median distance of 0"),
        (lambda x: mmd_rbf(x, x, reference=x[:, :1]), "`reference` must have the features"),
        (lambda x: mmd_rbf(x, x, bandwidth=0.0), "bandwidth"),
    ],
)
def test_errors(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0).normal(size=(5, 3)))


PAIRED = [
    mmd_rbf,
    mmd_multiscale,
    energy_distance,
    relative_rmse,
    published_relative_rmse,
    r2_of_means,
    published_r2_of_means,
    l2_of_means,
]


@pytest.mark.parametrize("metric", PAIRED)
def test_features_of_two_dataframes_are_paired_by_name(metric) -> None:
    rng = np.random.default_rng(4)
    x, y = (pd.DataFrame(rng.normal(size=(6, 3)) + [0, 4, 9], columns=["a", "b", "c"]) for _ in range(2))
    expected = metric(x.to_numpy(), y.to_numpy())
    assert metric(x, y[["c", "b", "a"]]) == expected
    assert metric(x, y[["c", "b", "a"]].to_numpy()) != expected  # names are all that says so
    with pytest.raises(ValueError, match="received DataFrames that differ in the columns 'c', 'd'"):
        metric(x, y.rename(columns={"c": "d"}))
    twice = ["a", "b", "b"]
    with pytest.raises(ValueError, match="columns of `real` must be unique; received 'b' more than once"):
        metric(x.set_axis(twice, axis=1), y.set_axis(twice, axis=1))


def test_reference_of_mmd_is_paired_by_name() -> None:
    rng = np.random.default_rng(5)
    x, y, z = (pd.DataFrame(rng.normal(size=(6, 2)), columns=["a", "b"]) for _ in range(3))
    with pytest.raises(ValueError, match="`real` and `reference` must have the same features"):
        mmd_rbf(x, y, reference=z.rename(columns={"a": "c"}))


def test_one_real_cell_sets_no_width() -> None:
    one, many = np.zeros((1, 3)), np.random.default_rng(6).normal(size=(5, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="needs at least 2 cells of `real`; received 1: give `bandwidth`"):
            mmd_rbf(one, many)
        assert np.isfinite([mmd_rbf(one, many, bandwidth=1.0), mmd_rbf(one, many, reference=many)]).all()
