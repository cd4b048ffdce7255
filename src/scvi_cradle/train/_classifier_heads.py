"""Training of classifier heads side by side: padded blocks, explicit gradients, early stopping per head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from scvi_cradle._validation import check_one_of, check_positive, check_probability
from scvi_cradle.module.base import ClassifierBank, hidden_part
from scvi_cradle.module.base._nnnu import CORRECTIONS, Correction

BLOCK_ROWS = 9_000  # cells times heads trained at once: what the caches hold
BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW as in torch
TOLERANCE = 1e-9  # of comparisons with a target: .9 - 15 * .05 is not .15


@dataclass(frozen=True)
class ClassifierSettings:
    """How classifiers are fitted; published are ``lr=1e-4`` and ``patience=None``.

    Parameters
    ----------
    n_hidden, dropout
        Width of the hidden layer; probability to leave out a hidden unit (rounded to 1/256).
    lr, weight_decay
        Of AdamW (decoupled decay).
    max_steps
        Full-batch steps per prevalence, rounded up to a multiple of ``check_every``.
    check_every
        Steps between two looks at the validation cells.
    patience
        Steps without a smaller validation risk after which a head stops; ``None``: never. The weights with the
        smallest validation risk are restored in any case.
    prevalence_start, prevalence_step, prevalence_min
        The assumed share of positives falls from ``prevalence_start`` in steps until the controls score low enough.
    control_target
        Largest mean probability of the validation controls.
    n_folds
        Folds of the out-of-fold scores.
    correction
        ``"clamp"`` or ``"ascent"``, see :func:`~scvi_cradle.module.base.nnnu_risk`.
    max_negative
        Most controls that a head trains on, drawn at random; ``None``: all.
    """

    n_hidden: int = 16
    dropout: float = 0.5
    lr: float = 1e-3
    weight_decay: float = 5e-4
    max_steps: int = 7_000
    check_every: int = 100
    patience: int | None = 500
    prevalence_start: float = 0.9
    prevalence_step: float = 0.05
    prevalence_min: float = 0.05
    control_target: float = 0.15
    n_folds: int = 4
    correction: Correction = "clamp"
    max_negative: int | None = 2_000

    def __post_init__(self) -> None:
        for name in ("n_hidden", "max_steps", "check_every"):
            check_positive(name, getattr(self, name), integer=True)
        for name in ("patience", "max_negative"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name), integer=True)
        check_positive("lr", self.lr)
        check_positive("weight_decay", self.weight_decay, allow_zero=True)
        for name in ("prevalence_start", "prevalence_step", "prevalence_min", "control_target"):
            check_probability(name, getattr(self, name))
        check_one_of("correction", self.correction, CORRECTIONS)
        if not 0 <= self.dropout < 1:
            msg = f"`dropout` must lie in [0, 1); received {self.dropout!r}."
            raise ValueError(msg)
        if self.prevalence_min > self.prevalence_start:
            msg = (
                "`prevalence_min` must not exceed `prevalence_start`; "
                f"received {self.prevalence_min!r} and {self.prevalence_start!r}."
            )
            raise ValueError(msg)
        if not isinstance(self.n_folds, int) or self.n_folds < 2:
            msg = f"`n_folds` must be an integer of 2 or more; received {self.n_folds!r}."
            raise ValueError(msg)

    def prevalence(self, level: int) -> float:
        """Return the assumed share of positives at a level, 0 being the first."""
        return round(self.prevalence_start - level * self.prevalence_step, 12)


class Head(NamedTuple):
    """What one head trains on: positions of cells, its start and the share of positives it assumes."""

    unlabeled: np.ndarray
    negative: np.ndarray
    valid_unlabeled: np.ndarray
    valid_negative: np.ndarray
    seed: int
    prevalence: float | None  # None: found by calibration


class FittedHead(NamedTuple):
    """A trained head: weights of standardised inputs and how it ended."""

    weights: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    prevalence: float
    calibrated: bool
    control_score: float
    steps: int

    def logits(self, z: np.ndarray) -> np.ndarray:
        """Return the logits of cells, float64 of shape ``(n_cells,)``."""
        n_hidden = (len(self.weights) - 1) // (len(self.mean) + 2)
        inner = self.weights[: -(n_hidden + 1)].reshape(-1, n_hidden)
        outer = self.weights[-(n_hidden + 1) :].astype(np.float64)
        hidden = np.maximum(_standardised(z, self.mean, self.scale) @ inner[:-1] + inner[-1], 0.0)
        return hidden @ outer[:-1] + outer[-1]


class Rows(NamedTuple):
    """Cells of the heads of a block, padded; the weights sum to 1 over a head's cells of the kind."""

    z: Tensor  # (n_heads, n, n_in + 1), last column 1
    unlabeled: Tensor  # (n_heads, n)
    negative: Tensor  # (n_heads, n)

    def take(self, heads: Tensor) -> Rows:
        """Return the rows of some heads, without the padding that only the others needed."""
        n = int((self.unlabeled + self.negative)[heads].gt(0).sum(1).max())
        return Rows(*(part[heads, :n].contiguous() for part in self))


