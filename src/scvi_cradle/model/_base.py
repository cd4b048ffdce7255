"""What every model of the package shares: labels, checks of query data, loaders."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS

from scvi_cradle import presets
from scvi_cradle._constants import KEYS
from scvi_cradle._labels import LabelRule, LabelTable, label_members
from scvi_cradle._matrix import check_in_memory
from scvi_cradle._validation import near_matches, preview
from scvi_cradle.baselines import MultivariateShrinkage
from scvi_cradle.data import StoredManager, check_query, label_rule, label_table
from scvi_cradle.dataloaders import ScreenDataModule
from scvi_cradle.model._screens import ScreenModel
from scvi_cradle.module.base import LogNormalizedExpectation


class LabelledModel(ScreenModel):
    """Labels, genes and query checks."""

    module: Any
    _module_cls: Any
    label_counts_: dict[str, int] | None
    libraries_: dict[str, np.ndarray] | None
    references_: dict[str, Any] | None
    diagnostics_: dict[str, float] | None
    qc_record_: dict[str, Any] | None
    train_cells_: str | None
    _table_kept: LogNormalizedExpectation | None  # what effects were last read from
    _shrinkage: MultivariateShrinkage | None  # of the training cells, once it was asked for
    _architecture: dict[str, Any]
    _training_settings: dict[str, Any]

    # ---- registry ---------------------------------------------------------------------------------------------------

    def _state(self, key: str) -> dict[str, Any]:
        return self.registry_["field_registries"][key]["state_registry"]

    @property
    def _rule(self) -> LabelRule:
        return label_rule(self._state(KEYS.PERTURBATION))

    @property
    def _table(self) -> LabelTable:
        return self._table_of(self._state(KEYS.PERTURBATION))

    def _table_of(self, state: dict[str, Any]) -> LabelTable:
        """Return the labels of a registry with their treatments, as this model encodes them."""
        table = label_table(state)
        if not self._unique:
            return table
        trained = label_table(self._state(KEYS.PERTURBATION)).labels
        treatments = tuple(x for x in trained if x != self._rule.control_name)
        return LabelTable(table.labels, treatments, label_members(table.labels, treatments, self._encoding_rule))

    @property
    def _unique(self) -> bool:
        """Whether a combination is a treatment of its own."""
        return self._architecture.get("encode_combinations") == "unique"

    @property
    def _encoding_rule(self) -> LabelRule:
        return replace(self._rule, sep=None) if self._unique else self._rule

    @property
    def _perturbation_key(self) -> str:
        return str(self._state(KEYS.PERTURBATION)["original_key"])

    @property
    def _artifact_key(self) -> str | None:
        fields = self.registry_["field_registries"]
        return fields[KEYS.ARTIFACT]["state_registry"]["original_key"] if KEYS.ARTIFACT in fields else None

    @property
    def _genes(self) -> list[str]:
        return [str(g) for g in self._state(REGISTRY_KEYS.X_KEY)["column_names"]]

    @property
    def _batches(self) -> list[str]:
        return [str(b) for b in self._state(REGISTRY_KEYS.BATCH_KEY)["categorical_mapping"]]

    # ---- construction -----------------------------------------------------------------------------------------------

    def _build_module(self, **settings: Any) -> None:
        """Build the module for the registered data; nothing is learnt yet."""
        if self._unique and KEYS.DOSAGE in self.registry_["field_registries"]:
            msg = f"{type(self).__name__} encodes every combination as a treatment of its own and needs labels; received dosages: register `perturbation_key`."
            raise ValueError(msg)
        table, fields = self._table, self.registry_["field_registries"]
        covariates = fields.get(REGISTRY_KEYS.CAT_COVS_KEY, {}).get("state_registry", {})
        if "n_latent" in settings and settings["n_latent"] is None:
            settings["n_latent"] = presets.latent_size(len(table.treatments), len(self._genes))
            self._architecture["n_latent"] = settings["n_latent"]
        self.module = self._module_cls(
            len(self._genes),
            len(table.treatments),
            n_levels=(len(self._batches), *map(int, covariates.get("n_cats_per_key", ()))),
            n_continuous=int(self.summary_stats.get(f"n_{REGISTRY_KEYS.CONT_COVS_KEY}", 0)),
            **settings,
        )
        self.module.set_labels(table.padded_members())
        self.label_counts_ = self.libraries_ = self.references_ = self.diagnostics_ = self.train_cells_ = None
        self.qc_record_ = self._shrinkage = self._table_kept = None
        self._model_summary_string = (
            f"{type(self).__name__} with {len(self._genes)} genes, {len(table.treatments)} treatments, "
            f"{len(table.labels)} labels; n_latent: {self.module.n_latent}."
        )

    def _get_init_params(self, locals: dict[str, Any]) -> dict[str, Any]:
        """Save the latent size that was chosen, so that a saved model is built as it was whatever is chosen later."""
        chosen = {name: self._architecture[name] for name in ("n_latent",) if name in self._architecture}
        return super()._get_init_params(locals | chosen)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _requested_labels(self, perturbations: str | Sequence[str] | None) -> list[str]:
        """Return canonical labels in the order of the request; default all labels seen in training, sorted.

        Raises
        ------
        ValueError
            For an unknown treatment (near matches are named) and for one without training cells.
        NotImplementedError
            For a combination without training cells where combinations are treatments of their own.
        """
        counts = self._trained_counts()
        if perturbations is None:
            return sorted(label for label, n in counts.items() if n)
        wanted = [perturbations] if isinstance(perturbations, str) else list(perturbations)
        if not wanted:
            msg = "`perturbations` must name at least one perturbation; received an empty list."
            raise ValueError(msg)
        treatments = self._table.treatments
        labels = [self._rule.canonical(w) for w in wanted]
        self._check_encoded(labels)
        n_obs = self.module.n_obs_per_treatment.cpu().numpy()
        members = dict(zip(labels, label_members(labels, treatments, self._encoding_rule), strict=True))
        for label in labels:
            untrained = [treatments[t] for t in members[label] if n_obs[t] == 0]
            if untrained and self._unique and len(self._rule.treatments(label)) > 1:
                msg = f"A model that encodes every combination as a treatment of its own cannot predict {label!r}, which has no training cells: use `encode_combinations='additive'`{', or `transfer_to_unseen` with cells of it' if hasattr(self, 'transfer_to_unseen') else ''}."
                raise NotImplementedError(msg)
            if untrained:
                msg = f"Every treatment must have training cells; received {label!r}, and {preview(untrained)} has none in the training split."
                raise ValueError(msg)
        return labels

    def _check_encoded(self, labels: Sequence[str]) -> None:
        """Raise ``NotImplementedError`` for a new combination of known treatments that the model cannot put together."""
        if not self._unique:
            return
        known = {self._rule.control_name, *self._table.treatments}
        parts = {p for label in known for p in self._rule.treatments(label)}
        for label in labels:
            if label not in known and set(self._rule.treatments(label)) <= parts:
                msg = f"A model that encodes every combination as a treatment of its own cannot predict the unseen combination {label!r}: use `encode_combinations='additive'`."
                raise NotImplementedError(msg)

    def _trained_counts(self) -> dict[str, int]:
        """Return the number of training cells of every label; an untrained model is an error."""
        if not self.is_trained_ or self.label_counts_ is None:
            msg = "The model must be trained first; call `model.train()`."
            raise RuntimeError(msg)
        return self.label_counts_

    @property
    def _library_pool(self) -> dict[str, np.ndarray]:
        return self.libraries_ or {}

    def _members(self, labels: Sequence[str]) -> np.ndarray:
        """Return the treatments of canonical labels, padded with -1."""
        treatments = self._table.treatments
        members = label_members(labels, treatments, self._encoding_rule)
        return LabelTable(tuple(labels), treatments, members).padded_members()

    def _artifact_argument(self, *, artifact: bool) -> dict[str, bool]:
        """Return ``artifact`` as an argument of the module, nothing where it is off; an error for models without one."""
        if artifact and not self.module.has_artifact:
            msg = f"{type(self).__name__} has no artifact to switch on; received artifact=True: use CradleVAE."
            raise NotImplementedError(msg)
        return {"artifact": True} if artifact else {}

    def _needs_counts(self, what: str) -> None:
        """Raise ``NotImplementedError`` for what only counts have."""
        if not self.module.decoder.likelihood.counts:
            msg = f"{what} needs counts; received a model with `likelihood={self._architecture['likelihood']!r}`: use 'nb' on counts."
            raise NotImplementedError(msg)

    def _needs_density(self, what: str) -> None:
        """Raise ``NotImplementedError`` for a bound of a likelihood that the model does not have."""
        if not self.module.decoder.likelihood.is_density:
            msg = f"`{what}` needs a likelihood; received a model with `likelihood='mse'`, which is none: use 'gaussian', or 'nb' on counts."
            raise NotImplementedError(msg)

    def _batch_code(self, batch: str | None) -> int | None:
        if batch is None:
            return None
        batches = self._batches
        if str(batch) not in batches:
            msg = f"`batch` must be one of {preview(batches, 8)}; received {batch!r}{near_matches(batch, batches)}."
            raise ValueError(msg)
        return batches.index(str(batch))

    def _has_training_data(self) -> bool:
        """Whether the attached data are those of training, so that stored positions of cells mean them."""
        return (
            self.adata is not None and self.train_indices_ is not None and cells_hash(self.adata) == self.train_cells_
        )

    # ---- data -------------------------------------------------------------------------------------------------------

    def _validate_anndata(
        self, adata: AnnData | MuData | ScreenDataModule | None = None, copy_if_view: bool = True
    ) -> AnnData | MuData:
        """Return data registered with the model; a view is copied, never turned into data in the user's hands."""
        if adata is None and self.adata is None:
            msg = "The model holds no data (it was loaded, or built from a registry, without); pass `adata`."
            raise ValueError(msg)
        data = self._cells_of(adata) if isinstance(adata, ScreenDataModule) else self.adata if adata is None else adata
        if getattr(data, "is_view", False):
            data = data.copy()
        if not self._is_registered(data):
            check_in_memory(data)
            self._check_encoded(check_query(data, self.registry_))
        return super()._validate_anndata(data, copy_if_view=copy_if_view)

    def _is_registered(self, data: AnnData | MuData) -> bool:
        """Whether these very data were checked before; a copy keeps the mark of scvi-tools and may have been changed."""
        manager = self._per_instance_manager_store.get(self.id, {}).get(data.uns.get("_scvi_uuid"))
        return manager is not None and manager.adata is data

    def _make_data_loader(self, adata: AnnData | MuData, *args: Any, **kwargs: Any) -> Any:
        manager = self.get_anndata_manager(adata)
        if manager is not None:
            state = manager.get_state_registry(KEYS.PERTURBATION)
            self._check_encoded(state["labels"])
            self.module.set_labels(self._table_of(state).padded_members())
        return super()._make_data_loader(adata, *args, **kwargs)

    def _loader(self, adata: AnnData | MuData | None, indices: Sequence[int] | None, batch_size: int | None) -> Any:
        data = self._validate_anndata(adata)
        return self._make_data_loader(data, indices=check_indices(indices, data), batch_size=batch_size)

    # ---- persistence ------------------------------------------------------------------------------------------------

    def save(self, dir_path: str | Path, *args: Any, save_anndata: bool = False, **kwargs: Any) -> None:
        """Save the model into a folder, as in scvi-tools.

        Parameters
        ----------
        dir_path
            The folder.
        *args, **kwargs
            Further arguments of scvi-tools' ``save`` (``prefix``, ``overwrite``, ...).
        save_anndata
            Save the AnnData, too; not for a screen on disk.

        Raises
        ------
        ValueError
            For ``save_anndata=True`` with a screen on disk.
        """
        if save_anndata and isinstance(self.adata_manager, StoredManager):
            msg = "A screen on disk is not saved with a model; received save_anndata=True: leave it out, and pass the screen to the methods of the loaded model."
            raise ValueError(msg)
        super().save(str(dir_path), *args, save_anndata=save_anndata, **kwargs)

    @classmethod
    def load(
        cls, dir_path: str, adata: AnnData | MuData | ScreenDataModule | Literal[False] | None = None, **kwargs: Any
    ) -> Self:
        """Load a model that was saved with ``model.save(dir_path)``.

        **Loading runs pickles**: a model file can execute any code. Load only files that you trust.

        Parameters
        ----------
        dir_path
            Folder of the saved model.
        adata
            Data (or a screen on disk) to attach, checked against those of training. ``False``: without data, which is enough to generate
            cells and effects. ``None``: the data saved with the model (``save(..., save_anndata=True)``), if any.
        **kwargs
            Further arguments of scvi-tools' ``load`` (``accelerator``, ``device``, ``prefix``, ...).

        Returns
        -------
        The model; with the same seed it generates the same cells as the saved one.
        """
        if isinstance(adata, ScreenDataModule):
            model = super().load(dir_path, adata=False, **kwargs)
            model._attach(adata)
            return model
        return super().load(dir_path, adata=adata, **kwargs)


