"""Configuration of the documentation; `make docs` builds it with warnings as errors and without network."""

from __future__ import annotations

import shutil
from importlib.metadata import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

HERE = Path(__file__).parent
TUTORIALS = HERE.parent / "tutorials"

info = metadata("scvi-cradle")
project = "scvi_cradle"
author = "scvi_cradle developers"
copyright = "2026, scvi_cradle developers"
version = release = info["Version"]
repository_url = dict(entry.split(", ") for entry in info.get_all("Project-URL"))["Source"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx-mathjax-offline",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints", "Thumbs.db", ".DS_Store"]
templates_path = ["_templates"]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}

# every name in the text has to be one that readers can follow
nitpicky = True
# names that docstrings of modules use for parts of the same file
nitpick_ignore = [
    *(("py:class", name) for name in ("NegativeBinomialDecoder", "Posterior")),
    # in signatures of classes that derive from one of lightning, which is documented under a shorter name
    *(("py:class", name) for name in ("Path", "LightningDataModule")),
    ("py:class", "lightning.pytorch.core.datamodule.LightningDataModule"),
]
# parts of ours that have no page: private ones, the training plan, fields, and the parts of modules
nitpick_ignore_regex = [("py:.*", r"scvi_cradle\.((.*\.)?_.*|(data|train|module\.base)\b.*)")]
# the function in autosummary_context cannot be stored, which only matters for incremental builds
suppress_warnings = ["config.cache"]

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_type_aliases = {"ArrayLike": "numpy.typing.ArrayLike", "npt.ArrayLike": "numpy.typing.ArrayLike"}
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = True
napoleon_use_param = True

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

# the inventories are small files of ours (`python docs/make_inventories.py`), so that a build needs no network
SITES = {
    "anndata": "https://anndata.readthedocs.io/en/stable/",
    "lightning": "https://lightning.ai/docs/pytorch/stable/",
    "matplotlib": "https://matplotlib.org/stable/",
    "mudata": "https://mudata.readthedocs.io/en/latest/",
    "networkx": "https://networkx.org/documentation/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "pandas": "https://pandas.pydata.org/docs/",
    "python": "https://docs.python.org/3/",
    "scanpy": "https://scanpy.readthedocs.io/en/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "scvi": "https://docs.scvi-tools.org/en/stable/",
    "sklearn": "https://scikit-learn.org/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}
intersphinx_mapping = {name: (url, f"_inventories/{name}.inv") for name, url in SITES.items()}

html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {"repository_url": repository_url, "use_repository_button": True}


def own_members(fullname: str, names: list[str]) -> list[str]:
    """Members of a class that this package defines; those of scvi-tools are documented there."""
    module_name, _, class_name = fullname.rpartition(".")
    cls = getattr(__import__(module_name, fromlist=[class_name]), class_name)

    def home(name: str) -> str:
        owner = next(base for base in cls.__mro__ if name in vars(base))
        return owner.__module__

    return [name for name in names if home(name).startswith("scvi_cradle")]


def returns_as_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep the text of a section Returns, whose first line napoleon would take for a type: types are in signatures."""
    starts = [i for i in range(len(lines) - 1) if lines[i] and not lines[i][0].isspace() and lines[i + 1][:3] == "---"]
    for start in starts:
        if lines[start] == "Returns":
            end = min((i for i in starts if i > start), default=len(lines))
            text = [f"    {line}" if line else "" for line in lines[start + 2 : end]]
            lines[start + 2 : end] = [":", *text, ""]  # a field without name and type
            return


def setup(app: Sphinx) -> None:
    """Run before napoleon, which has the default priority of 500."""
    app.connect("autodoc-process-docstring", returns_as_text, priority=400)


autosummary_context = {"own_members": own_members}


def copy_tutorials() -> None:
    """Show the notebooks of the top-level folder as pages."""
    target = HERE / "tutorials"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    notebooks = sorted(TUTORIALS.glob("*.ipynb"))
    for notebook in notebooks:
        shutil.copy2(notebook, target / notebook.name)
    entries = "\n".join(notebook.stem for notebook in notebooks)
    text = f"```{{toctree}}\n:maxdepth: 1\n\n{entries}\n```" if entries else "There is no notebook yet."
    (target / "index.md").write_text(f"# Tutorials\n\n{text}\n")


copy_tutorials()
