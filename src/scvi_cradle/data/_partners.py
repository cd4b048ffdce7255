"""Control cells that cells are paired with in training, drawn while batches are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager

from scvi_cradle._constants import KEYS
from scvi_cradle._validation import check_key, preview
from scvi_cradle.data._queries import expression_of
from scvi_cradle.data._statistics import column

WITHIN = "within:"
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

    def sample(self, n_most: int) -> Partners:
        """Return partners from pools of no more than so many cells in all, drawn by torch's generator."""
        n_cells = sum(map(len, self.pools))
        if n_cells <= n_most:
            return self
        sizes = [max(len(pool) * n_most // n_cells, 1) if len(pool) else 0 for pool in self.pools]
        drawn = (torch.randperm(len(pool))[:size].numpy() for pool, size in zip(self.pools, sizes, strict=True))
        return replace(self, pools=tuple(pool[rows] for pool, rows in zip(self.pools, drawn, strict=True)))


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
