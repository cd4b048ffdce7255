"""Figures: what is drawn, what is labelled, and what must not change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib import pyplot as plt

from scvi_cradle import pl, pp
from scvi_cradle.metrics import evaluate

mpl.use("Agg")
REPORT = ["pearson_delta", "ate_pearson", "ate_r2", "jaccard_top_20"]


def cells(n: int = 120, *, seed: int = 0, shift: float = 1.0) -> AnnData:
    rng = np.random.default_rng(seed)
    genes = ["MT-ND1", "MT-CO1", "RPL3", "RPS6", "HBB", *(f"G{i}" for i in range(20))]
    rates = np.exp(rng.normal(size=len(genes))) * 4 * shift
    depth = np.exp(rng.normal(scale=0.4, size=(n, 1)))
    labels = np.array(["control", "A", "B", "B+A"])[np.arange(n) % 4]
    obs = pd.DataFrame(
        {"perturbation": labels, "batch": np.array(["x", "y"])[np.arange(n) % 2]}, index=[f"c{i}" for i in range(n)]
    )
    return AnnData(rng.poisson(depth * rates).astype(np.float32), obs=obs, var=pd.DataFrame(index=genes))


def labelled(**kwargs: Any) -> AnnData:
    adata = cells()
    pp.qc_label(adata, n_mads=2, doublets=None, **kwargs)
    return adata


def effects(seed: int = 0, n: int = 3) -> pd.DataFrame:
    values = np.random.default_rng(seed).normal(size=(n, 30))
    return pd.DataFrame(values, index=["A", "B", "A+B"][:n], columns=[f"G{i}" for i in range(30)])


def table(value: float = 0.5, ceiling: float = 0.8) -> pd.DataFrame:
    row = {"value": value, "baseline": 0.2, "ceiling": ceiling}
    scaled = (value - 0.2) / (ceiling - 0.2) if ceiling > 0.2 else np.nan
    row |= {"scaled": scaled, "scaled_low": scaled - 0.2, "scaled_high": scaled + 0.2}
    return pd.DataFrame([row] * len(REPORT), index=REPORT)


def history() -> dict[str, pd.DataFrame]:
    epochs = pd.RangeIndex(20, name="epoch")
    names = ["elbo_train", "elbo_validation", "reconstruction_loss_train", "kl_local_train", "cf_kl_train", "lr"]
    return {name: pd.DataFrame({name: 1.0 / (1 + np.arange(20.0))}, index=epochs) for name in names}


DRAWINGS: dict[str, Callable[..., Any]] = {
    "qc_violin": lambda **kw: pl.qc_violin(labelled(), cells(60, seed=1), **kw),
    "qc_violin alone": lambda **kw: pl.qc_violin(labelled(), **kw),
    "qc_thresholds": lambda **kw: pl.qc_thresholds(labelled(), **kw),
    "qc_thresholds batches": lambda **kw: pl.qc_thresholds(labelled(batch_key="batch"), **kw),
    "treatment_effects": lambda **kw: pl.treatment_effects(effects(), effects(1), **kw),
    "training_history": lambda **kw: pl.training_history(history(), **kw),
    "evaluation": lambda **kw: pl.evaluation(table(), **kw),
    "evaluation of several": lambda **kw: pl.evaluation({"one": table(), "two": table(0.7)}, **kw),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_axes_is_labelled(name: str) -> None:
    result = DRAWINGS[name](show=False)
    axes = result if isinstance(result, list) else [result]
    figure = axes[0].get_figure()
    figure.canvas.draw()
    for ax in axes:
        ticks = [t.get_text() for t in ax.get_xticklabels()]
        assert ax.get_xlabel() or any(ticks)
        assert ax.get_ylabel() or any(t.get_text() for t in ax.get_yticklabels())


@pytest.mark.parametrize("name", DRAWINGS)
def test_save_writes_and_closes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "figure.png"
    DRAWINGS[name](save=path)
    assert path.stat().st_size > 5_000
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", ["qc_violin", "qc_thresholds", "treatment_effects", "training_history", "evaluation"])
def test_given_axes_are_used_and_stay_open(name: str, tmp_path: Path) -> None:
    n = 1 if name == "evaluation" else len(DRAWINGS[name](show=False))
    plt.close("all")
    figure, grid = plt.subplots(1, n)
    result = DRAWINGS[name](ax=grid, save=tmp_path / "figure.png")
    drawn = result if isinstance(result, list) else [result]
    assert [id(ax) for ax in drawn] == [id(ax) for ax in np.ravel(grid)]
    assert plt.get_fignums() == [figure.number]


def test_the_anndata_stays_as_it_is() -> None:
    adata, generated = labelled(), cells(60, seed=1)
    before = [(a.copy(), copy.deepcopy(dict(a.uns))) for a in (adata, generated)]
    pl.qc_violin(adata, generated, perturbation="A+B", show=False)
    pl.qc_thresholds(adata, show=False)
    for after, (was, uns) in zip((adata, generated), before, strict=True):
        assert (after.X == was.X).all()
        pd.testing.assert_frame_equal(after.obs, was.obs)
        pd.testing.assert_frame_equal(after.var, was.var)
        assert list(after.uns) == list(uns)


def test_violins_state_who_fails() -> None:
    adata = labelled()
    (ax,) = pl.qc_violin(adata, cells(60, seed=1, shift=0.05), criteria=["total_counts"], show=False)
    share = adata.obs["qc_total_counts"].mean()
    texts = [t.get_text() for t in ax.get_xticklabels()]
    assert 0 < share < 0.0995
    assert texts == [f"real\n{100 * share:.1f} % fail", "generated\n100 % fail"]


def test_violins_of_one_label_in_any_spelling() -> None:
    adata = labelled()
    axes = pl.qc_violin(adata, perturbation="A+B", show=False)
    rows = (adata.obs["perturbation"] == "B+A").to_numpy()
    share = adata.obs["qc_pct_mt"].to_numpy()[rows].mean()
    number = f"{100 * share:.1f}" if 0 < share < 0.0995 else f"{100 * share:.0f}"
    (text,) = [t.get_text() for t in axes[2].get_xticklabels()]
    assert text == f"real\n{number} % fail"


def test_thresholds_are_drawn_where_they_are() -> None:
    adata = labelled(batch_key="batch")
    (ax,) = pl.qc_thresholds(adata, criteria=["total_counts"], show=False)
    drawn = sorted(line.get_xdata()[0] for line in ax.lines)
    bounds = adata.uns["qc_label"]["thresholds"]["total_counts"]["lower"]
    np.testing.assert_allclose(drawn, np.sort(bounds))
    shaded = [p.get_x() + p.get_width() for p in ax.patches if p.get_alpha() == 0.1]
    np.testing.assert_allclose(shaded, [bounds.min()])
    assert ax.get_title() == f"{100 * adata.obs['qc_total_counts'].mean():.1f} % flagged"


def test_thresholds_of_the_robust_flavour_are_drawn_as_counts() -> None:
    adata = labelled(flavor="robust")
    (ax,) = pl.qc_thresholds(adata, criteria=["n_genes"], show=False)
    bounds = adata.uns["qc_label"]["thresholds"]["n_genes"]
    inside = [b for b in np.expm1([*bounds["lower"], *bounds["upper"]]) if ax.get_xlim()[0] < b < ax.get_xlim()[1]]
    assert inside
    np.testing.assert_allclose(sorted(line.get_xdata()[0] for line in ax.lines), sorted(inside))


def test_empty_gene_sets_and_constant_values() -> None:
    adata = cells()
    adata = adata[:, ~adata.var_names.str.startswith("HB")].copy()
    adata.X[:] = 3.0
    with pytest.warns(UserWarning, match="no gene|MAD"):
        pp.qc_label(adata, doublets=None)
    assert len(pl.qc_thresholds(adata, show=False)) == 4
    pl.qc_violin(adata, adata[:5], show=False)[0].get_figure().canvas.draw()


def test_effects_are_drawn_by_name_with_their_correlation() -> None:
    real, predicted = effects(), effects(1)
    ax, *_ = pl.treatment_effects(real, predicted.iloc[::-1, ::-1], show=False, n_genes=3)
    r = np.corrcoef(real.loc["A"], predicted.loc["A"])[0, 1]
    assert ax.get_title() == f"A: r = {r:.2f}"
    np.testing.assert_allclose(ax.collections[0].get_offsets(), np.column_stack([real.loc["A"], predicted.loc["A"]]))
    largest = set(real.loc["A"].abs().nlargest(3).index)
    named = {t.get_text() for t in ax.texts}
    assert named <= largest
    assert named


def test_effects_in_common_only() -> None:
    real = AnnData(effects())
    predicted = AnnData(effects(1, n=2).iloc[:, :10])
    assert [ax.get_title().split(":")[0] for ax in pl.treatment_effects(real, predicted, show=False)] == ["A", "B"]


def test_scores_are_scaled() -> None:
    ax = pl.evaluation(table(0.5), show=False)
    points = [line for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(points[0].get_xdata(), 0.5)  # (.5 - .2) / (.8 - .2)
    assert [t.get_text() for t in ax.texts if "to 0" in t.get_text()] == ["0.20 to 0.80"] * len(REPORT)


def test_scores_without_room_and_outside() -> None:
    ax = pl.evaluation(table(0.5, ceiling=0.1), show=False)
    assert sum("not better" in t.get_text() for t in ax.texts) == len(REPORT)
    ax = pl.evaluation(table(5.0), show=False)
    assert [len(line.get_xdata()) for line in ax.lines if line.get_marker() == ">"] == [len(REPORT)]


def test_a_report_of_metrics_is_drawn() -> None:
    real = cells(200)
    report = evaluate(real[:100], real[100:], sep="+", n_bootstrap=5)
    assert len(pl.evaluation(report, show=False).get_yticks()) == len(report)


def test_history_draws_what_is_there() -> None:
    axes = pl.training_history(history(), show=False)
    assert [ax.get_title() for ax in axes] == [
        "negative ELBO",
        "reconstruction loss",
        "KL of the basal state",
        "counterfactual KL",
    ]
    np.testing.assert_allclose(axes[0].lines[1].get_ydata(), history()["elbo_validation"].iloc[:, 0])


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        pytest.param(lambda: pl.qc_violin(cells()), ValueError, "qc_label", id="no thresholds"),
        pytest.param(lambda: pl.qc_thresholds(cells()), ValueError, "qc_label", id="no thresholds to draw"),
        pytest.param(lambda: pl.qc_violin(labelled(), criteria=["doublet"]), ValueError, "criteria", id="doublet"),
        pytest.param(lambda: pl.qc_violin(labelled(), perturbation="C"), ValueError, "perturbation", id="no cell"),
        pytest.param(lambda: pl.qc_violin(labelled(), cells()[:, 1:]), ValueError, "genes", id="other genes"),
        pytest.param(lambda: pl.qc_violin(labelled(), layer="c"), KeyError, "layer", id="no layer"),
        pytest.param(
            lambda: pl.qc_thresholds(labelled(), ax=plt.subplots(1, 2)[1]), ValueError, "panels", id="too few axes"
        ),
        pytest.param(
            lambda: pl.treatment_effects(effects(), effects().add_prefix("x")), ValueError, "gene", id="no common gene"
        ),
        pytest.param(
            lambda: pl.treatment_effects(effects(), effects(), perturbations=["AB"]),
            ValueError,
            r"did you mean 'A\+B'",
            id="unknown perturbation",
        ),
        pytest.param(
            lambda: pl.treatment_effects(effects(), effects(), n_genes=-1), ValueError, "n_genes", id="negative n_genes"
        ),
        pytest.param(lambda: pl.training_history({"lr": [1.0]}), ValueError, "history", id="no losses"),
        pytest.param(lambda: pl.evaluation(table()[["value"]]), ValueError, "scaled_low", id="not a report"),
        pytest.param(lambda: pl.evaluation({}), ValueError, "at least one", id="no report"),
        pytest.param(lambda: pl.evaluation(table(), metrics=["r"]), ValueError, "'r'", id="unknown metric"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        call()


def test_a_backend_that_turns_interactive_while_drawing_stays_so():
    import matplotlib as mpl

    from scvi_cradle.pl._style import style

    before = mpl.is_interactive()
    size = mpl.rcParams["font.size"]
    try:
        with style():
            mpl.interactive(True)  # as the backend of notebooks does when the first figure loads it
        assert mpl.is_interactive()
        assert mpl.rcParams["font.size"] == size
    finally:
        mpl.interactive(before)
