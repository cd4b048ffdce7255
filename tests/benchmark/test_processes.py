"""Runs in several processes: a killed run goes on, and a lost process takes nothing else with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scvi_cradle.benchmark import BenchmarkSettings, _runners, _tasks, run_benchmark


def test_a_killed_run_goes_on(settings: BenchmarkSettings, tmp_path: Path) -> None:
    some = replace(settings, models=("SAMSVAE", "Additive"), seeds=(0, 1, 2, 3), thresholds=(5.0,))
    words = [str(some.data), "--perturbation-key", "gene", "--control", "NT", "--sep", "_", "--thresholds", "5"]
    words += ["--models", *some.models, "--seeds", "0", "1", "2", "3", "--max-steps", "10", "--jobs", "2"]
    command = [sys.executable, "-m", "scvi_cradle.benchmark", *words, "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as run:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "cells").glob("*.json"))) < 2 and time.monotonic() < deadline:
            assert run.poll() is None, run.stdout.read().decode()
            time.sleep(0.02)
        os.kill(run.pid, signal.SIGKILL)  # the parent alone: its workers must end by themselves
        run.stdout.read()  # until no worker holds the pipe any more
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.json")}
    assert 2 <= len(kept) < 8
    assert all(json.loads(path.read_text())["error"] is None for path in kept)
    result = run_benchmark(some, out=tmp_path, progress=False)
    assert result.errors.empty
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((tmp_path / "cells").iterdir())) == 8
    fresh = run_benchmark(replace(some, seeds=(1,)), out=tmp_path / "fresh", progress=False)
    rows = result.cells["seed"] == 1
    names = ["model", "metric", "value"]
    expected, received = (t[t["metric"] != "cpu_seconds"][names] for t in (fresh.cells, result.cells[rows]))
    merged = expected.merge(received, on=names[:2], validate="1:1")
    np.testing.assert_allclose(merged["value_x"], merged["value_y"], atol=1e-6)


def test_a_killed_process_takes_no_other_task_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runners, "_end_with_parent", None)  # its import takes seconds
    tasks = {0: (abs, (-1,)), "first": (os._exit, (1,)), 1: (abs, (-2,)), "second": (os._exit, (1,)), 2: (abs, (-3,))}
    processes = _runners.Processes(2)
    results = dict(processes.run(tasks))
    assert results == {0: 1, 1: 2, 2: 3, "first": _runners.KILLED, "second": _runners.KILLED}
    assert dict(processes.run({3: (abs, (-4,))})) == {3: 4}
    processes.close()


def test_a_task_that_never_ends_is_an_error_of_its_cells(
    settings: BenchmarkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def lost(*_: object) -> Iterator[object]:
        yield lambda tasks: ((key, _runners.KILLED) for key in tasks)

    some = replace(settings, models=("Additive", "ControlMean"), thresholds=(5.0,))
    run_benchmark(replace(some, models=("ControlMean",)), out=tmp_path, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(_tasks, "runner", lost)
        result = run_benchmark(some, out=tmp_path, progress=False)
    assert result.errors[["model", "error"]].to_numpy().tolist() == [["Additive", _runners.KILLED]]
    assert run_benchmark(some, out=tmp_path, progress=False).errors.empty


@pytest.mark.filterwarnings("ignore")
def test_cells_on_a_cluster(settings: BenchmarkSettings, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    some = replace(settings, models=("SAMSVAE", "Additive"), thresholds=(5.0,))
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        result = run_benchmark(some, out=tmp_path / "a", scheduler=cluster.scheduler_address, progress=False)
    here = run_benchmark(some, out=tmp_path / "b", progress=False)
    assert result.errors.empty
    rows = [table.loc[table["metric"] != "cpu_seconds", "value"] for table in (result.cells, here.cells)]
    np.testing.assert_allclose(*rows, atol=1e-6)


def test_a_cluster_needs_its_package(
    settings: BenchmarkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"scvi-cradle\[cluster\]"):
        run_benchmark(replace(settings, models=("Additive",)), out=tmp_path, scheduler="tcp://nowhere:1")
