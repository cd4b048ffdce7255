"""Perturbation labels: from ``"KLF1+MAP2K6"`` to treatments and dosages. Pure numpy and pandas."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scvi_cradle._validation import near_matches, preview


@dataclass(frozen=True)
class LabelRule:
    """How labels are read.

    Parameters
    ----------
    control
        Tokens that mean "no treatment". The first one that is not empty names controls in results.
        A missing token (``None``, NaN) or an empty one lets missing or empty labels stand for controls.
    sep
        Text between the treatments of a combination; ``None``: labels are never split.
    """

    control: tuple[str, ...]
    sep: str | None
    missing_is_control: bool = False

    @classmethod
    def create(cls, control: str | Sequence[str | None], sep: str | None = "+") -> LabelRule:
        """Check the arguments of a ``setup_anndata`` and return the rule."""
        several = isinstance(control, Iterable) and not isinstance(control, str)
        tokens = list(control) if several else [control]
        names = tuple(dict.fromkeys(str(t).strip() for t in tokens if not pd.isna(t)))
        missing = any(pd.isna(t) for t in tokens)
        if not names and not missing:
            msg = f"`control` must name at least one control label; received {control!r}."
            raise ValueError(msg)
        if sep is not None and (not isinstance(sep, str) or not sep.strip()):
            msg = f"`sep` must be a non-blank text or None; received {sep!r}."
            raise ValueError(msg)
        return cls(names, sep, missing)

    @property
    def control_name(self) -> str:
        """Name of controls in results."""
        return next((c for c in self.control if c), "control")

    def treatments(self, label: object) -> tuple[str, ...]:
        """Return the sorted treatments of a label; controls have none.

        Raises
        ------
        ValueError
            For a missing or empty label and for a label with an empty part (``"A+"``).
        """
        if pd.isna(label):
            if self.missing_is_control:
                return ()
            msg = "Perturbation labels must not be missing; received NaN: drop these cells, or pass `control=[..., None]` if they are controls."
            raise ValueError(msg)
        text = str(label).strip()
        if text in self.control:
            return ()
        if not text:
            msg = "Perturbation labels must not be empty; received '': drop these cells, or pass `control=[..., '']` if they are controls."
            raise ValueError(msg)
        parts = [text] if self.sep is None else [p.strip() for p in text.split(self.sep)]
        if not all(parts):
            msg = f"Every part of a perturbation label must have a name; received {text!r}, split at {self.sep!r}: mend the label or pass another `sep`."
            raise ValueError(msg)
        kept = [p for p in parts if p not in self.control]
        unique = sorted(set(kept))
        if len(unique) < len(kept):
            warnings.warn(
                f"The label {text!r} names a treatment more than once; it is read as {self.join(unique)!r}.",
                UserWarning,
                stacklevel=3,
            )
        return tuple(unique)

    def join(self, treatments: Sequence[str]) -> str:
        """Return the canonical label of a set of treatments."""
        return (self.sep or "+").join(sorted(treatments)) if treatments else self.control_name

    def canonical(self, label: object) -> str:
        """Return the canonical form of a label: blanks stripped, control tokens dropped, parts sorted."""
        return self.join(self.treatments(label))


@dataclass(frozen=True)
class LabelTable:
    """The labels of a data set and what they are made of.

    Parameters
    ----------
    labels
        Canonical labels; a cell's code is an index into them.
    treatments
        Sorted treatments, the columns of ``dosage``.
    members
        For every label the positions of its treatments; empty for the control.
    """

    labels: tuple[str, ...]
    treatments: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]

    @classmethod
    def from_labels(cls, labels: Iterable[str], rule: LabelRule) -> LabelTable:
        """Build the table of canonical ``labels`` (sorted) with the treatments that occur in them."""
        names = tuple(sorted(set(labels)))
        treatments = tuple(sorted({t for label in names for t in rule.treatments(label)}))
        return cls(names, treatments, label_members(names, treatments, rule))

    def extend(self, labels: Iterable[str], rule: LabelRule) -> LabelTable:
        """Append new combinations of known treatments; codes of known labels stay.

        Raises
        ------
        ValueError
            If a label holds a treatment that is not in the table.
        """
        known = set(self.labels)
        new = tuple(dict.fromkeys(label for label in labels if label not in known))
        if not new:
            return self
        members = label_members(new, self.treatments, rule)
        return LabelTable(self.labels + new, self.treatments, self.members + members)

    @property
    def dosage(self) -> np.ndarray:
        """Dosage of every label, shape ``(n_labels, n_treatments)``, float32; the row of the control is zero."""
        dosage = np.zeros((len(self.labels), len(self.treatments)), dtype=np.float32)
        for row, columns in enumerate(self.members):
            dosage[row, list(columns)] = 1.0
        return dosage

    def padded_members(self) -> np.ndarray:
        """Return ``members`` as an int64 array of shape ``(n_labels, largest combination)``, filled up with -1."""
        width = max([1, *map(len, self.members)])
        padded = np.full((len(self.labels), width), -1, dtype=np.int64)
        for row, columns in enumerate(self.members):
            padded[row, : len(columns)] = columns
        return padded


def label_members(labels: Sequence[str], treatments: Sequence[str], rule: LabelRule) -> tuple[tuple[int, ...], ...]:
    """Return for every label the positions of its treatments in ``treatments``.

    Raises
    ------
    ValueError
        If a label holds an unknown treatment; the message names near matches.
    """
    column = {t: i for i, t in enumerate(treatments)}
    members = []
    for label in labels:
        parts = rule.treatments(label)
        for treatment in parts:
            if treatment not in column:
                hint = near_matches(treatment, treatments) or f" (known: {preview(treatments)})"
                msg = f"Perturbations must be made of treatments seen in training; received {label!r}, and {treatment!r} is unknown{hint}."
                raise ValueError(msg)
        members.append(tuple(column[t] for t in parts))
    return tuple(members)


def dosage_rows(labels: Sequence[str], treatments: Sequence[str], rule: LabelRule) -> np.ndarray:
    """Return the dosage of every label, shape ``(len(labels), len(treatments))``, float32.

    Raises
    ------
    ValueError
        If a label holds an unknown treatment; the message names near matches.
    """
    return LabelTable(tuple(labels), tuple(treatments), label_members(labels, treatments, rule)).dosage


def canonical_labels(values: pd.Series, rule: LabelRule) -> pd.Categorical:
    """Read a column of labels once per distinct value and return canonical labels, one per cell.

    Raises
    ------
    ValueError
        For missing or empty labels, labels with an empty part, and when no cell is a control.
    """
    codes, uniques = pd.factorize(pd.Series(values).astype(object), use_na_sentinel=False)
    names = [rule.canonical(u) for u in uniques]
    categories = sorted(set(names))
    position = {c: i for i, c in enumerate(categories)}
    lookup = np.array([position[n] for n in names], dtype=np.int64)
    return pd.Categorical.from_codes(lookup[codes] if len(codes) else codes, categories=categories)


def check_has_control(labels: pd.Categorical, rule: LabelRule, where: str) -> None:
    """Raise ``ValueError`` when no cell is a control."""
    if rule.control_name not in labels.categories:
        usual = [c for c in labels.categories if c.lower() in {"nt", "ctrl", "control", "non-targeting", "unperturbed"}]
        hint = f"; {usual[0]!r} looks like one" if usual else f" (labels: {preview(labels.categories)})"
        msg = f"At least one cell must be a control; received control={list(rule.control)!r}, which no label of {where} equals{hint}: pass `control=`."
        raise ValueError(msg)
