import inspect
import linecache
import logging
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_cradle import pp
from scvi_cradle._qc import fit_thresholds, flag_cells, gene_set_masks, qc_metrics

CRITERIA = ("total_counts", "n_genes", "pct_mt", "pct_ribo", "pct_hb")
GENES = ["MT-ND1", "RPS3", "HBB", "A", "B", "C"]


def make_adata(counts=None, genes=GENES, **obs) -> ad.AnnData:
    if counts is None:
        rng = np.random.default_rng(0)
        counts = rng.poisson([6.0, 6.0, 2.0, 20.0, 20.0, 0.5], size=(60, 6))
    counts = counts if sp.issparse(counts) else np.asarray(counts, dtype=np.float32)
    index = [f"c{i}" for i in range(counts.shape[0])]
    adata = ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=list(genes)))
    adata.obs_names = index
    for key, value in obs.items():
        adata.obs[key] = value
    return adata


def quiet_label(adata, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return pp.qc_label(adata, **{"doublets": None, **kwargs})


def messages(adata, **kwargs) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pp.qc_label(adata, **{"doublets": None, **kwargs})
    assert all("pp.qc_label(" in linecache.getline(w.filename, w.lineno) for w in caught)
    return [str(w.message) for w in caught]


def with_totals(totals, mt=None, ribo=None, hb=None) -> ad.AnnData:
    """Cells with the given totals and counts of the gene sets; the rest lies on one gene."""
    totals = np.asarray(totals, dtype=float)
    sets = [np.zeros_like(totals) if s is None else np.asarray(s, dtype=float) for s in (mt, ribo, hb)]
    return make_adata(np.column_stack([*sets, totals - sum(sets)]), genes=["MT-ND1", "RPS3", "HBB", "A"])


@pytest.mark.parametrize(
    ("genes", "name"),
    [
        ("MT-ND1 mt-Nd1 MT-CO2", "mt"),
        ("RPS3 Rpl7a RPLP0", "ribo"),
        (
            "HBA1 HBA2 HBA HBB HBD HBE1 HBG1 HBG2 HBM HBQ1 HBQ1A HBQ1B HBZ hbb Hba-a1 Hba-a2 Hba-x "
            "Hbb-bs Hbb-bt Hbb-b1 Hbb-b2 Hbb-bh1 Hbb-y",
            "hb",
        ),
        ("HBEGF HBS1L HBP1 HBBP1 HBZP1 MTOR MT1X MTND1P23 RPA1 MRPS5 Hbegf Hbp1", None),
    ],
)
def test_gene_sets_by_symbol(genes, name):
    masks = gene_set_masks(pd.DataFrame(index=genes.split()))
    for other, mask in masks.items():
        assert mask.all() if other == name else not mask.any()


def test_boolean_var_column_replaces_the_symbols():
    var = pd.DataFrame({"hb": [0, 1]}, index=["HBB", "MT-ND1"])
    masks = gene_set_masks(var)
    assert masks["hb"].tolist() == [False, True]
    assert masks["mt"].tolist() == [False, True]


def test_metrics_by_hand():
    counts = np.array([[1, 2, 0, 5, 0, 0], [0, 0, 3, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    stored = sp.csr_matrix(counts.astype(np.float32))
    stored.data[0] = 0.0  # an explicit zero is no detected gene
    table = qc_metrics(stored, gene_set_masks(pd.DataFrame(index=GENES)))
    assert table["total_counts"].tolist() == [7.0, 6.0, 0.0]
    assert table["n_genes"].tolist() == [2.0, 4.0, 0.0]
    np.testing.assert_array_equal(table["pct_mt"], [0.0, 0.0, np.nan])
    np.testing.assert_array_equal(table["pct_ribo"], [200 / 7, 0.0, np.nan])
    np.testing.assert_array_equal(table["pct_hb"], [0.0, 50.0, np.nan])
    assert (table.dtypes == np.float64).all()


def test_sums_are_exact_where_float32_is_not():
    counts = np.array([[2**24, 1, 0, 1, 1, 1]], dtype=np.float32)
    assert qc_metrics(counts, gene_set_masks(pd.DataFrame(index=GENES)))["total_counts"][0] == 2**24 + 4


def test_the_papers_rule_on_six_cells():
    metrics = pd.DataFrame({"total_counts": [10, 12, 11, 13, 12, 40], "pct_mt": [10, 12, 11, 13, 12, 40]}, dtype=float)
    fitted = fit_thresholds(metrics, ("total_counts", "pct_mt"), flavor="cradle", n_mads=3)
    low, high = fitted["thresholds"]["total_counts"], fitted["thresholds"]["pct_mt"]
    assert (low["median"], low["mad"], low["lower"], low["upper"]) == (12.0, 1.0, 9.0, np.inf)
    assert (high["median"], high["mad"], high["lower"], high["upper"]) == (12.0, 1.0, -np.inf, 15.0)
    record = {**fitted, "flavor": "cradle", "criteria": ["total_counts", "pct_mt"]}
    flags = flag_cells(metrics, record)
    assert flags["total_counts"].tolist() == [False] * 6
    assert flags["pct_mt"].tolist() == [False] * 5 + [True]


def test_comparisons_are_strict():
    metrics = pd.DataFrame({"total_counts": [10.0, 12, 11, 13, 12, 40], "pct_mt": [10.0, 12, 11, 13, 12, 40]})
    record = fit_thresholds(metrics, ("total_counts", "pct_mt"), n_mads=3)
    record |= {"flavor": "cradle", "criteria": ["total_counts", "pct_mt"]}
    probe = pd.DataFrame({"total_counts": [9.0, 8.999, 9.0, 9.0], "pct_mt": [15.0, 15.0, 15.001, np.nan]})
    flags = flag_cells(probe, record)
    assert flags["total_counts"].tolist() == [False, True, False, False]
    assert flags["pct_mt"].tolist() == [False, False, True, False]


def test_cradle_flags_of_every_criterion():
    totals = np.array([1000, 1010, 990, 1020, 980, 400, 5000])
    tenths = [100, 101, 99, 102, 98, 40, 500]  # 10 % of each total
    adata = with_totals(totals, mt=[*tenths[:5], 40, 900], ribo=[*tenths[:5], 90, 500], hb=[*tenths[:5], 40, 501])
    quiet_label(adata, n_mads=3, criteria=("total_counts", "pct_mt", "pct_ribo", "pct_hb"))
    # totals: median 1000, deviations 0 10 10 20 20 600 4000, MAD 20, lower bound 940
    assert adata.obs["qc_total_counts"].tolist() == [False] * 5 + [True, False]
    # percentages: median 10, MAD 0, bound 10
    assert adata.obs["qc_pct_mt"].tolist() == [False] * 6 + [True]
    assert adata.obs["qc_pct_ribo"].tolist() == [False] * 5 + [True, False]
    assert adata.obs["qc_pct_hb"].tolist() == [False] * 6 + [True]
    assert adata.obs["artifact"].tolist() == [False] * 5 + [True, True]
    assert "qc_n_genes" not in adata.obs
    assert adata.obs["qc_pct_mt"].dtype == bool


def test_robust_flags_both_tails_of_counts_on_the_log_scale():
    totals = np.array([900, 950, 1000, 1050, 1100, 100, 9000])
    adata = with_totals(totals, mt=[90, 95, 100, 105, 110, 10, 2000])
    quiet_label(adata, n_mads=3, flavor="robust", criteria=("total_counts", "pct_mt"))
    logs = np.log1p(totals)
    median = np.median(logs)
    width = 3 * 1.4826 * np.median(np.abs(logs - median))
    bounds = adata.uns["qc_label"]["thresholds"]["total_counts"]
    np.testing.assert_allclose([bounds["lower"][0], bounds["upper"][0]], [median - width, median + width], rtol=1e-12)
    assert adata.obs["qc_total_counts"].tolist() == [False] * 5 + [True, True]
    assert adata.obs["qc_pct_mt"].tolist() == [False] * 6 + [True]


def test_robust_percentages_have_no_lower_tail():
    adata = with_totals([100] * 5, mt=[0, 20, 21, 22, 23])
    quiet_label(adata, n_mads=1, flavor="robust", criteria=("pct_mt",))
    upper = adata.uns["qc_label"]["thresholds"]["pct_mt"]["upper"][0]
    assert upper == pytest.approx(21 + 1.4826 * 1)
    assert adata.obs["artifact"].tolist() == [False] * 4 + [True]


def test_gene_number_lower_tail():
    counts = np.ones((7, 12))
    for row, n in enumerate([10, 11, 12, 11, 10, 11, 3]):
        counts[row, n:] = 0
    adata = make_adata(counts, genes=[f"g{i}" for i in range(12)])
    quiet_label(adata, n_mads=3, criteria=("n_genes",))
    # median 11, deviations 1 0 1 0 1 0 8, MAD 1, bound 8
    assert adata.uns["qc_label"]["thresholds"]["n_genes"]["lower"][0] == 8.0
    assert adata.obs["qc_n_genes"].tolist() == [False] * 6 + [True]


def test_columns_written_and_union_of_this_call_only():
    adata = make_adata(qc_pct_hb=True)
    before = set(adata.obs.columns)
    quiet_label(adata, criteria=("total_counts", "pct_mt"), key_added="failed")
    scanpys = {"total_counts", "n_genes_by_counts", "pct_counts_mt", "pct_counts_ribo", "pct_counts_hb"}
    assert set(adata.obs.columns) - before == {"qc_total_counts", "qc_pct_mt", "failed"} | scanpys
    assert adata.obs["failed"].tolist() == (adata.obs["qc_total_counts"] | adata.obs["qc_pct_mt"]).tolist()
    assert not adata.obs["failed"].all()


def test_numeric_columns_agree_with_scanpy():
    sc = pytest.importorskip("scanpy")
    adata = make_adata()
    quiet_label(adata)
    twin = make_adata()
    for name, mask in gene_set_masks(twin.var).items():
        twin.var[name] = mask
    sc.pp.calculate_qc_metrics(twin, qc_vars=["mt", "ribo", "hb"], percent_top=None, log1p=False, inplace=True)
    for column in ("total_counts", "n_genes_by_counts", "pct_counts_mt", "pct_counts_ribo", "pct_counts_hb"):
        np.testing.assert_allclose(adata.obs[column], twin.obs[column], rtol=1e-6)


def test_batches_have_their_own_thresholds():
    totals = np.array([100, 101, 99, 102, 98, 60, 1000, 1010, 990, 1020, 980, 600])
    adata = with_totals(totals)
    adata.obs["lane"] = pd.Categorical(["b/2"] * 6 + ["a"] * 6, categories=["b/2", "a", "unused"])
    quiet_label(adata, n_mads=3, criteria=("total_counts",), batch_key="lane")
    record = adata.uns["qc_label"]
    assert record["batches"].tolist() == ["a", "b/2"]
    np.testing.assert_array_equal(record["n_cells"], [6, 6])
    # a: median 995, deviations 5 15 5 25 15 395, MAD 15; b/2: median 99.5, deviations .5 1.5 .5 2.5 1.5 39.5, MAD 1.5
    np.testing.assert_array_equal(record["thresholds"]["total_counts"]["lower"], [950.0, 95.0])
    assert np.flatnonzero(adata.obs["artifact"]).tolist() == [5, 11]


def test_reference_cells_set_the_thresholds_for_all():
    totals = [100, 101, 99, 102, 98, 50, 50, 50, 50, 50, 50, 50]
    adata = with_totals(totals)
    adata.obs["train"] = np.arange(12) < 5
    quiet_label(adata, n_mads=3, criteria=("total_counts",), reference="train")
    assert adata.uns["qc_label"]["thresholds"]["total_counts"]["lower"][0] == 97.0
    assert adata.obs["artifact"].tolist() == [False] * 5 + [True] * 7
    by_mask = with_totals(totals)
    quiet_label(by_mask, n_mads=3, criteria=("total_counts",), reference=np.arange(12) < 5)
    assert by_mask.obs["artifact"].tolist() == adata.obs["artifact"].tolist()
    assert (adata.uns["qc_label"]["reference"], by_mask.uns["qc_label"]["reference"]) == ("train", "mask")


def test_stored_thresholds_judge_new_cells():
    fitted = with_totals([100, 101, 99, 102, 98])
    quiet_label(fitted, n_mads=3, criteria=("total_counts", "pct_mt"))
    new = with_totals([96, 97, 500], mt=[0, 0, 1])[:, ["A", "HBB", "RPS3", "MT-ND1"]].copy()
    quiet_label(new, thresholds=fitted.uns["qc_label"], doublets="scrublet")  # without doublets, as fitted
    assert new.obs["qc_total_counts"].tolist() == [True, False, False]
    assert new.obs["qc_pct_mt"].tolist() == [False, False, True]
    assert set(new.uns["qc_label"]["criteria"]) == {"total_counts", "pct_mt"}
    one = with_totals([96, 97, 500], mt=[0, 0, 1])
    pp.qc_label(one, thresholds=new.uns["qc_label"], criteria=["pct_mt"])
    assert one.obs["artifact"].tolist() == [False, False, True]


def test_stored_thresholds_reproduce_the_flags_per_batch():
    adata = make_adata(lane=["x", "y"] * 30)
    quiet_label(adata, n_mads=2, batch_key="lane")
    again = make_adata(lane=["x", "y"] * 30)
    quiet_label(again, thresholds=adata.uns["qc_label"])
    pd.testing.assert_frame_equal(again.obs, adata.obs)


def test_thresholds_without_batch_are_their_mean_over_cells():
    metrics = pd.DataFrame({"total_counts": [1.0, 3.0, 10.0, 12.0, 11.0, 14.0]})
    record = fit_thresholds(metrics, ("total_counts",), n_mads=1, batches=list("aabbbb"))
    record |= {"flavor": "cradle", "criteria": ["total_counts"], "batch_key": "lane"}
    # bounds: a 2 - 1, b 11.5 - 1; weighted (1 * 2 + 10.5 * 4) / 6
    bound = 44 / 6
    probe = pd.DataFrame({"total_counts": [bound - 1e-6, bound + 1e-6]})
    assert flag_cells(probe, record)["total_counts"].tolist() == [True, False]
    assert flag_cells(probe, record, ["a", "b"])["total_counts"].tolist() == [False, True]


def test_one_batch_needs_no_batch_column():
    metrics = pd.DataFrame({"total_counts": [10.0, 12, 11, 13, 12, 40]})
    record = fit_thresholds(metrics, ("total_counts",), n_mads=3, batches=["only"] * 6)
    record |= {"flavor": "cradle", "criteria": ["total_counts"], "batch_key": "lane"}
    assert flag_cells(pd.DataFrame({"total_counts": [8.0, 9.0]}), record)["total_counts"].tolist() == [True, False]


def test_empty_cells_fail():
    adata = make_adata(np.vstack([np.tile([5, 5, 5, 20, 20, 20], (9, 1)), np.zeros((1, 6))]))
    quiet_label(adata, criteria=("pct_mt",))
    assert adata.obs["artifact"].tolist() == [False] * 9 + [True]
    quiet_label(adata)
    assert adata.obs["qc_total_counts"].tolist() == [False] * 9 + [True]


def as_dask(matrix):
    return pytest.importorskip("dask.array").from_array(matrix.toarray(), chunks=(13, 6))


@pytest.fixture(scope="module")
def expected():
    adata = make_adata()
    quiet_label(adata, n_mads=2)
    assert 0 < adata.obs["artifact"].sum() < 30
    return adata


@pytest.mark.parametrize(
    "store",
    [
        pytest.param(lambda x: x.toarray(), id="dense"),
        pytest.param(lambda x: x.toarray().astype(np.int32), id="integers"),
        pytest.param(lambda x: x.tocsc(), id="csc"),
        pytest.param(sp.csr_array, id="csr_array"),
        pytest.param(sp.csc_array, id="csc_array"),
        pytest.param(lambda x: as_dask(x), id="dask"),
        pytest.param(lambda x: as_dask(x).map_blocks(sp.csr_matrix, dtype=x.dtype), id="dask of csr"),
    ],
)
@pytest.mark.parametrize("layer", [None, "counts"])
def test_every_storage_gives_the_same_labels(store, layer, expected):
    adata = make_adata()
    stored = store(adata.X)
    if layer is None:
        adata.X = stored
    else:
        adata.layers[layer] = stored
        adata.X = None
    quiet_label(adata, n_mads=2, layer=layer)
    pd.testing.assert_frame_equal(adata.obs, expected.obs)
    after = adata.X if layer is None else adata.layers[layer]
    assert type(after) is type(stored)


@pytest.mark.parametrize("dense", [False, True])
def test_backed(tmp_path, dense, expected):
    adata = make_adata()
    if dense:
        adata.X = adata.X.toarray()
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    labelled = quiet_label(backed, n_mads=2, copy=True)
    assert not labelled.isbacked
    assert list(backed.obs.columns) == []
    pd.testing.assert_frame_equal(labelled.obs, expected.obs)
    quiet_label(backed, n_mads=2)
    assert backed.isbacked
    pd.testing.assert_frame_equal(backed.obs, expected.obs)
    with pytest.raises(ValueError, match=r"view of a backed"):
        pp.qc_label(backed[:20], doublets=None)
    backed.file.close()


def test_views_and_copies():
    adata = make_adata()
    view = adata[10:50]
    copied = quiet_label(view, copy=True)
    assert view.is_view
    assert list(adata.obs.columns) == list(view.obs.columns) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`", UserWarning)
        assert pp.qc_label(view, doublets=None) is None
    pd.testing.assert_frame_equal(view.obs, copied.obs)
    assert list(adata.obs.columns) == []
    np.testing.assert_array_equal(view.X.toarray(), adata.X[10:50].toarray())


@pytest.mark.parametrize("case", ["plain", "batches", "empty sets"])
def test_record_survives_h5ad(tmp_path, case):
    genes = GENES if case != "empty sets" else [f"g{i}" for i in range(6)]
    adata = make_adata(genes=genes, lane=["x/1", "y"] * 30, odd=np.arange(60) % 7 == 0)
    batch_key = "lane" if case == "batches" else None
    quiet_label(adata, n_mads=2, flavor="robust", batch_key=batch_key, reference="odd", doublets="odd")
    adata.write_h5ad(tmp_path / "a.h5ad")
    read = ad.read_h5ad(tmp_path / "a.h5ad")
    assert set(read.uns["qc_label"]) == set(adata.uns["qc_label"])
    again = make_adata(genes=genes, lane=["x/1", "y"] * 30, odd=np.arange(60) % 7 == 0)
    quiet_label(again, thresholds=read.uns["qc_label"], doublets="odd")
    pd.testing.assert_frame_equal(again.obs.drop(columns="lane"), adata.obs.drop(columns="lane"))
    again.write_h5ad(tmp_path / "b.h5ad")  # a record that was read can be written


def test_warns_of_mad_zero():
    found = messages(with_totals([100, 101, 99, 102, 98], hb=[0, 0, 0, 0, 3]), criteria=("pct_hb",))
    assert found == ["`pct_hb`, batch 'all': the MAD is 0, any positive value fails; consider leaving it out."]


def test_warns_of_mad_zero_off_zero():
    (text,) = messages(with_totals([100] * 5), criteria=("total_counts",))
    assert "`total_counts`, batch 'all': the MAD is 0, any value beyond the median fails" in text


def test_warns_of_bounds_that_never_flag():
    adata = with_totals([10, 20, 30, 40, 50, 10, 20, 30, 40, 50], mt=[1, 8, 15, 24, 35] * 2)
    adata.obs["lane"] = ["p"] * 5 + ["q"] * 5
    found = messages(adata, criteria=("total_counts", "pct_mt"), batch_key="lane")
    assert len(found) == 2
    assert "`total_counts`, batch 'p', 'q': the lower bound is negative and can never flag" in found[0]
    assert "`pct_mt`, batch 'p', 'q': the upper bound is 100 or more and can never flag" in found[1]


def test_warns_of_a_gene_set_without_genes():
    adata = make_adata(genes=["G1", "RPS3", "HBB", "A", "B", "C"])
    (text,) = messages(adata, criteria=("pct_mt",))
    assert text.startswith("`pct_mt`, batch 'all': no gene belongs to the set 'mt'")
    assert not adata.obs["artifact"].any()


def test_warns_when_more_than_half_fail():
    adata = with_totals([100, 101, 99, 102, 98] + [10] * 6)
    adata.obs["train"] = np.arange(11) < 5
    (text,) = messages(adata, criteria=("total_counts",), reference="train", n_mads=3)
    assert text == "`total_counts`, batch 'all': flags more than half of the cells (up to 55%)."


def test_warns_when_criteria_together_flag_more_than_half():
    adata = with_totals([100, 101, 99, 102, 98, 50, 50, 100, 100, 100], mt=[10] * 5 + [5, 5, 60, 60, 60])
    adata.obs["train"] = np.arange(10) < 5
    adata.obs["double"] = np.arange(10) == 0
    kwargs = {"criteria": ("total_counts", "pct_mt", "doublet"), "doublets": "double", "reference": "train"}
    (text,) = messages(adata, n_mads=3, **kwargs)
    assert text == "`all criteria together`, batch 'all': flags more than half of the cells (up to 60%)."


def test_no_warning_on_sound_data():
    rng = np.random.default_rng(1)
    counts = rng.poisson([[60.0, 50, 40, 200, 200, 100]] * 200)
    counts[:, 5] *= rng.random(200) < 0.5
    assert messages(make_adata(counts), criteria=("total_counts", "pct_mt", "pct_ribo", "pct_hb"), n_mads=3) == []


def test_doublets_from_a_column():
    double = np.arange(60) % 11 == 0
    adata = make_adata(double=double.astype(int))
    quiet_label(adata, criteria=("doublet",), doublets="double")
    assert adata.obs["artifact"].tolist() == double.tolist()
    assert adata.obs["qc_doublet"].dtype == bool


def test_without_doublets_the_criterion_is_left_out():
    adata = make_adata()
    quiet_label(adata, doublets=None)
    assert "qc_doublet" not in adata.obs
    assert tuple(adata.uns["qc_label"]["criteria"]) == CRITERIA


def test_signature_is_the_contract():
    defaults = {k: p.default for k, p in inspect.signature(pp.qc_label).parameters.items() if k != "adata"}
    assert defaults == {
        "n_mads": 5.0,
        "flavor": "cradle",
        "criteria": (*CRITERIA, "doublet"),
        "layer": None,
        "batch_key": None,
        "reference": None,
        "thresholds": None,
        "doublets": "scrublet",
        "key_added": "artifact",
        "copy": False,
        "seed": 0,
    }


def _bad_counts(value):
    counts = make_adata().X.toarray()
    counts[3, 3] = value
    return make_adata(counts)


def _record(**kwargs):
    adata = make_adata(lane=["x", "y"] * 30)
    quiet_label(adata, **kwargs)
    return adata.uns["qc_label"]


LANES = ["x", "z"] * 30
BAD = [
    ("negative", lambda: _bad_counts(-1), {}, ValueError, "negative values"),
    ("fractional", lambda: _bad_counts(0.5), {}, ValueError, "fractional values"),
    ("nan", lambda: _bad_counts(np.nan), {}, ValueError, "NaN or infinite"),
    ("layer", make_adata, {"layer": "count"}, KeyError, "`layer` must be a key"),
    ("n_mads", make_adata, {"n_mads": 0}, ValueError, "`n_mads` must be a positive number; received 0"),
    ("flavor", make_adata, {"flavor": "robst"}, ValueError, "did you mean 'robust'"),
    ("criterion", make_adata, {"criteria": ("pct_mito",)}, ValueError, "did you mean 'pct_mt'"),
    ("criteria text", make_adata, {"criteria": "pct_mt"}, ValueError, "`criteria` must list at least one"),
    ("criteria empty", make_adata, {"criteria": ()}, ValueError, "`criteria` must list at least one"),
    ("criteria twice", make_adata, {"criteria": ("pct_mt", "pct_mt")}, ValueError, "each once"),
    ("doublet alone", make_adata, {"criteria": ("doublet",)}, ValueError, "At least one criterion must be left"),
    ("doublets", make_adata, {"doublets": "scrubblet"}, KeyError, "a boolean column of `adata.obs` or None"),
    ("doublets text", lambda: make_adata(d="no"), {"doublets": "d"}, ValueError, "True/False or 0/1; received 'no'"),
    ("batch", make_adata, {"batch_key": "lane"}, KeyError, "`batch_key` must be a key"),
    ("batch nan", lambda: make_adata(b=[None, "x"] * 30), {"batch_key": "b"}, ValueError, "30 missing values"),
    ("reference", make_adata, {"reference": "train"}, KeyError, "`reference` must be a key"),
    ("reference size", make_adata, {"reference": [True]}, ValueError, "one entry per cell (60); received 1"),
    ("reference text", make_adata, {"reference": ["yes"] * 60}, ValueError, "True/False or 0/1"),
    ("reference none", make_adata, {"reference": [False] * 60}, ValueError, "none in 'all cells'"),
    (
        "reference batch",
        lambda: make_adata(b=LANES),
        {"reference": [True, False] * 30, "batch_key": "b"},
        ValueError,
        "received none in 'z'",
    ),
    ("var column", lambda: _with_var("mt", "yes"), {}, ValueError, "`var['mt']` must hold True/False"),
    ("key_added", make_adata, {"key_added": "qc_pct_mt"}, ValueError, "`key_added` must not be empty or the column"),
    ("seed", make_adata, {"seed": -1}, ValueError, "`seed`"),
    ("record", make_adata, {"thresholds": 3.0}, TypeError, "received float"),
    ("record part", make_adata, {"thresholds": {"flavor": "cradle"}}, ValueError, "without 'criteria'"),
    ("both", make_adata, {"thresholds": _record(), "n_mads": 3}, ValueError, "received 'n_mads' beside"),
    ("both flavor", make_adata, {"thresholds": _record(), "flavor": "robust"}, ValueError, "received 'flavor'"),
    ("both reference", make_adata, {"thresholds": _record(), "reference": [True] * 60}, ValueError, "'reference'"),
    ("other genes", lambda: make_adata(genes=[*GENES[:5], "D"]), {"thresholds": _record()}, ValueError, "gene set"),
    ("other set", lambda: _with_var("mt", False), {"thresholds": _record()}, ValueError, "another gene set"),
    (
        "unknown batch",
        lambda: make_adata(lane=LANES),
        {"thresholds": _record(batch_key="lane")},
        ValueError,
        "received 'z'",
    ),
    ("no batch", make_adata, {"thresholds": _record(batch_key="lane")}, KeyError, "`batch_key` must be a key"),
    (
        "not stored",
        make_adata,
        {"thresholds": _record(criteria=("pct_mt",)), "criteria": ("pct_hb",)},
        ValueError,
        "received 'pct_hb', stored: 'pct_mt'",
    ),
]


def _with_var(name, value):
    adata = make_adata()
    adata.var[name] = value
    return adata


@pytest.mark.parametrize(("make", "kwargs", "error", "part"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_leaves_the_data_alone(make, kwargs, error, part):
    adata, before = make(), make()
    with pytest.raises(error) as caught:
        quiet_label(adata, **kwargs)
    assert part in str(caught.value)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    np.testing.assert_array_equal(adata.X.toarray(), before.X.toarray())
    assert not adata.uns
    assert not adata.layers


def test_says_nothing_on_standard_output(capsys, caplog):
    with caplog.at_level(logging.DEBUG):
        quiet_label(make_adata())
    assert capsys.readouterr().out == ""
