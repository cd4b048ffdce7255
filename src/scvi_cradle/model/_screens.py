"""Models that take a screen on disk wherever others take an AnnData."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS, settings
from scvi.model.base import BaseModelClass

from scvi_cradle._constants import KEYS
from scvi_cradle.data import BlockLoader, SetupArguments, StoredManager, check_arguments, holds_counts, stored_matrix
from scvi_cradle.dataloaders import LabelledDataModule, ScreenDataModule

WITHOUT_ARTIFACT = ("artifact_key", "artifact_keys", "guide_counts_key", "guide_targets", "cell_type_key")


class ScreenModel(BaseModelClass):
    """Registries and cells of screens.

    A model states which arguments of set-up it cannot use, whether it needs QC flags, and what values it takes.
    """

    _unused_keys: tuple[str, ...] = WITHOUT_ARTIFACT
    _needs_artifact = False
    _count_only = True
    _non_negative = False
    _looks_up_cells = False  # in training, so that cells must not only come by

    def __init__(self, adata: AnnData | MuData | None = None, registry: dict[str, Any] | None = None) -> None:
        if registry is not None and registry["model_name"] is None:
            registry = self._own_registry(registry)
        super().__init__(adata, registry)

    @classmethod
    def _setup_checks(cls) -> dict[str, Any]:
        return {
            "unused": cls._unused_keys,
            "needs_artifact": cls._needs_artifact,
            "count_only": cls._count_only,
            "non_negative": cls._non_negative,
        }

    @classmethod
    def _own_registry(cls, registry: dict[str, Any]) -> dict[str, Any]:
        """Return the registry of a screen as one of this model; an error for a screen that it cannot use."""
        check_arguments(SetupArguments.from_call(cls.__name__, registry["setup_args"], **cls._setup_checks()))
        is_counts = holds_counts(registry["field_registries"][REGISTRY_KEYS.X_KEY]["state_registry"])
        if cls._count_only and not is_counts:
            msg = f"{cls.__name__} needs raw counts; the screen holds other values: name the layer with the counts, e.g. `layer='counts'`."
            raise ValueError(msg)
        return registry | {"model_name": cls.__name__}

    def _attach(self, screen: Any) -> None:
        """Make the cells of a screen the model's own.

        Raises
        ------
        TypeError, ValueError
            If it is none, or if the model has an AnnData.
        """
        if not isinstance(screen, ScreenDataModule):
            msg = f"`datamodule` must be a `ScreenDataModule` or `LabelledDataModule` of `scvi_cradle.dataloaders`; received {type(screen).__name__}."
            raise TypeError(msg)
        if self.adata_manager is not None and not isinstance(self.adata_manager, StoredManager):
            msg = f"`datamodule` is for models that are built from its registry; received one for a model with data of its own: build it with `{type(self).__name__}(registry=screen.registry)`."
            raise ValueError(msg)
        self._adata = self._validate_anndata(screen)
        self._adata_manager = self.get_anndata_manager(self._adata, required=True)

    def _check_labelled(self, datamodule: LabelledDataModule, **given: Any) -> None:
        """Raise ``ValueError`` for cells that come by if the model cannot train on them.

        ``given``: arguments of ``train`` that the data module decides.
        """
        name = type(self).__name__
        if self._looks_up_cells:
            msg = f"{name} looks cells up while it trains; received a `LabelledDataModule`, whose cells only come by: use a `ScreenDataModule`, or an AnnData."
            raise ValueError(msg)
        for argument, value in given.items():
            if value not in (None, False, "auto"):
                msg = f"A `LabelledDataModule` has its own loaders and split; received `{argument}={value!r}` beside it: give it to the datamodule that it wraps."
                raise ValueError(msg)
        if self.adata is not None:
            msg = f"`datamodule` is for models that are built from its registry; received one for a model with data of its own: build it with `{name}(registry=datamodule.registry)`."
            raise ValueError(msg)
        registries = (self.registry_["field_registries"], datamodule.registry["field_registries"])
        if not _same(*registries):
            msg = f"Cells must have the genes, labels, categories and flags that the model was built for; received others: build it with `{name}(registry=datamodule.registry)`."
            raise ValueError(msg)

    def _cells_of(self, screen: ScreenDataModule) -> AnnData:
        """Return the cells of a screen, registered with the model."""
        manager = self._per_instance_manager_store.get(self.id, {}).get(screen.manager.adata_uuid)
        if manager is None:
            manager = screen.register_with(self.registry_, **self._setup_checks())
            self._register_manager_for_instance(manager)
        return manager.adata

    def _make_data_loader(self, adata: AnnData | MuData, indices: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Read cells on disk in blocks where they are asked for in their order."""
        manager = self.get_anndata_manager(adata, required=True)
        cells = np.arange(adata.n_obs) if indices is None else np.asarray(indices)
        if args or not set(kwargs) <= {"batch_size"} or stored_matrix(manager) is None or (np.diff(cells) <= 0).any():
            return super()._make_data_loader(adata, indices, *args, **kwargs)
        return BlockLoader(manager, cells, batch_size=kwargs.get("batch_size") or settings.batch_size, shuffle=False)


def _same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Return whether registries name the same genes, labels and categories."""
    keys = (KEYS.PERTURBATION, REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.CAT_COVS_KEY, REGISTRY_KEYS.CONT_COVS_KEY)
    states = [
        [
            sorted(registry),
            *(_plain(registry[key]["state_registry"]) for key in keys if key in registry),
            list(registry[REGISTRY_KEYS.X_KEY]["state_registry"]["column_names"]),
        ]
        for registry in (ours, theirs)
    ]
    return bool(states[0] == states[1])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value
