"""A run that was killed goes on from its folder, and ends with the same bits as one that was not."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
SCRIPT = Path(__file__).with_name("killed.py")


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("killed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


def check_same(one, two):
    state, other = one.module.state_dict(), two.module.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert set(one.history) == set(two.history)
    for name, curve in one.history.items():
        assert list(curve.index) == list(two.history[name].index), name
        assert list(curve[name]) == list(two.history[name][name]), name
    assert one.trainer.global_step == two.trainer.global_step
    assert np.array_equal(one.get_latent_representation(), two.get_latent_representation())


def test_a_killed_run_ends_as_if_it_had_not_been(script, tmp_path):
    epoch, batch = (int(v) for v in np.random.default_rng().integers((1, 0), (5, 4)))
    print(f"killed at batch {batch} of epoch {epoch}")  # shown where the test fails
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "0", str(tmp_path / "killed"), str(epoch), str(batch)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    kept = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    assert kept["epoch"] == epoch - 1
    resumed = script.run(0, tmp_path / "killed")
    assert len(resumed.history["train_loss"]) == 5
    check_same(script.run(0, tmp_path / "whole"), resumed)


class Stop(Exception):
    """Raised in the middle of an epoch."""


@pytest.mark.parametrize("number", range(1, 8))
def test_all_models_go_on(script, tmp_path, number, capsys):
    class Interrupt(script.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (3, 2):
                raise Stop

    with pytest.raises(Stop):
        script.run(number, tmp_path / "interrupted", [Interrupt()], batch_size=32)
    resumed = script.run(number, tmp_path / "interrupted", batch_size=32)
    check_same(script.run(number, tmp_path / "whole", batch_size=32), resumed)


def test_a_finished_run_is_read_and_another_run_is_refused(script, tmp_path):
    model = script.run(1, tmp_path, max_epochs=2)
    written = (tmp_path / "last.ckpt").stat().st_mtime_ns
    check_same(model, script.run(1, tmp_path, max_epochs=2))
    assert (tmp_path / "last.ckpt").stat().st_mtime_ns == written  # nothing was trained
    for changed in ({"max_epochs": 3}, {"lr": 1e-4, "max_epochs": 2}, {"max_epochs": 2, "train_size": 0.5}):
        with pytest.raises(ValueError, match=r"of the same run; received '.*last.ckpt' with other (settings|split)"):
            script.run(1, tmp_path, **changed)
    with pytest.raises(ValueError, match="with other model"):
        script.run(2, tmp_path, max_epochs=2)
    with pytest.raises(ValueError, match="with other settings"):  # a further training of a trained model
        model.train(max_epochs=2, batch_size=64, checkpoint_dir=tmp_path, enable_progress_bar=False)
