"""The filters of the papers: every threshold on both sides, and perturbations of known strength."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from scipy.stats import false_discovery_control, ttest_ind

from scvi_cradle import datasets
from scvi_cradle.datasets import prepare_dixit, prepare_norman, prepare_replogle, prepare_santinha


def screen(counts: np.ndarray, labels: list[str], genes: list[str] | None = None) -> ad.AnnData:
    genes = genes or [f"G{i}" for i in range(counts.shape[1])]
    return ad.AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame({"perturbation": pd.Categorical(labels)}, index=[f"c{i}" for i in range(len(counts))]),
        var=pd.DataFrame(index=genes),
        uns={"control": "control"},
    )


def unchanged(adata: ad.AnnData, before: ad.AnnData) -> bool:
    """Whether cells, genes, columns and counts are those of a copy made before."""
    return (
        adata.obs.equals(before.obs)
        and adata.var.equals(before.var)
        and set(adata.uns) == set(before.uns)
        and (adata.X != before.X).nnz == 0
    )


def norman_like() -> ad.AnnData:
    """30 usual cells and one at each side of every threshold; gene G0 is found in 19 cells, G1 in 20."""
    counts = np.zeros((36, 6100))
    counts[:30, 2:302] = 1
    counts[:19, 0] = 1
    counts[:20, 1] = 1
    counts[:30, 302:] = 1
    counts[:30, 6000:] = 0
    counts[:20, 6000:] = 1  # 20 cells with 6,098 or 6,099 genes: too many
    counts[20:30, 6000:6002] = 1  # ten cells with 6,000
    counts[30, 2:202] = 1  # 200 genes: kept
    counts[31, 2:201] = 1  # 199
    counts[32, 2:302] = 1
    counts[32, 6099] = 52  # 14.8 % mitochondrial
    counts[33, 2:287] = 1
    counts[33, 6099] = 300 - 255  # 45 of 330: 13.6 %
    counts[34, 2:257] = 1
    counts[34, 6099] = 45  # 45 of 300: 15 %, too many
    counts[35, 2:6003] = 1  # 6,001 genes
    return screen(counts, ["control"] * 36, [*(f"G{i}" for i in range(6099)), "MT-ND1"])


def test_norman_thresholds() -> None:
    adata = norman_like()
    before = adata.copy()
    kept = prepare_norman(adata)
    assert unchanged(adata, before)
    assert kept.obs_names.tolist() == [f"c{i}" for i in (*range(20, 31), 32, 33)]
    assert "G0" not in kept.var_names
    assert {"G1", "MT-ND1"} <= set(kept.var_names)
    assert kept.obs.columns.tolist() == ["perturbation"]  # filters leave no columns behind
    assert (kept.X != adata[kept.obs_names, kept.var_names].X).nnz == 0


@pytest.fixture(scope="module")
def wide() -> ad.AnnData:
    """5,200 genes of different variability in 60 cells."""
    rng = np.random.default_rng(0)
    rate = rng.gamma(2.0, 1.0, 5200) * rng.lognormal(0.0, np.linspace(0.1, 1.5, 5200), (60, 5200))
    return screen(rng.poisson(1.0 + rate), ["control", "A", "A+B"] * 20)


def test_norman_genes_of_the_papers(wide: ad.AnnData) -> None:
    assert prepare_norman(wide).n_vars == 5200
    sams = prepare_norman(wide, paper="sams")
    assert sams.n_vars == 5000
    logged = wide.copy()
    sc.pp.normalize_total(logged, target_sum=1e4)
    sc.pp.log1p(logged)
    expected = sc.pp.highly_variable_genes(logged, n_top_genes=5000, inplace=False)["highly_variable"].to_numpy()
    assert sams.var_names.tolist() == wide.var_names[expected].tolist()
    assert (sams.X != wide[:, sams.var_names].X).nnz == 0
    perturbed = prepare_norman(wide, paper="perturbedvae")
    assert perturbed.var_names.equals(sams.var_names)
    assert (perturbed.layers["counts"] != sams.X).nnz == 0
    np.testing.assert_allclose(np.expm1(perturbed.X.toarray()).sum(axis=1), 1e4, rtol=1e-4)


def test_norman_takes_the_genes_that_the_file_marks(wide: ad.AnnData) -> None:
    adata = wide.copy()
    adata.var["highly_variable"] = np.arange(5200) >= 200
    assert prepare_norman(adata, paper="sams").var_names.tolist() == [f"G{i}" for i in range(200, 5200)]
    adata.var["highly_variable"] = np.arange(5200) >= 300  # not 5,000: not the papers' genes
    assert prepare_norman(adata, paper="sams").var_names.equals(prepare_norman(wide, paper="sams").var_names)


def test_norman_errors(wide: ad.AnnData) -> None:
    with pytest.raises(ValueError, match="`paper` must be one of"):
        prepare_norman(wide, paper="gears")
    fractions = wide.copy()
    fractions.X = fractions.X * 0.5
    for prepare in (prepare_norman, prepare_santinha, prepare_replogle):
        with pytest.raises(ValueError, match="raw counts"):
            prepare(fractions)
    with pytest.raises(ValueError, match="At least one gene must be found in at least 20 cells"):
        prepare_norman(wide[:10].copy())
    with pytest.raises(ValueError, match="At least one cell must be with 200 to 6,000 genes"):
        prepare_norman(wide[:, :100].copy())


def test_dixit() -> None:
    adata = screen(np.ones((4, 2)), ["control", "A", "A+B", "A+B+C"])
    assert prepare_dixit(adata).obs["perturbation"].tolist() == ["control", "A", "A+B"]
    assert prepare_dixit(adata, max_targets=1).n_obs == 2
    with pytest.raises(ValueError, match="`max_targets` must be a positive integer"):
        prepare_dixit(adata, max_targets=0)
    with pytest.raises(KeyError, match="perturbation"):
        prepare_dixit(ad.AnnData(np.ones((1, 1))))


def test_santinha_thresholds() -> None:
    counts = np.zeros((16, 2710))
    counts[:, 10:] = 3  # 2,700 genes, 8,100 counts
    counts[13, 10] = 0  # 2,699 genes
    counts[14] = 0
    counts[14, 10:] = np.where(np.arange(2700) < 600, 4, 2)  # 6,600 counts
    counts[15] = 0
    counts[15, 10:] = np.where(np.arange(2700) < 599, 4, 2)
    counts[15, 10:13] = 1  # 2,700 genes and 6,589 counts: kept
    labels = ["control"] * 5 + ["A"] * 5 + ["B"] * 6
    counts[0, 0] = counts[1, 0] = 50  # found in two cells only
    counts[:3, 1] = 50  # mitochondrial
    counts[:2, 2] = counts[5, 2] = 1  # mean 0.4 in the controls: kept
    counts[5, 3] = counts[10, 3] = counts[0, 3] = 1  # mean 0.2 at most
    counts[5:8, 4] = 1  # mean 0.6 in A
    genes = [f"G{i}" for i in range(2710)]
    genes[1] = "mt-Nd1"
    adata = screen(counts, labels, genes)
    before = adata.copy()
    kept = prepare_santinha(adata)
    assert unchanged(adata, before)
    assert kept.obs_names.tolist() == [f"c{i}" for i in range(16) if i != 13]
    assert kept.var_names.tolist() == ["G2", "G4", *genes[10:]]
    assert (kept.layers["counts"] != adata[kept.obs_names, kept.var_names].X).nnz == 0
    np.testing.assert_allclose(np.expm1(kept.X.toarray()).sum(axis=1), 1e4, rtol=1e-4)


@pytest.mark.parametrize(("per_gene", "enough"), [(2, False), (3, True)])
def test_santinha_counts(per_gene: int, enough: bool) -> None:
    counts = np.full((4, 2700), float(per_gene))  # 5,400 or 8,100 counts
    counts[0, :300] += per_gene == 2  # 5,700
    counts[1, :600] += per_gene == 2  # 6,000
    adata = screen(counts, ["control"] * 4)
    if enough:
        assert prepare_santinha(adata).n_obs == 4
    else:
        adata = screen(np.vstack([counts, counts[1], counts[1]]), ["control"] * 6)
        assert prepare_santinha(adata).obs_names.tolist() == ["c1", "c4", "c5"]


N_GENES = 200


@pytest.fixture(scope="module")
def strong_and_weak() -> ad.AnnData:
    """S1 and S2 change genes 0-59, S3 genes 0-29; N0-N4 change nothing; F changes genes 0-59 but has few cells."""
    rng = np.random.default_rng(1)
    groups = {"control": 400, "S1": 80, "S2": 60, "S3": 80, **{f"N{i}": 60 for i in range(5)}, "F": 24}
    labels = np.repeat(list(groups), list(groups.values()))
    fold = np.ones((len(labels), N_GENES))
    fold[np.ix_(np.isin(labels, ["S1", "S2", "F"]), range(60))] = 2.5
    fold[np.ix_(labels == "S3", range(30))] = 2.5
    base = rng.gamma(4.0, 1.0, N_GENES) + 2.0
    library = rng.gamma(10.0, 0.1, (len(labels), 1))
    share = base * fold / (base * fold).sum(axis=1, keepdims=True)  # only shares are observed
    order = rng.permutation(len(labels))
    return screen(rng.poisson(base.sum() * library * share)[order], labels[order].tolist())


def test_strong_perturbations_and_their_genes(strong_and_weak: ad.AnnData) -> None:
    before = strong_and_weak.copy()
    kept = prepare_replogle(strong_and_weak, n_controls=100, min_perturbations=2)
    assert unchanged(strong_and_weak, before)
    table = kept.uns["strong_effects"]
    assert table.index.tolist() == ["F", "N0", "N1", "N2", "N3", "N4", "S1", "S2", "S3"]
    assert {"S1", "S2"} <= set(table.index[table["kept"]])
    assert not table.loc[["F", "N0", "N1", "N2", "N3", "N4"], "kept"].any()
    assert table.loc["F"].tolist()[:2] == [24, 0]  # not tested
    assert table.filter(like="N", axis=0)["n_de_genes"].max() <= 3
    sizes = kept.obs["perturbation"].value_counts()
    assert sizes["control"] == 100
    assert sizes["S1"] == 80
    assert kept.obs_names.tolist() == [name for name in strong_and_weak.obs_names if name in set(kept.obs_names)]
    assert set(strong_and_weak.var_names[:60]) <= set(kept.var_names)
    assert (kept.X != strong_and_weak[kept.obs_names, kept.var_names].X).nnz == 0
    assert kept.X.dtype == np.float32


def test_numbers_are_those_of_the_test_in_the_text(strong_and_weak: ad.AnnData) -> None:
    x = strong_and_weak.X.toarray().astype(float)
    logged = np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))
    labels = strong_and_weak.obs["perturbation"].to_numpy()
    table = prepare_replogle(strong_and_weak, fdr_level=0.01, min_perturbations=1).uns["strong_effects"]
    for name in table.index.drop("F"):
        pvalue = ttest_ind(logged[labels == name], logged[labels == "control"]).pvalue
        assert table.loc[name, "n_de_genes"] == (false_discovery_control(pvalue) < 0.01).sum()


def test_small_groups_of_rare_genes_are_not_strong() -> None:
    """Genes found in one cell of twenty are absent from many groups of 25 cells: no effect."""
    rng = np.random.default_rng(3)
    counts = np.hstack([rng.poisson(0.05, (2000, 300)), rng.poisson(5.0, (2000, 20))])
    labels = np.array(["control"] * 1750 + [f"N{i}" for i in range(9) for _ in range(25)] + ["S"] * 25)
    counts[-25:, 300:310] *= 6
    table = prepare_replogle(screen(counts, labels.tolist()), min_de_genes=10, min_perturbations=1).uns[
        "strong_effects"
    ]
    assert table.index[table["kept"]].tolist() == ["S"]
    assert table["n_de_genes"].drop("S").mean() < 3


def test_controls_and_seed(strong_and_weak: ad.AnnData) -> None:
    def drawn(**arguments: int | None) -> list[str]:
        kept = prepare_replogle(strong_and_weak, min_perturbations=1, **arguments)
        return kept.obs_names[kept.obs["perturbation"] == "control"].tolist()

    assert drawn(n_controls=50) == drawn(n_controls=50) != drawn(n_controls=50, seed=1)
    assert len(drawn(n_controls=None)) == len(drawn(n_controls=2000)) == 400


def test_genes_without_variance_and_cells_without_counts() -> None:
    rng = np.random.default_rng(2)
    counts = rng.poisson(3.0, (120, 40))
    counts[:60, :20] *= 4
    counts[:, 39] = 0
    counts[0] = 0
    adata = screen(counts, ["A"] * 60 + ["control"] * 60)
    kept = prepare_replogle(adata, min_de_genes=10, min_perturbations=1)
    assert "G39" not in kept.var_names
    constant = screen(np.tile([1.0, 2.0, 4.0], (120, 1)), ["A"] * 60 + ["control"] * 60)
    with pytest.raises(ValueError, match="received 0 strong perturbations"):
        prepare_replogle(constant, min_de_genes=1, min_perturbations=1)


@pytest.mark.parametrize("dense", [False, True])
def test_a_screen_on_disk(strong_and_weak: ad.AnnData, tmp_path: Path, dense: bool) -> None:
    adata = strong_and_weak.copy()
    adata.obs["gene"] = adata.obs["perturbation"].astype(str).replace("control", "non-targeting")
    if dense:
        adata.X = adata.X.toarray()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    backed = datasets.replogle(tmp_path / "screen.h5ad", backed=True)
    kept = prepare_replogle(backed, min_perturbations=2)
    backed.file.close()
    expected = prepare_replogle(strong_and_weak, min_perturbations=2)
    assert not kept.isbacked
    assert (kept.X != expected.X).nnz == 0
    assert kept.obs_names.equals(expected.obs_names)
    pd.testing.assert_frame_equal(kept.uns["strong_effects"], expected.uns["strong_effects"])
    kept.write_h5ad(tmp_path / "kept.h5ad")
    pd.testing.assert_frame_equal(
        ad.read_h5ad(tmp_path / "kept.h5ad").uns["strong_effects"], expected.uns["strong_effects"]
    )


def test_replogle_errors(strong_and_weak: ad.AnnData) -> None:
    with pytest.raises(ValueError, match="lower `min_de_genes`"):
        prepare_replogle(strong_and_weak, min_de_genes=150)
    with pytest.raises(ValueError, match="`min_cells` must be at least 2"):
        prepare_replogle(strong_and_weak, min_cells=1)
    with pytest.raises(ValueError, match="`fdr_level` must lie strictly between"):
        prepare_replogle(strong_and_weak, fdr_level=1)
    alone = strong_and_weak[strong_and_weak.obs["perturbation"] != "control"].copy()
    with pytest.raises(ValueError, match="At least two cells must be controls"):
        prepare_replogle(alone)
    del alone.uns["control"]
    with pytest.raises(KeyError, match="control"):
        prepare_replogle(alone)
