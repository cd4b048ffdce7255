from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import r2_score

from scvi_cradle.metrics import (
    l2_of_means,
    published_r2_of_means,
    published_relative_rmse,
    r2_of_means,
    relative_rmse,
)


def test_relative_rmse_by_hand() -> None:
    real, predicted = np.array([[1.0, 2], [3, 4]]), np.array([[1.0, 1], [3, 5]])
    np.testing.assert_allclose(relative_rmse(real, predicted), 0.2581988897, atol=1e-10)
    np.testing.assert_allclose(np.sqrt(((real - predicted) ** 2).mean()), 0.7071067812, atol=1e-10)  # not this
    assert relative_rmse(real, np.zeros_like(real)) == 1.0
    by_batch = [np.sqrt(1 / 5), np.sqrt(1 / 25)]
    np.testing.assert_allclose(published_relative_rmse(real, predicted, batch_size=1), np.mean(by_batch))
    np.testing.assert_allclose(published_relative_rmse(real, predicted), relative_rmse(real, predicted))


def test_r2_by_hand() -> None:
    real, predicted = np.array([[1.0, 2, 3]]), np.array([[1.1, 1.9, 3.2]])
    np.testing.assert_allclose(r2_of_means(real, predicted), 0.97, atol=1e-10)
    np.testing.assert_allclose(published_r2_of_means(real, predicted), 0.9732938, atol=1e-7)
    np.testing.assert_allclose(np.corrcoef(real, predicted)[0, 1] ** 2, 0.9814541, atol=1e-7)  # neither of them


def test_r2_is_that_of_the_mean_profiles() -> None:
    rng = np.random.default_rng(0)
    real, predicted = rng.gamma(2, size=(40, 9)), rng.gamma(2, size=(25, 9))
    np.testing.assert_allclose(r2_of_means(real, predicted), r2_score(real.mean(0), predicted.mean(0)))
    np.testing.assert_allclose(l2_of_means(real, predicted), np.linalg.norm(real.mean(0) - predicted.mean(0)))
    assert r2_of_means(real, 10 - predicted) < 0
    assert published_r2_of_means(real[:25], 10 - predicted) == 0.0  # clipped
    halves = [max(r2_score(predicted[p].mean(0), real[p].mean(0)), 0) for p in (slice(0, 20), slice(20, 25))]
    np.testing.assert_allclose(published_r2_of_means(real[:25], predicted, batch_size=20), np.mean(halves))


def test_the_mean_beats_a_sample_of_the_truth() -> None:
    """Cells without partners: a constant prediction has the smaller error, so the score rewards collapse."""
    rng = np.random.default_rng(1)
    real, again = rng.gamma(2, size=(2, 500, 20))
    constant = np.tile(again.mean(axis=0), (500, 1))
    ratio = relative_rmse(real, again) / relative_rmse(real, constant)
    np.testing.assert_allclose(ratio, np.sqrt(2), rtol=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: relative_rmse(x, x[:2]), "as many cells"),
        (lambda x: relative_rmse(0 * x, x), "not zero"),
        (lambda x: published_relative_rmse(x, x, batch_size=0), "batch_size"),
        (lambda x: r2_of_means(x, x[:, :2]), "same features"),
    ],
)
def test_errors(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0).normal(size=(5, 3)))
