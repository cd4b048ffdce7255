"""Figures of marginals and of perturbation probabilities: what is drawn, where, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from matplotlib import pyplot as plt
from matplotlib.colors import rgb_to_hsv, to_rgb, to_rgba
from scipy.special import expit

from scvi_cradle import pl
from scvi_cradle.metrics import probability_scores
from scvi_cradle.pl._probability import PROBABILITY_COLOURS
from scvi_cradle.pl._style import BLUE, LIGHT, ORANGE

mpl.use("Agg")
SHARES = np.array([0.97, 0.9, 0.7, 0.5, 0.3, 0.1, 0.02])  # of positive values, of seven genes


def marginals(n: int = 400, seed: int = 0) -> AnnData:
    rng = np.random.default_rng(seed)
    x = (rng.random((n, 7)) < SHARES) * rng.gamma(4.0, 0.5, size=(n, 7))
    order = rng.permutation(7)
    var = pd.DataFrame(index=[f"g{i}" for i in order])
    return AnnData(sp.csr_matrix(x[:, order]), obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]), var=var)


def column(adata: AnnData, gene: str) -> np.ndarray:
    return adata[:, gene].X.toarray().ravel()


def screen(n: int = 90, seed: int = 0) -> AnnData:
    rng = np.random.default_rng(seed)
    labels = np.array(["NT", "A", "B", "B+A"])[np.arange(n) % 4]
    adata = AnnData(
        np.zeros((n, 1), dtype=np.float32),
        obs=pd.DataFrame({"perturbation": labels, "p": rng.random(n)}, index=[f"c{i}" for i in range(n)]),
    )
    adata.obsm["X_umap"] = rng.normal(size=(n, 2))
    adata.obsm["prob"] = pd.DataFrame(rng.random((n, 2)), index=adata.obs_names, columns=["A", "B"])
    return adata


def calibration(seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    p = rng.random(500)
    return probability_scores(rng.random(500) < p, p)["calibration"]


DRAWINGS: dict[str, Callable[..., Any]] = {
    "quantile_qq": lambda **kw: pl.quantile_qq(marginals(), {"one": marginals(seed=1), "two": marginals(90)}, **kw),
    "perturbation_probability": lambda **kw: pl.perturbation_probability(screen(), "A", "prob", control="NT", **kw),
    "perturbation_probability, prior": lambda **kw: pl.perturbation_probability(
        screen(), "A", "prob", prior=np.zeros(90), control="NT", **kw
    ),
    "probability_calibration": lambda **kw: pl.probability_calibration({"a": calibration(), "b": calibration(1)}, **kw),
    "probability_by_guides": lambda **kw: pl.probability_by_guides(np.arange(90), screen().obs["p"], **kw),
}
each = pytest.mark.parametrize("name", DRAWINGS)


# --- habits


@each
def test_every_axes_is_labelled(name: str) -> None:
    result = DRAWINGS[name](show=False)
    axes = result if isinstance(result, list) else [result]
    axes[0].get_figure().canvas.draw()
    assert all(ax.get_xlabel() for ax in axes)
    assert axes[0].get_ylabel()


@each
def test_nothing_is_cut_off(name: str) -> None:
    result = DRAWINGS[name](show=False)
    axes = result if isinstance(result, list) else [result]
    figure = axes[0].get_figure()
    figure.canvas.draw()
    inside = figure.bbox.padded(1)
    for ax in axes:
        box = ax.get_tightbbox()
        assert inside.contains(box.x0, box.y0)
        assert inside.contains(box.x1, box.y1)


@each
def test_save_writes_and_closes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "figure.png"
    DRAWINGS[name](save=path)
    assert path.stat().st_size > 5_000
    assert plt.get_fignums() == []


@each
def test_given_axes_are_used_and_stay_open(name: str, tmp_path: Path) -> None:
    result = DRAWINGS[name](show=False)
    n = len(result) if isinstance(result, list) else 1
    plt.close("all")
    figure, grid = plt.subplots(1, n)
    result = DRAWINGS[name](ax=grid, save=tmp_path / "figure.png")
    drawn = result if isinstance(result, list) else [result]
    assert [id(ax) for ax in drawn] == [id(ax) for ax in np.ravel(grid)]
    assert plt.get_fignums() == [figure.number]


# --- marginals


def test_default_genes_go_from_few_zeros_to_many() -> None:
    axes = pl.quantile_qq(marginals(), marginals(seed=1), show=False)
    assert len(axes) == 6
    chosen = [ax.get_title() for ax in axes[:3]]
    shares = [float(SHARES[int(g[1:])]) for g in chosen]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] >= 0.9
    assert shares[-1] == 0.1  # that of 2 % has too few values
    assert len(pl.quantile_qq(marginals(), marginals(seed=1), n_genes=5, show=False)) == 10


def test_histograms_are_shares_and_zeros_are_counted() -> None:
    real, other = marginals(), marginals(seed=1)
    top, _ = pl.quantile_qq(real, other, ["g3"], show=False)
    for patch, adata in zip(top.patches, (real, other), strict=True):
        shares, edges, _ = patch.get_data()
        assert shares.sum() == pytest.approx(1)
        middle = np.abs((edges[1:] + edges[:-1]) / 2) < 1e-12
        assert middle.sum() == 1
        values = column(adata, "g3")
        half = (edges[1] - edges[0]) / 2
        assert shares[middle][0] == pytest.approx((np.abs(values) < half).mean())
    shown = [text.get_text() for text in top.texts]
    zeros = [f"{100 * (column(adata, 'g3') == 0).mean():.0f} %" for adata in (real, other)]
    assert shown == ["share of zeros", f"real {zeros[0]}", f"reconstructed {zeros[1]}"]
    assert top.get_ylim()[1] > max(patch.get_data()[0].max() for patch in top.patches)


def test_quantiles_lie_on_the_identity_for_equal_marginals_only() -> None:
    real = marginals()
    shuffled = AnnData(real.X[np.random.default_rng(0).permutation(400)], var=real.var)
    doubled = AnnData(real.X * 2, var=real.var)
    axes = pl.quantile_qq(real, {"same": shuffled, "double": doubled}, ["g0"], show=False)
    same, double = (np.asarray(points.get_offsets()) for points in axes[1].collections)
    assert len(same) == 200
    np.testing.assert_allclose(same[:, 0], same[:, 1])
    np.testing.assert_allclose(double[:, 1], 2 * double[:, 0])
    np.testing.assert_allclose(same[:, 0], np.quantile(column(real, "g0"), (np.arange(200) + 0.5) / 200))


def test_genes_are_paired_by_name_or_position() -> None:
    real = marginals()
    dense = real.to_df()
    first = pl.quantile_qq(real, real[:, ::-1].copy(), ["g2"], show=False)[1].collections[0].get_offsets()
    np.testing.assert_allclose(first[:, 0], first[:, 1])
    for one, other in ((dense, dense.iloc[:, ::-1]), (real, dense.to_numpy())):
        points = pl.quantile_qq(one, other, ["g2"], show=False)[1].collections[0].get_offsets()
        np.testing.assert_allclose(points, first)
    ax = pl.quantile_qq(dense.to_numpy(), real.X, [4], show=False)
    assert ax[0].get_title() == "4"
    negative = pl.quantile_qq(real, dense - 1.0, ["g2"], show=False)
    assert negative[1].get_xlim()[0] < -1
    constant = pl.quantile_qq(np.zeros((9, 1)), np.zeros((5, 1)), show=False)
    assert [text.get_text() for text in constant[0].texts[1:]] == ["real 100 %", "reconstructed 100 %"]


# --- probabilities


def test_panels_hold_controls_and_cells_of_the_target_with_their_values() -> None:
    adata = screen()
    prior = pd.DataFrame({"A": np.linspace(-5, 3, 90)}, index=adata.obs_names)
    shuffled = prior.sample(frac=1, random_state=0)
    axes = pl.perturbation_probability(adata, "A", "prob", prior=shuffled, control="NT", show=False)
    assert [ax.get_title() for ax in axes] == ["label", "guide prior", "probability"]
    labels = adata.obs["perturbation"].to_numpy()
    where = {c: adata.obsm["X_umap"][np.isin(labels, m)] for c, m in ((LIGHT, ["NT"]), (BLUE, ["A", "B+A"]))}
    for points, (colour, expected) in zip(axes[0].collections, where.items(), strict=True):
        np.testing.assert_allclose(points.get_offsets(), expected)
        np.testing.assert_allclose(points.get_facecolors(), [to_rgba(colour)])
    texts = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert texts == [f"NT ({(labels == 'NT').sum()})", f"A ({np.isin(labels, ['A', 'B+A']).sum()})"]
    value_at = {tuple(point): i for i, point in enumerate(adata.obsm["X_umap"])}
    for ax, expected in ((axes[1], expit(prior["A"].to_numpy())), (axes[2], adata.obsm["prob"]["A"].to_numpy())):
        rows = [value_at[tuple(point)] for point in ax.collections[0].get_offsets()]
        assert sorted(rows) == sorted(np.flatnonzero(labels != "B"))
        np.testing.assert_allclose(ax.collections[0].get_array(), expected[rows])
        assert ax.collections[0].get_clim() == (0, 1)
        above = [labels[i] != "NT" for i in rows]
        assert above == sorted(above)


def test_probabilities_come_in_many_forms() -> None:
    adata = screen()
    p = adata.obs["p"]
    for values in ("p", p, p.to_numpy(), p.iloc[::-1], pd.DataFrame({"A": p, "B": 0.0})):
        axes = pl.perturbation_probability(adata, "A", values, control=["NT"], show=False)
        drawn = np.sort(axes[1].collections[0].get_array())
        np.testing.assert_allclose(drawn, np.sort(p[adata.obs["perturbation"] != "B"]))
        plt.close("all")


def test_colours_of_probabilities_darken_steadily() -> None:
    colours = PROBABILITY_COLOURS(np.linspace(0, 1, 50))[:, :3]
    luminance = (colours**2.2) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) < 0).all()
    assert rgb_to_hsv(to_rgb(PROBABILITY_COLOURS(0)))[1] < 0.05  # grey


def test_calibration_is_drawn_with_its_intervals() -> None:
    tables = {"a": calibration(), "b": calibration(1)}
    ax = pl.probability_calibration(tables, show=False)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    bars, points = ax.collections[::2], ax.collections[1::2]
    for table, bar, point, colour in zip(tables.values(), bars, points, (BLUE, ORANGE), strict=True):
        np.testing.assert_allclose(point.get_offsets(), table[["mean_probability", "share_perturbed"]])
        ends = np.array([segment[:, 1] for segment in bar.get_segments()])
        np.testing.assert_allclose(ends, table[["ci_low", "ci_high"]])
        np.testing.assert_allclose(point.get_facecolors()[0], to_rgba(colour))
    assert pl.probability_calibration(tables["a"], show=False).get_legend() is None


def test_probability_by_guides_by_hand() -> None:
    counts, p = np.array([0, 0, 0, 0, 4, 4, 9, 9]), np.array([0.1, 0.3, 0.2, 0.2, 0.5, 0.7, 0.8, 1.0])
    (line,) = pl.probability_by_guides(counts, p, n_bins=4, show=False).lines
    np.testing.assert_allclose(line.get_xdata(), [0, 4, 9])
    np.testing.assert_allclose(line.get_ydata(), [0.2, 0.6, 0.9])
    (line,) = pl.probability_by_guides(np.full(5, 3), np.full(5, 0.5), show=False).lines
    np.testing.assert_allclose(line.get_xydata(), [[3, 0.5]])


def test_the_anndata_stays_as_it_is() -> None:
    adata, real = screen(), marginals()
    before, was = adata.copy(), real.copy()
    pl.perturbation_probability(adata, "A", "prob", prior=np.zeros(90), control="NT", show=False)
    pl.quantile_qq(real, real, show=False)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.obsm["prob"], before.obsm["prob"])
    assert list(adata.uns) == []
    assert (real.X != was.X).nnz == 0


def probability(values: Any, **kwargs: Any) -> Any:
    return pl.perturbation_probability(screen(), "A", values, **{"control": "NT", **kwargs})


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        pytest.param(lambda: pl.quantile_qq(marginals(), {}), ValueError, "empty mapping", id="no reconstruction"),
        pytest.param(lambda: pl.quantile_qq(marginals(), {"real": marginals()}), ValueError, "rename", id="named real"),
        pytest.param(lambda: pl.quantile_qq(marginals(), marginals(), ["x"]), ValueError, "'x'", id="gene"),
        pytest.param(lambda: pl.quantile_qq(marginals(), marginals(), []), ValueError, "received none", id="no gene"),
        pytest.param(
            lambda: pl.quantile_qq(marginals(), {"m": marginals()[:, :1]}, ["g0", "g1"]),
            ValueError,
            "'m' lacks",
            id="m",
        ),
        pytest.param(lambda: pl.quantile_qq(marginals(), np.ones((5, 3))), ValueError, "7 of them; received 3", id="3"),
        pytest.param(lambda: pl.quantile_qq(marginals(), np.full((5, 7), np.nan)), ValueError, "finite", id="NaN"),
        pytest.param(lambda: probability("p", basis="X_tsne"), KeyError, "X_tsne", id="basis"),
        pytest.param(lambda: probability("p", perturbation_key="x"), KeyError, "'x'", id="labels"),
        pytest.param(
            lambda: probability("p", control="ctrl"), ValueError, "must be a control.*'NT' looks", id="control"
        ),
        pytest.param(lambda: probability("prop"), KeyError, "did you mean 'prob'", id="key"),
        pytest.param(lambda: probability(pd.DataFrame({"C": [1]})), KeyError, "'A'", id="column"),
        pytest.param(lambda: probability(screen().obs["p"].iloc[:9]), ValueError, "9 of 90 cells", id="cells"),
        pytest.param(lambda: probability(np.ones(3)), ValueError, "each of 90", id="shape"),
        pytest.param(lambda: probability(np.full(90, np.nan)), ValueError, "finite", id="NaN probability"),
        pytest.param(lambda: probability(np.full(90, 1.5)), ValueError, "between 0 and 1", id="above 1"),
        pytest.param(
            lambda: pl.perturbation_probability(screen(), "a", "p", control="NT"), ValueError, "mean 'A'", id="target"
        ),
        pytest.param(
            lambda: pl.probability_calibration(pd.DataFrame({"n": [1]})), ValueError, "calibration", id="table"
        ),
        pytest.param(lambda: pl.probability_calibration({}), ValueError, "empty mapping", id="no table"),
        pytest.param(lambda: pl.probability_by_guides([1, 2], [0.1]), ValueError, "shapes", id="lengths"),
        pytest.param(lambda: pl.probability_by_guides([-1], [0.1]), ValueError, "not be negative", id="counts"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        call()
    assert plt.get_fignums() == []
