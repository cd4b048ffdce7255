"""Screens that stay on disk, registered as an AnnData is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from lightning.pytorch import LightningDataModule
from scvi import REGISTRY_KEYS, settings

from scvi_cradle._constants import ON_DISK_UNS_KEY, QC_UNS_KEY
from scvi_cradle._matrix import check_counts, check_finite
from scvi_cradle._validation import check_key, check_one_of, check_positive, preview
from scvi_cradle.data import (
    SetupArguments,
    StoredManager,
    StoredMatrix,
    StoredSplitter,
    build_manager,
    can_read,
    holds_counts,
    split_indices,
)
from scvi_cradle.dataloaders._open import StoredFile, check_same_genes, common_notes, concat_obs, concat_rows, open_file

SETUP_METHOD = "setup_anndata"


class ScreenDataModule(LightningDataModule):
    """A screen on disk, for models that are built from its registry and trained without an AnnData in memory.

    Labels, flags and covariates of the cells are read (some ten bytes per cell and column, and the names of the cells);
    counts stay where they are. Training reads them in chunks of neighbouring rows and shuffles the cells of the chunks
    that are in memory, as annbatch does. Everything else that takes an AnnData takes a
    ``ScreenDataModule``: ``model.get_latent_representation(screen)``.

    Parameters
    ----------
    paths
        An ``.h5ad`` file or ``.zarr`` store, or several with the same genes, whose cells follow one another. The expression
        must be CSR or dense, in the form that AnnData writes.
    perturbation_key, perturbation_obsm_key, control, sep, layer
        As in :meth:`scvi_cradle.model.CradleVAE.setup_anndata`; so are the other keys.
    artifact_key, guide_counts_key, guide_targets, cell_type_key
        Keys that some models need, and others do not take.
    batch_key, categorical_covariate_keys, continuous_covariate_keys
        Columns that enter the decoder.
    split_key
        Column of ``"train"``, ``"val"``, ``"test"`` or ``"unused"``. Default: a random split.
    train_size, validation_size, shuffle_set_split
        The random split, as in scvi-tools.
    obs
        Cells of all files in their order, in the place of the columns in the files; e.g. ``adata.obs`` of a lazily read
        AnnData that :func:`scvi_cradle.pp.qc_label` has written its flags to.
    obs_keys
        Further columns to read, e.g. that of ``control_partner_key``.
    batch_size
        Cells per batch. Default: that of the model in ``train``, ``scvi.settings.batch_size`` in ``train_dataloader``.
    chunk_size, n_chunks
        Rows that are read at once, and number of chunks whose cells are shuffled; twice as many are held.
    engine
        What reads batches of training: ``"anndata"``, or ``"annbatch"`` (zarr stores, Python 3.12 and later,
        ``pip install "scvi-cradle[streaming]"``). The batches are the same.

    Raises
    ------
    FileNotFoundError, KeyError
        If a file, column or layer is not there.
    ValueError
        For files of another kind or with other genes, for expression stored by columns, and for everything that
        ``setup_anndata`` refuses. Values are checked as they are read, those of all training cells before the first step.

    Examples
    --------
    >>> screen = cradle.dataloaders.ScreenDataModule(
    ...     "screen.zarr", perturbation_key="perturbation", artifact_key="artifact"
    ... )
    >>> model = cradle.CradleVAE(registry=screen.registry)
    >>> model.train(datamodule=screen)
    >>> latent = model.get_latent_representation(screen)
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        perturbation_key: str | None = None,
        perturbation_obsm_key: str | None = None,
        control: str | Sequence[str | None] = "control",
        sep: str | None = "+",
        layer: str | None = None,
        artifact_key: str | None = None,
        guide_counts_key: str | None = None,
        guide_targets: Any = None,
        cell_type_key: str | None = None,
        batch_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        split_key: str | None = None,
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        obs: pd.DataFrame | None = None,
        obs_keys: Sequence[str] = (),
        batch_size: int | None = None,
        chunk_size: int = 512,
        n_chunks: int = 32,
        engine: Literal["anndata", "annbatch"] = "anndata",
    ) -> None:
        super().__init__()
        check_one_of("engine", engine, ("anndata", "annbatch"))
        for name, value in (("batch_size", batch_size), ("chunk_size", chunk_size), ("n_chunks", n_chunks)):
            if value is not None:
                check_positive(name, value, integer=True)
        self.batch_size = batch_size
        self._setup_args = {
            "perturbation_key": perturbation_key,
            "perturbation_obsm_key": perturbation_obsm_key,
            "control": control,
            "sep": sep,
            "layer": layer,
            "artifact_key": artifact_key,
            "artifact_keys": None,
            "guide_counts_key": guide_counts_key,
            "guide_targets": guide_targets,
            "cell_type_key": cell_type_key,
            "batch_key": batch_key,
            "categorical_covariate_keys": categorical_covariate_keys,
            "continuous_covariate_keys": continuous_covariate_keys,
        }
        arguments = SetupArguments.from_call("ScreenDataModule", self._setup_args, count_only=False)
        names = list(dict.fromkeys([*arguments.obs_keys.values(), *([split_key] if split_key else []), *obs_keys]))
        matrices = [key for key in (perturbation_obsm_key, guide_counts_key) if key is not None]
        notes = [QC_UNS_KEY, *(f"{key}_names" for key in matrices)]
        notes += [guide_targets] if isinstance(guide_targets, str) else []
        read = names if obs is None else []
        files = [open_file(p, layer=layer, obs_keys=read, obsm_keys=matrices, uns_keys=notes) for p in _listed(paths)]
        check_same_genes(files)
        self.matrix = StoredMatrix([file.x for file in files])
        self.reading = {"chunk_size": chunk_size, "n_chunks": n_chunks, "engine": _engine(engine, self.matrix)}
        stored = concat_obs([file.obs for file in files])
        self._cells = _frame(
            files, stored if obs is None else _given(obs, stored.index, names), self.matrix.shape, layer
        )
        self.manager = self._register(arguments, self._setup_method_args(None))
        self.matrix.check = check_counts if self._is_counts(self.registry) else check_finite
        self.split_key, self._sizes = split_key, (train_size, validation_size, shuffle_set_split)
        self._split: list[np.ndarray] | None = None

    def _setup_method_args(self, model: str | None) -> dict[str, Any]:
        return {"model_name": model, "setup_method_name": SETUP_METHOD, "setup_args": dict(self._setup_args)}

    def _register(
        self, arguments: SetupArguments, setup_method_args: dict[str, Any], registry: dict[str, Any] | None = None
    ) -> StoredManager:
        manager = build_manager(self._cells, arguments, setup_method_args, registry, matrix=self.matrix)
        assert isinstance(manager, StoredManager)
        return manager

    def register_with(self, registry: dict[str, Any], **checks: Any) -> StoredManager:
        """Return a manager of the cells by a model's registry: its labels, treatments and categories.

        Models call this; a user has no need to.

        Parameters
        ----------
        registry
            Registry of the model.
        **checks
            What the model asks of set-up.

        Raises
        ------
        KeyError, ValueError
            As for a query in memory, and if the screen was opened without the columns or with another layer.
        """
        name, asked = registry["model_name"], registry["setup_args"]
        if asked["layer"] != self._setup_args["layer"]:
            msg = f"A screen must be opened with the layer of the model; received layer={self._setup_args['layer']!r} for {name} with layer={asked['layer']!r}."
            raise ValueError(msg)
        for argument, key in SetupArguments.from_call(name, asked).obs_keys.items():
            if key not in self._cells.obs:
                msg = f"A screen must be opened with the columns of the model; received one without {key!r}: pass `{argument.partition('[')[0]}` to `ScreenDataModule`."
                raise KeyError(msg)
        if self._is_counts(registry) and not self._is_counts(self.registry):
            msg = f"{name} was trained on raw counts; the screen holds other values: name the layer with the counts."
            raise ValueError(msg)
        arguments = SetupArguments.from_call(registry["model_name"], registry["setup_args"], **checks)
        return self._register(arguments, {k: registry[k] for k in self._setup_method_args(None)}, registry)

    @property
    def registry(self) -> dict[str, Any]:
        """The registry that a model is built from, as in ``Model(registry=screen.registry)``."""
        return dict(self.manager.registry)

    @staticmethod
    def _is_counts(registry: dict[str, Any]) -> bool:
        return holds_counts(registry["field_registries"][REGISTRY_KEYS.X_KEY]["state_registry"])

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return self.matrix.shape[0]

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return self.matrix.shape[1]

    @property
    def obs(self) -> pd.DataFrame:
        """The columns of the cells that were read."""
        return self._cells.obs[[key for key in self._cells.obs if not str(key).startswith("_scvi_")]]

    def to_memory(self, indices: Sequence[int] | np.ndarray | None = None) -> AnnData:
        """Return cells with their expression as an AnnData.

        Parameters
        ----------
        indices
            Positions of the cells. Default: all.
        """
        rows = np.arange(self.n_obs) if indices is None else np.asarray(indices)
        return AnnData(self.matrix[rows], obs=self.obs.iloc[rows].copy(), var=self._cells.var.copy())

    @property
    def split(self) -> list[np.ndarray]:
        """Positions of training, validation and other cells; a random split is drawn once."""
        if self._split is None:
            train_size, validation_size, shuffle = self._sizes
            self._split = split_indices(
                self.manager,
                self.split_key,
                train_size=train_size,
                validation_size=validation_size,
                shuffle_set_split=shuffle,
                batch_size=self.batch_size or settings.batch_size,
            )
        return self._split

    @property
    def has_random_split(self) -> bool:
        """Whether the split is drawn at random."""
        return self.split_key is None and self._sizes[2]

    def train_dataloader(self) -> Any:
        """Return the batches of training cells, shuffled: dictionaries of tensors by registry key."""
        return self._splitter().train_dataloader()

    def val_dataloader(self) -> Any:
        """Return the batches of validation cells, or None."""
        return self._splitter().val_dataloader()

    def _splitter(self) -> StoredSplitter:
        self.manager.validate()  # a model may have registered the cells by its own labels
        splitter = StoredSplitter(
            self.manager,
            reading=self.reading,
            batch_size=self.batch_size or settings.batch_size,
            external_indexing=self.split,
        )
        splitter.setup()
        return splitter


