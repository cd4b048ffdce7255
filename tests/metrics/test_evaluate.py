from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_cradle.metrics import (
    ate_pearson,
    ate_r2,
    average_treatment_effects,
    evaluate,
    jaccard_top_k,
    pearson_delta,
    perturbation_discrimination,
)
from scvi_cradle.metrics._panel import Panel, score_panel
from scvi_cradle.metrics._report import build_report

METRICS = {
    "pearson_delta",
    "pearson_delta_perturbed_mean",
    "pearson_delta_top_20",
    "perturbation_discrimination",
    "ate_pearson",
    "ate_r2",
    "ate_pearson_top_20",
    "ate_r2_top_20",
    "jaccard_top_20",
    "jaccard_top_50",
    "energy_distance",
}
COLUMNS = [
    *("value", "ci_low", "ci_high", "baseline", "ceiling", "scaled", "scaled_low", "scaled_high"),
    *("n_perturbations", "note"),
]
LABELS = [f"p{i}" for i in range(8)]


def make_screen(
    effect: float = 2.0, n_cells: int = 40, n_controls: int = 60, seed: int = 0, prefix: str = "c"
) -> ad.AnnData:
    """Poisson counts of 60 genes: all perturbations share a shift of six genes, each moves six of its own."""
    base = np.random.default_rng(99).gamma(2.0, 2.0, size=60)
    rng = np.random.default_rng(seed)
    labels = np.array(["control"] * n_controls + list(np.repeat(LABELS, n_cells)))
    rate = np.tile(base, (len(labels), 1))
    rate[n_controls:, 54:] *= 2.0 ** (effect / 2)
    for i, name in enumerate(LABELS):
        rate[np.ix_(labels == name, 6 * i + np.arange(6))] *= 2.0 ** (effect * np.resize([1, -1], 6))
    obs = pd.DataFrame({"perturbation": labels}, index=[f"{prefix}{i}" for i in range(len(labels))])
    var = pd.DataFrame(index=[f"g{i}" for i in range(60)])
    return ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs, var=var)


def without_controls(adata: ad.AnnData) -> ad.AnnData:
    return adata[adata.obs["perturbation"] != "control"].copy()


@pytest.fixture(scope="module")
def real() -> ad.AnnData:
    return make_screen(seed=1, prefix="real")


@pytest.fixture(scope="module")
def replicate() -> ad.AnnData:
    return make_screen(seed=2, prefix="rep")


@pytest.fixture(scope="module")
def train() -> ad.AnnData:
    return make_screen(seed=3, prefix="train")


@pytest.fixture(scope="module")
def report(real, replicate, train) -> pd.DataFrame:
    return evaluate(real, replicate, train=train)


def test_form(report) -> None:
    assert set(report.index) == METRICS
    assert report.index.name == "metric"
    assert list(report.columns) == COLUMNS
    assert (report["n_perturbations"] == 8).all()
    assert report["note"].str.len().gt(0).all()
    numbers = report[["value", "ci_low", "ci_high", "baseline", "ceiling"]].to_numpy(dtype=float)
    assert np.isfinite(numbers).all()


def test_values_are_those_of_the_pair_metrics(report, real, replicate, train) -> None:
    x, y, z = (average_treatment_effects(a, "perturbation") for a in (real, replicate, train))
    np.testing.assert_allclose(report.loc["pearson_delta", "value"], pearson_delta(x, y))
    np.testing.assert_allclose(report.loc["ate_pearson", "value"], ate_pearson(x, y))
    np.testing.assert_allclose(report.loc["ate_r2", "value"], ate_r2(x, y))
    np.testing.assert_allclose(report.loc["jaccard_top_20", "value"], jaccard_top_k(x, y, 20))
    np.testing.assert_allclose(report.loc["perturbation_discrimination", "value"], perturbation_discrimination(x, y))
    mean = np.tile(z.X.mean(axis=0), (8, 1))
    np.testing.assert_allclose(report.loc["ate_pearson", "baseline"], ate_pearson(x, mean))
    np.testing.assert_allclose(report.loc["ate_r2", "baseline"], ate_r2(x, mean))
    np.testing.assert_allclose(report.loc["jaccard_top_20", "baseline"], jaccard_top_k(x, mean, 20))


