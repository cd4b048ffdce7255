"""Pathways from masks: perfect where the mask tells them, the baseline where it does not."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_cradle.metrics import pathway_accuracy

NAMES = [f"T{i:02d}" for i in range(40)]
PATHWAYS = pd.Series(np.repeat(["ribosome", "proteasome"], [28, 12]), index=NAMES)


@pytest.fixture
def mask() -> pd.DataFrame:
    """The first two latents tell the pathway, the others are noise; no probability says more than its binary value."""
    rng = np.random.default_rng(0)
    ribosome = (PATHWAYS == "ribosome").to_numpy()
    ones = np.column_stack([ribosome, ~ribosome, rng.random((40, 2)) < 0.5])
    return pd.DataFrame(np.where(ones, 0.9, 0.1), index=NAMES)


def test_informative_mask(mask) -> None:
    score = pathway_accuracy(mask, PATHWAYS)
    assert list(score) == ["accuracy", "sd", "baseline", "n_treatments", "n_pathways"]
    assert score["accuracy"] == 1.0
    assert score["sd"] == 0.0
    assert score["baseline"] == pytest.approx(0.7, abs=0.1)
    assert (score["n_treatments"], score["n_pathways"]) == (40, 2)


def test_constant_mask_scores_the_baseline(mask) -> None:
    score = pathway_accuracy(mask * 0.0, PATHWAYS, n_splits=6)
    assert score["accuracy"] == pytest.approx(score["baseline"])
    assert score["sd"] > 0.0


def test_only_the_binary_mask_is_seen(mask) -> None:
    told = mask.copy()
    told[[0, 1]] *= 0.5  # the pathway stays in the probabilities (0.45 or 0.05), all of them below 0.5
    blind = pathway_accuracy(told, PATHWAYS, n_splits=4)
    noise_only = mask.copy()
    noise_only[[0, 1]] = 0.0
    assert blind == pathway_accuracy(noise_only, PATHWAYS, n_splits=4)
    assert blind["accuracy"] < 0.9


def test_forms_of_input_agree_and_order_of_labels_is_free(mask) -> None:
    effects = ad.AnnData(np.zeros(mask.shape), obs=pd.DataFrame(index=NAMES), layers={"mask_prob": mask.to_numpy()})
    first = pathway_accuracy(effects, PATHWAYS, n_splits=3, seed=4)
    mapping = {**dict(reversed(list(PATHWAYS.items()))), "UNKNOWN": "ribosome"}
    assert pathway_accuracy(mask, mapping, n_splits=3, seed=4) == first
    assert pathway_accuracy(mask, PATHWAYS.astype("category"), n_splits=3, seed=4) == first


def test_treatments_without_a_pathway_are_left_out(mask) -> None:
    some = PATHWAYS.copy().astype(object)
    some.iloc[:8] = None
    score = pathway_accuracy(mask, some, n_splits=3)
    assert score["n_treatments"] == 32
    assert score == pathway_accuracy(mask.iloc[8:], PATHWAYS, n_splits=3)


def test_seed_and_global_state(mask) -> None:
    noise = mask.copy()
    noise[[0, 1]] = 0.0
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert pathway_accuracy(noise, PATHWAYS, n_splits=3) == pathway_accuracy(noise, PATHWAYS, n_splits=3)
    assert pathway_accuracy(noise, PATHWAYS, n_splits=3) != pathway_accuracy(noise, PATHWAYS, n_splits=3, seed=1)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask_prob": np.zeros((40, 3))}, TypeError, "`mask_prob` must be an AnnData or a DataFrame"),
        ({"pathways": list(PATHWAYS)}, TypeError, "`pathways` must be a mapping or a Series"),
        ({"pathways": {"other": "a", "name": "b"}}, ValueError, "received 0 for 0 of the treatments"),
        ({"pathways": PATHWAYS.iloc[:5]}, ValueError, "received 1 for 5 of the treatments"),
        ({"pathways": pd.concat([PATHWAYS, PATHWAYS.iloc[:1]])}, ValueError, "received several for 'T00'"),
        ({"n_splits": 1}, ValueError, "`n_splits` must be at least 2"),
        ({"test_fraction": 1.0}, ValueError, "`test_fraction` must lie strictly between 0 and 1"),
        ({"seed": -1}, ValueError, "`seed` must be a non-negative integer"),
    ],
)
def test_bad_inputs(mask, change, error, message) -> None:
    with pytest.raises(error, match=message):
        pathway_accuracy(**{"mask_prob": mask, "pathways": PATHWAYS, **change})
