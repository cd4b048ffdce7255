from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

from scvi_cradle.baselines._shift import CountShifter, mean_log_of_poisson


def log_mean(cells: sp.csr_matrix) -> np.ndarray:
    x = cells.toarray().astype(float)
    return np.log2(1 + 1e4 * x / x.sum(axis=1, keepdims=True)).mean(axis=0)


@pytest.mark.parametrize("mean", [1e-4, 0.3, 5.0, 49.0, 51.0, 400.0])
def test_mean_log_of_poisson_is_the_expectation(mean) -> None:
    counts = np.arange(2000)
    expected = stats.poisson.pmf(counts, mean) @ np.log2(1 + 1e4 * counts / 3000.0)
    np.testing.assert_allclose(mean_log_of_poisson(np.array([mean]), 3000.0)[0], expected, rtol=2e-4)


@pytest.mark.parametrize("dispersion", [None, 1.0], ids=["poisson", "overdispersed"])
def test_generated_counts_show_the_effect(dispersion) -> None:
    rng = np.random.default_rng(0)
    n_cells, n_genes = 4000, 80
    rate = rng.gamma(0.5, 4.0, size=n_genes) * rng.lognormal(0, 0.3, size=(n_cells, 1))
    if dispersion:
        rate = rate * rng.gamma(1 / dispersion, dispersion, size=rate.shape)
    controls = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    effect = np.zeros(n_genes)
    effect[::4] = rng.normal(scale=0.8, size=20)
    base = log_mean(controls)
    effect = np.maximum(effect, -0.9 * base)
    shifted = CountShifter(base, controls).apply(controls, effect, rng)
    seen = log_mean(shifted) - base
    assert np.corrcoef(seen, effect)[0, 1] > 0.97
    np.testing.assert_allclose(seen @ effect / (effect @ effect), 1.0, atol=0.1 if dispersion is None else 0.15)


def test_no_effect_changes_nothing_and_a_large_fall_empties_a_gene() -> None:
    rng = np.random.default_rng(0)
    controls = sp.csr_matrix(rng.poisson(3.0, size=(50, 4)).astype(np.float32))
    shifter = CountShifter(log_mean(controls), controls)
    assert (shifter.apply(controls, np.zeros(4), rng) != controls).nnz == 0
    before = controls.copy()
    out = shifter.apply(controls, np.array([-100.0, 0, 0, 0]), rng)
    assert out[:, 0].nnz == 0
    assert (out[:, 1:] != controls[:, 1:]).nnz == 0
    assert (controls != before).nnz == 0


def test_a_gene_that_controls_lack_can_appear() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(5.0, size=(2000, 5)).astype(np.float32)
    counts[:, 0] = 0
    controls = sp.csr_matrix(counts)
    out = CountShifter(log_mean(controls), controls).apply(controls, np.array([1.0, 0, 0, 0, 0]), rng)
    np.testing.assert_allclose(log_mean(out)[0], 1.0, atol=0.1)


def test_empty_controls() -> None:
    controls = sp.csr_matrix((3, 2), dtype=np.float32)
    out = CountShifter(np.zeros(2), controls).apply(controls, np.array([1.0, -1.0]), np.random.default_rng(0))
    assert out.shape == (3, 2)
    assert out.nnz == 0
