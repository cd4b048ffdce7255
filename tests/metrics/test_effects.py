from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_cradle.metrics import average_treatment_effects


def make_cells(n_cells: int = 60, n_genes: int = 7, seed: int = 0) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(1.0, 2.0, size=n_genes), size=(n_cells, n_genes)).astype(np.float32)
    counts[0] = 0  # an empty cell
    labels = rng.choice(["control", "A", "B", "B+A", " A+ B", "ctl"], size=n_cells)
    obs = pd.DataFrame({"p": labels}, index=[f"c{i}" for i in range(n_cells)])
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


def brute_force(adata: ad.AnnData, method: str) -> tuple[dict, dict]:
    """Plain loops over dense cells."""
    x = adata.X.toarray().astype(np.float64)
    groups: dict[str, list] = {}
    for row, label in zip(x, adata.obs["p"], strict=True):
        parts = sorted(q.strip() for q in label.split("+"))
        name = "control" if parts in (["control"], ["ctl"]) else "+".join(parts)
        value = row if method == "mean" else (np.log2(1 + 1e4 * row / row.sum()) if row.sum() else 0 * row)
        groups.setdefault(name, []).append(value)
    mean = {k: np.mean(v, axis=0) for k, v in groups.items()}
    var = {k: np.var(v, axis=0, ddof=1) / len(v) for k, v in groups.items()}
    effects = {k: mean[k] - mean["control"] for k in mean if k != "control"}
    return effects, {k: np.sqrt(var[k] + var["control"]) for k in effects}


@pytest.mark.parametrize("method", ["perturbseq", "mean"])
def test_matches_plain_loops(method) -> None:
    adata = make_cells()
    result = average_treatment_effects(adata, "p", control=["control", "ctl"], method=method)
    effects, sem = brute_force(adata, method)
    assert list(result.obs_names) == ["A", "A+B", "B"]
    assert list(result.var_names) == list(adata.var_names)
    assert result.uns["control"] == "control"
    np.testing.assert_allclose(result.X, [effects[k] for k in result.obs_names], atol=1e-12)
    np.testing.assert_allclose(result.layers["sem"], [sem[k] for k in result.obs_names], atol=1e-12)


def test_hand_computed_effect() -> None:
    counts = np.array([[1, 1], [0, 0], [3, 1], [0, 4]], dtype=np.int64)
    adata = ad.AnnData(counts, obs=pd.DataFrame({"p": ["control", "control", "A", "A"]}, index=list("abcd")))
    result = average_treatment_effects(adata, "p")
    half, three, one = np.log2(5001), np.log2(7501), np.log2(2501)
    np.testing.assert_allclose(result.X[0], [three / 2 - half / 2, (one + np.log2(10001)) / 2 - half / 2])
    # two cells: variance of the mean is (difference / 2)^2
    np.testing.assert_allclose(result.layers["sem"][0, 0], np.hypot(three / 2, half / 2))
    np.testing.assert_allclose(result.var["control_mean"], half / 2)
    np.testing.assert_allclose(result.var["control_sem"], half / 2)
    assert result.obs.loc["A", "n_cells"] == 2
    assert result.uns["n_control_cells"] == 2


def as_dask(x):
    return pytest.importorskip("dask.array").from_array(x, chunks=(13, 7))


@pytest.mark.parametrize(
    "convert",
    [np.asarray, sp.csc_matrix, sp.csr_array, lambda x: sp.csr_matrix(x.astype(np.int32)), as_dask],
    ids=["dense", "csc", "csr_array", "int32", "dask"],
)
def test_storage_does_not_matter(convert) -> None:
    adata = make_cells()
    expected = average_treatment_effects(adata, "p", control=["control", "ctl"])
    other = ad.AnnData(obs=adata.obs, var=adata.var, layers={"raw": convert(adata.X.toarray())})
    result = average_treatment_effects(other, "p", control=["control", "ctl"], layer="raw")
    np.testing.assert_allclose(result.X, expected.X, atol=1e-12)
    np.testing.assert_allclose(result.layers["sem"], expected.layers["sem"], atol=1e-12)


def test_backed_and_view(tmp_path) -> None:
    adata = make_cells()
    expected = average_treatment_effects(adata, "p", control=["control", "ctl"])
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    np.testing.assert_allclose(average_treatment_effects(backed, "p", control=["control", "ctl"]).X, expected.X)
    backed.file.close()
    view = adata[::-1]
    np.testing.assert_allclose(average_treatment_effects(view, "p", control=["control", "ctl"]).X, expected.X)


