"""AnnData fields for perturbation labels, dosages and artifact flags.

Labels are canonical: the field writes the code of each cell's label to ``obs["_scvi_perturbation"]`` and keeps the
labels, the treatments and the rule for reading labels in its state registry, so that a query may hold new combinations
of known treatments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scvi.data.fields import BaseAnnDataField, LayerField, MuDataWrapper, ObsmField

from scvi_cradle._constants import KEYS
from scvi_cradle._labels import LabelRule, LabelTable, canonical_labels, label_members
from scvi_cradle._validation import as_flags, check_key, preview

ARTIFACT_REMEDY = "write such a column with `scvi_cradle.pp.qc_label(adata)`"


class ExpressionField(LayerField):
    """Expression matrix, left as it is stored; whether it holds counts is part of its registry."""

    IS_COUNTS_KEY = "is_counts"

    def __init__(self, registry_key: str, layer: str | None, *, is_counts: bool) -> None:
        super().__init__(registry_key, layer, is_count_data=False, correct_data_format=False)
        self.is_counts = is_counts

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Register the matrix and its kind."""
        return super().register_field(adata) | {self.IS_COUNTS_KEY: self.is_counts}

    def transfer_field(self, state_registry: dict[str, Any], adata_target: AnnData, **kwargs: Any) -> dict[str, Any]:
        """Register the matrix of a query, which is of the kind of training."""
        self.is_counts = holds_counts(state_registry)
        return super().transfer_field(state_registry, adata_target, **kwargs)


class _DerivedObsField(BaseAnnDataField):
    """A column that is computed from a column of the user and stored as ``obs["_scvi_<key>"]``."""

    def __init__(self, registry_key: str, original_key: str) -> None:
        super().__init__()
        self._registry_key = registry_key
        self.original_key = original_key

    @property
    def registry_key(self) -> str:
        """Key of the tensor."""
        return self._registry_key

    @property
    def attr_name(self) -> str:
        """Attribute of the AnnData."""
        return "obs"

    @property
    def attr_key(self) -> str:
        """Column that the field writes."""
        return f"_scvi_{self._registry_key}"

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to register."""
        return False

    def validate_field(self, adata: AnnData) -> None:
        """Check that the user's column is there."""
        check_key(adata.obs, self.original_key, "adata.obs", f"{self._registry_key}_key")

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Validate; subclasses write the column."""
        return super().register_field(adata)

    def transfer_field(self, state_registry: dict[str, Any], adata_target: AnnData, **kwargs: Any) -> dict[str, Any]:
        """Register the same column of another AnnData."""
        return self.register_field(adata_target)

    def get_summary_stats(self, state_registry: dict[str, Any]) -> dict[str, int]:
        """Return counts that size a module."""
        return {}

    def view_state_registry(self, state_registry: dict[str, Any]) -> None:
        """Print nothing."""


class ArtifactField(_DerivedObsField):
    """QC flag of every cell: 1 for a cell that failed."""

    def __init__(self, artifact_key: str) -> None:
        super().__init__(KEYS.ARTIFACT, artifact_key)

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Write the flags as 0/1."""
        super().register_field(adata)
        flags = as_flags(adata.obs[self.original_key], f"`obs[{self.original_key!r}]`", ARTIFACT_REMEDY)
        adata.obs[self.attr_key] = flags.astype(np.float32)
        return {"original_key": self.original_key}


class PerturbationField(_DerivedObsField):
    """Perturbation label of every cell, from a column of labels or from the non-zero columns of a dosage matrix."""

    def __init__(self, key: str, rule: LabelRule, obsm_key: str | None = None) -> None:
        super().__init__(KEYS.PERTURBATION, key)
        self.rule = rule
        self.obsm_key = obsm_key

    def validate_field(self, adata: AnnData) -> None:
        """Check that labels or dosages are there."""
        if self.obsm_key is None:
            super().validate_field(adata)
        else:
            check_key(adata.obsm, self.obsm_key, "adata.obsm", "perturbation_obsm_key")

    def _labels(self, adata: AnnData) -> pd.Categorical:
        if self.obsm_key is None:
            return canonical_labels(adata.obs[self.original_key], self.rule)
        return dosage_labels(adata, self.obsm_key, self.rule)

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Write label codes; labels and treatments are sorted (dosage matrices keep their order of columns)."""
        self.validate_field(adata)
        labels = self._labels(adata)
        categories = [str(c) for c in labels.categories]
        if self.obsm_key is None:
            treatments = sorted({t for c in categories for t in self.rule.treatments(c)})
        else:
            treatments = dosage_names(adata, self.obsm_key)
        adata.obs[self.attr_key] = np.asarray(labels.codes, dtype=np.int64)
        return self._state(categories, treatments)

    def transfer_field(self, state_registry: dict[str, Any], adata_target: AnnData, **kwargs: Any) -> dict[str, Any]:
        """Write the codes of a query; new combinations of known treatments are appended to the labels."""
        self.validate_field(adata_target)
        labels = self._labels(adata_target)
        table = label_table(state_registry).extend(list(labels.categories), self.rule)
        position = {label: i for i, label in enumerate(table.labels)}
        codes = np.array([position[c] for c in labels.categories], dtype=np.int64)[labels.codes]
        adata_target.obs[self.attr_key] = codes
        return self._state(list(table.labels), list(table.treatments))

    def _state(self, labels: list[str], treatments: list[str]) -> dict[str, Any]:
        return {
            "original_key": self.original_key,
            "labels": labels,
            "treatments": treatments,
            "control": list(self.rule.control),
            "sep": self.rule.sep,
            "missing_is_control": self.rule.missing_is_control,
            "from_dosage": self.obsm_key is not None,
        }

    def get_summary_stats(self, state_registry: dict[str, Any]) -> dict[str, int]:
        """Return the numbers of labels and treatments."""
        return {"n_labels": len(state_registry["labels"]), "n_treatments": len(state_registry["treatments"])}


class NoteField(BaseAnnDataField):
    """What a model has to know about its training data and reads by itself: nothing is written, no batch holds it."""

    attr_name, attr_key, is_empty = "obs", None, False

    def __init__(self, registry_key: str, note: dict[str, Any]) -> None:
        super().__init__()
        self._registry_key, self.note = registry_key, note

    @property
    def registry_key(self) -> str:
        """Key of the registry."""
        return self._registry_key

    def get_data_registry(self) -> dict[str, Any]:
        """Return nothing: batches do not hold it."""
        return {}

    def validate_field(self, adata: AnnData) -> None:
        """Check nothing: set-up did."""

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Return the note."""
        return self.note

    def transfer_field(self, state_registry: dict[str, Any], adata_target: AnnData, **kwargs: Any) -> dict[str, Any]:
        """Return the note of training; a query needs none."""
        return state_registry

    def get_summary_stats(self, state_registry: dict[str, Any]) -> dict[str, int]:
        """Return nothing."""
        return {}

    def view_state_registry(self, state_registry: dict[str, Any]) -> None:
        """Print nothing."""


