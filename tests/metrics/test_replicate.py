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
    pearson_delta,
    replicate_ceiling,
)


def make_screen(
    n_per_label: int = 40,
    n_controls: int = 40,
    n_labels: int = 8,
    n_genes: int = 60,
    effect: float = 0.0,
    seed: int = 0,
) -> ad.AnnData:
    """Poisson counts; every perturbation moves its own six genes by ``effect`` (log2)."""
    rng = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(n_labels)]
    labels = np.array(["control"] * n_controls + list(np.repeat(names, n_per_label)))
    base = rng.gamma(2.0, 2.0, size=n_genes)
    rate = np.tile(base, (len(labels), 1))
    for i, name in enumerate(names):
        genes = (6 * i + np.arange(6)) % n_genes
        rate[np.ix_(labels == name, genes)] *= 2.0 ** (effect * np.resize([1, -1], 6))
    obs = pd.DataFrame({"perturbation": labels}, index=[f"cell{i}" for i in range(len(labels))])
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


def test_nothing_happens_separate_controls_say_so_and_shared_controls_do_not() -> None:
    """Two halves of inert perturbations correlate at about 1/2 only if they share an equally large control."""
    separate, shared = [], []
    for seed in range(6):
        null = make_screen(n_controls=20, seed=seed)
        separate.append(replicate_ceiling(null, "perturbation", n_repeats=2, seed=seed).loc["ate_pearson", "mean"])
        control = (null.obs["perturbation"] == "control").to_numpy()
        first = np.arange(null.n_obs) % 2 == 0
        halves = [average_treatment_effects(null[control | h].copy(), "perturbation") for h in (first, ~first)]
        shared.append(ate_pearson(*halves))
    assert abs(np.mean(separate)) < 0.15
    np.testing.assert_allclose(np.mean(shared), 0.5, atol=0.1)


def test_strong_effects_reach_one_and_labels_decide() -> None:
    strong = make_screen(effect=3.0, n_per_label=100, n_controls=200)
    table = replicate_ceiling(strong, "perturbation")
    assert (table.loc[["ate_pearson", "pearson_delta", "pearson_delta_perturbed_mean"], "mean"] > 0.9).all()
    np.testing.assert_allclose(table.loc["perturbation_discrimination", "mean"], 1.0)
    assert (table["sd"] < 0.05).all()
    permuted = strong.copy()
    permuted.obs["perturbation"] = np.random.default_rng(0).permutation(permuted.obs["perturbation"].to_numpy())
    assert replicate_ceiling(permuted, "perturbation").loc["pearson_delta", "mean"] < 0.3


def test_seeded_and_order_of_genes_does_not_matter() -> None:
    cells = make_screen(effect=1.0)
    first = replicate_ceiling(cells, "perturbation", n_repeats=2, seed=3)
    pd.testing.assert_frame_equal(first, replicate_ceiling(cells, "perturbation", n_repeats=2, seed=3))
    assert not first.equals(replicate_ceiling(cells, "perturbation", n_repeats=2, seed=4))
    turned = replicate_ceiling(cells[:, ::-1].copy(), "perturbation", n_repeats=2, seed=3)
    np.testing.assert_allclose(turned.loc["ate_pearson", "mean"], first.loc["ate_pearson", "mean"])
    assert list(first.columns) == ["mean", "sd", "full_size"]
    assert first.index.name == "metric"


def test_one_repeat_and_labels_of_one_cell() -> None:
    cells = make_screen(effect=1.0)
    table = replicate_ceiling(cells, "perturbation", n_repeats=1)
    assert (table["sd"] == 0).all()
    lone = cells[(cells.obs["perturbation"] != "p0") | (cells.obs_names == "cell40")].copy()
    assert (lone.obs["perturbation"] == "p0").sum() == 1
    assert np.isfinite(replicate_ceiling(lone, "perturbation", n_repeats=1)["mean"]).all()


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        pytest.param(slice(39, None), {}, "at least two control cells", id="one control"),
        pytest.param([0, 1, 40, 80], {}, "at least two cells", id="single cells"),
        pytest.param(slice(None), {"n_repeats": 0}, "`n_repeats` must be a positive integer", id="no repeat"),
    ],
)
def test_bad_inputs(rows, kwargs, message) -> None:
    cells = make_screen()[rows].copy()
    with pytest.raises(ValueError, match=message):
        replicate_ceiling(cells, "perturbation", **kwargs)
    assert list(cells.obs.columns) == ["perturbation"]


def test_full_size_is_that_of_twice_the_cells() -> None:
    """Extrapolated within 40 cells a label, measured with another 40: the average over screens agrees."""
    extrapolated, measured = [], []
    for seed in range(6):
        cells = make_screen(80, 80, effect=0.8, seed=seed)
        first = np.arange(cells.n_obs) % 2 == 0
        one, two = cells[first].copy(), cells[~first].copy()
        extrapolated.append(replicate_ceiling(one, "perturbation", seed=seed)["full_size"])
        effects = [average_treatment_effects(a, "perturbation") for a in (one, two)]
        measured.append([score(*effects) for score in (ate_pearson, ate_r2, pearson_delta)])
    names = ["ate_pearson", "ate_r2", "pearson_delta"]
    np.testing.assert_allclose(
        np.mean(measured, axis=0), pd.concat(extrapolated, axis=1).mean(axis=1)[names], atol=0.04
    )


def test_full_size_of_nothing_is_nothing() -> None:
    """Noise must not be extrapolated to a ceiling: correlations of inert perturbations stay near zero on every screen."""
    for seed in range(20):
        table = replicate_ceiling(make_screen(seed=seed), "perturbation", n_repeats=3, seed=seed)
        kept = ["ate_pearson", "pearson_delta", "pearson_delta_top_20", "ate_pearson_top_20"]
        gain = table.loc[kept, "full_size"] - table.loc[kept, "mean"]
        assert (gain <= np.maximum(1.5 * table.loc[kept, "mean"], 0) + 1e-9).all(), table
        assert table.loc["ate_pearson", "full_size"] < 0.5


def test_reference_of_the_training_effects() -> None:
    cells = make_screen(effect=2.0)
    train = average_treatment_effects(cells, "perturbation")
    one = cells[cells.obs["perturbation"].isin(["control", "p0"])].copy()
    assert "pearson_delta_perturbed_mean" not in replicate_ceiling(one, "perturbation").index
    with_reference = replicate_ceiling(one, "perturbation", train=train)
    assert with_reference.loc["pearson_delta_perturbed_mean", "full_size"] > 0.5
    with pytest.raises(ValueError, match="average_treatment_effects"):
        replicate_ceiling(one, "perturbation", train=train.to_df())
