"""One unit of work: train a model once and score it for every QC threshold that its training does not know."""

from __future__ import annotations

import logging
import random
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from scvi import settings as scvi_settings
from threadpoolctl import threadpool_limits

from scvi_cradle import metrics
from scvi_cradle._constants import COLUMNS
from scvi_cradle._labels import LabelRule
from scvi_cradle.baselines._base import UnseenCombinationError
from scvi_cradle.benchmark._cell_scores import effect_score, generated_scores
from scvi_cradle.benchmark._folds import Fold, call_doublets, make_fold
from scvi_cradle.benchmark._models import REGISTRY, fit, model_settings
from scvi_cradle.benchmark._screen import Screen, first_line, read_screen
from scvi_cradle.benchmark._settings import BenchmarkSettings, Cell
from scvi_cradle.benchmark._store import read_json, write_json

N_PARTICLES = {"recommended": 1_000, "paper": 2_500}
N_IWELBO, N_SCORED = 100, 1_500
N_GENERATED = 100
N_BOOTSTRAP = 200
NO_COUNTS = "It generates log-normalised values, and this is asked of counts"
REPORT_COLUMNS = (
    *("value", "ci_low", "ci_high", "baseline", "ceiling", "scaled", "scaled_low", "scaled_high"),
    *("n_perturbations", "note"),
)

Rows = list[dict[str, Any]]


def load_screen(settings: BenchmarkSettings) -> Screen:
    """Read the data once in every process, and again when the file has changed."""
    state = settings.data.stat() if settings.data.is_file() else None
    keys = tuple((name, getattr(settings, name)) for name in ("layer", "batch_key", "artifact_key", "split_key"))
    return _read_once(
        settings.data, settings.perturbation_key, settings.rule, keys, state and (state.st_mtime_ns, state.st_size)
    )


@lru_cache(maxsize=1)
def _read_once(
    data: Path, perturbation_key: str, rule: LabelRule, keys: tuple[tuple[str, str | None], ...], _state: Any
) -> Screen:
    return read_screen(data, perturbation_key, rule=rule, **dict(keys))


@lru_cache(maxsize=8)
def load_fold(path: Path) -> Fold:
    """Read a fold once in every process."""
    return Fold.read(path)


def find_doublets(settings: BenchmarkSettings, path: Path) -> str | None:
    """Call doublets and keep the calls; return an error in one sentence, or ``None``."""

    def work(notes: list[str]) -> None:
        calls = call_doublets(load_screen(settings))
        write_json(path, {"doublets": np.flatnonzero(calls).tolist(), "notes": notes})

    return _attempt(work)[0]


def build_fold(settings: BenchmarkSettings, cell: Cell, path: Path, doublets: Path | None) -> str | None:
    """Make a fold and keep it; return an error in one sentence, or ``None``."""

    def work(notes: list[str]) -> None:
        screen = load_screen(settings)
        called = None
        if doublets is not None:
            content = read_json(doublets)
            notes += content["notes"]
            called = np.zeros(screen.adata.n_obs, dtype=bool)
            called[content["doublets"]] = True
        fold = make_fold(screen, cell, called)
        replace(fold, notes=(*fold.notes, *notes)).write(path)

    return _attempt(work)[0]


def run_cells(settings: BenchmarkSettings, cells: Sequence[tuple[Cell, Path, Path]]) -> list[str | None]:
    """Train one model and write the result of every cell.

    Parameters
    ----------
    settings
        What is run.
    cells
        Cells that share their training, each with the folder of its fold and the file of its result.

    Returns
    -------
    For every cell its error in one sentence, or ``None``.
    """
    first, fold_path, _ = cells[0]
    start = time.process_time()
    fitted: list[Any] = []
    error, notes = _attempt(lambda _: fitted.append(_fit(settings, first, load_fold(fold_path))))
    seconds = time.process_time() - start
    errors = []
    for cell, path, result in cells:
        content: dict[str, Any] = {"cell": cell._asdict(), "error": error, "notes": notes}
        if error is None:
            content["error"], more = _attempt(partial(_score_into, content, settings, cell, path, fitted[0]))
            content["notes"] = sorted({*notes, *more, *load_fold(path).notes})
            content.setdefault("rows", []).append(_row("cpu_seconds", seconds, note="training; shared by thresholds"))
        write_json(result, content)
        errors.append(content["error"])
    return errors


