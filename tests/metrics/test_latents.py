"""Masks and latents against the truth: published numbers, invariances, and what breaks them."""

from __future__ import annotations

from itertools import permutations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from scvi_cradle.metrics import block_r2, mask_f1, mean_correlation_coefficient

TRUE = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 0]])
ESTIMATED = np.array([[0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 1, 1]])


@pytest.fixture
def z() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((400, 3))


# ---------------------------------------------------------------------------------------------------- masks


def test_mask_f1_published_numbers() -> None:
    assert mask_f1(TRUE, ESTIMATED) == {"precision": 0.8, "recall": 0.8, "f1": 0.8}


def test_mask_f1_is_the_best_of_all_orders() -> None:
    rng = np.random.default_rng(1)
    true, estimated = rng.random((9, 4)) < 0.4, rng.random((9, 4)) < 0.3
    hits = max((true & estimated[:, list(order)]).sum() for order in permutations(range(4)))
    score = mask_f1(true, estimated)
    assert score["precision"] == pytest.approx(hits / estimated.sum())
    assert score["recall"] == pytest.approx(hits / true.sum())
    assert score["f1"] == pytest.approx(stats.hmean([score["precision"], score["recall"]]))


def test_probabilities_above_one_half_are_ones() -> None:
    assert mask_f1(TRUE, np.where(ESTIMATED, 0.51, 0.5)) == mask_f1(TRUE, ESTIMATED)
    assert mask_f1(TRUE, np.full(TRUE.shape, 0.5)) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_latents_without_a_partner_count() -> None:
    wide = np.hstack([TRUE, np.ones((4, 1), dtype=int)])
    assert mask_f1(TRUE, wide) == pytest.approx({"precision": 5 / 9, "recall": 1.0, "f1": 10 / 14})
    assert mask_f1(wide, TRUE) == pytest.approx({"precision": 1.0, "recall": 5 / 9, "f1": 10 / 14})


def test_named_masks_are_matched_by_name() -> None:
    names = ["a", "b", "c", "d"]
    true = pd.DataFrame(TRUE.astype(bool), index=names)
    effects = ad.AnnData(np.zeros((4, 3)), obs=pd.DataFrame(index=names), layers={"mask_prob": ESTIMATED * 0.9})
    turned = effects[[2, 0, 3, 1]].copy()
    assert mask_f1(true, turned) == mask_f1(TRUE, ESTIMATED)
    assert mask_f1(true, turned.layers["mask_prob"]) != mask_f1(TRUE, ESTIMATED)
    with pytest.raises(ValueError, match="must hold the same treatments; received 'd' in one"):
        mask_f1(true, effects[:3].copy())
    del effects.layers["mask_prob"]
    with pytest.raises(KeyError, match=r"must hold the layer 'mask_prob'.*get_perturbation_effects"):
        mask_f1(true, effects)


def test_assignment_by_latents_keeps_the_sign(z) -> None:
    mask = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]])
    turned = [2, 0, 1]
    assert mask_f1(mask, mask[:, turned], assignment=(z[:, turned], z))["f1"] == 1.0
    assert mask_f1(mask, mask, assignment=(z[:, turned], z))["f1"] == 0.0
    assert mask_f1(mask, mask)["f1"] == 1.0
    # both latents mirrored: the signed matching swaps them, so nothing is found
    assert mask_f1(mask[:, :2], mask[:, :2], assignment=(-z[:, :2], z[:, :2]))["f1"] == 0.0


# ---------------------------------------------------------------------------------------------------- latents


def test_mcc_published_case(z) -> None:
    estimated = np.stack([-2 * z[:, 2], z[:, 0] + 1, 0.5 * z[:, 1]], axis=1)
    assert mean_correlation_coefficient(estimated, z) == pytest.approx(1.0)
    assert mean_correlation_coefficient(estimated[:, [0, 1]], z) == pytest.approx(2 / 3)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_mcc_is_the_best_of_all_orders(method) -> None:
    rng = np.random.default_rng(2)
    truth = rng.standard_normal((60, 4))
    estimated = np.round(truth @ rng.standard_normal((4, 4)) + rng.standard_normal((60, 4)), 1)
    function = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[method]
    size = np.abs([[function(truth[:, j], estimated[:, k])[0] for k in range(4)] for j in range(4)])
    best = max(size[np.arange(4), list(order)].mean() for order in permutations(range(4)))
    assert mean_correlation_coefficient(estimated, truth, method=method) == pytest.approx(best, abs=1e-12)


