"""Linear discriminants with a mixture of two normals: closed forms, calibration, folds, nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import brier_score_loss, roc_auc_score

from scvi_cradle.train import fit_discriminants
from scvi_cradle.train._classifiers import top_half_gap
from scvi_cradle.train._discriminants import _direction, _folds, _weakened, two_normals


def mixture(n, share, shift, d=20, n_controls=1_000, seed=0):
    """Latents of labelled cells and controls, which labelled cells moved, and their positions."""
    rng = np.random.default_rng(seed)
    moved = rng.random(n) < share
    z = rng.normal(size=(n + n_controls, d))
    z[:n][moved, :4] += shift
    return z, moved, np.arange(n), np.arange(n, n + n_controls)


def test_screening_compares_top_halves():
    gap = top_half_gap(np.array([0.9, 0.8, 0.2, 0.1, 0.6]), np.array([0.3, 0.1, 0.2, 0.05]))
    assert gap == pytest.approx(0.7666666667 - 0.25, abs=1e-9)


@pytest.mark.parametrize(("share", "mean"), [(0.3, 3.0), (0.7, 2.0), (0.5, 4.0)])
def test_the_mixture_is_recovered(share, mean):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=20_000) + mean * (rng.random(20_000) < share)
    found = two_normals(scores)
    assert found[0] == pytest.approx(share, abs=0.02)
    assert found[1] == pytest.approx(mean, abs=0.06)


def test_the_mixture_is_a_maximum_of_its_penalised_likelihood():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=400) + 2 * (rng.random(400) < 0.4)

    def objective(share, mean):
        return np.log1p(-share + share * np.exp(mean * scores - mean**2 / 2)).sum() + np.log(share * (1 - share))

    share, mean, _ = two_normals(scores)
    best = objective(share, mean)
    for other in ((share + 0.01, mean), (share - 0.01, mean), (share, mean + 0.02), (share, mean - 0.02)):
        assert objective(*other) < best


def test_the_mean_never_falls_below_that_of_controls():
    share, mean, _ = two_normals(np.random.default_rng(0).normal(-1.0, 1.0, 500))
    assert mean == 0.0
    assert 0 < share < 1


def test_a_product_of_probabilities_in_log_odds():
    a, b = np.array([-30.0, 0.0, 3.0, 60.0]), 1.2
    np.testing.assert_allclose(expit(_weakened(a, b)), expit(a) * expit(b), rtol=1e-9)
    assert np.isfinite(_weakened(np.array([800.0, -800.0]), 800.0)).all()


def test_the_direction_does_not_depend_on_the_share_of_moved_cells():
    def angle(share):
        z, _, labelled, controls = mixture(20_000, share, 1.0, d=6, n_controls=20_000)
        w = _direction(z[labelled], z[controls])
        return w[:4].sum() / (2 * np.linalg.norm(w))  # cosine with the true direction

    assert angle(0.2) > 0.97
    assert angle(0.8) > 0.99


def test_probabilities_are_those_of_bayes_for_normal_classes():
    z, moved, labelled, controls = mixture(2_000, 0.4, 1.0, n_controls=4_000)
    fit = fit_discriminants(z, [labelled], [controls])
    p = expit(fit.unlabeled_logits[0])
    oracle = expit(logit(0.4) + (z[:2_000, :4] - 0.5).sum(1))  # shift of 1 in four dimensions
    assert roc_auc_score(moved, p) > roc_auc_score(moved, oracle) - 0.01
    assert brier_score_loss(moved, p) < brier_score_loss(moved, oracle) + 0.005
    assert fit.prevalence[0] == pytest.approx(0.4, abs=0.05)
    assert fit.calibrated[0]
    for low, high in ((0.1, 0.4), (0.4, 0.7), (0.7, 1.0)):
        inside = (p >= low) & (p < high)
        assert moved[inside].mean() == pytest.approx(p[inside].mean(), abs=0.08)


def test_few_cells_of_many_dimensions_are_not_learnt_by_heart():
    z, moved, labelled, controls = mixture(200, 0.5, 1.2, d=50)
    fit = fit_discriminants(z, [labelled], [controls])
    assert roc_auc_score(moved, fit.unlabeled_logits[0]) > 0.85


def test_where_nothing_differs_nothing_is_kept():
    z, _, labelled, controls = mixture(200, 0.0, 0.0, d=50, n_controls=6_000)
    rng = np.random.default_rng(0)
    sets = [rng.choice(controls, 150, replace=False) for _ in range(40)]
    fit = fit_discriminants(z, sets, [np.setdiff1d(controls, s)[:1_500] for s in sets])
    assert (fit.gap < 0.15).all()
    assert (fit.prevalence < 0.1).mean() > 0.9


def test_cells_are_scored_by_directions_that_never_saw_them():
    z, _, labelled, controls = mixture(100, 0.0, 0.0, d=60, n_controls=200)
    fit = fit_discriminants(z, [labelled], [controls])  # in the sample 60 dimensions separate 100 from 200 cells
    in_sample = z @ _direction(z[labelled], z[controls])
    assert roc_auc_score(np.arange(300) < 100, in_sample) > 0.7
    out = np.concatenate([fit.unlabeled_logits[0], fit.negative_logits[0]])
    assert abs(roc_auc_score(np.arange(300) < 100, out) - 0.5) < 0.12


def test_folds_hold_whole_groups_and_all_cells():
    rng = np.random.default_rng(0)
    groups = np.repeat(["a", "b", "c", "d", "e"], [50, 30, 20, 10, 5])
    fold = _folds(115, 3, groups, rng)
    assert all(len(set(fold[groups == g])) == 1 for g in "abcde")
    assert set(fold) == {0, 1, 2}
    assert sorted(np.bincount(_folds(10, 4, None, rng))) == [2, 2, 3, 3]
    one_group = _folds(10, 4, np.zeros(10), rng)
    assert set(one_group) == {0, 1, 2, 3}


def test_seeds_and_small_categories():
    z, _, labelled, controls = mixture(100, 0.5, 1.0)
    first, again = (fit_discriminants(z, [labelled, labelled[:3]], [controls, controls], seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.unlabeled_logits[0], again.unlabeled_logits[0])
    other = fit_discriminants(z, [labelled], [controls], seed=4)
    assert (first.unlabeled_logits[0] != other.unlabeled_logits[0]).any()
    assert not first.calibrated[1]
    assert np.isfinite(first.unlabeled_logits[1]).all()
    constant = np.zeros((30, 4))
    assert np.isfinite(fit_discriminants(constant, [np.arange(10)], [np.arange(10, 30)]).unlabeled_logits[0]).all()
