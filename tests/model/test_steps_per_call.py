"""Several optimiser steps per call of the trainer: the training is the same, step by step."""

from __future__ import annotations

import os

import numpy as np
import pytest
import scanpy as sc
import torch
from lightning.pytorch.callbacks import Callback
from scvi.train import SaveCheckpoint

from scvi_cradle import SAMSVAE, CradleVAE, PerturbedVAE, QuantileHurdleAE, datasets
from scvi_cradle.train import PerturbationTrainingPlan

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
TINY = {"n_latent": 4, "n_hidden": 16}
MODELS = {
    CradleVAE: TINY,
    SAMSVAE: TINY,
    PerturbedVAE: {"likelihood": "nb", "n_latent_responsive": 3, "n_latent_invariant": 3, "n_hidden": 16},
    QuantileHurdleAE: TINY | {"quantiles": np.linspace(0.1, 0.9, 5)},
}
N_CELLS, TRAIN_SIZE, BATCH = 240, 0.75, 16
STEPS = 12  # of an epoch: 180 cells


class Calls(Callback):
    """Learning rates of the steps, and the calls that took them."""

    def __init__(self):
        self.rates, self.n_calls = [], 0

    def on_train_batch_end(self, *args):
        self.n_calls += 1

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture(scope="module")
def screens():
    """Counts, and the same normalised."""
    counts = datasets.simulate_perturbseq(
        n_cells=N_CELLS, n_genes=40, n_perturbations=3, n_combinations=1, artifact_fraction=0.25, seed=1
    )
    normalised = counts.copy()
    sc.pp.normalize_total(normalised, target_sum=1e4)
    sc.pp.log1p(normalised)
    return {"counts": counts, "normalised": normalised}


@pytest.fixture
def fit(screens, with_seed):
    """Train a model, with its steps and calls as ``calls``; ``rounds`` times over."""

    def run(cls=CradleVAE, steps_per_call=1, *, rounds=1, callbacks=(), **options):
        adata = screens["normalised" if cls is QuantileHurdleAE else "counts"].copy()
        options = {"max_epochs": 3, "batch_size": BATCH, "train_size": TRAIN_SIZE} | options
        with with_seed(0):
            torch.manual_seed(0)
            keys = {"artifact_key": "true_artifact"} if cls is CradleVAE else {}
            cls.setup_anndata(adata, perturbation_key="perturbation", **keys)
            model = cls(adata, **MODELS[cls])
            model.calls = Calls()
            for _ in range(rounds):
                model.train(
                    **options,
                    steps_per_call=steps_per_call,
                    callbacks=[model.calls, *callbacks],
                    enable_progress_bar=False,
                )
        return model

    return run


def check_same(one, several):
    """Weights, learning rates and history to the last bit, in fewer calls."""
    weights = one.module.state_dict()
    assert weights.keys() == several.module.state_dict().keys()
    for name, value in several.module.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert several.trainer.global_step == one.trainer.global_step > 0
    assert several.calls.rates == one.calls.rates
    assert several.calls.n_calls < one.calls.n_calls == len(one.calls.rates)
    assert several.history.keys() == one.history.keys()
    for name, column in one.history.items():
        np.testing.assert_array_equal(several.history[name].to_numpy(), column.to_numpy(), err_msg=name)


