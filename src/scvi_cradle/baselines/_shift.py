"""Change counts of cells so that their mean log2 expression moves by a given effect."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.stats import poisson

from scvi_cradle._constants import COUNTS_PER_CELL

N_LIBRARIES = 16
SHARES = np.logspace(-9.0, 0.0, 361)
LARGE_MEAN = 50.0
MAX_COUNT = 120


class CountShifter:
    """Translate effects on mean log2 expression into shares of counts, and draw counts.

    Parameters
    ----------
    control_mean
        Mean ``log2(1 + 1e4 x / total)`` of the controls, shape ``(n_genes,)``.
    controls
        Counts of control cells, shape ``(n_controls, n_genes)``; only their totals are used here.

    Notes
    -----
    With ``H(p)`` the mean of ``log2(1 + 1e4 y / L)`` for ``y ~ Poisson(p L)`` over the library sizes ``L`` of the
    controls, a gene of mean ``h`` has the effective share ``H^-1(h)``, and ``H^-1(h + effect)`` after the perturbation.
    """

    def __init__(self, control_mean: np.ndarray, controls: sp.csr_matrix) -> None:
        totals = np.asarray(controls.sum(axis=1, dtype=np.float64)).ravel()
        positive = totals[totals > 0]
        middle = (np.arange(N_LIBRARIES) + 0.5) / N_LIBRARIES
        libraries = np.quantile(positive, middle) if len(positive) else np.ones(N_LIBRARIES)
        expected = np.stack([mean_log_of_poisson(SHARES * size, size) for size in libraries]).mean(axis=0)
        share_seen = len(positive) / max(len(totals), 1)  # empty cells contribute 0 to every mean
        self._expression = np.concatenate([[0.0], np.maximum.accumulate(expected * share_seen)])
        self._control_mean = control_mean
        self._share = self._inverse(control_mean)

    def _inverse(self, expression: np.ndarray) -> np.ndarray:
        return np.interp(expression, self._expression, np.concatenate([[0.0], SHARES]))

    def apply(self, cells: sp.csr_matrix, effect: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
        """Return ``cells``, shape ``(n_cells, n_genes)``, changed by ``effect``, shape ``(n_genes,)``."""
        target = np.where(effect == 0, self._share, self._inverse(self._control_mean + effect))
        falls, rises = target < self._share, target > self._share
        kept = np.where(falls, target / np.where(falls, self._share, 1.0), 1.0)
        out = cells.astype(np.float32)
        thinned = falls[out.indices]
        counts = out.data[thinned].astype(np.int64)
        out.data[thinned] = rng.binomial(counts, kept[out.indices[thinned]])
        genes = np.flatnonzero(rises)
        if len(genes):
            totals = np.asarray(cells.sum(axis=1, dtype=np.float64)).ravel()
            added = rng.poisson(np.outer(totals, (target - self._share)[genes]))  # (n_cells, n_rising)
            rows, columns = np.nonzero(added)
            drawn = added[rows, columns].astype(np.float32)
            out = out + sp.csr_matrix((drawn, (rows, genes[columns])), shape=out.shape, dtype=np.float32)
        out.eliminate_zeros()
        out.sort_indices()
        return out


def mean_log_of_poisson(mean: np.ndarray, library: float) -> np.ndarray:
    """Return the expectation of ``log2(1 + 1e4 y / library)`` for Poisson ``y`` with every mean, shape of ``mean``."""
    scale = COUNTS_PER_CELL / library
    small = mean < LARGE_MEAN
    out = np.empty_like(mean)
    counts = np.arange(MAX_COUNT + 1)
    out[small] = poisson.pmf(counts, mean[small][:, None]) @ np.log1p(scale * counts)
    large = mean[~small]
    out[~small] = np.log1p(scale * large) - 0.5 * large * (scale / (1.0 + scale * large)) ** 2  # second order
    return out / np.log(2.0)
