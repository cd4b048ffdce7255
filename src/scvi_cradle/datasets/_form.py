"""Published files in the form of this package: raw counts in ``X``, canonical labels, unique gene symbols."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle._constants import COLUMNS, CONTROL_UNS_KEY
from scvi_cradle._labels import LabelRule
from scvi_cradle._matrix import counts_problem, to_csr
from scvi_cradle._validation import preview

CONTROL = "control"
ORIGINAL = f"{COLUMNS.PERTURBATION}_original"
GUIDE_COUNTS, GUIDE_TARGETS = "guide_counts", "guide_targets"
_CONTROL_NAMES = re.compile(r"control|ctrl|nt|non[-_ ]?targeting|neg[-_ ]?ctrl\d*|unperturbed", re.IGNORECASE)
_NO_LABEL = {"", "*", "nan", "none", "unassigned"}
_SYMBOL_COLUMNS = ("gene_symbols", "gene_symbol", "gene_name", "gene_names", "feature_name")
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{6,}")


@dataclass(frozen=True)
class LabelForm:
    """How the files of a data set name what a cell received.

    Parameters
    ----------
    columns
        Columns of ``obs`` that may hold the labels; the first one that is there is read.
    separators
        Regular expression of what stands between targets; empty: labels are not split.
    rewrite
        Regular expressions and their replacements, applied to a label before it is split: from guides to targets.
    guide_columns
        Columns that may name guides instead of targets; names of guides in ``obsm`` are read as theirs.
    guide_rewrite
        What is applied in the place of ``rewrite`` to names of guides: what ends the name of a guide may end the name
        of a gene (``"JAK2g3"``, ``"Atg7"``).
    empty_is_control
        Columns in which an empty label stands for a control; elsewhere such cells have no known label.
    """

    columns: tuple[str, ...]
    separators: str = r"[+,;]"
    rewrite: tuple[tuple[str, str], ...] = ()
    guide_columns: tuple[str, ...] = ()
    guide_rewrite: tuple[tuple[str, str], ...] = ()
    empty_is_control: tuple[str, ...] = ()

    def canonical(self, label: str, *, guide: bool = False) -> str:
        """Return ``"control"``, ``"A"`` or ``"A+B"`` for a label, or the name of a guide, as it stands in a file."""
        text = label.strip()
        for pattern, replacement in self.guide_rewrite if guide else self.rewrite:
            text = re.sub(pattern, replacement, text)
        if _CONTROL_NAMES.fullmatch(text):
            return CONTROL
        if not self.separators:
            return text
        parts = [part.strip() for part in re.split(self.separators, text)]
        parts = [CONTROL if _CONTROL_NAMES.fullmatch(part) else part for part in parts]
        # two guides of one target are no double perturbation
        return LabelRule.create(CONTROL).canonical("+".join(dict.fromkeys(parts)))


def read_labels(obs: pd.DataFrame, form: LabelForm) -> pd.Series:
    """Return the canonical label of every cell, missing where the file gives none.

    Raises
    ------
    ValueError
        If no column of the form is there, a label cannot be read, or no cell is a control.
    """
    for column in form.columns:
        if column not in obs:
            continue
        values = obs[column].astype(object)
        names = {raw: _read_label(raw, column, form) for raw in values.unique()}
        found = {name for name in names.values() if name is not None}
        if {str(name).lower() for name in found} <= {CONTROL, "perturbed"}:  # says whether, not what
            continue
        if CONTROL not in found:
            msg = f"At least one cell must be a control; received `obs[{column!r}]` with {preview(sorted(found))}: this is not a file of this data set in a known form."
            raise ValueError(msg)
        return values.map(names)
    msg = f"The file must name perturbations in one of the columns {preview(form.columns, 10)} of `obs`; received {preview(obs.columns, 10)}: pass the `path=` of another file."
    raise ValueError(msg)


def _read_label(raw: Any, column: str, form: LabelForm) -> str | None:
    text = "" if pd.isna(raw) else str(raw).strip()
    if not pd.isna(raw) and not text and column in form.empty_is_control:
        return CONTROL
    return None if text.lower() in _NO_LABEL else form.canonical(text, guide=column in form.guide_columns)


def in_package_form(adata: AnnData, labels: pd.Series) -> AnnData:
    """Give a file's content the form of this package; the result is ``adata`` itself unless cells are left out.

    Raises
    ------
    ValueError
        If the file holds no raw counts.
    """
    adata = with_counts(adata)
    use_symbols(adata)
    return with_labels(adata, labels)


def with_labels(adata: AnnData, labels: pd.Series) -> AnnData:
    """Write ``obs["perturbation"]`` and ``uns["control"]``, and leave out cells without a label, with a warning."""
    labelled = labels.notna().to_numpy()
    if not labelled.all():
        if adata.isbacked:
            msg = f"Every cell of a file that stays on disk must have a perturbation label; received {int((~labelled).sum())} without: pass `backed=False`."
            raise ValueError(msg)
        warnings.warn(
            f"{int((~labelled).sum())} of {len(labelled)} cells have no perturbation label and are left out.",
            UserWarning,
            stacklevel=5,  # the caller of the reader
        )
        adata, labels = adata[labelled].copy(), labels[labelled]
    canonical = pd.Categorical(labels.astype(str))
    old = adata.obs.get(COLUMNS.PERTURBATION)
    if old is not None and not np.array_equal(old.astype(str).to_numpy(), np.asarray(canonical, dtype=str)):
        adata.obs[ORIGINAL] = old
    adata.obs[COLUMNS.PERTURBATION] = canonical
    adata.uns[CONTROL_UNS_KEY] = CONTROL
    return adata


def with_counts(adata: AnnData) -> AnnData:
    """Put raw counts into ``X`` as CSR float32, from ``layers["counts"]``, ``X`` or ``raw``.

    Raises
    ------
    ValueError
        If none of them holds raw counts.
    """
    problems = []
    candidates = [("layers['counts']", adata.layers["counts"])] if "counts" in adata.layers else []
    candidates += [("X", adata.X)] if adata.X is not None else []
    for where, matrix in candidates:
        problem = counts_problem(matrix)
        if problem is None:
            adata.X = to_csr(matrix).astype(np.float32, copy=False)
            if where != "X":
                del adata.layers["counts"]
            return adata
        problems.append(f"{where} with {problem}")
    if adata.raw is not None and counts_problem(adata.raw.X) is None:
        return with_counts(adata.raw.to_adata())
    msg = f"The file must hold raw counts in `layers['counts']`, `X` or `raw`; received {', '.join(problems) or 'nothing'}: pass the `path=` of a file with counts."
    raise ValueError(msg)


def use_symbols(adata: AnnData) -> None:
    """Name genes by unique symbols where the file has them in a column of ``var``; old names go to ``"gene_id"``."""
    var = adata.var
    column = next((name for name in _SYMBOL_COLUMNS if name in var), None)
    ensembl = len(var) > 0 and pd.Series(var.index.astype(str)).str.match(_ENSEMBL).mean() > 0.5
    if ensembl and column is not None:
        ids = var.index.astype(str).to_numpy()
        symbols = var[column].astype(object)
        names = np.where(symbols.isna() | (symbols.astype(str) == ""), ids, symbols.astype(str))
        if "gene_id" not in var:
            adata.var["gene_id"] = ids
        adata.var_names = pd.Index(names)
    for table in (adata.obs, adata.var):
        if table.index.name in table:
            table.index.name = None  # a name that is also a column's keeps a file from being written
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Suffix used", UserWarning)
        adata.var_names_make_unique()
        adata.obs_names_make_unique()


def read_h5ad(path: Path, *, backed: bool = False) -> AnnData:
    """Read a file whose names may be doubled: they are made unique afterwards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Variable|Observation) names are not unique", UserWarning)
        return ad.read_h5ad(path, backed="r" if backed else None)


def guide_targets(adata: AnnData, form: LabelForm) -> pd.DataFrame:
    """Return the guides of ``obsm["guide_counts"]`` and their targets, ``"control"`` for non-targeting guides.

    Targets are taken from ``uns["guide_targets"]`` where the file has it, else from the names of the guides.
    """
    guides = [str(guide) for guide in adata.obsm[GUIDE_COUNTS].columns]
    table = adata.uns.get(GUIDE_TARGETS)
    known = dict(zip(table["guide"], table["target"], strict=True)) if isinstance(table, pd.DataFrame) else {}
    targets = [form.canonical(str(known[g])) if g in known else form.canonical(g, guide=True) for g in guides]
    return pd.DataFrame({"guide": guides, "target": targets})
