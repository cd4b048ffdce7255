"""The experiment with all combinations held out: its table, and a model on log-normalised values among the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scvi

import scvi_cradle as cradle
from scvi_cradle.benchmark import BenchmarkResult, BenchmarkSettings, _cell, run_benchmark
from scvi_cradle.benchmark._cell import load_screen
from scvi_cradle.benchmark._folds import Fold
from scvi_cradle.benchmark._models import REGISTRY, Row
from scvi_cradle.benchmark._tables import DOUBLES

GAUSSIAN = Row("SAMSVAE", "all", {"likelihood": "gaussian"}, expression="log")


@pytest.fixture(scope="module")
def doubles(settings: BenchmarkSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BenchmarkResult]:
    """All combinations held out; one of the models is trained on log-normalised values."""
    out = tmp_path_factory.mktemp("doubles")
    chosen = ("SAMSVAE", "Gaussian", "SVAEPlus", "SVAEPlus (additive)", "Additive", "ControlMean", "ElasticNet")
    some = replace(settings, experiment="doubles", models=chosen, thresholds=(5.0,), seeds=(1,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, "Gaussian", GAUSSIAN)
        patch.setattr(_cell, "N_IWELBO", 5)
        return out, run_benchmark(some, out=out, progress=False)


def value(result: BenchmarkResult, model: str, metric: str) -> pd.Series:
    cells = result.cells
    (row,) = cells[(cells["model"] == model) & (cells["metric"] == metric)].itertuples()
    return row


def test_a_model_on_log_normalised_values_is_scored_on_the_scale_of_the_others(
    doubles: tuple[Path, BenchmarkResult], settings: BenchmarkSettings
) -> None:
    out, result = doubles
    assert result.errors.empty
    screen = load_screen(settings)
    (folder,) = {path for path in (out / "folds").iterdir() if path.is_dir()}
    fold = Fold.read(folder)
    cells = fold.prepared(screen)
    counts = cells.X.toarray()
    cells.layers["values"] = np.log2(1 + 1e4 * counts / counts.sum(1, keepdims=True))
    keys = {"perturbation_key": "perturbation", "control": "NT", "sep": "_", "layer": "values"}
    cradle.SAMSVAE.setup_anndata(cells, **keys)
    before = scvi.settings.seed
    scvi.settings.seed = 1
    model = cradle.SAMSVAE(cells, likelihood="gaussian")
    model.train(max_steps=10, split_key="split", enable_progress_bar=False, check_val_every_n_epoch=10_000)
    scvi.settings.seed = before
    predicted = model.get_average_treatment_effects(fold.held_out, n_particles=1_000, seed=1)
    row = value(result, "Gaussian", "pearson_delta")
    assert row.value == pytest.approx(cradle.metrics.pearson_delta(fold.real, predicted), abs=1e-3)
    made = model.get_generated_expression(fold.held_out, n_samples=100, seed=1)
    level = counts[(cells.obs["perturbation"] == "NT").to_numpy()]
    level = np.log2(1 + 1e4 * level / level.sum(1, keepdims=True)).mean()
    assert abs(made.X.mean() - level) < 0.2 * level  # not normalised a second time
    errors = [value(result, name, "relative_rmse_of_mean").value for name in ("Gaussian", "Additive")]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)
    found = set(result.cells.loc[result.cells["model"] == "Gaussian", "metric"])
    assert not {m for m in found if m.startswith(("qc_pass_rate", "iwelbo", "relative_iwelbo"))}
    assert "- Gaussian (QC pass rates, bound): It generates log-normalised values" in result.text


def test_the_table_of_doubles(doubles: tuple[Path, BenchmarkResult]) -> None:
    _, result = doubles
    body = result.text.split("### All combinations held out (PerturbedVAE, tables 2 to 4)")[1].split("###")[0]
    lines = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("|")]
    header, rows = lines[0], {line[0]: line[1:] for line in lines[2:]}
    assert header == ["model", *DOUBLES]
    assert list(rows) == [
        *("SAMSVAE", "SVAEPlus (additive)", "Additive", "ControlMean", "ElasticNet", "Gaussian"),
        *("mean training effect", "repeat of the held-out measurement (as many cells)"),
    ]
    for name in ("SAMSVAE", "SVAEPlus (additive)", "Gaussian", "Additive"):
        for metric, text in zip(DOUBLES, rows[name], strict=True):
            row = value(result, name, metric)
            assert text == f"{row.value:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]"
    assert rows["mean training effect"][header.index("relative_rmse") - 1] != "-"
    assert "- SVAEPlus (effects" in result.text  # no answer
    assert (result.text.count("| published_relative_rmse |"), result.text.count("energy_distance")) == (1, 1)