def blocks(sizes: list[int], budget: int = BLOCK_ROWS) -> Iterator[list[int]]:
    """Yield positions of heads of similar size whose padded rows stay within ``budget`` (at least one head)."""
    block: list[int] = []
    for head in np.argsort(np.negative(sizes), kind="stable"):
        if block and (len(block) + 1) * sizes[block[0]] > budget:
            yield block
            block = []
        block.append(int(head))
    if block:
        yield block


def padded_rows(z: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]], scaling: list[tuple]) -> Rows:
    """Return unlabeled and negative cells of every head, standardised with the head's mean and scale."""
    n = max(len(u) + len(v) for u, v in pairs)
    rows = np.zeros((len(pairs), n, z.shape[1] + 1), dtype=np.float32)
    weights = np.zeros((2, len(pairs), n), dtype=np.float32)
    for head, ((u, v), (mean, scale)) in enumerate(zip(pairs, scaling, strict=True)):
        filled = len(u) + len(v)
        rows[head, :filled, :-1] = _standardised(z[np.concatenate([u, v])], mean, scale)
        rows[head, :filled, -1] = 1.0
        weights[0, head, : len(u)] = 1.0 / len(u)
        weights[1, head, len(u) : filled] = 1.0 / len(v)
    return Rows(torch.from_numpy(rows), *torch.from_numpy(weights))


def risk_and_gradient(
    weights: Tensor,
    rows: Rows,
    prevalence: Tensor,
    mask: Tensor,
    keep: float,
    correction: Correction = "clamp",
    n_hidden: int = 16,
) -> Tensor:
    """Return the gradient of the heads' risks (eq. 6) by their weights, shape of ``weights``.

    ``mask`` (n, n_hidden) holds 1 for hidden units that stay and 0 for the others, for all heads; ``keep`` is the
    probability to stay. By hand instead of autograd: a rectifier is linear in its sign, so that one product with the
    cells gives the gradients of both layers.
    """
    inner, outer = hidden_part(weights, n_hidden), weights[:, -(n_hidden + 1) : -1] / keep
    h = torch.bmm(rows.z, inner).mul_(mask).relu_()
    g = torch.linalg.vecdot(h, outer[:, None]) + weights[:, -1:]
    sigmoid = g.sigmoid()
    certain = (1.0 - prevalence)[:, None] * rows.negative
    signed = rows.unlabeled - certain
    bracket = (signed * softplus(-g)).sum(1, keepdim=True)
    of_bracket, of_rest = signed * (sigmoid - 1.0), certain * sigmoid
    if correction == "clamp":
        by_logit = torch.where(bracket > 0, of_bracket, 0.0) + of_rest
    else:
        by_logit = torch.where(bracket < 0, -of_bracket, of_bracket + of_rest)
    active = torch.ops.aten.threshold_backward(by_logit[..., None].expand_as(h), h, 0.0)
    product = torch.bmm(rows.z.transpose(1, 2), active)
    by_outer = (product * inner).sum(1) / keep
    return torch.cat([(product * outer[:, None]).flatten(1), by_outer, by_logit.sum(1, keepdim=True)], dim=1)


def evaluate(weights: Tensor, rows: Rows, prevalence: Tensor, n_hidden: int) -> tuple[Tensor, Tensor]:
    """Return the risk (eq. 6) and the mean probability of the negative cells of every head, without dropout."""
    inner, outer = hidden_part(weights, n_hidden), weights[:, -(n_hidden + 1) : -1]
    g = torch.linalg.vecdot(torch.bmm(rows.z, inner).relu_(), outer[:, None]) + weights[:, -1:]
    certain = 1.0 - prevalence
    positive = softplus(-g)
    bracket = (rows.unlabeled * positive).sum(1) - certain * (rows.negative * positive).sum(1)
    risk = bracket.clamp_min(0.0) + certain * (rows.negative * softplus(g)).sum(1)
    return risk, (rows.negative * g.sigmoid()).sum(1)


