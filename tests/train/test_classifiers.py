"""Many classifiers at once: their gradients, calibration, folds, and that heads do not feel each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from scvi_cradle.module.base import ClassifierBank, nnnu_risk
from scvi_cradle.train import ClassifierSettings, fit_classifiers, score
from scvi_cradle.train import _classifiers as classifiers_module
from scvi_cradle.train._classifier_heads import Head, blocks, evaluate, padded_rows, risk_gradient, train_block

SHORT = ClassifierSettings(max_steps=100, check_every=20, patience=40)


def sigmoid(g):
    return 1.0 / (1.0 + np.exp(-g))


def gap(fit, category):
    """Mean of the top half of the probabilities of unlabeled cells, minus that of controls."""
    halves = [np.sort(sigmoid(g))[::-1] for g in (fit.unlabeled_logits[category], fit.negative_logits[category])]
    upper = [p[: -(-len(p) // 2)].mean() for p in halves]
    return upper[0] - upper[1]


def screen(sizes, n_negative=100, d=5, shift=0.0, seed=0):
    """Categories with controls of their own; a shift moves the unlabeled cells of every category."""
    rng = np.random.default_rng(seed)
    parts, unlabeled, negative, start = [], [], [], 0
    for k, size in enumerate(sizes):
        u, v = rng.normal(size=(size, d)), rng.normal(size=(n_negative, d))
        u[:, 0] += np.broadcast_to(shift, len(sizes))[k]
        parts += [u, v]
        unlabeled.append(np.arange(start, start + size))
        negative.append(np.arange(start + size, start + size + n_negative))
        start += size + n_negative
    z = np.concatenate(parts).astype(np.float32)
    return z, unlabeled, negative, rng.random(len(z)) < 0.8


@pytest.fixture
def trained_on(monkeypatch):
    """Every head that was trained, beside what came of it."""
    seen = []

    def recording(z, heads, settings, seed):
        fitted = train_block(z, heads, settings, seed)
        seen.extend(zip(heads, fitted, strict=True))
        return fitted

    monkeypatch.setattr(classifiers_module, "train_block", recording)
    return seen


@pytest.mark.parametrize("correction", ["clamp", "ascent"])
def test_the_gradient_is_that_of_the_risk(correction):
    z, unlabeled, negative, _ = screen([7, 12, 3, 9], n_negative=6)
    rows = padded_rows(z, list(zip(unlabeled, negative, strict=True)), [(np.zeros(5), np.ones(5))] * 4)
    bank = ClassifierBank(4, 5, 6, dropout=0.5, generators=[torch.Generator().manual_seed(i) for i in range(4)])
    with torch.no_grad():
        bank.weights.mul_(4.0)
        bank.weights[1, -1] = 9.0  # a negative bracket
    prevalence = torch.tensor([0.3, 0.1, 0.9, 0.5])
    mask = (torch.rand(rows.z.shape[1], 6, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    h = torch.relu(rows.z[..., :-1] @ bank.hidden[:, :-1] + bank.hidden[:, -1:]) * mask / 0.5
    g = (h @ bank.output[:, :-1, None]).squeeze(-1) + bank.output[:, -1:]
    masks = {"mask_unlabeled": rows.unlabeled > 0, "mask_negative": rows.negative > 0}
    risk = nnnu_risk(g, g, prevalence, **masks, correction=correction)
    (expected,) = torch.autograd.grad(risk.sum(), [bank.weights])
    found = risk_gradient(bank.weights.detach(), rows, prevalence, mask, 0.5, correction)
    torch.testing.assert_close(found, expected)
    g = bank.eval()(rows.z[..., :-1]).detach()
    risk, control = evaluate(bank.weights.detach(), rows, prevalence, 6)
    torch.testing.assert_close(risk, nnnu_risk(g, g, prevalence, **masks))
    torch.testing.assert_close(control[2], g[2, 3:9].sigmoid().mean())


def test_a_head_trains_as_with_torch():
    """Without dropout, a head in a block takes the steps of AdamW on the published risk."""
    z, unlabeled, negative, _ = screen([20, 33], shift=1.0)
    settings = ClassifierSettings(n_hidden=4, dropout=0.0, lr=0.01, max_steps=40, check_every=40, patience=None)
    heads = [Head(u, v, u, v, 5 + i, 0.6) for i, (u, v) in enumerate(zip(unlabeled, negative, strict=True))]
    fitted = train_block(z, heads, settings, 0)
    for i, head in enumerate(heads):
        bank = ClassifierBank(1, 5, 4, dropout=0.0, generators=[torch.Generator().manual_seed(5 + i)])
        with torch.no_grad():
            bank.weights[:, -1] += torch.logit(torch.tensor(0.6))
        both = z[np.concatenate([head.unlabeled, head.negative])].astype(np.float64)
        x = torch.from_numpy(((z - both.mean(0)) / both.std(0)).astype(np.float32))
        optimiser = torch.optim.AdamW(bank.parameters(), lr=0.01, weight_decay=5e-4)
        for _ in range(40):
            optimiser.zero_grad()
            nnnu_risk(bank(x[head.unlabeled]), bank(x[head.negative]), 0.6).sum().backward()
            optimiser.step()
        np.testing.assert_allclose(fitted[i].weights, bank.weights[0].detach().numpy(), atol=1e-5)
        np.testing.assert_allclose(fitted[i].logits(z[:9]), bank(x[:9])[0].detach().numpy(), atol=1e-4)
        assert fitted[i].control_score == pytest.approx(
            float(bank(x[head.negative]).sigmoid().mean().detach()), abs=1e-5
        )


def test_heads_do_not_feel_each_other():
    """Neither padding nor the heads that leave earlier change what becomes of a head."""
    z, unlabeled, negative, is_train = screen([40, 25, 90, 61], shift=[3.0, 0.0, 1.0, 0.0])
    together = fit_classifiers(z, unlabeled, negative, is_train, SHORT)
    assert len(set(together.steps)) > 1
    fitted = [fit_classifiers(z, unlabeled[: k + 1], negative[: k + 1], is_train, SHORT) for k in range(3)]
    for k, fit in enumerate(fitted):
        assert fit.prevalence[k] == together.prevalence[k]
        assert fit.steps[k] == together.steps[k]
        np.testing.assert_allclose(fit.unlabeled_logits[k], together.unlabeled_logits[k], atol=1e-3)
        np.testing.assert_allclose(fit.negative_logits[k], together.negative_logits[k], atol=1e-3)


def test_the_same_seed_gives_the_same_fit():
    z, unlabeled, negative, is_train = screen([30, 45])
    state = torch.get_rng_state()
    first, second = (fit_classifiers(z, unlabeled, negative, is_train, SHORT, seed=3) for _ in range(2))
    other = fit_classifiers(z, unlabeled, negative, is_train, SHORT, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    for k in range(2):
        np.testing.assert_array_equal(first.unlabeled_logits[k], second.unlabeled_logits[k])
        np.testing.assert_array_equal(first.negative_logits[k], second.negative_logits[k])
        assert not np.allclose(first.unlabeled_logits[k], other.unlabeled_logits[k], atol=1e-3)


def test_separable_cells_keep_the_first_prevalence():
    z, unlabeled, negative, is_train = screen([80, 200], shift=12.0)
    fit = fit_classifiers(z, unlabeled, negative, is_train)
    assert fit.prevalence.tolist() == [0.9, 0.9]
    assert fit.calibrated.all()
    assert (fit.control_score < 0.05).all()
    assert min(gap(fit, 0), gap(fit, 1)) > 0.8


def test_a_constant_classifier_falls_to_the_target():
    """All cells alike: the risk is smallest where every probability is the prevalence."""
    z, unlabeled, negative, is_train = screen([80])
    fit = fit_classifiers(np.full_like(z, 3.0), unlabeled, negative, is_train)
    assert fit.prevalence[0] <= 0.15
    assert fit.calibrated[0]
    assert fit.control_score[0] == pytest.approx(fit.prevalence[0], abs=0.01)
    assert abs(gap(fit, 0)) < 0.02


def test_a_floor_above_the_target_is_not_calibrated():
    z, unlabeled, negative, is_train = screen([80])
    settings = replace(SHORT, prevalence_min=0.5)
    fit = fit_classifiers(np.zeros_like(z), unlabeled, negative, is_train, settings)
    assert fit.prevalence.tolist() == [0.5]
    assert not fit.calibrated[0]


def test_equal_populations_are_screened_out():
    z, unlabeled, negative, is_train = screen([100] * 20, n_negative=200, d=10)
    fit = fit_classifiers(z, unlabeled, negative, is_train)
    gaps = np.array([gap(fit, k) for k in range(20)])
    assert (gaps < 0.15).sum() >= 19, gaps
    assert np.isin(np.round(fit.prevalence / 0.05, 9) % 1, (0.0, 1.0)).all()  # on the grid


def test_every_cell_is_scored_by_a_head_without_it(trained_on):
    z, unlabeled, negative, is_train = screen([42, 30], n_negative=80)
    settings = replace(SHORT, max_negative=50)
    fit = fit_classifiers(z, unlabeled, negative, is_train, settings)
    assert len(trained_on) == 2 * (1 + settings.n_folds)
    for k in range(2):
        own = [(h, f) for h, f in trained_on if np.isin(h.unlabeled, unlabeled[k]).all()]
        (calibration,) = [(h, f) for h, f in own if h.prevalence is None]
        folds = [(h, f) for h, f in own if h.prevalence is not None]
        assert {h.prevalence for h, _ in folds} == {fit.prevalence[k]}
        assert len(calibration[0].negative) == settings.max_negative
        assert len(calibration[0].valid_negative) < settings.max_negative
        for cells, logits, name in (
            (unlabeled[k], fit.unlabeled_logits[k], "unlabeled"),
            (negative[k], fit.negative_logits[k], "negative"),
        ):
            for head, _ in own:
                assert is_train[getattr(head, name)].all()
                assert not is_train[getattr(head, f"valid_{name}")].any()
            for cell, logit in zip(cells, logits, strict=True):
                without = [f for h, f in folds if cell not in getattr(h, name)]
                without = without if is_train[cell] else [calibration[1]]
                assert np.isclose(logit, [f.logits(z[[cell]])[0] for f in without]).any()
            left_out = [np.setdiff1d(cells[is_train[cells]], getattr(h, name)) for h, _ in folds]
            if name == "unlabeled":  # the folds part the training cells, in nearly equal shares
                assert sorted(np.concatenate(left_out)) == sorted(cells[is_train[cells]])
                assert max(map(len, left_out)) - min(map(len, left_out)) <= 1
        np.testing.assert_allclose(score(fit, k, z[:10]), calibration[1].logits(z[:10]))


def test_memorised_cells_do_not_keep_their_score():
    """Noise in many dimensions can be learned by heart; out of fold nothing of it may be left."""
    z, unlabeled, negative, is_train = screen([60], n_negative=80, d=300)
    is_train[:] = True
    settings = ClassifierSettings(dropout=0.0, lr=0.01, max_steps=500, patience=None, control_target=0.3)
    fit = fit_classifiers(z, unlabeled, negative, is_train, settings)
    by_heart = sigmoid(score(fit, 0, z))
    assert by_heart[unlabeled[0]].mean() - by_heart[negative[0]].mean() > 0.5
    assert sigmoid(fit.unlabeled_logits[0]).mean() - sigmoid(fit.negative_logits[0]).mean() < 0.2


def test_groups_are_never_parted(trained_on):
    z, unlabeled, negative, is_train = screen([60, 40, 20], n_negative=80)
    groups = [np.arange(60) % 3, np.array(["a"] * 25 + ["b"] * 15), np.zeros(20)]
    fit = fit_classifiers(z, unlabeled, negative, is_train, SHORT, groups=groups)
    n_folds = [
        sum(np.isin(h.unlabeled, u).all() and h.prevalence is not None for h, _ in trained_on) for u in unlabeled
    ]
    assert n_folds == [3, 2, SHORT.n_folds]
    for k in range(2):
        folds = [(h, f) for h, f in trained_on if np.isin(h.unlabeled, unlabeled[k]).all() and h.prevalence is not None]
        group_of = dict(zip(unlabeled[k].tolist(), groups[k].tolist(), strict=True))
        seen = [{group_of[c] for c in np.concatenate([h.unlabeled, h.valid_unlabeled]).tolist()} for h, _ in folds]
        for cell, logit in zip(unlabeled[k].tolist(), fit.unlabeled_logits[k], strict=True):  # of validation too
            scored = [
                f.logits(z[[cell]])[0]
                for (_, f), guides in zip(folds, seen, strict=True)
                if group_of[cell] not in guides
            ]
            assert np.isclose(logit, scored).any()
        for cell, logit in zip(negative[k].tolist(), fit.negative_logits[k], strict=True):
            scored = [f.logits(z[[cell]])[0] for h, f in folds if cell not in [*h.negative, *h.valid_negative]]
            assert np.isclose(logit, scored).any()


def test_few_cells():
    z, unlabeled, negative, is_train = screen([2, 1, 12, 12, 0], n_negative=12)
    is_train[:] = True
    is_train[negative[3][:1]] = False
    fit = fit_classifiers(z, unlabeled, negative, is_train, SHORT)
    assert not fit.calibrated.any()  # no category has 2 validation controls
    assert [head is None for head in fit.heads] == [False, True, False, False, True]
    assert fit.prevalence[1] == fit.control_score[1] == SHORT.prevalence_min
    np.testing.assert_allclose(sigmoid(fit.unlabeled_logits[1]), SHORT.prevalence_min)
    np.testing.assert_allclose(sigmoid(score(fit, 1, z[:3])), SHORT.prevalence_min)
    for logits in [*fit.unlabeled_logits, *fit.negative_logits]:
        assert np.isfinite(logits).all()
    assert fit_classifiers(z, [], [], is_train).prevalence.shape == (0,)


def test_extreme_latents_stay_finite():
    z, unlabeled, negative, is_train = screen([30, 30])
    z[:, 0] = 7.0
    z[:, 1] *= 1e20
    z[:, 2] = 1e6 + z[:, 2]
    fit = fit_classifiers(z, unlabeled, negative, is_train, SHORT)
    assert all(np.isfinite(logits).all() for logits in [*fit.unlabeled_logits, *fit.negative_logits])
    assert np.isfinite(score(fit, 0, np.full((1, 5), 1e38))).all()


def test_blocks_hold_heads_of_similar_size():
    sizes = np.random.default_rng(0).integers(5, 400, 500).tolist()
    found = list(blocks(sizes, 2_000))
    assert sorted(np.concatenate(found)) == list(range(500))
    assert all(len(b) * max(sizes[i] for i in b) <= 2_000 for b in found)
    assert sum(sizes) > 0.9 * sum(len(b) * max(sizes[i] for i in b) for b in found)
    assert list(blocks([5_000, 10], 2_000)) == [[0], [1]]  # too large a head is alone


def test_progress_counts_heads():
    z, unlabeled, negative, is_train = screen([30, 40])
    seen = []
    fit_classifiers(z, unlabeled, negative, is_train, SHORT, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (10, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": np.zeros(4)}, "`z` must hold finite latents"),
        ({"z": np.full((140, 5), np.nan)}, "`z` must hold finite latents"),
        ({"is_train": np.ones(140)}, "`is_train` must hold True or False for each of 140 cells"),
        ({"negative": []}, r"one entry per category; received \[1, 0, 1\]"),
        ({"negative": [np.arange(100)]}, "Category 0 must name different cells below 140"),
        ({"unlabeled": [np.array([140])]}, "Category 0 must name different cells below 140"),
        ({"groups": [np.zeros(3)]}, "`groups` of category 0 must have one value for each of 40 cells; received 3"),
    ],
)
def test_what_is_refused(change, message):
    z, unlabeled, negative, is_train = screen([40])
    given = {"z": z, "unlabeled": unlabeled, "negative": negative, "is_train": is_train, "settings": SHORT} | change
    with pytest.raises(ValueError, match=message):
        fit_classifiers(**given)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("n_hidden", 0), ("max_steps", 0.5), ("patience", -1), ("lr", 0.0), ("weight_decay", -1.0)],
        *[("dropout", 1.0), ("prevalence_start", 1.0), ("prevalence_min", 0.95), ("n_folds", 1), ("correction", "no")],
    ],
)
def test_settings_that_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` must"):
        ClassifierSettings(**{setting: value})
