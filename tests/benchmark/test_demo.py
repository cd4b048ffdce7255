"""The demo: all files are written, scores are what they claim, and user errors are one sentence."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from scvi_cradle import CradleVAE, datasets
from scvi_cradle.benchmark import DemoSettings, run_demo
from scvi_cradle.benchmark._prepare import prepare
from scvi_cradle.benchmark._run import markdown, quiet
from scvi_cradle.benchmark.demo import main, parse
from scvi_cradle.metrics import average_treatment_effects, pearson_delta, replicate_ceiling

TINY = {"n_cells": 500, "n_genes": 80, "n_perturbations": 4, "n_combinations": 4}
FILES = {
    *("table.csv", "table.md", "evaluation.csv", "qc_report.csv", "qc_pass_rate.csv", "model", "generated.h5ad"),
    *("qc_thresholds.png", "qc_violin.png", "effects.png", "losses.png", "evaluation.png"),
}
METHODS = [
    "CradleVAE",
    "MultivariateShrinkage",
    "ShrunkenEffects",
    "Additive",
    "PerturbedMean",
    "ControlMean",
    "replicate",
]


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small screen without combinations, mitochondrial genes or a column called "perturbation"."""
    adata = datasets.simulate_perturbseq(n_cells=300, n_genes=80, n_perturbations=4, n_combinations=0, seed=1)
    adata = adata[:, ~adata.var_names.str.match("MT-|RP[SL]|HB")].copy()
    adata.obs["gene"] = adata.obs["perturbation"].astype(str).replace("control", "NT")
    del adata.obs["perturbation"], adata.uns, adata.obsm, adata.obs["split"], adata.layers["clean_counts"]
    adata.layers["log"] = np.log1p(adata.X)
    adata.obs["bad"] = adata.obs["true_artifact"]
    path = tmp_path_factory.mktemp("data") / "screen.h5ad"
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    out = tmp_path_factory.mktemp("demo") / "out"
    threads = torch.get_num_threads()
    table = run_demo(DemoSettings(simulation=TINY, max_steps=30), out=out)
    assert torch.get_num_threads() == threads
    return out, table


def test_all_files_are_written(finished: tuple[Path, pd.DataFrame]) -> None:
    out, _ = finished
    assert {path.name for path in out.iterdir()} == FILES
    assert plt.get_fignums() == []


def test_the_table_has_all_methods(finished: tuple[Path, pd.DataFrame]) -> None:
    out, table = finished
    assert list(table.columns) == METHODS
    pd.testing.assert_frame_equal(pd.read_csv(out / "table.csv", index_col=0), table, check_names=False, atol=1e-4)
    assert np.isfinite(table.to_numpy()).all()
    assert table.loc["pearson_delta", "ControlMean"] == 0
    assert table.loc["perturbation_discrimination", "PerturbedMean"] == 0.5
    text = (out / "table.md").read_text()
    assert all(name in text for name in [*METHODS, *table.index])
    long = pd.read_csv(out / "evaluation.csv", index_col=[0, 1])
    np.testing.assert_allclose(long.loc["CradleVAE", "value"][table.index[0]], table.iloc[0, 0], atol=1e-4)


def test_model_and_cells_can_be_read(finished: tuple[Path, pd.DataFrame]) -> None:
    out, _ = finished
    generated = anndata.read_h5ad(out / "generated.h5ad")
    labels = list(dict.fromkeys(generated.obs["perturbation"].astype(str)))
    assert labels[0] == "control"
    assert all("+" in label for label in labels[1:])
    assert set(generated.obs["seen"][generated.obs["perturbation"] != "control"]) == {"unseen combination"}
    model = CradleVAE.load(str(out / "model"), adata=False)
    again = model.get_generated_expression(labels, n_samples=200, seed=0)
    assert abs(again.X - generated.X).sum() == 0


def test_nothing_of_the_held_out_combinations_is_used() -> None:
    settings = DemoSettings(simulation=TINY)
    with quiet():
        prepared = prepare(settings)
    train, test = prepared.passed("train"), prepared.passed("test")
    assert not set(train.obs["perturbation"]) & set(prepared.held_out)
    assert set(test.obs["perturbation"]) == {"control", *prepared.held_out}
    assert not set(train.obs_names) & set(test.obs_names)
    assert prepared.adata.uns["qc_label"]["reference"] == "mask"
    assert prepared.adata.uns["qc_label"]["n_cells"].sum() == (prepared.adata.obs["split"] == "train").sum()


