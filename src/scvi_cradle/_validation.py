"""Checks of user input: every message is one sentence that names the rule, the value received and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData


def near_matches(name: object, known: Iterable[object], n: int = 3) -> str:
    """Return ``" (did you mean 'A' or 'B'?)"`` for names that resemble ``name``, or an empty string."""
    names = [str(k) for k in known]
    folded = {k.lower(): k for k in names}
    found = difflib.get_close_matches(str(name).lower(), folded, n=n, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(folded[f]) for f in found)}?)" if found else ""


def preview(values: Iterable[object], n: int = 5) -> str:
    """Return the first ``n`` values as text, with the number of the rest."""
    items = [repr(str(v)) for v in values]
    more = f", ... ({len(items) - n} more)" if len(items) > n else ""
    return ", ".join(items[:n]) + more


def check_one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        options = ", ".join(repr(a) for a in allowed)
        msg = f"`{name}` must be one of {options}; received {value!r}{near_matches(value, allowed)}."
        raise ValueError(msg)


def check_positive(name: str, value: Any, *, integer: bool = False, allow_zero: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite positive number (or integer)."""
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and np.isfinite(value)
    if not fits or value < 0 or (value == 0 and not allow_zero):
        kind = "integer" if integer else "number"
        bound = "non-negative" if allow_zero else "positive"
        msg = f"`{name}` must be a {bound} {kind}; received {value!r}."
        raise ValueError(msg)


def check_probability(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``0 < value < 1``."""
    if not isinstance(value, int | float | np.floating) or not 0 < value < 1:
        msg = f"`{name}` must lie strictly between 0 and 1; received {value!r}."
        raise ValueError(msg)


def check_key(mapping: Mapping[str, Any] | pd.DataFrame, key: str, where: str, argument: str) -> None:
    """Raise ``KeyError`` unless ``key`` is found in ``mapping`` (``adata.obs``, ``adata.layers``, ...)."""
    if key not in mapping:
        known = list(mapping.keys())
        hint = near_matches(key, known) or f" (it holds {preview(known) or 'nothing'})"
        msg = f"`{argument}` must be a key of `{where}`; received {key!r}, which is not there{hint}."
        raise KeyError(msg)


def check_tables(adata: AnnData, name: str = "adata") -> None:
    """Raise ``TypeError`` for tables that are not in memory, as :func:`anndata.experimental.read_lazy` gives them."""
    for table in ("obs", "var"):
        held = getattr(adata, table)
        if not isinstance(held, pd.DataFrame):
            msg = (
                f"`{name}.{table}` must be a table in memory; received {type(held).__name__}, as `read_lazy` gives it: "
                f"call `{name}.obs, {name}.var = {name}.obs.to_memory(), {name}.var.to_memory()` (counts stay on disk)."
            )
            raise TypeError(msg)


def check_unique_names(names: pd.Index, what: str) -> None:
    """Raise ``ValueError`` when a name occurs more than once."""
    if not names.is_unique:
        doubled = names[names.duplicated()].unique()
        msg = (
            f"{what} names must be unique; received {len(doubled)} that occur more than once ({preview(doubled)}): "
            f"make them unique, e.g. with `adata.{'var' if what == 'Gene' else 'obs'}_names_make_unique()`."
        )
        raise ValueError(msg)


def as_flags(values: pd.Series, where: str, remedy: str) -> np.ndarray:
    """Return a boolean array from a column of True/False or 0/1; anything else is an error.

    Raises
    ------
    ValueError
        For missing values, for text and for numbers other than 0 and 1.
    """
    if values.isna().any():
        msg = f"{where} must hold True/False or 0/1 for every cell; received {int(values.isna().sum())} missing values: {remedy}."
        raise ValueError(msg)
    uniques = list(pd.unique(values))
    numeric = all(isinstance(u, bool | np.bool_ | int | float | np.integer | np.floating) for u in uniques)
    if not numeric or not set(map(float, uniques)) <= {0.0, 1.0}:
        msg = f"{where} must hold True/False or 0/1; received {preview(uniques, 4)}: {remedy}."
        raise ValueError(msg)
    return values.astype("float64").to_numpy() == 1.0
