"""Control cells that cells are paired with in training, drawn while batches are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS, settings
from scvi.data import AnnDataManager
from scvi.dataloaders import BatchDistributedSampler, DataSplitter
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from scvi_cradle._constants import KEYS, partner_key
from scvi_cradle._validation import check_key, preview
from scvi_cradle.data._queries import expression_of
from scvi_cradle.data._statistics import column

WITHIN = "within:"
PARTNER_KEYS = (
    REGISTRY_KEYS.X_KEY,
    REGISTRY_KEYS.BATCH_KEY,
    REGISTRY_KEYS.CAT_COVS_KEY,
    REGISTRY_KEYS.CONT_COVS_KEY,
)
PAIRINGS = ("random", "fixed", "shared")


@dataclass(frozen=True)
class Partners:
    """Control partners of cells.

    Parameters
    ----------
    of_cell
        Position of every cell's partner, shape ``(n_cells,)``; -1 for cells that have none.
    group
        Group of every cell, shape ``(n_cells,)``, or None where partners never change.
    pools
        Positions of the control cells of every group.
    """

    of_cell: np.ndarray
    group: np.ndarray | None = None
    pools: tuple[np.ndarray, ...] = ()

    def draw(self, cells: np.ndarray) -> np.ndarray:
        """Return partners of cells, drawn anew by torch's generator where partners change."""
        if self.group is None:
            return self.of_cell[cells]
        uniform = torch.rand(len(cells), dtype=torch.float64).numpy()
        return _pick(self.pools, self.group[cells], uniform)


