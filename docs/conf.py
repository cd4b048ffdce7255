"""Configuration of the documentation; `make docs` builds it with warnings as errors and without network."""

from __future__ import annotations

import shutil
from importlib.metadata import metadata
from pathlib import Path

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
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints", "Thumbs.db", ".DS_Store"]
templates_path = ["_templates"]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}

# every name in the text has to be one that readers can follow
nitpicky = True
nitpick_ignore = [
    ("py:class", "optional"),
    # aliases that appear in annotations and have no page of their own
    ("py:class", "numpy.float32"),
    ("py:class", "numpy._typing._array_like._ScalarT"),
]
# private classes of ours appear as bases of public ones; members of scvi-tools are documented there
nitpick_ignore_regex = [("py:.*", r"scvi_cradle\.(.*\.)?_.*")]
# the function in autosummary_context cannot be stored, which only matters for incremental builds
suppress_warnings = ["config.cache"]

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
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
