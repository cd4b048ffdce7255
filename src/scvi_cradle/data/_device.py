"""Training cells that are kept on the device of training: counts as CSR there, dense batch by batch."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scvi import REGISTRY_KEYS, settings
from scvi.data import AnnDataManager
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from scvi_cradle._matrix import BLOCK_SIZE, rows_of, to_csr
from scvi_cradle.data._blocks import StoredSplitter

SHARE_OF_FREE = 0.5
"""Data move to a GPU by themselves if they take no more than this share of its free memory."""
KNOWN_OPTIONS = {"batch_size", "distributed_sampler", "num_workers", "persistent_workers"}
"""Options of loaders that mean nothing for data on a device, or are kept to."""


class SparseRows:
    """Rows of a matrix as CSR tensors on a device, given out as dense tensors.

    Parameters
    ----------
    matrix
        In-memory matrix, sparse or dense, shape ``(n_cells, n_columns)``.
    rows
        Positions of the rows to keep.
    dtype
        Numpy's type of the tensors that are given out.
    device
        Where they are kept.
    """

    def __init__(self, matrix: Any, rows: np.ndarray, dtype: Any, device: torch.device) -> None:
        if sp.issparse(matrix):
            matrix = to_csr(matrix)
        size, end = int(stored_per_row(matrix, rows).sum()), 0
        self.n_columns = matrix.shape[1]
        self.data = torch.as_tensor(np.empty(0, dtype=dtype), device=device).new_empty(size)
        self.indices = torch.empty(size, dtype=torch.int32, device=device)
        # on the host: sizes of batches without waiting for the device
        self.lengths = np.zeros(len(rows), dtype=np.int64)
        for start in range(0, len(rows), BLOCK_SIZE):
            block = rows_of(matrix, rows[start : start + BLOCK_SIZE])
            block.sum_duplicates()
            self.lengths[start : start + BLOCK_SIZE] = np.diff(block.indptr)
            self.data[end : end + block.nnz] = torch.as_tensor(block.data.astype(dtype)).to(device)
            self.indices[end : end + block.nnz] = torch.as_tensor(block.indices.astype(np.int32)).to(device)
            end += block.nnz
        first = np.cumsum(self.lengths) - self.lengths
        self.first, self.n_stored = (torch.as_tensor(v, device=device) for v in (first, self.lengths))

    def take(self, rows: np.ndarray, index: Tensor) -> Tensor:
        """Return rows, dense, shape ``(len(rows), n_columns)``; ``index`` are the same rows on the device."""
        size, n_stored = int(self.lengths[rows].sum()), self.n_stored[index]
        row = torch.repeat_interleave(n_stored, output_size=size)  # (size,), as all that follows
        shift = self.first[index] - (n_stored.cumsum(0) - n_stored)
        entry = torch.arange(size, device=index.device) + shift[row]
        place = (row * self.n_columns).add_(self.indices.index_select(0, entry))
        dense = self.data.new_zeros(len(rows), self.n_columns)
        dense.view(-1).scatter_(0, place, self.data.index_select(0, entry))
        return dense


class _Cells(Dataset):
    """Batches of cells that lie on a device; ``fields`` is emptied when training has ended."""

    def __init__(self, fields: dict[str, SparseRows | Tensor], first: int, n_cells: int, device: torch.device) -> None:
        self.fields, self.first, self.n_cells, self.device = fields, first, n_cells, device

    def __len__(self) -> int:
        return self.n_cells

    def __getitem__(self, positions: list[int]) -> dict[str, Tensor]:
        """Return the tensors of a batch."""
        rows = np.asarray(positions, dtype=np.int64) + self.first
        index = torch.as_tensor(rows, device=self.device)
        return {k: v.take(rows, index) if isinstance(v, SparseRows) else v[index] for k, v in self.fields.items()}


class DeviceDataSplitter(StoredSplitter):
    """Loaders of cells whose registered data are kept on the device of training, where they fit.

    Counts are kept as CSR tensors (8 bytes per non-zero value) and made dense there, batch by batch, so that nothing is
    sent to the device during training. The batches, their order and their seed are those of
    :class:`scvi.dataloaders.DataSplitter`, which is what this class is wherever data are not kept on the device; cells on disk
    are read in blocks (:class:`StoredSplitter`).

    Parameters
    ----------
    adata_manager
        Manager of the AnnData or MuData.
    load_on_device
        ``"auto"``: on a CUDA device if the counts of training and validation cells take at most half of its free memory;
        never on a CPU, where it is slower. True: on whatever device is trained on, without a look at its memory. False:
        never. Data that are backed or lazy, several processes, ``load_sparse_tensor`` and options of loaders other than
        batch size and workers always take the usual loaders, with a warning for True.
    **kwargs
        Further arguments of :class:`StoredSplitter`.
    """

    def __init__(
        self, adata_manager: AnnDataManager, *, load_on_device: bool | Literal["auto"] = "auto", **kwargs: Any
    ) -> None:
        super().__init__(adata_manager, **kwargs)
        self.load_on_device = load_on_device
        self.fields: dict[str, SparseRows | Tensor] | None = None

    def train_dataloader(self) -> DataLoader:
        """Return the loader of training cells, shuffled."""
        if not self._is_loaded():
            return super().train_dataloader()
        return self._loader(0, len(self.train_idx), training=True)

    def val_dataloader(self) -> DataLoader | None:
        """Return the loader of validation cells, if there are any."""
        if not len(self.val_idx) or not self._is_loaded():
            return super().val_dataloader()
        return self._loader(len(self.train_idx), len(self.val_idx), training=False)

    def teardown(self, stage: str | None = None) -> None:
        """Free the memory of the device: trainer and loaders live on with the model."""
        if self.fields is not None:
            self.fields.clear()
            self.fields = None

    def _loader(self, first: int, n_cells: int, *, training: bool) -> DataLoader:
        assert self.fields is not None
        data = _Cells(self.fields, first, n_cells, self._device)
        order = RandomSampler(data) if training else SequentialSampler(data)
        batches = BatchSampler(
            order, self.data_loader_kwargs.get("batch_size", settings.batch_size), self.drop_last and training
        )
        return DataLoader(data, sampler=batches, batch_size=None)

    def _is_loaded(self) -> bool:
        """Load the cells unless they are; return whether they are."""
        if self.fields is not None:
            return True
        if not self.load_on_device:
            return False
        obstacle = self._obstacle()
        if obstacle is not None:
            if self.load_on_device is True:
                msg = f"The cells are loaded batch by batch and not kept on the device: {obstacle}."
                warnings.warn(msg, UserWarning, stacklevel=2)
            return False
        device = self._device
        cells = np.concatenate([self.train_idx, self.val_idx]).astype(np.int64)
        data = self.adata_manager.create_torch_dataset()
        if self.load_on_device == "auto" and not fits(data.data, cells, device):
            return False
        self.fields = {
            key: _field(key, data.data[key], cells, dtype, device) for key, dtype in data.keys_and_dtypes.items()
        }
        return True

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _obstacle(self) -> str | None:
        """Return what keeps the data from the device."""
        x = self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)
        if not isinstance(x, np.ndarray) and not sp.issparse(x):
            return "they are backed or lazy"
        if self.data_loader_kwargs.get("distributed_sampler"):
            return "several processes train"
        if self.load_sparse_tensor or not set(self.data_loader_kwargs) <= KNOWN_OPTIONS:
            return "options of the loaders were given"
        return None


def stored_per_row(matrix: Any, rows: np.ndarray) -> np.ndarray:
    """Return the number of stored (of a dense matrix: non-zero) values of rows, shape ``(len(rows),)``."""
    if sp.issparse(matrix):
        return np.diff(to_csr(matrix).indptr)[rows].astype(np.int64)
    blocks = [np.count_nonzero(matrix[rows[i : i + BLOCK_SIZE]], axis=1) for i in range(0, len(rows), BLOCK_SIZE)]
    return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)


def fits(data: dict[str, Any], cells: np.ndarray, device: torch.device) -> bool:
    """Return whether registered data of cells take no more than half of the free memory of a CUDA device."""
    if device.type != "cuda":
        return False
    n_bytes = 8 * sum(
        int(stored_per_row(values, cells).sum())
        if _is_sparse(key, values)
        else len(cells) * int(np.prod(values.shape[1:]))
        for key, values in data.items()
    )
    return n_bytes <= SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0]


def _is_sparse(key: str, values: Any) -> bool:
    return key == REGISTRY_KEYS.X_KEY or sp.issparse(values)


def _field(key: str, values: Any, cells: np.ndarray, dtype: Any, device: torch.device) -> SparseRows | Tensor:
    """Return registered data of cells on a device."""
    if _is_sparse(key, values):
        return SparseRows(values, cells, dtype, device)
    rows = values.iloc[cells].to_numpy() if isinstance(values, pd.DataFrame) else values[cells]
    return torch.as_tensor(rows.astype(dtype), device=device)
