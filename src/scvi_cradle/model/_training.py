"""Training: splits, statistics of the training cells, scvi-tools' own loop, diagnostics."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from scvi import REGISTRY_KEYS, settings
from scvi.model.base import UnsupervisedTrainingMixin

from scvi_cradle._constants import KEYS
from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.data import (
    DeviceDataSplitter,
    TrainingStatistics,
    check_values,
    holds_counts,
    split_indices,
    training_statistics,
)
from scvi_cradle.dataloaders import LabelledDataModule, ScreenDataModule
from scvi_cradle.model._base import cells_hash, warn
from scvi_cradle.model._quality import QualityMixin
from scvi_cradle.train import PerturbationTrainingPlan, StepsRunner

LOGGER = logging.getLogger("scvi_cradle")
MIN_EPOCHS, N_VALIDATIONS = 5, 100
PLAN_ARGUMENTS = (
    *("lr", "weight_decay", "lr_schedule", "effect_lr_scale"),
    *("n_epochs_kl_warmup", "n_epochs_align_warmup"),
)


class TrainingMixin(UnsupervisedTrainingMixin, QualityMixin):
    """``train`` of the models."""

    _data_splitter_cls = DeviceDataSplitter
    _training_plan_cls: type[PerturbationTrainingPlan] = PerturbationTrainingPlan
    _train_runner_cls = StepsRunner

    def train(
        self,
        max_epochs: int | None = None,
        *,
        max_steps: int | None = None,
        split_key: str | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        objective: Literal["elbo", "iwelbo"] = "elbo",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        early_stopping: bool = False,
        load_on_device: bool | Literal["auto"] = "auto",
        datamodule: ScreenDataModule | LabelledDataModule | None = None,
        steps_per_call: int = 1,
        plan_kwargs: dict[str, Any] | None = None,
        datasplitter_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Train the model.

        Parameters
        ----------
        max_epochs
            Number of epochs. Default: those that ``1,200 (n / 3,000)^(1/3)`` steps take, at least 5 (for ``n`` training
            cells; 2,050 steps at 15,000 cells), and no more than scvi-tools' heuristic
            (400 epochs at 20,000 cells or fewer, in inverse proportion above). The papers' presets: 2,000 epochs for
            CradleVAE, 150,000 steps for the others. PerturbedVAE: 100; QuantileHurdleAE: 500 steps.
        max_steps
            Number of optimiser steps, instead of ``max_epochs``.
        split_key
            Column of ``obs`` with ``"train"``, ``"val"``, ``"test"`` or ``"unused"`` for every cell
            (see :func:`scvi_cradle.pp.split_perturbations`). Default: a random split of 90 % and 10 %.
        batch_size
            Cells per step. Default 128 (512 for the papers' presets; PerturbedVAE: 64; QuantileHurdleAE: 256).
        lr
            Learning rate of Adam. Default 3e-3, after a warm-up of 30 steps along a cosine to 0 and 5 times higher for
            the treatment posteriors (3e-4 constant for the papers' presets). PerturbedVAE: 1e-3 along the same schedule,
            5 times higher for the mechanisms (1e-4 constant for ``preset="paper"``).
        weight_decay
            Weight decay of Adam. Default 1e-6.
        objective
            ``"elbo"``, or ``"iwelbo"``: the importance-weighted bound over the model's particles (SAMS-VAE, eq. 7), which
            needs ``n_particles`` above 1 and is not offered by CradleVAE.
        train_size, validation_size, shuffle_set_split
            The random split, as in scvi-tools.
        early_stopping
            Stop when the validation ELBO no longer improves. Off by default: the budget of steps is fixed.
        load_on_device
            Whether to keep the counts on the device of training, as CSR (8 bytes per non-zero value), and to make them dense
            there batch by batch; the batches are the same. ``"auto"``: on a CUDA device, if they take at most half of its
            free memory. Backed data, several processes and special ``datasplitter_kwargs`` always take the usual loaders, as
            do PerturbedVAE and QuantileHurdleAE, for which True is an error.
        datamodule
            A screen on disk, for a model that was built from its registry. It brings the split and the batch size, and its
            cells are the model's own from then on. A ``LabelledDataModule`` also brings loaders; its cells only come by: the
            model has no cells afterwards, and no diagnostics.
        steps_per_call
            Optimiser steps per call of the trainer; the steps and the model are the same. More than the default, 1, saves
            some of the trainer's own time and pays where a step takes a few milliseconds: small screens, GPUs. Callbacks
            of batches are then called once per call. Not with several devices, ``accumulate_grad_batches``,
            ``val_check_interval``, or ``reduce_lr_on_plateau`` or ``on_step`` in ``plan_kwargs``.
        plan_kwargs
            Further arguments of :class:`scvi_cradle.train.PerturbationTrainingPlan`.
        datasplitter_kwargs
            Further arguments of :class:`scvi.dataloaders.DataSplitter`.
        **kwargs
            Further arguments of scvi-tools' ``train`` and of :class:`scvi.train.Trainer` (``accelerator``,
            ``devices``, ``callbacks``, ``logger``, ``enable_progress_bar``, ``check_val_every_n_epoch``, ...).

        Raises
        ------
        KeyError
            If there is no column ``split_key``.
        ValueError
            If the split is not one, or leaves no control cell for training; for ``load_on_device=True`` with a model that
            loads cells in its own way; for several steps per call where the trainer must see each.
        """
        for name, value in (("max_epochs", max_epochs), ("max_steps", max_steps), ("batch_size", batch_size)):
            if value is not None:
                check_positive(name, value, integer=True)
        check_positive("steps_per_call", steps_per_call, integer=True)
        self._check_objective(objective)
        settings_ = dict(self._training_settings)
        if isinstance(datamodule, LabelledDataModule):
            self._check_labelled(
                datamodule,
                split_key=split_key,
                batch_size=batch_size,
                train_size=train_size,
                validation_size=validation_size,
                load_on_device=load_on_device,
                datasplitter_kwargs=datasplitter_kwargs,
            )
            n_cells, n_validation, steps_per_epoch = datamodule.n_train, datamodule.n_val, datamodule.n_batches
            self._learn_from_training_cells(np.arange(n_cells), source=datamodule)
            source: dict[str, Any] = {"datamodule": datamodule}
        else:
            reading: dict[str, Any] = {}
            if datamodule is not None:
                check_no_split(split_key, train_size, validation_size, datasplitter_kwargs)
                self._attach(datamodule)
                batch_size = batch_size or datamodule.batch_size
                datasplitter_kwargs = {"external_indexing": datamodule.split}
                reading = {"reading": datamodule.reading}
            self._validate_anndata(None)
            batch_size = batch_size or settings_["batch_size"]
            split = split_indices(
                self.adata_manager,
                split_key,
                external_indexing=(datasplitter_kwargs or {}).get("external_indexing"),
                train_size=train_size,
                validation_size=validation_size,
                shuffle_set_split=shuffle_set_split,
                batch_size=batch_size,
            )
            self._check_training_controls(split[0])
            splitter = self._splitter_arguments(split) | self._placement(load_on_device=load_on_device) | reading
            n_cells, n_validation = (len(self._batch_cells(part)) for part in split[:2])
            self._learn_from_training_cells(split[0])
            steps_per_epoch = math.ceil(n_cells / batch_size)
            given = (datasplitter_kwargs or {}) | {"external_indexing": split} | splitter
            source = {"batch_size": batch_size, "datasplitter_kwargs": given}
        if max_epochs is None and max_steps is None:
            max_epochs, max_steps = settings_["max_epochs"], settings_.get("max_steps")
        max_epochs = resolve_epochs(max_epochs, max_steps, steps_per_epoch, n_cells)
        plan = {name: settings_[name] for name in PLAN_ARGUMENTS if name in settings_}
        plan |= {name: value for name, value in (("lr", lr), ("weight_decay", weight_decay)) if value is not None}
        trainer: dict[str, Any] = {"gradient_clip_val": settings_["gradient_clip_val"]}
        if max_steps is not None:
            trainer["max_steps"] = max_steps
        if datamodule is not None:
            trainer["simple_progress_bar"] = False  # epochs are long: a bar over their batches
        if n_validation and not early_stopping and not kwargs.get("enable_checkpointing"):
            trainer["check_val_every_n_epoch"] = max(1, max_epochs // N_VALIDATIONS)
        if early_stopping:
            kwargs = self._stopping_arguments(max_epochs) | kwargs
        self.module.objective = objective
        self.module.train()
        try:
            super().train(
                max_epochs=max_epochs,
                early_stopping=early_stopping,
                plan_kwargs=plan | {"steps_per_call": steps_per_call} | (plan_kwargs or {}),
                **(source | trainer | kwargs),
            )
        finally:
            self.module.objective = "elbo"  # bounds of cells do not depend on how the model was trained
        if isinstance(datamodule, LabelledDataModule):
            self.train_cells_ = self.diagnostics_ = None
            LOGGER.info("No diagnostics: they look cells up, and those of a LabelledDataModule only come by.")
            return
        split_key = split_key if datamodule is None else datamodule.split_key
        if split_key is not None:  # scvi-tools wants every cell in a part; "unused" cells are in none
            self.test_indices_ = np.flatnonzero((self.adata.obs[split_key] == "test").to_numpy())
        self.train_cells_ = cells_hash(self.adata)
        self._diagnose()

    def _batch_cells(self, cells: np.ndarray) -> np.ndarray:
        """Return the positions, among those of a part of the split, of cells that batches are made of."""
        return cells

    def _splitter_arguments(self, split: list[np.ndarray]) -> dict[str, Any]:
        """Return further arguments of the model's data splitter; an error for a split that it cannot use."""
        return {}

    def _placement(self, *, load_on_device: bool | Literal["auto"]) -> dict[str, Any]:
        """Return where the data splitter is to keep the cells."""
        check_one_of("load_on_device", load_on_device, ("auto", True, False))
        if issubclass(self._data_splitter_cls, DeviceDataSplitter):
            return {"load_on_device": load_on_device}
        if load_on_device is True:
            msg = f"{type(self).__name__} loads cells in its own way and keeps none on the device; received load_on_device=True: leave it out."
            raise ValueError(msg)
        return {}

    def _stopping_arguments(self, max_epochs: int) -> dict[str, Any]:
        """Return how early stopping follows the training of this model."""
        return {}

    def _sources(self) -> np.ndarray | None:
        """Return which labels new cells take library sizes and covariates from, shape ``(n_labels,)``; None: all."""
        return None

    def _check_training_controls(self, train_indices: np.ndarray) -> None:
        codes = np.asarray(self.adata_manager.get_from_registry(KEYS.PERTURBATION)).ravel().astype(int)
        control = self._table.labels.index(self._rule.control_name)
        if not (codes[train_indices] == control).any():
            msg = (
                f"The training split must hold control cells; received {len(train_indices)} training cells without one."
            )
            raise ValueError(msg)

    def _learn_from_training_cells(self, train_indices: np.ndarray, source: LabelledDataModule | None = None) -> None:
        """Set what is learnt outside gradient descent; moments and output bias only before the first training."""
        table = self._table
        members = table.padded_members()
        is_counts = holds_counts(self._state(REGISTRY_KEYS.X_KEY))
        statistics = training_statistics(
            self.adata_manager if source is None else source.manager,
            train_indices,
            members=members,
            n_treatments=len(table.treatments),
            log=self.module.log_input,
            statistic=self.module.references.statistic if self.module.has_artifact else "median",
            sources=self._sources(),
            keep_pools=self.module.has_artifact and self.module.references.resample,
            check=partial(check_values, counts=is_counts, non_negative=self._non_negative),
            collected=None if source is None else source.collected,
            seed=settings.seed or 0,
        )
        self._set_statistics(statistics, len(train_indices))
        self.module.set_labels(members)
        self.label_counts_ = {label: int(n) for label, n in zip(table.labels, statistics.n_obs_per_label, strict=True)}
        self.libraries_ = statistics.libraries
        self._shrinkage = None
        if self.module.has_artifact:
            self._set_references(statistics)

    def _set_references(self, statistics: TrainingStatistics) -> None:
        """Keep the reference profiles of the counterfactual term."""
        profiles, labels = statistics.reference_profiles, self._table.labels
        self.module.references.set(statistics.reference_labels, profiles.toarray(), statistics.pools)
        self.references_ = {
            "labels": [labels[code] for code in statistics.reference_labels],
            "n_failed": {t: int(n) for t, n in zip(labels, statistics.n_failed_per_label, strict=True) if n},
            "data": profiles.data,
            "indices": profiles.indices,
            "indptr": profiles.indptr,
        }

    def _set_statistics(self, statistics: TrainingStatistics, n_train: int) -> None:
        module = self.module
        with torch.no_grad():
            module.n_obs_per_treatment.copy_(torch.as_tensor(statistics.n_obs_per_treatment))
            module.n_train.fill_(n_train)
            if module.has_artifact:
                module.n_failed.fill_(statistics.n_failed)
            if not self.is_trained_:
                module.input_mean.copy_(torch.as_tensor(statistics.input_mean))
                module.input_std.copy_(torch.as_tensor(statistics.input_std))
                if self._architecture["output_bias"] == "data":
                    module.decoder.initialize_output(
                        *(
                            torch.as_tensor(v).float()
                            for v in (statistics.gene_share, statistics.input_mean, statistics.input_std)
                        )
                    )

    def _check_objective(self, objective: str) -> None:
        check_one_of("objective", objective, self.module.objectives)
        if objective == "iwelbo" and self.module.n_particles < 2:
            msg = "The importance-weighted objective needs several particles; received `n_particles=1`: build the model with `n_particles=5`, say."
            raise ValueError(msg)

    def _diagnose(self) -> None:
        """Compute the diagnostics of a trained model and warn of a collapse."""
        self.diagnostics_ = self.get_diagnostics()
        for message in self._diagnostic_warnings(self.diagnostics_):
            warn(message)


def check_no_split(
    split_key: str | None,
    train_size: float | None,
    validation_size: float | None,
    datasplitter_kwargs: dict[str, Any] | None,
) -> None:
    """Raise ``ValueError`` for a split that is given beside a screen."""
    given = {
        "split_key": split_key,
        "train_size": train_size,
        "validation_size": validation_size,
        "datasplitter_kwargs": datasplitter_kwargs,
    }
    for name, value in given.items():
        if value is not None:
            msg = f"A screen brings its own split; received `{name}={value!r}` beside `datamodule`: give it to the screen."
            raise ValueError(msg)


def resolve_epochs(max_epochs: int | None, max_steps: int | None, steps_per_epoch: int, n_obs: int) -> int:
    """Return the number of epochs of a run."""
    if max_steps is not None:
        return math.ceil(max_steps / steps_per_epoch)
    if max_epochs is not None:
        return max_epochs
    # Measured: 1,200 at 3,000 and 2,000 at 15,000 cells; more treatments need no more steps, but more dimensions.
    steps = 1_200 * (n_obs / 3_000) ** (1 / 3)
    heuristic = max(1, min(round(400 * 20_000 / n_obs), 400))  # of scvi-tools
    return min(max(math.ceil(steps / steps_per_epoch), MIN_EPOCHS), heuristic)
