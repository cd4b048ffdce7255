"""From settings to tasks, and from tasks to results: what is there is not done again."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scvi_cradle.benchmark._cell import build_fold, find_doublets, run_cells
from scvi_cradle.benchmark._models import REGISTRY, model_settings
from scvi_cradle.benchmark._screen import first_line
from scvi_cradle.benchmark._settings import BenchmarkSettings, Cell
from scvi_cradle.benchmark._store import CELLS, FOLDS, file_digest, fingerprint, read_json, write_json

FORMAT = 1  # raise it when results of an earlier version must not be used any more
KILLED = "A worker process was killed, perhaps for lack of memory: run again, with fewer jobs if need be; what is finished is kept."


@dataclass(frozen=True)
class Place:
    """Where a cell, its fold and the doublet calls are kept.

    Parameters
    ----------
    result, fold
        File of the result, folder of the fold.
    doublets
        File of the doublet calls; ``None`` with flags of the user.
    """

    result: Path
    fold: Path
    doublets: Path | None


def places(settings: BenchmarkSettings, out: Path) -> dict[Cell, Place]:
    """Return where every cell of the matrix is kept; names hold a fingerprint of the data and of all settings in use."""
    try:
        release = version("scvi-cradle")
    except PackageNotFoundError:
        release = "0+unknown"
    reading = asdict(settings)
    for name in ("data", "models", "seeds", "thresholds", "fractions", "preset", "max_steps", "experiment"):
        del reading[name]
    common = {"format": FORMAT, "release": release, "data": file_digest(settings.data), "reading": reading}
    found = {}
    for cell in settings.cells():
        of_fold = fingerprint(common | {"cell": cell._replace(model="")._asdict()})
        model = REGISTRY[cell.model]
        arguments = model_settings(model, settings.preset, settings.max_steps)
        whole = {"fold": of_fold, "model": [model.kind, model.failed, arguments], "name": cell.model}
        whole["preset"] = settings.preset
        doublets = None if cell.threshold is None else out / FOLDS / f"doublets-{fingerprint(common)}.json"
        name = "-".join([_slug(cell), fingerprint(whole)])
        found[cell] = Place(out / CELLS / f"{name}.json", out / FOLDS / of_fold, doublets)
    return found


def _slug(cell: Cell) -> str:
    parts = [cell.experiment, cell.model, f"seed{cell.seed}"]
    parts += [] if cell.fraction is None else [f"share{cell.fraction:g}"]
    parts += [] if cell.threshold is None else [f"mads{cell.threshold:g}"]
    return "-".join("".join(c if c.isalnum() or c == "." else "_" for c in part).strip("_") for part in parts)


def is_done(place: Place) -> bool:
    """Whether there is a result that is no error."""
    content = read_json(place.result)
    return content is not None and content["error"] is None


def run_missing(
    settings: BenchmarkSettings, out: Path, *, jobs: int = 1, scheduler: str | None = None, progress: bool = True
) -> dict[Cell, dict[str, Any]]:
    """Compute the cells that have no result yet, and return the results of all.

    Parameters
    ----------
    settings
        What is run.
    out
        Folder of the results.
    jobs
        Number of processes.
    scheduler
        Address of a Dask scheduler whose workers see ``out`` and the data under the same paths; instead of ``jobs``.
    progress
        Show a progress bar.
    """
    found = places(settings, out)
    missing = {cell: place for cell, place in found.items() if not is_done(place)}
    with tqdm(total=len(found), initial=len(found) - len(missing), unit="cell", disable=not progress) as bar:
        if missing:
            with _executor(jobs, scheduler) as executor:
                _run(executor, settings, missing, bar)
    return {cell: read_json(place.result) for cell, place in found.items()}


def _run(executor: Executor | None, settings: BenchmarkSettings, missing: dict[Cell, Place], bar: Any) -> None:
    """Run three rounds of tasks: doublets, folds, cells. A task of which something failed before is not begun."""
    bar.set_postfix_str("doublets")
    doublets = {p.doublets for p in missing.values() if p.doublets is not None and not p.doublets.is_file()}
    failed: dict[Path, str] = {}
    for path, error in _each(executor, {path: (find_doublets, (settings, path)) for path in doublets}):
        if error is not None:
            failed[path] = error
    bar.set_postfix_str("splits")
    tasks: dict[Any, Any] = {}
    for cell, place in missing.items():
        if place.doublets in failed:
            failed[place.fold] = failed[place.doublets]
        elif not place.fold.is_dir():
            tasks[place.fold] = (build_fold, (settings, cell, place.fold, place.doublets))
    failed |= {path: error for path, error in _each(executor, tasks) if error is not None}
    groups: dict[Any, list[tuple[Cell, Path, Path]]] = {}
    for cell, place in missing.items():
        if place.fold in failed:
            write_json(place.result, {"cell": cell._asdict(), "error": failed[place.fold], "notes": []})
            bar.update()
        else:
            key = cell if REGISTRY[cell.model].knows_flags else cell._replace(threshold=None)
            groups.setdefault(key, []).append((cell, place.fold, place.result))
    bar.set_postfix_str("models")
    for key, error in _each(executor, {key: (run_cells, (settings, cells)) for key, cells in groups.items()}):
        if isinstance(error, str):  # not even the task itself came to an end
            for cell, _, result in groups[key]:
                write_json(result, {"cell": cell._asdict(), "error": error, "notes": []})
        bar.set_postfix_str(f"{key.model}, seed {key.seed}")
        bar.update(len(groups[key]))


def _each(executor: Executor | None, tasks: dict[Any, tuple[Callable[..., Any], Sequence[Any]]]) -> Iterator[Any]:
    """Yield ``(key, result)`` of every task as it ends; a task whose process was killed gives an error in one sentence."""
    if executor is None:
        for key, (function, arguments) in tasks.items():
            yield key, function(*arguments)
        return
    futures = {executor.submit(function, *arguments): key for key, (function, arguments) in tasks.items()}
    for future in as_completed(futures):
        try:
            yield futures[future], future.result()
        except BrokenProcessPool:
            yield futures[future], KILLED
        except Exception as error:  # noqa: BLE001 - a worker of a cluster may be lost in many ways
            yield futures[future], f"{type(error).__name__}: {first_line(error)}."


@contextmanager
def _executor(jobs: int, scheduler: str | None) -> Iterator[Executor | None]:
    if scheduler is not None:
        try:
            from distributed import Client
        except ImportError as error:
            msg = f"`scheduler` needs the package distributed, which is not installed; received {scheduler!r}: `pip install 'scvi-cradle[cluster]'`, or use `jobs`."
            raise ValueError(msg) from error
        try:
            client = Client(scheduler)
        except (OSError, ValueError) as error:
            msg = f"`scheduler` must be the address of a Dask scheduler; received {scheduler!r}: {first_line(error)}."
            raise ValueError(msg) from error
        with client, client.get_executor(pure=False) as executor:
            yield executor
    elif jobs == 1:
        yield None
    else:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_end_with_parent)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this worker when its parent is gone: a killed parent cannot say so, and the worker would wait for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
