"""What the codes mean that data modules of scvi-tools yield."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from scvi_cradle._validation import near_matches, preview

LABELS, BATCH, COVARIATES = "labels", "batch", "extra_categorical_covs"
JOINT = "//"


@dataclass(frozen=True)
class Encoding:
    """A column of the cells: its name, where its codes stand in a batch, and the name of every code."""

    key: str
    tensor: str
    place: int
    names: tuple[str, ...]

    def codes(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the codes of the cells of a batch, shape ``(n_cells,)``."""
        return batch[self.tensor].reshape(len(batch["X"]), -1)[:, self.place].long()


@dataclass(frozen=True)
class Encodings:
    """The categorical columns of a data module, and its QC flag, which is none of the covariates here."""

    label: Encoding
    batch: Encoding
    covariates: tuple[Encoding, ...]
    artifact: Encoding | None


def read_encodings(datamodule: Any, artifact_key: str | None) -> Encodings:
    """Read the names of all codes of a ``TileDBDataModule`` or ``MappedCollectionDataModule``.

    Their registries do not have them: there, names of batches are not in the order of codes, and a mapped collection
    states codes of covariates in the place of names.

    Raises
    ------
    TypeError
        If the data module is neither.
    ValueError
        If it has no label, no such covariate, or codes of other meanings for validation.
    """
    if hasattr(datamodule, "label_encoder"):
        read = _of_experiment
        labelled = datamodule.label_keys is not None
    elif hasattr(getattr(datamodule, "_dataset", None), "encoders"):
        read = _of_collection
        labelled = datamodule._label_key is not None
    else:
        msg = f"`datamodule` must be a `TileDBDataModule` or `MappedCollectionDataModule` of scvi-tools; received {type(datamodule).__name__}: read files with `scvi_cradle.dataloaders.ScreenDataModule`."
        raise TypeError(msg)
    if not labelled:
        msg = "The label of the datamodule must be the perturbation; received one without a label: pass it the column (`label_keys` or `label_key`)."
        raise ValueError(msg)
    label, batch, covariates = read(datamodule)
    if artifact_key is None:
        return Encodings(label, batch, covariates, None)
    flags = [column for column in covariates if column.key == artifact_key]
    if not flags:
        keys = [column.key for column in covariates]
        msg = f"`artifact_key` must be one of the datamodule's `categorical_covariate_keys` ({preview(keys) or 'it has none'}); received {artifact_key!r}{near_matches(artifact_key, keys)}: add it there."
        raise ValueError(msg)
    return Encodings(label, batch, tuple(c for c in covariates if c is not flags[0]), flags[0])


def _of_experiment(datamodule: Any) -> tuple[Encoding, Encoding, tuple[Encoding, ...]]:
    """Read the encoders of a ``TileDBDataModule``, which joins columns; those of covariates are taken apart."""
    keys = list(datamodule._categorical_covariate_keys or [])
    joint = [str(name).split(JOINT) for name in datamodule.categ_cov_encoder.classes_] if keys else []
    if any(len(parts) != len(keys) for parts in joint):
        msg = f"Categorical covariates of a `TileDBDataModule` must not hold {JOINT!r}, which joins them; received {preview(JOINT.join(p) for p in joint if len(p) != len(keys))}: rename these categories."
        raise ValueError(msg)

    def column(keys: list[str], tensor: str, encoder: Any) -> Encoding:
        return Encoding(JOINT.join(keys), tensor, 0, tuple(map(str, encoder.classes_)))

    return (
        column(datamodule.label_keys, LABELS, datamodule.label_encoder),
        column(datamodule.batch_column_names, BATCH, datamodule.batch_encoder),
        tuple(Encoding(key, COVARIATES, 0, tuple(parts[i] for parts in joint)) for i, key in enumerate(keys)),
    )


def _of_collection(datamodule: Any) -> tuple[Encoding, Encoding, tuple[Encoding, ...]]:
    """Read the encoders of a ``MappedCollectionDataModule``."""
    encoders, validation = datamodule._dataset.encoders, getattr(datamodule._validset, "encoders", None)
    valued = [key for key in datamodule._continuous_covariate_keys or [] if key in encoders]
    if valued:
        msg = f"Continuous covariates must come as values; received codes of {preview(valued)}: pass `encode_labels=` with the categorical columns to the `MappedCollectionDataModule`."
        raise ValueError(msg)

    def column(key: str, tensor: str, place: int = 0) -> Encoding:
        encoder = encoders[key]
        if validation is not None and validation[key] != encoder:
            msg = f"Codes must mean the same in training and validation; received other categories of {key!r} in `collection_val`: give both collections the same categories."
            raise ValueError(msg)
        return Encoding(key, tensor, place, tuple(str(name) for name in sorted(encoder, key=encoder.__getitem__)))

    return (
        column(datamodule._label_key, LABELS),
        column(datamodule._batch_key, BATCH),
        tuple(column(key, COVARIATES, i) for i, key in enumerate(datamodule._categorical_covariate_keys or [])),
    )


def flag_names(names: tuple[str, ...]) -> np.ndarray:
    """Return the flags that names stand for; what is none stays as it is."""
    known = {"True": True, "False": False, "1": True, "0": False, "1.0": True, "0.0": False}
    return np.array([known.get(name, name) for name in names], dtype=object)
