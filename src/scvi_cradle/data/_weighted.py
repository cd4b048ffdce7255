"""Training cells that are drawn with weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from scvi import settings
from scvi.data import AnnDataManager
from torch.utils.data import BatchSampler, DataLoader, Dataset, WeightedRandomSampler

from scvi_cradle.data._blocks import StoredSplitter


class _Cells(Dataset):
    """Batches of cells, of which a cell may be drawn more than once; every row is read once, in the order of the file."""

    def __init__(self, manager: AnnDataManager, indices: np.ndarray) -> None:
        self.data, self.indices = manager.create_torch_dataset(), np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, positions: list[int]) -> dict[str, Any]:
        """Return the tensors of a batch."""
        rows, inverse = np.unique(self.indices[positions], return_inverse=True)
        return {key: values[inverse] for key, values in self.data[rows].items()}


class WeightedSplitter(StoredSplitter):
    """Loaders of training and validation cells, the training cells drawn with replacement by their weights.

    Parameters
    ----------
    adata_manager
        Manager of the AnnData.
    cell_weights
        Sampling weight of every cell, shape ``(n_cells,)``; None: every training cell once per epoch.
    **kwargs
        Further arguments of :class:`StoredSplitter`.
    """

    def __init__(self, adata_manager: AnnDataManager, *, cell_weights: np.ndarray | None = None, **kwargs: Any) -> None:
        super().__init__(adata_manager, **kwargs)
        self.cell_weights = cell_weights

    def train_dataloader(self) -> DataLoader:
        """Return the loader of training cells."""
        if self.cell_weights is None:
            return super().train_dataloader()
        data = _Cells(self.adata_manager, self.train_idx)
        options = {
            "num_workers": settings.dl_num_workers,
            "persistent_workers": settings.dl_persistent_workers,
        } | self.data_loader_kwargs
        options.pop("distributed_sampler", None)
        batch_size = options.pop("batch_size")
        order = WeightedRandomSampler(self.cell_weights[self.train_idx].tolist(), len(self.train_idx))
        return DataLoader(
            data,
            sampler=BatchSampler(order, batch_size, self.drop_last),
            batch_size=None,
            pin_memory=self.pin_memory,
            **options,
        )