def train_block(z: np.ndarray, heads: list[Head], settings: ClassifierSettings, seed: int) -> list[FittedHead]:
    """Train heads side by side until each has found its prevalence; what a head becomes depends on it alone."""
    n_hidden = settings.n_hidden
    scaling = [_scaling(z[np.concatenate([h.unlabeled, h.negative])]) for h in heads]
    train = padded_rows(z, [(h.unlabeled, h.negative) for h in heads], scaling)
    valid = padded_rows(z, [(h.valid_unlabeled, h.valid_negative) for h in heads], scaling)
    generators = [torch.Generator().manual_seed(h.seed) for h in heads]
    weights = ClassifierBank(len(heads), z.shape[1], n_hidden, generators=generators).weights.detach()
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    level = np.zeros(len(heads), dtype=np.int64)
    fixed = np.array([h.prevalence is not None for h in heads])
    shares = [settings.prevalence(0) if h.prevalence is None else h.prevalence for h in heads]
    share = torch.tensor(shares, dtype=torch.float32)
    best_risk, best_score = torch.full((len(heads),), math.inf), torch.zeros(len(heads))
    best, best_step, step = weights.clone(), torch.zeros(len(heads)), torch.zeros(len(heads))
    total = 0
    members = np.arange(len(heads))
    done: list[FittedHead | None] = [None] * len(heads)
    dropout = _Dropout(settings.dropout, n_hidden, seed)
    while True:
        risk, control = evaluate(weights, valid, share, n_hidden)
        better = risk < best_risk
        best_risk, best_score = torch.where(better, risk, best_risk), torch.where(better, control, best_score)
        best, best_step = torch.where(better[:, None], weights, best), torch.where(better, step, best_step)
        ended = step >= settings.max_steps
        if settings.patience is not None:
            ended |= step - best_step >= settings.patience
        if ended.any():
            reached = best_score.numpy() <= settings.control_target + TOLERANCE
            lower = np.array([settings.prevalence(i + 1) for i in level])
            floor = lower < settings.prevalence_min - TOLERANCE
            leaving = ended.numpy() & (fixed | reached | floor)
            for i in np.flatnonzero(leaving):
                done[members[i]] = FittedHead(
                    best[i].numpy().copy(),
                    *scaling[members[i]],
                    prevalence=settings.prevalence(level[i]) if not fixed[i] else float(heads[members[i]].prevalence),
                    calibrated=bool(reached[i]),
                    control_score=float(best_score[i]),
                    steps=total,
                )
            next_level = ended & ~torch.from_numpy(leaving)
            if next_level.any():  # from the best weights, moved by what the assumed share changes for equal samples
                level += next_level.numpy()
                shares = torch.tensor([settings.prevalence(i) for i in level], dtype=share.dtype)
                shift = torch.logit(shares) - torch.logit(share)
                moved = torch.cat([best[:, :-1], best[:, -1:] + shift[:, None]], dim=1)
                weights = torch.where(next_level[:, None], moved, weights)
                share = torch.where(next_level, shares, share)
                first[next_level], second[next_level] = 0.0, 0.0
                step = torch.where(next_level, 0.0, step)
                best_risk = torch.where(next_level, math.inf, best_risk)
            if leaving.all():
                break
            if leaving.any():
                stay = torch.from_numpy(np.flatnonzero(~leaving))
                state = (weights, first, second, share, best_risk, best_score, best, best_step, step)
                weights, first, second, share, best_risk, best_score, best, best_step, step = (s[stay] for s in state)
                level, fixed, members = level[~leaving], fixed[~leaving], members[~leaving]
                train, valid = train.take(stay), valid.take(stay)
            if next_level.any():
                continue  # the start of a level is a candidate too
        for _ in range(settings.check_every):
            mask = dropout.mask(total, train.z.shape[1])
            gradient = risk_and_gradient(weights, train, share, mask, dropout.keep, settings.correction, n_hidden)
            step, total = step + 1, total + 1
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            rate = settings.lr / (1 - BETAS[0] ** step)[:, None]
            root = (second / (1 - BETAS[1] ** step)[:, None]).sqrt_().add_(EPS)
            weights = (weights * (1 - settings.lr * settings.weight_decay)).sub_(first * rate / root)
    return [head for head in done if head is not None]


class _Dropout:
    """Units that stay, drawn from bytes: the first rows of a step are the same however many rows are asked for."""

    def __init__(self, dropout: float, n_hidden: int, seed: int) -> None:
        self.kept = round(256 * (1 - dropout))
        self.keep = self.kept / 256
        self.n_hidden, self.seed = n_hidden, seed
        self.generator = torch.Generator()

    def mask(self, step: int, n: int) -> Tensor:
        if self.kept == 256:
            return torch.ones(n, self.n_hidden)
        self.generator.manual_seed(self.seed + step)
        words = torch.empty(-(-n * self.n_hidden // 8), dtype=torch.int64)
        words.random_(-(2**63), None, generator=self.generator)
        return (words.view(torch.uint8)[: n * self.n_hidden] < self.kept).view(n, self.n_hidden).float()


def _scaling(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z = z.astype(np.float64)
    mean, scale = z.mean(0), z.std(0)
    return mean, np.where(scale > 1e-6 * np.abs(mean), scale, 1.0)


def _standardised(z: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return ((z - mean) / scale).astype(np.float32)
