"""Indices of training, validation and test cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from anndata import AnnData
from scvi.data import AnnDataManager
from scvi.dataloaders import DataSplitter

from scvi_cradle._validation import check_key, preview

SPLIT_VALUES = ("train", "val", "test", "unused")


def split_indices(
    manager: AnnDataManager,
    split_key: str | None,
    *,
    external_indexing: Sequence[np.ndarray] | None = None,
    **splitter_kwargs: Any,
) -> list[np.ndarray]:
    """Return training, validation and other cells, from a column or at random as scvi-tools does it.

    Parameters
    ----------
    manager
        Manager of the AnnData.
    split_key
        Column of ``"train"``, ``"val"``, ``"test"``, ``"unused"``; ``None``: a random split.
    external_indexing
        Positions of training, validation and test cells, as scvi-tools takes them; instead of ``split_key``.
    splitter_kwargs
        ``train_size``, ``validation_size``, ``shuffle_set_split``, ``batch_size`` of
        :class:`~scvi.dataloaders.DataSplitter`.

    Raises
    ------
    KeyError
        If there is no column ``split_key``.
    ValueError
        If the column holds anything else or misses values, or if no cell is for training.
    """
    if external_indexing is not None:
        if split_key is not None:
            msg = "The split comes from `split_key` or from `external_indexing`; received both: leave one out."
            raise ValueError(msg)
        return [np.asarray(i, dtype=np.int64) for i in (*external_indexing, [], [])[:3]]
    if split_key is None:
        splitter = DataSplitter(manager, **splitter_kwargs)
        splitter.setup()
        return [np.asarray(i) for i in (splitter.train_idx, splitter.val_idx, splitter.test_idx)]
    split = _split_column(manager.adata, split_key)
    train, val = np.flatnonzero(split == "train"), np.flatnonzero(split == "val")
    if not len(train):
        msg = f"`obs[{split_key!r}]` must mark at least one cell as 'train'; received {preview(sorted(set(split)))}."
        raise ValueError(msg)
    return [train, val, np.flatnonzero((split != "train") & (split != "val"))]


def _split_column(adata: AnnData, split_key: str) -> np.ndarray:
    check_key(adata.obs, split_key, "adata.obs", "split_key")
    column = adata.obs[split_key]
    if column.isna().any():
        msg = f"`obs[{split_key!r}]` must hold one of {SPLIT_VALUES} for every cell; received {int(column.isna().sum())} missing values."
        raise ValueError(msg)
    values = column.astype(str).to_numpy()
    unknown = sorted(set(values) - set(SPLIT_VALUES))
    if unknown:
        msg = f"`obs[{split_key!r}]` must hold only {SPLIT_VALUES}; received {preview(unknown)}: see `scvi_cradle.pp.split_perturbations`."
        raise ValueError(msg)
    return values
