"""Posterior of effects under a scale mixture of Gaussians with one covariance of treatments, fitted by EM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from scipy.special import logsumexp, ndtr

SCALES = np.array([0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0])
BLOCK = 4_000_000  # numbers in an array of a block of genes


@dataclass(frozen=True)
class NoisyEffects:
    r"""Effects with the two parts of their sampling variance, genes first.

    Parameters
    ----------
    raw
        Effects :math:`r`, shape ``(n_genes, n_labels)``.
    own
        Sampling variance :math:`v` of the labels' own means, positive, same shape.
    shared
        Sampling variance :math:`v_0` of the mean of the controls, which every label's effect holds, ``(n_genes,)``.
    """

    raw: np.ndarray
    own: np.ndarray
    shared: np.ndarray

    def blocks(self, width: int) -> Iterator[tuple[slice, NoisyEffects]]:
        """Yield the effects in blocks of genes, so that arrays with ``width`` numbers per gene stay small."""
        size = max(1, BLOCK // width)
        for start in range(0, len(self.raw), size):
            rows = slice(start, start + size)
            yield rows, NoisyEffects(self.raw[rows], self.own[rows], self.shared[rows])


class Components(NamedTuple):
    """Posterior of sums of effects: a Gaussian mixture for every gene.

    Parameters
    ----------
    weights
        Shape ``(n_genes, n_components)``.
    mean, variance
        Of every component, shape ``(n_genes, n_components, n_sums)``.
    """

    weights: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


class Sums(NamedTuple):
    """Which effects are added up: those of ``labels[starts[i]:starts[i + 1]]`` give sum ``i``."""

    labels: np.ndarray
    starts: np.ndarray

    @classmethod
    def create(cls, members: Sequence[Sequence[int]]) -> Sums:
        """Return sums over the positions of labels, at least one each."""
        lengths = [len(m) for m in members]
        return cls(np.concatenate([np.asarray(m) for m in members]), np.concatenate([[0], np.cumsum(lengths)[:-1]]))

    def of(self, x: np.ndarray) -> np.ndarray:
        """Add up along axis 1: ``(n_genes, n_labels, ...)`` to ``(n_genes, n_sums, ...)``."""
        return np.add.reduceat(x[:, self.labels], self.starts, axis=1)


class Posterior(NamedTuple):
    """Moments and local false sign rates of sums of effects, each of shape ``(n_sums, n_genes)``."""

    mean: np.ndarray
    std: np.ndarray
    lfsr: np.ndarray


class MixturePrior(Protocol):
    r"""A prior :math:`\sum_k \pi_k N(0, w_k U)` of the effects of a gene."""

    def update(self, effects: NoisyEffects) -> tuple[MixturePrior, float]:
        """Return the prior after one round of EM, and the log marginal likelihood before it."""

    def components(self, effects: NoisyEffects, sums: Sums) -> Components:
        """Return the posterior of sums of effects."""

    @property
    def width(self) -> int:
        """Numbers per gene in the largest array of :meth:`components`, for one sum."""


@dataclass(frozen=True)
class FullPrior:
    """Scale mixture with any covariance.

    Parameters
    ----------
    weights
        Of the scales, shape ``(n_scales,)``.
    covariance
        Shape ``(n_labels, n_labels)``.
    pseudo_genes
        Genes with independent effects of the same variances that every round adds: they hold correlations down where
        genes are few.
    """

    weights: np.ndarray
    covariance: np.ndarray
    pseudo_genes: float = 1.0

    @classmethod
    def start(cls, effects: NoisyEffects) -> FullPrior:
        """Return equal weights, and the second moments of the effects with halved off-diagonals."""
        moments = effects.raw.T @ effects.raw / len(effects.raw)
        covariance = 0.5 * (moments + np.diag(np.diag(moments)))
        return cls(np.full(len(SCALES), 1 / len(SCALES)), covariance)

    @property
    def width(self) -> int:
        """Numbers per gene in the largest array."""
        return max(len(self.covariance) ** 2, 1)

    def update(self, effects: NoisyEffects) -> tuple[FullPrior, float]:
        """Return the prior after one round of EM, and the log marginal likelihood before it."""
        total, moments, likelihood = np.zeros_like(self.weights), np.zeros_like(self.covariance), 0.0
        for _, block in effects.blocks(self.width):
            basis, values, z, log_noise = _diagonalize(self.covariance, block)
            shrink, log_joint = self._scales(values, z, log_noise)
            evidence = logsumexp(log_joint, axis=1, keepdims=True)
            gamma = np.exp(log_joint - evidence)  # (n_genes, n_scales)
            likelihood += float(evidence.sum())
            total += gamma.sum(0)
            scaled = gamma / SCALES
            spread = np.einsum("gk,gkt->gt", scaled, shrink)
            centres = shrink * z[:, None] * np.sqrt(scaled)[:, :, None]  # (n_genes, n_scales, n_labels)
            spread_part = _by_label(basis * np.sqrt(spread)[:, None])
            centre_part = _by_label(basis @ centres.swapaxes(1, 2))
            moments += spread_part @ spread_part.T + centre_part @ centre_part.T
        covariance = moments / len(effects.raw)
        share = self.pseudo_genes / (self.pseudo_genes + len(effects.raw))
        covariance = (1 - share) * covariance + share * np.diag(np.diag(covariance))
        return FullPrior(total / total.sum(), covariance, self.pseudo_genes), likelihood

    def components(self, effects: NoisyEffects, sums: Sums) -> Components:
        """Return the posterior of sums of effects."""
        basis, values, z, log_noise = _diagonalize(self.covariance, effects)
        shrink, log_joint = self._scales(values, z, log_noise)
        gamma = np.exp(log_joint - logsumexp(log_joint, axis=1, keepdims=True))
        projected = sums.of(basis)  # (n_genes, n_sums, n_labels)
        mean = (shrink * z[:, None]) @ projected.swapaxes(1, 2)
        return Components(gamma, mean, shrink @ (projected**2).swapaxes(1, 2))

    def _scales(self, values: np.ndarray, z: np.ndarray, log_noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return shrinkage per scale, ``(n_genes, n_scales, n_labels)``, and log of weight times likelihood."""
        ratio = SCALES[:, None] * values[:, None]
        inside = np.log1p(ratio) + z[:, None] ** 2 / (1 + ratio)
        constant = log_noise[:, None] + values.shape[1] * np.log(2 * np.pi)
        with np.errstate(divide="ignore"):
            log_joint = np.log(self.weights) - 0.5 * (inside.sum(2) + constant)
        return ratio / (1 + ratio), log_joint