class DosageField(ObsmField):
    """Dosage matrix (cells x treatments) of the user, read where it is and never rewritten."""

    def __init__(self, obsm_key: str) -> None:
        super().__init__(KEYS.DOSAGE, obsm_key, correct_data_format=False)

    def _setup_column_names(self, adata: AnnData) -> list[str]:
        return dosage_names(adata, self.attr_key)

    def transfer_field(self, state_registry: dict[str, Any], adata_target: AnnData, **kwargs: Any) -> dict[str, Any]:
        """Check that a query has the same columns in the same order."""
        names = dosage_names(adata_target, self.attr_key)
        if names != list(state_registry[self.COLUMN_NAMES_KEY]):
            msg = f"`obsm[{self.attr_key!r}]` must have the columns of training in their order; received {preview(names)}: reorder them."
            raise ValueError(msg)
        return {self.COLUMN_NAMES_KEY: names}


MuDataExpressionField = MuDataWrapper(ExpressionField)
MuDataArtifactField = MuDataWrapper(ArtifactField)
MuDataPerturbationField = MuDataWrapper(PerturbationField)
MuDataDosageField = MuDataWrapper(DosageField)


def dosage_names(adata: AnnData, obsm_key: str) -> list[str]:
    """Return the treatment names of a dosage matrix: its columns, or ``uns[f"{obsm_key}_names"]``."""
    dosage = adata.obsm[obsm_key]
    if isinstance(dosage, pd.DataFrame):
        return [str(c) for c in dosage.columns]
    names_key = f"{obsm_key}_names"
    check_key(adata.uns, names_key, "adata.uns", "names of perturbation_obsm_key")
    names = [str(n) for n in adata.uns[names_key]]
    if len(names) != dosage.shape[1]:
        msg = f"`uns[{names_key!r}]` must name every column of the dosage matrix; received {len(names)} names for {dosage.shape[1]} columns."
        raise ValueError(msg)
    return names


def dosage_matrix(adata: AnnData, obsm_key: str) -> sp.csr_matrix:
    """Return the dosage matrix as CSR, shape ``(n_cells, n_treatments)``."""
    dosage = adata.obsm[obsm_key]
    return sp.csr_matrix(dosage.to_numpy() if isinstance(dosage, pd.DataFrame) else dosage)


def dosage_labels(adata: AnnData, obsm_key: str, rule: LabelRule) -> pd.Categorical:
    """Return the label of every cell: its set of non-zero columns; all-zero rows are controls."""
    names = np.array(dosage_names(adata, obsm_key))
    dosage = dosage_matrix(adata, obsm_key)
    dosage.eliminate_zeros()
    dosage.sort_indices()
    rows = [tuple(dosage.indices[a:b]) for a, b in zip(dosage.indptr[:-1], dosage.indptr[1:], strict=True)]
    label_of = {row: rule.join([str(n) for n in names[list(row)]]) for row in set(rows)}
    return pd.Categorical([label_of[row] for row in rows])


def holds_counts(state_registry: dict[str, Any]) -> bool:
    """Return whether the expression of a registry is counts."""
    return bool(state_registry[ExpressionField.IS_COUNTS_KEY])


def label_rule(state_registry: dict[str, Any]) -> LabelRule:
    """Return the rule for reading labels that a registry holds."""
    return LabelRule(
        tuple(state_registry["control"]), state_registry["sep"], bool(state_registry["missing_is_control"])
    )


def label_table(state_registry: dict[str, Any]) -> LabelTable:
    """Return the labels of a registry with their treatments."""
    labels, treatments = tuple(state_registry["labels"]), tuple(state_registry["treatments"])
    return LabelTable(labels, treatments, label_members(labels, treatments, label_rule(state_registry)))
