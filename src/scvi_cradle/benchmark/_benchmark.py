"""The benchmark from settings to a folder with tables and figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from scvi_cradle._validation import check_positive
from scvi_cradle.benchmark._cell import load_screen
from scvi_cradle.benchmark._figures import draw
from scvi_cradle.benchmark._folds import check_split
from scvi_cradle.benchmark._settings import BenchmarkSettings, Cell, check_settings
from scvi_cradle.benchmark._store import locked_folder, remove_leftovers, write_json, write_text
from scvi_cradle.benchmark._tables import errors_table, report, summarize, tidy_table
from scvi_cradle.benchmark._tasks import run_missing


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Tables of a benchmark.

    Parameters
    ----------
    cells
        One row per cell of the matrix and metric.
    summary
        Means and 95 % intervals over seeds.
    errors
        Cells that failed, each with its error in one sentence.
    text
        The papers' tables in Markdown.
    """

    cells: pd.DataFrame
    summary: pd.DataFrame
    errors: pd.DataFrame
    text: str


def run_benchmark(
    settings: BenchmarkSettings,
    *,
    out: str | Path,
    jobs: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
) -> BenchmarkResult:
    """Compare models and baselines on a data set, and write the papers' tables and figures.

    Every cell of the matrix (experiment, split, QC threshold, model, seed) is kept in a file when it is finished. A run
    that was killed goes on where it was: at most the cells in work, one model per process, are done again. A changed
    setting or file is a new cell; cells that failed are tried again.

    Parameters
    ----------
    settings
        What is run.
    out
        Folder for the results, used by one run at a time (a lock sees to it). Several experiments and settings may
        share it: tables hold those of the last run.
    jobs
        Number of processes on this machine, each of one thread. A script that asks for several must protect its entry
        by ``if __name__ == "__main__":``.
    scheduler
        Address of a Dask scheduler, instead of ``jobs``. Its workers must see ``settings.data`` and ``out`` under the
        same paths.
    progress
        Show a progress bar.

    Returns
    -------
    The tables, as in the files: ``cells.csv``, ``summary.csv``, ``errors.csv``, ``tables.md``, ``settings.json`` and a
    figure named after the experiment.

    Raises
    ------
    FileNotFoundError, KeyError, ValueError
        For input or a folder that cannot be used, in one sentence, before anything is computed.
    """
    check_settings(settings)
    check_positive("jobs", jobs, integer=True)
    if scheduler is not None and jobs != 1:
        msg = f"Cells run in processes of this machine or on a cluster; received jobs={jobs!r} and scheduler={scheduler!r}: leave one out."
        raise ValueError(msg)
    screen = load_screen(settings)
    for cell in {(c.seed, c.fraction): c for c in settings.cells()}.values():
        check_split(screen, cell)
    folder = Path(out)
    with locked_folder(folder):
        remove_leftovers(folder)
        results = run_missing(settings, folder, jobs=jobs, scheduler=scheduler, progress=progress)
        return _write(settings, results, folder)


def _write(settings: BenchmarkSettings, results: dict[Cell, dict[str, Any]], folder: Path) -> BenchmarkResult:
    cells = tidy_table(results)
    summary, errors = summarize(cells), errors_table(results)
    text = report(settings, summary, results)
    for name, table in (("cells", cells), ("summary", summary), ("errors", errors)):
        write_text(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
    write_text(folder / "tables.md", text)
    write_json(folder / "settings.json", asdict(settings) | {"data": str(settings.data)})
    draw(summary, folder)
    return BenchmarkResult(cells=cells, summary=summary, errors=errors, text=text)