def test_duplicate_entries_of_a_matrix_are_one_count() -> None:
    doubled = sp.csr_matrix((np.ones(6), np.array([0, 0, 1, 0, 1, 1]), np.array([0, 3, 6])), shape=(2, 2))
    adata = ad.AnnData(doubled, obs=pd.DataFrame({"p": ["control", "A"]}, index=["a", "b"]))
    result = average_treatment_effects(adata, "p")
    two, one = np.log2(1 + 2e4 / 3), np.log2(1 + 1e4 / 3)
    np.testing.assert_allclose(result.X[0], [one - two, two - one])


def test_more_cells_than_a_block_and_order_of_cells() -> None:
    rng = np.random.default_rng(1)
    n = 9000
    counts = sp.csr_matrix(rng.poisson(0.5, size=(n, 3)))
    obs = pd.DataFrame({"p": rng.choice(["control", "A"], size=n)}, index=[str(i) for i in range(n)])
    adata = ad.AnnData(counts, obs=obs)
    first, second = (average_treatment_effects(a, "p") for a in (adata, adata[rng.permutation(n)]))
    np.testing.assert_allclose(first.X, second.X, atol=1e-12)
    x = counts.toarray()
    logged = np.log2(1 + 1e4 * x / np.maximum(x.sum(1, keepdims=True), 1))
    treated = (obs["p"] == "A").to_numpy()
    np.testing.assert_allclose(first.X[0], logged[treated].mean(0) - logged[~treated].mean(0), atol=1e-12)


def test_single_cells_take_the_pooled_variance() -> None:
    counts = np.array([[1.0, 1], [3, 1], [5, 1], [9, 2]])
    obs = pd.DataFrame({"p": ["control"] * 3 + ["A"]}, index=list("abcd"))
    result = average_treatment_effects(ad.AnnData(counts, obs=obs), "p", method="mean")
    np.testing.assert_allclose(result.layers["sem"][0], np.sqrt([4.0 / 3 + 4.0, 0.0]))
    alone = average_treatment_effects(ad.AnnData(counts[2:], obs=obs[2:]), "p", method="mean")
    assert np.isposinf(alone.layers["sem"]).all()


def with_value(value: float) -> ad.AnnData:
    adata = make_cells()
    adata.X = adata.X.toarray()
    adata.X[3, 2] = value
    return adata


def relabelled(labels) -> ad.AnnData:
    adata = make_cells(n_cells=4)
    adata.obs["p"] = labels
    return adata


def doubled_genes() -> ad.AnnData:
    adata = make_cells(n_genes=2)
    with warnings.catch_warnings(action="ignore"):
        adata.var_names = ["g", "g"]
    return adata


def silent_copy(adata):
    with warnings.catch_warnings(action="ignore"):
        return adata.copy()


@pytest.mark.parametrize(
    ("make", "kwargs", "error", "message"),
    [
        pytest.param(
            make_cells, {"perturbation_key": "q"}, KeyError, "`perturbation_key` must be a key", id="no column"
        ),
        pytest.param(make_cells, {"layer": "raw"}, KeyError, "`layer` must be a key", id="no layer"),
        pytest.param(make_cells, {"control": "NT"}, ValueError, "At least one cell must be a control", id="no control"),
        pytest.param(make_cells, {"method": "median"}, ValueError, "`method` must be one of", id="method"),
        pytest.param(lambda: with_value(0.5), {}, ValueError, "fractional values", id="fraction"),
        pytest.param(lambda: with_value(-1), {}, ValueError, "negative values", id="negative"),
        pytest.param(lambda: with_value(np.nan), {}, ValueError, "NaN or infinite", id="nan"),
        pytest.param(
            lambda: relabelled(["control", "A", None, "B"]), {}, ValueError, "must not be missing", id="missing"
        ),
        pytest.param(
            lambda: relabelled(["control"] * 4), {}, ValueError, "at least one perturbation", id="only controls"
        ),
        pytest.param(doubled_genes, {}, ValueError, "Gene names must be unique", id="genes"),
        pytest.param(lambda: np.ones((2, 2)), {}, TypeError, "must be an AnnData", id="array"),
    ],
)
def test_bad_inputs_leave_the_data_alone(make, kwargs, error, message) -> None:
    adata = make()
    before = silent_copy(adata)
    arguments = {"perturbation_key": "p", **kwargs}
    with pytest.raises(error, match=message):
        average_treatment_effects(adata, arguments.pop("perturbation_key"), **arguments)
    if isinstance(adata, ad.AnnData):
        pd.testing.assert_frame_equal(adata.obs, before.obs)
        assert not adata.uns
        assert not adata.layers
        np.testing.assert_array_equal(sp.csr_matrix(adata.X).toarray(), sp.csr_matrix(before.X).toarray())


def test_input_is_not_changed() -> None:
    adata = make_cells()
    data = adata.X.data.copy()
    average_treatment_effects(adata, "p", control=["control", "ctl"])
    np.testing.assert_array_equal(adata.X.data, data)
    assert list(adata.obs.columns) == ["p"]
