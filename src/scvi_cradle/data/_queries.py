"""Checks of data that come after training, and what they share with registration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS

from scvi_cradle._constants import KEYS, ON_DISK_UNS_KEY
from scvi_cradle._labels import canonical_labels
from scvi_cradle._matrix import check_counts, check_finite, check_gives_rows, get_matrix
from scvi_cradle._validation import as_flags, check_key, check_tables, near_matches, preview
from scvi_cradle.data._fields import ARTIFACT_REMEDY, dosage_matrix, holds_counts, label_rule, label_table


def expression_of(data: AnnData | MuData, modality: str | None) -> AnnData:
    """Return the AnnData with the counts; of a MuData a new frame around the modality that also has the global columns.

    Raises
    ------
    TypeError, KeyError, ValueError
        If the data are neither, if the modality is not there, or if a cell has no expression.
    """
    if isinstance(data, AnnData):
        return data
    if not isinstance(data, MuData):
        msg = f"The data must be an AnnData (or a MuData for `setup_mudata`); received {type(data).__name__}."
        raise TypeError(msg)
    if modality not in data.mod:
        msg = f"`modalities['rna']` must be a modality of the MuData; received {modality!r} (it holds {preview(data.mod)})."
        raise KeyError(msg)
    rna = data.mod[modality]
    if rna.n_obs != data.n_obs:
        msg = f"Every cell must have expression; received {rna.n_obs} of {data.n_obs} cells in {modality!r}: subset the MuData."
        raise ValueError(msg)
    obs = pd.concat([rna.obs, data.obs.loc[:, [c for c in data.obs if c not in rna.obs]].loc[rna.obs_names]], axis=1)
    joint = AnnData(X=rna.X, obs=obs, var=rna.var)
    for key, layer in rna.layers.items():
        joint.layers[key] = layer
    for key, matrix in rna.obsm.items():
        joint.obsm[key] = matrix
    joint.uns.update(rna.uns)
    return joint


def check_dosage(adata: AnnData, key: str) -> None:
    """Raise ``ValueError`` unless every dosage is finite and not negative."""
    values = dosage_matrix(adata, key).data
    if not np.isfinite(values).all() or (values < 0).any():
        msg = f"`obsm[{key!r}]` must hold finite non-negative dosages; received NaN, infinite or negative values."
        raise ValueError(msg)


def check_query(data: AnnData | MuData, registry: dict[str, Any]) -> list[str]:
    """Check that a query fits the training data before anything is written into it; return its canonical labels.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If genes are missing, added or reordered, if the values are not counts, for an unknown treatment or category, and
        for flags or dosages that cannot be.
    """
    registries = registry["field_registries"]
    x_registry = registries[REGISTRY_KEYS.X_KEY]
    adata = expression_of(data, x_registry["data_registry"].get("mod_key"))
    check_tables(adata)
    trained = [str(g) for g in x_registry["state_registry"]["column_names"]]
    names = [str(g) for g in adata.var_names]
    if names != trained:
        missing, extra = sorted(set(trained) - set(names)), sorted(set(names) - set(trained))
        if missing:
            what = f"{len(missing)} missing genes ({preview(missing, 3)})"
        else:
            what = f"{len(extra)} further genes ({preview(extra, 3)})" if extra else "another order"
        msg = f"A query must have the genes of training in their order; received {what}: subset with `adata[:, model.get_var_names()].copy()`."
        raise ValueError(msg)
    layer = x_registry["data_registry"]["attr_key"]
    check = check_counts if holds_counts(x_registry["state_registry"]) else check_finite
    if ON_DISK_UNS_KEY not in adata.uns:  # else values are checked as they are read
        matrix = get_matrix(adata, layer)
        check_gives_rows(matrix, "adata.X" if layer is None else f"adata.layers[{layer!r}]")
        check(matrix, "`X`" if layer is None else f"`layers[{layer!r}]`")
    state = registries[KEYS.PERTURBATION]["state_registry"]
    categories: list[str] = []
    if state["from_dosage"]:
        key = registries[KEYS.DOSAGE]["data_registry"]["attr_key"]
        check_key(adata.obsm, key, "adata.obsm", "perturbation_obsm_key")
        check_dosage(adata, key)
    else:
        check_key(adata.obs, state["original_key"], "adata.obs", "perturbation_key")
        labels = canonical_labels(adata.obs[state["original_key"]], label_rule(state))
        categories = list(labels.categories)
        label_table(state).extend(categories, label_rule(state))
    if KEYS.ARTIFACT in registries:
        key = registries[KEYS.ARTIFACT]["state_registry"]["original_key"]
        check_key(adata.obs, key, "adata.obs", "artifact_key")
        as_flags(adata.obs[key], f"`obs[{key!r}]`", ARTIFACT_REMEDY)
    _check_categories(adata, registries)
    return categories


def _check_categories(adata: AnnData, registries: dict[str, Any]) -> None:
    batch = registries[REGISTRY_KEYS.BATCH_KEY]["state_registry"]
    known = {} if batch["original_key"].startswith("_scvi") else {batch["original_key"]: batch["categorical_mapping"]}
    known |= registries.get(REGISTRY_KEYS.CAT_COVS_KEY, {}).get("state_registry", {}).get("mappings", {})
    for key, categories in known.items():
        check_key(adata.obs, key, "adata.obs", "batch_key or categorical_covariate_keys")
        unknown = sorted(set(adata.obs[key].astype(str)) - set(map(str, categories)))
        if unknown:
            msg = f"`obs[{key!r}]` of a query must hold categories seen in training; received {preview(unknown)}{near_matches(unknown[0], categories)}: drop these cells or relabel them."
            raise ValueError(msg)