def check_indices(indices: Sequence[int] | np.ndarray | None, data: AnnData | MuData) -> np.ndarray:
    """Return positions of cells from positions or a boolean mask.

    Raises
    ------
    ValueError
        If no cell is named, if a mask has another length than the data, if a position lies outside them, or for positions
        of backed data that do not ascend.
    """
    n_obs = data.n_obs
    if indices is None:
        return np.arange(n_obs)
    positions = np.asarray(indices)
    if positions.dtype == bool:
        if len(positions) != n_obs:
            msg = f"`indices` as a mask must have an entry for every cell; received {len(positions)} for {n_obs} cells."
            raise ValueError(msg)
        positions = np.flatnonzero(positions)
    if positions.size == 0:
        msg = "`indices` must name at least one cell; received none."
        raise ValueError(msg)
    if positions.min() < 0 or positions.max() >= n_obs:
        msg = f"`indices` must lie between 0 and {n_obs - 1}; received {positions.min()} to {positions.max()}."
        raise ValueError(msg)
    if getattr(data, "isbacked", False) and (np.diff(positions) < 0).any():
        msg = "`indices` of a backed AnnData must ascend; received another order: sort them."
        raise ValueError(msg)
    return positions.astype(np.int64)


def cells_hash(data: AnnData | MuData) -> str:
    """Return a hash of the names of cells, in their order."""
    return sha256("\n".join(map(str, data.obs_names)).encode()).hexdigest()


def warn(message: str) -> None:
    """Warn the caller of a public method, from a helper of that method."""
    warnings.warn(message, UserWarning, stacklevel=4)