def _score_into(
    content: dict[str, Any], settings: BenchmarkSettings, cell: Cell, path: Path, fitted: Any, _notes: list[str]
) -> None:
    content |= score(settings, cell, load_fold(path), fitted)


def _fit(settings: BenchmarkSettings, cell: Cell, fold: Fold) -> Any:
    screen, row = load_screen(settings), REGISTRY[cell.model]
    scvi_settings.seed = cell.seed
    arguments = model_settings(row, settings.preset, settings.max_steps)
    return fit(row, fold.prepared(screen), arguments, screen.reading | {"batch_key": screen.batch_key})


def score(settings: BenchmarkSettings, cell: Cell, fold: Fold, fitted: Any) -> dict[str, Any]:
    """Score a model, or a baseline, on the held-out cells of a fold.

    Returns
    -------
    ``split``: what is held out; ``rows``: metrics with the columns of a report; ``without``: what the model has no
    answer to, with the reason.
    """
    screen = load_screen(settings)

    @cache
    def generated() -> AnnData:
        return _ask(fitted.get_generated_expression, fold.held_out, n_samples=N_GENERATED, seed=cell.seed)

    parts: dict[str, Callable[[], Rows]] = {
        "effects": lambda: _effects(settings, cell, fold, screen, fitted),
        "generated cells": lambda: _generated(cell, fold, screen, generated),
        "QC pass rates": lambda: _pass_rates(cell, fold, screen, generated),
        "bound": lambda: _bound(cell, fold, screen, fitted),
        "training": lambda: _training(fitted),
    }
    rows, without = [], {}
    for name, part in parts.items():
        try:
            rows += part()
        except NoAnswer as error:
            without[name] = first_line(error)
    return {"split": fold.name, "rows": rows, "without": without}


class NoAnswer(Exception):
    """What is asked for is beyond a model or a baseline, which says why."""


