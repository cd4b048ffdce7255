"""Arguments of a training: its cells and length, and splits that cannot be."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from scvi import settings

MIN_EPOCHS = 5


class CellsOfRun(NamedTuple):
    """Numbers of training and validation cells and of steps per epoch, and arguments of ``train`` of scvi-tools."""

    n_train: int
    n_validation: int
    steps_per_epoch: int
    arguments: dict[str, Any]


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


def check_seed() -> None:
    """Raise ``ValueError`` if a random split would be another one in every process and at every call."""
    if settings.seed is None:
        msg = "A run of several processes, or one that is to be taken up again, needs the same split everywhere; received a random split without a seed: set `scvi.settings.seed`, or name a `split_key`."
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
