"""What is checked before a run begins, folders that cannot be used, and files that cannot be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

from scvi_cradle.benchmark import BenchmarkSettings, _benchmark, _store, run_benchmark
from scvi_cradle.benchmark.__main__ import main
from scvi_cradle.benchmark._folds import Fold
from scvi_cradle.benchmark._store import locked_folder


@pytest.mark.parametrize(
    ("changes", "without", "part"),
    [
        ({}, "val", "2 at least"),  # combinations are held out, and their controls are those of val
        ({"split_key": "part", "seeds": (0,)}, "val", "2 at least"),
        ({"split_key": "part", "seeds": (0,)}, "treatments", "none among no label"),
        ({"experiment": "ood", "fractions": (0.0, 1.0)}, "controls", "2 at least"),
    ],
)
def test_a_split_that_cannot_be_scored_is_found_before_anything_is_done(
    settings: BenchmarkSettings,
    tmp_path: Path,
    changes: dict[str, Any],
    without: str,
    part: str,
) -> None:
    adata = anndata.read_h5ad(settings.data)
    controls = (adata.obs["gene"] == "NT").to_numpy()
    if without == "val":
        kept = ~controls | (adata.obs["part"] == "train").to_numpy() if "split_key" in changes else ~controls
        kept[np.flatnonzero(controls)[:1]] = True
    elif without == "treatments":
        kept = controls | (adata.obs["part"] == "test").to_numpy()
        adata.obs.loc[controls, "part"] = np.resize(["train", "val"], controls.sum())
    else:
        kept = ~controls
        kept[np.flatnonzero(controls)[:2]] = True
    adata[kept].write_h5ad(tmp_path / "few.h5ad")
    some = replace(settings, data=tmp_path / "few.h5ad", models=("Additive",), **({"seeds": (0, 1)} | changes))
    with pytest.raises(ValueError, match=part):
        run_benchmark(some, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_split_is_checked(settings: BenchmarkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    original = _benchmark.check_split
    monkeypatch.setattr(_benchmark, "check_split", lambda screen, cell: checked.append(cell) or original(screen, cell))
    monkeypatch.setattr(_benchmark, "run_missing", lambda *_, **__: {})
    some = replace(settings, experiment="ood", fractions=(0.0, 1.0), seeds=(0, 3), models=("Additive", "ControlMean"))
    run_benchmark(some, out=tmp_path / "out", progress=False)
    assert sorted((cell.seed, cell.fraction) for cell in checked) == [(0, 0.0), (0, 1.0), (3, 0.0), (3, 1.0)]


# ---- folders that cannot be used, and files that cannot be read -----------------------------------------------------


def words_for(settings: BenchmarkSettings, out: Path) -> list[str]:
    words = [str(settings.data), "--perturbation-key", "gene", "--control", "NT", "--sep", "_", "--thresholds", "5"]
    return [*words, "--models", "Additive", "--out", str(out)]


@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_out_must_be_a_folder(
    settings: BenchmarkSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(words_for(settings, tmp_path / name)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: `out` must be a folder, or a place where one can be made")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_second_run_on_the_same_folder_is_told_so(
    settings: BenchmarkSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "cells" / ".begun.tmp"
    with locked_folder(tmp_path):
        begun.mkdir(parents=True)
        assert main(words_for(settings, tmp_path)) == 2
        assert begun.is_dir()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: `out` is used by one run at a time")
    assert main(words_for(settings, tmp_path)) == 0
    assert not begun.exists()


@pytest.mark.parametrize("text", ['{"cell": {"experi', "", "[]", "{}", '{"error": null}'])
def test_a_result_that_cannot_be_read_is_computed_again(
    settings: BenchmarkSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    some = replace(settings, models=("ControlMean",), thresholds=(5.0,))
    before = run_benchmark(some, out=tmp_path, progress=False)
    (result,) = (tmp_path / "cells").iterdir()
    (doublets,) = (tmp_path / "folds").glob("doublets*.json")
    for path in (result, doublets):
        path.write_text(text)
    after = run_benchmark(some, out=tmp_path, progress=False)
    assert after.errors.empty
    assert json.loads(result.read_text())["error"] is None
    drop = before.cells["metric"] != "cpu_seconds"
    pd.testing.assert_frame_equal(after.cells[drop], before.cells[drop])
    assert result.name in caplog.text


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_fold_that_cannot_be_read_is_made_again(
    settings: BenchmarkSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    some = replace(settings, models=("ControlMean",), thresholds=(5.0,))
    run_benchmark(some, out=tmp_path, progress=False)
    (fold,) = (path for path in (tmp_path / "folds").iterdir() if path.is_dir())
    real = fold / "real.h5ad"
    if damage == "missing":
        real.unlink()
    else:
        real.write_bytes(real.read_bytes()[:500])
    result = run_benchmark(replace(some, models=("ControlMean", "Additive")), out=tmp_path, progress=False)
    assert result.errors.empty
    assert fold.name in caplog.text
    assert Fold.read(fold).held_out


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(_store.FileLock, "acquire", refuse)
    with locked_folder(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()
    assert "has no locks" in caplog.text
