"""Cells from a causal model of latents: structural equations, partners, conditions of identifiability."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_cradle.datasets import simulate_scm
from scvi_cradle.datasets._simulate_scm import _draw_mechanisms
from scvi_cradle.metrics import block_r2

SMALL = {"n_cells": 400, "n_genes": 40}
TABLES = {"mean", "scale", "mask", "context_mask", "cut", "effects"}


@pytest.fixture(scope="module")
def scm() -> ad.AnnData:
    return simulate_scm()


def environment_rows(adata: ad.AnnData) -> np.ndarray:
    """Row of the truth's arrays of every cell."""
    return adata.uns["truth"]["mean"].index.get_indexer(adata.obs["perturbation"].astype(str))


def partners(adata: ad.AnnData) -> np.ndarray:
    return adata.obs_names.get_indexer(adata.obs["control_partner"].astype(str))


# ---------------------------------------------------------------------------------------------------- form


def test_form(scm) -> None:
    names = [f"E{i:02d}" for i in range(1, 13)]
    assert scm.shape == (4000, 500)
    assert scm.X.dtype == np.float32
    np.testing.assert_allclose(scm.X.mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(scm.X.std(axis=0), 1.0, atol=1e-5)
    assert list(scm.obs["perturbation"].cat.categories) == [*names, "control"]
    assert scm.uns["control"] == "control"
    sizes = scm.obs["perturbation"].value_counts()
    assert sizes["control"] == 2000
    assert set(sizes.drop("control")) == {166, 167}
    assert list(scm.obs["split"].cat.categories) == ["train", "val", "test"]
    assert scm.obs["split"].value_counts().to_dict() == {"train": 3000, "test": 1000, "val": 0}
    assert scm.obs["perturbation"].iloc[:50].nunique() > 8, "cells come in random order"
    assert list(scm.obs_names) == sorted(scm.obs_names)

    truth = scm.uns["truth"]
    assert set(truth) == TABLES | {"weights", "context_weights"}
    assert truth["weights"].shape == (13, 4, 4)
    assert truth["context_weights"].shape == (13, 4, 7)
    for key, shape in {
        "mean": (13, 4),
        "scale": (13, 4),
        "mask": (4, 4),
        "context_mask": (4, 7),
        "cut": (13, 4),
    }.items():
        assert truth[key].shape == shape
    for key in ("mean", "scale", "cut"):
        assert list(truth[key].index) == [*names, "control"]
    assert list(truth["effects"].index) == names
    assert list(truth["effects"].columns) == list(scm.var_names)


def test_every_environment_has_the_split_of_its_share(scm) -> None:
    share = pd.crosstab(scm.obs["perturbation"], scm.obs["split"], normalize="index")["test"]
    np.testing.assert_allclose(share, 0.25, atol=0.01)


@pytest.mark.parametrize(("n_cells", "n_environments"), [(64, 8), (65, 8), (130, 13)])
def test_smallest_sizes(n_cells, n_environments) -> None:
    adata = simulate_scm(n_cells, 11, n_environments=n_environments)
    assert adata.shape == (n_cells, 11)
    table = pd.crosstab(adata.obs["perturbation"], adata.obs["split"])
    assert (table[["train", "test"]] > 0).all(axis=None)
    assert table.loc["control"].sum() == n_cells - n_cells // 2
    assert np.isfinite(adata.X).all()


def test_one_latent_of_each_kind() -> None:
    adata = simulate_scm(400, 20, 1, 1, 2)
    truth = adata.uns["truth"]
    assert truth["weights"].shape == (3, 1, 1)
    assert not truth["weights"].any()
    noise = adata.obsm["noise_responsive"]
    context = truth["context_weights"][environment_rows(adata), 0, :] * adata.obsm["z_invariant"]
    np.testing.assert_allclose(adata.obsm["z_responsive"], noise + context, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- partners


def test_partners_share_the_invariant_latents(scm) -> None:
    partner, labels = partners(scm), scm.obs["perturbation"].to_numpy()
    z = scm.obsm["z_invariant"]
    control = labels == "control"
    np.testing.assert_array_equal(z[partner], z)
    assert (labels[partner] == "control").all()
    np.testing.assert_array_equal(partner[control], np.flatnonzero(control))
    assert len(np.unique(partner[~control])) == 2000, "every perturbed cell has a partner of its own"
    assert len(np.unique(z[control], axis=0)) == 2000
    split = scm.obs["split"].to_numpy()
    assert (split[partner] == split).all()
    noise = scm.obsm["noise_responsive"]
    assert np.abs(np.corrcoef(noise[~control].T, noise[partner[~control]].T)[:4, 4:]).max() < 0.1


def test_a_control_is_left_over_by_odd_numbers() -> None:
    adata = simulate_scm(401, 40)
    alone = adata.obs_names.difference(adata.obs["control_partner"][adata.obs["perturbation"] != "control"])
    left = adata.obs.loc[alone]
    left = left[left["perturbation"] == "control"]
    assert len(left) == 1
    assert list(left["split"]) == ["train"]
    assert list(left["control_partner"]) == list(left.index)


# ---------------------------------------------------------------------------------------------------- equations


def test_structural_equations_hold(scm) -> None:
    truth, row = scm.uns["truth"], environment_rows(scm)
    z, context, noise = (scm.obsm[key] for key in ("z_responsive", "z_invariant", "noise_responsive"))
    solved = np.linalg.solve(
        np.eye(4) - truth["weights"][row],
        (noise + np.einsum("nij,nj->ni", truth["context_weights"][row], context))[:, :, None],
    )[:, :, 0]
    np.testing.assert_allclose(z, solved, atol=1e-12)
    assert np.abs(z - noise).max() > 1.0, "the weights matter"


def test_noise_has_its_moments() -> None:
    adata = simulate_scm(40_000, 11, seed=4)
    truth, row = adata.uns["truth"], environment_rows(adata)
    standard = (adata.obsm["noise_responsive"] - truth["mean"].to_numpy()[row]) / truth["scale"].to_numpy()[row]
    for environment in range(13):
        cells = standard[row == environment]
        assert np.abs(cells.mean(axis=0)).max() * np.sqrt(len(cells)) < 4.0
        assert np.abs(cells.std(axis=0) - 1.0).max() * np.sqrt(2 * len(cells)) < 4.0
    np.testing.assert_allclose(np.cov(adata.obsm["z_invariant"].T), np.eye(7), atol=0.04)
    control = adata.obsm["noise_responsive"][row == 12]
    np.testing.assert_allclose(np.cov(control.T), np.eye(4), atol=0.04)


@pytest.mark.parametrize("seed", range(5))
def test_weights(seed) -> None:
    truth = simulate_scm(**SMALL, seed=seed).uns["truth"]
    mask, context_mask, cut = (truth[key].to_numpy() for key in ("mask", "context_mask", "cut"))
    for key, allowed in (("weights", mask), ("context_weights", context_mask)):
        drawn = truth[key]
        expected = np.broadcast_to(allowed, drawn.shape) & ~cut[:, :, None]
        np.testing.assert_array_equal(drawn != 0, expected)
        size = np.abs(drawn[expected])
        assert size.min() >= 0.2
        assert size.max() <= 1.0
        assert (drawn < 0).any()
        assert (drawn > 0).any()
        assert len(np.unique(drawn[expected])) == expected.sum(), "every environment has weights of its own"
    assert not np.triu(truth["weights"]).any()
    assert truth["mean"].loc["control"].eq(0).all()
    assert truth["scale"].loc["control"].eq(1).all()
    assert truth["mean"].drop("control").abs().to_numpy().max() <= 2
    assert truth["scale"].drop("control").to_numpy().min() >= 0.1
    assert truth["scale"].drop("control").to_numpy().max() <= 2


def test_weights_are_uniform_with_random_signs() -> None:
    model = _draw_mechanisms(np.random.default_rng(0), 400, 8, 20)
    drawn = model.context_weights[model.context_weights != 0]
    assert len(drawn) > 10_000
    assert (drawn > 0).mean() == pytest.approx(0.5, abs=0.02)
    np.testing.assert_allclose(np.quantile(np.abs(drawn), [0.25, 0.5, 0.75]), [0.4, 0.6, 0.8], atol=0.02)
    assert model.mean[:-1].std() == pytest.approx(4 / np.sqrt(12), abs=0.05)
    assert model.scale[:-1].mean() == pytest.approx(1.05, abs=0.05)


def test_degrees_and_densities() -> None:
    models = [_draw_mechanisms(np.random.default_rng(seed), 20, 10, 20) for seed in range(400)]
    # 45 pairs with probability 2/9 each: sd of the mean degree over 400 graphs is 0.03
    assert np.mean([2 * model.mask.sum() / 10 for model in models]) == pytest.approx(2.0, abs=0.1)
    # 200 ones and zeros each: sd of the mean over 400 graphs is 0.002
    assert np.mean([model.context_mask.mean() for model in models]) == pytest.approx(0.3, abs=0.007)
    full = _draw_mechanisms(np.random.default_rng(0), 6, 3, 2).mask
    np.testing.assert_array_equal(full, np.tril(np.ones((3, 3), dtype=bool), -1))


@pytest.mark.parametrize(("n_responsive", "n_environments"), [(4, 12), (4, 8), (1, 2), (6, 12)])
def test_conditions_of_identifiability(n_responsive, n_environments) -> None:
    for seed in range(50):
        model = _draw_mechanisms(np.random.default_rng(seed), n_environments, n_responsive, 7)
        natural = np.hstack([model.mean / model.scale**2, -0.5 / model.scale**2])
        differences = natural[:-1] - natural[-1]
        assert np.linalg.matrix_rank(differences / np.abs(differences).max(axis=0)) == 2 * n_responsive
        # for every latent an environment without causes, each another one, and never the control
        assert (model.cut.sum(axis=0) == 1).all()
        assert model.cut.sum(axis=1).max() == 1
        assert not model.cut[-1].any()
        assert not model.weights[model.cut].any()
        assert not model.context_weights[model.cut].any()


# ---------------------------------------------------------------------------------------------------- expression


def test_effects_are_those_of_the_cells() -> None:
    adata = simulate_scm(40_000, 30, seed=1)
    labels, x = adata.obs["perturbation"].to_numpy(), adata.X.astype(float)
    difference = x - x[partners(adata)]
    scores, null = [], []
    for name, effect in adata.uns["truth"]["effects"].iterrows():
        cells = difference[labels == name]
        error = np.sqrt(cells.var(axis=0, ddof=1) * (1 / len(cells) + 1 / 4096))
        scores.append((cells.mean(axis=0) - effect) / error)
        null.append(cells.mean(axis=0) / error)
    assert np.abs(scores).max() < 5.0
    assert np.sqrt(np.mean(np.square(scores))) < 1.3
    assert np.sqrt(np.mean(np.square(null))) > 5.0


def test_expression_tells_the_latents_but_not_linearly(scm) -> None:
    test = (scm.obs["split"] == "test").to_numpy()
    for key, low, high in (("z_responsive", 0.95, 0.995), ("z_invariant", 0.9, 0.98)):
        z = scm.obsm[key]
        assert low < block_r2(scm.X[~test], z[~test], scm.X[test], z[test]) < high
    both = np.hstack([scm.obsm["z_responsive"], scm.obsm["z_invariant"]])
    # cells with equal expression have equal latents: nearest neighbours agree
    nearest = ((scm.X[test][:, None, ::25] - scm.X[~test][None, :, ::25]) ** 2).sum(axis=2).argmin(axis=1)
    neighbours = both[~test][nearest]
    assert ((neighbours - both[test]) ** 2).mean() < 0.5 * both.var(axis=0).mean()


# ---------------------------------------------------------------------------------------------------- seeds, files


def test_seeds() -> None:
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (simulate_scm(**SMALL, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    np.testing.assert_array_equal(first.X, again.X)
    pd.testing.assert_frame_equal(first.obs, again.obs)
    np.testing.assert_array_equal(first.uns["truth"]["weights"], again.uns["truth"]["weights"])
    assert not np.allclose(first.X, other.X)


def test_truth_does_not_depend_on_the_size() -> None:
    few, many = simulate_scm(**SMALL).uns["truth"], simulate_scm(1000, 90).uns["truth"]
    for key in ("weights", "context_weights"):
        np.testing.assert_array_equal(few[key], many[key])
    for key in TABLES - {"effects"}:
        pd.testing.assert_frame_equal(few[key], many[key])


def test_h5ad_round_trip(tmp_path) -> None:
    adata = simulate_scm(**SMALL)
    adata.copy().write_h5ad(tmp_path / "scm.h5ad")
    back = ad.read_h5ad(tmp_path / "scm.h5ad")
    np.testing.assert_array_equal(back.X, adata.X)
    for column in ("perturbation", "split", "control_partner"):
        assert back.obs[column].tolist() == adata.obs[column].tolist()
    for key, values in adata.obsm.items():
        np.testing.assert_array_equal(back.obsm[key], values)
    assert back.uns["control"] == "control"
    truth, kept = adata.uns["truth"], back.uns["truth"]
    assert set(kept) == set(truth)
    for key, value in truth.items():
        if isinstance(value, pd.DataFrame):
            assert list(kept[key].index) == list(value.index)
            assert list(kept[key].columns) == list(value.columns)
        np.testing.assert_array_equal(np.asarray(kept[key]), np.asarray(value))
    assert set(kept["cut"].dtypes) == set(kept["mask"].dtypes) == {np.dtype(bool)}


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_cells": 95}, "`n_cells` must be at least 8 .* = 96, .*; received 95: raise it"),
        ({"n_cells": 0}, "`n_cells` must be a positive integer; received 0"),
        ({"n_cells": 4e3}, "`n_cells` must be a positive integer; received 4000.0"),
        ({"n_genes": 10}, "`n_genes` must be at least n_responsive .* = 11, .*; received 10"),
        ({"n_genes": True}, "`n_genes` must be a positive integer; received True"),
        ({"n_responsive": 0}, "`n_responsive` must be a positive integer; received 0"),
        ({"n_responsive": 7}, r"`n_environments` must be at least 2 \* n_responsive = 14, .*; received 12"),
        ({"n_invariant": 0}, "`n_invariant` must be a positive integer; received 0"),
        ({"n_environments": 7}, r"`n_environments` must be at least 2 \* n_responsive = 8, .*; received 7"),
        ({"n_environments": None}, "`n_environments` must be a positive integer; received None"),
        ({"seed": -1}, "`seed` must be a non-negative integer; received -1"),
    ],
)
def test_bad_inputs(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_scm(**change)
