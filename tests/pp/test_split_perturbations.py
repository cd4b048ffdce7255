import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from scvi_cradle import pp

SINGLES = list("ABCDEFG")
PAIRS = ["+".join(p) for p in itertools.combinations("ABCDE", 2)]


def make_adata(n_cells=20, labels=None, shuffle=True) -> AnnData:
    labels = ["control", *SINGLES, *PAIRS] if labels is None else labels
    column = np.repeat(labels, n_cells)
    if shuffle:
        column = np.random.default_rng(0).permutation(column)
    obs = pd.DataFrame({"perturbation": column}, index=[f"c{i}" for i in range(len(column))])
    return AnnData(np.ones((len(obs), 1), dtype=np.float32), obs=obs)


def split_of(adata: AnnData, **kwargs) -> pd.DataFrame:
    """Number of cells per label and part."""
    assert pp.split_perturbations(adata, "perturbation", **kwargs) is None
    table = pd.crosstab(adata.obs["perturbation"].astype(str), adata.obs["split"].astype(str))
    return table.reindex(columns=["train", "val", "test", "unused"], fill_value=0)


def test_combinations_are_held_out_whole():
    table = split_of(make_adata())
    held_out = table.index[table["test"] > 0]
    assert len(held_out) == math.ceil(0.25 * len(PAIRS)) == 3
    assert set(held_out) <= set(PAIRS)
    assert (table.loc[held_out, "test"] == 20).all()
    rest = table.drop(index=held_out)
    assert (rest["val"] == 4).all()
    assert (rest["train"] == 16).all()
    assert not table["unused"].any()


def test_combinations_are_those_of_the_papers_recipe():
    order = np.random.default_rng(3).permutation(np.array(sorted(PAIRS)))
    table = split_of(make_adata(), seed=3)
    assert set(table.index[table["test"] > 0]) == set(order[-3:])


def test_seeds_and_order_of_cells():
    tables = {seed: split_of(make_adata(), seed=seed)["test"] for seed in range(6)}
    pd.testing.assert_series_equal(tables[0], split_of(make_adata(shuffle=False), seed=0)["test"])
    assert any(not tables[0].equals(tables[s]) for s in range(1, 6))
    one, two = make_adata(), make_adata()
    split_of(one, seed=4)
    split_of(two, seed=4)
    assert one.obs["split"].equals(two.obs["split"])


def test_validation_cells_are_drawn_at_random():
    adata = make_adata(n_cells=200, labels=["control", "A", "B", "A+B"], shuffle=False)
    split_of(adata)
    val = np.flatnonzero(adata.obs["split"].to_numpy()[:200] == "val")
    assert len(val) == 40
    assert val.min() < 40
    assert val.max() > 160


def test_a_treatment_stays_in_training():
    labels = ["control", "A", "B", "A+B", "A+Z"]  # Z occurs nowhere else
    for seed in range(5):
        table = split_of(make_adata(labels=labels), test_fraction=0.5, seed=seed)
        assert table.index[table["test"] > 0].tolist() == ["A+B"]
    with pytest.warns(UserWarning, match="Only 1 of 2 combinations are held out"):
        split_of(make_adata(labels=labels), test_fraction=0.9)


def test_combinations_among_themselves_may_hold_their_treatments():
    labels = ["control", "A+B", "B+C", "A+C"]
    for seed in range(5):
        table = split_of(make_adata(labels=labels), seed=seed)
        trained = {t for label in table.index[table["train"] > 0] for t in label.split("+")}
        assert {"A", "B", "C"} <= trained
        assert (table["test"] > 0).sum() == 1


def test_exact_cells_is_the_papers_intersection():
    table = split_of(make_adata(n_cells=100), exact_cells=True)
    held_out = table.index[table["test"] > 0]
    assert len(held_out) == 3
    assert table.loc[held_out].to_numpy().tolist() == [[0, 0, 20, 80]] * 3
    others = [p for p in PAIRS if p not in held_out]
    assert table.loc[others].to_numpy().tolist() == [[64, 16, 0, 20]] * 7
    assert table.loc[["control", *SINGLES]].to_numpy().tolist() == [[80, 20, 0, 0]] * 8


def test_cells_of_every_label():
    table = split_of(make_adata(), scheme="cells", test_fraction=0.2)
    assert table.to_numpy().tolist() == [[13, 3, 4, 0]] * 18


@pytest.mark.parametrize("n_cells", range(1, 8))
def test_small_labels_keep_a_training_cell(n_cells):
    table = split_of(make_adata(n_cells=n_cells), scheme="cells", test_fraction=0.9, val_fraction=0.9)
    assert (table["train"] >= 1).all()


