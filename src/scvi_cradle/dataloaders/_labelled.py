"""Data modules of scvi-tools, whose cells come by in batches, for models of perturbations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from lightning.pytorch import LightningDataModule
from scvi import REGISTRY_KEYS, settings
from torch import Tensor
from tqdm.auto import tqdm

from scvi_cradle._constants import KEYS
from scvi_cradle._matrix import to_csr
from scvi_cradle.data import CollectedCells, SetupArguments, StoredMatrix, build_manager
from scvi_cradle.dataloaders._encodings import Encoding, flag_names, read_encodings
from scvi_cradle.dataloaders._screen import SETUP_METHOD

CONTINUOUS = REGISTRY_KEYS.CONT_COVS_KEY
NOT_TAKEN = (
    *("perturbation_obsm_key", "layer", "artifact_keys"),
    *("guide_counts_key", "guide_targets", "cell_type_key"),
)
Batch = dict[str, Tensor]


class LabelledDataModule(LightningDataModule):
    """Cells of a ``scvi.dataloaders.TileDBDataModule`` or ``scvi.dataloaders.MappedCollectionDataModule``.

    For models that are built from its registry and trained from its batches. The training cells are read once here, for
    what models learn outside training: label, batch and covariates of every cell, moments of genes, library sizes, and
    the rows of failed cells, which go to temporary files. Splits, shuffling and batch sizes are those of the data module.

    Cells come by and are never looked up, so that there are no diagnostics after training, and PerturbedVAE and
    QuantileHurdleAE, which look cells up, are not trained; :class:`ScreenDataModule` has neither limit.

    Parameters
    ----------
    datamodule
        The data module. Its label is the perturbation.
    control, sep
        As in :meth:`scvi_cradle.model.CradleVAE.setup_anndata`.
    artifact_key
        The QC flag (True/False or 0/1, True for failed cells), one of the data module's ``categorical_covariate_keys``; the
        others enter the decoder.
    genes
        Names of the genes, in the order of the data module. Default: its own, which are ids for a ``TileDBDataModule``.

    Raises
    ------
    TypeError
        If the data module is another one.
    ValueError
        If it has no label, if ``artifact_key`` is none of its covariates, and for everything that ``setup_anndata``
        refuses.

    Examples
    --------
    >>> soma = scvi.dataloaders.TileDBDataModule(
    ...     query,
    ...     layer_name="data",
    ...     batch_size=128,
    ...     batch_column_names=["batch"],
    ...     label_keys=["perturbation"],
    ...     categorical_covariate_keys=["artifact"],
    ...     train_size=0.9,
    ... )
    >>> cells = cradle.dataloaders.LabelledDataModule(soma, artifact_key="artifact")
    >>> model = cradle.CradleVAE(registry=cells.registry)
    >>> model.train(datamodule=cells)
    """

    def __init__(
        self,
        datamodule: LightningDataModule,
        *,
        control: str | Sequence[str | None] = "control",
        sep: str | None = "+",
        artifact_key: str | None = None,
        genes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        encodings = read_encodings(datamodule, artifact_key)
        self.datamodule: Any = datamodule
        self._columns = {
            KEYS.PERTURBATION: (encodings.label,),
            REGISTRY_KEYS.BATCH_KEY: (encodings.batch,),
            REGISTRY_KEYS.CAT_COVS_KEY: encodings.covariates,
            KEYS.ARTIFACT: (encodings.artifact,) if encodings.artifact is not None else (),
        }
        self._columns = {key: columns for key, columns in self._columns.items() if columns}
        self._continuous: list[str] = list(getattr(datamodule, "_continuous_covariate_keys", None) or [])
        self._genes = _gene_names(self.datamodule, genes)
        datamodule.prepare_data()
        datamodule.setup("fit")
        self.collected = CollectedCells(len(self._genes))
        codes, continuous = self._collect(encodings.artifact)
        arguments = dict.fromkeys(NOT_TAKEN) | {
            "perturbation_key": encodings.label.key,
            "control": control,
            "sep": sep,
            "artifact_key": artifact_key,
            "batch_key": encodings.batch.key,
            "categorical_covariate_keys": [column.key for column in encodings.covariates] or None,
            "continuous_covariate_keys": self._continuous or None,
        }
        self.manager = build_manager(
            self._frame(codes, continuous),
            SetupArguments.from_call("LabelledDataModule", arguments, count_only=False),
            {"model_name": None, "setup_method_name": SETUP_METHOD, "setup_args": arguments},
            matrix=StoredMatrix([self.collected.example]),
        )
        self._tables = {key: self._code_tables(key, codes) for key in self._columns}

    @property
    def registry(self) -> dict[str, Any]:
        """The registry that a model is built from, as in ``Model(registry=cells.registry)``."""
        return dict(self.manager.registry)

    @property
    def n_train(self) -> int:
        """Number of training cells."""
        return int(self.manager.adata.n_obs)

    @property
    def n_val(self) -> int:
        """Number of validation cells."""
        if hasattr(self.datamodule, "_validset"):
            return 0 if self.datamodule._validset is None else int(self.datamodule._validset.n_obs)
        return max(int(self.datamodule.n_obs) - self.n_train, 0)

    def train_dataloader(self) -> Any:
        """Return the data module's batches of training cells: dictionaries of tensors by registry key."""
        return TranslatedLoader(self.datamodule.train_dataloader(), self._translated)

    def val_dataloader(self) -> Any:
        """Return its batches of validation cells, without those of labels and categories that no training cell has, or None."""
        loader = self.datamodule.val_dataloader()
        return None if loader is None else TranslatedLoader(loader, self._translated)

    # ---- the pass over training cells -------------------------------------------------------------------------------

    def _collect(self, artifact: Encoding | None) -> tuple[dict[Encoding, np.ndarray], np.ndarray]:
        """Return the codes of every column and the continuous covariates of the training cells; keep the rest."""
        columns = [column for group in self._columns.values() for column in group]
        parts: dict[Encoding, list[np.ndarray]] = {column: [] for column in columns}
        continuous = []
        failing = np.zeros(0) if artifact is None else flag_names(artifact.names) == True  # noqa: E712 - of objects
        loader = self.datamodule.train_dataloader()
        self.n_batches = 0
        for raw in tqdm(loader, desc="cells of the datamodule", disable=settings.verbosity > 20):
            batch = self.datamodule.on_before_batch_transfer(raw, 0)
            x = batch["X"].numpy().reshape(-1, len(self._genes))
            for column in columns:
                parts[column].append(column.codes(batch).numpy())
                if parts[column][-1].min() < 0:
                    msg = f"Every training cell must have a category of `{column.key}`; received codes below 0 (unknown): leave these cells out of the datamodule."
                    raise ValueError(msg)
            if self._continuous:
                continuous.append(batch[CONTINUOUS].numpy().reshape(len(x), -1))
            failed = np.zeros(len(x), dtype=bool) if artifact is None else failing[parts[artifact][-1]]
            self.collected.add(to_csr(x), failed)
            self.n_batches += 1
        if not self.n_batches:
            msg = "The datamodule must yield training cells; received none."
            raise ValueError(msg)
        self.collected.finish()
        return (
            {column: np.concatenate(codes) for column, codes in parts.items()},
            np.concatenate(continuous) if continuous else np.zeros((0, 0)),
        )

    def _frame(self, codes: dict[Encoding, np.ndarray], continuous: np.ndarray) -> AnnData:
        """Return an AnnData with everything but the expression."""
        obs = {}
        for key, columns in self._columns.items():
            for column in columns:
                if key == KEYS.ARTIFACT:
                    obs[column.key] = pd.Series(list(flag_names(column.names)[codes[column]]))
                else:
                    obs[column.key] = pd.Series(np.array(column.names, dtype=object)[codes[column]]).astype("category")
        obs |= {key: pd.Series(continuous[:, i]) for i, key in enumerate(self._continuous)}
        frame = pd.DataFrame(obs)
        frame.index = frame.index.astype(str)
        empty = sp.csr_matrix((len(frame), len(self._genes)), dtype=np.float32)
        return AnnData(X=empty, obs=frame, var=pd.DataFrame(index=pd.Index(self._genes)))

    def _code_tables(self, key: str, codes: dict[Encoding, np.ndarray]) -> list[tuple[Encoding, Tensor]]:
        """Return which registered code each code of the data module stands for; -1: that of no training cell."""
        columns = self._columns[key]
        registered = np.asarray(self.manager.get_from_registry(key)).reshape(self.n_train, len(columns))
        tables = []
        for i, column in enumerate(columns):
            table = np.full(len(column.names), -1, dtype=registered.dtype)
            table[codes[column]] = registered[:, i]
            tables.append((column, torch.as_tensor(table)))
        return tables

    def _translated(self, raw: Any) -> Batch:
        """Return a batch with the keys and codes of the registry."""
        batch = self.datamodule.on_before_batch_transfer(raw, 0)
        tensors = {REGISTRY_KEYS.X_KEY: batch["X"].float().reshape(-1, len(self._genes))}
        known = torch.ones(len(tensors[REGISTRY_KEYS.X_KEY]), dtype=torch.bool)
        for key, tables in self._tables.items():
            codes = [column.codes(batch) for column, _ in tables]
            values = [
                torch.where(c < 0, -1, table[c.clamp(min=0)]) for c, (_, table) in zip(codes, tables, strict=True)
            ]
            tensors[key] = torch.stack(values, dim=1)
            known &= (tensors[key] >= 0).all(dim=1)
        if self._continuous:
            tensors[CONTINUOUS] = batch[CONTINUOUS].float().reshape(len(known), -1)
        return tensors if known.all() else {key: values[known] for key, values in tensors.items()}


class TranslatedLoader:
    """Batches of another loader in another form; those without cells are left out."""

    def __init__(self, loader: Any, translate: Callable[[Any], Batch]) -> None:
        self.loader, self.translate = loader, translate

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""
        for raw in self.loader:
            tensors = self.translate(raw)
            if len(tensors[REGISTRY_KEYS.X_KEY]):
                yield tensors


def _gene_names(datamodule: Any, genes: Sequence[str] | None) -> list[str]:
    own = datamodule.registry["field_registries"][REGISTRY_KEYS.X_KEY]["state_registry"]["column_names"]
    names = [str(gene) for gene in (own if genes is None else genes)]
    if len(names) != datamodule.n_vars:
        msg = f"`genes` must name every gene of the datamodule; received {len(names)} names for {datamodule.n_vars} genes."
        raise ValueError(msg)
    return names