def _pick(pools: tuple[np.ndarray, ...], group: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return a member of the pool of every group from numbers in [0, 1)."""
    sizes = np.array([len(pool) for pool in pools])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return np.concatenate(pools)[starts[group] + (uniform * sizes[group]).astype(np.int64)]


def check_pairing(pairing: str, column_key: str | None) -> None:
    """Raise ``ValueError`` for an unknown pairing, and for a column of partners without or beside ``"shared"``."""
    if not isinstance(pairing, str) or (
        pairing not in PAIRINGS and not (pairing.startswith(WITHIN) and pairing != WITHIN)
    ):
        msg = f"`control_pairing` must be one of {PAIRINGS} or 'within:<column of obs>'; received {pairing!r}."
        raise ValueError(msg)
    if (pairing == "shared") != (column_key is not None):
        msg = f"`control_partner_key` names the column of partners for control_pairing='shared' and for no other; received control_pairing={pairing!r} with {column_key!r}."
        raise ValueError(msg)


def find_partners(
    manager: AnnDataManager,
    split: Sequence[np.ndarray],
    control_code: int,
    *,
    pairing: str,
    column_key: str | None = None,
    pair_controls: bool = True,
    seed: int = 0,
) -> Partners:
    """Find the control partners of training and validation cells among the training controls.

    Parameters
    ----------
    manager
        Manager of the AnnData.
    split
        Positions of training cells and of validation cells; the rest is not used.
    control_code
        Code of the control label.
    pairing
        ``"random"``: a training control, for training cells drawn anew whenever the cell is loaded; ``"fixed"``: drawn
        once; ``"within:<key>"``: drawn anew among controls with the same value of ``obs[key]``; ``"shared"``: named by
        ``obs[column_key]``.
    column_key
        Column of names of control cells, for ``"shared"``.
    pair_controls
        Whether control cells have partners, too.
    seed
        Seed of partners that are drawn once; those of validation cells always are.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If a cell has no partner, or one that is no control cell or not of the cell's own part of the split.
    """
    train, val = (np.asarray(part, dtype=np.int64) for part in split[:2])
    codes = column(manager, KEYS.PERTURBATION).astype(np.int64)
    is_control = codes == control_code
    controls = train[is_control[train]]
    paired = [part if pair_controls else part[~is_control[part]] for part in (train, val)]
    cells = np.concatenate(paired)
    adata = expression_of(manager.adata, manager.data_registry[REGISTRY_KEYS.X_KEY].get("mod_key"))
    if pairing == "shared":
        in_train, in_either = np.zeros(len(codes), dtype=bool), np.zeros(len(codes), dtype=bool)
        in_train[train] = in_either[train] = in_either[val] = True
        return Partners(
            _named_partners(adata, str(column_key), paired, (is_control & in_train, is_control & in_either))
        )
    group = np.zeros(len(codes), dtype=np.int64)
    pools: tuple[np.ndarray, ...] = (controls,)
    if pairing.startswith(WITHIN):
        group, pools = _groups_of(adata, pairing.removeprefix(WITHIN), cells, controls)
    of_cell = np.full(len(codes), -1)
    of_cell[cells] = _pick(pools, group[cells], np.random.default_rng(seed).random(len(cells)))
    return Partners(of_cell) if pairing == "fixed" else Partners(of_cell, group, pools)


def _groups_of(
    adata: AnnData, key: str, cells: np.ndarray, controls: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    values = partner_column(adata, key, "control_pairing", np.arange(adata.n_obs)).astype(str).to_numpy()
    names, group = np.unique(values, return_inverse=True)
    pools = tuple(controls[group[controls] == g] for g in range(len(names)))
    alone = [str(names[g]) for g in np.unique(group[cells]) if not len(pools[g])]
    if alone:
        msg = f"Every value of `obs[{key!r}]` must have training controls for control_pairing='within:{key}'; received {preview(alone)} without: leave those cells out or pair at random."
        raise ValueError(msg)
    return group, pools


def partner_column(adata: AnnData, key: str, argument: str, cells: np.ndarray) -> Any:
    """Return a column of ``obs`` without missing values in the given cells.

    Raises
    ------
    KeyError, ValueError
        If it is not there, or if values are missing.
    """
    check_key(adata.obs, key, "adata.obs", argument)
    missing = int(adata.obs[key].iloc[cells].isna().sum())
    if missing:
        msg = f"`obs[{key!r}]` must have a value for every cell to pair cells by it; received {missing} missing values."
        raise ValueError(msg)
    return adata.obs[key]


def _named_partners(
    adata: AnnData, key: str, parts: Sequence[np.ndarray], allowed: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return the partners named by training and validation cells, each of which may only name the allowed cells."""
    if not adata.obs_names.is_unique:
        msg = f"Cell names must be unique to be named in `obs[{key!r}]`; received duplicates: call `adata.obs_names_make_unique()`."
        raise ValueError(msg)
    names = partner_column(adata, key, "control_partner_key", np.concatenate(parts)).astype(str)
    of_cell = adata.obs_names.get_indexer(names)
    for part, may_be, kind, where in zip(
        parts, allowed, ("training", "validation"), ("training", "training and validation"), strict=True
    ):
        partner = of_cell[part]
        wrong = (partner < 0) | ~may_be[partner]
        if wrong.any():
            msg = f"`obs[{key!r}]` must name a control cell among the {where} cells for every {kind} cell; received {preview(names.iloc[part[wrong]])}: name training controls, and use a `split_key` that never parts partners."
            raise ValueError(msg)
    return of_cell


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


class PairedSplitter(DataSplitter):
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
    distributed_sampler
        Whether each process of a distributed training loads a part of the cells.
    **kwargs
        Further arguments of :class:`scvi.dataloaders.DataSplitter`.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        *,
        partners: Partners | None = None,
        members: np.ndarray | None = None,
        by_label: bool = False,
        distributed_sampler: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(adata_manager, distributed_sampler=distributed_sampler, **kwargs)
        self.partners, self.by_label, self.distributed_sampler = partners, by_label, distributed_sampler
        self.members = np.ones(adata_manager.adata.n_obs, dtype=bool) if members is None else members
        if self.external_indexing is not None:  # numbers of cells that losses add up over
            self.n_train, self.n_val = (int(self.members[part].sum()) for part in self.external_indexing[:2])
        if by_label and distributed_sampler:
            msg = "Batches of one label cannot be loaded by several processes; received alignment='mmd' with a distributed strategy: train on one device."
            raise NotImplementedError(msg)

    def train_dataloader(self) -> DataLoader:
        """Return the loader of training cells, shuffled."""
        return super().train_dataloader() if self.partners is None else self._loader(self.train_idx, training=True)

    def val_dataloader(self) -> DataLoader | None:
        """Return the loader of validation cells, if there are any."""
        if self.partners is None or not len(self.val_idx):
            return super().val_dataloader()
        return self._loader(self.val_idx, training=False)

    def _loader(self, indices: np.ndarray, *, training: bool) -> DataLoader:
        assert self.partners is not None
        indices = indices[self.members[indices]]
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
