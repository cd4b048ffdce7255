"""Results on disk: a file appears whole or not at all, and its name holds a fingerprint of what it depends on."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

CELLS, FOLDS = "cells", "folds"


def fingerprint(parts: Any) -> str:
    """Return 16 characters that change with any value in ``parts`` (anything that JSON can hold)."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Return the SHA-256 of the package's own source files, computed once in every process."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n{file_digest(path)}\n".encode())
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one step."""
    with _temporary(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=float), encoding="utf-8")
        temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with _temporary(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or ``None`` if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the name ``path`` at the end, unless another process was faster."""
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise


def remove_leftovers(out: Path) -> None:
    """Remove what a killed process had begun to write; call it while no other process writes."""
    for folder in (out / CELLS, out / FOLDS):
        for path in folder.glob(".*.tmp"):
            shutil.rmtree(path)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=path.parent))
    try:
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
