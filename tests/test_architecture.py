"""Who may import whom, read from the source; and what `import scvi_cradle` must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "scvi_cradle"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE
DEEP_LEARNING = {"torch", "scvi", "lightning", "pytorch_lightning", "pyro"}

# What a folder may import besides itself; "" stands for the files directly in the package (layer 0).
# "module/base" is a folder of its own, "module" means the files beside it.
ALLOWED = {
    "": set(),
    "pp": {""},
    "metrics": {""},
    "datasets": {""},
    "baselines": {"", "metrics"},
    "data": {""},
    "dataloaders": {"", "data"},
    "module/base": {""},
    "module": {"", "pp", "metrics", "datasets", "baselines", "data", "module/base"},
    "train": {"", "module/base"},
    "model": {"", "pp", "metrics", "datasets", "baselines", "data", "dataloaders", "module/base", "module", "train"},
    "pl": {"", "metrics"},
    "benchmark": {
        *("", "pp", "metrics", "datasets", "baselines", "data"),
        *("module/base", "module", "train", "model", "pl"),
    },
}
WITHOUT_TORCH = {"", "pp", "metrics", "datasets", "baselines", "pl"}
# files of these folders that a public name comes from never import each other
INDEPENDENT = {"model", "module"}


def folder_of(module: str) -> str:
    """Folder of a module given by its dotted name, which may end in a name that the module defines."""
    parts = module.split(".")[1:]
    if parts[:2] == ["module", "base"]:
        return "module/base"
    return parts[0] if parts and parts[0] in ALLOWED else ""


def imported_names(tree: ast.AST) -> set[str]:
    """Dotted names of all imports, also of those inside functions; ``from a import b`` gives ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The module without its ``if TYPE_CHECKING:`` blocks, which import nothing when the code runs."""
    body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))]
    return ast.Module(body=body, type_ignores=[])


def module_of(name: str) -> str:
    """``scvi_cradle.model._cradlevae`` for ``scvi_cradle.model._cradlevae.CradleVAE``."""
    parts = name.split(".")
    path = SOURCE.joinpath(*parts[1:])
    is_folder = "/".join(parts[1:]) in ALLOWED
    return name if is_folder or path.with_suffix(".py").is_file() else ".".join(parts[:-1])


def public_modules(folder: str) -> set[str]:
    """Modules from which the ``__init__`` of a folder takes names that it makes public."""
    init = SOURCE / folder / "__init__.py"
    if not init.is_file():
        return set()
    found = {module_of(name) for name in imported_names(ast.parse(init.read_text()))}
    return {name for name in found if name.startswith(f"{PACKAGE}.{folder}._")}


def violations(module: str, code: str, independent: frozenset[str] = frozenset()) -> list[str]:
    """What a module imports against the rules, one sentence each."""
    tree = ast.parse(code)
    folder = folder_of(module)
    found = []
    for name in sorted(imported_names(tree)):
        if name.startswith("."):
            found.append(f"{module} imports {name}: imports are absolute")
        elif name.split(".")[0] == PACKAGE:
            target = module_of(name)
            place = folder_of(name)
            if target == PACKAGE and folder != "benchmark":
                found.append(f"{module} imports {name}: take it from the file that defines it")
            elif place != folder and place not in ALLOWED[folder]:
                found.append(f"{module} imports {name}: folder {folder!r} may not use {place!r}")
            elif module in independent and target in independent and target != module:
                found.append(f"{module} imports {name}: public modules of {folder!r} do not import each other")
    if folder in WITHOUT_TORCH:
        outside = {name.split(".")[0] for name in imported_names(without_type_checking(tree))}
        found += [f"{module} imports {name}: {folder!r} does without it" for name in sorted(outside & DEEP_LEARNING)]
    return found


def source_modules() -> dict[str, Path]:
    """Every module of the package but the top ``__init__``, which may import all."""
    modules = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        if len(parts) > 1:
            modules[".".join(parts)] = path
    return modules


def test_every_folder_has_a_rule() -> None:
    folders = {path.parent.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")} - {"."}
    assert folders <= set(ALLOWED), "state in ALLOWED what the new folder may import"


@pytest.mark.parametrize("module", source_modules())
def test_layers(module: str) -> None:
    folder = folder_of(module)
    independent = frozenset(public_modules(folder)) if folder in INDEPENDENT else frozenset()
    assert violations(module, source_modules()[module].read_text(), independent) == []


@pytest.mark.parametrize(
    ("module", "code", "part"),
    [
        pytest.param("scvi_cradle._labels", "import torch", "does without it", id="layer 0 uses torch"),
        pytest.param("scvi_cradle.metrics._a", "def f():\n    import scvi.model", "does without it", id="lazy scvi"),
        pytest.param("scvi_cradle._a", "from scvi_cradle.data import x", "may not use", id="layer 0 uses data"),
        pytest.param("scvi_cradle.datasets._a", "from scvi_cradle.metrics._b import x", "may not use", id="layer 1"),
        pytest.param("scvi_cradle.module.base._a", "from scvi_cradle.data import x", "may not use", id="base"),
        pytest.param("scvi_cradle.module._a", "from scvi_cradle.train import x", "may not use", id="module uses train"),
        pytest.param("scvi_cradle.train._a", "from scvi_cradle.module import x", "may not use", id="train uses module"),
        pytest.param("scvi_cradle.data._a", "from scvi_cradle import CradleVAE", "take it from", id="top level"),
        pytest.param("scvi_cradle.data._a", "from ._b import x", "absolute", id="relative"),
    ],
)
def test_violations_are_seen(module: str, code: str, part: str) -> None:
    (message,) = violations(module, code)
    assert part in message


def test_independent_files_are_seen() -> None:
    both = frozenset({"scvi_cradle.module._cradlevae", "scvi_cradle.module._other"})
    code = "from scvi_cradle.module._cradlevae import CradleVAEModule"
    (message,) = violations("scvi_cradle.module._other", code, both)
    assert "do not import each other" in message
    assert violations("scvi_cradle.module._private_part", code, both) == []


def test_typing_imports_are_free() -> None:
    code = "if TYPE_CHECKING:\n    from torch import Tensor"
    assert violations("scvi_cradle.metrics._a", code) == []


IMPORT_CHECK = """
import importlib, pkgutil, random, socket, sys, warnings
import numpy as np
import torch, lightning, scanpy, mudata, scvi, sklearn, matplotlib.pyplot  # what they do is theirs

def refuse(*args, **kwargs):
    raise AssertionError("a connection was opened")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

def state():
    numpy_state = np.random.get_state()
    return {
        "filters": list(warnings.filters),
        "random": random.getstate(),
        "numpy": (numpy_state[1].tobytes(), numpy_state[2]),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "seed": scvi.settings.seed,
    }

before = state()
package = importlib.import_module("scvi_cradle")
for info in pkgutil.walk_packages(package.__path__, "scvi_cradle."):
    if not info.name.endswith("__main__"):
        importlib.import_module(info.name)
after = state()
changed = [key for key in before if before[key] != after[key]]
sys.exit(f"importing changed: {changed}" if changed else 0)
"""


def test_import_changes_nothing_global() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_CHECK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
