"""From settings to tasks, and from tasks to results: what is there is not done again."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scvi_cradle.benchmark import _cell, _cell_scores, _folds
from scvi_cradle.benchmark._cell import build_fold, find_doublets, run_cells
from scvi_cradle.benchmark._folds import Fold
from scvi_cradle.benchmark._models import REGISTRY, resolved_settings
from scvi_cradle.benchmark._runners import Runner, runner
from scvi_cradle.benchmark._screen import first_line
from scvi_cradle.benchmark._settings import BenchmarkSettings, Cell
from scvi_cradle.benchmark._store import (
    CELLS,
    FOLDS,
    LOGGER,
    file_digest,
    fingerprint,
    read_json,
    source_digest,
    write_json,
)

FORMAT = 2  # raise it when results of an earlier version must not be used any more
PACKAGES = ("scvi-cradle", "scvi-tools", "torch", "numpy")
FOLD_CONSTANTS = ("TEST_FRACTION", "VAL_FRACTION", "N_REPEATS", "DOUBLETS_SEED", "THRESHOLDS")
CELL_CONSTANTS = ("N_PARTICLES", "N_IWELBO", "N_SCORED", "N_GENERATED", "N_BOOTSTRAP")


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
    """Return where every cell of the matrix is kept.

    Names hold a fingerprint of the data, of all settings and constants in use, and of the source and versions behind them.
    """
    reading = asdict(settings)
    for name in ("data", "models", "seeds", "thresholds", "fractions", "preset", "max_steps", "experiment"):
        del reading[name]
    common = {"format": FORMAT, "source": source_digest(), "versions": {name: _version(name) for name in PACKAGES}}
    common |= {"data": file_digest(settings.data), "reading": reading}
    common |= {"constants": {name: value for name, value in vars(_folds).items() if name in FOLD_CONSTANTS}}
    common["max_cells"] = _cell_scores.MAX_CELLS
    scored = {name: value for name, value in vars(_cell).items() if name in CELL_CONSTANTS}
    found = {}
    for cell in settings.cells():
        of_fold = fingerprint(common | {"cell": cell._replace(model="")._asdict()})
        model = REGISTRY[cell.model]
        arguments = resolved_settings(model, settings.preset, settings.max_steps)
        whole: dict[str, Any] = {
            "fold": of_fold,
            "model": [model.kind, model.failed, model.expression, arguments],
            "name": cell.model,
        }
        whole |= {"preset": settings.preset, "constants": scored}
        doublets = None if cell.threshold is None else out / FOLDS / f"doublets-{fingerprint(common)}.json"
        name = "-".join([_slug(cell), fingerprint(whole)])
        found[cell] = Place(out / CELLS / f"{name}.json", out / FOLDS / of_fold, doublets)
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "0+unknown"


def _slug(cell: Cell) -> str:
    parts = [cell.experiment, cell.model, f"seed{cell.seed}"]
    parts += [] if cell.fraction is None else [f"share{cell.fraction:g}"]
    parts += [] if cell.threshold is None else [f"mads{cell.threshold:g}"]
    return "-".join("".join(c if c.isalnum() or c == "." else "_" for c in part).strip("_") for part in parts)


def is_done(result: Path) -> bool:
    """Whether there is a result that is no error."""
    content = read_json(result, "cell", "error", "notes")
    return content is not None and content["error"] is None and {"rows", "split"} <= content.keys()


def _has_doublets(path: Path) -> bool:
    return read_json(path, "doublets", "notes") is not None


def _has_fold(path: Path) -> bool:
    """Whether there is a whole fold; what is left of a damaged one is removed."""
    if not path.is_dir():
        return False
    try:
        Fold.read(path)
    except (OSError, KeyError, ValueError) as error:
        LOGGER.warning("%s cannot be read and is made again: %s.", path, first_line(error))
        shutil.rmtree(path)
        return False
    return True


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
    missing = {cell: place for cell, place in found.items() if not is_done(place.result)}
    with tqdm(total=len(found), initial=len(found) - len(missing), unit="cell", disable=not progress) as bar:
        if missing:
            with runner(jobs, scheduler) as run:
                _run(run, settings, missing, bar)
    return {cell: read_json(place.result) for cell, place in found.items()}


def _run(run: Runner, settings: BenchmarkSettings, missing: dict[Cell, Place], bar: Any) -> None:
    """Run three rounds of tasks: doublets, folds, cells. A task of which something failed before is not begun."""
    bar.set_postfix_str("doublets")
    doublets = {p.doublets for p in missing.values() if p.doublets is not None and not _has_doublets(p.doublets)}
    failed: dict[Path, str] = {}
    for path, error in run({path: (find_doublets, (settings, path)) for path in doublets}):
        if error is not None:
            failed[path] = error
    bar.set_postfix_str("splits")
    tasks: dict[Any, Any] = {}
    for cell, place in missing.items():
        if place.doublets in failed:
            failed[place.fold] = failed[place.doublets]
        elif place.fold not in tasks and not _has_fold(place.fold):
            tasks[place.fold] = (build_fold, (settings, cell, place.fold, place.doublets))
    failed |= {path: error for path, error in run(tasks) if error is not None}
    groups: dict[Any, list[tuple[Cell, Path, Path]]] = {}
    for cell, place in missing.items():
        if place.fold in failed:
            write_json(place.result, {"cell": cell._asdict(), "error": failed[place.fold], "notes": []})
            bar.update()
        else:
            key = cell if REGISTRY[cell.model].knows_flags else cell._replace(threshold=None)
            groups.setdefault(key, []).append((cell, place.fold, place.result))
    bar.set_postfix_str("models")
    for key, error in run({key: (run_cells, (settings, cells)) for key, cells in groups.items()}):
        if isinstance(error, str):  # not even the task itself came to an end
            for cell, _, result in groups[key]:
                if is_done(result):
                    continue
                write_json(result, {"cell": cell._asdict(), "error": error, "notes": []})
        bar.set_postfix_str(f"{key.model}, seed {key.seed}")
        bar.update(len(groups[key]))
