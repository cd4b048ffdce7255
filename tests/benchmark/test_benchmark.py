"""Whole runs: numbers are what they claim, nothing is done twice, and failures are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scvi
from scipy import stats

import scvi_cradle as cradle
from scvi_cradle.baselines._base import UnseenCombinationError
from scvi_cradle.benchmark import BenchmarkResult, BenchmarkSettings, _cell, run_benchmark
from scvi_cradle.benchmark.__main__ import main
from scvi_cradle.benchmark._cell import load_screen
from scvi_cradle.benchmark._cell_scores import SIGNS
from scvi_cradle.benchmark._folds import Fold
from scvi_cradle.benchmark._models import MODELS, REGISTRY, Row
from scvi_cradle.benchmark._settings import Cell
from scvi_cradle.benchmark._tables import summarize
from scvi_cradle.benchmark._tasks import places

CHOSEN = ("CradleVAE", "CradleVAE (w/o CF)", "SAMSVAE", "SAMSVAE (passed cells)", "SVAEPlus", "Additive", "ControlMean")
FILES = {"cells.csv", "summary.csv", "errors.csv", "tables.md", "settings.json", "effects.png", "cells", "folds"}


@pytest.fixture(scope="module")
def wanted(settings: BenchmarkSettings) -> BenchmarkSettings:
    return replace(settings, models=CHOSEN, seeds=(0, 1))


@pytest.fixture(scope="module")
def finished(
    wanted: BenchmarkSettings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, BenchmarkResult, list[Cell]]]:
    """A run of two seeds and two thresholds, and the cells whose models were trained for it."""
    out = tmp_path_factory.mktemp("run") / "out"
    trained: list[Cell] = []
    original = _cell._fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cell, "N_IWELBO", 5)  # for speed
        patch.setattr(_cell, "_fit", lambda s, cell, fold: trained.append(cell) or original(s, cell, fold))
        yield out, run_benchmark(wanted, out=out, progress=False), trained


def test_all_files_are_written(finished: tuple[Path, BenchmarkResult, list[Cell]]) -> None:
    out, result, _ = finished
    assert {path.name for path in out.iterdir()} - {".lock"} == FILES
    assert len(list((out / "cells").iterdir())) == 2 * 2 * len(CHOSEN)
    assert result.errors.empty
    back = pd.read_csv(out / "cells.csv")
    assert list(back.columns) == list(result.cells.columns)
    np.testing.assert_allclose(back["value"], result.cells["value"], rtol=1e-5)
    assert not back.duplicated(["experiment", "fraction", "threshold", "model", "seed", "metric"]).any()
    assert (out / "tables.md").read_text() == result.text


def test_a_model_that_does_not_know_the_flags_is_trained_once(
    finished: tuple[Path, BenchmarkResult, list[Cell]],
) -> None:
    _, result, trained = finished
    n = pd.Series([cell.model for cell in trained]).value_counts()
    assert n["SAMSVAE"] == n["SVAEPlus"] == 2  # seeds
    assert n["CradleVAE"] == n["SAMSVAE (passed cells)"] == n["Additive"] == 4  # seeds x thresholds
    assert set(result.cells.loc[result.cells["model"] == "SAMSVAE", "threshold"]) == {4, 5}


def value(result: BenchmarkResult, model: str, metric: str, threshold: float, seed: int) -> pd.Series:
    cells = result.cells
    keys = (cells["model"] == model) & (cells["metric"] == metric)
    (row,) = cells[keys & (cells["threshold"] == threshold) & (cells["seed"] == seed)].itertuples()
    return row


def test_scores_of_a_baseline_are_those_of_the_public_functions(
    finished: tuple[Path, BenchmarkResult, list[Cell]], wanted: BenchmarkSettings
) -> None:
    out, result, _ = finished
    screen = load_screen(wanted)
    cell = Cell("effects", None, 5.0, "Additive", 1)
    fold = Fold.read(places(wanted, out)[cell].fold)
    train = screen.adata[(fold.split == "train") & ~fold.failed].copy()
    baseline = cradle.baselines.Additive().fit(train, "perturbation", control="NT", sep="_")
    predicted = baseline.get_average_treatment_effects(fold.held_out)
    row = value(result, "Additive", "pearson_delta", 5.0, 1)
    assert row.value == pytest.approx(cradle.metrics.pearson_delta(fold.real, predicted))
    assert value(result, "Additive", "ate_r2", 5.0, 1).value == pytest.approx(
        cradle.metrics.ate_r2(fold.real, predicted)
    )
    assert row.ceiling == pytest.approx(fold.ceiling.loc["pearson_delta", "full_size"])
    assert row.scaled == pytest.approx((row.value - row.baseline) / (row.ceiling - row.baseline))
    generated = baseline.get_generated_expression(fold.held_out, n_samples=100, seed=1)
    real = screen.adata[(fold.split == "test") & np.isin(screen.labels, fold.held_out)].copy()
    rates = cradle.metrics.qc_pass_rate(real, generated, thresholds=fold.records["own"]).loc["all"]
    rate = value(result, "Additive", "qc_pass_rate", 5.0, 1)
    assert (rate.value, rate.baseline) == pytest.approx((rates["generated"], rates["real"]))
    by_criterion = value(result, "Additive", "qc_pass_rate_pct_mt", 5.0, 1)
    assert by_criterion.value == pytest.approx(rates["generated_pct_mt"])
    assert value(result, "Additive", "qc_pass_rate_5_mads", 5.0, 1).value == rate.value
    assert value(result, "ControlMean", "pearson_delta", 5.0, 1).value == 0


def test_scores_of_a_model_are_those_of_a_model_trained_by_hand(
    finished: tuple[Path, BenchmarkResult, list[Cell]], wanted: BenchmarkSettings
) -> None:
    out, result, _ = finished
    screen = load_screen(wanted)
    fold = Fold.read(places(wanted, out)[Cell("effects", None, 4.0, "CradleVAE", 1)].fold)
    rows = np.isin(fold.split, ("train", "val"))
    cells = screen.adata[rows].copy()
    cells.obs["split"], cells.obs["artifact"] = fold.split[rows], fold.failed[rows]
    labels = {"perturbation_key": "perturbation", "control": "NT", "sep": "_"}
    cradle.CradleVAE.setup_anndata(cells, **labels, artifact_key="artifact")
    before = scvi.settings.seed
    scvi.settings.seed = 1
    model = cradle.CradleVAE(cells)
    model.train(max_steps=10, split_key="split", enable_progress_bar=False, check_val_every_n_epoch=10_000)
    scvi.settings.seed = before
    predicted = model.get_average_treatment_effects(fold.held_out, n_particles=1_000, seed=1)
    row = value(result, "CradleVAE", "ate_pearson", 4.0, 1)
    assert row.value == pytest.approx(cradle.metrics.ate_pearson(fold.real, predicted), abs=1e-6)


def test_means_and_intervals_over_seeds(finished: tuple[Path, BenchmarkResult, list[Cell]]) -> None:
    _, result, _ = finished
    values = [value(result, "SAMSVAE", "ate_pearson", 4.0, seed).value for seed in (0, 1)]
    summary = result.summary.set_index(["model", "metric", "threshold"]).loc[("SAMSVAE", "ate_pearson", 4.0)]
    low, high = stats.t.interval(0.95, 1, np.mean(values), stats.sem(values))
    assert summary[["mean", "ci_low", "ci_high"]].tolist() == pytest.approx([np.mean(values), low, high])
    one = summarize(result.cells[result.cells["seed"] == 0]).set_index(["model", "metric", "threshold"])
    row = value(result, "SAMSVAE", "ate_pearson", 4.0, 0)
    assert one.loc[("SAMSVAE", "ate_pearson", 4.0), ["ci_low", "ci_high"]].tolist() == [row.ci_low, row.ci_high]
    table = result.text.split("### Effects of held-out perturbations")[1].splitlines()
    columns, line = (next(x for x in table if x.startswith(start)).split(" | ") for start in ("| model", "| SAMSVAE |"))
    assert line[columns.index("ate_pearson")] == f"{np.mean(values):.2f} [{low:.2f}, {high:.2f}]"


def test_scaled_of_a_summary_is_that_of_the_means(finished: tuple[Path, BenchmarkResult, list[Cell]]) -> None:
    _, result, _ = finished
    of_report = result.summary[result.summary["n_perturbations"].notna()]
    room = of_report["ceiling"] - of_report["baseline"]
    better = np.where(of_report["metric"].map(SIGNS).fillna(1) > 0, room > 0, room < 0)
    ratio = (of_report["mean"] - of_report["baseline"]) / room
    np.testing.assert_allclose(of_report["scaled"], ratio.where(better))
    assert result.summary.loc[result.summary["n_perturbations"].isna(), "scaled"].isna().all()
    row = result.cells[(result.cells["model"] == "Additive") & (result.cells["metric"] == "ate_pearson")].iloc[:1]
    seeds = [
        row.assign(seed=seed, value=0.5, baseline=0.1, ceiling=top, scaled=scaled)
        for seed, top, scaled in ((0, 0.9, 0.5), (1, 0.05, np.nan))
    ]
    (both,) = summarize(pd.concat(seeds))["scaled"]
    assert both == pytest.approx(0.4 / 0.375)  # a mean over the defined seed would say 0.5
    (none,) = summarize(pd.concat([seeds[1], seeds[1].assign(seed=2)]))["scaled"]
    assert np.isnan(none)
    energy = seeds[0].assign(metric="energy_distance", value=3.0, baseline=5.0, ceiling=1.0)
    assert summarize(energy)["scaled"].tolist() == [0.5]
    unknown = [seeds[0], seeds[0].assign(seed=1, baseline=np.nan)]
    assert summarize(pd.concat(unknown))["scaled"].isna().all()


def test_tables_hold_what_the_papers_hold(finished: tuple[Path, BenchmarkResult, list[Cell]]) -> None:
    _, result, _ = finished
    sections = dict(part.split("\n", 1) for part in result.text.split("### ")[1:])
    lines = {title: body.strip().splitlines() for title, body in sections.items()}
    effects = lines["Effects of held-out perturbations (CRADLE-VAE, table 2)"]
    assert all(name in effects[0] for name in ("ate_pearson", "ate_r2", "jaccard_top_50", "qc_pass_rate"))
    assert effects[-2].startswith("| mean training effect |")
    assert effects[-1].startswith("| repeat of the held-out measurement (as many cells) |")
    rates = lines["QC pass rate, overall and by criterion (CRADLE-VAE, table 2)"]
    assert all(f"qc_pass_rate_{c}" in rates[0] for c in ("total_counts", "n_genes", "pct_mt", "pct_ribo", "pct_hb"))
    assert any(x.startswith("| measured cells |") for x in rates)
    ablations = [x for x in lines["Ablations (CRADLE-VAE, table 3)"] if x.startswith("| CradleVAE")]
    assert [x.split(" | ")[0] for x in ablations] == [
        *("| CradleVAE, 4 MADs", "| CradleVAE (w/o CF), 4 MADs", "| CradleVAE, 5 MADs", "| CradleVAE (w/o CF), 5 MADs"),
    ]
    assert "jaccard_top_20" in lines["The same, 20 genes (CRADLE-VAE, table 4)"][0]
    fifth = lines["Training at one threshold, pass rates at others (CRADLE-VAE, table 5)"]
    assert all(f"qc_pass_rate_{k}_mads" in fifth[0] for k in (3, 4, 5))
    assert any(x.startswith("| SAMSVAE (passed cells), 5 MADs") for x in fifth)
    bounds = lines["Likelihood and effects (SAMS-VAE, table 1)"]
    assert "iwelbo" in bounds[0]
    assert not any(x.startswith("| Additive") for x in bounds)
    assert (
        "- SVAEPlus (effects, generated cells, QC pass rates, bound): A model that encodes every combination"
        in result.text
    )


def test_a_second_run_does_nothing_twice(
    finished: tuple[Path, BenchmarkResult, list[Cell]], wanted: BenchmarkSettings
) -> None:
    out, result, trained = finished
    done = len(trained)
    again = run_benchmark(wanted, out=out, progress=False)
    assert len(trained) == done
    pd.testing.assert_frame_equal(again.cells, result.cells)
    some = replace(wanted, models=("Additive", "ShrunkenEffects"), thresholds=(5.0,), seeds=(1,))
    smaller = run_benchmark(some, out=out, progress=False)
    assert [cell.model for cell in trained[done:]] == ["ShrunkenEffects"]
    assert set(smaller.cells["model"]) == {"Additive", "ShrunkenEffects"}
    run_benchmark(replace(some, sep=None), out=out, progress=False)  # other labels: another cell
    assert [cell.model for cell in trained[done + 1 :]] == ["Additive", "ShrunkenEffects"]


def test_a_failing_cell_stops_no_other(
    wanted: BenchmarkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(REGISTRY, "Odd", Row("CradleVAE", "artifact", {"cf_weight": -1.0}))
    words = [str(wanted.data), "--perturbation-key", "gene", "--control", "NT", "--sep", "_", "--thresholds", "5"]
    words += ["--models", "Odd", "Additive", "--max-steps", "5", "--out", str(tmp_path)]
    assert main(words) == 1
    said = capsys.readouterr()
    sentence = "ValueError: `cf_weight` must be a non-negative number; received -1.0."
    assert f"- 1 cells (Odd): {sentence}" in said.out
    assert "1 cells failed" in said.err
    errors = pd.read_csv(tmp_path / "errors.csv")
    assert errors[["model", "error"]].to_numpy().tolist() == [["Odd", sentence]]
    assert set(pd.read_csv(tmp_path / "cells.csv")["model"]) == {"Additive"}
    monkeypatch.setitem(REGISTRY, "Odd", Row("ControlMean", "passed"))
    assert main(words) == 0  # what failed is tried again


def test_a_split_that_fails_is_an_error_of_its_cells(wanted: BenchmarkSettings, tmp_path: Path) -> None:
    narrow = replace(wanted, models=("Additive", "ControlMean"), thresholds=(0.01, 5.0), seeds=(0,))
    result = run_benchmark(narrow, out=tmp_path, progress=False)
    assert set(result.errors["threshold"]) == {0.01}
    assert set(result.cells["threshold"]) == {5.0}
    assert all("quality control" in error for error in result.errors["error"])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"data": Path("nowhere.h5ad")}, "not there"),
        ({"data": Path(__file__)}, "cannot be read"),
        ({"perturbation_key": "genes"}, "did you mean 'gene'"),
        ({"control": ("control",)}, "'NT' looks like one"),
        ({"layer": "log"}, "raw counts"),
        ({"layer": "c"}, "`layer`"),
        ({"batch_key": "lanes"}, "did you mean 'lane'"),
        ({"split_key": "lane"}, "'train', 'val', 'test', 'unused'"),
        ({"artifact_key": "lane", "thresholds": None}, "True/False"),
        ({"experiment": "doubles", "sep": "+"}, "none among 0 combinations"),
    ],
)
def test_user_errors(settings: BenchmarkSettings, tmp_path: Path, changes: dict[str, object], part: str) -> None:
    with pytest.raises((FileNotFoundError, KeyError, ValueError), match=part):
        run_benchmark(replace(settings, **changes), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_says_one_sentence(
    settings: BenchmarkSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(settings.data), "--perturbation-key", "genes", "--control", "NT", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: `perturbation_key` must be a key of `adata.obs`; received 'genes'")
    with pytest.raises(SystemExit):
        main([str(settings.data), "--out", str(tmp_path)])  # keys are never guessed


def test_shares_of_combinations(settings: BenchmarkSettings, tmp_path: Path) -> None:
    some = replace(settings, experiment="ood", fractions=(0.0, 1.0), models=("SAMSVAE", "CPAVAE"), thresholds=(5.0,))
    result = run_benchmark(some, out=tmp_path, progress=False)
    cells = result.cells.set_index(["metric", "model", "fraction"])["value"]
    assert cells["relative_iwelbo", "SAMSVAE", 0.0] == 0
    assert cells["relative_iwelbo", "CPAVAE", 1.0] == pytest.approx(
        cells["iwelbo", "CPAVAE", 1.0] - cells["iwelbo", "SAMSVAE", 0.0]
    )
    assert "| model | 0% | 100% |" in result.text
    assert (tmp_path / "ood.png").is_file()


def test_predictions_of_the_covariate_model_are_those_of_passed_cells(settings: BenchmarkSettings) -> None:
    screen = load_screen(settings)
    fold = _fold_of(settings)
    cells = fold.prepared(screen)
    reading = screen.reading | {"batch_key": None}
    model = _cell.fit(MODELS["SAMSVAE (flag as covariate)"], cells, ({}, {"max_steps": 2}), reading)
    failed = cells.obs.loc[cells.obs["split"] == "train", "artifact"]
    assert model.libraries_["artifact"].sum() == failed.sum() > 0
    totals = np.asarray(cells.X.sum(axis=1)).ravel()[(cells.obs["split"] == "train") & ~cells.obs["artifact"]]
    generated = model.get_generated_expression(n_samples=50, seed=0)
    assert set(generated.obs["library_size"]) <= set(totals.astype(np.float32))


def _fold_of(settings: BenchmarkSettings) -> Fold:
    screen = load_screen(settings)
    return _cell.make_fold(screen, Cell("effects", None, 4.0, "", 0), np.zeros(screen.adata.n_obs, dtype=bool))


def test_what_is_beyond_a_method_is_no_error(settings: BenchmarkSettings) -> None:
    def refuse(kind: type[Exception]) -> SimpleNamespace:
        def method(*_: object, **__: object) -> None:
            msg = "An unseen combination is beyond it."
            raise kind(msg)

        return SimpleNamespace(get_average_treatment_effects=method, get_generated_expression=method)

    cell = Cell("effects", None, 4.0, "Additive", 0)
    scored = _cell.score(settings, cell, _fold_of(settings), refuse(UnseenCombinationError))
    sentence = "An unseen combination is beyond it"
    assert scored["without"] == dict.fromkeys(("effects", "generated cells", "QC pass rates"), sentence)
    model = cell._replace(model="SVAEPlus")
    assert _cell.score(settings, model, _fold_of(settings), refuse(NotImplementedError))["without"] == scored["without"]
    for asked in (cell, model):  # any other error is one
        with pytest.raises(ValueError, match="beyond it"):
            _cell.score(settings, asked, _fold_of(settings), refuse(ValueError))


def test_a_baseline_says_what_is_beyond_it(settings: BenchmarkSettings) -> None:
    screen, fold = load_screen(settings), _fold_of(settings)
    train = fold.split == "train"
    seen = {t for label in set(screen.labels[train]) if "_" in label for t in label.split("_")}
    pair, single = next((pair, t) for pair in fold.held_out for t in pair.split("_") if t in seen)
    cells = screen.adata[train & (screen.labels != single)].copy()
    baseline = cradle.baselines.Additive().fit(cells, "perturbation", control="NT", sep="_")
    with pytest.raises(UnseenCombinationError, match="in combinations only"):
        baseline.get_average_treatment_effects([pair])