def test_additive_scores_are_those_of_the_public_functions(finished: tuple[Path, pd.DataFrame]) -> None:
    settings = DemoSettings(simulation=TINY)
    with quiet():
        prepared = prepare(settings)
    real = average_treatment_effects(prepared.passed("test"), "perturbation")[prepared.held_out].to_df()
    raw = average_treatment_effects(prepared.passed("train"), "perturbation").to_df()
    added = pd.DataFrame({pair: raw.loc[pair.split("+")].sum() for pair in prepared.held_out}).T
    value = finished[1].loc["pearson_delta", "Additive"]
    assert value == pytest.approx(pearson_delta(real, added))


def test_the_ceiling_is_of_the_cells_that_are_scored(finished: tuple[Path, pd.DataFrame]) -> None:
    with quiet():
        prepared = prepare(DemoSettings(simulation=TINY))
    train = average_treatment_effects(prepared.passed("train"), "perturbation")
    ceiling = replicate_ceiling(prepared.passed("test"), "perturbation", n_repeats=10, seed=0, train=train)
    table = finished[1]
    rows = table.index.intersection(ceiling.index)
    np.testing.assert_allclose(table.loc[rows, "replicate"], ceiling.loc[rows, "full_size"])


def test_command_on_a_file(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPLBACKEND", raising=False)
    arguments = ["--data", str(tiny_file), "--perturbation-key", "gene", "--control", "NT", "--artifact-key", "bad"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--max-steps", "5", "--sep", ""]) == 0
    said = capsys.readouterr().out
    assert "0 of them combinations" in said
    assert "CradleVAE" in said
    assert str(tmp_path / "out") in said
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == FILES - {"qc_thresholds.png", "qc_violin.png", "qc_pass_rate.csv"}  # the user's flags have none


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        pytest.param(["--data", "nowhere.h5ad", "--perturbation-key", "gene"], "not there", id="no file"),
        pytest.param(["--data", __file__, "--perturbation-key", "gene"], "cannot be read", id="not an h5ad"),
        pytest.param(["--data", "FILE"], "`--perturbation-key`", id="no key"),
        pytest.param(["--data", "FILE", "--perturbation-key", "genes"], "did you mean 'gene'", id="unknown key"),
        pytest.param(["--data", "FILE", "--perturbation-key", "gene"], "'NT' looks like one", id="no control"),
        pytest.param(
            ["--data", "FILE", "--perturbation-key", "gene", "--control", "NT", "--layer", "log"],
            "raw counts",
            id="not counts",
        ),
        pytest.param(
            ["--data", "FILE", "--perturbation-key", "gene", "--control", "NT", "--layer", "c"],
            "`layer`",
            id="no layer",
        ),
        pytest.param(
            ["--data", "FILE", "--perturbation-key", "gene", "--control", "NT", "--artifact-key", "guide_identity"],
            "True/False",
            id="not flags",
        ),
        pytest.param(
            ["--data", "FILE", "--perturbation-key", "gene", "--control", "NT", "--batch-key", "lane"],
            "`batch_key`",
            id="no batch",
        ),
        pytest.param(["--n-mads", "-1"], "`n_mads`", id="negative width"),
    ],
)
def test_user_errors(
    arguments: list[str], part: str, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_file) if word == "FILE" else word for word in arguments]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert part in lines[0]
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_out_must_be_a_folder(tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    words = ["--data", str(tiny_file), "--perturbation-key", "gene", "--control", "NT", "--artifact-key", "bad"]
    assert main([*words, "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: `out` must be a folder, or a place where one can be made")


def test_arguments() -> None:
    options = parse(["--control", "NT", "non-targeting", "--sep", ""])
    assert options.control == ["NT", "non-targeting"]
    assert options.sep == ""
    with pytest.raises(SystemExit) as stopped:
        parse(["--unknown"])
    assert stopped.value.code == 2


def test_markdown() -> None:
    table = pd.DataFrame({"a": [0.123], "b": [1.0]}, index=pd.Index(["x"], name="n"))
    assert markdown(table) == "| n | a | b |\n| --- | ---: | ---: |\n| x | 0.12 | 1.00 |"
