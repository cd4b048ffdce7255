"""Expression-only classifiers of all categories: calibration of the prevalence, out-of-fold scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from scvi_cradle.train._classifier_heads import FittedHead, Head, blocks, train_block
from scvi_cradle.train._classifier_settings import ClassifierSettings


@dataclass(frozen=True)
class ClassifierFit:
    """Fitted classifiers, one entry per category in every field.

    Parameters
    ----------
    prevalence
        Share of positives among the unlabeled cells that the calibration ended at.
    calibrated
        Whether validation controls reached the target there. False also with fewer than 2 validation controls, and
        for categories with fewer than 2 training cells of a kind: those are not fitted, all their logits are those of
        the smallest prevalence.
    control_score
        Mean probability of the validation controls under the calibration model.
    steps
        Training steps of the calibration model.
    unlabeled_logits, negative_logits
        Logits of the cells of a category, in the order they were given: training cells by a head that trained without
        them, validation cells by the calibration model (with groups: all cells by a head without them).
    gap
        Mean of the upper halves of the scores of labelled cells less that of controls, which screens categories.
    heads
        Calibration models; ``None`` where nothing was fitted.
    """

    prevalence: np.ndarray
    calibrated: np.ndarray
    control_score: np.ndarray
    steps: np.ndarray
    unlabeled_logits: list[np.ndarray]
    negative_logits: list[np.ndarray]
    gap: np.ndarray
    heads: list[FittedHead | None]


def top_half_gap(unlabeled: np.ndarray, negative: np.ndarray) -> float:
    """Return the mean of the larger half (rounded up) of scores of labelled cells less that of controls."""

    def top(scores: np.ndarray) -> float:
        return float(np.sort(scores)[::-1][: math.ceil(len(scores) / 2)].mean())

    return top(unlabeled) - top(negative)


def score(fit: ClassifierFit, category: int, z: np.ndarray) -> np.ndarray:
    """Return the logits of cells ``z``, shape ``(n_cells, d)``, under a category's calibration model."""
    head = fit.heads[category]
    if head is None and fit.calibrated[category]:
        msg = "Cells can be scored by classifiers of `fit_classifiers`; received a discriminant, which is found anew for every fold."
        raise NotImplementedError(msg)
    if head is None:
        return np.full(len(z), _logit(float(fit.prevalence[category])))
    return head.logits(z)


