"""Splits, flags and fingerprints: what may be seen in training, and what belongs together on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from scvi_cradle import baselines, metrics, pp, presets
from scvi_cradle._labels import LabelRule
from scvi_cradle.benchmark import BenchmarkSettings, _cell, _cell_scores, _folds, _tasks, run_benchmark
from scvi_cradle.benchmark._cell import load_screen
from scvi_cradle.benchmark._folds import Fold, call_doublets, make_fold, make_split
from scvi_cradle.benchmark._models import REGISTRY, model_settings
from scvi_cradle.benchmark._screen import Screen
from scvi_cradle.benchmark._settings import Cell, check_settings
from scvi_cradle.benchmark._store import (
    file_digest,
    fingerprint,
    new_folder,
    remove_leftovers,
    source_digest,
    write_json,
)
from scvi_cradle.benchmark._tasks import places

SINGLES = ["A", "B", "C", "D", "E"]
PAIRS = ["A+B", "A+C", "A+D", "B+C", "B+D", "C+D", "C+E", "D+E"]
ORPHAN = "A+Z"  # Z never occurs alone


@pytest.fixture(scope="module")
def labelled() -> Screen:
    labels = np.repeat(["control", *SINGLES, *PAIRS, ORPHAN], 20)
    obs = pd.DataFrame({"perturbation": pd.Categorical(labels)}, index=[str(i) for i in range(len(labels))])
    return Screen(AnnData(np.ones((len(labels), 3), dtype=np.float32), obs=obs), LabelRule.create("control"))


def parts_of(screen: Screen, experiment: str, fraction: float | None, seed: int = 0) -> tuple[pd.DataFrame, list[str]]:
    """Cells by label and part, and the labels to predict."""
    _, split, held_out = make_split(screen, Cell(experiment, fraction, 5.0, "", seed))
    return pd.crosstab(screen.labels, split).reindex(columns=["train", "val", "test", "unused"], fill_value=0), held_out


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_unseen_combinations(labelled: Screen, fraction: float) -> None:
    cells, held_out = parts_of(labelled, "ood", fraction)
    assert len(held_out) == 2  # a quarter of 8
    assert (cells.loc[held_out, "test"] == 20).all()
    others = [pair for pair in PAIRS if pair not in held_out]
    trained = [pair for pair in others if cells.loc[pair, "train"] > 0]
    assert len(trained) == int(fraction * 6)
    assert (cells.loc[trained, ["train", "val"]].sum(axis=1) == 20).all()
    assert (cells.loc[[*(set(others) - set(trained)), ORPHAN], "unused"] == 20).all()
    assert (cells.loc[SINGLES, ["train", "val"]].sum(axis=1) == 20).all()
    assert (cells.loc["control", ["train", "val", "test"]] > 0).all()


def test_shares_of_combinations_are_nested_and_predict_the_same(labelled: Screen) -> None:
    tables = [parts_of(labelled, "ood", fraction, seed=3) for fraction in (0.25, 0.5, 0.75)]
    trained = [{pair for pair in PAIRS if cells.loc[pair, "train"] > 0} for cells, _ in tables]
    assert trained[0] < trained[1] < trained[2]
    assert tables[0][1] == tables[1][1] == tables[2][1]
    assert parts_of(labelled, "ood", 0.5, seed=4)[1] != tables[0][1]


def test_shares_of_cells(labelled: Screen) -> None:
    full, held_out = parts_of(labelled, "efficiency", 1.0)
    half, same = parts_of(labelled, "efficiency", 0.5)
    assert held_out == same == PAIRS
    assert (full["test"] == half["test"]).all()
    assert (full.loc[PAIRS, "test"] == 4).all()
    assert full.loc[PAIRS, "unused"].sum() == 0
    kept = half.loc[PAIRS, ["train", "val"]].to_numpy().sum()
    assert kept == full.loc[PAIRS, ["train", "val"]].to_numpy().sum() // 2
    assert (full.loc[SINGLES] == half.loc[SINGLES]).all(axis=None)
    assert parts_of(labelled, "efficiency", 0.0)[0].loc[PAIRS, ["train", "val"]].to_numpy().sum() == 0


def test_doubles(labelled: Screen) -> None:
    cells, held_out = parts_of(labelled, "doubles", None)
    assert held_out == PAIRS
    assert (cells.loc[PAIRS, "test"] == 20).all()
    assert cells.loc[ORPHAN, "unused"] == 20


@pytest.mark.parametrize("experiment", ["ood", "efficiency", "doubles"])
def test_an_experiment_says_what_it_lacks(labelled: Screen, experiment: str) -> None:
    kept = np.isin(labelled.labels, ["control", "A", ORPHAN])
    screen = Screen(labelled.adata[kept].copy(), labelled.rule)
    with pytest.raises(ValueError, match="combinations whose treatments also occur alone; received none among 1"):
        make_split(screen, Cell(experiment, 0.5, 5.0, "", 0))


def test_effects_without_combinations_hold_out_cells(labelled: Screen) -> None:
    kept = np.isin(labelled.labels, ["control", *SINGLES])
    screen = Screen(labelled.adata[kept].copy(), labelled.rule)
    name, split, candidates = make_split(screen, Cell("effects", None, 5.0, "", 1))
    expected = screen.adata.copy()
    pp.split_perturbations(expected, "perturbation", scheme="cells", seed=1)
    assert (name, candidates) == ("cells", None)
    np.testing.assert_array_equal(split, expected.obs["split"].astype(str))


@pytest.fixture(scope="module")
def fold(settings: BenchmarkSettings) -> tuple[Screen, Fold]:
    screen = load_screen(settings)
    return screen, make_fold(screen, Cell("effects", None, 4.0, "", 0), call_doublets(screen))


def test_thresholds_come_from_training_cells(fold: tuple[Screen, Fold]) -> None:
    screen, found = fold
    cells = screen.adata.copy()
    pp.qc_label(cells, n_mads=4.0, reference=found.split == "train")
    np.testing.assert_array_equal(found.failed, cells.obs["artifact"])
    assert set(found.records) == {"own", "3", "4", "5"}
    assert found.records["own"]["n_mads"] == 4
    assert 0 < found.failed.mean() < 0.5


def test_measured_effects_share_no_cell_with_training(fold: tuple[Screen, Fold]) -> None:
    screen, found = fold
    train = found.prepared(screen)
    assert not set(train.obs["perturbation"]) & set(found.held_out)
    assert set(train.obs["split"]) == {"train", "val"}
    assert found.control_split == "val"
    chosen = (found.split == "test") | ((found.split == "val") & (screen.labels == "NT"))
    real = metrics.average_treatment_effects(
        screen.adata[chosen & ~found.failed], "perturbation", control="NT", sep="_"
    )
    np.testing.assert_allclose(found.real.X, real[found.held_out].X)


def test_the_ceiling_is_of_the_cells_that_are_scored(fold: tuple[Screen, Fold]) -> None:
    screen, found = fold
    labels = screen.labels
    truth = ((found.split == "test") & np.isin(labels, found.held_out)) | (
        (found.split == found.control_split) & (labels == "NT")
    )
    truth &= ~found.failed
    ceiling = metrics.replicate_ceiling(screen.adata[truth], **screen.reading, n_repeats=10, seed=0, train=found.train)
    pd.testing.assert_frame_equal(found.ceiling, ceiling)
    counts = pd.Series(labels[truth]).value_counts()
    assert found.real.obs["n_cells"].tolist() == counts[found.held_out].tolist()
    assert found.generated["n_cells"].tolist() == np.minimum(counts[found.held_out] // 2, 100).tolist()


def test_a_fold_comes_back_from_disk(fold: tuple[Screen, Fold], tmp_path: Path) -> None:
    _, made = fold
    replace(made, notes=("said",)).write(tmp_path / "fold")
    back = Fold.read(tmp_path / "fold")
    np.testing.assert_array_equal(back.split, made.split)
    np.testing.assert_array_equal(back.failed, made.failed)
    assert (back.name, back.held_out, back.notes) == (made.name, made.held_out, ("said",))
    np.testing.assert_array_equal(back.real.X, made.real.X)
    pd.testing.assert_frame_equal(back.ceiling, made.ceiling)
    assert back.records["own"]["thresholds"].keys() == made.records["own"]["thresholds"].keys()


def test_given_flags_and_split(settings: BenchmarkSettings) -> None:
    given = replace(settings, artifact_key="bad", thresholds=None, split_key="part", batch_key="lane")
    screen = load_screen(given)
    made = make_fold(screen, Cell("effects", None, None, "", 0), None)
    assert screen.failed is not None
    assert made.name == "given split"
    assert set(screen.adata.obs["batch"]) == {"one", "two"}
    np.testing.assert_array_equal(made.failed, screen.failed)
    np.testing.assert_array_equal(made.split, screen.split)
    assert made.records == {}


def test_thresholds_behind_given_flags_are_used(settings: BenchmarkSettings, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(settings.data)
    pp.qc_label(cells, n_mads=4, batch_key="lane", key_added="flag")
    cells.write_h5ad(tmp_path / "flagged.h5ad")
    given = replace(settings, data=tmp_path / "flagged.h5ad", artifact_key="flag", thresholds=None, batch_key="lane")
    screen = load_screen(given)
    made = make_fold(screen, Cell("effects", None, None, "", 0), None)
    assert list(made.records) == ["own"]
    rates = metrics.qc_pass_rate(screen.adata[made.failed], screen.adata, thresholds=made.records["own"])
    cells.obs["perturbation"] = cells.obs["gene"]
    expected = metrics.qc_pass_rate(cells, cells)
    assert rates.loc["all", "generated"] == pytest.approx(expected.loc["all", "generated"])
    assert load_screen(replace(given, artifact_key="bad")).record is None  # thresholds of other flags


# ---- what is compared, and with which settings ----------------------------------------------------------------------


def test_every_baseline_is_compared() -> None:
    assert set(baselines.__all__) <= set(REGISTRY)
    assert all(REGISTRY[name].failed == "passed" for name in baselines.__all__)


def test_published_settings() -> None:
    architecture, training = model_settings(REGISTRY["CradleVAE"], "replogle", None)
    assert architecture == {"preset": "paper", "n_latent": 200, "mask_prior_prob": 0.001, "cf_weight": 0.05}
    assert training == {"lr": 1e-3}
    architecture, training = model_settings(REGISTRY["ConditionalVAE"], "replogle", None)
    assert (architecture, training) == ({"preset": "paper", "n_latent": 100}, {"max_steps": 150_000})
    assert model_settings(REGISTRY["SAMSVAE"], "norman", 7)[1] == {"max_steps": 7}
    assert model_settings(REGISTRY["CradleVAE (w/o CF)"], "norman", None)[0]["cf_weight"] == 0
    assert model_settings(REGISTRY["CradleVAE"], "recommended", None) == ({"preset": "recommended"}, {})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"experiment": "odd"}, "did you mean 'ood'"),
        ({"models": ("CradleVEA",)}, "did you mean 'CradleVAE'"),
        ({"preset": "normann"}, "did you mean 'norman'"),
        ({"artifact_key": "bad"}, "leave one out"),
        ({"fractions": (0.5,)}, "leave them out"),
        ({"fractions": (1.5,), "experiment": "ood"}, "between 0 and 1"),
        ({"split_key": "part", "experiment": "doubles"}, "split of its own"),
        ({"seeds": (0, 0)}, "each once"),
        ({"seeds": ()}, "at least one"),
        ({"seeds": (-1,)}, "non-negative"),
        ({"thresholds": (0.0,)}, "positive"),
        ({"max_steps": 0}, "positive"),
    ],
)
def test_settings_are_checked(settings: BenchmarkSettings, changes: dict[str, object], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        check_settings(replace(settings, **changes))


def test_jobs_or_a_cluster(settings: BenchmarkSettings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave one out"):
        run_benchmark(settings, out=tmp_path, jobs=2, scheduler="tcp://nowhere:1")


# ---- fingerprints and files -----------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_what_a_result_depends_on(settings: BenchmarkSettings, tmp_path: Path) -> None:
    settings = replace(settings, models=("CradleVAE", "Additive"))
    before = places(settings, tmp_path)
    cell = Cell("effects", None, 4.0, "CradleVAE", 0)
    baseline = cell._replace(model="Additive")
    assert len({p.result for p in before.values()}) == len(before) == 4
    assert places(replace(settings, seeds=(0, 1), thresholds=(4.0,)), tmp_path)[cell] == before[cell]
    assert places(replace(settings, thresholds=(4, 5)), tmp_path) == before  # whole numbers are the same numbers
    for changes in ({"sep": "+"}, {"batch_key": "lane"}, {"layer": "log"}, {"split_key": "part"}):
        after = places(replace(settings, **changes), tmp_path)
        assert after[cell].result != before[cell].result
        assert after[cell].fold != before[cell].fold
        assert after[cell].doublets != before[cell].doublets
    steps = places(replace(settings, max_steps=11), tmp_path)
    assert steps[cell].result != before[cell].result
    assert steps[cell].fold == before[cell].fold
    assert steps[baseline] == before[baseline]  # it has no steps
    assert places(replace(settings, preset="paper"), tmp_path)[cell].result != before[cell].result
    copy = tmp_path / "copy.h5ad"
    copy.write_bytes(settings.data.read_bytes())
    assert places(replace(settings, data=copy), tmp_path)[cell] == before[cell]
    copy.write_bytes(settings.data.read_bytes() + b" ")
    assert places(replace(settings, data=copy), tmp_path)[cell].fold != before[cell].fold


@pytest.mark.parametrize(
    ("place", "name", "fold_too"),
    [
        (_cell, "N_PARTICLES", False),
        (_cell, "N_GENERATED", False),
        (_cell, "N_IWELBO", False),
        (_cell, "N_SCORED", False),
        (_cell_scores, "MAX_CELLS", True),
        (_folds, "N_REPEATS", True),
    ],
)
def test_a_fingerprint_changes_with_constants(
    settings: BenchmarkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, fold_too: bool
) -> None:
    cell = Cell("effects", None, 4.0, "CradleVAE", 0)
    before = places(settings, tmp_path)[cell]
    old = getattr(place, name)
    monkeypatch.setattr(place, name, old | {"paper": 7} if isinstance(old, dict) else old + 1)
    after = places(settings, tmp_path)[cell]
    assert after.result != before.result
    assert (after.fold != before.fold) == fold_too


@pytest.mark.parametrize("part", [0, 1])
def test_a_fingerprint_changes_with_values_of_a_preset(
    settings: BenchmarkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    known = presets.MODELS["CradleVAE"]["recommended"]
    changed = [dict(settings) for settings in known]
    changed[part][("n_hidden", "lr")[part]] /= 2
    models = presets.MODELS | {"CradleVAE": presets.MODELS["CradleVAE"] | {"recommended": tuple(changed)}}
    before = places(settings, tmp_path)
    monkeypatch.setattr(presets, "MODELS", models)
    after = places(settings, tmp_path)
    different = {cell.model for cell in before if after[cell] != before[cell]}
    assert different == {"CradleVAE", "CradleVAE (w/o CF)", "CradleVAE (w/o causal)"}
    assert {place.fold for place in after.values()} == {place.fold for place in before.values()}


def test_a_fingerprint_changes_with_source_and_versions(
    settings: BenchmarkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(places(settings, tmp_path).values())
    with monkeypatch.context() as patch:
        patch.setattr(_tasks, "source_digest", lambda: "other")
        assert not before & set(places(settings, tmp_path).values())
    for package in ("scvi-cradle", "scvi-tools", "torch", "numpy"):
        with monkeypatch.context() as patch:
            found = _tasks.version
            patch.setattr(_tasks, "version", lambda name, p=package, f=found: "0.0" if name == p else f(name))
            assert not before & set(places(settings, tmp_path).values()), package
    assert len(source_digest()) == 64
    assert set(places(settings, tmp_path).values()) == before


def test_fingerprints() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})


def test_files_appear_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "cells" / "a.json", {"x": np.float64(1.5)})
    assert json.loads((tmp_path / "cells" / "a.json").read_text()) == {"x": 1.5}
    with pytest.raises(TypeError):
        write_json(tmp_path / "cells" / "a.json", {"x": {1, 2}})
    assert json.loads((tmp_path / "cells" / "a.json").read_text()) == {"x": 1.5}
    for content in ("first", "second"):
        with new_folder(tmp_path / "folds" / "f") as folder:
            (folder / "x").write_text(content)
            assert not (tmp_path / "folds" / "f").exists() or content == "second"
    assert (tmp_path / "folds" / "f" / "x").read_text() == "first"  # another process was faster
    (tmp_path / "cells" / ".left.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert [p.name for p in (tmp_path / "cells").iterdir()] == ["a.json"]
    assert [p.name for p in (tmp_path / "folds").iterdir()] == ["f"]
    assert file_digest(tmp_path / "folds" / "f" / "x") != file_digest(tmp_path / "cells" / "a.json")
