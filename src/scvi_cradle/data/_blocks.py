"""Training cells on disk: read in blocks of neighbouring rows, shuffled among the blocks that are in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scvi import REGISTRY_KEYS, settings
from scvi.data import AnnDataManager
from scvi.dataloaders import DataSplitter
from torch import Tensor, distributed

from scvi_cradle.data._annbatch import read_groups
from scvi_cradle.data._stored import StoredMatrix, columns_of, dense, stored_matrix, tensor_of

CHUNK_SIZE, N_CHUNKS = 512, 32
"""Rows that are read at once, and number of such chunks whose cells are shuffled: those of annbatch."""

Block = tuple[np.ndarray, sp.csr_matrix]
"""Positions of cells, and their rows."""


class BlockLoader:
    """Batches of cells on disk.

    The rows of the file are cut into chunks of ``chunk_size``. An epoch reads the chunks that hold wanted cells in random
    order, ``n_chunks`` at a time while the cells read before are in use, and draws its batches from them without
    replacement, so that every cell comes once an epoch and every batch is full but the last.

    Parameters
    ----------
    manager
        Manager of cells whose expression is on disk.
    indices
        Positions of the cells.
    batch_size
        Cells per batch.
    shuffle
        In random order, or in that of the file.
    drop_last
        Leave out a last batch that is not full.
    chunk_size, n_chunks
        Rows that are read at once, and how many such chunks are held (twice as many while the next are read).
    engine
        ``"anndata"``: what AnnData reads, by a thread; ``"annbatch"``: annbatch's reader of zarr stores.
    rank, n_ranks
        Which process of how many this is; each reads its part of the chunks, all have the same number of batches.
    epoch
        Returns the number of the epoch, on which the order of several processes depends, since they do not draw alike.
    """

    def __init__(
        self,
        manager: AnnDataManager,
        indices: np.ndarray,
        *,
        batch_size: int,
        shuffle: bool,
        drop_last: bool = False,
        chunk_size: int = CHUNK_SIZE,
        n_chunks: int = N_CHUNKS,
        engine: str = "anndata",
        rank: int = 0,
        n_ranks: int = 1,
        epoch: Callable[[], int] = int,
    ) -> None:
        matrix = stored_matrix(manager)
        assert matrix is not None
        self.matrix: StoredMatrix = matrix
        self.columns = columns_of(manager)
        self.indices = np.sort(np.asarray(indices, dtype=np.int64))
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.chunk_size, self.n_chunks = chunk_size, n_chunks
        self.engine, self.rank, self.n_ranks = engine, rank, n_ranks
        self.epoch = epoch

    def __len__(self) -> int:
        n_cells = len(self.indices) / self.n_ranks
        return math.floor(n_cells / self.batch_size) if self.drop_last else math.ceil(n_cells / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of batches; the order comes from torch's generator, of several processes from scvi's seed."""
        rng = np.random.default_rng(self._seed()) if self.shuffle else None
        n_left = len(self)
        rest: Block | None = None
        for positions, rows in self._blocks(rng):
            if rest is not None:
                positions, rows = np.concatenate([rest[0], positions]), sp.vstack([rest[1], rows], format="csr")
            order = np.arange(len(positions)) if rng is None else rng.permutation(len(positions))
            n_full = len(order) // self.batch_size * self.batch_size
            for start in range(0, n_full, self.batch_size):
                if n_left:
                    yield self._batch(positions, rows, order[start : start + self.batch_size])
                    n_left -= 1
            rest = positions[order[n_full:]], rows[order[n_full:]]
        if rest is not None and len(rest[0]) and n_left:
            yield self._batch(*rest, np.arange(len(rest[0])))

    def _seed(self) -> list[int]:
        return [int(torch.randint(2**31 - 1, (1,)))] if self.n_ranks == 1 else [settings.seed or 0, self.epoch()]

    def _batch(self, positions: np.ndarray, rows: sp.csr_matrix, chosen: np.ndarray) -> dict[str, Tensor]:
        arrays = {REGISTRY_KEYS.X_KEY: dense(rows[chosen])} | self.columns[positions[chosen]]
        return {key: tensor_of(values) for key, values in arrays.items()}

    def _blocks(self, rng: np.random.Generator | None) -> Iterator[Block]:
        """Yield what is held at once, read while the one before is in use."""
        of_chunk = self.indices // self.chunk_size
        first = np.flatnonzero(np.diff(of_chunk, prepend=-1))
        chunks = np.split(self.indices, first[1:])
        order = np.arange(len(chunks)) if rng is None else rng.permutation(len(chunks))
        groups = self._groups([chunks[i] for i in order])
        if self.engine == "annbatch":
            blocks: Iterator[sp.csr_matrix] = read_groups(self.matrix, groups)
        else:
            blocks = (self.matrix[rows] for rows in groups)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(next, blocks)
            for i, rows in enumerate(groups):
                block = reading.result()
                if i + 1 < len(groups):
                    reading = pool.submit(next, blocks)
                yield rows, block

    def _groups(self, chunks: list[np.ndarray]) -> list[np.ndarray]:
        """Return the sorted positions of the cells of this process that are held at once."""
        if self.n_ranks > 1:
            cells = np.concatenate(chunks)
            # an equal share: the last process takes the first cells again
            share = math.ceil(len(cells) / self.n_ranks)
            cells = np.resize(cells, share * self.n_ranks)[self.rank * share : (self.rank + 1) * share]
            chunks = np.array_split(cells, max(math.ceil(len(cells) / self.chunk_size), 1))
        return [np.sort(np.concatenate(chunks[i : i + self.n_chunks])) for i in range(0, len(chunks), self.n_chunks)]


class StoredSplitter(DataSplitter):
    """scvi-tools' data splitter, with :class:`BlockLoader` for cells whose expression is on disk.

    Parameters
    ----------
    adata_manager
        Manager of the AnnData.
    reading
        ``chunk_size``, ``n_chunks`` and ``engine`` of :class:`BlockLoader`.
    distributed_sampler
        Whether each process of a distributed training loads a part of the cells.
    **kwargs
        Further arguments of :class:`scvi.dataloaders.DataSplitter`.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        *,
        reading: dict[str, Any] | None = None,
        distributed_sampler: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(adata_manager, distributed_sampler=distributed_sampler, **kwargs)
        self.distributed_sampler = distributed_sampler
        self.reading = reading or {}
        self.is_stored = stored_matrix(adata_manager) is not None

    def train_dataloader(self) -> Any:
        """Return the loader of training cells, shuffled."""
        return self._block_loader(self.train_idx, training=True) if self.is_stored else super().train_dataloader()

    def val_dataloader(self) -> Any:
        """Return the loader of validation cells, if there are any."""
        if not self.is_stored or not len(self.val_idx):
            return super().val_dataloader()
        return self._block_loader(self.val_idx, training=False)

    def _block_loader(self, indices: np.ndarray, *, training: bool) -> BlockLoader:
        return BlockLoader(self.adata_manager, indices, **self._block_options(training=training))

    def _block_options(self, *, training: bool) -> dict[str, Any]:
        is_distributed = self.distributed_sampler and distributed.is_available() and distributed.is_initialized()
        return {
            "batch_size": self.data_loader_kwargs.get("batch_size", settings.batch_size),
            "shuffle": training,
            "drop_last": self.drop_last and training,
            "rank": distributed.get_rank() if is_distributed else 0,
            "n_ranks": distributed.get_world_size() if is_distributed else 1,
            "epoch": self._epoch,
            **self.reading,
        }

    def _epoch(self) -> int:
        return 0 if self.trainer is None else int(self.trainer.current_epoch)
