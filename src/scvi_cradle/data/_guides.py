"""Guide counts of a screen: what is registered about them, and the counts themselves."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from mudata import MuData

from scvi_cradle._constants import KEYS
from scvi_cradle._guides import guide_table
from scvi_cradle._labels import LabelRule
from scvi_cradle._validation import check_key, near_matches, preview
from scvi_cradle.data._queries import expression_of


def guide_note(
    data: AnnData | MuData, cells: AnnData, key: str | None, targets: Any, modality: str | None, rule: LabelRule
) -> dict[str, Any] | None:
    """Check guide counts with their targets and return what a registry keeps of them; None without guide counts.

    Parameters
    ----------
    data, cells
        The user's data, and its cells with all columns.
    key
        Key of ``obsm``; None: the guide modality of a MuData, if it has one and targets are given.
    targets
        ``guide_targets`` of ``setup_anndata``.
    modality
        Name of the guide modality.
    rule
        How labels are read; guides of its control tokens have no target.
    """
    in_modality = key is None and targets is not None and isinstance(data, MuData) and modality in data.mod
    if key is None and not in_modality:
        if targets is not None:
            msg = f"`guide_targets` names the targets of guide counts; received it without `guide_counts_key`{' or a guide modality' if isinstance(data, MuData) else ''}: name the counts, too."
            raise ValueError(msg)
        return None
    if targets is None:
        msg = "Guide counts need `guide_targets`, the target of every guide; received None: pass a DataFrame with the columns `guide` and `target`, a mapping, or a key of `uns`."
        raise ValueError(msg)
    if isinstance(targets, str):
        check_key(cells.uns, targets, "adata.uns", "guide_targets")
        targets = cells.uns[targets]
    note: dict[str, Any] = {"obsm_key": key, "modality": modality if in_modality else None}
    counts, guides = _read(data, cells, note)
    if not np.isfinite(counts.data).all() or (counts.data < 0).any():
        msg = "Guide counts must be finite and not negative; received NaN, infinite or negative values."
        raise ValueError(msg)
    if counts.shape[0] != cells.n_obs:
        msg = f"Every cell must have guide counts; received {counts.shape[0]} rows for {cells.n_obs} cells."
        raise ValueError(msg)
    of_guide = guide_table(guides, targets)
    kept = [(guide, target) for guide, target in of_guide.items() if target not in rule.control]
    return note | {"guides": [g for g, _ in kept], "targets": [t for _, t in kept]}


def check_targets(note: dict[str, Any], treatments: set[str]) -> None:
    """Raise ``ValueError`` for a treatment without guides; warn of targets that no cell is labelled with."""
    targets = set(note["targets"])
    unknown = sorted(treatments - targets)
    if unknown:
        msg = f"Every treatment among the labels must be the target of a guide; received {preview(unknown)} without{near_matches(unknown[0], targets)}: add the guides or mend the names."
        raise ValueError(msg)
    lacking = sorted(targets - treatments)
    if lacking:
        warnings.warn(
            f"No cell is labelled with {preview(lacking)}, which guides target: nothing is estimated for them.",
            UserWarning,
            stacklevel=7,
        )


def guide_counts(data: AnnData | MuData, note: dict[str, Any], modality: str | None) -> tuple[sp.csr_matrix, list[str]]:
    """Return the counts of targeting guides, shape ``(n_cells, n_guides)``, and the target of each column."""
    counts, guides = _read(data, expression_of(data, modality), note)
    position = {guide: i for i, guide in enumerate(guides)}
    return counts[:, [position[g] for g in note["guides"]]], list(note["targets"])


def non_targeting_counts(data: AnnData | MuData, registry: dict[str, Any]) -> np.ndarray | None:
    """Return the sum of the counts of guides without a target, ``(n_cells,)``; None where there are none."""
    fields = registry["field_registries"]
    if KEYS.GUIDES not in fields:
        return None
    note = fields[KEYS.GUIDES]["state_registry"]
    counts, guides = _read(data, expression_of(data, fields["X"]["data_registry"].get("mod_key")), note)
    others = [i for i, guide in enumerate(guides) if guide not in set(note["guides"])]
    return np.asarray(counts[:, others].sum(axis=1)).ravel() if others else None


def _read(data: AnnData | MuData, cells: AnnData, note: dict[str, Any]) -> tuple[sp.csr_matrix, list[str]]:
    if note["modality"] is not None:
        guides = data.mod[note["modality"]]
        rows = guides.obs_names.get_indexer(cells.obs_names)
        if (rows < 0).any():
            msg = f"Every cell must have guide counts; received {int((rows < 0).sum())} cells without in modality {note['modality']!r}: subset the MuData."
            raise ValueError(msg)
        return sp.csr_matrix(guides.X, dtype=np.float64)[rows], [str(g) for g in guides.var_names]
    key = note["obsm_key"]
    check_key(cells.obsm, key, "adata.obsm", "guide_counts_key")
    values = cells.obsm[key]
    if isinstance(values, pd.DataFrame):
        return sp.csr_matrix(values.to_numpy(dtype=np.float64)), [str(c) for c in values.columns]
    names_key = f"{key}_names"
    check_key(cells.uns, names_key, "adata.uns", "names of guide_counts_key")
    names = [str(n) for n in cells.uns[names_key]]
    if len(names) != values.shape[1]:
        msg = f"`uns[{names_key!r}]` must name every column of the guide counts; received {len(names)} names for {values.shape[1]} columns."
        raise ValueError(msg)
    return sp.csr_matrix(values, dtype=np.float64), names