def test_perturbed_mean_by_hand(report, real, replicate, train) -> None:
    def log_means(adata):
        counts = adata.X.toarray().astype(float)
        logged = np.log2(1 + 1e4 * counts / counts.sum(axis=1, keepdims=True))
        return pd.DataFrame(logged).groupby(adata.obs["perturbation"].to_numpy()).mean()

    x, y, z = map(log_means, (real, replicate, train))
    truth = x.loc[LABELS] - z.loc[LABELS].mean()
    predicted = (y.loc[LABELS] - y.loc["control"]) - (z.loc[LABELS].mean() - z.loc["control"])
    rows = [np.corrcoef(truth.loc[p], predicted.loc[p])[0, 1] for p in LABELS]
    np.testing.assert_allclose(report.loc["pearson_delta_perturbed_mean", "value"], np.mean(rows))
    assert report.loc["pearson_delta_perturbed_mean", "baseline"] == 0.0


def test_scaled_is_zero_for_the_baseline_and_about_one_for_a_repeat(report, real, train) -> None:
    expected = (report["value"] - report["baseline"]) / (report["ceiling"] - report["baseline"])
    better = report["ceiling"] > report["baseline"]
    defined = better.where(report.index != "energy_distance", ~better)
    assert defined.sum() >= 9
    np.testing.assert_allclose(report.loc[defined, "scaled"], expected[defined])
    assert report.loc[~defined, "scaled"].isna().all()
    assert report.loc[~defined, "note"].str.contains("scaled is undefined").all()
    assert report.loc["pearson_delta", "scaled"] == pytest.approx(1.0, abs=0.1)
    assert report.loc["perturbation_discrimination", "baseline"] == pytest.approx(0.5)
    pooled = without_controls(train)
    rng = np.random.default_rng(0)
    cells = [pooled[rng.choice(pooled.n_obs, 300)].X for _ in LABELS]
    obs = pd.DataFrame({"perturbation": np.repeat(["control", *LABELS], [60] + [300] * 8)})
    obs.index = [f"m{i}" for i in range(len(obs))]
    control = train[train.obs["perturbation"] == "control"].X
    same_for_all = ad.AnnData(sp.vstack([control, *cells]).tocsr(), obs=obs, var=train.var)
    table = evaluate(real, same_for_all, train=train)
    assert table.loc["pearson_delta", "scaled"] == pytest.approx(0.0, abs=0.1)
    assert table.loc["ate_r2", "scaled"] == pytest.approx(0.0, abs=0.1)


def test_intervals(report, real, replicate, train) -> None:
    assert (report["ci_low"] <= report["value"]).all()
    assert (report["value"] <= report["ci_high"]).all()
    assert (
        report.loc[["pearson_delta", "ate_pearson"], "ci_low"] < report.loc[["pearson_delta", "ate_pearson"], "ci_high"]
    ).all()
    again = evaluate(real, replicate, train=train)
    pd.testing.assert_frame_equal(report, again)
    none = evaluate(real, replicate, train=train, n_bootstrap=0)
    np.testing.assert_array_equal(none["ci_low"], none["value"])
    assert none["note"].str.contains("no interval: n_bootstrap=0").all()
    np.testing.assert_allclose(none["value"], report["value"], rtol=1e-12)  # products of other shapes round otherwise


