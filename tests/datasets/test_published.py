"""Published screens: files of every known form come out in the form of this package."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_cradle import datasets
from scvi_cradle.datasets import _published
from scvi_cradle.datasets._sources import SOURCES

GENES = ["KLF1", "MT-ND1", "RPS3", "HBG2", "GATA1"]
LOADERS = {
    "norman": datasets.norman,
    "dixit": datasets.dixit,
    "adamson": datasets.adamson,
    "replogle": datasets.replogle,
    "santinha": datasets.santinha,
    "papalexi": datasets.papalexi,
}


def counts_of(n_cells: int, n_genes: int = len(GENES)) -> np.ndarray:
    return np.random.default_rng(n_cells).poisson(2.0, (n_cells, n_genes)).astype(np.int64)


def made(columns: dict[str, Sequence[Any]], **parts: Any) -> ad.AnnData:
    n_cells = len(next(iter(columns.values())))
    obs = pd.DataFrame(columns, index=[f"cell{i}" for i in range(n_cells)])
    return ad.AnnData(
        parts.pop("x", sp.csr_matrix(counts_of(n_cells))), obs=obs, var=pd.DataFrame(index=GENES), **parts
    )


@pytest.fixture
def written(tmp_path: Path) -> Callable[[ad.AnnData], Path]:
    def write(adata: ad.AnnData) -> Path:
        adata.write_h5ad(tmp_path / "file.h5ad")
        return tmp_path / "file.h5ad"

    return write


def labels(adata: ad.AnnData) -> list[str]:
    return adata.obs["perturbation"].astype(str).tolist()


FORMS = [
    ("norman", "guide_ids", ["", "KLF1", "MAP2K6,KLF1"], ["control", "KLF1", "KLF1+MAP2K6"]),
    ("norman", "perturbation_name", ["control", "KLF1", "KLF1+MAP2K6"], ["control", "KLF1", "KLF1+MAP2K6"]),
    ("norman", "condition", ["ctrl", "KLF1+ctrl", "ctrl+KLF1", "B+A"], ["control", "KLF1", "KLF1", "A+B"]),
    ("norman", "perturbation", ["control", "KLF1", "KLF1_MAP2K6"], ["control", "KLF1", "KLF1+MAP2K6"]),
    (
        "norman",
        "guide_identity",
        [
            "NegCtrl0_NegCtrl11__NegCtrl0_NegCtrl11",
            "KLF1_NegCtrl0__KLF1_NegCtrl0",
            "NegCtrl0_A__NegCtrl0_A",
            "B_A__B_A",
        ],
        ["control", "KLF1", "A", "A+B"],
    ),
    ("dixit", "perturbation_name", ["control", "ELK1", "ELK1+ELF1"], ["control", "ELK1", "ELF1+ELK1"]),
    ("dixit", "condition", ["ctrl", "ELK1+ctrl", "ELK1+ELF1"], ["control", "ELK1", "ELF1+ELK1"]),
    ("dixit", "perturbation", ["control", "ELK1", "ELK1_ELF1"], ["control", "ELK1", "ELF1+ELK1"]),
    (
        "dixit",
        "perturbation",
        ["p_INTERGENIC393453", "p_sgELK1_5", "p_sgELK1_5,p_sgELF1_2", "p_sgELK1_5_p_INTERGENIC1", "m_sgA_1;m_sgA_2"],
        ["control", "ELK1", "ELF1+ELK1", "ELK1", "A"],
    ),
    ("adamson", "condition", ["ctrl", "CREB1+ctrl"], ["control", "CREB1"]),
    ("adamson", "perturbation", ["control", "CREB1"], ["control", "CREB1"]),
    (
        "adamson",
        "perturbation",
        ["62(mod)_pBA581", "63(mod)_pBA580", "Gal4-4(mod)_pBA582", "CAD_pDS263", "SEC61A1_pDS029-2"],
        ["control", "control", "control", "CAD", "SEC61A1"],
    ),
    ("replogle", "gene", ["non-targeting", "GPS1", "HLA-A"], ["control", "GPS1", "HLA-A"]),
    ("replogle", "condition", ["ctrl", "GPS1+ctrl"], ["control", "GPS1"]),
    ("replogle", "perturbation", ["control", "GPS1"], ["control", "GPS1"]),
    ("santinha", "perturbation", ["control", "Dgcr8", "Ufd1l"], ["control", "Dgcr8", "Ufd1l"]),
    (
        "santinha",
        "guide_id",
        ["NT_1", "non-targeting_2", "Safe_H_1", "safe-harbor", "sgDgcr8_2", "Gnb1l-1", "Dgcr14g2", "Hira_g1", "Sept5"],
        ["control", "control", "control", "control", "Dgcr8", "Gnb1l", "Dgcr14", "Hira", "Sept5"],
    ),
    # symbols of genes end like guides
    (
        "santinha",
        "perturbation",
        ["control", "Arg1", "Atg7", "Nkx2-1", "sgDgcr8_2"],
        ["control", "Arg1", "Atg7", "Nkx2-1", "Dgcr8"],
    ),
    ("santinha", "guide_id", ["NT_1", "Atg7_1", "Arg1g2", "Nkx2-1_2"], ["control", "Atg7", "Arg1", "Nkx2-1"]),
    ("papalexi", "gene_target", ["NT", "Atg7"], ["control", "Atg7"]),
    ("papalexi", "gene_target", ["NT", "JAK2"], ["control", "JAK2"]),
    ("papalexi", "guide_ID", ["NTg4", "JAK2g3", "IFNGR2g1"], ["control", "JAK2", "IFNGR2"]),
    ("papalexi", "perturbation", ["NT", "PDCD1LG2"], ["control", "PDCD1LG2"]),
]


@pytest.mark.parametrize(("name", "column", "given", "expected"), FORMS)
def test_label_forms(
    written: Callable[[ad.AnnData], Path], name: str, column: str, given: list[str], expected: list[str]
) -> None:
    adata = LOADERS[name](written(made({column: pd.Categorical(given)})))
    assert labels(adata) == expected
    assert adata.uns["control"] == "control"
    kept = "perturbation_original" if column == "perturbation" and given != expected else column
    assert adata.obs[kept].astype(str).tolist() == given


def test_guide_pairs_of_replogle(written: Callable[[ad.AnnData], Path]) -> None:
    pair = "GPS1_+_80010011.23-P1P2|GPS1_-_80009799.23-P1P2"
    file = written(made({"sgID_AB": ["non-targeting_1|non-targeting_7", pair], "gene": ["non-targeting", "GPS1"]}))
    assert labels(datasets.replogle(file)) == ["control", "GPS1"]
    assert labels(datasets.replogle(file, level="guide_pair")) == ["control", pair]
    with pytest.raises(ValueError, match="`level` must be one of"):
        datasets.replogle(file, level="guide")
    with pytest.raises(ValueError, match="`screen` must be one of"):
        datasets.replogle(file, screen="rpe1")


@pytest.mark.parametrize("missing", [None, "", "*", "nan"])
def test_cells_without_a_label_are_left_out_with_a_warning(
    written: Callable[[ad.AnnData], Path], missing: str | None
) -> None:
    file = written(made({"perturbation": pd.Categorical(["control", missing, "CAD_pDS263"])}))
    with pytest.warns(UserWarning, match="1 of 3 cells have no perturbation label") as caught:
        adata = datasets.adamson(file)
    assert labels(adata) == ["control", "CAD"]
    assert adata.obs_names.tolist() == ["cell0", "cell2"]
    (warning,) = [item for item in caught if "no perturbation label" in str(item.message)]
    assert warning.filename == __file__
    np.testing.assert_array_equal(adata.X.toarray(), counts_of(3)[[0, 2]])


def test_what_is_not_a_screen_of_this_name(written: Callable[[ad.AnnData], Path]) -> None:
    with pytest.raises(ValueError, match=r"one of the columns 'guide_ids'.*received 'leiden'"):
        datasets.norman(written(made({"leiden": ["1", "2"]})))
    with pytest.raises(ValueError, match=r"At least one cell must be a control.*'KLF1'"):
        datasets.norman(written(made({"guide_ids": ["A", "KLF1"]})))
    with pytest.raises(ValueError, match="Every part of a perturbation label"):
        datasets.norman(written(made({"condition": ["ctrl", "A+"]})))


COUNTS = counts_of(3)
LOGGED = np.log1p(COUNTS).astype(np.float32)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param({"x": sp.csr_matrix(COUNTS)}, id="CSR"),
        pytest.param({"x": sp.csc_matrix(COUNTS.astype(np.float64))}, id="CSC"),
        pytest.param({"x": COUNTS.astype(np.float32)}, id="dense"),
        pytest.param({"x": LOGGED, "layers": {"counts": sp.csr_matrix(COUNTS)}}, id="layer"),
        pytest.param(
            {"x": sp.csr_matrix(COUNTS), "layers": {"counts": LOGGED}}, id="layer of that name without counts"
        ),
    ],
)
def test_raw_counts(written: Callable[[ad.AnnData], Path], parts: dict[str, Any]) -> None:
    adata = datasets.norman(written(made({"guide_ids": ["", "A", "A,B"]}, **parts)))
    assert isinstance(adata.X, sp.csr_matrix)
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)


def test_raw_counts_of_raw(written: Callable[[ad.AnnData], Path]) -> None:
    full = made({"guide_ids": ["", "A", "A,B"]})
    adata = full[:, :3].copy()
    adata.raw = full
    adata.X = adata.X.log1p()
    np.testing.assert_array_equal(datasets.norman(written(adata)).X.toarray(), COUNTS)


def test_no_raw_counts(written: Callable[[ad.AnnData], Path]) -> None:
    with pytest.raises(ValueError, match="must hold raw counts in .*received X with fractional values"):
        datasets.norman(written(made({"guide_ids": ["", "A", "B"]}, x=LOGGED)))


def test_gene_names(written: Callable[[ad.AnnData], Path]) -> None:
    adata = made({"guide_ids": ["", "A"]})
    ids = [f"ENSG{i:011d}" for i in range(5)]
    adata.var = pd.DataFrame({"gene_name": ["KLF1", "MT-ND1", "KLF1", "", "GATA1"]}, index=pd.Index(ids, name="id"))
    read = datasets.norman(written(adata))
    assert read.var_names.tolist() == ["KLF1", "MT-ND1", "KLF1-1", ids[3], "GATA1"]
    assert read.var["gene_id"].tolist() == ids
    assert "gene_name" in read.var
    # symbols stay, whatever other columns say; doubled ones are made unique without a warning
    adata.var = pd.DataFrame({"gene_name": list("abcde")}, index=["KLF1", "KLF1", "MT-ND1", "A", "B"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Variable names are not unique")
        file = written(adata)
    assert datasets.norman(file).var_names.tolist() == ["KLF1", "KLF1-1", "MT-ND1", "A", "B"]


def test_reading_a_written_result_changes_nothing(written: Callable[[ad.AnnData], Path]) -> None:
    first = datasets.norman(written(made({"guide_ids": ["", "KLF1", "B,A"], "perturbation": ["x", "y", "z"]})))
    again = datasets.norman(written(first))
    pd.testing.assert_frame_equal(again.obs, first.obs)
    np.testing.assert_array_equal(again.X.toarray(), first.X.toarray())
    assert again.obs["perturbation_original"].tolist() == ["x", "y", "z"]


def test_a_backed_screen(written: Callable[[ad.AnnData], Path]) -> None:
    file = written(made({"gene": ["non-targeting", "GPS1", "GPS1"]}))
    adata = datasets.replogle(file, backed=True)
    assert adata.isbacked
    assert labels(adata) == ["control", "GPS1", "GPS1"]
    adata.file.close()
    file = written(made({"gene": ["non-targeting", "GPS1", "*"]}))
    with pytest.raises(ValueError, match="stays on disk"):
        datasets.replogle(file, backed=True)


def write_h5mu(file: Path, **modalities: ad.AnnData) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mudata.MuData(modalities).write_h5mu(file)
    return file


def test_multimodal_papalexi(tmp_path: Path) -> None:
    rna = made({"perturbation": ["NT", "Perturbed", "Perturbed"], "gene_target": ["NT", "JAK2", "STAT1"]})
    guides = ["JAK2g1", "NTg4", "STAT1g2"]
    gdo = ad.AnnData(
        sp.csr_matrix(np.array([[9, 0, 0], [0, 0, 7], [1, 8, 0], [5, 5, 5]], dtype=np.float32)),
        obs=pd.DataFrame(index=["cell1", "cell2", "cell0", "cell9"]),  # another order, one more cell
        var=pd.DataFrame(index=guides),
    )
    adt = ad.AnnData(np.ones((3, 2), dtype=np.float32), obs=rna.obs[[]], var=pd.DataFrame(index=["CD86", "PDL1"]))
    adata = datasets.papalexi(write_h5mu(tmp_path / "file.h5mu", rna=rna, adt=adt, gdo=gdo))
    assert labels(adata) == ["control", "JAK2", "STAT1"]
    assert adata.obs["perturbation_original"].tolist() == ["NT", "Perturbed", "Perturbed"]
    table = adata.obsm["guide_counts"]
    assert table.columns.tolist() == guides
    assert table.loc["cell1"].tolist() == [9, 0, 0]
    assert table.loc["cell0"].tolist() == [1, 8, 0]
    assert adata.uns["guide_targets"].to_numpy().tolist() == [
        ["JAK2g1", "JAK2"],
        ["NTg4", "control"],
        ["STAT1g2", "STAT1"],
    ]
    adata.write_h5ad(tmp_path / "again.h5ad")
    again = datasets.papalexi(tmp_path / "again.h5ad")
    pd.testing.assert_frame_equal(again.obsm["guide_counts"], table)
    pd.testing.assert_frame_equal(again.uns["guide_targets"], adata.uns["guide_targets"])
    with pytest.raises(ValueError, match="'rna' and 'gdo'; received"):
        datasets.papalexi(write_h5mu(tmp_path / "other.h5mu", rna=rna, adt=adt))


def test_known_targets_are_not_read_as_guides(written: Callable[[ad.AnnData], Path]) -> None:
    adata = made({"gene_target": ["NT", "Atg7"]})
    adata.obsm["guide_counts"] = pd.DataFrame(np.eye(2, dtype=int), index=adata.obs_names, columns=["NTg1", "Atg7g2"])
    for _ in range(2):  # the second time the targets are in the file
        adata = datasets.papalexi(written(adata))
        assert adata.uns["guide_targets"]["target"].tolist() == ["control", "Atg7"]


def test_labels_of_the_guide_modality(tmp_path: Path) -> None:
    rna = made({"replicate": ["1", "2"], "perturbation": ["NT", "Perturbed"]})  # says whether, not what
    gdo = ad.AnnData(
        np.eye(2, dtype=np.float32),
        obs=pd.DataFrame({"guide_ID": ["NTg1", "JAK2g3"]}, index=rna.obs_names),
        var=pd.DataFrame(index=["NTg1", "JAK2g3"]),
    )
    assert labels(datasets.papalexi(write_h5mu(tmp_path / "file.h5mu", rna=rna, gdo=gdo))) == ["control", "JAK2"]


def test_real_papalexi(papalexi_path: Path) -> None:
    source = ad.read_h5ad(papalexi_path)
    adata = datasets.papalexi(papalexi_path)
    assert adata.shape == (20729, 299)
    expected = source.obs["perturbation"].astype(str).replace("NT", "control")
    assert labels(adata) == expected.tolist()
    assert (adata.X != source.X).nnz == 0
    guides = adata.uns["guide_targets"].set_index("guide")["target"]
    assert guides["JAK2g3"] == "JAK2"
    assert set(guides) >= set(labels(adata)) >= {"control", "JAK2"}
    assert adata.obsm["guide_counts"].columns.tolist() == guides.index.tolist()


def test_a_model_takes_the_result(written: Callable[[ad.AnnData], Path]) -> None:
    from scvi_cradle import SAMSVAE

    adata = datasets.norman(written(made({"guide_ids": ["", "KLF1", "KLF1,MAP2K6", ""]})))
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation")
    assert SAMSVAE(adata).adata is adata


@pytest.mark.parametrize("name", LOADERS)
def test_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCVI_CRADLE_DATA", str(tmp_path))
    sources = {
        key: tuple(source._replace(url="http://127.0.0.1:9/" + source.file_name) for source in value)
        for key, value in SOURCES.items()
    }
    monkeypatch.setattr(_published, "SOURCES", sources)
    key = "replogle_k562_gwps" if name == "replogle" else name
    with pytest.raises(ConnectionError) as caught:
        LOADERS[name](progress=False)
    for part in (*sources[key][0], str(tmp_path), f"'{key}.h5ad'", "`path=`"):
        assert part in str(caught.value)


def test_mirrors_with_one_file_name_are_of_one_data_set() -> None:
    names = {key: {source.file_name for source in sources} for key, sources in SOURCES.items()}
    assert sum(map(len, names.values())) == len(set().union(*names.values()))
    assert all(source.url.startswith("https://") for sources in SOURCES.values() for source in sources)
