"""Separation in a latent space, marker scores and scores of probabilities: closed forms, simulated truth, bad input."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from scipy.spatial.distance import cdist
from scipy.stats import norm

from scvi_cradle.metrics import latent_separation, marker_score, mmd_rbf, probability_scores
from scvi_cradle.metrics._distances import median_distance
from scvi_cradle.metrics._separation import _mean_kernel


def groups(sizes: dict[str, int], shift: dict[str, float], d: int = 3, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = [name for name, n in sizes.items() for _ in range(n)]
    z = rng.normal(size=(len(labels), d))
    z[:, 0] += [shift.get(name, 0.0) for name in labels]
    order = rng.permutation(len(labels))
    return z[order], [labels[i] for i in order]


# --- separation


def test_kernel_by_hand() -> None:
    x, y = np.array([[0.0], [1]]), np.array([[2.0], [3]])
    d2 = {(0, 0): [0, 1, 1, 0], (1, 1): [0, 1, 1, 0], (0, 1): [4, 9, 1, 4]}
    for (i, j), distances in d2.items():
        expected = np.mean([np.exp(-np.array(distances) / (2 * s**2)) for s in (0.5, 1, 2)])
        np.testing.assert_allclose(_mean_kernel((x, y)[i], (x, y)[j], 1.0), expected, rtol=1e-12)
    table = latent_separation([0.0, 1, 2, 3], ["c", "c", "A", "A"], control="c", n_draws=3)
    np.testing.assert_allclose(table.loc["A", "mmd"], 0.9673664259, atol=1e-10)  # the median distance of 0 and 1 is 1
    assert table.loc["A", "l2"] == pytest.approx(2)
    assert list(table.loc["A", ["n_cells", "n_drawn"]]) == [2, 2]


def test_all_cells_are_the_plain_discrepancy() -> None:
    z, labels = groups({"c": 30, "A": 30, "B": 30}, {"A": 1.0})
    table = latent_separation(z + 1e3, labels, control="c", n_draws=2)  # far from the origin
    labels = np.array(labels)
    for name in ("A", "B"):
        expected = mmd_rbf(z[labels == "c"], z[labels == name])
        np.testing.assert_allclose(table.loc[name, "mmd"], expected, rtol=1e-8)
        distance = np.linalg.norm(z[labels == "c"].mean(axis=0) - z[labels == name].mean(axis=0))
        np.testing.assert_allclose(table.loc[name, "l2"], distance, rtol=1e-9)
    assert (table["n_drawn"] == 30).all()


def test_draws_average_to_their_expectation() -> None:
    """Without replacement, two different cells of a draw are a random pair: the mean has a closed form."""
    z, labels = groups({"c": 60, "A": 40, "B": 12}, {"A": 1.5})
    table = latent_separation(z, labels, control="c", n_draws=3_000)
    assert (table["n_drawn"] == 12).all()
    labels = np.array(labels)
    x, y = z[labels == "c"], z[labels == "A"]
    width, n = median_distance(x, 3), 12

    def mean(a: np.ndarray, b: np.ndarray, *, own: bool) -> float:
        d2 = cdist(a, b, "sqeuclidean")
        k = np.mean([np.exp(-d2 / (2 * (width * f) ** 2)) for f in (0.5, 1, 2)], axis=0)
        return (k.sum() - len(a)) / (len(a) * (len(a) - 1)) * (1 - 1 / n) + 1 / n if own else k.mean()

    expected = mean(x, x, own=True) + mean(y, y, own=True) - 2 * mean(x, y, own=False)
    assert table.loc["A", "mmd"] == pytest.approx(expected, abs=0.005)
    assert table.loc["B", "mmd"] < 0.5 * table.loc["A", "mmd"]


def test_separation_grows_with_the_shift_and_inert_labels_look_like_controls() -> None:
    sizes = {"c": 400, **{f"T{i}": 80 for i in range(4)}, "null": 80}
    z, labels = groups(sizes, {"T1": 0.7, "T2": 1.5, "T3": 3.0}, d=10)
    table = latent_separation(z, labels, control="c", n_draws=30)
    assert list(table.index) == ["T0", "T1", "T2", "T3", "null"]
    for column in ("mmd", "l2"):
        assert table.loc["T1":"T3", column].is_monotonic_increasing
        assert abs(table.loc["T0", column] - table.loc["null", column]) < 0.3 * table.loc["T2", column]
    assert table.loc["T3", "l2"] == pytest.approx(3, abs=0.5)


def test_sizes_of_draws_and_seeds() -> None:
    z, labels = groups({"c": 50, "A": 20, "B": 5, "A+B": 9}, {})
    table = latent_separation(z, labels, control="c", n_draws=5)
    assert list(table.index) == ["A", "A+B", "B"]  # labels are not split
    assert list(table["n_cells"]) == [20, 9, 5]
    assert (table["n_drawn"] == 5).all()
    more = latent_separation(z, labels, control="c", n_draws=5, n_cells=30)  # more than some have
    assert (more["n_drawn"] == 30).all()
    pd.testing.assert_frame_equal(latent_separation(z, labels, control="c", n_draws=5), table)
    assert not latent_separation(z, labels, control="c", n_draws=5, seed=1)["mmd"].equals(table["mmd"])
    frame = pd.DataFrame(z)
    series = pd.Series(labels, index=[f"x{i}" for i in range(len(z))], dtype="category")
    pd.testing.assert_frame_equal(latent_separation(frame, series, control=["c", "d"], n_draws=5), table)


# --- markers


def expression() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(rng.gamma(2.0, size=(50, 6)), columns=list("abcdef"), index=[f"c{i}" for i in range(50)])


def test_markers_by_hand() -> None:
    x = pd.DataFrame({"a": [0.0, 2, 4], "b": [1.0, 1, 4], "flat": [3.0, 3, 3], "other": [9.0, 0, 0]})
    a, b = np.array([-1.5, 0, 1.5]) / np.sqrt(1.5), np.array([-1.0, -1, 2]) / np.sqrt(2)
    score = marker_score(x, pd.Series({"a": 2.0, "b": -0.5, "flat": 1.0, "not measured": -9.0}))
    np.testing.assert_allclose(score, (a - b + 0) / 3)
    np.testing.assert_allclose(marker_score(x, pd.Series({"a": 2.0, "b": -2.5}), n_markers=1), -b)


def test_markers_do_not_depend_on_scale_order_or_form() -> None:
    x, markers = expression(), pd.Series({"a": 1.0, "c": -0.3, "f": 0.1, "e": 0.0})
    score = marker_score(x, markers)
    np.testing.assert_allclose(score.mean(), 0, atol=1e-12)
    np.testing.assert_allclose(marker_score(x * 7 + 3, markers * 5), score)
    np.testing.assert_allclose(marker_score(x.iloc[:, ::-1], markers[::-1]), score)
    for matrix in (x.to_numpy(), sp.csr_matrix(x.to_numpy())):
        adata = AnnData(matrix, obs=pd.DataFrame(index=x.index), var=pd.DataFrame(index=x.columns))
        np.testing.assert_allclose(marker_score(adata, markers), score)


# --- probabilities


def test_probabilities_by_hand() -> None:
    truth, p = np.array([0, 0, 1, 1, 1]), np.array([0.1, 0.35, 0.3, 0.85, 1.0])
    scores = probability_scores(truth, p, n_bins=10)
    assert scores["auroc"] == pytest.approx(5 / 6)
    assert scores["brier"] == pytest.approx(np.mean((truth - p) ** 2))
    table = scores["calibration"]
    np.testing.assert_allclose(table["low"], [0.1, 0.3, 0.8, 0.9])
    np.testing.assert_allclose(table["high"], [0.2, 0.4, 0.9, 1.0])
    assert list(table["n"]) == [1, 2, 1, 1]
    np.testing.assert_allclose(table["mean_probability"], [0.1, 0.325, 0.85, 1])
    np.testing.assert_allclose(table["share_perturbed"], [0, 0.5, 1, 1])
    z2 = norm.ppf(0.975) ** 2
    np.testing.assert_allclose(table["ci_high"].iloc[0], z2 / (1 + z2))  # Wilson, 0 of 1
    half = np.sqrt(z2) / (2 + z2) * np.sqrt(2 * 0.25 + z2 / 4)
    np.testing.assert_allclose(table.loc[1, ["ci_low", "ci_high"]].to_numpy(float), [0.5 - half, 0.5 + half])


def test_calibrated_probabilities_lie_in_their_intervals_and_others_do_not() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(0.7, 0.9, size=20_000)
    truth = rng.random(20_000) < p
    good, bad = (probability_scores(truth, q)["calibration"] for q in (p, np.sqrt(p)))
    covered = [t["mean_probability"].between(t["ci_low"], t["ci_high"]).mean() for t in (good, bad)]
    assert covered[0] >= 0.8
    assert covered[1] <= 0.3
    assert probability_scores(truth, p)["brier"] < probability_scores(truth, np.sqrt(p))["brier"]
    assert probability_scores(truth, p)["auroc"] == probability_scores(truth, np.sqrt(p))["auroc"]
    assert good["n"].sum() == 20_000


# --- bad input

Z, L = groups({"c": 10, "A": 10}, {})


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        pytest.param(lambda: latent_separation(Z * np.nan, L, control="c"), ValueError, "finite", id="NaN"),
        pytest.param(lambda: latent_separation(Z, L), ValueError, "must be a control", id="no control"),
        pytest.param(
            lambda: latent_separation(Z, L[:3], control="c"), ValueError, "20 of them; received 3", id="labels"
        ),
        pytest.param(
            lambda: latent_separation(Z, ["c"] * 20, control="c"), ValueError, "beside the control", id="only"
        ),
        pytest.param(lambda: latent_separation(Z, [None, *L[1:]], control="c"), ValueError, "missing", id="missing"),
        pytest.param(
            lambda: latent_separation(Z, ["B", *L[1:]], control="c"), ValueError, "'B' having 1: leave", id="one cell"
        ),
        pytest.param(lambda: latent_separation(Z, L, control="c", n_draws=0), ValueError, "n_draws", id="draws"),
        pytest.param(lambda: latent_separation(Z, L, control="c", n_cells=1), ValueError, "at least 2", id="cells"),
        pytest.param(lambda: latent_separation(np.ones((20, 2)), L, control="c"), ValueError, "distance of 0", id="0"),
        pytest.param(lambda: marker_score(expression().to_numpy(), pd.Series({"a": 1})), TypeError, "name", id="array"),
        pytest.param(lambda: marker_score(expression(), pd.Series({"z": 1})), ValueError, "'z', where", id="no marker"),
        pytest.param(lambda: marker_score(expression(), pd.Series({"a": 0})), ValueError, "is not 0", id="no sign"),
        pytest.param(lambda: marker_score(expression(), pd.Series({"a": np.nan})), ValueError, "for 'a'", id="change"),
        pytest.param(
            lambda: marker_score(expression() * np.nan, pd.Series({"a": 1})), ValueError, "`x` must hold finite", id="x"
        ),
        pytest.param(
            lambda: marker_score(expression(), pd.Series([1, 2], index=["a", "a"])), ValueError, "unique", id="doubled"
        ),
        pytest.param(lambda: probability_scores([0, 1], [0.1]), ValueError, "shapes", id="lengths"),
        pytest.param(lambda: probability_scores([0, 2], [0.1, 0.2]), ValueError, "0/1", id="truth"),
        pytest.param(lambda: probability_scores([0, 1], [0.1, np.nan]), ValueError, "between 0 and 1", id="NaN p"),
        pytest.param(lambda: probability_scores([1, 1], [0.1, 0.2]), ValueError, "both kinds", id="one class"),
    ],
)
def test_bad_input(call, error, part) -> None:
    with pytest.raises(error, match=part):
        call()