@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_intervals_cover_the_score_of_all_perturbations(spread) -> None:
    """95 % intervals from 20 perturbations of different strength against the score of 4,000."""
    rng = np.random.default_rng(0)
    effects = np.exp(spread * rng.normal(size=(4000, 1))) * rng.normal(size=(4000, 40))
    truth, guess = (effects + noise * rng.normal(size=effects.shape) for noise in (0.5, 1.0))
    everything = np.ones(40, dtype=bool)
    names = ["pearson_delta", "pearson_delta_top_20", "ate_pearson", "ate_r2", "jaccard_top_20"]
    overall = score_panel(Panel(truth, guess, truth, guess, everything))
    hits = dict.fromkeys(names, 0)
    for _ in range(200):
        rows = rng.choice(4000, size=20, replace=False)
        part = Panel(truth[rows], guess[rows], truth[rows], guess[rows], everything)
        table = build_report(
            *(part, part), lambda _, w: np.ones(len(w)), names=names, n_bootstrap=100, rng=rng, notes=[]
        )
        for name in names:
            hits[name] += table.loc[name, "ci_low"] <= overall[name] <= table.loc[name, "ci_high"]
    # three standard errors of 200 runs are .046; strongly unequal perturbations cost some coverage
    assert min(hits.values()) >= (0.84 if spread else 0.89) * 200, hits
    assert max(hits.values()) <= 0.995 * 200, hits


def test_null_prediction_without_controls_does_not_profit_from_the_truths_controls() -> None:
    values, naive = [], []
    for seed in range(8):
        truth = make_screen(effect=0.0, n_cells=20, n_controls=20, seed=seed, prefix="t")
        other = make_screen(effect=0.0, n_cells=20, n_controls=20, seed=100 + seed, prefix="o")
        table = evaluate(truth, without_controls(other), train=other, n_bootstrap=0)
        values.append(table.loc["ate_pearson", "value"])
        mixed = ad.concat([without_controls(other), truth[truth.obs["perturbation"] == "control"]])
        naive.append(evaluate(truth, mixed, train=other, n_bootstrap=0).loc["ate_pearson", "value"])
    assert abs(np.mean(values)) < 0.15
    assert np.mean(naive) > 0.3


def test_notes_say_what_was_done(real, replicate, train) -> None:
    full = evaluate(real, replicate, train=train, n_bootstrap=0)["note"].iloc[0]
    assert "prediction against its own controls" in full
    assert "baseline: mean effect of `train`" in full
    bare = evaluate(real, without_controls(replicate), n_bootstrap=0)["note"].iloc[0]
    assert "`predicted` holds no controls" in bare
    assert "every perturbation of `real` is scored" in bare
    some = replicate[replicate.obs["perturbation"].isin(["p0", "p1", "control"])].copy()
    part = evaluate(real, some, n_bootstrap=0)
    assert "mean effect of the 6 perturbations of `real` that are not scored" in part["note"].iloc[0]
    assert (part["n_perturbations"] == 2).all()
    leaked = evaluate(real, replicate, train=real, n_bootstrap=0)["note"].iloc[0]
    assert "60 control cells of `real` are also in `train`" in leaked
    assert "`train`: shared" not in full
    jaccard = evaluate(real, replicate, train=train, n_bootstrap=0).loc["jaccard_top_20", "note"]
    assert "by chance 0.203" in jaccard


def test_one_perturbation_is_defined_and_said(real, replicate, train) -> None:
    one = replicate[replicate.obs["perturbation"].isin(["p3", "control"])].copy()
    table = evaluate(real, one, train=train)
    assert table.loc["perturbation_discrimination", "value"] == 0.5
    assert "one perturbation: undefined" in table.loc["perturbation_discrimination", "note"]
    assert np.isnan(table.loc["perturbation_discrimination", "scaled"])
    assert "scaled is undefined" in table.loc["perturbation_discrimination", "note"]
    assert table["note"].str.contains("no interval: one perturbation").all()
    np.testing.assert_array_equal(table["ci_high"], table["value"])
    assert (table["n_perturbations"] == 1).all()


def test_prediction_of_nothing_is_defined_and_said(real, train) -> None:
    control = train[train.obs["perturbation"] == "control"].X
    obs = pd.DataFrame({"perturbation": np.repeat(["control", *LABELS], 60)})
    obs.index = [f"n{i}" for i in range(len(obs))]
    nothing = ad.AnnData(sp.vstack([control] * 9).tocsr(), obs=obs, var=train.var)
    table = evaluate(real, nothing, train=train)
    assert table.loc["pearson_delta", "value"] == 0.0
    assert "8 of 8 perturbations have a constant change" in table.loc["pearson_delta", "note"]
    assert table.loc["ate_pearson", "value"] == 0.0
    assert "set to 0" in table.loc["ate_pearson", "note"]
    assert table.loc["jaccard_top_20", "value"] == 0.0
    assert table.loc["perturbation_discrimination", "value"] == 0.5