@pytest.mark.parametrize("cls", MODELS)
def test_the_training_is_the_same(fit, cls):
    """With all that follows the steps: schedule, warm-ups, draws of partners, clipping, metrics of epochs."""
    one, several = fit(cls), fit(cls, 5)
    check_same(one, several)
    assert len(one.calls.rates) == one.trainer.global_step == 3 * -(-len(one.train_indices) // BATCH)
    assert several.calls.n_calls == 3 * -(-(one.trainer.global_step // 3) // 5)
    assert several.calls.rates[-1] < 0.1 * max(several.calls.rates) or cls is QuantileHurdleAE


@pytest.mark.parametrize("cls", [CradleVAE, PerturbedVAE])
@pytest.mark.parametrize(("steps_per_call", "n_calls"), [(5, 3 + 1), (1_000, 1 + 1)])
def test_max_steps_stops_within_a_call(fit, cls, steps_per_call, n_calls):
    length = {"max_epochs": None, "max_steps": 14}
    if cls is PerturbedVAE:  # its steps are counted over cells that have a partner
        n_calls = None
    one, several = fit(cls, **length), fit(cls, steps_per_call, **length)
    check_same(one, several)
    assert several.trainer.global_step == 14
    assert n_calls in (None, several.calls.n_calls)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped(fit, algorithm):
    clip = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": algorithm, "max_epochs": 1}
    one, several = fit(**clip), fit(steps_per_call=4, **clip)
    check_same(one, several)
    free = fit(steps_per_call=4, max_epochs=1, gradient_clip_val=0)
    assert not all(torch.equal(a, b) for a, b in zip(free.module.parameters(), one.module.parameters(), strict=True))


@pytest.mark.parametrize("cls", [CradleVAE, PerturbedVAE, QuantileHurdleAE])
def test_only_forward_passes_are_in_mixed_precision(fit, cls):
    one, several = (fit(cls, k, max_epochs=1, precision="bf16-mixed") for k in (1, 5))
    check_same(one, several)
    assert {p.dtype for p in several.module.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:Sparse (invariant checks|CSR tensor support):UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"load_on_device": True},
        {"load_sparse_tensor": True},
        {"limit_train_batches": 7},
        {"plan_kwargs": {"optimizer": "AdamW"}},
        {"plan_kwargs": {"lr_schedule": "constant", "n_steps_kl_warmup": 20}},
    ],
    ids=str,
)
def test_options_work(fit, options):
    options = options | {"max_epochs": 2}
    one, several = fit(SAMSVAE, **options), fit(SAMSVAE, 5, **options)
    check_same(one, several)
    plain = fit(SAMSVAE, max_epochs=2)
    is_same = all(torch.equal(a, b) for a, b in zip(plain.module.parameters(), one.module.parameters(), strict=True))
    assert is_same == ("load_sparse_tensor" in options or "load_on_device" in options)


def test_early_stopping_and_checkpoints_work(fit, tmp_path):
    def run(steps_per_call):
        best = SaveCheckpoint(
            dirpath=str(tmp_path / str(steps_per_call)), monitor="elbo_validation", load_best_on_end=True
        )
        return fit(
            steps_per_call=steps_per_call, max_epochs=30, lr=0.3, early_stopping=True, early_stopping_patience=2,
            callbacks=[best],
        )  # fmt: skip

    one, several = run(1), run(5)
    check_same(one, several)
    assert 2 * STEPS < several.trainer.global_step < 30 * STEPS
    assert len(list((tmp_path / "5").iterdir())) == len(list((tmp_path / "1").iterdir())) > 0


def test_further_trainings_take_up_the_optimiser(fit):
    one, several = (fit(QuantileHurdleAE, k, rounds=2, max_epochs=1) for k in (1, 5))
    check_same(one, several)
    states = [model.module.optimizer_state["state"] for model in (one, several)]
    assert float(states[1][0]["step"]) == len(several.calls.rates)
    assert torch.equal(states[0][0]["exp_avg"], states[1][0]["exp_avg"])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
        ({"val_check_interval": 0.5}, "val_check_interval"),
        ({"plan_kwargs": {"reduce_lr_on_plateau": True}}, "reduce_lr_on_plateau"),
        ({"plan_kwargs": {"on_step": True}}, "on_step"),
        ({"accelerator": "cpu", "devices": 2}, "several devices"),
        ({"steps_per_call": 0}, "positive integer; received 0"),
        ({"steps_per_call": 2.0}, "positive integer; received 2.0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(fit, options, name):
    with pytest.raises(ValueError, match=name):
        fit(**({"steps_per_call": 3} | options))


@pytest.mark.slow
@pytest.mark.skipif("SCVI_CRADLE_COMPILE" not in os.environ, reason="takes two minutes: set SCVI_CRADLE_COMPILE=1")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_compiled_objective_is_the_objective(fit, monkeypatch):
    """Losses of the first steps, with torch's own draws, and a graph was compiled: errors of the compiler are silent."""
    from torch._dynamo.utils import counters
    from torch._inductor import config

    losses = {}
    log = PerturbationTrainingPlan.compute_and_log_metrics

    def spy(plan, output, metrics, mode):
        if mode == "train":
            losses.setdefault(key, []).append(float(output.loss))
        return log(plan, output, metrics, mode)

    monkeypatch.setattr(PerturbationTrainingPlan, "compute_and_log_metrics", spy)
    monkeypatch.setattr(config, "fallback_random", True)
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)  # scvi-tools sets it for good
    counters.clear()
    for key in (False, True):
        fit(max_steps=3, max_epochs=None, plan_kwargs={"compile": key})
    assert counters["stats"]["unique_graphs"] > 0
    assert len(losses[True]) == 3
    assert losses[True][0] == pytest.approx(losses[False][0], rel=1e-5)
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-4)
