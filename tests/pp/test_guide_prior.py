"""Evidence of guide counts: normal scores by hand, who is ranked with whom, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.special import expit
from scipy.stats import norm

from scvi_cradle import datasets, pp
from scvi_cradle._guides import counts_per_target, guide_table

GUIDES = ["A1", "A2", "B1", "NT1"]
TARGETS = pd.DataFrame({"guide": GUIDES, "target": ["A", "A", "B", "NT"]})
LABELS = ["A", "A", "A", "A", "B", "B+A", "NT", "NT"]
COUNTS = pd.DataFrame(
    {"A1": [1, 0, 2, 10, 5, 0, 7, 0], "A2": [0, 3, 1, 0, 5, 2, 7, 0], "B1": [9, 9, 9, 9, 1, 4, 9, 0], "NT1": 3},
    index=[f"c{i}" for i in range(8)],
)


def prior(counts=COUNTS, labels=LABELS, targets=TARGETS, **kwargs) -> pd.DataFrame:
    return pp.guide_prior(counts, labels, targets, **{"control": "NT", **kwargs})


# --- scores


def test_scores_by_hand() -> None:
    top = 1.1503493804
    np.testing.assert_allclose(pp.rank_to_z([1, 3, 3, 10]), [-top, 0, 0, top], atol=1e-10)
    np.testing.assert_allclose(pp.rank_to_z([1, 1, 1, 5]), [-0.3672471861] * 3 + [1.1017415583], atol=1e-10)
    np.testing.assert_allclose(pp.rank_to_z([2, 9, 4], offset=0.375), norm.ppf((np.array([1, 3, 2]) - 0.375) / 3.25))
    np.testing.assert_array_equal(pp.rank_to_z([4.0, 4, 4]), 0)
    np.testing.assert_array_equal(pp.rank_to_z([7]), [0])
    assert pp.rank_to_z([]).shape == (0,)


def test_prior_of_controls_and_fusion_by_hand() -> None:
    assert expit(-5) == pytest.approx(0.0066928509, abs=1e-10)
    assert expit(1 + 0.5 * -5) == pytest.approx(0.1824255238, abs=1e-10)
    assert expit(0.5 * pp.rank_to_z([1, 3, 3, 10])[-1]) == pytest.approx(0.6399563485, abs=1e-10)


def test_monotone_transformations_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    values = rng.poisson(3, 200)
    scores = pp.rank_to_z(values)
    np.testing.assert_allclose(pp.rank_to_z(np.sqrt(values) * 7), scores)
    np.testing.assert_allclose(scores.mean(), 0, atol=1e-15)
    assert (np.diff(scores[np.argsort(values, kind="stable")]) >= 0).all()


# --- who is ranked with whom


def test_cells_whose_label_contains_the_target_are_ranked() -> None:
    u = prior()
    assert list(u.columns) == ["A", "B"]
    assert list(u.index) == list(COUNTS.index)
    assert (u.dtypes == np.float64).all()
    np.testing.assert_allclose(u["A"].iloc[[0, 1, 2, 3, 5]], pp.rank_to_z([1, 3, 3, 10, 2]))
    np.testing.assert_allclose(u["B"].iloc[[4, 5]], pp.rank_to_z([1, 4]))
    assert (u["A"].iloc[[4, 6, 7]] == -5).all()
    assert (u["B"].iloc[[0, 1, 2, 3, 6, 7]] == -5).all()


def test_cell_types_are_ranked_apart() -> None:
    types = np.array(["x", "x", "y", "y", "x", "y", "x", "y"])
    u = prior(cell_types=types, control_value=-3)
    np.testing.assert_allclose(u["A"].iloc[[0, 1]], pp.rank_to_z([1, 3]))
    np.testing.assert_allclose(u["A"].iloc[[2, 3, 5]], pp.rank_to_z([3, 10, 2]))
    np.testing.assert_array_equal(u["B"], [-3, -3, -3, -3, 0, 0, -3, -3])


def test_form_of_the_input_does_not_matter() -> None:
    u = prior()
    mapping = dict(zip(TARGETS["guide"], TARGETS["target"], strict=True))
    for targets in (mapping, pd.Series(mapping), TARGETS.iloc[::-1]):
        pd.testing.assert_frame_equal(prior(targets=targets), u)
    in_order = list(TARGETS["target"])
    for counts in (COUNTS.to_numpy(), sp.csc_matrix(COUNTS.to_numpy()), sp.csr_array(COUNTS.to_numpy())):
        np.testing.assert_array_equal(prior(counts, targets=in_order), u)
    labelled = prior(COUNTS.to_numpy(), labels=pd.Series(LABELS, index=COUNTS.index), targets=in_order)
    pd.testing.assert_frame_equal(labelled, u)
    order = np.random.default_rng(0).permutation(8)
    turned = prior(COUNTS.iloc[order], labels=np.array(LABELS)[order])
    pd.testing.assert_frame_equal(turned.loc[COUNTS.index], u)


def test_labels_are_canonical_and_a_target_may_have_no_cell() -> None:
    labels = ["A", "A", "A", "A+NT", "B", "A+B", "NT", None]
    counts = COUNTS.assign(C1=1)
    targets = pd.concat([TARGETS, pd.DataFrame({"guide": ["C1"], "target": ["C"]})])
    u = prior(counts, labels=labels, targets=targets, control=["NT", None])
    pd.testing.assert_frame_equal(u[["A", "B"]], prior())
    assert (u["C"] == -5).all()


def test_input_is_not_changed() -> None:
    counts, targets = COUNTS.copy(), TARGETS.copy()
    prior(counts, targets=targets)
    pd.testing.assert_frame_equal(counts, COUNTS)
    pd.testing.assert_frame_equal(targets, TARGETS)


def test_prior_ranks_perturbed_cells_above_escapers() -> None:
    adata = datasets.simulate_perturbseq(1500, 60, 4, 2, efficiency=0.6, seed=0)
    u = pp.guide_prior(adata.obsm["guide_counts"], adata.obs["perturbation"], adata.uns["guide_targets"])
    perturbed = adata.obs["true_perturbed"].to_numpy()
    ranked = u.to_numpy() > -5
    assert ranked.any(axis=1).sum() == (adata.obs["perturbation"] != "control").sum()
    of_cell = np.where(ranked, u, 0).sum(axis=1)
    exposed = ranked.any(axis=1)
    assert of_cell[exposed & perturbed].mean() > of_cell[exposed & ~perturbed].mean() + 0.2


# --- guides and targets


def test_guide_table_is_in_the_order_of_the_guides() -> None:
    table = guide_table(["NT1", "A2"], {"A1": "A", "A2": " A ", "NT1": "NT", "unused": None})
    assert dict(table) == {"NT1": "NT", "A2": "A"}
    assert list(table.index) == ["NT1", "A2"]


def test_counts_are_summed_over_targets() -> None:
    sums, names = counts_per_target(COUNTS, ["A", "A", "B", "NT"], leave_out=("NT",))
    assert names == ("A", "B")
    np.testing.assert_array_equal(sums.toarray(), np.column_stack([COUNTS["A1"] + COUNTS["A2"], COUNTS["B1"]]))
    assert sums.dtype == np.float64


def with_value(value: float) -> pd.DataFrame:
    counts = COUNTS.astype(float)
    counts.iloc[2, 1] = value
    return counts


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        pytest.param(lambda: prior(with_value(-1)), ValueError, "not negative; received negative", id="negative"),
        pytest.param(lambda: prior(with_value(np.nan)), ValueError, "received NaN", id="NaN"),
        pytest.param(lambda: prior(COUNTS.astype(str)), ValueError, "matrix of numbers", id="text"),
        pytest.param(lambda: prior(COUNTS.assign(A3=1)), ValueError, "none for 'A3': add", id="no target"),
        pytest.param(lambda: prior(COUNTS.iloc[:, [0, 0]]), ValueError, "'A1' more than once", id="doubled guide"),
        pytest.param(
            lambda: prior(targets=pd.concat([TARGETS, TARGETS.assign(target="B").iloc[:1]])),
            ValueError,
            "several for 'A1'",
            id="two targets",
        ),
        pytest.param(lambda: prior(targets=TARGETS.assign(target=["A", "A", "", "NT"])), ValueError, "'B1'", id="''"),
        pytest.param(lambda: prior(targets=TARGETS.rename(columns={"guide": "g"})), KeyError, "columns", id="columns"),
        pytest.param(lambda: prior(targets=list("AABN")), TypeError, "received list: name", id="list for a table"),
        pytest.param(lambda: prior(COUNTS.to_numpy()), TypeError, "in order; received DataFrame", id="array"),
        pytest.param(
            lambda: prior(COUNTS.to_numpy(), targets=["A", "B"]), ValueError, "4 columns and 2", id="number of columns"
        ),
        pytest.param(
            lambda: prior(COUNTS.to_numpy(), targets=["A", "A", None, "NT"]), ValueError, "1 without", id="missing"
        ),
        pytest.param(lambda: prior(labels=LABELS[:3]), ValueError, "8 of them; received 3", id="labels"),
        pytest.param(
            lambda: prior(labels=pd.Series(LABELS, index=list("abcdefgh"))), ValueError, "same order", id="index"
        ),
        pytest.param(lambda: prior(labels=["a", *LABELS[1:]]), ValueError, "'a' without .did you mean 'A'", id="case"),
        pytest.param(lambda: prior(labels=[None, *LABELS[1:]]), ValueError, "missing", id="label missing"),
        pytest.param(lambda: prior(cell_types=["x"] * 7 + [None]), ValueError, "1 missing", id="type"),
        pytest.param(lambda: prior(offset=1), ValueError, "below 1", id="offset"),
        pytest.param(lambda: prior(control_value=np.nan), ValueError, "finite number", id="control value"),
        pytest.param(
            lambda: guide_table(["STAT1g1"], {"Stat1g1": "STAT1"}), ValueError, "mean 'Stat1g1'", id="case of a guide"
        ),
        pytest.param(lambda: pp.rank_to_z([1, np.nan]), ValueError, "finite", id="NaN values"),
    ],
)
def test_bad_input(call, error, part) -> None:
    with pytest.raises(error, match=part):
        call()
