"""Heat maps and scatter plots of latent effects: order, names and colours; clusters by scanpy and scipy alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import adjusted_rand_score

from scvi_cradle import pl
from scvi_cradle.pl._style import LIGHT, MAX_GROUPS, PALETTE

mpl.use("Agg")


def effects(n_pathways: int = 3, size: int = 4, n_latent: int = 12, *, noise: float = 0.1, seed: int = 0) -> AnnData:
    """Treatments in random order; those of a pathway share two dimensions of their own and an embedding, plus noise."""
    rng = np.random.default_rng(seed)
    pathway = rng.permutation(np.repeat(np.arange(n_pathways), size))
    used = np.arange(n_latent) % (2 * n_pathways) // 2 == pathway[:, None]
    used &= np.arange(n_latent) < 2 * n_pathways
    probability = np.clip(used * 0.95 + rng.random(used.shape) * 0.05, 0, 1)
    embedding = rng.choice([-2.0, 2.0], size=(n_pathways, n_latent))[pathway] * used
    embedding += rng.normal(scale=noise, size=used.shape)
    obs = pd.DataFrame(
        {"pathway": pd.Categorical([f"pathway {p}" for p in pathway]), "n_cells": rng.integers(20, 90, len(pathway))},
        index=[f"T{i:03d}" for i in range(len(pathway))],
    )
    var = pd.DataFrame(index=[f"z{i}" for i in range(n_latent)])
    layers = {"mask_prob": probability, "embedding_mean": embedding, "embedding_std": np.full(used.shape, 0.3)}
    return AnnData((probability * embedding).astype(np.float32), obs=obs, var=var, layers=layers)


def embedded(n: int = 12, *, seed: int = 0) -> AnnData:
    adata = effects(3, n // 3)
    adata.obsm["X_umap"] = np.random.default_rng(seed).normal(size=(adata.n_obs, 2))
    return adata


def names(ax: Any, which: str) -> list[str]:
    return [text.get_text() for text in (ax.get_yticklabels() if which == "y" else ax.get_xticklabels())]


def heat(ax: Any) -> pd.DataFrame:
    """The values that are drawn, under the names that are drawn."""
    return pd.DataFrame(np.asarray(ax.images[0].get_array()), index=names(ax, "y"), columns=names(ax, "x"))


def legend(ax: Any) -> dict[str, tuple[float, ...]]:
    drawn = ax.get_legend()
    return {
        text.get_text(): to_rgba(handle.get_color())
        for text, handle in zip(drawn.get_texts(), drawn.legend_handles, strict=True)
    }


# --- the heat map


@pytest.mark.parametrize("layer", ["mask_prob", "embedding_mean", None])
@pytest.mark.parametrize("cluster", [True, False])
def test_every_value_is_drawn_under_its_name(layer: str | None, cluster: bool) -> None:
    adata = effects()
    drawn = heat(pl.mask(adata, layer=layer, cluster=cluster, show=False))
    expected = adata.to_df(layer=layer)
    pd.testing.assert_frame_equal(drawn.loc[expected.index, expected.columns], expected, check_dtype=False)
    in_order = list(drawn.index) == list(expected.index) and list(drawn.columns) == list(expected.columns)
    assert in_order is not cluster


def test_clustering_brings_pathways_and_their_dimensions_together() -> None:
    adata = effects(5, 6, 16)
    drawn = heat(pl.mask(adata, show=False))
    pathway = adata.obs["pathway"].loc[drawn.index].astype(str).to_numpy()
    assert (pathway[1:] != pathway[:-1]).sum() == 4  # while the rows given have many more changes
    assert (
        adata.obs["pathway"].astype(str).to_numpy()[1:] != adata.obs["pathway"].astype(str).to_numpy()[:-1]
    ).sum() > 10
    place = {name: i for i, name in enumerate(drawn.columns)}
    assert [abs(place[f"z{2 * p}"] - place[f"z{2 * p + 1}"]) for p in range(5)] == [1] * 5


@pytest.mark.parametrize(
    ("layer", "colours", "limits"),
    [
        pytest.param("mask_prob", "Blues", (0, 1), id="probability"),
        pytest.param("embedding_std", "Blues", (0, 0.3), id="positive"),
        pytest.param("embedding_mean", "RdBu_r", None, id="signed"),
    ],
)
def test_scale_of_colours(layer: str, colours: str, limits: tuple[float, float] | None) -> None:
    adata = effects()
    image = pl.mask(adata, layer=layer, show=False).images[0]
    largest = np.abs(adata.layers[layer]).max()
    assert image.get_cmap().name == colours
    assert image.get_clim() == pytest.approx(limits or (-largest, largest))


def test_masks_that_are_all_ones_and_effects_that_are_all_zero() -> None:
    adata = effects()
    adata.layers["mask_prob"][:] = 1.0
    adata.X[:] = 0.0
    ones = heat(pl.mask(adata, min_prob=0.5, show=False))
    assert ones.shape == adata.shape
    assert (ones.to_numpy() == 1).all()
    pl.mask(adata, layer=None, show=False).get_figure().canvas.draw()


def test_unused_dimensions_are_hidden() -> None:
    adata = effects()
    adata.layers["mask_prob"][0, 11] = 0.5
    ax = pl.mask(adata, min_prob=0.5, show=False)
    assert sorted(names(ax, "x")) == sorted(["z0", "z1", "z2", "z3", "z4", "z5", "z11"])
    assert ax.get_xlabel() == "latent dimension (7 of 12)"
    signed = pl.mask(adata, layer=None, min_prob=0.5, cluster=False, show=False)
    assert names(signed, "x") == ["z0", "z1", "z2", "z3", "z4", "z5", "z11"]


def test_the_strip_has_the_colours_of_the_groups() -> None:
    adata = effects()
    ax = pl.mask(adata, color="pathway", show=False)
    heat_map, strip = ax.images
    expected = {f"pathway {i}": to_rgba(PALETTE[i]) for i in range(3)}
    assert legend(ax) == expected
    groups = adata.obs["pathway"].loc[names(ax, "y")]
    np.testing.assert_allclose(np.asarray(strip.get_array())[:, 0], [expected[g] for g in groups])
    assert strip.get_extent()[1] < heat_map.get_extent()[0]  # beside the heat map, and rows at the same height
    assert strip.get_extent()[2:] == heat_map.get_extent()[2:]
    assert ax.get_ylim() == (adata.n_obs - 0.5, -0.5)


def test_groups_take_stored_colours_and_missing_ones_are_grey() -> None:
    adata = effects()
    adata.uns["pathway_colors"] = ["#111111", "#222222", "#333333"]
    adata.obs.loc["T000", "pathway"] = np.nan
    adata.obs["other"] = adata.obs["pathway"].astype(object)  # text, with a missing value
    ax = pl.mask(adata, color="pathway", cluster=False, show=False)
    assert legend(ax) == {"pathway 0": to_rgba("#111111"), "pathway 1": to_rgba("#222222")} | {
        "pathway 2": to_rgba("#333333"),
        "none": to_rgba(LIGHT),
    }
    np.testing.assert_allclose(ax.images[1].get_array()[0, 0], to_rgba(LIGHT))
    assert list(legend(pl.mask(adata, color="other", show=False))) == ["pathway 0", "pathway 1", "pathway 2", "none"]


def test_the_largest_of_many_groups_have_a_colour_each() -> None:
    adata = effects(25, 2, 50)
    small = adata.obs_names[adata.obs["pathway"] == "pathway 0"][0]
    colours = legend(pl.mask(adata[adata.obs_names != small], color="pathway", show=False))
    assert len(colours) == MAX_GROUPS + 1
    assert len(set(colours.values())) == MAX_GROUPS + 1
    assert "pathway 0" not in colours
    assert colours["others"] == to_rgba(LIGHT)


@pytest.mark.parametrize(("n", "named"), [(2, True), (8, True), (60, True), (300, False)])
def test_rows_are_named_where_names_can_be_read(n: int, named: bool) -> None:
    ax = pl.mask(effects(2, n // 2), color="pathway", show=False)
    ax.get_figure().canvas.draw()
    assert ax.get_figure().get_figheight() == pytest.approx({2: 2.6, 8: 2.6, 60: 9.6, 300: 7.7}[n])
    assert len(names(ax, "y")) == (n if named else 0)
    assert ax.get_ylabel() == ("treatment" if named else "treatments (300)")
    boxes = [text.get_window_extent() for text in ax.get_yticklabels()]
    heights = sorted((box.y0, box.y1) for box in boxes)
    assert all(above[0] > below[1] - 1 for below, above in zip(heights, heights[1:], strict=False))
    assert all(text.get_fontsize() >= 5 for text in ax.get_yticklabels())


def test_names_are_left_out_of_small_axes() -> None:
    adata = effects(2, 30, 150)
    assert len(names(pl.mask(adata, show=False), "y")) == 60
    _, ax = plt.subplots(figsize=(3, 3))
    assert pl.mask(adata, ax=ax) is ax
    assert names(ax, "y") == names(ax, "x") == []
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent dimensions (150)", "treatments (60)")


def test_long_names_of_dimensions_are_turned() -> None:
    adata = effects(n_latent=6)
    assert {text.get_rotation() for text in pl.mask(adata, show=False).get_xticklabels()} == {0}
    adata.var_names = [f"program {i}" for i in range(6)]
    assert {text.get_rotation() for text in pl.mask(adata, show=False).get_xticklabels()} == {90}


# --- the scatter plot


def test_points_are_where_they_are() -> None:
    adata = embedded()
    adata.obsm["z"] = np.random.default_rng(1).normal(size=(adata.n_obs, 5))
    for basis, name in (("X_umap", "UMAP 1"), ("z", "z 1")):
        ax = pl.latent(adata, basis=basis, show=False)
        np.testing.assert_allclose(ax.collections[0].get_offsets(), adata.obsm[basis][:, :2])
        assert ax.get_xlabel() == name


def test_points_have_the_colour_of_their_group() -> None:
    adata = embedded()
    ax = pl.latent(adata, color="pathway", show=False)
    expected = {f"pathway {i}": to_rgba(PALETTE[i]) for i in range(3)}
    np.testing.assert_allclose(ax.collections[0].get_facecolors(), [expected[g] for g in adata.obs["pathway"]])
    assert legend(ax) == expected
    adata.obs["flag"] = adata.obs["n_cells"] > 50
    assert list(legend(pl.latent(adata, color="flag", show=False))) == ["False", "True"]


@pytest.mark.parametrize("color", ["n_cells", "z3"])
def test_points_have_the_colour_of_their_value(color: str) -> None:
    adata = embedded()
    points = pl.latent(adata, color=color, show=False).collections[0]
    expected = adata.obs[color] if color in adata.obs else adata.to_df()[color]
    np.testing.assert_allclose(points.get_array(), expected)
    assert points.colorbar.ax.get_ylabel() == color


def test_missing_values_are_grey() -> None:
    adata = embedded()
    adata.obs["score"] = np.where(np.arange(adata.n_obs) == 2, np.nan, 1.0 * np.arange(adata.n_obs))
    ax = pl.latent(adata, color="score", show=False)
    ax.get_figure().canvas.draw()
    grey = [np.allclose(colour, to_rgba(LIGHT)) for colour in ax.collections[0].get_facecolors()]
    assert grey == [i == 2 for i in range(adata.n_obs)]


def test_points_are_named_on_request() -> None:
    adata = embedded(12)
    assert not pl.latent(adata, show=False).texts
    ax = pl.latent(adata, labels=["T005", "T001"], show=False)
    where = {text.get_text(): text.xy for text in ax.texts}
    assert where == {name: tuple(adata.obsm["X_umap"][adata.obs_names.get_loc(name)]) for name in ("T001", "T005")}
    assert [text.get_text() for text in pl.latent(adata, labels="T002", show=False).texts] == ["T002"]


def test_names_cover_neither_each_other_nor_points() -> None:
    adata = embedded(60)
    rng = np.random.default_rng(0)
    centres = rng.normal(scale=5, size=(6, 2))
    adata.obsm["X_umap"] = np.repeat(centres, 10, axis=0) + rng.normal(scale=0.1, size=(60, 2))
    ax = pl.latent(adata, labels=adata.obs_names, color="pathway", show=False)
    ax.get_figure().canvas.draw()
    boxes = [mpl.text.Text.get_window_extent(text) for text in ax.texts]
    assert 20 < len(boxes) <= 60
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    dots = ax.transData.transform(adata.obsm["X_umap"])
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
    lines = {i: text.arrow_patch.get_path() for i, text in enumerate(ax.texts) if text.arrow_patch is not None}
    assert len(lines) > 5
    assert not any(line.intersects_bbox(box) for i, line in lines.items() for j, box in enumerate(boxes) if i != j)
    assert all(ax.bbox.contains(*corner) for box in boxes for corner in box.corners())


# --- scanpy alone


def test_scanpy_clusters_and_embeds_treatments_by_pathway() -> None:
    adata = effects(6, 10, 20, noise=0.4)
    pathway = adata.obs["pathway"].astype(str).to_numpy()
    sc.pp.neighbors(adata, use_rep="X")
    sc.tl.umap(adata)
    clusters = fcluster(linkage(adata.X, method="average"), t=6, criterion="maxclust")
    assert adjusted_rand_score(pathway, clusters) > 0.9
    assert abs(adjusted_rand_score(np.random.default_rng(0).permutation(pathway), clusters)) < 0.1
    adata.obs["cluster"] = pd.Categorical(clusters.astype(str))
    sc.tl.dendrogram(adata, groupby="cluster", use_rep="X")
    assert sorted(adata.uns["dendrogram_cluster"]["categories_ordered"]) == [str(i) for i in range(1, 7)]
    points = adata.obsm["X_umap"]
    distance = np.linalg.norm(points[:, None] - points, axis=2) + np.diag(np.full(len(points), np.inf))
    assert (pathway[distance.argmin(axis=1)] == pathway).mean() > 0.9
    in_umap = fcluster(linkage(points, method="average"), t=6, criterion="maxclust")
    assert adjusted_rand_score(pathway, in_umap) > 0.9
    pl.latent(adata, color="cluster", labels=adata.obs_names, show=False).get_figure().canvas.draw()


# --- habits and bad input

DRAWINGS: dict[str, Callable[..., Any]] = {
    "mask": lambda adata, **kw: pl.mask(adata, color="pathway", **kw),
    "latent": lambda adata, **kw: pl.latent(adata, color="pathway", labels=adata.obs_names, **kw),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_save_writes_and_closes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "figure.png"
    DRAWINGS[name](embedded(), save=path)
    assert path.stat().st_size > 5_000
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", DRAWINGS)
def test_given_axes_are_used_and_the_anndata_stays(name: str, tmp_path: Path) -> None:
    adata = embedded()
    before = adata.copy()
    figure, ax = plt.subplots()
    assert DRAWINGS[name](adata, ax=ax, save=tmp_path / "figure.png") is ax
    assert plt.get_fignums() == [figure.number]
    assert (adata.X == before.X).all()
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert list(adata.uns) == []
    assert set(adata.obsm) == {"X_umap"}


def test_views_and_single_treatments() -> None:
    adata = embedded()
    one = adata[["T003"]]
    assert names(pl.mask(one, show=False), "y") == ["T003"]
    assert [text.get_text() for text in pl.latent(one, labels="T003", show=False).texts] == ["T003"]


def broken(layer: str | None) -> AnnData:
    adata = embedded()
    (adata.X if layer is None else adata.layers[layer])[1, 1] = np.nan
    adata.obsm["line"] = np.zeros((adata.n_obs, 1))
    adata.obsm["gap"] = np.full((adata.n_obs, 2), np.nan)
    return adata


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        pytest.param(lambda: pl.mask(embedded(), layer="mask_prop"), KeyError, "mean 'mask_prob'", id="layer"),
        pytest.param(lambda: pl.mask(embedded(), color="patway"), KeyError, "mean 'pathway'", id="column"),
        pytest.param(lambda: pl.mask(embedded(60), color="n_cells"), ValueError, "different numbers", id="numbers"),
        pytest.param(lambda: pl.mask(broken(None), layer=None), ValueError, "1 that are not", id="NaN in X"),
        pytest.param(lambda: pl.mask(broken("mask_prob")), ValueError, "finite", id="NaN in the mask"),
        pytest.param(lambda: pl.mask(embedded()[:0]), ValueError, "at least one treatment", id="no treatment"),
        pytest.param(lambda: pl.mask(embedded(), min_prob=2.0), ValueError, "between 0 and 1", id="probability"),
        pytest.param(lambda: pl.mask(embedded()[:, 6:], min_prob=0.5), ValueError, "lower it", id="all hidden"),
        pytest.param(lambda: pl.latent(effects()), KeyError, r"sc\.pp\.neighbors.*sc\.tl\.umap", id="no UMAP"),
        pytest.param(lambda: pl.latent(broken(None), basis="line"), ValueError, "two columns", id="one column"),
        pytest.param(lambda: pl.latent(broken(None), basis="gap"), ValueError, "12 rows that are not", id="no point"),
        pytest.param(lambda: pl.latent(embedded(), color="patway"), KeyError, "mean 'pathway'", id="colour"),
        pytest.param(lambda: pl.latent(embedded(), labels=["T00"]), ValueError, "did you mean", id="label"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        call()
