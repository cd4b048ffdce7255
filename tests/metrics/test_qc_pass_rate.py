import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_cradle import pp
from scvi_cradle.metrics._qc import qc_pass_rate

GENES = ["MT-ND1", "HBB", "RPS3", "A"]


def make_adata(totals, mt, labels, **obs) -> ad.AnnData:
    totals, mt = np.asarray(totals, dtype=np.float32), np.asarray(mt, dtype=np.float32)
    counts = np.column_stack([mt, np.zeros((len(totals), 2), dtype=np.float32), totals - mt])
    adata = ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=GENES))
    adata.obs_names = [f"c{i}" for i in range(len(totals))]
    adata.obs["perturbation"] = labels
    for key, value in obs.items():
        adata.obs[key] = value
    return adata


def label(adata, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pp.qc_label(adata, **{"n_mads": 3, "criteria": ("total_counts", "pct_mt"), "doublets": None, **kwargs})
    return adata


def make_real(**kwargs) -> ad.AnnData:
    """Bounds: totals 100 - 3 * 1 = 97; percentages 10.102 + 3 * 0.4456 = 11.4387."""
    totals = [100, 101, 99, 102, 98, 100, 100, 90]
    adata = make_adata(totals, [10, 11, 9, 12, 10, 10, 30, 9], ["control"] * 4 + ["A"] * 4)
    return label(adata, **kwargs)


def make_predicted(**obs) -> ad.AnnData:
    return make_adata([97, 96, 100, 100, 0, 500], [9, 9, 50, 10, 0, 50], ["A", "A", "A", "B", "B", "A"], **obs)


def test_rates_by_hand():
    real = make_real()
    bounds = real.uns["qc_label"]["thresholds"]
    assert bounds["total_counts"]["lower"][0] == 97.0
    assert bounds["pct_mt"]["upper"][0] == pytest.approx(11.4387, abs=1e-4)
    table = qc_pass_rate(real, make_predicted())
    assert table.index.tolist() == ["A", "B", "all"]
    assert table.index.name == "perturbation"
    assert table.columns.tolist() == [
        *("generated", "real", "real_passed"),
        *("generated_total_counts", "generated_pct_mt", "real_total_counts", "real_pct_mt"),
        *("n_generated", "n_real", "criteria_left_out"),
    ]
    np.testing.assert_allclose(table["generated"], [2 / 4, 1 / 2, 3 / 6])
    np.testing.assert_allclose(table["generated_total_counts"], [3 / 4, 1 / 2, 4 / 6])
    np.testing.assert_allclose(table["generated_pct_mt"], [3 / 4, 1 / 2, 4 / 6])
    np.testing.assert_allclose(table["real"], [2 / 4, np.nan, 2 / 4])
    np.testing.assert_allclose(table["real_total_counts"], [3 / 4, np.nan, 3 / 4])
    np.testing.assert_allclose(table["real_passed"], [1.0, np.nan, 1.0])
    assert table["n_generated"].tolist() == [4, 2, 6]
    assert table["n_real"].tolist() == [4, 0, 4]
    assert table["criteria_left_out"].tolist() == [""] * 3


def test_a_pass_is_a_pass_when_failures_dominate():
    real = make_real()
    bad = make_adata([10] * 8 + [100] * 2, [1] * 8 + [10] * 2, ["A"] * 10)
    assert qc_pass_rate(real, bad).loc["A", "generated"] == pytest.approx(0.2)


def test_labels_keep_the_order_of_the_prediction():
    predicted = make_adata([100] * 4, [10] * 4, ["Z", "A", "Z", "control"])
    assert qc_pass_rate(make_real(), predicted).index.tolist() == ["Z", "A", "control", "all"]


def test_the_doublet_criterion_is_left_out_and_named():
    adata = make_adata([100, 101, 99, 102, 98], [10] * 5, ["A"] * 5, double=[True, False, False, False, False])
    label(adata, criteria=("total_counts", "doublet"), doublets="double")
    table = qc_pass_rate(adata, make_predicted())
    assert set(table["criteria_left_out"]) == {"doublet"}
    assert not any("doublet" in c for c in table.columns)
    assert table.loc["A", "real"] == 1.0
    assert table.loc["A", "real_passed"] == 1.0


def test_real_passed_takes_the_flags_that_are_given():
    real = make_real()
    real.obs["mine"] = [False] * 6 + [False, True]
    assert qc_pass_rate(real, make_predicted(), artifact_key="mine").loc["A", "real_passed"] == pytest.approx(2 / 3)
    del real.obs["artifact"]
    assert np.isnan(qc_pass_rate(real, make_predicted()).loc["A", "real_passed"])


def test_thresholds_of_another_object_and_of_a_file(tmp_path):
    real = make_real()
    real.write_h5ad(tmp_path / "a.h5ad")
    read = ad.read_h5ad(tmp_path / "a.h5ad")
    expected = qc_pass_rate(real, make_predicted())
    pd.testing.assert_frame_equal(qc_pass_rate(read, make_predicted()), expected)
    record = real.uns.pop("qc_label")
    pd.testing.assert_frame_equal(qc_pass_rate(real, make_predicted(), thresholds=record), expected)


def test_gene_sets_are_those_of_the_record():
    real = make_adata([100, 101, 99, 102, 98], [10] * 5, ["A"] * 5)
    real.var["mt"] = [False, False, False, True]  # the gene "A" counts as mitochondrial
    label(real)
    generated = make_adata([100, 100], [10, 0], ["A", "A"])[:, GENES[::-1]].copy()
    table = qc_pass_rate(real, generated)
    assert table.loc["A", "generated_pct_mt"] == 0.5  # 90 % as in the data, then 100 %


def test_layer_of_the_record():
    real = make_real()
    real.layers["counts"], real.X = real.X.copy(), real.X * 0.5
    label(real, layer="counts")
    expected = qc_pass_rate(make_real(), make_predicted())
    pd.testing.assert_frame_equal(qc_pass_rate(real, make_predicted()), expected)
    predicted = make_predicted()
    predicted.layers["counts"], predicted.X = predicted.X.copy(), predicted.X * 0.5
    pd.testing.assert_frame_equal(qc_pass_rate(real, predicted, layer="counts"), expected)


def make_batched() -> ad.AnnData:
    totals = [100, 101, 99, 102, 98] + [200, 202, 198, 204, 196]
    adata = make_adata(totals, np.array(totals) // 10, ["A"] * 10, lane=["x"] * 5 + ["y"] * 5)
    return label(adata, batch_key="lane", criteria=("total_counts",))  # lower bounds 97 and 194, mean 145.5


def test_batches():
    predicted = make_adata([150, 150], [1, 1], ["A", "A"], lane=["x", "y"])
    table = qc_pass_rate(make_batched(), predicted)
    assert table.loc["A", ["generated", "real"]].tolist() == [0.5, 1.0]


def test_thresholds_per_batch_without_batches_are_averaged_with_a_warning():
    predicted = make_adata([150, 140], [1, 1], ["A", "A"])
    with pytest.warns(UserWarning, match=r"no `obs\['lane'\]`") as caught:
        table = qc_pass_rate(make_batched(), predicted)
    assert __file__ in [w.filename for w in caught]
    assert table.loc["A", ["generated", "real"]].tolist() == [0.5, 0.5]


def _changed(adata, **obs):
    for key, value in obs.items():
        adata.obs[key] = value
    return adata


def _without_record():
    real = make_real()
    del real.uns["qc_label"]
    return real


def _fraction():
    predicted = make_predicted()
    predicted.X = predicted.X * 0.3
    return predicted


BAD = [
    ("no record", _without_record, make_predicted, {}, ValueError, "run `pp.qc_label` on it"),
    ("record", make_real, make_predicted, {"thresholds": 5.0}, TypeError, "received float"),
    ("record part", make_real, make_predicted, {"thresholds": {}}, ValueError, "without 'flavor'"),
    ("key", make_real, make_predicted, {"perturbation_key": "label"}, KeyError, "`real.obs`"),
    (
        "key of predicted",
        lambda: _changed(make_real(), label="A"),
        make_predicted,
        {"perturbation_key": "label"},
        KeyError,
        "`predicted.obs`",
    ),
    ("layer", make_real, make_predicted, {"layer": "counts"}, KeyError, "`layer` must be a key"),
    ("artifact key", make_real, make_predicted, {"artifact_key": "failed"}, KeyError, "`artifact_key` must be a key"),
    (
        "artifact text",
        lambda: _changed(make_real(), artifact="no"),
        make_predicted,
        {},
        ValueError,
        "True/False or 0/1",
    ),
    ("means", make_real, _fraction, {}, ValueError, "`predicted.X` must hold raw counts; received fractional"),
    ("fewer genes", make_real, lambda: make_predicted()[:, :3].copy(), {}, ValueError, "`predicted` holds another"),
    ("fewer real genes", lambda: make_real()[:, :3].copy(), make_predicted, {}, ValueError, "`real` holds another"),
    (
        "unknown batch",
        make_batched,
        lambda: make_predicted(lane="z"),
        {},
        ValueError,
        "received 'z'",
    ),
    (
        "only doublets",
        lambda: label(_changed(make_real(), d=False), criteria=("doublet",), doublets="d"),
        make_predicted,
        {},
        ValueError,
        "received only 'doublet'",
    ),
]


@pytest.mark.parametrize(
    ("real", "predicted", "kwargs", "error", "part"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input_leaves_the_data_alone(real, predicted, kwargs, error, part):
    pair = real(), predicted()
    before = [(a.obs.copy(), a.X.toarray(), set(a.uns)) for a in pair]
    with pytest.raises(error) as caught:
        qc_pass_rate(*pair, **kwargs)
    assert part in str(caught.value)
    for adata, (obs, counts, uns) in zip(pair, before, strict=True):
        pd.testing.assert_frame_equal(adata.obs, obs)
        np.testing.assert_array_equal(adata.X.toarray(), counts)
        assert set(adata.uns) == uns
