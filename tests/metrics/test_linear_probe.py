"""The linear probe: closed forms of its accuracy, chance, its split, and what it refuses."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from scvi_cradle.datasets import simulate_scm
from scvi_cradle.metrics import _linear_probe, linear_probe

KEYS = {"accuracy", "balanced_accuracy", "chance", "balanced_chance", "n_classes", "n_test"}


def groups(n: int, shift: float, *, n_classes: int = 2, n_dimensions: int = 3, seed: int = 0):
    """Normal cells whose first dimension tells the class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % n_classes)
    z = rng.normal(size=(n, n_dimensions))
    z[:, 0] += shift * labels
    return z, np.array([f"P{i}" for i in labels])


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_two_normal_groups_reach_the_accuracy_of_bayes(shift) -> None:
    z, labels = groups(20_000, shift)
    found = linear_probe(z, labels)
    assert set(found) == KEYS
    assert found["n_test"] == 4000
    # the best boundary lies half way between the groups
    expected = norm.cdf(shift / 2)
    assert found["accuracy"] == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 4000))
    assert found["balanced_accuracy"] == pytest.approx(found["accuracy"], abs=1e-12)
    assert found["chance"] == found["balanced_chance"] == 0.5


def test_three_groups_apart_are_told_and_chance_is_known() -> None:
    z, _ = groups(1000, 0.0)
    labels = np.repeat(["A", "B", "C"], [600, 300, 100])
    found = linear_probe(z + 20 * pd.factorize(labels)[0][:, None] ** np.array([1, 2, 1]), labels)
    assert found == {
        "accuracy": 1.0,
        "balanced_accuracy": 1.0,
        "chance": 0.6,
        "balanced_chance": pytest.approx(1 / 3),
        "n_classes": 3,
        "n_test": 200,
    }
    blind = linear_probe(z, labels)
    assert blind["accuracy"] == pytest.approx(0.6, abs=0.02)
    assert blind["balanced_accuracy"] == pytest.approx(1 / 3, abs=0.02)


def test_only_linear_traces_are_seen() -> None:
    z, labels = groups(2000, 0.0, n_dimensions=2)
    labels = np.where(np.abs(z[:, 0]) > 0.67, "far", "near")
    assert linear_probe(z, labels)["balanced_accuracy"] < 0.6
    assert linear_probe(z**2, labels)["balanced_accuracy"] > 0.9


def test_units_order_and_names_do_not_matter() -> None:
    z, labels = groups(500, 2.0, n_classes=3)
    found = linear_probe(z, labels)
    assert linear_probe(z * np.array([1e-6, 1e4, 1.0]) + 7.0, labels) == pytest.approx(found)
    assert linear_probe(z[:, ::-1], labels) == pytest.approx(found)
    named = pd.Categorical(labels, categories=["P2", "P1", "P0", "unused"])
    assert linear_probe(pd.DataFrame(z), named) == found
    assert linear_probe(z, pd.Series(labels, index=np.arange(500)[::-1])) == found
    assert linear_probe(z, pd.factorize(labels)[0]) == found
    constant = np.column_stack([z, np.full(500, 3.0)])
    assert linear_probe(constant, labels) == pytest.approx(found)


def test_seeds() -> None:
    z, labels = groups(300, 1.0)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    before = z.copy(), labels.copy()
    first = linear_probe(z, labels, n_components=2, seed=1)
    assert linear_probe(z, labels, n_components=2, seed=1) == first
    assert len({linear_probe(z, labels, seed=seed)["accuracy"] for seed in range(5)}) > 1
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    np.testing.assert_array_equal(z, before[0])
    np.testing.assert_array_equal(labels, before[1])


