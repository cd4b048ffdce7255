"""The public interface: what is exported is documented, in docstrings and on the API pages."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "scvi_cradle"
CHECKOUT = Path(__file__).resolve().parents[1]
SOURCE = CHECKOUT / "src" / PACKAGE
PAGES = CHECKOUT / "docs" / "api"
PUBLIC = ("pp", "metrics", "baselines", "datasets", "dataloaders", "model", "module", "pl", "benchmark")
SUBPACKAGES = [name for name in PUBLIC if (SOURCE / name / "__init__.py").is_file()]
# signatures that follow a formula or the words of a paper
MORE_POSITIONALS = {"block_r2", "gaussian_kl", "simulate_perturbseq", "simulate_sams", "simulate_scm", "simulate_svae"}
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def load(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")


def exported() -> Iterator[Any]:
    """Every exported function and class, and the public methods that this package gives to the classes."""
    for subpackage in SUBPACKAGES:
        for name in load(subpackage).__all__:
            thing = getattr(load(subpackage), name)
            if not callable(thing):
                continue
            yield pytest.param(thing, id=f"{subpackage}.{name}")
            # the methods of modules are called by scvi-tools, in its way
            methods = inspect.isclass(thing) and subpackage != "module"
            for attribute, method in inspect.getmembers(thing, inspect.isroutine) if methods else ():
                if not attribute.startswith("_") and getattr(method, "__module__", "").startswith(PACKAGE):
                    yield pytest.param(method, id=f"{subpackage}.{name}.{attribute}")


def parameters(thing: Any) -> list[inspect.Parameter]:
    """Parameters that a caller gives by name; the docstring of a class describes those of its constructor."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = [item for item in inspect.signature(thing).parameters.values() if item.kind not in variadic]
    if found and found[0].name in {"self", "cls"}:
        found = found[1:]
    return found


def names_on_page(page: Path) -> set[str]:
    """Entries of the autosummary tables of a page, without the subpackage."""
    tables = re.findall(r"\.\. autosummary::\n((?:[ \t]+\S.*\n|\s*\n)+)", page.read_text())
    entries = [line.strip() for table in tables for line in table.splitlines()]
    return {entry.split(".", 1)[1] for entry in entries if entry and not entry.startswith(":")}


def test_something_is_public() -> None:
    assert SUBPACKAGES


@pytest.mark.parametrize("name", SUBPACKAGES)
def test_all_is_complete_and_documented(name: str) -> None:
    module = load(name)
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, entry) for entry in module.__all__)
    assert not [entry for entry in module.__all__ if entry.startswith("_")]
    page = PAGES / f"{name}.md"
    assert page.is_file(), f"{page.relative_to(CHECKOUT)} is missing"
    assert names_on_page(page) == set(module.__all__), f"{page.name} and {name}.__all__ differ"


def test_every_page_has_a_subpackage_and_is_reachable() -> None:
    pages = {page.stem for page in PAGES.glob("*.md")} - {"index"}
    assert pages == {*SUBPACKAGES, "presets"}
    assert pages <= set((PAGES / "index.md").read_text().split())


@pytest.mark.parametrize("thing", list(exported()))
def test_docstring(thing: Any) -> None:
    text = inspect.getdoc(thing) or ""
    first = text.split("\n\n")[0]
    assert first.endswith("."), "the docstring begins with a full sentence"
    if parameters(thing):
        assert "Parameters\n---" in text, "the docstring has a section Parameters"


@pytest.mark.parametrize("thing", list(exported()))
def test_documented_parameters_exist(thing: Any) -> None:
    sections = re.split(r"\n(?=\S[^\n]*\n-{3,})", inspect.getdoc(thing) or "")
    section = next((part for part in sections if part.startswith("Parameters\n")), "")
    documented = {
        name.strip()
        for line in section.splitlines()[2:]
        if line and not line.startswith((" ", "*"))
        for name in line.split(":")[0].split(",")
    }
    assert documented == {parameter.name for parameter in parameters(thing)} or not parameters(thing)


@pytest.mark.parametrize("thing", list(exported()))
def test_at_most_three_positional_arguments(thing: Any) -> None:
    positional = [parameter.name for parameter in parameters(thing) if parameter.kind in POSITIONAL]
    assert len(positional) <= 3 or thing.__name__ in MORE_POSITIONALS, positional


def test_top_level() -> None:
    package = importlib.import_module(PACKAGE)
    assert set(SUBPACKAGES) <= set(package.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", package.__version__)
    models = load("model").__all__ if "model" in SUBPACKAGES else []
    assert all(getattr(package, name) is getattr(load("model"), name) for name in models if name[0].isupper())
