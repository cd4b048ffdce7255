from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_cradle.metrics import cell_eval_scores, to_cell_eval, write_cell_eval


def make_cells(labels: list[str], seed: int, n: int = 30) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    rate = np.full((len(labels), 40), 3.0)
    for i in range(len(labels)):
        rate[i, 4 * i : 4 * i + 4] *= 1 if labels[i] in {"NT", "control"} else 4
    counts = rng.poisson(np.repeat(rate, n, axis=0)).astype(np.int64)
    obs = pd.DataFrame({"target_gene": np.repeat(labels, n)}, index=[f"c{seed}_{i}" for i in range(len(counts))])
    return ad.AnnData(sp.csc_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(40)]))


ARGUMENTS = {"perturbation_key": "target_gene", "control": "NT"}


@pytest.fixture
def real() -> ad.AnnData:
    return make_cells(["NT", "A", "B", "C"], seed=1)


def test_form(real) -> None:
    predicted = make_cells(["NT", "B+A", "A"], seed=2)[:, ::-1].copy()
    real.obs["target_gene"] = real.obs["target_gene"].replace({"B": "A+B"})
    before = real.obs.copy(), predicted.obs.copy()
    ours, theirs = to_cell_eval(real, predicted, **ARGUMENTS)
    assert list(ours.var_names) == list(theirs.var_names) == list(real.var_names)
    assert dict(ours.obs["target"].value_counts()) == {"A": 30, "A+B": 30, "non-targeting": 30}
    assert dict(theirs.obs["target"].value_counts()) == {"A": 30, "A+B": 30, "non-targeting": 30}
    for adata in (ours, theirs):
        assert isinstance(adata.X, sp.csr_matrix)
        assert adata.X.dtype == np.float32
    rows = (predicted.obs["target_gene"] == "A").to_numpy()
    expected = predicted[rows, real.var_names].X.toarray()
    np.testing.assert_array_equal(theirs[theirs.obs["target"] == "A"].X.toarray(), expected)
    pd.testing.assert_frame_equal(real.obs, before[0])
    pd.testing.assert_frame_equal(predicted.obs, before[1])


def test_controls_are_halved_where_the_prediction_has_none(real) -> None:
    ours, theirs = to_cell_eval(real, make_cells(["A", "C"], seed=2), **ARGUMENTS)
    controls = [a[a.obs["target"] == "non-targeting"].X.toarray() for a in (ours, theirs)]
    assert [len(c) for c in controls] == [15, 15]
    together = np.vstack(controls)
    whole = real[real.obs["target_gene"] == "NT"].X.toarray()
    order = [np.lexsort(x.T) for x in (together, whole)]
    np.testing.assert_array_equal(together[order[0]], whole[order[1]])
    assert theirs.obs_names.is_unique


def test_a_perturbation_is_not_merged_into_the_controls() -> None:
    real, predicted = (make_cells(["NT", "A", "non-targeting"], seed=seed) for seed in (1, 2))
    with pytest.raises(
        ValueError, match="No perturbation may be called 'non-targeting'.*received it beside control='NT'"
    ):
        to_cell_eval(real, predicted, **ARGUMENTS)
    ours, theirs = to_cell_eval(real, predicted, perturbation_key="target_gene", control=["NT", "non-targeting"])
    for adata in (ours, theirs):
        assert dict(adata.obs["target"].value_counts()) == {"non-targeting": 60, "A": 30}
    ours, _ = to_cell_eval(real, make_cells(["NT", "A"], seed=2), **ARGUMENTS)  # not asked for
    assert dict(ours.obs["target"].value_counts()) == {"non-targeting": 30, "A": 30}


def test_files(real, tmp_path) -> None:
    paths = write_cell_eval(real, make_cells(["A", "B"], seed=2), tmp_path / "new", **ARGUMENTS)
    assert [p.name for p in paths] == ["real.h5ad", "predicted.h5ad"]
    for path, adata in zip(paths, to_cell_eval(real, make_cells(["A", "B"], seed=2), **ARGUMENTS), strict=True):
        read = ad.read_h5ad(path)
        np.testing.assert_array_equal(read.X.toarray(), adata.X.toarray())
        assert list(read.obs["target"]) == list(adata.obs["target"])


def test_bad_input(real) -> None:
    with pytest.raises(ValueError, match="without any"):
        to_cell_eval(real, make_cells(["Z"], seed=2), **ARGUMENTS)
    with pytest.raises(ValueError, match="genes of `real`"):
        to_cell_eval(real, make_cells(["A"], seed=2)[:, :5].copy(), **ARGUMENTS)


def test_missing_package(real, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cell_eval2", None)
    with pytest.raises(ImportError, match=r"scvi-cradle\[cell-eval\]"):
        cell_eval_scores(real, real, **ARGUMENTS)


@pytest.mark.filterwarnings("ignore")  # of cell-eval2 and what it uses
def test_scores_of_cell_eval(real) -> None:
    pytest.importorskip("cell_eval2")
    good = cell_eval_scores(real, make_cells(["NT", "A", "B", "C"], seed=2), **ARGUMENTS)
    assert {"value", "aggregation", "baseline"} == set(good.columns)
    assert good.loc["pds_cosine", "value"] == 1.0
    assert good.loc["pds_cosine", "baseline"] < 1.0
    assert np.isfinite(good["value"]).all()
