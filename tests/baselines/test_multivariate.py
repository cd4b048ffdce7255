"""Multivariate shrinkage: the mathematics, calibration, degenerate screens, and the layers of its effects."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.special import logsumexp, ndtr
from scipy.stats import multivariate_normal

from scvi_cradle.baselines import MultivariateShrinkage
from scvi_cradle.baselines._covariance_mixture import (
    SCALES,
    Components,
    FullPrior,
    NoisyEffects,
    Sums,
    fit_prior,
    posterior,
    summarize,
)
from scvi_cradle.baselines._factor_mixture import FactorPrior
from scvi_cradle.baselines._multivariate import LARGEST_FULL, MAX_RANK, learn_prior, noisy_effects
from scvi_cradle.metrics import average_treatment_effects

WEIGHTS = np.array([0.2, 0.1, 0.2, 0.2, 0.1, 0.1, 0.1])


def draw(n_labels: int, n_genes: int, rank: int = 3, seed: int = 0) -> tuple[np.ndarray, NoisyEffects]:
    """Effects, genes first, and what is seen of them."""
    rng = np.random.default_rng(seed)
    loading, specific = rng.normal(scale=0.4, size=(n_labels, rank)), rng.gamma(2.0, 0.03, size=n_labels)
    scale = np.sqrt(rng.choice([0.03, 0.1, 0.3, 1.0, 3.0, 10.0], p=[0.3, 0.2, 0.2, 0.1, 0.1, 0.1], size=(n_genes, 1)))
    true = rng.normal(size=(n_genes, rank)) @ loading.T + rng.normal(size=(n_genes, n_labels)) * np.sqrt(specific)
    true = true * scale
    own, shared = rng.gamma(2.0, 0.05, size=true.shape), rng.gamma(2.0, 0.02, size=n_genes)
    error = rng.normal(size=true.shape) * np.sqrt(own) + rng.normal(size=(n_genes, 1)) * np.sqrt(shared)[:, None]
    return true, NoisyEffects(true + error, own, shared)


def random_priors(n_labels: int, rank: int = 2, seed: int = 3) -> tuple[FullPrior, FactorPrior]:
    """The same prior in both forms, without pseudo-genes."""
    rng = np.random.default_rng(seed)
    factor = FactorPrior(WEIGHTS, rng.normal(size=(n_labels, rank)), rng.gamma(2.0, 0.2, size=n_labels), 0.0)
    return FullPrior(WEIGHTS, factor.covariance, 0.0), factor


def dense(covariance: np.ndarray, e: NoisyEffects, gene: int) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Log marginal likelihood, posterior weights, means and covariances of one gene by the textbook."""
    r, n_labels = e.raw[gene], e.raw.shape[1]
    noise = np.diag(e.own[gene]) + e.shared[gene] * np.ones((n_labels, n_labels))
    log_joint, means, covariances = [], [], []
    for weight, scale in zip(WEIGHTS, SCALES, strict=True):
        gain = scale * covariance @ np.linalg.inv(scale * covariance + noise)
        log_joint.append(np.log(weight) + multivariate_normal(cov=scale * covariance + noise).logpdf(r))
        means.append(gain @ r)
        covariances.append(scale * covariance - gain @ covariance * scale)
    evidence = logsumexp(log_joint)
    return float(evidence), np.exp(np.array(log_joint) - evidence), np.array(means), np.array(covariances)


