"""Sums over training cells, and what one pass over cells that come by once leaves."""

from __future__ import annotations

import weakref

import numpy as np
import scipy.sparse as sp

from scvi_cradle._matrix import BLOCK_SIZE, check_finite, counts_problem
from scvi_cradle.data._spill import RowSpill

MIN_VARIANCE = 1e-12  # below it a gene is constant


class GeneSums:
    """Sums over cells from which moments and shares of genes come.

    Parameters
    ----------
    n_genes
        Number of genes.
    log
        Moments of ``log(1 + x)``, or of ``x``.
    """

    def __init__(self, n_genes: int, *, log: bool) -> None:
        self.log, self.n_cells = log, 0
        self.first, self.second, self.counts = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes)

    def add(self, block: sp.csr_matrix) -> np.ndarray:
        """Add cells; return the sum of each, shape ``(n_cells,)``."""
        block = sp.csr_matrix((block.data.astype(np.float64), block.indices, block.indptr), shape=block.shape)
        totals = np.asarray(block.sum(axis=1)).ravel()
        self.counts += np.asarray(block.sum(axis=0)).ravel()
        if self.log:
            block.data = np.log1p(block.data)
        self.first += np.asarray(block.sum(axis=0)).ravel()
        block.data **= 2
        self.second += np.asarray(block.sum(axis=0)).ravel()
        self.n_cells += block.shape[0]
        return totals

    def moments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return mean, variance (0 for a constant gene) and share of all counts of every gene."""
        mean = self.first / self.n_cells
        variance = np.maximum(self.second - self.n_cells * mean**2, 0.0) / max(self.n_cells - 1, 1)
        return mean, np.where(variance > MIN_VARIANCE, variance, 0.0), self.counts / max(self.counts.sum(), 1.0)


class CollectedCells:
    """Sums and totals of cells that come by once, and the rows of those that failed QC, in temporary files.

    A cell's position is its place in the order of coming.

    Parameters
    ----------
    n_genes
        Number of genes.
    """

    def __init__(self, n_genes: int) -> None:
        self.sums = {log: GeneSums(n_genes, log=log) for log in (False, True)}
        self.failed = RowSpill(None, n_genes)
        weakref.finalize(self, self.failed.close)
        self.example: sp.csr_matrix | None = None  # the first rows, or the first that are no counts
        self.is_counts = True
        self._totals: list[np.ndarray] = []
        self._blocks: list[sp.csr_matrix] = []
        self._flags: list[np.ndarray] = []
        self._n_waiting = 0

    @property
    def totals(self) -> np.ndarray:
        """Sum of every cell, shape ``(n_cells,)``."""
        return np.concatenate(self._totals)

    def add(self, block: sp.csr_matrix, failed: np.ndarray) -> None:
        """Add cells and which of them failed; they are worked on in blocks of the usual size.

        Raises
        ------
        ValueError
            For values that are not finite.
        """
        self._blocks.append(block)
        self._flags.append(failed)
        self._n_waiting += block.shape[0]
        while self._n_waiting >= BLOCK_SIZE:
            self._work_on(BLOCK_SIZE)

    def finish(self) -> None:
        """Work on the last cells."""
        if self._n_waiting:
            self._work_on(self._n_waiting)

    def _work_on(self, n: int) -> None:
        waiting, flags = sp.vstack(self._blocks, format="csr"), np.concatenate(self._flags)
        self._blocks, self._flags, self._n_waiting = [waiting[n:]], [flags[n:]], self._n_waiting - n
        block, failed = waiting[:n], flags[:n]
        check_finite(block, "The datamodule")
        if self.is_counts and counts_problem(block) is not None:
            self.is_counts, self.example = False, block
        if self.example is None:
            self.example = block
        positions = self.sums[False].n_cells + np.arange(n)
        self.failed.keep(positions[failed], block[failed])
        self._totals.append(self.sums[False].add(block))
        if self.is_counts:  # others are modelled as they are
            self.sums[True].add(block)