def fit_classifiers(
    z: np.ndarray,
    unlabeled: Sequence[np.ndarray],
    negative: Sequence[np.ndarray],
    is_train: np.ndarray,
    settings: ClassifierSettings | None = None,
    *,
    groups: Sequence[np.ndarray] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ClassifierFit:
    """Fit one classifier per category on fixed latents, calibrated and out of fold (quantile-hurdle paper, 4.2, 9.4).

    For every category the assumed prevalence falls until the mean probability of the validation controls is at most
    the target, each time from the best weights of the prevalence before. With the prevalence found, ``n_folds`` fresh
    heads leave out one fold of the training cells each and score it.

    Parameters
    ----------
    z
        Latents of all cells, shape ``(n_cells, d)``.
    unlabeled, negative
        Per category the positions of its labelled cells and of its controls.
    is_train
        True for training cells, False for validation cells, shape ``(n_cells,)``.
    settings
        Defaults for ``None``.
    groups
        Per category one value per unlabeled cell, e.g. its guide. A fold then holds whole groups, of training and
        validation cells alike, and its head neither trains nor stops early on any of them. Categories whose training
        cells have fewer than 2 groups get random folds.
    seed
        Of the starts, the folds and the dropout; torch's global generator is not touched.
    progress
        Called with the numbers of finished and of all heads.

    Returns
    -------
    A :class:`ClassifierFit`.

    Raises
    ------
    ValueError
        For shapes that do not fit, positions outside of ``z``, cells that are both unlabeled and negative, or values
        that are not finite.
    """
    settings = settings or ClassifierSettings()
    z, is_train = np.asarray(z), np.asarray(is_train)
    unlabeled, negative = (
        [np.asarray(u, dtype=np.int64) for u in unlabeled],
        [np.asarray(v, dtype=np.int64) for v in negative],
    )
    _check(z, unlabeled, negative, is_train, groups)
    n = len(unlabeled)
    usable = [k for k in range(n) if min(is_train[unlabeled[k]].sum(), is_train[negative[k]].sum()) >= 2]
    folds = {
        k: _folds(unlabeled[k], negative[k], is_train, None if groups is None else groups[k], settings, [seed, k])
        for k in usable
    }
    n_all = len(usable) + sum(f.n_folds for f in folds.values())
    finished = 0

    def train(heads: list[Head]) -> list[FittedHead]:
        nonlocal finished
        fitted: list[FittedHead | None] = [None] * len(heads)
        for block in blocks([head.n_rows for head in heads]):
            for i, head in zip(block, train_block(z, [heads[i] for i in block], settings, seed), strict=True):
                fitted[i] = head
            finished += len(block)
            if progress is not None:
                progress(finished, n_all)
        return [head for head in fitted if head is not None]

    calibration = train([_head(folds[k], None, None, [seed, k]) for k in usable])
    models = dict(zip(usable, calibration, strict=True))
    pairs = [(k, fold) for k in usable for fold in range(folds[k].n_folds)]
    left_out = train([_head(folds[k], fold, models[k].prevalence, [seed, k]) for k, fold in pairs])
    nothing = settings.prevalence_min
    fit = ClassifierFit(
        np.full(n, nothing),
        np.zeros(n, dtype=bool),
        np.full(n, nothing),
        np.zeros(n, dtype=np.int64),
        [np.full(len(u), _logit(nothing)) for u in unlabeled],
        [np.full(len(v), _logit(nothing)) for v in negative],
        np.zeros(n),
        [models.get(k) for k in range(n)],
    )
    for k, head in models.items():
        fit.prevalence[k], fit.control_score[k], fit.steps[k] = head.prevalence, head.control_score, head.steps
        fit.calibrated[k] = head.calibrated and (~is_train[negative[k]]).sum() >= 2
        fit.unlabeled_logits[k][:], fit.negative_logits[k][:] = (
            head.logits(z[unlabeled[k]]),
            head.logits(z[negative[k]]),
        )
    for (k, fold), head in zip(pairs, left_out, strict=True):
        for cells, of_fold, logits in (
            (unlabeled[k], folds[k].unlabeled == fold, fit.unlabeled_logits[k]),
            (negative[k], folds[k].negative == fold, fit.negative_logits[k]),
        ):
            logits[of_fold] = head.logits(z[cells[of_fold]])
    for k in usable:
        fit.gap[k] = top_half_gap(expit(fit.unlabeled_logits[k]), expit(fit.negative_logits[k]))
    return fit


@dataclass(frozen=True)
class _Folds:
    """A category's cells and their folds (-1: in none, scored by the calibration model)."""

    cells: tuple[np.ndarray, np.ndarray]
    train: tuple[np.ndarray, np.ndarray]  # True for cells to train on
    valid: tuple[np.ndarray, np.ndarray]  # ... and for those to look at
    unlabeled: np.ndarray
    negative: np.ndarray
    n_folds: int


def _folds(
    unlabeled: np.ndarray,
    negative: np.ndarray,
    is_train: np.ndarray,
    groups: np.ndarray | None,
    settings: ClassifierSettings,
    seed: list[int],
) -> _Folds:
    rng = np.random.default_rng([*seed, 0])
    train = is_train[unlabeled], is_train[negative]
    n_folds = min(settings.n_folds, int(train[0].sum()), int(train[1].sum()))
    codes = np.zeros(len(unlabeled), dtype=np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
    n_groups = len(np.unique(codes[train[0]]))
    if n_groups >= 2:
        n_folds = min(n_folds, n_groups)
        fold_u = _whole_groups(codes, train[0], n_folds)
        fold_v = np.where(train[1], _shuffled(train[1], n_folds, rng), _shuffled(~train[1], n_folds, rng))
    else:
        fold_u, fold_v = _shuffled(train[0], n_folds, rng), _shuffled(train[1], n_folds, rng)
    used = [_at_most(settings.max_negative, kind, rng) for kind in (train[1], ~train[1])]
    return _Folds((unlabeled, negative), (train[0], used[0]), (~train[0], used[1]), fold_u, fold_v, n_folds)


def _at_most(most: int | None, members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a mask of the members, or of as many random ones as are allowed."""
    if most is None or members.sum() <= most:
        return members
    chosen = np.zeros_like(members)
    chosen[rng.choice(np.flatnonzero(members), most, replace=False)] = True
    return chosen


def _shuffled(members: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Return random folds of nearly equal size for the members, -1 for the others."""
    fold = np.full(len(members), -1)
    fold[members] = rng.permutation(int(members.sum())) % n_folds
    return fold


def _whole_groups(codes: np.ndarray, train: np.ndarray, n_folds: int) -> np.ndarray:
    """Return folds of whole groups: the largest first, each into the fold with the fewest training cells so far."""
    sizes = np.bincount(codes[train], minlength=codes.max() + 1)
    fold_of, load = np.zeros(len(sizes), dtype=np.int64), np.zeros(n_folds, dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        fold_of[group] = load.argmin()
        load[fold_of[group]] += sizes[group]
    return fold_of[codes]


def _head(folds: _Folds, fold: int | None, prevalence: float | None, seed: list[int]) -> Head:
    """Return the head that leaves out a fold; cells to train on stand in where no validation cells are left."""
    parts = []
    for kind, cells in enumerate(folds.cells):
        stays = (folds.unlabeled, folds.negative)[kind] != fold if fold is not None else np.ones(len(cells), dtype=bool)
        train, valid = cells[folds.train[kind] & stays], cells[folds.valid[kind] & stays]
        parts.append((train, valid if len(valid) >= 2 else train))
    state = np.random.SeedSequence([*seed, 1 if fold is None else 2 + fold]).generate_state(1)
    (u, valid_u), (v, valid_v) = parts
    return Head(u, v, valid_u, valid_v, int(state[0]), prevalence)


def _logit(probability: float) -> float:
    return math.log(probability / (1.0 - probability))


def _check(
    z: np.ndarray,
    unlabeled: list[np.ndarray],
    negative: list[np.ndarray],
    is_train: np.ndarray,
    groups: Sequence[np.ndarray] | None,
) -> None:
    if z.ndim != 2 or not np.isfinite(z).all():
        msg = f"`z` must hold finite latents of cells x dimensions; received shape {z.shape} or values that are not finite."
        raise ValueError(msg)
    if is_train.shape != (len(z),) or is_train.dtype != bool:
        msg = f"`is_train` must hold True or False for each of {len(z)} cells; received {is_train.dtype} of shape {is_train.shape}."
        raise ValueError(msg)
    lengths = [len(unlabeled), len(negative), len(unlabeled) if groups is None else len(groups)]
    if len(set(lengths)) > 1:
        msg = f"`unlabeled`, `negative` and `groups` must have one entry per category; received {lengths} entries."
        raise ValueError(msg)
    for k, (u, v) in enumerate(zip(unlabeled, negative, strict=True)):
        both = np.concatenate([u, v])
        if both.size and (both.min() < 0 or both.max() >= len(z) or len(np.unique(both)) < len(both)):
            msg = f"Category {k} must name different cells below {len(z)}; received a position twice or outside."
            raise ValueError(msg)
        if groups is not None and len(groups[k]) != len(u):
            msg = f"`groups` of category {k} must have one value for each of {len(u)} cells; received {len(groups[k])}."
            raise ValueError(msg)
