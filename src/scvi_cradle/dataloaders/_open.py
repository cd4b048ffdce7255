"""Files of a screen: expression left on disk, the columns of cells and the names of genes read."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.io import read_elem, sparse_dataset
from pandas.api.types import union_categoricals

from scvi_cradle._constants import QC_UNS_KEY
from scvi_cradle._validation import check_key, preview


@dataclass(frozen=True)
class StoredFile:
    """What is read of a file.

    Parameters
    ----------
    x
        The expression on disk, cells x genes.
    obs
        Columns of the cells.
    genes
        Names of the genes.
    obsm, uns
        Further entries that were asked for.
    """

    x: Any
    obs: pd.DataFrame
    genes: pd.Index
    obsm: dict[str, Any]
    uns: dict[str, Any]


def open_file(
    path: str | Path,
    *,
    layer: str | None,
    obs_keys: Collection[str],
    obsm_keys: Collection[str],
    uns_keys: Collection[str],
) -> StoredFile:
    """Open an ``.h5ad`` file or a ``.zarr`` store.

    Raises
    ------
    FileNotFoundError, KeyError
        If the file or an entry is not there.
    ValueError
        For a file of another kind, and for a matrix that is stored by columns.
    """
    path = Path(path)
    if not path.exists():
        msg = f"A screen must be an existing `.h5ad` file or `.zarr` store; received {str(path)!r}, which is not there."
        raise FileNotFoundError(msg)
    is_hdf5 = path.is_file() and h5py.is_hdf5(path)
    if not is_hdf5 and not path.is_dir():
        msg = f"A screen must be an `.h5ad` file or a `.zarr` store; received {path.name!r}, which is neither: write it with `adata.write_h5ad` or `adata.write_zarr`."
        raise ValueError(msg)
    where = path.name
    try:
        root: Any = h5py.File(path, "r") if is_hdf5 else zarr.open_group(path, mode="r")
    except FileNotFoundError:  # a folder that is no group
        root = {}
    name = "X" if layer is None else "layers"
    if any(part not in root for part in ("obs", "var", name)) or "column-order" not in root["obs"].attrs:
        msg = f"A screen must hold `obs`, `var` and the expression as AnnData writes them; received {where!r} without: write it with `adata.write_h5ad` or `adata.write_zarr`."
        raise ValueError(msg)
    obs = root["obs"]
    for key in obs_keys:
        check_key(dict.fromkeys(obs.attrs["column-order"]), key, f"{where}/obs", "a column of the screen")
    columns = {key: read_elem(obs[key]) for key in obs_keys}
    if "obsm" not in root and obsm_keys:
        check_key({}, next(iter(obsm_keys)), f"{where}/obsm", "a matrix of the screen")
    for key in obsm_keys:
        check_key(dict.fromkeys(root["obsm"]), key, f"{where}/obsm", "a matrix of the screen")
    return StoredFile(
        x=_expression(root, layer, where),
        obs=pd.DataFrame(columns, index=pd.Index(read_elem(obs[obs.attrs["_index"]])).astype(str)),
        genes=pd.Index(read_elem(root["var"][root["var"].attrs["_index"]])).astype(str),
        obsm={key: read_elem(root["obsm"][key]) for key in obsm_keys},
        uns={key: read_elem(root["uns"][key]) for key in uns_keys if "uns" in root and key in root["uns"]},
    )


def _expression(root: Any, layer: str | None, where: str) -> Any:
    if layer is not None:
        check_key(dict.fromkeys(root["layers"]) if "layers" in root else {}, layer, f"{where}/layers", "layer")
    x = root["X"] if layer is None else root["layers"][layer]
    encoding = x.attrs.get("encoding-type")
    if encoding == "csc_matrix":
        msg = f"A screen on disk must be stored by cells (CSR or dense), since cells are read; received CSC in {where!r}: write it anew with `adata.X = adata.X.tocsr()`."
        raise ValueError(msg)
    if encoding != "csr_matrix":
        return x
    for part in ("data", "indices"):
        array = x[part]
        if isinstance(array, zarr.Array) and array.nchunks_initialized < array.nchunks:
            msg = f"All parts of a store must be there, as zarr reads lacking ones as zeros; received {where!r} with {array.nchunks_initialized} of {array.nchunks} chunks of `{part}`: copy or write it anew."
            raise ValueError(msg)
    return sparse_dataset(x)


def concat_obs(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the columns of all files, categories united."""
    if len(frames) == 1:
        return frames[0]
    columns = {}
    for key in frames[0]:
        parts = [frame[key] for frame in frames]
        if all(isinstance(part.dtype, pd.CategoricalDtype) for part in parts):
            if len({part.cat.categories.dtype for part in parts}) > 1:
                parts = [part.cat.rename_categories(part.cat.categories.astype(str)) for part in parts]
            columns[key] = union_categoricals(parts, ignore_order=True, sort_categories=True)
        else:
            columns[key] = pd.concat(parts).array
    return pd.DataFrame(columns, index=frames[0].index.append([frame.index for frame in frames[1:]]))


def common_notes(files: list[StoredFile]) -> dict[str, Any]:
    """Return the entries of ``uns`` that all files have in common.

    Raises
    ------
    ValueError
        If names of columns, or targets of guides, are not the same in all files.
    """
    notes = dict(files[0].uns)
    for key in list(notes):
        if all(key in file.uns and _same(file.uns[key], notes[key]) for file in files):
            continue
        if key != QC_UNS_KEY:
            msg = f"`uns[{key!r}]` must be the same in all files of a screen; received others: give the files common columns in one order."
            raise ValueError(msg)
        warnings.warn(
            "The files of the screen were labelled with different QC thresholds: none are kept for `qc_pass_rate`.",
            UserWarning,
            stacklevel=4,
        )
        del notes[key]
    return notes


def _same(a: Any, b: Any) -> bool:
    """Return whether two entries of ``uns`` are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, pd.DataFrame) or isinstance(b, pd.DataFrame):
        return isinstance(a, pd.DataFrame) and a.equals(b)
    return bool(np.array_equal(np.asarray(a, dtype=object), np.asarray(b, dtype=object)))


def concat_rows(parts: list[Any], key: str) -> Any:
    """Return the rows of matrices of cells of all files.

    Raises
    ------
    ValueError
        If they have other columns.
    """
    columns = [list(part.columns) if isinstance(part, pd.DataFrame) else part.shape[1] for part in parts]
    if any(other != columns[0] for other in columns[1:]):
        msg = f"`obsm[{key!r}]` must have the same columns in all files of a screen; received others in file {next(i for i, other in enumerate(columns) if other != columns[0]) + 1}: give them common columns."
        raise ValueError(msg)
    if isinstance(parts[0], pd.DataFrame):
        return pd.concat(parts)
    return sp.vstack(parts, format="csr") if sp.issparse(parts[0]) else np.concatenate(parts)


def check_same_genes(files: list[StoredFile]) -> None:
    """Raise ``ValueError`` unless all files have the same genes in the same order."""
    for number, file in enumerate(files[1:], start=2):
        if not file.genes.equals(files[0].genes):
            other = sorted(set(file.genes) ^ set(files[0].genes))
            what = f"other genes ({preview(other, 3)})" if other else "another order"
            msg = f"All files of a screen must have the same genes in the same order; received {what} in file {number}: subset them to common genes."
            raise ValueError(msg)