def _listed(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    listed = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    if not listed:
        msg = "`paths` must name at least one file; received none."
        raise ValueError(msg)
    twice = [p.name for p in listed if sum(p.resolve() == other.resolve() for other in listed) > 1]
    if twice:
        msg = f"Every file of a screen must be named once; received {preview(twice[:1])} again: leave it out."
        raise ValueError(msg)
    return listed


def _given(obs: pd.DataFrame, names: pd.Index, keys: list[str]) -> pd.DataFrame:
    """Return columns of cells that were given in the place of those on disk.

    Raises
    ------
    KeyError, ValueError
        If a column is lacking, or if the rows are not the cells of the files in their order.
    """
    if len(obs) != len(names):
        msg = f"`obs` must have a row for every cell of the files; received {len(obs)} rows for {len(names)} cells."
        raise ValueError(msg)
    if not obs.index.equals(names) and obs.index.isin(names).any():
        msg = "`obs` must have the cells in the order of the files; received their names in another order: reindex it with the names in the files."
        raise ValueError(msg)
    for key in keys:
        check_key(obs, key, "obs", "a column of the screen")
    return obs[keys]


def _engine(engine: str, matrix: StoredMatrix) -> str:
    """Return what is to read a matrix."""
    if engine == "annbatch" and not can_read(matrix):
        msg = "engine='annbatch' needs annbatch (Python 3.12 and later) and zarr stores; received other files or no annbatch: `pip install 'scvi-cradle[streaming]'`, write the screen with `adata.write_zarr`, or leave `engine` out."
        raise ValueError(msg)
    return engine


def _frame(files: list[StoredFile], obs: pd.DataFrame, shape: tuple[int, int], layer: str | None) -> AnnData:
    """Return an AnnData with everything but the expression."""
    empty = sp.csr_matrix(shape, dtype=np.float32)
    cells = AnnData(X=empty, obs=obs.copy(), var=pd.DataFrame(index=files[0].genes))
    if layer is not None:
        cells.layers[layer] = empty
    for key in files[0].obsm:
        matrix = concat_rows([file.obsm[key] for file in files], key)
        cells.obsm[key] = matrix.set_axis(cells.obs_names) if isinstance(matrix, pd.DataFrame) else matrix
    cells.uns.update(common_notes(files) | {ON_DISK_UNS_KEY: True})
    return cells
