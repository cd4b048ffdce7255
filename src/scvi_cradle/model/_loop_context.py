"""What a round of the perturbation loop runs in: random numbers of its own, and silence."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def quiet_trainer() -> Iterator[None]:
    """Keep the trainer from announcing devices in every round."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def forked_randomness(seed: int, round_: int) -> Iterator[None]:
    """Let torch's global generators start at a seed of the round, and put them back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence([abs(int(seed)), round_]).generate_state(1)[0]))
        yield
