"""Time and memory of training steps and effects, in the form of airspeed velocity: ``asv run`` in ``benchmarks/``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from _effects_speed import random_model
from _step import Batch, L, S, make_noise, make_ours, make_plain, step_ours, step_plain

SIZES = {"S": S, "L": replace(L, batch=64)}


class Step:
    """Forward and backward of a training step."""

    params = (list(SIZES), ["scvi_cradle", "plain", "published"])
    param_names = ("size", "side")
    timeout, warmup_time, number = 600, 0, 1

    def setup(self, size: str, side: str) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.size = SIZES[size]
        self.batch = Batch(self.size)
        self.module = make_ours(self.size, self.batch)
        if side != "scvi_cradle":
            self.module = make_plain(self.size, self.batch, self.module, as_published=side == "published")

    def time_step(self, size: str, side: str) -> None:
        self.module.zero_grad()
        if side == "scvi_cradle":
            step_ours(self.module, self.batch)
        else:
            step_plain(self.module, self.batch, make_noise(self.size))

    def peakmem_step(self, size: str, side: str) -> None:
        self.time_step(size, side)


class Effects:
    """Average effects of ten of 722 treatments."""

    timeout, warmup_time, number = 600, 0, 1

    def setup(self) -> None:
        torch.set_num_threads(1)
        self.model = random_model()
        self.labels = self.model._table.treatments[:10]

    def time_effects(self) -> None:
        self.model.get_average_treatment_effects(self.labels, n_particles=500, seed=0)

    def peakmem_effects(self) -> None:
        self.time_effects()
