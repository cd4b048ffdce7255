"""CPU time of a training step in the trainer, one or several steps per call, against a bare loop over the same batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import scvi
import torch
from anndata import AnnData
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

import scvi_cradle as cradle

N_CELLS, N_GENES, N_TREATMENTS, EPOCHS = 3_000, 500, 20, 2
STEPS_PER_CALL = 8


class Clock(Callback):
    """CPU seconds of the training proper."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.used = time.process_time() - self.start


def measure_trainer(*, quick: bool, show: Callable[[str], None]) -> dict[str, float]:
    """Return the ratio of a step at one step per call to one at several; rounds are interleaved."""
    adata = cradle.datasets.simulate_perturbseq(
        n_cells=N_CELLS, n_genes=N_GENES, n_perturbations=N_TREATMENTS, artifact_fraction=0.2, seed=0
    )
    cradle.CradleVAE.setup_anndata(adata, perturbation_key="perturbation", artifact_key="true_artifact")
    sides: dict[str, Callable[[], float]] = {
        "bare loop": lambda: bare_ms(adata),
        "1 step per call": lambda: trainer_ms(adata, 1)[0],
        f"{STEPS_PER_CALL} steps per call": lambda: trainer_ms(adata, STEPS_PER_CALL)[0],
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range((5 if quick else 30) + 1):
        for name, run in sides.items():
            used = run()
            if turn:
                times[name].append(used)
    bare, one, several = times.values()
    show(f"| {N_CELLS:,} cells x {N_GENES} genes, 128 cells a step | CPU ms, median (least) | over the bare loop, ms |")
    show("|---|---|---|")
    for name, used in times.items():
        over = statistics.median(a - b for a, b in zip(used, bare, strict=True))
        show(f"| {name} | {statistics.median(used):.2f} ({min(used):.2f}) | {over:.2f} |")
    ratios = [a / b for a, b in zip(one, several, strict=True)]
    show(f"1 / {STEPS_PER_CALL} steps: {statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})")
    return {"trainer_steps": statistics.median(ratios)}


def trainer_ms(adata: AnnData, steps_per_call: int, epochs: int = EPOCHS) -> tuple[float, cradle.CradleVAE]:
    """Return CPU ms of a step in the trainer, and the model."""
    scvi.settings.seed = 0
    model, clock = cradle.CradleVAE(adata), Clock()
    model.train(
        max_epochs=epochs,
        train_size=1.0,
        steps_per_call=steps_per_call,
        callbacks=[clock],
        enable_progress_bar=False,
    )
    return 1e3 * clock.used / model.trainer.global_step, model


def bare_ms(adata: AnnData) -> float:
    """Return CPU ms of a step of a loop that does nothing else."""
    model = trainer_ms(adata, 1, epochs=1)[1]
    module, loader = model.module.train(), model.trainer.datamodule.train_dataloader
    weights = list(module.parameters())
    optimizer = torch.optim.Adam(weights, lr=1e-3, eps=1e-8, weight_decay=1e-6, fused=True)
    start, n_steps = time.process_time(), 0
    for _ in range(EPOCHS):
        for batch in loader():
            loss = module(batch, loss_kwargs={"kl_weight": 1.0})[2].loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 100.0)
            optimizer.step()
            n_steps += 1
    return 1e3 * (time.process_time() - start) / n_steps
