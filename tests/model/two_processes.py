"""Trainings that ``test_several_processes.py`` runs in two processes, and again in one.

``python two_processes.py FOLDER N``, with N of the models: lightning starts the second process by calling this script again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import scvi
import torch
from conftest import MODELS

from scvi_cradle import datasets, pp

N_TRAIN, N_VALIDATION = 240, 80
PLAN = {"optimizer": "Custom", "optimizer_creator": lambda p: torch.optim.SGD(p, lr=1e-2)}


def screen():
    """400 cells x 60 genes in two batches, with an even number of cells for training and for validation."""
    adata = datasets.simulate_perturbseq(
        n_cells=400, n_genes=60, n_perturbations=4, n_combinations=3, artifact_fraction=0.25, n_batches=2, seed=1
    )
    pp.qc_label(adata, n_mads=3, criteria=("total_counts", "n_genes", "pct_mt"), doublets=None)
    names = np.repeat(["train", "val", "test"], [N_TRAIN, N_VALIDATION, 400 - N_TRAIN - N_VALIDATION])
    adata.obs["split"] = np.random.default_rng(0).permutation(names)
    return adata


def take_step(case, n_processes, **plan):
    """Return parameters before and after a step of gradient descent on all training cells, and the history.

    All draws are the same number, so that the gradient does not depend on the order of the cells.
    """
    scvi.settings.seed = 0
    model = case.build(screen())
    before = state(model)
    normal, uniform = torch.randn, torch.rand
    torch.randn = lambda shape, dtype=None, **_: torch.full(tuple(shape), 0.3, dtype=dtype)
    torch.rand = lambda *shape, dtype=None, **_: torch.full(tuple(np.ravel(shape)), 0.7, dtype=dtype)
    try:
        train(model, n_processes, N_TRAIN // n_processes, 1, plan_kwargs=PLAN | plan, gradient_clip_val=None)
    finally:
        torch.randn, torch.rand = normal, uniform
    return before, state(model), curves(model)


def train(model, n_processes, batch_size, max_epochs, **kwargs):
    """Train in one or two processes."""
    several = {"strategy": "ddp", "devices": 2} if n_processes == 2 else {"devices": 1}
    quiet = {"enable_progress_bar": False, "accelerator": "cpu", "split_key": "split"}
    model.train(max_epochs=max_epochs, batch_size=batch_size, **(several | quiet | kwargs))


def fit(n_processes):
    """Return CradleVAE after some epochs with steps of 64 cells."""
    scvi.settings.seed = 0
    model = MODELS[0].build(screen())
    train(model, n_processes, 64 // n_processes, 20)
    return model


def state(model):
    """Return a copy of the learnt parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.module.state_dict().items()}


def curves(model):
    """Return the last value of every curve of the history."""
    return {name: float(curve[name].iloc[-1]) for name, curve in model.history.items()}


def main(folder, n_cases):
    """Train in two processes, and write what the first one has."""
    results = {str(case): take_step(case, 2) for case in MODELS[:n_cases]}
    results["on_step"] = take_step(MODELS[0], 2, on_step=True)
    model = fit(2)
    draws = torch.rand(3)  # processes have random numbers of their own
    torch.save((state(model), draws), folder / f"process_{torch.distributed.get_rank()}.pt")
    if model.trainer.is_global_zero:
        torch.save((results, curves(model), model.trainer.global_step), folder / "results.pt")
        model.save(str(folder / "model"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
