"""Many weighted Welch tests at once are the tests one by one."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scvi_cradle.metrics import kish_effective_size, weighted_welch
from scvi_cradle.metrics._welch_many import welch_tests

VARIANCES = ["reliability", "frequency", "biased"]


def data(seed: int = 0, n: int = 300, n_genes: int = 40, n_categories: int = 7) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    x = np.log1p(rng.poisson(rng.gamma(0.5, 2.0, size=n_genes), size=(n, n_genes))) * rng.random((n, n_genes))
    group = rng.integers(0, n_categories + 1, size=n)
    test = (group[:, None] == np.arange(n_categories)) * rng.random((n, n_categories))
    reference = (group == n_categories)[:, None] * np.where(np.arange(n_categories) < 3, 1.0, rng.random((n, 1)))
    return x, test, reference


def check(x: np.ndarray, test: np.ndarray, reference: np.ndarray, variance: str, atol: float = 1e-12) -> dict:
    found = welch_tests(sp.csr_matrix(x), sp.csc_matrix(test), sp.csr_matrix(reference), variance=variance)
    for k in range(test.shape[1]):
        chosen, others = test[:, k] > 0, reference[:, k] > 0
        if not chosen.any() or not others.any():
            continue
        expected = weighted_welch(
            x[chosen], test[chosen, k], x[others], reference_weights=reference[others, k], variance=variance
        )
        for name in ("statistic", "df", "pvalue", "mean_difference"):
            np.testing.assert_allclose(found[name][k], expected[name], rtol=1e-9, atol=atol, err_msg=f"{name} {k}")
        np.testing.assert_allclose(found["n_eff"][k], expected["n_eff"], rtol=1e-12)
    return found


def test_numbers_by_hand() -> None:
    x = sp.csr_matrix(np.array([1.0, 2, 3, 4, 2, 3, 4, 5, 7])[:, None])
    test = np.zeros((9, 3))
    test[:4] = np.column_stack([np.ones(4), np.full(4, 0.37), [0.2, 0.5, 0.9, 1.0]])
    reference = np.repeat([0.0, 1.0], [4, 5])[:, None] * np.ones(3)
    found = welch_tests(x, test, reference)
    expected = [-1.5806831048, -1.5806831048, -1.0888456521]
    np.testing.assert_allclose(found["statistic"][:, 0], expected, atol=1e-10)
    np.testing.assert_allclose(found["df"][:, 0], [6.8690005324, 6.8690005324, 6.2176857767], atol=1e-10)
    np.testing.assert_allclose(found["pvalue"][:, 0], [0.1587760580, 0.1587760580, 0.3166150144], atol=1e-10)
    np.testing.assert_allclose(found["n_eff"], [4, 4, 3.2190476], atol=1e-7)
    assert found["n_eff"][2] == pytest.approx(kish_effective_size([0.2, 0.5, 0.9, 1.0]))


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_one_test_after_the_other(variance: str, seed: int) -> None:
    found = check(*data(seed), variance)
    assert (found["pvalue"] < 0.99).mean() > 0.5


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_large_means_and_small_spreads_keep_their_digits(variance: str, size: float) -> None:
    x, test, reference = data(1)
    rng = np.random.default_rng(2)
    x[:, :10] = 7.0 * size * (1 + 1e-5 * rng.normal(size=(len(x), 10)))
    x[:, 10:15] = size * np.array([0.1, 0.3, 0.7, 1 / 3, 2.9])
    found = check(x, test, reference, variance, atol=1e-9)  # differences of the means keep no more
    assert (found["pvalue"][:, 10:15] == 1).all()
    assert (found["statistic"][:, 10:15] == 0).all()
    assert (found["pvalue"][:, :10] < 1).all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_nothing_to_test_is_one_and_never_nan(variance: str) -> None:
    x, test, reference = data()
    test[:, 0] = 0
    test[1:, 1], test[0, 1] = 0, 0.7
    reference[:, 2] = 0
    reference[:, 3] = np.arange(len(x)) == 5
    x[test[:, 4] > 0, :5] = 0
    x[:, 6] = 0
    x[test[:, 5] > 0, 7], x[reference[:, 5] > 0, 7] = 2.0, 0.1  # two constants
    found = check(x, test, reference, variance)
    assert all(np.isfinite(values).all() for values in found.values())
    assert (found["pvalue"][:4] == 1).all()
    assert (found["pvalue"][:, 6] == 1).all()
    assert found["pvalue"][5, 7] == 1
    assert found["n_eff"][0] == 0


@pytest.mark.parametrize("variance", ["reliability", "biased"])
@pytest.mark.parametrize("scale", [1e-300, 1e200])
def test_scale_of_the_weights_does_not_matter(variance: str, scale: float) -> None:
    x, test, reference = data()
    expected = welch_tests(x, test, reference, variance=variance)
    found = welch_tests(x, test * scale, reference * scale, variance=variance)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9, atol=1e-12)


def test_constant_gene_of_many_cells_with_equal_weights() -> None:
    """Running sums of 300,000 times .1 drift by far more than one rounding."""
    n = 300_000
    x = np.repeat([[0.3], [0.2]], [n, 5], axis=0)
    found = welch_tests(x, (np.arange(n + 5) < n)[:, None] * 0.1, (np.arange(n + 5) >= n)[:, None] * 1.0)
    assert found["pvalue"][0, 0] == 1


def test_input_is_not_changed_and_forms_do_not_matter() -> None:
    x, test, reference = data()
    doubled = sp.csr_matrix((np.r_[x[0], x[0]], np.r_[range(40), range(40)], [0, 80]), shape=(1, 40))
    stacked = sp.vstack([doubled * 0.5, sp.csr_matrix(x[1:])], format="csr")
    explicit = sp.csc_matrix(np.where(test > 0, test, 1e9))
    explicit.data[explicit.data == 1e9] = 0  # stored zeros
    before = stacked.copy(), explicit.copy()
    found = welch_tests(stacked, explicit, sp.csr_array(reference))
    for name, values in welch_tests(x, test, reference).items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9, atol=1e-12)
    for now, then in zip((stacked, explicit), before, strict=True):
        np.testing.assert_array_equal(now.data, then.data)
        np.testing.assert_array_equal(now.indices, then.indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, r: (x * np.nan, t, r), "`x` must hold finite"),
        (lambda x, t, r: (x, -t, r), "`test` must hold one weight, not negative"),
        (lambda x, t, r: (x, t, r * np.inf), "`reference` must hold finite"),
        (lambda x, t, r: (x[:9], t, r), "each of 9 cells"),
        (lambda x, t, r: (x, t, r[:, :2]), "received 7 and 2"),
    ],
)
def test_errors(change, message) -> None:
    x, test, reference = data()
    with np.errstate(invalid="ignore"):
        arguments = change(x, test, reference)
    with pytest.raises(ValueError, match=message):
        welch_tests(*arguments)
