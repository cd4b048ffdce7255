"""Training of classifier heads side by side: padded blocks, explicit gradients, early stopping per head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from scvi_cradle.module.base import ClassifierBank, hidden_part
from scvi_cradle.module.base._nnnu import Correction
from scvi_cradle.train._classifier_settings import ClassifierSettings

BLOCK_ROWS = 9_000  # cells times heads trained at once: what the caches hold
BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW as in torch
MIN_GAIN = 1e-3  # of the validation risk, for a head to be given more time
TOLERANCE = 1e-9  # of comparisons with a target: .9 - 15 * .05 is not .15


class Head(NamedTuple):
    """What one head trains on: positions of cells, its start and the share of positives it assumes."""

    unlabeled: np.ndarray
    negative: np.ndarray
    valid_unlabeled: np.ndarray
    valid_negative: np.ndarray
    seed: int
    prevalence: float | None  # None: found by calibration

    @property
    def n_rows(self) -> int:
        """Number of cells to train on, or of those to look at if there are more."""
        train, valid = len(self.unlabeled) + len(self.negative), len(self.valid_unlabeled) + len(self.valid_negative)
        return max(train, valid)


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

    def take(self, heads: np.ndarray) -> Rows:
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


def risk_gradient(
    weights: Tensor,
    rows: Rows,
    prevalence: Tensor,
    mask: Tensor,
    keep: float,
    correction: Correction = "clamp",
    workspace: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the gradient of the heads' risks (eq. 6) by their weights, shape of ``weights``.

    ``mask`` (n, n_hidden) holds 1 for hidden units that stay and 0 for the others, for all heads; ``keep`` is the
    probability to stay. By hand instead of autograd: a rectifier is linear in its sign, so that one product with the
    cells gives the gradients of both layers. ``workspace`` holds two tensors (n_heads, n, n_hidden) to write to: fresh
    memory in every step costs as much as the arithmetic.
    """
    n_hidden = mask.shape[1]
    inner, outer = hidden_part(weights, n_hidden), weights[:, -(n_hidden + 1) : -1] / keep
    shape = (*rows.z.shape[:2], n_hidden)
    h, work = workspace or (rows.z.new_empty(shape), rows.z.new_empty(shape))
    torch.bmm(rows.z, inner, out=h).mul_(mask).relu_()
    g = torch.mul(h, outer[:, None], out=work).sum(-1) + weights[:, -1:]
    sigmoid = g.sigmoid()
    certain = (1.0 - prevalence)[:, None] * rows.negative
    signed = rows.unlabeled - certain
    bracket = (signed * softplus(-g)).sum(1, keepdim=True)
    of_bracket, of_rest = signed * (sigmoid - 1.0), certain * sigmoid
    if correction == "clamp":
        by_logit = torch.where(bracket > 0, of_bracket, 0.0) + of_rest
    else:
        by_logit = torch.where(bracket < 0, -of_bracket, of_bracket + of_rest)
    torch.ops.aten.threshold_backward.grad_input(by_logit[..., None].expand(shape), h, 0.0, grad_input=work)
    product = torch.bmm(rows.z.transpose(1, 2), work)
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
    """Train heads side by side, each until it has found its prevalence; what becomes of one depends on it alone."""
    block = _Block(z, heads, settings)
    dropout = _Dropout(settings.dropout, settings.n_hidden, seed)
    done: dict[int, FittedHead] = {}
    total = 0
    while True:
        block.look()
        while len(ended := block.ended()):  # the start of a level may be its end
            leaving = ended[[block.is_last_level(i) for i in ended]]
            done |= {int(block.members[i]): block.fitted(i, total) for i in leaving}
            block.next_level(np.setdiff1d(ended, leaving))
            block.leave(leaving)
            if not len(block.members):
                return [done[i] for i in range(len(heads))]
            block.look()
        for _ in range(settings.check_every):
            block.step(dropout, total)
            total += 1


