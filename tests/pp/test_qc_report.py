import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import stats

from scvi_cradle import pp
from scvi_cradle._qc import association_table

COLUMNS = [
    "n_cells",
    "fail_rate",
    "control_fail_rate",
    "odds_ratio",
    "pvalue",
    "qvalue",
    "main_criterion",
    "confounded",
]


def cells(**groups: tuple[int, int]) -> pd.DataFrame:
    """One row per cell from ``label=(failed, passed)``."""
    rows = [(label, i < failed) for label, (failed, passed) in groups.items() for i in range(failed + passed)]
    return pd.DataFrame(rows, columns=["perturbation", "artifact"], index=[f"c{i}" for i in range(len(rows))])


def make_adata(obs: pd.DataFrame) -> AnnData:
    return AnnData(np.ones((len(obs), 1), dtype=np.float32), obs=obs)


def table_of(obs: pd.DataFrame, **kwargs) -> pd.DataFrame:
    return association_table(pd.Categorical(obs["perturbation"]), obs["artifact"].to_numpy(), "control", **kwargs)


def test_numbers_by_hand():
    table = table_of(cells(control=(10, 90), A=(12, 8), B=(2, 18)))
    assert list(table.columns) == COLUMNS
    assert table.index.tolist() == ["A", "B"]
    assert table.index.name == "perturbation"
    assert table["n_cells"].tolist() == [20, 20]
    np.testing.assert_allclose(table["fail_rate"], [0.6, 0.1])
    np.testing.assert_allclose(table["control_fail_rate"], [0.1, 0.1])
    np.testing.assert_allclose(table["odds_ratio"], [12 * 90 / (8 * 10), 1.0])
    expected = [stats.fisher_exact([[12, 8], [10, 90]]).pvalue, 1.0]
    np.testing.assert_allclose(table["pvalue"], expected)
    np.testing.assert_allclose(table["qvalue"], [2 * expected[0], 1.0])
    assert table["confounded"].tolist() == [True, False]
    assert table["main_criterion"].tolist() == ["", ""]


@pytest.mark.parametrize(
    ("control", "perturbed", "confounded"),
    [
        ((10, 90), (60, 40), True),
        ((60, 40), (10, 90), False),  # fails less often
        ((100, 9900), (600, 9400), False),  # certain, odds ratio 6, but only 5 points above
        ((5000, 5000), (6400, 3600), False),  # certain and 14 points above, odds ratio 1.8
        ((2, 8), (4, 6), False),  # 20 points above by chance
        ((0, 100), (60, 40), True),
    ],
)
def test_confounded_needs_evidence_and_size(control, perturbed, confounded):
    assert table_of(cells(control=control, A=perturbed))["confounded"].tolist() == [confounded]


def test_odds_ratio_is_finite_with_an_empty_cell():
    assert table_of(cells(control=(0, 10), A=(5, 5)))["odds_ratio"].item() == pytest.approx(5.5 * 10.5 / (5.5 * 0.5))


def test_main_criterion_is_the_largest_excess_over_controls():
    obs = cells(control=(10, 10), A=(10, 10), B=(0, 20))
    mt = np.zeros(60, dtype=bool)
    hb = np.zeros(60, dtype=bool)
    mt[:10], mt[20:28], hb[20:26] = True, True, True  # control: 50 % mt; A: 40 % mt, 30 % hb
    table = table_of(obs, criteria=pd.DataFrame({"pct_mt": mt, "pct_hb": hb}))
    assert table["main_criterion"].tolist() == ["pct_hb", ""]


def test_batches_remove_a_difference_between_batches():
    one, two = cells(control=(90, 10), A=(9, 1)), cells(control=(1, 9), A=(10, 90))
    obs = pd.concat([one, two], ignore_index=True)
    batches = ["one"] * len(one) + ["two"] * len(two)
    assert table_of(obs)["pvalue"].item() < 1e-8  # A sits in the good batch
    table = table_of(obs, batches=batches)
    assert table["pvalue"].item() == pytest.approx(1.0)
    assert table["odds_ratio"].item() == pytest.approx(1.0)
    assert table["control_fail_rate"].item() == pytest.approx((10 * 0.9 + 100 * 0.1) / 110)
    assert not table["confounded"].item()


