"""Runner of trainings that take several optimiser steps per call of the trainer."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch.strategies import SingleDeviceStrategy
from scvi.train import TrainRunner


class StepsRunner(TrainRunner):
    """Runner of :class:`PerturbationTrainingPlan`: what the trainer does at a step goes to a plan that takes several.

    Raises
    ------
    ValueError
        When it is called, for several steps per call with what counts the trainer's calls as steps.
    """

    def __call__(self) -> None:
        """Run the training."""
        plan, trainer = self.training_plan, self.trainer
        if plan.steps_per_call == 1:
            super().__call__()
            return
        self._check_steps()
        plan.clipping = (trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        trainer.gradient_clip_val = None  # the trainer refuses to clip what it does not step
        with warnings.catch_warnings():  # about gradient accumulation and what counts batches, which are refused here
            warnings.filterwarnings("ignore", ".*`dataloader_iter`")
            super().__call__()

    def _check_steps(self) -> None:
        plan, trainer = self.training_plan, self.trainer
        obstacles: dict[str, Any] = {
            "`reduce_lr_on_plateau`": plan.reduce_lr_on_plateau,
            "metrics of steps (`on_step`)": plan.on_step or not plan.on_epoch,
            "`accumulate_grad_batches`": trainer.accumulate_grad_batches != 1,
            "`val_check_interval`": trainer.val_check_interval != 1.0,
            "several devices or processes": not isinstance(trainer.strategy, SingleDeviceStrategy),
        }
        for name, found in obstacles.items():
            if found:
                msg = f"A training that takes several steps per call of the trainer must do without {name}; received steps_per_call={plan.steps_per_call}: set it to 1 or leave the other out."
                raise ValueError(msg)
