"""Splits of cells and of perturbations into training, validation and test."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scvi_cradle._labels import LabelRule, canonical_labels, check_has_control
from scvi_cradle._validation import check_key, check_one_of, check_positive, check_probability, check_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

SCHEMES = ("combinations", "cells", "perturbations")


def split_perturbations(
    adata: AnnData,
    perturbation_key: str,
    *,
    scheme: Literal["combinations", "cells", "perturbations"] = "combinations",
    control: str | Sequence[str | None] = "control",
    sep: str | None = "+",
    test_fraction: float = 0.25,
    val_fraction: float = 0.2,
    seed: int = 0,
    key_added: str = "split",
    exact_cells: bool = False,
) -> None:
    """Write ``train``, ``val`` and ``test`` into a column of ``obs``.

    Parameters
    ----------
    adata
        Data with labels; ``obs[key_added]`` is written, nothing else.
    perturbation_key
        Column of ``obs`` with perturbation labels.
    scheme
        ``"combinations"``: all cells of the held-out combinations are for testing. Combinations are sorted, shuffled
        by ``seed``, and the last ``ceil(test_fraction * n)`` held out; one whose treatments would then be missing from
        training is passed over. ``"cells"``: ``test_fraction`` of the cells of every label.
        ``"perturbations"``: ``ceil(test_fraction * n)`` of the treatments that occur alone, with every combination
        that contains them.
    control, sep
        Label (or labels) of controls, and the text between the treatments of a combination.
    test_fraction
        Share that is held out, of combinations, cells or treatments; between 0 and 1.
    val_fraction
        Share of validation among the cells that are not for testing, label by label and rounded to the nearest
        integer; every label keeps a training cell. At least 0, below 1.
    seed
        Seed of the split; the order of the cells does not change what is held out.
    key_added
        Column to write.
    exact_cells
        For ``"combinations"``, the papers' split: cells of combinations are first divided into test
        (``val_fraction``), validation (``val_fraction`` of the rest) and training; held-out combinations keep only
        their test cells, the others only their training and validation cells, and what remains is ``unused``.

    Raises
    ------
    KeyError
        If ``perturbation_key`` is missing.
    TypeError
        If ``obs`` or ``var`` are not in memory (``read_lazy``).
    ValueError
        For arguments out of range, no control cell, or nothing that can be held out.

    Warns
    -----
    UserWarning
        If fewer combinations than asked for can be held out.

    References
    ----------
    :cite:`bereket2023samsvae`, appendix A.4, for ``exact_cells`` (64/16/20 % of the cells at ``val_fraction=0.2``).
    """
    check_tables(adata)
    check_one_of("scheme", scheme, SCHEMES)
    check_probability("test_fraction", test_fraction)
    check_positive("val_fraction", val_fraction, allow_zero=True)
    check_positive("seed", seed, integer=True, allow_zero=True)
    _check_request(scheme, val_fraction, perturbation_key, key_added, exact_cells=exact_cells)
    check_key(adata.obs, perturbation_key, "adata.obs", "perturbation_key")
    rule = LabelRule.create(control, sep)
    labels = canonical_labels(adata.obs[perturbation_key], rule)
    check_has_control(labels, rule, f"`obs[{perturbation_key!r}]`")
    members = [rule.treatments(label) for label in labels.categories]
    rng = np.random.default_rng(seed)
    codes = np.asarray(labels.codes)
    held_out = np.zeros(len(members), dtype=bool)
    if scheme == "combinations":
        held_out = _hold_out_combinations(members, test_fraction, rng)
    elif scheme == "perturbations":
        held_out = _hold_out_treatments(members, test_fraction, rng)
    split = np.full(len(codes), "train", dtype=object)
    if scheme == "cells":
        split[_share_of_labels(codes, np.arange(len(codes)), test_fraction, rng)] = "test"
    elif exact_cells:
        combined = np.array([len(m) > 1 for m in members])[codes]
        split[_share_of_labels(codes, np.flatnonzero(combined), val_fraction, rng)] = "test"
        split[combined & (held_out[codes] != (split == "test"))] = "unused"
    else:
        split[held_out[codes]] = "test"
    split[_share_of_labels(codes, np.flatnonzero(split == "train"), val_fraction, rng)] = "val"
    adata.obs = adata.obs.assign(**{key_added: pd.Categorical(split)})


def _check_request(scheme: str, val_fraction: float, labels: str, key_added: str, *, exact_cells: bool) -> None:
    if val_fraction >= 1:
        msg = f"`val_fraction` must be at least 0 and below 1; received {val_fraction!r}."
        raise ValueError(msg)
    if exact_cells and (scheme != "combinations" or val_fraction == 0):
        msg = (
            "`exact_cells=True` divides cells of combinations by `val_fraction`; "
            f"received scheme={scheme!r}, val_fraction={val_fraction!r}: use 'combinations' and a positive fraction."
        )
        raise ValueError(msg)
    if not isinstance(key_added, str) or not key_added or key_added == labels:
        msg = f"`key_added` must name a column other than the labels'; received {key_added!r}."
        raise ValueError(msg)


def _hold_out_combinations(members: list[tuple[str, ...]], fraction: float, rng: np.random.Generator) -> np.ndarray:
    combinations = np.array([i for i, m in enumerate(members) if len(m) > 1], dtype=np.int64)
    wanted = math.ceil(fraction * len(combinations))
    left: dict[str, int] = {}
    for treatment in (t for m in members for t in m):
        left[treatment] = left.get(treatment, 0) + 1
    held_out = np.zeros(len(members), dtype=bool)
    for i in rng.permutation(combinations)[::-1]:
        if held_out.sum() < wanted and all(left[t] > 1 for t in members[i]):
            held_out[i] = True
            for treatment in members[i]:
                left[treatment] -= 1
    found = int(held_out.sum())
    if not found:
        msg = (
            f"A split by combinations needs a combination whose treatments also occur elsewhere; received none among "
            f"{len(combinations)} combinations: check `sep`, or use `scheme='cells'`."
        )
        raise ValueError(msg)
    if found < wanted:
        text = f"Only {found} of {wanted} combinations are held out: others would take a treatment out of training."
        warnings.warn(text, UserWarning, stacklevel=3)
    return held_out


def _hold_out_treatments(members: list[tuple[str, ...]], fraction: float, rng: np.random.Generator) -> np.ndarray:
    singles = sorted(m[0] for m in members if len(m) == 1)
    n_held_out = math.ceil(fraction * len(singles))
    if not 0 < n_held_out < len(singles):
        msg = (
            f"A split by perturbations needs single treatments on both sides; received {len(singles)} and "
            f"test_fraction={fraction!r}: check `control` and `sep`, or change the fraction."
        )
        raise ValueError(msg)
    chosen = set(rng.permutation(singles)[-n_held_out:].tolist())
    return np.array([not chosen.isdisjoint(m) for m in members])


def _share_of_labels(codes: np.ndarray, cells: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Draw ``fraction`` of ``cells`` from every label, rounded to the nearest integer, never all cells of a label."""
    shuffled = rng.permutation(cells)
    drawn = [np.zeros(0, dtype=np.int64)]
    for code in np.unique(codes[cells]):
        own = shuffled[codes[shuffled] == code]
        drawn.append(own[: min(math.floor(fraction * len(own) + 0.5), len(own) - 1)])
    return np.concatenate(drawn)
