"""Guide RNAs: which guide belongs to which target, and counts of guides summed over their targets. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from pandas.api.types import is_numeric_dtype

from scvi_cradle._matrix import to_csr
from scvi_cradle._validation import near_matches, preview

COLUMNS = ("guide", "target")


def guide_table(guides: Iterable[object], targets: pd.DataFrame | Mapping[Any, Any] | pd.Series) -> pd.Series:
    """Return the target of every guide.

    Parameters
    ----------
    guides
        Names of the guides, the columns of a table of counts.
    targets
        DataFrame with the columns ``guide`` and ``target``, or a mapping (or Series) from guide to target. Guides that
        are not in ``guides`` are not looked at.

    Returns
    -------
    Series of targets (text without outer blanks), indexed by ``guides`` in their order.

    Raises
    ------
    KeyError
        If the DataFrame lacks one of its columns.
    TypeError
        If ``targets`` is neither.
    ValueError
        For a guide without target, with an empty target or with two targets, and for a doubled guide.
    """
    names = pd.Index([str(g) for g in guides], name="guide", dtype=object)
    if not names.is_unique:
        msg = f"Guide names must be unique; received {preview(names[names.duplicated()].unique())} more than once: sum or rename these columns."
        raise ValueError(msg)
    pairs = _pairs(targets)
    known = list(pairs["guide"])
    pairs = pairs[pairs["guide"].isin(names)]
    doubled = pairs["guide"][pairs["guide"].duplicated()]
    if len(doubled):
        msg = f"Every guide must have one target; received several for {preview(doubled.unique())}: keep one row for each guide."
        raise ValueError(msg)
    found = pairs.set_index("guide")["target"].reindex(names)
    missing = found.index[found.isna() | (found == "")]
    if len(missing):
        hint = near_matches(missing[0], known)
        msg = f"Every guide must have a target; received none for {preview(missing)}{hint}: add them to the targets, the non-targeting ones with the control as target."
        raise ValueError(msg)
    return found.rename("target")


def _pairs(targets: Any) -> pd.DataFrame:
    """Guides and targets as text, each pair once; missing targets stay missing."""
    if isinstance(targets, pd.DataFrame):
        lacking = [c for c in COLUMNS if c not in targets.columns]
        if lacking:
            msg = f"The table of guide targets must have the columns 'guide' and 'target'; received {preview(targets.columns)}: rename them."
            raise KeyError(msg)
        guides, values = list(targets["guide"]), list(targets["target"])
    elif isinstance(targets, Mapping | pd.Series):
        guides, values = list(targets.keys()), list(targets.values() if isinstance(targets, Mapping) else targets)
    else:
        msg = f"Guide targets must be a DataFrame with the columns 'guide' and 'target' or a mapping from guide to target; received {type(targets).__name__}: name the guides."
        raise TypeError(msg)
    texts = [None if pd.isna(v) else str(v).strip() for v in values]
    frame = pd.DataFrame({"guide": [str(g) for g in guides], "target": texts}, dtype=object)
    return frame.drop_duplicates()


def counts_per_target(
    guide_counts: Any, targets: Sequence[str] | pd.Series, *, leave_out: Collection[str] = ()
) -> tuple[sp.csc_matrix, tuple[str, ...]]:
    """Sum the counts of the guides of every target.

    Parameters
    ----------
    guide_counts
        Counts of guides, shape ``(n_cells, n_guides)``: DataFrame, array or sparse matrix.
    targets
        Target of every column, e.g. from :func:`guide_table`.
    leave_out
        Targets that are none: the control tokens.

    Returns
    -------
    The sums, float64, of shape ``(n_cells, n_targets)``, and the sorted names of the targets.

    Raises
    ------
    ValueError
        For missing, infinite, negative or non-numeric counts, or another number of targets than of columns.
    """
    if isinstance(guide_counts, pd.DataFrame) and all(map(is_numeric_dtype, guide_counts.dtypes)):
        guide_counts = guide_counts.to_numpy(dtype=np.float64, na_value=np.nan)
    if not hasattr(guide_counts, "dtype"):
        guide_counts = np.asarray(guide_counts)
    if guide_counts.ndim != 2 or guide_counts.dtype.kind not in "biuf":
        msg = f"Guide counts must be a matrix of numbers, cells x guides; received shape {guide_counts.shape} of {guide_counts.dtype}."
        raise ValueError(msg)
    counts = to_csr(guide_counts)
    if counts.shape[1] != len(targets):
        msg = f"Every column of the guide counts must have one target; received {counts.shape[1]} columns and {len(targets)} targets."
        raise ValueError(msg)
    if not np.isfinite(counts.data).all() or (counts.data < 0).any():
        found = "negative" if np.isfinite(counts.data).all() else "NaN or infinite"
        msg = f"Guide counts must be finite and not negative; received {found} values: mend or drop these cells."
        raise ValueError(msg)
    of_column = [str(t).strip() for t in targets]
    names = tuple(sorted(set(of_column) - set(leave_out)))
    position = {name: i for i, name in enumerate(names)}
    guides = [i for i, name in enumerate(of_column) if name in position]
    columns = [position[of_column[i]] for i in guides]
    belongs = sp.csr_matrix((np.ones(len(guides)), (guides, columns)), shape=(len(of_column), len(names)))
    return sp.csc_matrix(counts.astype(np.float64) @ belongs), names
