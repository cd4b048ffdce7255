"""The demo from prepared data to the folder with its results."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvi_cradle import pl
from scvi_cradle.benchmark import _tables as tables
from scvi_cradle.benchmark._prepare import LOGGER, SPLIT, DemoSettings, Prepared, prepare
from scvi_cradle.benchmark._scores import CEILING, KNOWN, MODEL, Scores, quality_table, score
from scvi_cradle.model import CradleVAE

N_GENERATED = 200
FEW_GENES = 2_000
N_DRAWN = 6
DRAWN_METHODS = (MODEL, "ShrunkenEffects", "Additive")
OFF, ON = "artifact off", "artifact on"
ROW_NAMES = {
    "pearson_delta": "Pearson of effects, mean over perturbations",
    "pearson_delta_perturbed_mean": "the same, less the mean training effect",
    "perturbation_discrimination": "finds its own perturbation (chance 0.5)",
    "ate_pearson": "Pearson of all effects together",
    "ate_r2": "R2 of all effects together",
    "jaccard_top_50": "overlap of the 50 strongest genes (Jaccard)",
    KNOWN: "Pearson with the effects known in simulation",
}
NOTES = (
    f"{MODEL} and the baselines saw the training cells only. Measured effects: held-out cells that passed quality control "
    "against controls that no method was trained on.",
    f"`{CEILING}`: a repeat of the held-out measurement (as many cells), extrapolated from repeats of halves and quarters "
    "with controls of their own. Methods learn from more cells than were held out, so that a score above it is possible.",
)
KNOWN_NOTE = f"`{KNOWN}`: against the effects that the simulation put in; `{CEILING}` there: the measured effects."


def run_demo(settings: DemoSettings | None = None, *, out: str | Path = "demo_output") -> pd.DataFrame:
    """Label, hold out, train, generate and compare, and write all of it into a folder.

    Parameters
    ----------
    settings
        What to run on. Default: a simulated screen.
    out
        Folder for tables, figures, the model and the generated cells; files of an earlier run are replaced.

    Returns
    -------
    Table of metrics x methods, as in ``table.csv``.

    Raises
    ------
    FileNotFoundError, KeyError, ValueError, TypeError
        For input that cannot be used, in one sentence.
    """
    settings = settings or DemoSettings()
    with quiet():
        prepared = prepare(settings)
        return run_prepared(prepared, settings, Path(out))


def run_prepared(prepared: Prepared, settings: DemoSettings, out: Path) -> pd.DataFrame:
    """Train, generate, compare and write; parameters as of :func:`run_demo`."""
    out.mkdir(parents=True, exist_ok=True)
    with _threads(prepared.adata.n_vars):
        model = _train(prepared, settings)
        generated = _generate(model, prepared, settings)
        scores = score(model, prepared, settings)
    quality = quality_table(prepared, _held_out(generated, prepared), settings)
    LOGGER.info("[6/6] Write tables, figures, the model and the generated cells")
    _write_tables(scores, quality, prepared, out)
    _draw(model, prepared, generated, scores, out)
    model.save(out / "model", overwrite=True)
    generated[OFF].write_h5ad(out / "generated.h5ad")
    _show(scores, quality, prepared, out)
    return scores.table


def _train(prepared: Prepared, settings: DemoSettings) -> CradleVAE:
    LOGGER.info("[4/6] Train %s on all training cells, those that failed included", MODEL)
    model = CradleVAE(prepared.adata)
    start = time.perf_counter()
    model.train(max_steps=settings.max_steps, split_key=SPLIT)
    LOGGER.info("      trained for %.0f s", time.perf_counter() - start)
    diagnostics = model.diagnostics_ or {}
    wording = {
        "kl_basal": "%.1f nats about each cell in its basal state",
        "variance_ratio": "generated cells vary %.2f times as much as real ones (1 is best)",
    }
    said = [text % diagnostics[name] for name, text in wording.items() if name in diagnostics]
    LOGGER.info("      diagnostics: %s", "; ".join(said) or "none")
    return model


def _generate(model: CradleVAE, prepared: Prepared, settings: DemoSettings) -> dict[str, AnnData]:
    labels = [prepared.control_name, *prepared.held_out]
    what = "never seen together" if prepared.scheme == "combinations" else "seen in other cells"
    names = ", ".join(prepared.held_out[:6]) + (", ..." if len(prepared.held_out) > 6 else "")
    LOGGER.info("[5/6] Generate %d cells each of controls and %s (%s)", N_GENERATED, names, what)
    generated = {OFF: model.get_generated_expression(labels, n_samples=N_GENERATED, seed=settings.seed)}
    if (prepared.failed & prepared.rows("train")).any():
        generated[ON] = model.get_generated_expression(labels, n_samples=N_GENERATED, artifact=True, seed=settings.seed)
    return generated


def _held_out(generated: dict[str, AnnData], prepared: Prepared) -> dict[str, AnnData]:
    return {
        f"generated, {name}": cells[(cells.obs["perturbation"] != prepared.control_name).to_numpy()]
        for name, cells in generated.items()
    }


def _write_tables(scores: Scores, quality: pd.DataFrame | None, prepared: Prepared, out: Path) -> None:
    scores.table.to_csv(out / "table.csv", float_format="%.4f")
    long = pd.concat(scores.tables, names=["method"])
    long.to_csv(out / "evaluation.csv", float_format="%.4f")
    prepared.report.to_csv(out / "qc_report.csv", float_format="%.4g")
    lines = ["# Predicted effects of held-out perturbations", "", _held_out_sentence(prepared), ""]
    lines += [markdown(_readable(scores.table)), "", *(f"- {note}" for note in _notes(scores)), ""]
    if quality is not None:
        quality.to_csv(out / "qc_pass_rate.csv", float_format="%.4f")
        lines += ["# Share of cells within the QC thresholds", "", markdown(quality), ""]
        lines += ["- Doublets have no threshold. Best is not 1 but the rate of clean measured cells.", ""]
    (out / "table.md").write_text("\n".join(lines), encoding="utf-8")


def _notes(scores: Scores) -> tuple[str, ...]:
    return (*NOTES, KNOWN_NOTE) if KNOWN in scores.table.index else NOTES


def _held_out_sentence(prepared: Prepared) -> str:
    what = (
        "combinations, none of their cells used in training"
        if prepared.scheme == "combinations"
        else "perturbations, a quarter of their cells held out"
    )
    names = ", ".join(prepared.held_out)
    return f"Held out: {len(prepared.held_out)} {what}: {names}."


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    return table.rename(index={name: f"{name}: {text}" for name, text in ROW_NAMES.items()})


def markdown(table: pd.DataFrame) -> str:
    """Return a Markdown table with two decimals."""
    return tables.markdown(table, lambda value: f"{round(value, 2) + 0.0:.2f}")


def _draw(model: CradleVAE, prepared: Prepared, generated: dict[str, AnnData], scores: Scores, out: Path) -> None:
    if prepared.record is not None:
        pl.qc_thresholds(prepared.adata, save=out / "qc_thresholds.png", show=False)
        real = prepared.adata[prepared.rows("test", controls=False)]
        cells = {name.replace(", ", "\n"): c for name, c in _held_out(generated, prepared).items()}
        pl.qc_violin(real, cells, save=out / "qc_violin.png", show=False)
    signal = np.linalg.norm(np.asarray(scores.real.X), axis=1) / np.linalg.norm(
        np.asarray(scores.real.layers["sem"]), axis=1
    )
    drawn = [prepared.held_out[i] for i in np.sort(np.argsort(-signal, kind="stable")[:N_DRAWN])]
    pl.treatment_effects(scores.real, scores.predicted, perturbations=drawn, save=out / "effects.png", show=False)
    pl.training_history(model.history, save=out / "losses.png", show=False)
    tables = {name: scores.tables[name] for name in DRAWN_METHODS if name in scores.tables}
    pl.evaluation(
        tables, metrics=list(scores.table.index.drop(KNOWN, errors="ignore")), save=out / "evaluation.png", show=False
    )


def _show(scores: Scores, quality: pd.DataFrame | None, prepared: Prepared, out: Path) -> None:
    table = scores.table.round(2).rename_axis(None) + 0.0  # no "-0.00"
    LOGGER.info("\n%s\n\n%s\n", _held_out_sentence(prepared), table.to_string(float_format="%.2f", na_rep="-"))
    for note in _notes(scores):
        LOGGER.info("* %s", note)
    if quality is not None:
        text = quality.rename_axis(None).to_string(float_format="%.2f", na_rep="-")
        LOGGER.info("\nShare of cells within the QC thresholds (doublets have none):\n\n%s", text)
    names = {
        "table.md, table.csv": "the tables above; evaluation.csv has intervals, qc_pass_rate.csv the shares",
        "qc_report.csv": "how often the cells of each perturbation fail",
        "qc_thresholds.png": "QC criteria with their thresholds",
        "qc_violin.png": "generated beside real cells",
        "effects.png": "predicted against measured effects",
        "evaluation.png": "scores between baseline and ceiling",
        "losses.png": "the training",
        "model/": f"the trained model: CradleVAE.load({str(out / 'model')!r}, adata=False) generates anywhere",
        "generated.h5ad": "generated artifact-free cells",
    }
    LOGGER.info("\nResults are in %s:", out)
    for name, what in names.items():
        if (out / name.split(",")[0].rstrip("/")).exists():
            LOGGER.info("  %-20s %s", name, what)


@contextmanager
def _threads(n_genes: int) -> Iterator[None]:
    """Use one thread for small matrices: more cost more than they save, and far more where others use the cores."""
    threads = torch.get_num_threads()
    if n_genes <= FEW_GENES:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def quiet() -> Iterator[None]:
    """Turn the package's warnings into notes, leave out advice of other packages, and restore torch's threads.

    Scrublet runs kernels of numba, which set the number of threads of OpenMP and so that of torch.
    """
    threads = torch.get_num_threads()
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(logging.WARNING)
    said: set[str] = set()

    def note(message: Warning | str, category: type[Warning], filename: str, *_: object) -> None:
        text = str(message)
        if issubclass(category, UserWarning | RuntimeWarning) and text not in said and _is_ours(filename):
            said.add(text)
            LOGGER.info("      note: %s", text)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = note  # type: ignore[assignment]
        try:
            yield
        finally:
            lightning.setLevel(level)
            torch.set_num_threads(threads)


def _is_ours(filename: str) -> bool:
    return Path(__file__).parents[1] in Path(filename).parents
