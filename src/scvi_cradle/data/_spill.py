"""Rows that a pass over a matrix on disk sets aside."""

from __future__ import annotations

import tempfile
from functools import cached_property
from types import TracebackType
from typing import Self

import numpy as np
import scipy.sparse as sp


class RowSpill:
    """Sparse rows in temporary files (of the folder that :mod:`tempfile` finds), read back in any order.

    Parameters
    ----------
    wanted
        Sorted positions of the rows that are to be kept; None: all that are shown.
    n_columns
        Width of the rows.
    """

    def __init__(self, wanted: np.ndarray | None, n_columns: int) -> None:
        self.wanted, self.n_columns = wanted, n_columns
        self.data, self.indices = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.positions = [np.zeros(0, dtype=np.int64)]
        self.lengths = [np.zeros(1, dtype=np.int64)]
        self.dtype: np.dtype | None = None  # that all blocks have in common; the file holds double precision

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the files back."""
        self.data.close()
        self.indices.close()

    def keep(self, rows: np.ndarray, block: sp.csr_matrix) -> None:
        """Keep those of the rows that are to be kept; blocks come in the order of the matrix."""
        if self.wanted is not None:
            chosen = np.isin(rows, self.wanted)
            rows, block = rows[chosen], block[chosen]
        self.dtype = block.dtype if self.dtype is None else np.result_type(self.dtype, block.dtype)
        block.data.astype(np.float64).tofile(self.data)
        block.indices.astype(np.int32).tofile(self.indices)
        self.positions.append(rows)
        self.lengths.append(np.diff(block.indptr))

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the kept rows, and where each begins and ends in the files; nothing is kept after the first read."""
        return np.concatenate(self.positions), np.cumsum(np.concatenate(self.lengths), dtype=np.int64)

    def __getitem__(self, rows: np.ndarray) -> sp.csr_matrix:
        """Return kept rows by their positions in the matrix."""
        positions, ends = self._index
        places = np.searchsorted(positions, rows)
        starts, lengths = ends[places], ends[places + 1] - ends[places]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        data, indices = np.empty(indptr[-1]), np.empty(indptr[-1], dtype=np.int32)
        for file, out in ((self.data, data), (self.indices, indices)):
            for start, first, end in zip(starts, indptr[:-1], indptr[1:], strict=True):
                file.seek(start * out.itemsize)
                out[first:end] = np.fromfile(file, out.dtype, end - first)
        return sp.csr_matrix(
            (data.astype(self.dtype or np.float32), indices, indptr), shape=(len(rows), self.n_columns)
        )
