"""Registration: everything is checked before the first field is registered."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager, fields

from scvi_cradle._association import association_table
from scvi_cradle._constants import KEYS
from scvi_cradle._labels import LabelRule, canonical_labels, check_has_control
from scvi_cradle._matrix import (
    check_counts,
    check_finite,
    check_gives_rows,
    check_non_negative,
    counts_problem,
    get_matrix,
    row_sums,
)
from scvi_cradle._validation import as_flags, check_key, check_tables, check_unique_names, preview
from scvi_cradle.data._fields import (
    ARTIFACT_REMEDY,
    ArtifactField,
    DosageField,
    ExpressionField,
    MuDataArtifactField,
    MuDataDosageField,
    MuDataExpressionField,
    MuDataPerturbationField,
    NoteField,
    PerturbationField,
    dosage_labels,
    dosage_names,
)
from scvi_cradle.data._guides import check_targets, guide_note
from scvi_cradle.data._queries import check_dosage, check_query, expression_of
from scvi_cradle.data._stored import StoredManager, StoredMatrix

NOTES = (KEYS.GUIDES, KEYS.CELL_TYPE)
N_CHECKED = 1_024  # rows on disk that are read at registration


@dataclass(frozen=True)
class SetupArguments:
    """Arguments of ``setup_anndata`` and ``setup_mudata`` (see ``CradleVAE.setup_anndata``)."""

    model: str
    perturbation_key: str | None
    perturbation_obsm_key: str | None
    rule: LabelRule
    layer: str | None
    artifact_key: str | None
    guide_counts_key: str | None
    guide_targets: Any
    cell_type_key: str | None
    batch_key: str | None
    categorical_covariate_keys: list[str] | None
    continuous_covariate_keys: list[str] | None
    unused: dict[str, Any]
    modality: str | None = None
    guide_modality: str | None = None
    needs_artifact: bool = False
    count_only: bool = True
    non_negative: bool = False

    @classmethod
    def from_call(
        cls, model: str, call: Mapping[str, Any], *, unused: Sequence[str] = (), **settings: Any
    ) -> SetupArguments:
        """Collect the arguments of a ``setup_anndata`` (its ``locals()``) and name those that the model does not use."""
        names = [f.name for f in fields_of(cls) if f.name in call and f.name not in ("model", *settings)]
        # labels of dosage matrices are made here, and joined and split by the same text
        sep = call["sep"] if call["perturbation_obsm_key"] is None else call["sep"] or "+"
        return cls(
            model=model,
            rule=LabelRule.create(call["control"], sep),
            unused={name: call[name] for name in unused},
            **{name: call[name] for name in names},
            **settings,
        )

    @property
    def obs_keys(self) -> dict[str, str]:
        """Columns of ``obs`` that the arguments name, by argument."""
        named = {
            "perturbation_key": self.perturbation_key,
            "artifact_key": self.artifact_key,
            "batch_key": self.batch_key,
            "cell_type_key": self.cell_type_key,
        }
        keys = {argument: key for argument, key in named.items() if key is not None}
        for argument in ("categorical_covariate_keys", "continuous_covariate_keys"):
            keys |= {f"{argument}[{i}]": key for i, key in enumerate(getattr(self, argument) or [])}
        return keys


def build_manager(
    data: AnnData | MuData,
    arguments: SetupArguments,
    setup_method_args: dict[str, Any],
    source_registry: dict[str, Any] | None = None,
    matrix: StoredMatrix | None = None,
    **kwargs: Any,
) -> AnnDataManager:
    """Check ``data`` against ``arguments``, register the fields and return the manager.

    ``matrix`` stands for the expression of cells whose counts are on disk; its first rows are checked.

    Raises
    ------
    KeyError
        If a key is not found.
    ValueError
        For everything else that must not be trained on; nothing has been written by then.
    """
    is_counts, notes = True, {}
    if source_registry is None:
        check_arguments(arguments)
        cells = _cells(data, arguments)
        is_counts = check_setup(cells, arguments, None if matrix is None else matrix[:N_CHECKED])
        notes = _notes(data, cells, arguments)
    else:
        check_query(data, source_registry)
        registries = source_registry["field_registries"]
        notes = {key: registries[key]["state_registry"] for key in NOTES if key in registries}
    fields_ = _fields(data, arguments, is_counts=is_counts) + [NoteField(key, note) for key, note in notes.items()]
    if matrix is None:
        manager = AnnDataManager(fields=fields_, setup_method_args=setup_method_args)
    else:
        manager = StoredManager(fields=fields_, setup_method_args=setup_method_args)
        manager.matrix = matrix
    manager.register_fields(data, source_registry=source_registry, **kwargs)
    return manager


def _cells(data: AnnData | MuData, arguments: SetupArguments) -> AnnData:
    """Return the AnnData with the counts; for MuData a copy of its frame that also knows the global columns."""
    if isinstance(data, MuData) and data.is_view:
        msg = "The MuData must not be a view, since set-up adds columns to it; received a view: call `mdata = mdata.copy()` first."
        raise ValueError(msg)
    return expression_of(data, arguments.modality)


def _fields(data: AnnData | MuData, a: SetupArguments, *, is_counts: bool) -> list[Any]:
    is_mudata = isinstance(data, MuData)

    def field(plain: Any, wrapped: Any, *args: Any, key: str | None = None, **kw: Any) -> Any:
        if not is_mudata:
            return plain(*args, **kw)
        in_rna = key is None or key in data.mod[a.modality].obs
        return wrapped(*args, mod_key=a.modality if in_rna else None, **kw)

    key = a.perturbation_key or str(a.perturbation_obsm_key)
    x = field(ExpressionField, MuDataExpressionField, REGISTRY_KEYS.X_KEY, a.layer, is_counts=is_counts)
    anndata_fields = [
        x,
        field(PerturbationField, MuDataPerturbationField, key, a.rule, a.perturbation_obsm_key, key=a.perturbation_key),
        field(
            fields.CategoricalObsField,
            fields.MuDataCategoricalObsField,
            REGISTRY_KEYS.BATCH_KEY,
            a.batch_key,
            key=a.batch_key,
        ),
        field(
            fields.CategoricalJointObsField,
            fields.MuDataCategoricalJointObsField,
            REGISTRY_KEYS.CAT_COVS_KEY,
            a.categorical_covariate_keys,
        ),
        field(
            fields.NumericalJointObsField,
            fields.MuDataNumericalJointObsField,
            REGISTRY_KEYS.CONT_COVS_KEY,
            a.continuous_covariate_keys,
        ),
    ]
    if a.artifact_key is not None:
        anndata_fields.append(field(ArtifactField, MuDataArtifactField, a.artifact_key, key=a.artifact_key))
    if a.perturbation_obsm_key is not None:
        anndata_fields.append(field(DosageField, MuDataDosageField, a.perturbation_obsm_key))
    return anndata_fields


def _notes(data: AnnData | MuData, cells: AnnData, a: SetupArguments) -> dict[str, dict[str, Any]]:
    """Return what is registered for the model to read by itself: guide counts with their targets, cell types."""
    notes: dict[str, dict[str, Any]] = {}
    guides = guide_note(data, cells, a.guide_counts_key, a.guide_targets, a.guide_modality, a.rule)
    if guides is not None:
        labels = _check_labels(cells, a)
        check_targets(guides, {t for label in labels.categories for t in a.rule.treatments(label)})
        notes[KEYS.GUIDES] = guides
    if a.cell_type_key is not None:
        notes[KEYS.CELL_TYPE] = {"original_key": a.cell_type_key}
    return notes


def check_arguments(a: SetupArguments) -> None:
    """Raise an error for arguments that the model cannot use, lacks, or cannot have together."""
    for argument, value in a.unused.items():
        if value is not None:
            msg = f"{a.model} does not use `{argument}`; received {value!r}: leave it out."
            raise ValueError(msg)
    if (a.perturbation_key is None) == (a.perturbation_obsm_key is None):
        received = "both" if a.perturbation_key is not None else "neither"
        msg = f"Pass either `perturbation_key` (labels) or `perturbation_obsm_key` (dosages); received {received}."
        raise ValueError(msg)
    for argument in ("categorical_covariate_keys", "continuous_covariate_keys"):
        if isinstance(getattr(a, argument), str):
            msg = f"`{argument}` must be a list of columns; received the text {getattr(a, argument)!r}: put it in brackets."
            raise TypeError(msg)
    if a.needs_artifact and a.artifact_key is None:
        msg = f"{a.model} needs `artifact_key`, a column that marks cells that failed QC; received None: {ARTIFACT_REMEDY}."
        raise ValueError(msg)


def check_setup(adata: AnnData, a: SetupArguments, matrix: Any = None) -> bool:
    """Check everything that a model needs to train on ``adata``; nothing is written. Return whether it holds counts.

    ``matrix``: expression to check in the place of that of ``adata``.
    """
    if adata.is_view:
        msg = "The AnnData must not be a view, since set-up adds columns to it; received a view: call `adata = adata.copy()` first."
        raise ValueError(msg)
    if adata.n_obs == 0 or adata.n_vars == 0:
        msg = f"The AnnData must hold cells and genes; received shape {adata.shape}."
        raise ValueError(msg)
    check_tables(adata)
    check_unique_names(adata.var_names, "Gene")
    for argument, key in a.obs_keys.items():
        check_key(adata.obs, key, "adata.obs", argument)
    _check_covariates(adata, a)
    labels = _check_labels(adata, a)
    flags = _check_flags(adata, a)
    is_stored, matrix = matrix is not None, get_matrix(adata, a.layer) if matrix is None else matrix
    where = "`X`" if a.layer is None else f"`layers[{a.layer!r}]`"
    check_gives_rows(matrix, "adata.X" if a.layer is None else f"adata.layers[{a.layer!r}]")
    check_values(matrix, where, counts=a.count_only, non_negative=a.non_negative)
    is_counts = a.count_only or counts_problem(matrix) is None
    # of counts on disk this is said when they are trained on
    empty = int((row_sums(matrix) == 0).sum()) if is_counts and not is_stored else 0
    if empty:
        _warn(
            f"{empty} cells have no count at all; they are kept with a library size of 1: remove them if they are empty droplets.",
            stacklevel=6,
        )
    if flags is not None:
        _warn_confounded(labels, flags, a.rule.control_name)
    return is_counts


def check_values(matrix: Any, where: str, *, counts: bool, non_negative: bool) -> None:
    """Raise ``ValueError`` unless values are finite (and counts, or not negative, where a model needs that)."""
    (check_counts if counts else check_finite)(matrix, where)
    if non_negative:
        check_non_negative(matrix, where)


def _check_covariates(adata: AnnData, a: SetupArguments) -> None:
    for key in [a.batch_key, a.cell_type_key, *(a.categorical_covariate_keys or [])]:
        if key is not None and adata.obs[key].isna().any():
            msg = f"`obs[{key!r}]` must name a category for every cell; received {int(adata.obs[key].isna().sum())} missing values: fill or drop them."
            raise ValueError(msg)
    for key in a.continuous_covariate_keys or []:
        column = adata.obs[key]
        if not pd.api.types.is_numeric_dtype(column) or not np.isfinite(column.to_numpy(dtype=float)).all():
            msg = f"`obs[{key!r}]` must be numeric and finite to serve as continuous covariate; received dtype {column.dtype} with missing or infinite values or text."
            raise ValueError(msg)


def _check_labels(adata: AnnData, a: SetupArguments) -> pd.Categorical:
    if a.perturbation_obsm_key is None:
        labels = canonical_labels(adata.obs[a.perturbation_key], a.rule)
        check_has_control(labels, a.rule, f"`obs[{a.perturbation_key!r}]`")
        if len(labels.categories) == 1:
            msg = f"At least one cell must be perturbed; received only controls in `obs[{a.perturbation_key!r}]`."
            raise ValueError(msg)
        return labels
    key = a.perturbation_obsm_key
    check_key(adata.obsm, key, "adata.obsm", "perturbation_obsm_key")
    names = dosage_names(adata, key)
    bad = [n for n in names if not n.strip() or n in a.rule.control or (a.rule.sep is not None and a.rule.sep in n)]
    if bad or len(set(names)) < len(names):
        msg = f"Columns of `obsm[{key!r}]` must be unique treatment names without {a.rule.sep!r} and without control; received {preview(bad or names)}."
        raise ValueError(msg)
    check_dosage(adata, key)
    labels = dosage_labels(adata, key, a.rule)
    if a.rule.control_name not in labels.categories:
        msg = f"At least one cell must be a control, an all-zero row of `obsm[{key!r}]`; received none."
        raise ValueError(msg)
    return labels


def _check_flags(adata: AnnData, a: SetupArguments) -> np.ndarray | None:
    if a.artifact_key is None:
        return None
    flags = as_flags(adata.obs[a.artifact_key], f"`obs[{a.artifact_key!r}]`", ARTIFACT_REMEDY)
    if flags.all():
        msg = f"At least one cell must have passed QC; received `obs[{a.artifact_key!r}]` with True (= failed) for all {len(flags)} cells."
        raise ValueError(msg)
    if not flags.any():
        _warn(
            f"No cell failed QC in `obs[{a.artifact_key!r}]`: the model trains without the counterfactual term and learns no artifact."
        )
    return flags


def _warn_confounded(labels: pd.Categorical, flags: np.ndarray, control: str) -> None:
    table = association_table(labels, flags, control)
    names = list(table.index[table["confounded"].astype(bool)])
    if names:
        _warn(
            f"QC failure goes with the perturbation for {preview(names)}: removing the 'artifact' there removes biology; "
            "see `scvi_cradle.pp.qc_report`."
        )


def _warn(message: str, stacklevel: int = 7) -> None:
    """Warn the caller of ``setup_anndata``."""
    warnings.warn(message, UserWarning, stacklevel=stacklevel)