def test_mantel_haenszel_by_hand():
    one, two = cells(control=(5, 15), A=(6, 4)), cells(control=(4, 36), A=(3, 7))
    table = table_of(pd.concat([one, two], ignore_index=True), batches=[1] * 30 + [2] * 50)
    odds = (6 * 15 / 30 + 3 * 36 / 50) / (4 * 5 / 30 + 7 * 4 / 50)
    excess = (6 - 10 * 11 / 30) + (3 - 10 * 7 / 50)
    variance = 10 * 20 * 11 * 19 / (30**2 * 29) + 10 * 40 * 7 * 43 / (50**2 * 49)
    assert table["odds_ratio"].item() == pytest.approx(odds)
    assert table["pvalue"].item() == pytest.approx(stats.chi2.sf(excess**2 / variance, 1))


def test_a_batch_without_controls_tells_nothing():
    obs = pd.concat([cells(control=(5, 15)), cells(A=(9, 1))], ignore_index=True)
    table = table_of(obs, batches=["x"] * 20 + ["y"] * 10)
    assert table["fail_rate"].item() == 0.9
    assert np.isnan(table["control_fail_rate"].item())
    assert table["pvalue"].item() == 1.0
    assert not table["confounded"].item()


def test_report_reads_labels_flags_and_criteria():
    obs = cells(NT=(2, 18), **{"B + A": (9, 1), "A+B": (9, 1), "A": (1, 9)})
    obs["qc_pct_hb"] = obs["artifact"]
    obs["qc_total_counts"] = 0
    obs["qc_other"] = "no criterion"
    adata = make_adata(obs.assign(artifact=obs["artifact"].astype(int)))
    before = adata.obs.copy()
    table = pp.qc_report(adata, "perturbation", control=["NT", "other"])
    assert table.index.tolist() == ["A", "A+B"]
    assert table["n_cells"].tolist() == [10, 20]
    assert table["main_criterion"].tolist() == ["", "pct_hb"]
    assert table["confounded"].tolist() == [False, True]
    assert table["confounded"].dtype == bool
    pd.testing.assert_frame_equal(adata.obs, before)


def test_report_by_batch():
    obs = pd.concat([cells(control=(90, 10), A=(9, 1)), cells(control=(1, 9), A=(10, 90))], ignore_index=True)
    obs.index = obs.index.astype(str)
    obs["lane"] = pd.Categorical([0] * 110 + [1] * 110)
    assert pp.qc_report(make_adata(obs), "perturbation", batch_key="lane")["odds_ratio"].item() == pytest.approx(1.0)


def test_controls_alone_give_an_empty_report():
    table = pp.qc_report(make_adata(cells(control=(3, 7))), "perturbation")
    assert list(table.columns) == COLUMNS
    assert table.empty


BAD = [
    ("label key", {}, {"perturbation_key": "label"}, KeyError, "`perturbation_key` must be a key"),
    ("artifact key", {}, {"artifact_key": "failed"}, KeyError, "run `pp.qc_label`"),
    ("batch key", {}, {"batch_key": "lane"}, KeyError, "`batch_key` must be a key"),
    ("no control", {}, {"control": "NT"}, ValueError, "'control' looks like one"),
    ("sep", {}, {"sep": ""}, ValueError, "`sep` must be"),
    ("empty part", {"perturbation": "A+"}, {}, ValueError, "Every part"),
    ("nan label", {"perturbation": np.nan}, {}, ValueError, "must not be missing"),
    ("flags text", {"artifact": "yes"}, {}, ValueError, "True/False or 0/1"),
    ("flags nan", {"artifact": np.nan}, {}, ValueError, "20 missing values"),
    ("flags 2", {"artifact": 2}, {}, ValueError, "received '2'"),
    ("criterion", {"qc_pct_mt": "no"}, {}, ValueError, "`obs['qc_pct_mt']`"),
    ("nan batch", {"lane": None}, {"batch_key": "lane"}, ValueError, "20 missing values"),
]


@pytest.mark.parametrize(("columns", "kwargs", "error", "part"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_leaves_the_data_alone(columns, kwargs, error, part):
    adata = make_adata(cells(control=(2, 8), A=(3, 7)).assign(**columns))
    before = adata.obs.copy()
    with pytest.raises(error) as caught:
        pp.qc_report(adata, **{"perturbation_key": "perturbation", **kwargs})
    assert part in str(caught.value)
    pd.testing.assert_frame_equal(adata.obs, before)


def test_the_table_needs_a_control():
    with pytest.raises(ValueError, match="At least one cell must be a control"):
        table_of(cells(A=(1, 1)))