# ---- mathematics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [0, 1], ids=["full", "factors"])
def test_posterior_equals_the_dense_computation(form) -> None:
    _, e = draw(4, 7)
    e.shared[2] = 0.0
    prior = random_priors(4)[form]
    sums = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]])
    parts = prior.components(e, Sums.create([np.flatnonzero(row) for row in sums]))
    total = 0.0
    for gene in range(7):
        evidence, gamma, means, covariances = dense(random_priors(4)[0].covariance, e, gene)
        total += evidence
        np.testing.assert_allclose(parts.weights[gene], gamma, rtol=1e-8)
        np.testing.assert_allclose(parts.mean[gene], means @ sums.T, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(parts.variance[gene], np.einsum("si,kij,sj->ks", sums, covariances, sums), rtol=1e-8)
    np.testing.assert_allclose(prior.update(e)[1], total, rtol=1e-10)


def test_one_round_of_em_equals_the_dense_computation() -> None:
    _, e = draw(4, 9)
    prior, _ = random_priors(4)
    moments, weights = np.zeros((4, 4)), np.zeros(len(SCALES))
    for gene in range(9):
        _, gamma, means, covariances = dense(prior.covariance, e, gene)
        weights += gamma / 9
        moments += np.einsum("k,kij->ij", gamma / SCALES, covariances + means[:, :, None] * means[:, None, :]) / 9
    updated, _ = prior.update(e)
    np.testing.assert_allclose(updated.weights, weights, rtol=1e-8)
    np.testing.assert_allclose(updated.covariance, moments, rtol=1e-8)
    held_down, _ = replace(prior, pseudo_genes=1.0).update(e)
    np.testing.assert_allclose(held_down.covariance, 0.9 * moments + 0.1 * np.diag(np.diag(moments)), rtol=1e-8)


@pytest.mark.parametrize("start", [FullPrior.start, lambda e: FactorPrior.start(e, 2)], ids=["full", "factors"])
def test_likelihood_never_falls(start) -> None:
    _, e = draw(6, 60)
    exact, held_down, values, others = replace(start(e), pseudo_genes=0.0), start(e), [], []
    for _ in range(40):
        exact, value = exact.update(e)
        held_down, other = held_down.update(e)
        values.append(value)
        others.append(other)
    assert (np.diff(values) > -1e-8).all()
    assert values[-1] > values[0] + 10
    gain = others[-1] - others[0]
    assert gain > 10
    assert np.diff(others).min() > -0.01 * gain  # what the pseudo-gene takes


def test_both_forms_climb_to_the_same_likelihood() -> None:
    """Where the factors can express any covariance."""
    _, e = draw(4, 200)
    full, factor = (replace(p, pseudo_genes=0.0) for p in (FullPrior.start(e), FactorPrior.start(e, 4)))
    gain = -full.update(e)[1]
    full, factor = fit_prior(full, e, 200), fit_prior(factor, e, 200)
    gain += full.update(e)[1]
    assert abs(factor.update(e)[1] - full.update(e)[1]) < 0.01 * gain


def test_pseudo_genes_keep_the_variances() -> None:
    _, e = draw(6, 30)
    for start in (FullPrior.start(e), FactorPrior.start(e, 2)):
        free, held = (replace(start, pseudo_genes=p).update(e)[0].covariance for p in (0.0, 6.0))
        np.testing.assert_allclose(np.diag(held), np.diag(free))
        off = ~np.eye(6, dtype=bool)
        np.testing.assert_allclose(held[off], free[off] * 30 / 36)


def test_equal_variances_shrink_along_the_axes_of_the_covariance() -> None:
    _, e = draw(5, 6)
    e = NoisyEffects(e.raw, np.full_like(e.own, 0.3), np.zeros(6))
    prior, _ = random_priors(5)
    values, axes = np.linalg.eigh(prior.covariance)
    parts = prior.components(e, Sums.create([[i] for i in range(5)]))
    for k, w in enumerate(SCALES):
        shrunken = (e.raw @ axes) * (w * values / (w * values + 0.3)) @ axes.T
        np.testing.assert_allclose(parts.mean[:, k], shrunken, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(
            parts.variance[:, k], np.tile(axes**2 @ (w * values * 0.3 / (w * values + 0.3)), (6, 1)), rtol=1e-8
        )


def test_one_common_effect_is_averaged_over_labels_but_the_control_error_is_not() -> None:
    """For ``U = s 11'`` the estimate is the mean over labels times ``ws / (ws + v/T + v0)``."""
    raw = np.array([[1.0, 2.0, 0.5, 0.1]])
    e = NoisyEffects(raw, np.full((1, 4), 0.4), np.array([0.2]))
    for prior in (
        FullPrior(WEIGHTS, 0.7 * np.ones((4, 4))),
        FactorPrior(WEIGHTS, np.sqrt(0.7) * np.ones((4, 1)), np.zeros(4)),
    ):
        parts = prior.components(e, Sums.create([[0], [3]]))
        expected = raw.mean() * SCALES * 0.7 / (SCALES * 0.7 + 0.1 + 0.2)
        np.testing.assert_allclose(parts.mean[0], np.stack([expected] * 2, axis=1), rtol=1e-7)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_label(rank) -> None:
    _, e = draw(1, 400, rank=1)
    prior = learn_prior(e, rank)
    variance = float(prior.covariance[0, 0])
    noise = (e.own[:, 0] + e.shared)[:, None]
    total = SCALES * variance + noise
    log_joint = np.log(prior.weights) - 0.5 * (np.log(total) + e.raw**2 / total)
    gamma = np.exp(log_joint - logsumexp(log_joint, axis=1, keepdims=True))
    expected = (gamma * SCALES * variance / total).sum(1) * e.raw[:, 0]
    np.testing.assert_allclose(posterior(prior, e, Sums.create([[0]])).mean[0], expected, rtol=1e-7)


def test_summary_of_a_mixture() -> None:
    weights, mean, variance = np.array([[0.3, 0.7]]), np.array([[[1.0], [-2.0]]]), np.array([[[0.25], [4.0]]])
    result = summarize(Components(weights, mean, variance))
    np.testing.assert_allclose(result.mean, [[-1.1]])
    np.testing.assert_allclose(result.std**2, [[0.3 * 1.25 + 0.7 * 8.0 - 1.1**2]])
    up = 0.3 * ndtr(2.0) + 0.7 * ndtr(-1.0)
    np.testing.assert_allclose(result.lfsr, [[min(up, 1 - up)]])
    known = summarize(Components(np.ones((1, 1)), np.array([[[0.0, 2.0]]]), np.zeros((1, 1, 2))))
    np.testing.assert_array_equal(known.lfsr[:, 0], [1.0, 0.0])
    np.testing.assert_array_equal(known.std, 0.0)


# ---- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 3])
def test_posterior_is_calibrated_on_its_own_model(rank) -> None:
    true, e = draw(12, 600)
    prior = learn_prior(e, rank)
    each = Sums.create([[i] for i in range(12)])
    parts = prior.components(e, each)
    below = (parts.weights[:, :, None] * ndtr((true[:, None] - parts.mean) / np.sqrt(parts.variance))).sum(1)
    for level in (0.5, 0.8, 0.95):
        assert abs((np.abs(below - 0.5) < level / 2).mean() - level) < 0.025
    result = posterior(prior, e, each)
    wrong = np.sign(result.mean) != np.sign(true.T)
    for low, high in ((0.0, 0.05), (0.05, 0.2), (0.2, 0.5)):
        group = (result.lfsr >= low) & (result.lfsr < high)
        assert group.sum() > 200
        assert abs(result.lfsr[group].mean() - wrong[group].mean()) < 0.025
    raw_error, error = (np.mean((x - true) ** 2) for x in (e.raw, result.mean.T))
    assert error < 0.5 * raw_error


def test_few_factors_are_as_good_as_any_covariance() -> None:
    true, e = draw(30, 300)
    each = Sums.create([[i] for i in range(30)])
    full, factors = (posterior(learn_prior(e, rank), e, each).mean.T for rank in (0, 10))
    assert np.mean((factors - true) ** 2) < 1.05 * np.mean((full - true) ** 2)
    assert np.corrcoef(full.ravel(), factors.ravel())[0, 1] > 0.995


def test_form_follows_the_number_of_labels() -> None:
    assert isinstance(learn_prior(draw(3, 10)[1], None), FullPrior)
    many = learn_prior(draw(LARGEST_FULL + 1, 20)[1], None)
    assert isinstance(many, FactorPrior)
    assert many.loading.shape == (LARGEST_FULL + 1, MAX_RANK)
    assert learn_prior(draw(3, 10)[1], 7).loading.shape == (3, 3)


def test_blocks_of_genes_change_nothing(monkeypatch) -> None:
    _, e = draw(5, 30)
    each = Sums.create([[i] for i in range(5)])
    for rank in (0, 2):
        whole = posterior(learn_prior(e, rank), e, each)
        monkeypatch.setattr("scvi_cradle.baselines._covariance_mixture.BLOCK", 90)
        blocks = posterior(learn_prior(e, rank), e, each)
        monkeypatch.undo()
        for a, b in zip(whole, blocks, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


# ---- from cells -------------------------------------------------------------------------------------------------------


def make_cells(n_per_label, seed: int = 0, n_genes: int = 60) -> ad.AnnData:
    """Counts of ``ctrl`` and treatments; genes 0 to 9 are never seen, gene 10 is seen in ``A`` only."""
    rng = np.random.default_rng(seed)
    names = np.repeat(list(n_per_label), list(n_per_label.values()))
    rate = np.random.default_rng(1).gamma(1.0, 3.0, size=n_genes) * np.ones((len(names), 1))
    for i, t in enumerate("ABC"):
        rate[np.ix_([t in name for name in names], 20 + 10 * i + np.arange(10))] *= 2.0 ** (1.2, -1.5, 0.9)[i]
    rate[:, :10] = 0.0
    rate[:, 10] = np.where(names == "A", 1.0, 0.0)
    obs = pd.DataFrame({"perturbation": names}, index=[f"c{i}" for i in range(len(names))])
    return ad.AnnData(rng.poisson(rate).astype(np.float32), obs=obs)


def fit(n_per_label, **kwargs) -> MultivariateShrinkage:
    return MultivariateShrinkage(**kwargs).fit(make_cells(n_per_label), "perturbation", control="ctrl")


def test_noise_by_hand() -> None:
    cells = make_cells({"ctrl": 30, "A": 20, "B": 40})
    raw = average_treatment_effects(cells, "perturbation", control="ctrl")
    varies, e = noisy_effects(raw)
    x = np.log2(1 + 1e4 * cells.X / cells.X.sum(1, keepdims=True))
    label = cells.obs["perturbation"].to_numpy()
    s0 = x[label == "ctrl"].var(0, ddof=1)
    own = (20 * x[label == "A"].var(0, ddof=1) + 50 * s0) / 70 / 20
    np.testing.assert_array_equal(varies, np.asarray(cells.X.sum(0)).ravel() > 0)
    assert varies[10]
    assert not varies[:10].any()
    np.testing.assert_allclose(e.own[:, 0], own[varies], rtol=1e-4)
    np.testing.assert_allclose(e.shared, s0[varies] / 30, rtol=1e-4)
    np.testing.assert_allclose(e.raw, raw.X[:, varies].T)
    assert (e.own > 0).all()  # gene 10, which neither B nor the control shows, too


def test_layers() -> None:
    model = fit({"ctrl": 80, "A": 60, "B": 60, "C": 60, "A+C": 60})
    effects = model.get_average_treatment_effects(["C", "ctrl", "B+A", "A+C", "A", "B"])
    assert set(effects.layers) - {None} == {"std", "lfsr"}
    std, lfsr = effects.layers["std"], effects.layers["lfsr"]
    for table in (effects.X, std, lfsr):
        assert np.isfinite(table).all()
    np.testing.assert_array_equal(effects.X[1], 0.0)
    np.testing.assert_array_equal(std[1], 0.0)
    np.testing.assert_array_equal(lfsr[1], 1.0)
    np.testing.assert_array_equal(lfsr[:, :10], 1.0)  # never seen
    others = [0, 2, 3, 4, 5]
    assert (std[others, 10:] > 0).mean() > 0.9
    assert (lfsr[others][std[others] > 0] <= 0.5).all()
    strong = np.abs(effects.X[others]) > 5 * std[others]
    assert strong[:, 10:].any()
    assert (lfsr[others][strong] < 1e-3).all()
    np.testing.assert_allclose(effects.X[2], effects.X[4] + effects.X[5])
    posterior_ = model._posterior([[list(model._raw.obs_names).index(x) for x in "AB"]])
    np.testing.assert_allclose(std[2], posterior_.std[0])
    np.testing.assert_allclose(effects.X[2], posterior_.mean[0], atol=1e-12)


def test_deviation_of_a_pair_uses_the_covariance_of_its_singles() -> None:
    """The control's error is in both singles, so that it counts four times in the variance of their sum."""
    e = NoisyEffects(np.zeros((1, 2)), np.full((1, 2), 1e-6), np.array([0.5]))
    prior = FullPrior(WEIGHTS, 1e6 * np.eye(2))  # the prior says nothing
    result = posterior(prior, e, Sums.create([[0], [0, 1]]))
    np.testing.assert_allclose(result.std[:, 0] ** 2, [0.5, 2.0], rtol=1e-3)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    "n_per_label",
    [
        pytest.param({"ctrl": 30, "A": 30}, id="one label"),
        pytest.param({"ctrl": 30, "A": 1, "B": 1}, id="labels of one cell"),
        pytest.param({"ctrl": 1, "A": 30, "B": 1}, id="one control"),
        pytest.param({"ctrl": 2, "A": 1}, id="three cells"),
    ],
)
def test_small_screens_give_finite_answers(n_per_label, rank) -> None:
    effects = fit(n_per_label, rank=rank).get_average_treatment_effects()
    for table in (effects.X, effects.layers["std"], effects.layers["lfsr"]):
        assert np.isfinite(table).all()
    assert (effects.layers["std"] >= 0).all()


@pytest.mark.parametrize("rank", [0, 2])
def test_screens_where_nothing_varies(rank) -> None:
    cells = make_cells({"ctrl": 20, "A": 20, "B": 20})
    cells.X[:] = 3.0
    effects = MultivariateShrinkage(rank).fit(cells, "perturbation", control="ctrl").get_average_treatment_effects()
    np.testing.assert_array_equal(effects.X, 0.0)
    np.testing.assert_array_equal(effects.layers["std"], 0.0)
    cells.X[:] = np.tile(np.arange(20)[:, None] % 2 + 1.0, (3, 60))  # totals vary, shares do not
    cells.X[:, 0] = np.tile(np.arange(20) % 3, 3)  # the same in every label: all effects are 0
    effects = MultivariateShrinkage(rank).fit(cells, "perturbation", control="ctrl").get_average_treatment_effects()
    np.testing.assert_allclose(effects.X, 0.0, atol=1e-12)
    assert np.isfinite(effects.layers["std"]).all()


def test_variances_must_be_known() -> None:
    with pytest.raises(ValueError, match="at least two cells; received single cells only"):
        fit({"ctrl": 1, "A": 1, "B": 1})


@pytest.mark.parametrize("rank", [-1, 1.5, True])
def test_rank_is_an_integer(rank) -> None:
    with pytest.raises(ValueError, match="`rank` must be a non-negative integer"):
        MultivariateShrinkage(rank)


def test_closer_to_the_truth_than_raw_effects() -> None:
    few = fit({"ctrl": 100, "A": 15, "B": 15, "C": 15}).get_average_treatment_effects().X
    sizes = {"ctrl": 100, "A": 15, "B": 15, "C": 15}
    raw = average_treatment_effects(make_cells(sizes), "perturbation", control="ctrl").X
    large = dict.fromkeys(sizes, 3000)
    true = average_treatment_effects(make_cells(large, seed=9), "perturbation", control="ctrl").X
    assert np.mean((few - true) ** 2) < 0.8 * np.mean((raw - true) ** 2)
