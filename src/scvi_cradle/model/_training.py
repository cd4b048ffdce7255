"""Training: splits, statistics of the training cells, scvi-tools' own loop, diagnostics."""

from __future__ import annotations

import logging
import math
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scvi import settings
from scvi.model.base import UnsupervisedTrainingMixin

from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.data import (
    DeviceDataSplitter,
    split_indices,
)
from scvi_cradle.dataloaders import LabelledDataModule, ScreenDataModule
from scvi_cradle.model._base import cells_hash, warn
from scvi_cradle.model._learning import LearningMixin
from scvi_cradle.model._run_arguments import CellsOfRun, check_no_split, check_seed, resolve_epochs
from scvi_cradle.train import PerturbationTrainingPlan, RunState, StepsRunner, n_processes

LOGGER = logging.getLogger("scvi_cradle")
N_VALIDATIONS = 100
SHOWN = ("enable_progress_bar", "simple_progress_bar", "progress_bar_refresh_rate", "enable_model_summary")
PLAN_ARGUMENTS = (
    *("lr", "weight_decay", "lr_schedule", "effect_lr_scale"),
    *("n_epochs_kl_warmup", "n_epochs_align_warmup"),
)


class TrainingMixin(UnsupervisedTrainingMixin, LearningMixin):
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
        checkpoint_dir: str | Path | None = None,
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
            Cells per step and process (see ``strategy``). Default 128 (512 for the papers' presets; PerturbedVAE: 64; QuantileHurdleAE: 256).
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
            Stop when the validation ELBO no longer improves. Off by default: the budget of steps is fixed. scvi-tools
            switches it off, with a warning, where several processes train: pass lightning's ``EarlyStopping`` among
            ``callbacks`` there.
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
        checkpoint_dir
            Folder in which the state of the run is kept after every epoch (``last.ckpt``). Called again with the same
            arguments, data and ``scvi.settings.seed``, the run goes on from there, and on one CPU ends with the same
            bits as if it had not been interrupted. Default: nothing is kept.
        plan_kwargs
            Further arguments of :class:`scvi_cradle.train.PerturbationTrainingPlan`.
        datasplitter_kwargs
            Further arguments of :class:`scvi.dataloaders.DataSplitter`.
        **kwargs
            Further arguments of scvi-tools' ``train`` and of :class:`scvi.train.Trainer` (``accelerator``,
            ``devices``, ``callbacks``, ``logger``, ``enable_progress_bar``, ``check_val_every_n_epoch``, ...).
            ``strategy="ddp"`` with ``devices=2`` trains in two processes (see the user guide, :doc:`/user_guide/multi_device`).

        Raises
        ------
        KeyError
            If there is no column ``split_key``.
        ValueError
            If the split is not one, or leaves no control cell for training; for ``load_on_device=True`` with a model that
            loads cells in its own way; for several steps per call where the trainer must see each; for several processes
            or a ``checkpoint_dir`` with a random split that has no seed; for a ``checkpoint_dir`` with another run; for
            arguments beside a ``datamodule`` that it decides.
        """
        for name, value in (("max_epochs", max_epochs), ("max_steps", max_steps), ("batch_size", batch_size)):
            if value is not None:
                check_positive(name, value, integer=True)
        check_positive("steps_per_call", steps_per_call, integer=True)
        self._check_objective(objective)
        settings_ = dict(self._training_settings)
        splitting: dict[str, Any] = {
            "split_key": split_key,
            "train_size": train_size,
            "validation_size": validation_size,
            "shuffle_set_split": shuffle_set_split,
        }
        processes = n_processes(kwargs)
        if isinstance(datamodule, LabelledDataModule):
            self._check_labelled(
                datamodule,
                batch_size=batch_size,
                load_on_device=load_on_device,
                datasplitter_kwargs=datasplitter_kwargs,
                checkpoint_dir=checkpoint_dir,
                strategy=kwargs.get("strategy") if processes > 1 else None,
                **{name: value for name, value in splitting.items() if name != "shuffle_set_split"},
            )
            cells = CellsOfRun(datamodule.n_train, datamodule.n_val, datamodule.n_batches, {"datamodule": datamodule})
            self._learn_from_training_cells(np.arange(cells.n_train), source=datamodule)
        else:
            cells = self._cells_of_run(
                datamodule,
                datasplitter_kwargs or {},
                batch_size=batch_size,
                load_on_device=load_on_device,
                processes=processes,
                needs_seed=processes > 1 or checkpoint_dir is not None,
                **splitting,
            )
            self._learn_from_training_cells(cells.arguments["datasplitter_kwargs"]["external_indexing"][0])
        if max_epochs is None and max_steps is None:
            max_epochs, max_steps = settings_["max_epochs"], settings_.get("max_steps")
        max_epochs = resolve_epochs(max_epochs, max_steps, cells.steps_per_epoch, cells.n_train)
        plan = {name: settings_[name] for name in PLAN_ARGUMENTS if name in settings_}
        plan |= {name: value for name, value in (("lr", lr), ("weight_decay", weight_decay)) if value is not None}
        trainer: dict[str, Any] = {"gradient_clip_val": settings_["gradient_clip_val"]}
        if max_steps is not None:
            trainer["max_steps"] = max_steps
        if datamodule is not None:
            trainer["simple_progress_bar"] = False  # epochs are long: a bar over their batches
        if cells.n_validation and (not early_stopping or processes > 1) and not kwargs.get("enable_checkpointing"):
            trainer["check_val_every_n_epoch"] = max(1, max_epochs // N_VALIDATIONS)
        if early_stopping:
            if not cells.n_validation:
                msg = "`early_stopping` needs validation cells; received a split without: leave some out of training."
                raise ValueError(msg)
            kwargs = self._stopping_arguments(max_epochs) | kwargs
        identity = self._run_identity(
            cells.arguments, plan | (plan_kwargs or {}) | trainer | kwargs, max_epochs, max_steps, objective, processes
        )
        run = RunState(identity, checkpoint_dir)
        kwargs = {"ckpt_path": run.resume_from()} | kwargs | {"callbacks": [*kwargs.get("callbacks", ()), run]}
        self.module.objective = objective
        self.module.train()
        try:
            super().train(
                max_epochs=max_epochs,
                early_stopping=early_stopping,
                plan_kwargs=plan | {"steps_per_call": steps_per_call} | (plan_kwargs or {}),
                **(cells.arguments | trainer | kwargs),
            )
        finally:
            self.module.objective = "elbo"  # bounds of cells do not depend on how the model was trained
        if isinstance(datamodule, LabelledDataModule):
            self.train_cells_ = self.diagnostics_ = None
            LOGGER.info("No diagnostics: they look cells up, and those of a LabelledDataModule only come by.")
            return
        split_key = split_key if datamodule is None else datamodule.split_key
        if self.train_indices_ is None:  # the processes were started from this one, which has loaded no cells
            parts = cells.arguments["datasplitter_kwargs"]["external_indexing"]
            self.train_indices, self.validation_indices, self.test_indices = parts
        if split_key is not None:  # scvi-tools wants every cell in a part; "unused" cells are in none
            self.test_indices_ = np.flatnonzero((self.adata.obs[split_key] == "test").to_numpy())
        self.train_cells_ = cells_hash(self.adata)
        self._diagnose()

    def _cells_of_run(
        self,
        screen: ScreenDataModule | None,
        splitter: dict[str, Any],
        *,
        batch_size: int | None,
        load_on_device: bool | Literal["auto"],
        processes: int,
        needs_seed: bool,
        split_key: str | None,
        **splitting: Any,
    ) -> CellsOfRun:
        """Return the model's own cells, or those of a screen, which are its own from now on, as they are split."""
        reading: dict[str, Any] = {}
        is_random = split_key is None and "external_indexing" not in splitter and splitting["shuffle_set_split"]
        if screen is not None:
            check_no_split(split_key, splitting["train_size"], splitting["validation_size"], splitter or None)
            self._attach(screen)
            is_random = screen.has_random_split
        if is_random and needs_seed:
            check_seed()
        if screen is not None:
            batch_size = batch_size or screen.batch_size
            splitter, reading = {"external_indexing": screen.split}, {"reading": screen.reading}
        self._validate_anndata(None)
        batch_size = batch_size or self._training_settings["batch_size"]
        split = split_indices(
            self.adata_manager,
            split_key,
            external_indexing=splitter.get("external_indexing"),
            batch_size=batch_size,
            **splitting,
        )
        self._check_training_controls(split[0])
        further = self._splitter_arguments(split) | self._placement(load_on_device=load_on_device) | reading
        n_train, n_validation = (len(self._batch_cells(part)) for part in split[:2])
        steps_per_epoch = math.ceil(math.ceil(n_train / processes) / batch_size)
        given = splitter | {"external_indexing": split} | further
        return CellsOfRun(
            n_train, n_validation, steps_per_epoch, {"batch_size": batch_size, "datasplitter_kwargs": given}
        )

    def _run_identity(self, cells: dict[str, Any], settings_: dict[str, Any], *arguments: Any) -> dict[str, Any]:
        """Return what must be the same where a run is taken up again; nothing for cells that come by."""
        if self.adata is None:
            return {}
        split = cells["datasplitter_kwargs"]["external_indexing"]
        hashed = sha256(b"".join(part.astype(np.int64).tobytes() for part in split))
        plain = {
            k: v
            for k, v in settings_.items()
            if isinstance(v, str | int | float | tuple | None) and k not in ("ckpt_path", *SHOWN)
        }
        return {
            "model": type(self).__name__,
            "cells": cells_hash(self.adata),
            "split": hashed.hexdigest(),
            "settings": repr((self._architecture, plain, self.is_trained_, cells["batch_size"], arguments)),
            "seed": settings.seed,
        }

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