def test_targets_are_left_out_of_the_discrimination_score(real, replicate, train) -> None:
    names = {f"g{6 * i}": f"p{i}" for i in range(8)}
    inputs = [a.copy() for a in (real, replicate, train)]
    for a in inputs:
        a.var_names = [names.get(g, g) for g in a.var_names]
    table = evaluate(inputs[0], inputs[1], train=inputs[2], n_bootstrap=0)
    assert "8 genes that are targets left out" in table.loc["perturbation_discrimination", "note"]
    plain = evaluate(real, replicate, train=train, n_bootstrap=0)
    assert table.loc["pearson_delta", "value"] == plain.loc["pearson_delta", "value"]


def test_names_decide(real, replicate, train, report) -> None:
    """Order of genes and cells, spelling of labels, the column and the layer of the prediction do not matter."""
    turned = replicate[::-1, ::-1].copy()
    turned.obs["perturbation"] = [f" {p}+ctrl" if p != "control" else "ctrl" for p in turned.obs["perturbation"]]
    truth = real.copy()
    truth.obs["target"] = truth.obs.pop("perturbation")
    truth.layers["raw"] = truth.X.copy()
    truth.X = truth.X * 0.5
    base = train.copy()
    base.obs["target"] = base.obs.pop("perturbation")
    base.layers["raw"] = base.X
    table = evaluate(truth, turned, perturbation_key="target", control=["control", "ctrl"], train=base, layer="raw")
    np.testing.assert_allclose(table["value"], report["value"])
    np.testing.assert_allclose(table["ceiling"].astype(float), report["ceiling"].astype(float))


def test_few_genes(real, replicate, train) -> None:
    table = evaluate(real[:, :45].copy(), replicate[:, :45].copy(), train=train[:, :45].copy(), n_bootstrap=0)
    assert "only 45 genes" in table.loc["jaccard_top_50", "note"]
    assert table.loc["jaccard_top_50", "value"] == 1.0


def only(adata: ad.AnnData, *labels: str) -> ad.AnnData:
    return adata[adata.obs["perturbation"].isin(labels)].copy()


def halved(adata: ad.AnnData) -> ad.AnnData:
    out = adata.copy()
    out.X = out.X * 0.5
    return out


def renamed(adata: ad.AnnData) -> ad.AnnData:
    out = adata.copy()
    out.obs["perturbation"] = out.obs["perturbation"].astype(str).replace("p0", "q")
    return out


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(lambda r, p, t: evaluate(r, p.X), TypeError, "`predicted` must be an AnnData", id="array"),
        pytest.param(lambda r, p, t: evaluate(r, p, perturbation_key="x"), KeyError, "`perturbation_key`", id="column"),
        pytest.param(lambda r, p, t: evaluate(r, p, layer="raw"), KeyError, "`layer`", id="layer"),
        pytest.param(lambda r, p, t: evaluate(r, p, control="NT"), ValueError, "must be a control", id="control token"),
        pytest.param(
            lambda r, p, t: evaluate(without_controls(r), p), ValueError, "must be a control", id="real without"
        ),
        pytest.param(
            lambda r, p, t: evaluate(r, p, train=without_controls(t)),
            ValueError,
            "must be a control",
            id="train without",
        ),
        pytest.param(
            lambda r, p, t: evaluate(r, p, train=only(t, "control")),
            ValueError,
            "`train` must hold cells",
            id="train control",
        ),
        pytest.param(
            lambda r, p, t: evaluate(r, only(p, "control")),
            ValueError,
            "`predicted` must hold cells",
            id="predicted control",
        ),
        pytest.param(
            lambda r, p, t: evaluate(r, halved(p)), ValueError, "`predicted.X` must hold raw counts", id="fractions"
        ),
        pytest.param(lambda r, p, t: evaluate(r, p[:, :50].copy()), ValueError, "genes of `real`", id="genes"),
        pytest.param(
            lambda r, p, t: evaluate(r, p, train=t[:, 1:].copy()),
            ValueError,
            "`train` must hold the genes",
            id="train genes",
        ),
        pytest.param(
            lambda r, p, t: evaluate(r, renamed(p)),
            ValueError,
            "must have real cells; received 'q'",
            id="unknown label",
        ),
        pytest.param(lambda r, p, t: evaluate(r, p, n_bootstrap=-1), ValueError, "`n_bootstrap`", id="bootstrap"),
        pytest.param(lambda r, p, t: evaluate(r[59:].copy(), p), ValueError, "two control cells", id="one control"),
    ],
)
def test_bad_inputs(call, error, message, real, replicate, train) -> None:
    before = [a.copy() for a in (real, replicate, train)]
    with pytest.raises(error, match=message):
        call(real, replicate, train)
    for now, then in zip((real, replicate, train), before, strict=True):
        pd.testing.assert_frame_equal(now.obs, then.obs)
        assert (now.X != then.X).nnz == 0
        assert not now.uns


