"""Rows that a pass over a matrix on disk sets aside."""

from __future__ import annotations

import tempfile
from types import TracebackType
from typing import Self

import numpy as np
import scipy.sparse as sp


class RowSpill:
    """Sparse rows in temporary files (of the folder that :mod:`tempfile` finds), read back in any order.

    Parameters
    ----------
    positions
        Sorted positions of the rows that are to be kept.
    n_columns
        Width of the rows.
    """

    def __init__(self, positions: np.ndarray, n_columns: int) -> None:
        self.positions, self.n_columns = positions, n_columns
        self.data, self.indices = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.ends = np.zeros(len(positions) + 1, dtype=np.int64)
        self.n_rows, self.dtype = 0, np.dtype(np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.data.close()
        self.indices.close()

    def keep(self, rows: np.ndarray, block: sp.csr_matrix) -> None:
        """Keep those of the rows that are to be kept; blocks come in the order of the matrix."""
        kept = block[np.isin(rows, self.positions)]
        self.dtype = kept.dtype
        kept.data.tofile(self.data)
        kept.indices.astype(np.int32).tofile(self.indices)
        end = self.n_rows + kept.shape[0]
        self.ends[self.n_rows + 1 : end + 1] = self.ends[self.n_rows] + kept.indptr[1:]
        self.n_rows = end

    def __getitem__(self, rows: np.ndarray) -> sp.csr_matrix:
        """Return kept rows by their positions in the matrix."""
        places = np.searchsorted(self.positions, rows)
        starts, lengths = self.ends[places], self.ends[places + 1] - self.ends[places]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        data, indices = np.empty(indptr[-1], dtype=self.dtype), np.empty(indptr[-1], dtype=np.int32)
        for file, out in ((self.data, data), (self.indices, indices)):
            for start, first, end in zip(starts, indptr[:-1], indptr[1:], strict=True):
                file.seek(start * out.itemsize)
                out[first:end] = np.fromfile(file, out.dtype, end - first)
        return sp.csr_matrix((data, indices, indptr), shape=(len(rows), self.n_columns))
