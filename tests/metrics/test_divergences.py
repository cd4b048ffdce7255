from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, stats

from scvi_cradle.metrics import bernoulli_kl, gaussian_kl


def test_gaussian_kl_published_numbers() -> None:
    np.testing.assert_allclose(gaussian_kl(1.0, 0.5, 0.0, 2.0), 1.0425443611, atol=1e-10)
    np.testing.assert_allclose(gaussian_kl(0.0, 2.0, 1.0, 0.5), 8.1137056389, atol=1e-10)
    np.testing.assert_allclose(gaussian_kl(0.5, 0.2, 0.0, 1.0), 1.2544379124, atol=1e-10)


def test_gaussian_kl_is_the_integral() -> None:
    q, p = stats.norm(0.3, 0.7), stats.norm(-0.2, 1.1)
    integral, _ = integrate.quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), -8, 8)
    np.testing.assert_allclose(gaussian_kl(0.3, 0.7, -0.2, 1.1), integral, rtol=1e-8)


def test_bernoulli_kl_published_number_and_edges() -> None:
    np.testing.assert_allclose(bernoulli_kl(0.3, 0.01), 0.7777219880, atol=1e-10)
    np.testing.assert_allclose(bernoulli_kl([0.0, 1.0], [0.25, 0.25]), [-np.log(0.75), -np.log(0.25)])
    np.testing.assert_array_equal(bernoulli_kl([0.0, 0.4, 1.0], [0.0, 0.4, 1.0]), 0.0)
    assert bernoulli_kl(0.5, 0.0) == np.inf


def test_shapes_broadcast() -> None:
    assert gaussian_kl(np.zeros((3, 1)), np.ones(4), 0.0, 1.0).shape == (3, 4)
    assert bernoulli_kl(np.full((3, 1), 0.5), np.full(4, 0.5)).shape == (3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: gaussian_kl(0.0, 0.0, 0.0, 1.0), "`std_q` must hold positive", id="zero std"),
        pytest.param(lambda: gaussian_kl(0.0, 1.0, 0.0, [1.0, -1.0]), "`std_p` must hold positive", id="negative std"),
        pytest.param(lambda: gaussian_kl(np.nan, 1.0, 0.0, 1.0), "`mean_q` must be finite", id="nan mean"),
        pytest.param(lambda: bernoulli_kl(1.2, 0.5), "`prob_q` must hold values", id="above one"),
        pytest.param(lambda: bernoulli_kl(0.5, np.nan), "`prob_p` must hold values", id="nan"),
    ],
)
def test_bad_inputs(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
