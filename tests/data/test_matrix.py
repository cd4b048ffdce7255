"""Matrices are put together without a second copy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scvi_cradle._matrix import stack_rows


@pytest.mark.parametrize("sizes", [(1,), (3, 0, 2), (2, 5, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_stacked_rows_are_those_of_scipy(sizes, dtype):
    rng = np.random.default_rng(0)
    blocks = [sp.csr_matrix(rng.poisson(0.5, (n, 4)).astype(dtype)) for n in sizes]
    expected = sp.vstack(blocks, format="csr")
    found = stack_rows(blocks)
    assert blocks == []
    assert (found.dtype, found.indices.dtype, found.shape) == (dtype, expected.indices.dtype, expected.shape)
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