def test_rounding_is_to_the_nearest_cell():
    for n_cells, n_test in ((2, 1), (5, 1), (6, 2), (10, 3)):  # a quarter: .5, 1.25, 1.5, 2.5
        table = split_of(make_adata(n_cells=n_cells), scheme="cells", val_fraction=0)
        assert set(table["test"]) == {n_test}
        assert not table["val"].any()


def test_perturbations_take_their_combinations_along():
    table = split_of(make_adata(), scheme="perturbations")
    held_out = {s for s in SINGLES if table.loc[s, "test"]}
    assert len(held_out) == math.ceil(0.25 * len(SINGLES)) == 2
    for label in table.index.drop("control"):
        inside = bool(held_out & set(label.split("+")))
        assert table.loc[label, "test"] == (20 if inside else 0)
    assert table.loc["control"].tolist() == [16, 4, 0, 0]


def test_labels_are_read_canonically():
    adata = make_adata(labels=["NT", "A", "B", "NT,A", "A,B", "B,A"])
    table = split_of(adata, control="NT", sep=",")
    assert table.loc[["A,B", "B,A"], "test"].tolist() == [20, 20]
    assert table.loc[["NT", "A", "B", "NT,A"], "test"].tolist() == [0] * 4


def test_only_the_column_is_written():
    adata = make_adata()
    before = adata.obs.copy()
    pp.split_perturbations(adata, "perturbation", key_added="fold")
    pd.testing.assert_frame_equal(adata.obs.drop(columns="fold"), before)
    assert set(adata.obs["fold"]) == {"train", "val", "test"}
    assert not adata.uns
    view = make_adata()[:200]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pp.split_perturbations(view, "perturbation", scheme="cells")
    assert "split" in view.obs


def test_split_survives_h5ad(tmp_path):
    import anndata as ad

    adata = make_adata()
    pp.split_perturbations(adata, "perturbation")
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert ad.read_h5ad(tmp_path / "a.h5ad").obs["split"].astype(str).tolist() == adata.obs["split"].tolist()


NO_PAIRS = ["control", "A", "B"]
BAD = [
    ("scheme", None, {"scheme": "cell"}, ValueError, "did you mean 'cells'"),
    ("test_fraction 0", None, {"test_fraction": 0.0}, ValueError, "`test_fraction` must lie strictly between"),
    ("test_fraction 1", None, {"test_fraction": 1}, ValueError, "`test_fraction` must lie strictly between"),
    ("val_fraction", None, {"val_fraction": -0.1}, ValueError, "`val_fraction` must be a non-negative number"),
    ("val_fraction 1", None, {"val_fraction": 1.0}, ValueError, "at least 0 and below 1; received 1.0"),
    ("seed", None, {"seed": 0.5}, ValueError, "`seed` must be a non-negative integer"),
    ("key", None, {"perturbation_key": "label"}, KeyError, "`perturbation_key` must be a key"),
    ("no control", None, {"control": "NT"}, ValueError, "At least one cell must be a control"),
    ("label", ["control", "A", "A+"], {}, ValueError, "Every part"),
    ("no combination", NO_PAIRS, {}, ValueError, "received none among 0 combinations"),
    ("sep", None, {"sep": None}, ValueError, "received none among 0 combinations"),
    ("only source", ["control", "A+B"], {}, ValueError, "received none among 1 combinations"),
    ("one single", ["control", "A", "A+B"], {"scheme": "perturbations"}, ValueError, "received 1 and"),
    ("all singles", NO_PAIRS, {"scheme": "perturbations", "test_fraction": 0.9}, ValueError, "on both sides"),
    ("exact cells", None, {"scheme": "cells", "exact_cells": True}, ValueError, "received scheme='cells'"),
    ("exact without val", None, {"exact_cells": True, "val_fraction": 0}, ValueError, "val_fraction=0"),
    ("key_added", None, {"key_added": "perturbation"}, ValueError, "`key_added` must name a column other"),
]


@pytest.mark.parametrize(("labels", "kwargs", "error", "part"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_leaves_the_data_alone(labels, kwargs, error, part):
    adata = make_adata(labels=labels)
    before = adata.obs.copy()
    with pytest.raises(error) as caught:
        pp.split_perturbations(adata, **{"perturbation_key": "perturbation", **kwargs})
    assert part in str(caught.value)
    pd.testing.assert_frame_equal(adata.obs, before)
