"""Readers of published screens."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Literal

import pandas as pd
from anndata import AnnData

from scvi_cradle._validation import check_one_of
from scvi_cradle.datasets._download import locate
from scvi_cradle.datasets._form import (
    GUIDE_COUNTS,
    GUIDE_TARGETS,
    LabelForm,
    guide_targets,
    in_package_form,
    read_h5ad,
    read_labels,
    use_symbols,
    with_counts,
    with_labels,
)
from scvi_cradle.datasets._sources import SOURCES

_NORMAN = LabelForm(
    columns=("guide_ids", "perturbation_name", "condition", "guide_identity", "perturbation"),
    separators=r"[_+,;]",
    rewrite=((r"__.*$", ""),),  # a guide identity names the pair twice: A_B__A_B
    empty_is_control=("guide_ids",),
)
_DIXIT = LabelForm(
    columns=("perturbation_name", "condition", "perturbation", "guide_ids", "guide_identity", "grna"),
    separators=r"[_+,;]",
    rewrite=(
        (r"(?:(?<=[_+,; ])|^)[a-z]_(?:sg)?INTERGENIC\d+", "control"),
        (r"(?:(?<=[_+,; ])|^)[a-z]_sg([^_+,;]+)_\d+", r"\1"),  # p_sgELK1_5
    ),
)
_ADAMSON = LabelForm(
    columns=("condition", "perturbation", "guide_identity", "guide_ids"),
    rewrite=((r"_p[A-Z]+\d+(?:-\d+)?$", ""), (r"^(?:\d+|Gal4-4)\(mod\)$", "control")),
)
_REPLOGLE = {
    "gene": LabelForm(columns=("gene", "condition", "perturbation")),
    "guide_pair": LabelForm(columns=("sgID_AB",), separators="", rewrite=((r"(?i)^non[-_]targeting.*$", "control"),)),
}
_SANTINHA_PREFIXES = (
    (
        r"(?i)^(?:nt|non[-_ ]?targeting|control|safe[-_ ]?(?:h|harbou?r))(?:[-_ ]?(?:g|guide)?[-_ ]?\d+)?$",
        "control",
    ),
    (r"^sg[-_ ]?", ""),
)
_SANTINHA = LabelForm(
    columns=("perturbation", "condition", "guide_id"),
    rewrite=(*_SANTINHA_PREFIXES, (r"_g?\d+$", "")),  # no symbol of a gene has an underscore
    guide_columns=("guide_id",),
    guide_rewrite=(*_SANTINHA_PREFIXES, (r"(?:[-_ ]?g[-_]?|[-_])\d+$", "")),
)
_PAPALEXI = LabelForm(
    columns=("gene_target", "perturbation", "guide_ID", "guide"),
    guide_columns=("guide_ID", "guide"),
    guide_rewrite=((r"g\d+$", ""),),
)


def norman(
    path: str | os.PathLike[str] | None = None, *, known_hash: str | None = None, progress: bool = True
) -> AnnData:
    """Read the CRISPRa screen of single and paired genes in K562 cells :cite:`norman2019`.

    Parameters
    ----------
    path
        File of yours (``.h5ad``, or a zip archive with one). Without it the file is looked for in the folder that the
        environment variable ``SCVI_CRADLE_DATA`` names (else in pooch's cache folder), and downloaded if it is not
        there.
    known_hash
        ``"sha256:..."`` (or a bare SHA-256) that the file must have. Nobody publishes one: without it the SHA-256 of
        the first download is recorded beside the file, and a later file that differs is refused.
    progress
        Whether a download shows a bar.

    Returns
    -------
    AnnData with raw counts in ``X`` (CSR, float32), unique gene symbols, canonical labels in ``obs["perturbation"]``
    (``"control"``, ``"KLF1"``, ``"KLF1+MAP2K6"``) and ``uns["control"] = "control"``. Other columns stay; a column
    ``perturbation`` of the file that reads otherwise is kept as ``"perturbation_original"``. Normalised values are
    not kept. Published size: 111,255 cells x 19,018 genes, 105 single genes and 131 pairs.

    Raises
    ------
    FileNotFoundError
        If there is no file at ``path``.
    ConnectionError
        Without network and file; the message names addresses, file names and folder.
    ValueError
        If the file differs from ``known_hash`` or from the first download, or holds no raw counts or known labels.

    Notes
    -----
    Sources, in this order: the copy of the Theis lab's file that pertpy serves, the same file on figshare, and the
    file of GEARS on Dataverse; original data: GSE133344. Cells without a label are left out with a warning.

    See Also
    --------
    prepare_norman : Filters of the papers.
    """
    file = locate("norman", SOURCES["norman"], path=path, known_hash=known_hash, progress=progress)
    return _read_h5ad(file, _NORMAN)


def dixit(
    path: str | os.PathLike[str] | None = None, *, known_hash: str | None = None, progress: bool = True
) -> AnnData:
    """Read the CRISPR knock-out screen of transcription factors in K562 cells :cite:`dixit2016`.

    Parameters
    ----------
    path, known_hash, progress
        As in :func:`norman`.

    Returns
    -------
    AnnData in the form that :func:`norman` describes. Guides such as ``"p_sgELK1_5"`` are read as their target, two
    guides of one target as that target, intergenic guides as ``"control"``.
    Published size: 103,420 cells x 18,531 genes, 10 single genes and 45 pairs, after :func:`prepare_dixit`.

    Raises
    ------
    FileNotFoundError, ConnectionError, ValueError
        As in :func:`norman`.

    Notes
    -----
    Sources, in this order: figshare (file 34011689), pertpy's copy, GEARS on Dataverse; original data: GSE90063.
    """
    file = locate("dixit", SOURCES["dixit"], path=path, known_hash=known_hash, progress=progress)
    return _read_h5ad(file, _DIXIT)


def adamson(
    path: str | os.PathLike[str] | None = None, *, known_hash: str | None = None, progress: bool = True
) -> AnnData:
    """Read the CRISPRi screen of the unfolded protein response in K562 cells :cite:`adamson2016`.

    Parameters
    ----------
    path, known_hash, progress
        As in :func:`norman`.

    Returns
    -------
    AnnData in the form that :func:`norman` describes. Guides such as ``"CAD_pDS263"`` are read as their target; the
    guides ``"62(mod)"``, ``"63(mod)"`` and ``"Gal4-4(mod)"`` are read as ``"control"``.
    Published size: 62,623 cells x 17,115 genes, 87 genes. The papers state no filter of their own.

    Raises
    ------
    FileNotFoundError, ConnectionError, ValueError
        As in :func:`norman`.

    Notes
    -----
    Sources, in this order: scPerturb on Zenodo (record 7041849), GEARS on Dataverse, pertpy's copy; original data:
    GSE90546. Cells without a guide (``"*"`` or nothing) are left out with a warning.
    """
    file = locate("adamson", SOURCES["adamson"], path=path, known_hash=known_hash, progress=progress)
    return _read_h5ad(file, _ADAMSON)


def replogle(
    path: str | os.PathLike[str] | None = None,
    *,
    screen: Literal["k562_gwps", "k562_essential"] = "k562_gwps",
    level: Literal["gene", "guide_pair"] = "gene",
    backed: bool = False,
    known_hash: str | None = None,
    progress: bool = True,
) -> AnnData:
    """Read a genome-scale CRISPRi screen in K562 cells :cite:`replogle2022`, unfiltered.

    Parameters
    ----------
    path, known_hash, progress
        As in :func:`norman`.
    screen
        Genome-wide or essential genes. Ignored when ``path`` is given.
    level
        Labels are targeted genes, or guide pairs (column ``sgID_AB``). Names of pairs hold ``+`` for the strand:
        register them with ``sep=None``.
    backed
        Whether the matrix stays on disk, as it is stored there. The genome-wide screen has 1,989,578 cells; the
        counts of all of them do not fit into the memory of usual machines.

    Returns
    -------
    AnnData in the form that :func:`norman` describes; with ``backed=True`` ``X`` is not read, not checked and not
    converted.

    Raises
    ------
    FileNotFoundError, ConnectionError, ValueError
        As in :func:`norman`; ``ValueError`` also for an unknown ``screen`` or ``level``.

    Notes
    -----
    Sources: pertpy's copies; for the essential genes then GEARS on Dataverse.

    See Also
    --------
    prepare_replogle : Perturbations with strong effects and their genes; takes a backed object as well.
    """
    check_one_of("screen", screen, ("k562_gwps", "k562_essential"))
    check_one_of("level", level, tuple(_REPLOGLE))
    name = f"replogle_{screen}"
    file = locate(name, SOURCES[name], path=path, known_hash=known_hash, progress=progress)
    return _read_h5ad(file, _REPLOGLE[level], backed=backed)


def santinha(
    path: str | os.PathLike[str] | None = None, *, known_hash: str | None = None, progress: bool = True
) -> AnnData:
    """Read the in vivo AAV-Perturb-seq screen in mouse cortex :cite:`santinha2023`.

    Parameters
    ----------
    path, known_hash, progress
        As in :func:`norman`.

    Returns
    -------
    AnnData in the form that :func:`norman` describes. Guides such as ``"Dgcr8_1"`` are read as their target,
    non-targeting and safe-harbour guides as ``"control"``. Published content: 29 genes with two guides each.

    Raises
    ------
    FileNotFoundError, ConnectionError, ValueError
        As in :func:`norman`.

    Notes
    -----
    Source: scPerturb on Zenodo, file ``SantinhaPlatt2023.h5ad``. In which record it lies has not been checked; pass
    ``path=`` if the download fails. Guide counts are not made up: they are there if the file has
    ``obsm["guide_counts"]``.

    See Also
    --------
    prepare_santinha : Filters of the paper on classifiers of perturbed cells.
    """
    file = locate("santinha", SOURCES["santinha"], path=path, known_hash=known_hash, progress=progress)
    return _read_h5ad(file, _SANTINHA)


def papalexi(
    path: str | os.PathLike[str] | None = None, *, known_hash: str | None = None, progress: bool = True
) -> AnnData:
    """Read the ECCITE-seq screen of immune checkpoint regulators in THP-1 cells :cite:`papalexi2021`.

    Parameters
    ----------
    path
        As in :func:`norman`: an ``.h5mu`` with the modalities ``rna`` and ``gdo``, or an ``.h5ad``.
    known_hash, progress
        As in :func:`norman`.

    Returns
    -------
    AnnData in the form that :func:`norman` describes, with guide counts (DataFrame, cells x guides) in
    ``obsm["guide_counts"]`` and their targets (columns ``guide``, ``target``; ``"control"`` for non-targeting guides)
    in ``uns["guide_targets"]``. Published size: 20,729 cells, 25 genes. Proteins and hashtags are not read.

    Raises
    ------
    FileNotFoundError, ConnectionError, ValueError
        As in :func:`norman`; ``ValueError`` also for an ``.h5mu`` without the modalities.

    Notes
    -----
    Source: pertpy's copy. ``setup_mudata`` of the models takes the ``.h5mu`` itself.
    """
    file = locate("papalexi", SOURCES["papalexi"], path=path, known_hash=known_hash, progress=progress)
    adata = _read_h5mu(file) if file.suffix == ".h5mu" else _read_h5ad(file, _PAPALEXI)
    if GUIDE_COUNTS in adata.obsm:
        adata.uns[GUIDE_TARGETS] = guide_targets(adata, _PAPALEXI)
    return adata


def _read_h5ad(file: Path, form: LabelForm, *, backed: bool = False) -> AnnData:
    adata = read_h5ad(file, backed=backed)
    labels = read_labels(adata.obs, form)
    if not backed:
        return in_package_form(adata, labels)
    use_symbols(adata)
    return with_labels(adata, labels)


def _read_h5mu(file: Path) -> AnnData:
    import mudata

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Variable|Observation) names are not unique|var_names are not unique")
        warnings.filterwarnings("ignore", r"From 0\.4 \.update\(\) will not pull", FutureWarning)
        mdata = mudata.read_h5mu(file)
    if not {"rna", "gdo"} <= set(mdata.mod):
        msg = f"The file must have the modalities 'rna' and 'gdo'; received {sorted(mdata.mod)}: pass the `path=` of another file."
        raise ValueError(msg)
    both = mdata["rna"].obs_names.intersection(mdata["gdo"].obs_names, sort=False)
    rna, guides = mdata["rna"][both].copy(), with_counts(mdata["gdo"][both].copy())
    for table in (mdata.obs, guides.obs):  # labels may lie on any level
        for column in table.columns:
            name = column.removeprefix("rna:")
            if ":" not in name and name not in rna.obs:
                rna.obs[name] = table[column].reindex(both)
    counts = guides.X.toarray().astype("int64")
    rna.obsm[GUIDE_COUNTS] = pd.DataFrame(counts, index=rna.obs_names, columns=list(guides.var_names))
    return in_package_form(rna, read_labels(rna.obs, _PAPALEXI))
