"""Training in two processes: gradients, histories and models are those of one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scanpy as sc
import scvi
import torch
from lightning.pytorch.strategies import DDPStrategy

from scvi_cradle import CradleVAE, QuantileHurdleAE
from scvi_cradle.train import n_processes

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
SCRIPT = Path(__file__).with_name("two_processes.py")
BATCH_NORM = "SVAEPlus-lopez"  # its layers see the cells of their own process


@pytest.fixture(scope="module")
def one_process():
    """The script as a module, to do the same in this process."""
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


def launch(folder, n_cases):
    """Run the script in its two processes and return what it wrote."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(n_cases)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("ddp"), 1)


def check_step(one_process, folder, case):
    """The averaged gradient of two halves of a batch is the gradient of the batch, and all curves are the same."""
    before, after, history = torch.load(folder / "results.pt", weights_only=False)[0][str(case)]
    first, last, expected = one_process.take_step(case, 1)
    assert set(history) == set(expected)
    for name, value in before.items():
        assert torch.equal(value, first[name]), name
    for name, value in after.items():
        step = last[name] - first[name]
        if step.is_floating_point() and str(case) != BATCH_NORM:
            assert torch.allclose(value - before[name], step, rtol=1e-3, atol=1e-4 * float(step.abs().max()) + 1e-8), (
                name
            )
    moved = [name for name in last if not torch.equal(last[name], first[name])]
    assert any(name.startswith("encoder") for name in moved)
    assert case.model is not CradleVAE or {
        "effects.mask.logits",
        "effects.embedding.loc",
        "artifact.posterior.loc",
    } <= set(moved)
    for name, value in expected.items():
        if "cf_kl" not in name:  # over cells with that term, of which a process may have more than the other
            assert history[name] == pytest.approx(value, rel=2e-2 if str(case) == BATCH_NORM else 1e-5, abs=1e-6), name


def test_two_processes_take_the_step_of_one(one_process, results):
    check_step(one_process, results, one_process.MODELS[0])


@pytest.mark.long
def test_two_processes_take_the_step_of_one_for_all_models(one_process, tmp_path):
    folder = launch(tmp_path, len(one_process.MODELS))
    for case in one_process.MODELS:
        check_step(one_process, folder, case)


def test_logging_of_steps_works_in_two_processes(results):
    """scvi-tools' own logging cannot add up further metrics over processes."""
    steps = torch.load(results / "results.pt", weights_only=False)[0]
    (_, _, at_once), (_, _, history) = steps["on_step"], steps["CradleVAE"]
    for name in ("kl_treatment_train", "cf_kl_train", "kl_treatment_validation", "validation_loss", "elbo_validation"):
        assert at_once[f"{name}_epoch"] == pytest.approx(history[name], rel=1e-5), name


def test_a_training_in_two_processes_ends_like_one(one_process, results):
    (_, history, steps), model = torch.load(results / "results.pt", weights_only=False), one_process.fit(1)
    (state, draws), (other, other_draws) = (torch.load(results / f"process_{i}.pt") for i in (0, 1))
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert not torch.equal(draws, other_draws)
    assert steps == model.trainer.global_step
    expected = one_process.curves(model)
    for name in ("train_loss", "validation_loss", "elbo_validation", "reconstruction_loss_validation"):
        assert history[name] == pytest.approx(expected[name], rel=0.01), name
    loaded = CradleVAE.load(str(results / "model"), adata=one_process.screen())
    assert np.isfinite(loaded.get_latent_representation()).all()
    assert loaded.get_generated_expression(n_samples=2, seed=0).X.sum() > 0
    one, two = (m.get_average_treatment_effects(n_particles=200, seed=0).X.ravel() for m in (model, loaded))
    assert np.corrcoef(one, two)[0, 1] > 0.9  # 0.97 between two seeds in one process
    assert np.square(one - two).mean() < 0.25 * np.square(one).mean()


@pytest.mark.parametrize("kind", ["controls", "passed", "failed"])
def test_every_parameter_has_a_gradient_in_any_batch(case, shared_screen, kind, with_seed):
    """Or the processes would wait for each other: a batch of one process may be without treatments or failed cells."""
    adata = shared_screen.copy()
    with with_seed(0):
        model = case.build(adata)
        model.train(max_epochs=1, split_key="split", enable_progress_bar=False)
    control, failed = adata.obs["perturbation"] == "control", adata.obs["artifact"].to_numpy()
    cells = {"controls": control & ~failed, "passed": ~control & ~failed, "failed": ~control & failed}[kind]
    assert cells.sum() > 10
    module = model.module.train()
    module.zero_grad()
    for tensors in model._make_data_loader(model.adata, indices=np.flatnonzero(cells), batch_size=64):
        _, _, output = module(tensors)
        output.loss.backward()
        break
    lacking = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking


def test_a_random_split_without_seed_is_an_error(case, shared_screen, tmp_path, with_seed):
    with with_seed(0):
        model = case.build(shared_screen.copy())
    several = {"strategy": "ddp", "accelerator": "cpu", "devices": 2}
    with with_seed(0):
        scvi.settings._seed = None
        for kwargs in (several, {"checkpoint_dir": tmp_path}):
            with pytest.raises(
                ValueError, match=r"needs the same split .*; received a random split without a seed: set"
            ):
                model.train(max_epochs=1, **kwargs)
    assert not list(tmp_path.iterdir())


def test_number_of_processes():
    cpu = {"accelerator": "cpu"}
    assert n_processes({}) == n_processes({"strategy": "auto", "devices": 2}) == 1
    assert n_processes(cpu | {"strategy": "ddp", "devices": 2}) == 2
    assert n_processes(cpu | {"strategy": "ddp_find_unused_parameters_true", "devices": "3", "num_nodes": 2}) == 6
    strategy = DDPStrategy()
    assert n_processes(cpu | {"strategy": strategy, "devices": 2}) == 2
    assert strategy.parallel_devices is None  # the user's object is left as it is


def test_the_perturbation_loop_trains_in_one_process(shared_screen):
    adata = shared_screen.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    QuantileHurdleAE.setup_anndata(adata, perturbation_key="perturbation")
    model = QuantileHurdleAE(adata, n_latent=4, n_hidden=8)
    with pytest.raises(ValueError, match=r"in one process; received `strategy`"):
        model.fit_perturbation_loop(strategy="ddp", accelerator="cpu", devices=2)