def test_few_cells_leave_a_perturbation_out_of_what_is_scaled(real, replicate, train) -> None:
    """p0 has three cells: its score counts, but the ceiling does not know it and nothing is scaled over it."""
    rows = (real.obs["perturbation"] != "p0").to_numpy(copy=True)
    rows[np.flatnonzero(~rows)[:3]] = True
    few = real[rows].copy()
    table = evaluate(few, replicate, train=train, n_bootstrap=50)
    assert (table["n_perturbations"] == 8).all()
    assert table["note"].str.contains("without labels of too few cells").all()
    others = [x for x in LABELS if x != "p0"]
    kept = evaluate(
        few[few.obs["perturbation"] != "p0"].copy(),
        replicate[replicate.obs["perturbation"] != "p0"].copy(),
        train=train,
        n_bootstrap=0,
    )
    room = table["ceiling"] - kept["baseline"]
    names = ["pearson_delta", "ate_pearson", "ate_r2"]
    np.testing.assert_allclose(
        table.loc[names, "scaled"], ((kept["value"] - kept["baseline"]) / room)[names], rtol=1e-6
    )
    assert len(others) == kept["n_perturbations"].iloc[0]
    assert np.isfinite(table.loc[names, ["scaled_low", "scaled_high"]].to_numpy(dtype=float)).all()


def test_one_perturbation_needs_training_cells(real, replicate, train) -> None:
    one, other = (a[a.obs["perturbation"].isin(["p3", "control"])].copy() for a in (real, replicate))
    with pytest.raises(ValueError, match="pass `train`"):
        evaluate(one, other)
    table = evaluate(one, other, train=train)
    assert table.loc["pearson_delta_perturbed_mean", "ceiling"] > 0.5
    assert table.loc["pearson_delta_perturbed_mean", "scaled"] == pytest.approx(1.0, abs=0.2)


def test_cells_of_the_truth_in_another_input_are_said(real, replicate, train) -> None:
    note = evaluate(real, real, train=replicate, n_bootstrap=0)["note"].iloc[0]
    assert "320 perturbed cells of `real` are also in `predicted`" in note
    assert "`train`: it has seen" not in note


def test_a_ceiling_of_one_perturbation_has_no_interval(real, replicate, train) -> None:
    """Only p7 has enough cells for quarters: what is scaled is its score alone, without an interval."""
    rank = real.obs.groupby("perturbation", observed=True).cumcount().to_numpy()
    kept = real.obs["perturbation"].isin(["p7", "control"]).to_numpy() | (rank < 3)
    table = evaluate(real[kept].copy(), replicate, train=train, n_bootstrap=20)
    row = table.loc["pearson_delta"]
    assert row["scaled"] == row["scaled_low"] == row["scaled_high"]
    assert row["ci_low"] < row["ci_high"]
