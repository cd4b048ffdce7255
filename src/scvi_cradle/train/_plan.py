"""Training plan: our optimiser defaults, learning-rate schedule and logging."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from scvi.module.base import BaseModuleClass, LossOutput
from scvi.train import TrainingPlan

from scvi_cradle._perturbedvae_settings import check_warmup
from scvi_cradle._validation import check_one_of, check_positive

EFFECTS = ("effects.", "causal.")  # parts of a module that describe treatments
N_CELLS, N_BATCHES = "n_cells", "n_batches"
TERMS = ("reconstruction_loss", "kl_local", "kl_global")  # of the evidence bound, as scvi-tools names them
KL_WARMUP, ALIGN_WARMUP = (0.1, 0.5), (0.05, 0.5)  # shares of the steps: (10, 50) and (5, 50) of the published 100


class PerturbationTrainingPlan(TrainingPlan):
    """Training plan of the models of this package.

    Adam with ``eps=1e-8`` and without KL warm-up; the learning rate rises over ``lr_warmup_steps`` and then follows a
    cosine to 0 over the steps of the run; parameters of the treatment posteriors learn ``effect_lr_scale`` times faster.

    Parameters
    ----------
    module
        The module to train.
    lr, weight_decay, eps
        Adam.
    lr_schedule
        ``"cosine"`` or ``"constant"``.
    lr_warmup_steps
        Optimiser steps of linear warm-up (cosine schedule only).
    effect_lr_scale
        Factor of the learning rate of ``module.effects`` (PerturbedVAE: ``module.causal``).
    n_epochs_kl_warmup, n_steps_kl_warmup
        KL warm-up; default none.
    steps_per_call
        Optimiser steps per call of the trainer; above 1 it is to be run by :class:`StepsRunner`.
    **kwargs
        Further arguments of :class:`scvi.train.TrainingPlan`.
    """

    def __init__(
        self,
        module: BaseModuleClass,
        *,
        lr: float = 3e-3,
        weight_decay: float = 1e-6,
        eps: float = 1e-8,
        lr_schedule: Literal["cosine", "constant"] = "cosine",
        lr_warmup_steps: int = 30,
        effect_lr_scale: float = 5.0,
        n_epochs_kl_warmup: int | None = None,
        n_steps_kl_warmup: int | None = None,
        steps_per_call: int = 1,
        **kwargs: Any,
    ) -> None:
        check_one_of("lr_schedule", lr_schedule, ("cosine", "constant"))
        check_positive("steps_per_call", steps_per_call, integer=True)
        self.sums: dict[str, dict[str, Any]] = {}  # of terms over an epoch, by mode
        self.lr_schedule, self.lr_warmup_steps, self.effect_lr_scale = lr_schedule, lr_warmup_steps, effect_lr_scale
        super().__init__(
            module,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            n_epochs_kl_warmup=n_epochs_kl_warmup,
            n_steps_kl_warmup=n_steps_kl_warmup,
            **kwargs,
        )
        self.steps_per_call = steps_per_call
        self.clipping: tuple[float | None, str | None] = (None, None)  # of gradients, where the trainer does not clip
        if steps_per_call > 1:
            self.automatic_optimization = False
            # the argument's name tells the trainer that the step fetches its batches
            setattr(self, "training_step", self._take_steps)  # noqa: B010

    def configure_optimizers(self) -> dict[str, Any]:
        """Return Adam (or the user's optimiser) and the schedule."""
        if self.reduce_lr_on_plateau or self.optimizer_name != "Adam":
            return super().configure_optimizers()
        effects = [p for name, p in self.module.named_parameters() if name.startswith(EFFECTS)]
        others = [p for name, p in self.module.named_parameters() if not name.startswith(EFFECTS)]
        groups = [{"params": others}, {"params": effects, "lr": self.lr * self.effect_lr_scale}]
        # mixed precision cannot clip the gradients of a fused optimiser
        fused = not isinstance(self.trainer.precision_plugin, MixedPrecision)
        optimizer = torch.optim.Adam(groups, lr=self.lr, eps=self.eps, weight_decay=self.weight_decay, fused=fused)
        if self.lr_schedule == "constant":
            return {"optimizer": optimizer}
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._lr_factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self, step: int, total: int) -> float:
        warmup = min(self.lr_warmup_steps, total // 2)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss of a batch of training cells."""
        return self._loss(batch)

    def _take_steps(self, dataloader_iter: Iterator[Any]) -> Any:
        """Take up to ``steps_per_call`` optimiser steps, each as the trainer would; return the last loss."""
        trainer, precision = self.trainer, self.trainer.precision_plugin
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        batch: Any = None
        loss: Any = None

        def backward() -> Any:
            nonlocal loss
            with precision.train_step_context():
                loss = self._loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        # the trainer has entered mixed precision, which is for forward passes alone
        is_mixed = isinstance(precision, MixedPrecision)
        with torch.autocast(self.device.type, enabled=False) if is_mixed else nullcontext():
            for fetched, *_ in islice(dataloader_iter, self.steps_per_call):
                batch = trainer.strategy.batch_to_device(precision.convert_input(fetched), dataloader_idx=0)
                optimizer.step(closure=backward)
                if schedule is not None:
                    self.lr_scheduler_step(schedule, None)
                if 0 <= trainer.max_steps <= self.global_step:
                    break
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients, unless the trainer does."""
        super().on_before_optimizer_step(optimizer)
        if self.clipping[0] is not None:
            self.clip_gradients(optimizer, *self.clipping)

    def _loss(self, batch: Any) -> Any:
        if self._is_told_at_once:
            return super().training_step(batch, 0)  # which makes no use of the number
        if "kl_weight" in self.loss_kwargs:
            self.loss_kwargs["kl_weight"] = self.kl_weight
        return self._measure(batch, "train", self.train_metrics)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure the loss of a batch."""
        if self._is_told_at_once:
            super().validation_step(batch, batch_idx)
            return
        self._measure(batch, "validation", self.val_metrics)

    @property
    def _is_told_at_once(self) -> bool:
        """Whether scvi-tools' own logging of steps was asked for."""
        return bool(self.on_step or not self.on_epoch)

    def _measure(self, batch: Any, mode: str, metrics: dict[str, Any]) -> Any:
        """Return the loss of a batch, and keep what is logged."""
        _, _, output = self.forward(batch, loss_kwargs=self.loss_kwargs)
        self.compute_and_log_metrics(output, metrics, mode)
        return output.loss

    def compute_and_log_metrics(self, loss_output: LossOutput, metrics: dict[str, Any], mode: str) -> None:
        """Keep the terms of the objective, by names of scvi-tools, until the end of the epoch.

        scvi-tools divides the global divergence by the number of validation cells; here a validation cell carries the
        share of a training cell. The trainer is told once an epoch: to tell it at every step took a quarter of the time
        of small models.
        """
        n_cells = loss_output.n_obs_minibatch
        if mode == "validation" and self.n_obs_training and self.n_obs_validation:
            loss_output.kl_global_sum = loss_output.kl_global_sum * (self.n_obs_validation / self.n_obs_training)
        if self._is_told_at_once:
            super().compute_and_log_metrics(loss_output, metrics, mode)
            return
        sums = self.sums.setdefault(mode, {})
        with torch.inference_mode():
            terms = {name: getattr(loss_output, f"{name}_sum") for name in TERMS}
            extra = {f"{key}_{mode}": value.detach() for key, value in loss_output.extra_metrics.items()}
            means = {f"{mode}_loss": loss_output.loss.detach()} | extra
            parts = terms | {name: value * n_cells for name, value in means.items()}
            for name, value in (parts | {N_CELLS: n_cells, N_BATCHES: 1}).items():
                sums[name] = sums.get(name, 0) + value

    def on_train_batch_end(self, *args: Any) -> None:
        """Log the epoch after its last batch: callbacks at the end of the epoch see it."""
        super().on_train_batch_end(*args)
        if self.trainer.is_last_batch:
            self._log_epoch("train", self.train_metrics)

    def on_train_epoch_end(self) -> None:
        """Log an epoch that ended before its last batch."""
        self._log_epoch("train", self.train_metrics)
        super().on_train_epoch_end()

    def on_validation_epoch_end(self) -> None:
        """Log the validation."""
        self._log_epoch("validation", self.val_metrics)
        super().on_validation_epoch_end()

    def _log_epoch(self, mode: str, metrics: dict[str, Any]) -> None:
        """Log means over the epoch, unless that was done."""
        sums = self.sums.pop(mode, None)
        if not sums:
            return
        n_cells, n_batches = sums.pop(N_CELLS), sums.pop(N_BATCHES)
        terms = {name: sums.pop(name) for name in TERMS}
        terms["kl_global"] = terms["kl_global"] / n_batches  # one update stands for all batches
        metrics[f"elbo_{mode}"].update(n_obs_minibatch=n_cells, **terms)
        options = {"on_step": False, "on_epoch": True, "batch_size": n_cells, "sync_dist": self.use_sync_dist}
        self.log_dict(metrics, **options)
        if mode == "train" and "kl_weight" in self.loss_kwargs:
            self.log("kl_weight", self.loss_kwargs["kl_weight"], **options)
        for name, total in sums.items():
            self.log(name, total / n_cells, prog_bar=name == "train_loss", **options)


class ContinuedTrainingPlan(PerturbationTrainingPlan):
    """Training plan of QuantileHurdleAE: a further training takes up the optimiser's state of the last one.

    The state is kept as ``module.optimizer_state``; None starts anew.
    """

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimiser in the state in which the last training left it."""
        configured = super().configure_optimizers()
        if self.module.optimizer_state is not None:
            now = configured["optimizer"].state_dict()  # learning rate and decay are those of this training
            configured["optimizer"].load_state_dict(now | {"state": self.module.optimizer_state["state"]})
        return configured

    def on_train_end(self) -> None:
        """Keep the state."""
        super().on_train_end()
        self.module.optimizer_state = self.trainer.optimizers[0].state_dict()


class PairedTrainingPlan(PerturbationTrainingPlan):
    """Training plan of PerturbedVAE: warm-ups of the divergences and of the alignment, each with a start and an end.

    Parameters
    ----------
    module
        The module to train.
    n_epochs_kl_warmup, n_epochs_align_warmup
        ``(start, end)``: the weight is 0 up to epoch ``start`` and full from epoch ``end``, linear between. Default: from
        10 % (alignment: 5 %) to 50 % of the steps of the run.
    **kwargs
        Further arguments of :class:`PerturbationTrainingPlan`.
    """

    def __init__(
        self,
        module: BaseModuleClass,
        *,
        n_epochs_kl_warmup: tuple[float, float] | None = None,
        n_epochs_align_warmup: tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        check_warmup("n_epochs_kl_warmup", n_epochs_kl_warmup)
        check_warmup("n_epochs_align_warmup", n_epochs_align_warmup)
        self.warmups = {
            "kl_weight": (n_epochs_kl_warmup, KL_WARMUP),
            "alignment_ramp": (n_epochs_align_warmup, ALIGN_WARMUP),
        }
        super().__init__(module, **kwargs)
        self.loss_kwargs["alignment_ramp"] = 0.0

    def ramp(self, name: str) -> float:
        """Return the factor, from 0 to 1, of ``"kl_weight"`` or ``"alignment_ramp"`` at this step."""
        epochs, shares = self.warmups[name]
        if epochs is not None:
            (start, end), now = epochs, float(self.current_epoch)
        else:
            (start, end), now = shares, 0.0
            if self._trainer is not None:
                now = self.global_step / max(int(self.trainer.estimated_stepping_batches), 1)
        if now >= end:
            return 1.0
        return float(max((now - start) / (end - start), 0.0))

    @property
    def kl_weight(self) -> float:
        """Factor of the divergences at this step."""
        return self.ramp("kl_weight")

    def _loss(self, batch: Any) -> Any:
        self.loss_kwargs["alignment_ramp"] = self.ramp("alignment_ramp")
        return super()._loss(batch)
