"""Random numbers of the processes of a training, and the state of a run on disk."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

NAME = "last.ckpt"
KEY = "scvi_cradle"


class RunState(Callback):
    """Gives every process its own random numbers, and keeps what a run needs to go on as if nothing had happened.

    A checkpoint of lightning holds weights, optimiser, schedule, and counts of epochs and steps; here the states of the
    random numbers and the history are added to it. With ``folder``, such a checkpoint is written after every epoch.

    Parameters
    ----------
    identity
        What run it is: a checkpoint of another run is refused.
    folder
        Where the state is kept; None: nowhere.
    """

    def __init__(self, identity: dict[str, Any], folder: str | Path | None = None) -> None:
        self.identity = identity
        self.path = None if folder is None else Path(folder) / NAME

    def resume_from(self) -> str | None:
        """Return the path of the state in the folder, None if there is none; no code of the file is run.

        Raises
        ------
        ValueError
            If it is that of another run.
        """
        if self.path is None or not self.path.is_file():
            return None
        try:
            theirs = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)[KEY]["identity"]
        except (RuntimeError, KeyError, TypeError, UnpicklingError) as error:
            msg = f"A run goes on from a checkpoint that it wrote; received {str(self.path)!r}, which is damaged or of another kind: name another folder as `checkpoint_dir`."
            raise ValueError(msg) from error
        differs = [name for name in self.identity if self.identity[name] != theirs.get(name)]
        if differs:
            msg = f"A run goes on from a checkpoint of the same run; received {str(self.path)!r} with other {', '.join(differs)}: name another folder as `checkpoint_dir`."
            raise ValueError(msg)
        return str(self.path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the processes split the cells alike; set apart their random numbers, which a seed makes the same."""
        if trainer.world_size > 1 and "split" in self.identity:
            split = torch.tensor(int(self.identity["split"][:12], 16), device=trainer.strategy.root_device)
            if len(trainer.strategy.all_gather(split).unique()) > 1:
                msg = "All processes must have the same training and validation cells; received other ones in another process: set `scvi.settings.seed` before the split is drawn, or name a `split_key`."
                raise ValueError(msg)
        if trainer.global_rank:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the state; an interrupted write leaves the old file."""
        if self.path is None:
            return
        new = self.path.with_suffix(".new")
        trainer.save_checkpoint(new)  # by the first process, the others wait
        if trainer.is_global_zero:
            new.replace(self.path)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add random numbers of all processes, and the history."""
        device = trainer.strategy.root_device
        state = random_state(device)
        states = trainer.strategy.all_gather(state.to(device)).cpu().reshape(-1, len(state))
        checkpoint[KEY] = {"identity": self.identity, "random": states, "history": _history(trainer)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up random numbers and history."""
        state = checkpoint.get(KEY)
        if state is None:
            return
        # now, as the first iterator over batches is made when the optimiser is
        set_random_state(state["random"][trainer.global_rank], trainer.strategy.root_device)
        curves = _curves(trainer)
        if curves is not None:
            for name, (label, index, values) in state["history"].items():
                curves[name] = pd.DataFrame({name: values}, index=pd.Index(index, name=label), dtype=object)


def n_processes(trainer: dict[str, Any]) -> int:
    """Return how many processes a training with these arguments of lightning's trainer has.

    Only data-parallel strategies (``"ddp..."``) have several, as in scvi-tools.
    """
    strategy = trainer.get("strategy")
    if not (isinstance(strategy, DDPStrategy) or (isinstance(strategy, str) and "ddp" in strategy)):
        return 1
    chosen = {name: trainer[name] for name in ("accelerator", "devices", "num_nodes") if name in trainer}
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return int(Trainer(strategy=copy(strategy), **chosen, **quiet).world_size)


def random_state(device: torch.device) -> Tensor:
    """Return the state of torch's random numbers on the host and, if it is a GPU, on a device, as bytes."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Set the state that :func:`random_state` returned."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].cpu().clone())  # torch crashes on a view
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].cpu().clone(), device)


def _curves(trainer: Trainer) -> dict[str, pd.DataFrame] | None:
    """Return the curves of scvi-tools' logger, which only the first process has; None for another logger."""
    curves = getattr(getattr(trainer.logger, "experiment", None), "data", None)
    return curves if isinstance(curves, dict) and trainer.is_global_zero else None


def _history(trainer: Trainer) -> dict[str, tuple[str, list[int], list[float]]]:
    """Return what was logged to the end of this epoch: name of the index, index and values of every curve."""
    curves, latest = _curves(trainer), trainer.callback_metrics  # which processes add up
    if curves is None:
        return {}
    kept = {
        name: (str(c.index.name), [int(i) for i in c.index], [float(v) for v in c[name]]) for name, c in curves.items()
    }
    for name, value in latest.items():
        if "validation" not in name:  # lightning logs the rest of an epoch after its callbacks
            _, index, values = kept.setdefault(name, ("epoch", [], []))
            index.append(trainer.current_epoch)
            values.append(float(value))
    return kept