def _ask(method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return method(*arguments, **options)
    except (NotImplementedError, UnseenCombinationError) as error:  # of a model, of a baseline
        raise NoAnswer(first_line(error)) from error


def _effects(settings: BenchmarkSettings, cell: Cell, fold: Fold, screen: Screen, fitted: Any) -> Rows:
    options: dict[str, Any] = {}
    if not REGISTRY[cell.model].is_baseline:
        kind = settings.preset if settings.preset in N_PARTICLES else "paper"
        options = {"n_particles": N_PARTICLES[kind], "seed": cell.seed}
    predicted = _ask(fitted.get_average_treatment_effects, fold.held_out, **options)
    table = metrics.evaluate_effects(
        fold.real,
        predicted,
        train=fold.train,
        ceiling=fold.ceiling,
        sep=screen.rule.sep,
        n_bootstrap=N_BOOTSTRAP,
        seed=cell.seed,
    )
    rows = [{"metric": str(metric), **row} for metric, row in table.to_dict(orient="index").items()]
    return [*rows, effect_score(fold.held_out_cells(screen, passed=True), predicted, fold.train)]


def _generated(cell: Cell, fold: Fold, screen: Screen, generated: Callable[[], AnnData]) -> Rows:
    passed, on_log = fold.held_out_cells(screen, passed=True), not _has_counts(cell)
    return generated_scores(passed, generated(), fold.held_out, fold.generated, cell.seed, on_log=on_log)


def _has_counts(cell: Cell) -> bool:
    return REGISTRY[cell.model].expression == "counts"


def _pass_rates(cell: Cell, fold: Fold, screen: Screen, generated: Callable[[], AnnData]) -> Rows:
    if not fold.records:
        return []
    if not _has_counts(cell):
        raise NoAnswer(NO_COUNTS)
    measured, rows = fold.held_out_cells(screen, passed=False), []
    for width, record in fold.records.items():
        table = metrics.qc_pass_rate(measured, generated(), thresholds=record, artifact_key=COLUMNS.ARTIFACT)
        every = table.loc["all"]
        if width != "own":
            rows.append(_row(f"qc_pass_rate_{width}_mads", every["generated"], baseline=every["real"]))
            continue
        note = "baseline: measured held-out cells; ceiling: those among them that passed (doublets have no threshold)"
        rates = {"baseline": every["real"], "ceiling": every["real_passed"], "note": note}
        rows.append(_row("qc_pass_rate", every["generated"], **rates))
        for name in table.columns[table.columns.str.startswith("generated_")]:
            criterion = name.removeprefix("generated_")
            rows.append(_row(f"qc_pass_rate_{criterion}", every[name], baseline=every[f"real_{criterion}"]))
    return rows


def _bound(cell: Cell, fold: Fold, screen: Screen, fitted: Any) -> Rows:
    if not hasattr(fitted, "get_iwelbo"):
        return []
    if not _has_counts(cell):
        raise NoAnswer(NO_COUNTS)
    cells = fold.held_out_cells(screen, passed=True)
    chosen = np.sort(np.random.default_rng(0).permutation(cells.n_obs)[:N_SCORED])
    scvi_settings.seed = cell.seed
    bound = _ask(fitted.get_iwelbo, cells[chosen].copy(), n_particles=N_IWELBO, batch_size=500)
    mean, sem, n = metrics.iwelbo_summary(bound).loc["all"]
    note = f"{n:g} held-out cells that passed, {N_IWELBO} particles, global terms not scored; interval over cells"
    return [_row("iwelbo", mean, ci_low=mean - 1.96 * sem, ci_high=mean + 1.96 * sem, note=note)]


def _training(fitted: Any) -> Rows:
    diagnostics = getattr(fitted, "diagnostics_", None) or {}
    rows = [_row(name, value) for name, value in diagnostics.items()]
    if hasattr(fitted, "trainer"):
        rows.append(_row("training_steps", fitted.trainer.global_step))
    return rows


def _row(metric: str, value: float, **more: Any) -> dict[str, Any]:
    """Return a row of a report for a metric without an interval of its own."""
    return {"metric": metric} | dict.fromkeys(REPORT_COLUMNS[:-1]) | {"value": float(value), "note": ""} | more


# ---- a process of its own, or the user's ----------------------------------------------------------------------------


def _attempt(work: Callable[[list[str]], None]) -> tuple[str | None, list[str]]:
    """Run on one thread, and return the error in one sentence (or ``None``) with the package's warnings.

    The work is given the list that warnings are collected in.
    """
    with _one_thread(), _state_kept(), _collected_warnings() as notes:
        try:
            work(notes)
        except Exception as error:  # noqa: BLE001 - one cell that fails must not stop the others
            logging.getLogger("scvi_cradle.benchmark").debug("%s", traceback.format_exc())
            return f"{type(error).__name__}: {first_line(error)}.", list(notes)
    return None, list(notes)


@contextmanager
def _one_thread() -> Iterator[None]:
    import numba  # takes a second

    threads, compiled = torch.get_num_threads(), numba.get_num_threads()
    with threadpool_limits(limits=1):
        numba.set_num_threads(1)  # sets the threads of torch, too
        torch.set_num_threads(1)
        try:
            yield
        finally:
            numba.set_num_threads(compiled)
            torch.set_num_threads(threads)


@contextmanager
def _state_kept() -> Iterator[None]:
    """Put the seeds of the process and the levels of other packages' logs back."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "scvi")]
    levels = [logger.level for logger in loggers]
    seed, states = scvi_settings.seed, (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        scvi_settings.seed = seed
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Collect the package's warnings in place of showing them; those of other packages are not shown."""
    notes: list[str] = []
    package = Path(__file__).parents[1]

    def note(message: Warning | str, category: type[Warning], filename: str, *_: object) -> None:
        text = str(message)
        if (
            issubclass(category, UserWarning | RuntimeWarning)
            and package in Path(filename).parents
            and text not in notes
        ):
            notes.append(text)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = note  # type: ignore[assignment]
        yield notes


def rows_of(content: dict[str, Any]) -> Rows:
    """Return the rows of a result, each with its cell."""
    return [content["cell"] | {"split": content["split"]} | row for row in content["rows"]]