@pytest.mark.parametrize(("fraction", "sizes"), [(0.2, [20, 2, 1, 1]), (0.9, [90, 9, 2, 1]), (0.01, [1, 1, 1, 1])])
def test_every_class_is_on_both_sides(fraction, sizes) -> None:
    codes = np.repeat(np.arange(4), [100, 10, 3, 2])
    test = _linear_probe._held_out(np.random.default_rng(0), codes, fraction)
    assert np.bincount(codes[test], minlength=4).tolist() == sizes
    assert (np.bincount(codes[~test], minlength=4) > 0).all()


def test_smallest_input() -> None:
    found = linear_probe([[0.0], [0.1], [5.0], [5.1]], ["A", "A", "B", "B"])
    assert found["n_test"] == 2
    assert found["accuracy"] == 1.0


def test_components_are_those_of_the_training_cells() -> None:
    z, labels = groups(400, 5.0, n_dimensions=40)
    z[:, 1:] *= 0.2
    assert linear_probe(z, labels, n_components=1)["accuracy"] > 0.9
    z[:, 1:] *= 100.0
    assert linear_probe(z, labels, n_components=1)["accuracy"] < 0.65, "components follow the variance, not the labels"
    assert linear_probe(z, labels, n_components=40)["accuracy"] > 0.85
    # a huge value in a held-out cell does not turn the components
    z, labels = groups(400, 8.0)
    test = _linear_probe._held_out(np.random.default_rng(0), pd.factorize(labels)[0], 0.2)
    z[np.flatnonzero(test)[0]] = [0.0, 1e6, 0.0]
    assert linear_probe(z, labels, n_components=1)["accuracy"] > 0.95


def test_invariant_latents_of_a_simulation_tell_nothing() -> None:
    adata = simulate_scm()
    perturbed = (adata.obs["perturbation"] != "control").to_numpy()
    labels = adata.obs["perturbation"][perturbed]
    leak, told = (linear_probe(adata.obsm[key][perturbed], labels) for key in ("z_invariant", "noise_responsive"))
    assert leak["n_classes"] == 12
    assert leak["n_test"] == 396  # 33 of 166 or 167 cells each
    assert leak["balanced_accuracy"] == pytest.approx(1 / 12, abs=4 * np.sqrt(1 / 12 / 396))
    assert told["balanced_accuracy"] > 0.35


def test_a_probe_that_does_not_converge_says_so(monkeypatch) -> None:
    z, labels = groups(300, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settled = linear_probe(z, labels)
    monkeypatch.setattr(_linear_probe, "_MAX_ITER", 1)
    with pytest.warns(UserWarning, match="did not converge in 1 iterations.*`n_components`") as caught:
        stopped = linear_probe(z, labels)
    assert [item.category for item in caught] == [UserWarning]
    assert caught[0].filename == __file__
    assert stopped["accuracy"] == pytest.approx(settled["accuracy"], abs=0.1)


Z, LABELS = groups(20, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_probe(Z[:, 0], LABELS), r"`representation` must be a matrix .* shape \(20,\)"),
        (lambda: linear_probe(Z * np.nan, LABELS), "`representation` must be finite"),
        (lambda: linear_probe(Z, LABELS[:7]), "a label for each of the 20 cells; received 7, 0 of them missing"),
        (lambda: linear_probe(Z, [None, *LABELS[1:]]), "received 20, 1 of them missing: drop"),
        (lambda: linear_probe(Z, ["A"] * 20), "at least two different labels; received 'A'"),
        (lambda: linear_probe(Z, ["C", "D", *LABELS[2:]]), "at least 2 cells.* received one cell of 'C', 'D': drop"),
        (lambda: linear_probe(Z, LABELS, test_fraction=1.0), "`test_fraction` must lie strictly between"),
        (lambda: linear_probe(Z, LABELS, n_components=0), "`n_components` must be a positive integer; received 0"),
        (lambda: linear_probe(Z, LABELS, n_components=4), "the 3 dimensions and the 16 .* 4: lower it to 3"),
        (lambda: linear_probe(Z, LABELS, seed=-1), "`seed` must be a non-negative integer"),
    ],
)
def test_bad_inputs(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
