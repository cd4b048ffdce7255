"""Loaders of cells with their control partners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scvi import REGISTRY_KEYS, settings
from scvi.data import AnnDataManager
from scvi.dataloaders import BatchDistributedSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from scvi_cradle._constants import KEYS, partner_key
from scvi_cradle.data._blocks import BlockLoader, StoredSplitter
from scvi_cradle.data._partners import Partners
from scvi_cradle.data._statistics import column
from scvi_cradle.data._stored import columns_of, dense, tensor_of

MAX_PARTNERS = 50_000
PARTNER_KEYS = (
    REGISTRY_KEYS.X_KEY,
    REGISTRY_KEYS.BATCH_KEY,
    REGISTRY_KEYS.CAT_COVS_KEY,
    REGISTRY_KEYS.CONT_COVS_KEY,
)


class PairedCells(Dataset):
    """Batches of cells with expression and covariates of their control partners, each row read when it is asked for.

    Parameters
    ----------
    manager
        Manager of the AnnData.
    indices
        Positions of the cells.
    partners
        Their partners.
    redraw
        Whether partners that change are drawn anew for every batch.
    """

    def __init__(self, manager: AnnDataManager, indices: np.ndarray, partners: Partners, *, redraw: bool) -> None:
        self.cells = manager.create_torch_dataset()
        keys = [key for key in PARTNER_KEYS if key in manager.data_registry]
        self.controls = manager.create_torch_dataset(data_and_attributes=keys)
        self.indices, self.partners, self.redraw = np.asarray(indices), partners, redraw
        self.sorts = bool(getattr(manager.adata, "isbacked", False))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, positions: list[int]) -> dict[str, Any]:
        """Return the tensors of a batch."""
        rows = self.indices[positions]
        if self.sorts:  # backed data are read in their order
            rows = np.sort(rows)
        chosen = self.partners.draw(rows) if self.redraw else self.partners.of_cell[rows]
        distinct, inverse = np.unique(chosen, return_inverse=True)
        of_partner = {partner_key(key): values[inverse] for key, values in self.controls[distinct].items()}
        return self.cells[rows] | of_partner


class PairedBlocks(BlockLoader):
    """Batches of cells on disk with their control partners, which are held in memory as CSR.

    Parameters
    ----------
    manager
        Manager of the AnnData.
    indices
        Positions of the cells.
    partners
        Their partners. Of more than 50,000 that change, a random sample of so many is drawn from.
    redraw
        Whether partners that change are drawn anew for every batch.
    **kwargs
        Further arguments of :class:`BlockLoader`.
    """

    def __init__(
        self, manager: AnnDataManager, indices: np.ndarray, partners: Partners, *, redraw: bool, **kwargs: Any
    ) -> None:
        super().__init__(manager, indices, **kwargs)
        self.partners, self.redraw = partners.sample(MAX_PARTNERS) if redraw else partners, redraw
        changing = redraw and self.partners.group is not None
        cells = np.concatenate(self.partners.pools) if changing else partners.of_cell[self.indices]
        self.controls = np.unique(cells)
        self.profiles = self.matrix[self.controls]
        keys = [key for key in PARTNER_KEYS if key in manager.data_registry]
        self.of_controls = columns_of(manager, keys)

    def _batch(self, positions: np.ndarray, rows: sp.csr_matrix, chosen: np.ndarray) -> dict[str, Any]:
        cells = positions[chosen]
        partner = self.partners.draw(cells) if self.redraw else self.partners.of_cell[cells]
        arrays = {REGISTRY_KEYS.X_KEY: dense(self.profiles[np.searchsorted(self.controls, partner)])}
        arrays |= self.of_controls[partner]
        return super()._batch(positions, rows, chosen) | {
            partner_key(key): tensor_of(values) for key, values in arrays.items()
        }


class LabelBatches(Sampler[list[int]]):
    """Batches of cells of one label, in random order if asked for."""

    def __init__(self, codes: np.ndarray, batch_size: int, *, shuffle: bool) -> None:
        self.groups = [torch.as_tensor(np.flatnonzero(codes == code)) for code in np.unique(codes)]
        self.batch_size, self.shuffle = batch_size, shuffle

    def __len__(self) -> int:
        return sum(-(-len(group) // self.batch_size) for group in self.groups)

    def __iter__(self) -> Iterator[list[int]]:
        batches: list[list[int]] = []
        for group in self.groups:
            order = group[torch.randperm(len(group))] if self.shuffle else group
            batches += [part.tolist() for part in order.split(self.batch_size)]
        for i in torch.randperm(len(batches)).tolist() if self.shuffle else range(len(batches)):
            yield batches[i]


class PairedSplitter(StoredSplitter):
    """Loaders of training and validation cells with their control partners.

    Parameters
    ----------
    adata_manager
        Manager of the AnnData.
    partners
        Partners of the cells; None: plain loaders.
    members
        Which cells are members of batches, shape ``(n_cells,)``; the others are only partners. Default: all.
    by_label
        Whether a batch holds cells of one label only.
    **kwargs
        Further arguments of :class:`StoredSplitter`.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        *,
        partners: Partners | None = None,
        members: np.ndarray | None = None,
        by_label: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(adata_manager, **kwargs)
        self.partners, self.by_label = partners, by_label
        self.members = np.ones(adata_manager.adata.n_obs, dtype=bool) if members is None else members
        if self.external_indexing is not None:  # numbers of cells that losses add up over
            self.n_train, self.n_val = (int(self.members[part].sum()) for part in self.external_indexing[:2])
        if by_label and self.distributed_sampler:
            msg = "Batches of one label cannot be loaded by several processes; received alignment='mmd' with a distributed strategy: train on one device."
            raise NotImplementedError(msg)

    def train_dataloader(self) -> Any:
        """Return the loader of training cells, shuffled."""
        return super().train_dataloader() if self.partners is None else self._loader(self.train_idx, training=True)

    def val_dataloader(self) -> Any:
        """Return the loader of validation cells, if there are any."""
        if self.partners is None or not len(self.val_idx):
            return super().val_dataloader()
        return self._loader(self.val_idx, training=False)

    def _loader(self, indices: np.ndarray, *, training: bool) -> Any:
        assert self.partners is not None
        indices = indices[self.members[indices]]
        if self.is_stored and not self.by_label:
            return PairedBlocks(
                self.adata_manager, indices, self.partners, redraw=training, **self._block_options(training=training)
            )
        data = PairedCells(self.adata_manager, indices, self.partners, redraw=training)
        options = dict(self.data_loader_kwargs)
        batch_size, drop_last = options.pop("batch_size"), self.drop_last and training
        options.pop("distributed_sampler", None)
        options = {
            "num_workers": settings.dl_num_workers,
            "persistent_workers": settings.dl_persistent_workers,
        } | options
        sampler: Any
        if self.by_label:
            codes = column(self.adata_manager, KEYS.PERTURBATION)[indices]
            sampler = LabelBatches(codes, batch_size, shuffle=training)
        elif self.distributed_sampler:
            sampler = BatchDistributedSampler(data, batch_size=batch_size, drop_last=drop_last, shuffle=training)
        else:
            order = RandomSampler(data) if training else SequentialSampler(data)
            sampler = BatchSampler(order, batch_size, drop_last)
        return DataLoader(data, sampler=sampler, batch_size=None, pin_memory=self.pin_memory, **options)