class _Block:
    """Heads that are trained side by side: their cells, weights, optimiser and best weights so far."""

    def __init__(self, z: np.ndarray, heads: list[Head], settings: ClassifierSettings) -> None:
        n = len(heads)
        self.heads, self.settings, self.members = heads, settings, np.arange(n)
        self.scaling = [_scaling(z[np.concatenate([h.unlabeled, h.negative])]) for h in heads]
        self.train = padded_rows(z, [(h.unlabeled, h.negative) for h in heads], self.scaling)
        self.valid = padded_rows(z, [(h.valid_unlabeled, h.valid_negative) for h in heads], self.scaling)
        self.workspace = self._workspace()
        shares = [settings.prevalence(0) if h.prevalence is None else h.prevalence for h in heads]
        self.share = torch.tensor(shares, dtype=torch.float32)
        generators = [torch.Generator().manual_seed(h.seed) for h in heads]
        self.weights = ClassifierBank(n, z.shape[1], settings.n_hidden, generators=generators).weights.detach()
        self.weights[:, -1] += torch.logit(self.share)  # the best constant
        self.best = self.weights.clone()
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.level, self.steps, self.last_gain = np.zeros((3, n), dtype=np.int64)
        self.score, self.risk, self.to_beat = np.zeros(n), np.full(n, np.inf), np.full(n, np.inf)

    def look(self) -> None:
        """Compare the weights with the best ones on the validation cells."""
        risk, score = (t.numpy() for t in evaluate(self.weights, self.valid, self.share, self.settings.n_hidden))
        better = risk < self.risk
        self.risk, self.score = np.where(better, risk, self.risk), np.where(better, score, self.score)
        self.best = torch.where(torch.from_numpy(better)[:, None], self.weights, self.best)
        gain = risk < self.to_beat
        self.to_beat = np.where(gain, risk - MIN_GAIN, self.to_beat)
        self.last_gain = np.where(gain, self.steps, self.last_gain)

    def ended(self) -> np.ndarray:
        """Return the heads whose level is over."""
        ended = self.steps >= self.settings.max_steps
        if self.settings.patience is not None:
            ended |= self.steps - self.last_gain >= self.settings.patience
        return np.flatnonzero(ended)

    def is_calibrated(self, head: int) -> bool:
        return bool(self.score[head] <= self.settings.control_target + TOLERANCE)

    def is_last_level(self, head: int) -> bool:
        lower = self.settings.prevalence(int(self.level[head]) + 1)
        is_fixed = self.heads[self.members[head]].prevalence is not None
        return is_fixed or self.is_calibrated(head) or lower < self.settings.prevalence_min - TOLERANCE

    def fitted(self, head: int, steps: int) -> FittedHead:
        """Return a head with its best weights."""
        member = self.members[head]
        fixed, weights = self.heads[member].prevalence, self.best[head].numpy().copy()
        prevalence = self.settings.prevalence(int(self.level[head])) if fixed is None else fixed
        score = float(self.score[head])
        mean, scale = self.scaling[member]
        return FittedHead(weights, mean, scale, prevalence, self.is_calibrated(head), score, steps)

    def next_level(self, heads: np.ndarray) -> None:
        """Lower the share of some heads and start from their best weights, moved as the best constant moves."""
        self.level[heads] += 1
        before = torch.logit(self.share[heads])
        self.share[heads] = torch.tensor([self.settings.prevalence(int(i)) for i in self.level[heads]]).float()
        self.weights[heads] = self.best[heads]
        self.weights[heads, -1] += torch.logit(self.share[heads]) - before
        self.first[heads], self.second[heads] = 0.0, 0.0
        self.steps[heads], self.last_gain[heads] = 0, 0
        self.risk[heads], self.to_beat[heads] = np.inf, np.inf

    def leave(self, heads: np.ndarray) -> None:
        """Take heads out of the block."""
        stay = np.setdiff1d(np.arange(len(self.members)), heads)
        if len(stay) in (0, len(self.members)):
            self.members = self.members[stay]
            return
        for name in ("weights", "best", "first", "second", "share", "level", "steps", "last_gain"):
            setattr(self, name, getattr(self, name)[stay])
        for name in ("score", "risk", "to_beat", "members"):
            setattr(self, name, getattr(self, name)[stay])
        self.train, self.valid = self.train.take(stay), self.valid.take(stay)
        self.workspace = self._workspace()

    def _workspace(self) -> tuple[Tensor, Tensor]:
        h = torch.empty(*self.train.z.shape[:2], self.settings.n_hidden)
        return h, torch.empty_like(h)

    def step(self, dropout: _Dropout, number: int) -> None:
        """Take one full-batch step of AdamW."""
        s = self.settings
        mask = dropout.mask(number, self.train.z.shape[1])
        gradient = risk_gradient(self.weights, self.train, self.share, mask, dropout.keep, s.correction, self.workspace)
        self.steps += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        rate, root = (torch.from_numpy(1 - b**self.steps).float()[:, None] for b in BETAS)
        self.weights.mul_(1 - s.lr * s.weight_decay)
        self.weights.addcdiv_(self.first * (s.lr / rate), (self.second / root).sqrt_().add_(EPS), value=-1.0)


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
    return np.clip((z - mean) / scale, -1e6, 1e6).astype(np.float32)  # far beyond the cells, but with a finite square
