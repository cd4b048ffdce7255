"""A training that ``test_resume.py`` kills: ``python killed.py MODEL FOLDER EPOCH BATCH``, killed at that batch, if any."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import scvi
import torch
from conftest import MODELS
from lightning.pytorch import Callback
from two_processes import screen


class Kill(Callback):
    """Kills the process."""

    def __init__(self, epoch, batch):
        self.at = epoch, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Kill it before a batch."""
        if (trainer.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(number, folder, callbacks=(), **kwargs):
    """Train one of the models with a folder, and return it."""
    scvi.settings.seed = 3
    model = MODELS[number].build(screen())
    arguments = {"max_epochs": 5, "batch_size": 64, "accelerator": "cpu", "enable_progress_bar": False} | kwargs
    model.train(checkpoint_dir=folder, callbacks=list(callbacks), **arguments)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    number, epoch, batch = (int(sys.argv[i]) for i in (1, 3, 4))
    run(number, Path(sys.argv[2]), [Kill(epoch, batch)])