def test_mcc_sees_rotations_and_spearman_ignores_monotone_maps(z) -> None:
    half = np.array([[1, 1, 0], [-1, 1, 0], [0, 0, np.sqrt(2)]]) / np.sqrt(2)
    assert mean_correlation_coefficient(z @ half, z) == pytest.approx((2 / np.sqrt(2) + 1) / 3, abs=0.03)
    assert mean_correlation_coefficient(np.exp(3 * z), z, method="spearman") == pytest.approx(1.0)
    assert mean_correlation_coefficient(np.exp(3 * z), z) < 0.7


def test_mcc_of_constant_and_unrelated_latents(z) -> None:
    assert mean_correlation_coefficient(np.ones_like(z), z) == 0.0
    noise = np.random.default_rng(3).standard_normal((400, 3))
    assert 0.0 < mean_correlation_coefficient(noise, z) < 0.15


def test_block_r2_of_linear_maps_and_noise(z) -> None:
    rng = np.random.default_rng(4)
    turned = z @ rng.standard_normal((3, 3)) + 2.0
    train, test = slice(0, 300), slice(300, 400)
    assert block_r2(turned[train], z[train], turned[test], z[test]) == pytest.approx(1.0)
    noise = rng.standard_normal((400, 3))
    assert -0.2 < block_r2(noise[train], z[train], noise[test], z[test]) < 0.05


def test_block_r2_by_hand() -> None:
    # the line through the training cells is 2 z + 1 for the first latent, 0 for the second
    z_train, truth_train = np.array([[0.0], [1.0]]), np.array([[1.0, 0.0], [3.0, 0.0]])
    z_test, truth_test = np.array([[2.0], [3.0]]), np.array([[5.0, -1.0], [9.0, 1.0]])
    assert block_r2(z_train, truth_train, z_test, truth_test) == pytest.approx(((1 - 4 / 8) + (1 - 2 / 2)) / 2)


def test_truth_of_the_training_cells_is_not_scored(z) -> None:
    wide = np.random.default_rng(5).standard_normal((400, 60))
    train, test = slice(0, 80), slice(80, 400)
    assert block_r2(wide[train], z[train], wide[train], z[train]) > 0.5
    assert block_r2(wide[train], z[train], wide[test], z[test]) < -0.5


# ---------------------------------------------------------------------------------------------------- bad input

ONES = np.ones((4, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mask_f1(TRUE, TRUE[:3]), ValueError, "same treatments; received 4 and 3 rows"),
        (lambda: mask_f1(TRUE, 2 * TRUE), ValueError, "`mask_estimated` must hold a mask .* from 0.0 to 2.0"),
        (lambda: mask_f1(TRUE[0], TRUE), ValueError, r"`mask_true` must be a matrix .* shape \(3,\)"),
        (lambda: mask_f1(TRUE, TRUE * np.nan), ValueError, "`mask_estimated` must be finite"),
        (
            lambda: mask_f1(pd.DataFrame(TRUE, index=list("aabc")), TRUE),
            ValueError,
            "Treatment names must be unique; received 1",
        ),
        (lambda: mask_f1(TRUE, TRUE, assignment=TRUE), TypeError, r"tuple \(latent, truth\)"),
        (lambda: mask_f1(TRUE, TRUE, assignment=(ONES, ONES)), ValueError, "here 3 and 3; received 2 and 2"),
        (
            lambda: mask_f1(TRUE, TRUE, assignment=(TRUE, TRUE[:2])),
            ValueError,
            r"`assignment\[0\]` and `assignment\[1\]` must hold the same cells.* 4 and 2",
        ),
        (lambda: mean_correlation_coefficient(ONES, ONES[:3]), ValueError, "received 4 and 3 rows"),
        (lambda: mean_correlation_coefficient(ONES[:1], ONES[:1]), ValueError, "at least two"),
        (
            lambda: mean_correlation_coefficient(ONES, ONES, method="kendall"),
            ValueError,
            "`method` must be one of 'pearson'",
        ),
        (lambda: block_r2(ONES, ONES, ONES, ONES[:2]), ValueError, "`z_test` and `truth_test` must hold the same"),
        (lambda: block_r2(ONES, ONES, TRUE, ONES), ValueError, "`z_train` and `z_test` .* received 2 and 3 columns"),
        (lambda: block_r2(ONES, ONES, ONES, TRUE), ValueError, "`truth_train` and `truth_test` .* 2 and 3 columns"),
    ],
)
def test_bad_inputs(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
