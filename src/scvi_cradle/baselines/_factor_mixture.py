"""The scale mixture of Gaussians with a covariance of few factors, for hundreds of labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from scvi_cradle.baselines._covariance_mixture import SCALES, Components, NoisyEffects, Sums


class _Factors(NamedTuple):
    """Posterior of factors and control error under one scale, and what it is made of; genes first.

    Parameters
    ----------
    total
        Variance beside the factors, ``w d + v``, shape ``(n_genes, n_labels)``.
    loading
        Of the factors and, last, of the control's error, up to ``size``: shape ``(n_labels, rank + 1)``.
    size
        Scale of the columns of ``loading``, shape ``(n_genes, rank + 1)``.
    mean, covariance
        Shapes ``(n_genes, rank + 1)`` and ``(n_genes, rank + 1, rank + 1)``.
    log_joint
        Log of weight times likelihood, shape ``(n_genes,)``.
    """

    total: np.ndarray
    loading: np.ndarray
    size: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray
    log_joint: np.ndarray


@dataclass(frozen=True)
class FactorPrior:
    r"""Scale mixture with the covariance :math:`L L' + \mathrm{diag}(d)`.

    Rounds of EM are those of factor analysis with known noise, with parameter expansion (Liu et al. 1998): the
    covariance of the factors is estimated and put into ``L``.

    Parameters
    ----------
    weights
        Of the scales, shape ``(n_scales,)``.
    loading
        ``L``, shape ``(n_labels, rank)``.
    specific
        ``d``, shape ``(n_labels,)``.
    pseudo_genes
        Genes with independent effects of the same variances that every round adds.
    """

    weights: np.ndarray
    loading: np.ndarray
    specific: np.ndarray
    pseudo_genes: float = 1.0

    @classmethod
    def start(cls, effects: NoisyEffects, rank: int) -> FactorPrior:
        """Return equal weights, and half the leading parts of the second moments beyond the noise."""
        n_genes = len(effects.raw)
        moments = effects.raw.T @ effects.raw / n_genes
        values, vectors = np.linalg.eigh(moments - np.diag(effects.own.mean(0)) - effects.shared.mean())
        values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
        loading = vectors * np.sqrt(0.5 * np.maximum(values, 1e-3 * np.trace(moments) / len(moments)))
        diagonal = np.diag(moments)
        specific = np.maximum(diagonal - (loading**2).sum(1), 0.1 * diagonal)
        return cls(np.full(len(SCALES), 1 / len(SCALES)), loading, specific)

    @property
    def covariance(self) -> np.ndarray:
        """The covariance, shape ``(n_labels, n_labels)``."""
        return self.loading @ self.loading.T + np.diag(self.specific)

    @property
    def width(self) -> int:
        """Numbers per gene in the largest array."""
        n_labels, rank = self.loading.shape
        return max(n_labels, rank + 1) * (rank + 1)

    def update(self, effects: NoisyEffects) -> tuple[FactorPrior, float]:
        """Return the prior after one round of EM, and the log marginal likelihood before it."""
        n_labels, rank = self.loading.shape
        of_weights, likelihood = np.zeros(len(SCALES)), 0.0
        of_factors, cross, squares = np.zeros((rank, rank)), np.zeros((n_labels, rank)), np.zeros(n_labels)
        for _, block in effects.blocks(max(n_labels, (rank + 1) ** 2)):
            parts = list(self._posterior(block))
            log_joint = np.stack([p.log_joint for p in parts], axis=1)
            evidence = logsumexp(log_joint, axis=1, keepdims=True)
            gamma = np.exp(log_joint - evidence)
            likelihood += float(evidence.sum())
            of_weights += gamma.sum(0)
            for weight, scale, p in zip(gamma.T, SCALES, parts, strict=True):
                second = p.covariance + p.mean[:, :, None] * p.mean[:, None, :]
                of_factors += np.tensordot(weight, second[:, :rank, :rank], axes=1)
                left = second * p.size[:, :, None]  # (n_genes, rank + 1, rank + 1)
                gain = np.sqrt(scale) * self.specific / p.total  # of the specific part, (n_genes, n_labels)
                weighted = weight[:, None] * gain
                cross += (weighted * block.raw).T @ p.mean[:, :rank] - _paired(weighted, left[:, :, :rank], p.loading)
                both = _paired(weighted * gain, left * p.size[:, None, :], p.loading)
                squares += (weight[:, None] * self.specific * block.own / p.total).sum(0)
                fitted = (p.mean * p.size) @ p.loading.T
                squares += (weighted * gain * block.raw * (block.raw - 2 * fitted)).sum(0)
                squares += (both * p.loading).sum(1)
        n_genes = len(effects.raw)
        change = np.linalg.solve(of_factors, cross.T).T
        specific = (squares - (change * cross).sum(1)) / n_genes
        loading = (self.loading + change) @ np.linalg.cholesky(of_factors / n_genes)
        share = self.pseudo_genes / (self.pseudo_genes + n_genes)
        specific = specific + share * (loading**2).sum(1)
        weights = of_weights / of_weights.sum()
        return FactorPrior(weights, np.sqrt(1 - share) * loading, specific, self.pseudo_genes), likelihood

    def components(self, effects: NoisyEffects, sums: Sums) -> Components:
        """Return the posterior of sums of effects."""
        rank = self.loading.shape[1]
        log_joint, means, variances = [], [], []
        for scale, p in zip(SCALES, self._posterior(effects), strict=True):
            gain = scale * self.specific / p.total
            fitted = (p.mean * p.size) @ p.loading.T
            of_factors = p.mean[:, :rank] @ p.loading[:, :rank].T
            means.append(sums.of(of_factors + gain * (effects.raw - fitted)))
            slope = -gain[:, :, None] * p.loading * p.size[:, None, :]  # of effects on factors and control error
            slope[:, :, :rank] += p.loading[:, :rank]
            slope = sums.of(slope)
            variance = sums.of(gain * effects.own)
            variances.append(variance + ((slope @ p.covariance) * slope).sum(2))
            log_joint.append(p.log_joint)
        joint = np.stack(log_joint, axis=1)
        gamma = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
        return Components(gamma, np.stack(means, axis=1), np.stack(variances, axis=1))

    def _posterior(self, e: NoisyEffects) -> Iterator[_Factors]:
        """Yield for every scale the posterior of the factors, by the inverse of a matrix of their number."""
        n_labels, rank = self.loading.shape
        size = np.ones((len(e.raw), rank + 1))
        size[:, rank] = np.sqrt(e.shared)
        with np.errstate(divide="ignore"):
            log_weights = np.log(self.weights)
        for scale, log_weight in zip(SCALES, log_weights, strict=True):
            total = scale * self.specific + e.own
            loading = np.column_stack([np.sqrt(scale) * self.loading, np.ones(n_labels)])
            pairs = (loading[:, :, None] * loading[:, None, :]).reshape(n_labels, -1)
            precision = ((1 / total) @ pairs).reshape(-1, rank + 1, rank + 1) * size[:, :, None] * size[:, None, :]
            precision += np.eye(rank + 1)
            covariance = np.linalg.inv(precision)
            target = ((e.raw / total) @ loading) * size
            mean = np.einsum("gij,gj->gi", covariance, target)
            quadratic = (e.raw**2 / total).sum(1) - (target * mean).sum(1)
            log_size = np.log(total).sum(1) + np.linalg.slogdet(precision)[1] + n_labels * np.log(2 * np.pi)
            yield _Factors(total, loading, size, mean, covariance, log_weight - 0.5 * (quadratic + log_size))


def _paired(weight: np.ndarray, moments: np.ndarray, loading: np.ndarray) -> np.ndarray:
    """Return the sum over genes of ``weight[g, t] * loading[t] @ moments[g]``, shape ``(n_labels, n_columns)``."""
    summed = weight.T @ moments.reshape(len(moments), -1)
    return np.einsum("ti,tij->tj", loading, summed.reshape(len(loading), loading.shape[1], -1))