def _by_label(x: np.ndarray) -> np.ndarray:
    """Return ``(n_genes, n_labels, n)`` as ``(n_labels, n_genes * n)``."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def _diagonalize(covariance: np.ndarray, e: NoisyEffects) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    r"""Make noise and prior covariance diagonal together, gene by gene.

    With :math:`N = S S'` for the root :math:`S = V^{1/2} (I + u u')^{1/2}` and :math:`S^{-1} U S^{-T} = Q D Q'`, the
    effects are :math:`b = S Q y` with independent :math:`y_i \sim N(0, w D_i)`, seen with unit noise as
    :math:`z = Q' S^{-1} r`.

    Returns
    -------
    ``S Q`` of shape ``(n_genes, n_labels, n_labels)``, ``D`` and ``z`` of shape ``(n_genes, n_labels)``, and the
    log determinant of ``N``, shape ``(n_genes,)``.
    """
    deviation = np.sqrt(e.own)  # (n_genes, n_labels)
    u = np.sqrt(e.shared)[:, None] / deviation
    size = (u**2).sum(1, keepdims=True)
    unit = u / np.sqrt(np.where(size > 0, size, 1.0))
    inner = 1 - 1 / np.sqrt(1 + size)
    white = covariance / (deviation[:, :, None] * deviation[:, None, :])
    towards = np.einsum("gij,gj->gi", white, unit)
    along = np.einsum("gi,gi->g", unit, towards)[:, None]
    change = inner * (towards - 0.5 * inner * along * unit)  # W - unit change' - change unit'
    white -= unit[:, :, None] * change[:, None, :] + change[:, :, None] * unit[:, None, :]
    values, vectors = np.linalg.eigh(white)
    scaled = e.raw / deviation
    scaled -= inner * unit * (unit * scaled).sum(1, keepdims=True)
    z = np.einsum("gij,gi->gj", vectors, scaled)
    along_unit = np.einsum("gi,gij->gj", unit, vectors)
    outer = (np.sqrt(1 + size) - 1) * unit
    vectors += outer[:, :, None] * along_unit[:, None, :]
    vectors *= deviation[:, :, None]
    log_noise = np.log(e.own).sum(1) + np.log1p(size[:, 0])
    return vectors, np.maximum(values, 0.0), z, log_noise


def fit_prior(prior: MixturePrior, effects: NoisyEffects, n_rounds: int) -> MixturePrior:
    """Return the prior after rounds of EM."""
    for _ in range(n_rounds):
        prior, _ = prior.update(effects)
    return prior


def posterior(prior: MixturePrior, effects: NoisyEffects, sums: Sums) -> Posterior:
    """Return moments and local false sign rates of sums of effects."""
    mean, std, lfsr = (np.empty((len(sums.starts), len(effects.raw))) for _ in range(3))
    for genes, block in effects.blocks(max(prior.width, len(SCALES) * len(sums.starts))):
        parts = prior.components(block, sums)
        mean[:, genes], std[:, genes], lfsr[:, genes] = summarize(parts)
    return Posterior(mean, std, lfsr)


def summarize(parts: Components) -> Posterior:
    r"""Return moments and local false sign rates of Gaussian mixtures.

    The local false sign rate is :math:`\min(P(b \le 0), P(b \ge 0))`, summed exactly over the components: the
    probability that the more likely sign is wrong; 1 for an effect that is known to be 0.
    """
    weights = parts.weights[:, :, None]
    mean = (weights * parts.mean).sum(1)
    variance = (weights * (parts.variance + (parts.mean - mean[:, None]) ** 2)).sum(1)
    deviation = np.sqrt(parts.variance)
    known = deviation == 0
    ratio = parts.mean / np.where(known, 1.0, deviation)
    down = (weights * np.where(known, parts.mean <= 0, ndtr(-ratio))).sum(1)
    up = (weights * np.where(known, parts.mean >= 0, ndtr(ratio))).sum(1)
    lfsr = np.clip(np.minimum(down, up), 0.0, 1.0)
    return Posterior(mean.T, np.sqrt(variance).T, lfsr.T)
