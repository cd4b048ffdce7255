"""The axes along which diagnostics compare variances."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scvi_cradle.model._quality import principal_variance


@pytest.mark.parametrize("storage", [np.asarray, sp.csr_matrix], ids=["dense", "sparse"])
@pytest.mark.parametrize("n_cells", [12, 61])
def test_axes_are_the_principal_ones_of_half_of_the_cells(storage, n_cells):
    values = np.random.default_rng(0).gamma(0.3, 2.0, (n_cells, 2_100)).round(1)
    axes, variance = principal_variance(storage(values), np.random.default_rng(1))
    order, half = np.random.default_rng(1).permutation(n_cells), n_cells // 2
    fitted = values[order[:half]] - values[order[:half]].mean(axis=0)
    expected = np.linalg.svd(fitted, full_matrices=False)[2][: min(10, half - 1)]
    np.testing.assert_allclose(np.abs((axes * expected).sum(axis=1)), 1.0, rtol=1e-9)
    np.testing.assert_allclose(axes @ axes.T, np.eye(len(axes)), atol=1e-9)
    assert variance == pytest.approx((values[order[half:]] @ expected.T).var(axis=0).sum(), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_cells_without_variance_have_no_axes(value):
    axes, variance = principal_variance(np.full((50, 4), value), np.random.default_rng(0))
    assert axes.shape == (0, 4)
    assert variance == 1e-12
