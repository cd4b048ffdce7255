"""Expression matrices that stay on disk, and their registration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp
import torch
from anndata.abc import CSCDataset, CSRDataset
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from torch import Tensor
from torch.utils.data import Dataset, Subset

from scvi_cradle._matrix import to_csr

MAX_GAP = 256
"""Rows that are read for nothing to save a further read."""


class StoredMatrix:
    """Rows of matrices on disk, one below the other; what is read comes as CSR, and nothing else is kept.

    Parameters
    ----------
    parts
        Matrices with a shape whose slices of rows are dense or sparse: those that
        :func:`anndata.io.sparse_dataset` opens, arrays of h5py and zarr, or anything of that form; all of one width.
        Their values are read in their common type.
    check
        What values have to pass whenever they are read, as a function of a block and its name.
    """

    def __init__(self, parts: Sequence[Any], check: Callable[[sp.csr_matrix, str], None] | None = None) -> None:
        self.parts, self.check = list(parts), check
        self.starts = np.cumsum([0, *(part.shape[0] for part in parts)])
        self.shape = (int(self.starts[-1]), int(parts[0].shape[1]))
        self.dtype = np.result_type(*(part.dtype for part in parts))

    def checked(self, block: sp.csr_matrix) -> sp.csr_matrix:
        """Return a block that was read, in the common type; an error if its values must not be."""
        if self.check is not None:
            self.check(block, "The screen on disk")
        return block.astype(self.dtype, copy=False)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> sp.csr_matrix:
        """Return rows by a slice, a mask or positions in any order, as CSR."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self._range(start, max(stop, start))
            rows = np.arange(start, stop, step)
        rows = np.atleast_1d(np.asarray(rows))
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        if not len(rows):
            return self._range(0, 0)
        distinct, inverse = np.unique(rows, return_inverse=True)
        runs = np.split(distinct, np.flatnonzero(np.diff(distinct) > MAX_GAP) + 1)
        blocks = [self._range(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in runs]
        block = sp.vstack(blocks, format="csr") if len(blocks) > 1 else blocks[0]
        return block if np.array_equal(distinct, rows) else block[inverse]

    def _range(self, start: int, stop: int) -> sp.csr_matrix:
        blocks = []
        for part, first, end in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            a, b = max(start, first), min(stop, end)
            if a < b:
                blocks.append(to_csr(part[int(a - first) : int(b - first)]))
        if not blocks:
            return sp.csr_matrix((0, self.shape[1]), dtype=self.dtype)
        return self.checked(sp.vstack(blocks, format="csr") if len(blocks) > 1 else blocks[0])


class StoredCells(Dataset):
    """Registered data of cells whose expression is on disk, in the form of :class:`scvi.data.AnnTorchDataset`.

    Parameters
    ----------
    manager
        Manager of the cells.
    keys
        Keys to return; default all.
    """

    def __init__(self, manager: AnnDataManager, keys: Sequence[str] | None = None) -> None:
        keys = list(manager.data_registry) if keys is None else list(keys)
        self.x = stored_matrix(manager) if REGISTRY_KEYS.X_KEY in keys else None
        self.columns = columns_of(manager, keys)
        self.n_cells = manager.adata.n_obs

    def __len__(self) -> int:
        return self.n_cells

    def __getitem__(self, rows: Any) -> dict[str, np.ndarray]:
        """Return the arrays of cells."""
        rows = np.atleast_1d(np.asarray(rows))
        arrays = {} if self.x is None else {REGISTRY_KEYS.X_KEY: dense(self.x[rows])}
        return arrays | self.columns[rows]


class StoredManager(AnnDataManager):
    """Manager of an AnnData whose registered expression is read from a :class:`StoredMatrix`.

    Managers that are made from it, for other AnnData, have no such matrix.
    """

    matrix: StoredMatrix | None = None

    def get_from_registry(self, registry_key: str) -> Any:
        """Return registered data; the expression as it is on disk."""
        if self.matrix is not None and registry_key == REGISTRY_KEYS.X_KEY:
            return self.matrix
        return super().get_from_registry(registry_key)

    def create_torch_dataset(self, indices: Any = None, data_and_attributes: Any = None, **kwargs: Any) -> Any:
        """Return a dataset of registered data."""
        if self.matrix is None:
            return super().create_torch_dataset(indices, data_and_attributes, **kwargs)
        cells = StoredCells(self, data_and_attributes)
        return cells if indices is None else Subset(cells, indices)


def columns_of(manager: AnnDataManager, keys: Sequence[str] | None = None) -> Any:
    """Return the dataset of what is registered beside the expression."""
    keys = manager.data_registry if keys is None else keys
    return AnnDataManager.create_torch_dataset(
        manager, data_and_attributes=[key for key in keys if key != REGISTRY_KEYS.X_KEY]
    )


def dense(block: sp.csr_matrix) -> np.ndarray:
    """Return rows as the dense array that a module takes."""
    return block.astype(np.float32).toarray()


def tensor_of(values: np.ndarray) -> Tensor:
    """Return an array as a tensor; one that cannot be written to is copied."""
    return torch.from_numpy(np.require(values, requirements=("C", "W")))


def stored_matrix(manager: AnnDataManager) -> StoredMatrix | None:
    """Return the registered expression if it is on disk, stored by rows."""
    x = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    if isinstance(x, StoredMatrix):
        return x
    if isinstance(x, CSRDataset | h5py.Dataset) and not isinstance(x, CSCDataset):
        return StoredMatrix([x])
    return None
