"""Simulations of sparse latent shifts: form, mathematics, and truth that agrees with the cells."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_cradle.datasets import simulate_sams, simulate_svae
from scvi_cradle.datasets._latent_shifts import decode, draw_decoder, draw_embedding, mean_changes
from scvi_cradle.datasets._simulate_svae import _draw_targets
from scvi_cradle.metrics import block_r2

SIMULATORS = [simulate_sams, simulate_svae]


@pytest.fixture(scope="module")
def sams() -> ad.AnnData:
    return simulate_sams()


@pytest.fixture(scope="module")
def svae() -> ad.AnnData:
    return simulate_svae()


@pytest.fixture(scope="module")
def screens(sams, svae) -> dict:
    return {simulate_sams: sams, simulate_svae: svae}


def rows_of(adata: ad.AnnData, label: str) -> np.ndarray:
    return (adata.obs["perturbation"] == label).to_numpy()


def shifts_of(adata: ad.AnnData) -> np.ndarray:
    truth = adata.uns["truth"]
    return (truth["mask"] * truth["embedding"]).to_numpy()


def difference_z(adata: ad.AnnData, values: np.ndarray, expected: pd.DataFrame) -> np.ndarray:
    """Return z-scores, treatments x genes, of the differences of means to the control against ``expected``."""
    control = values[rows_of(adata, "control")]
    scores = []
    for name, effect in expected.iterrows():
        test = values[rows_of(adata, name)]
        error = np.sqrt(test.var(axis=0, ddof=1) / len(test) + control.var(axis=0, ddof=1) / len(control))
        scores.append((test.mean(axis=0) - control.mean(axis=0) - effect) / error)
    return np.array(scores)


# ---------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("widths", [[15, 20, 20, 50], [6, 4, 4, 2]])
def test_decoder_is_orthogonal_and_homogeneous(widths) -> None:
    rng = np.random.default_rng(0)
    weights = draw_decoder(rng, widths)
    assert [w.shape for w in weights] == list(zip(widths[:-1], widths[1:], strict=True))
    for w in weights:
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        np.testing.assert_allclose(gram, np.eye(min(w.shape)), atol=1e-12)
    z = rng.standard_normal((7, widths[0]))
    np.testing.assert_allclose(decode(weights, 3.0 * z), 3.0 * decode(weights, z))
    assert not np.allclose(decode(weights, -z), -decode(weights, z))


def test_decode_by_hand() -> None:
    weights = [np.array([[1.0, -1.0]]), np.array([[1.0, 0.0], [1.0, 2.0]])]
    # hidden units (2, -2) pass as (2, -0.4)
    np.testing.assert_allclose(decode(weights, np.array([[2.0]])), [[1.6, -0.8]])


def test_embedding_has_both_signs() -> None:
    drawn = draw_embedding(np.random.default_rng(1), (200, 100))
    assert (drawn > 0).mean() == pytest.approx(0.5, abs=0.02)
    assert np.abs(drawn).mean() == pytest.approx(5.0, abs=0.02)
    assert np.abs(drawn).std() == pytest.approx(0.5, abs=0.02)


def test_mean_changes_closed_forms() -> None:
    shifts = np.array([[0.0, 0.0], [1.0, -2.0]])
    rng = np.random.default_rng(2)
    weight = np.array([[1.0, 0.5, 2.0], [0.0, 1.0, -1.0]])
    np.testing.assert_allclose(mean_changes(rng, shifts, lambda z: z @ weight), shifts @ weight, atol=1e-12)
    # E[(z + s)^2] - E[z^2] = s^2, and mirrored latents leave no Monte Carlo error in 2 z s
    np.testing.assert_allclose(mean_changes(rng, shifts, lambda z: z**2), shifts**2, atol=1e-12)
    # E[exp(z + s)] - E[exp(z)] = (exp(s) - 1) sqrt(e), with an error
    np.testing.assert_allclose(mean_changes(rng, shifts, np.exp), np.expm1(shifts) * np.exp(0.5), rtol=0.08)


# ---------------------------------------------------------------------------------------------------- form


@pytest.mark.parametrize("simulate", SIMULATORS)
def test_contract(screens, simulate, tmp_path) -> None:
    adata = screens[simulate]
    truth = adata.uns["truth"]
    names = [f"T{i:03d}" for i in range(1, 101)]
    assert adata.uns["control"] == "control"
    assert sorted(adata.obs["perturbation"].unique()) == [*names, "control"]
    assert list(adata.obs["split"].cat.categories) == ["train", "val", "test"]
    assert adata.X.dtype == np.float32
    assert adata.obs_names.is_unique
    assert list(adata.obs_names) == sorted(adata.obs_names)
    for key, shape in {"mask": (100, 15), "embedding": (100, 15), "effects": (100, adata.n_vars)}.items():
        assert truth[key].shape == shape
        assert list(truth[key].index) == names
    assert list(truth["effects"].columns) == list(adata.var_names)
    assert set(truth["mask"].dtypes) == {np.dtype(bool)}
    assert adata.obs["perturbation"].iloc[:50].nunique() > 20, "cells come in random order"

    adata.write_h5ad(tmp_path / "screen.h5ad")
    back = ad.read_h5ad(tmp_path / "screen.h5ad")
    assert set(back.uns["truth"]) == set(truth)
    for key, value in truth.items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(
                back.uns["truth"][key], value, check_index_type=False, check_column_type=False
            )
        else:
            np.testing.assert_array_equal(back.uns["truth"][key], value)


@pytest.mark.parametrize("simulate", SIMULATORS)
def test_latents_are_standard_normal_plus_the_shift(screens, simulate) -> None:
    adata = screens[simulate]
    z_basal, z = adata.obsm["z_basal"], adata.obsm["z"]
    np.testing.assert_allclose(z_basal.mean(axis=0), 0.0, atol=0.04)
    np.testing.assert_allclose(np.cov(z_basal.T), np.eye(15), atol=0.06)
    np.testing.assert_array_equal(z[rows_of(adata, "control")], z_basal[rows_of(adata, "control")])
    shifts = shifts_of(adata)
    for row, name in enumerate(adata.uns["truth"]["mask"].index):
        cells = rows_of(adata, name)
        np.testing.assert_allclose(z[cells] - z_basal[cells], np.tile(shifts[row], (cells.sum(), 1)), atol=1e-12)


@pytest.mark.parametrize("simulate", SIMULATORS)
def test_seed(simulate) -> None:
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = simulate(4, 5), simulate(4, 5), simulate(4, 5, seed=1)
    np.testing.assert_array_equal(first.X, again.X)
    pd.testing.assert_frame_equal(first.uns["truth"]["effects"], again.uns["truth"]["effects"])
    assert not np.allclose(first.X, other.X)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


# ---------------------------------------------------------------------------------------------------- SAMS-VAE


def test_sams_sizes(sams) -> None:
    assert sams.shape == (101 * 150, 50)
    sizes = sams.obs.groupby(["perturbation", "split"], observed=False).size().unstack()
    assert (sizes[["train", "val", "test"]] == [100, 25, 25]).all(axis=None)
    tiny = simulate_sams(2, 3, 4, 1)
    assert tiny.obs.groupby(["perturbation", "split"], observed=False).size().eq(1).all()


def test_sams_mask_density() -> None:
    mask = simulate_sams(2000, 15, 2, 1, mask_prob=0.1).uns["truth"]["mask"].to_numpy()
    assert mask.mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / mask.size))
    assert (~mask.any(axis=1)).mean() == pytest.approx(0.9**15, abs=0.04)


@pytest.mark.parametrize("signal", [0.8, 0.25])
def test_sams_signal_and_noise(signal) -> None:
    adata = simulate_sams(signal=signal)
    mean, noise = adata.layers["mean"], adata.X - adata.layers["mean"]
    np.testing.assert_allclose(mean.var(axis=0), 1.0, rtol=1e-4)
    np.testing.assert_allclose(adata.uns["truth"]["noise_sd"], np.sqrt(1.0 / signal - 1.0))
    np.testing.assert_allclose(noise.std(axis=0), adata.uns["truth"]["noise_sd"], rtol=0.03)
    np.testing.assert_allclose(mean.var(axis=0) / adata.X.var(axis=0), signal, atol=0.03)
    between = np.corrcoef(noise.T)
    assert np.abs(between - np.eye(50)).max() < 0.05


def test_sams_effects_are_those_of_the_cells() -> None:
    adata = simulate_sams(6, 15, 50, 4000, mask_prob=0.2, seed=3)
    effects = adata.uns["truth"]["effects"]
    z = difference_z(adata, adata.X.astype(float), effects)
    assert np.sqrt((z**2).mean()) == pytest.approx(1.0, abs=0.3)
    assert np.abs(z).max() < 5.0
    assert np.abs(difference_z(adata, adata.X.astype(float), 0.0 * effects)).max() > 50.0


def test_sams_treatments_without_a_latent_have_no_effect(sams) -> None:
    truth = sams.uns["truth"]
    empty = ~truth["mask"].any(axis=1)
    assert 0.05 < empty.mean() < 0.4
    assert (truth["effects"][empty] == 0.0).all(axis=None)
    assert (truth["effects"][~empty].abs().max(axis=1) > 0.1).all()


def test_sams_screens_of_other_sizes_share_their_treatments(sams) -> None:
    other = simulate_sams(n_samples_per_treatment=20, n_genes=30, signal=0.5).uns["truth"]
    for key in ("mask", "embedding"):
        pd.testing.assert_frame_equal(other[key], sams.uns["truth"][key])


# ---------------------------------------------------------------------------------------------------- sVAE+


def test_svae_holds_out_the_last_interventions(svae) -> None:
    assert svae.shape == (101 * 200, 100)
    sizes = svae.obs.groupby(["perturbation", "split"], observed=False).size().unstack()
    assert (sizes.iloc[:80] == [160, 40, 0]).all(axis=None)
    assert (sizes.iloc[80:100] == [0, 0, 200]).all(axis=None)
    assert list(sizes.loc["control"]) == [160, 40, 0]


@pytest.mark.parametrize(("n", "n_test"), [(2, 1), (5, 1), (10, 2)])
def test_svae_size_of_the_transfer_set(n, n_test) -> None:
    obs = simulate_svae(n).obs
    assert obs["perturbation"][obs["split"] == "test"].nunique() == n_test


def test_svae_targets_collapse() -> None:
    n_targets = _draw_targets(np.random.default_rng(0), 20_000, 3).sum(axis=1)
    # 1, 2 or 3 draws among three latents: P(one) = (1 + 1/3 + 1/9) / 3, P(three) = 2/9 / 3
    shares = np.bincount(n_targets, minlength=4) / len(n_targets)
    np.testing.assert_allclose(shares, [0, 13 / 27, 12 / 27, 2 / 27], atol=0.015)


def test_svae_counts_follow_the_axis(svae) -> None:
    assert np.array_equal(svae.X, np.round(svae.X))
    assert svae.X.min() >= 0
    totals = svae.X.sum(axis=1, dtype=np.float64)
    assert np.sqrt((((totals - 1e6) / 1e3) ** 2).mean()) == pytest.approx(1.0, abs=0.03)
    over_cells = simulate_svae(20, softmax_axis=0)
    per_gene = over_cells.X.sum(axis=0, dtype=np.float64)
    assert np.abs((per_gene - 1e6) / 1e3).max() < 5.0
    assert over_cells.X.sum(axis=1).std() / over_cells.X.sum(axis=1).mean() > 0.1
    pd.testing.assert_frame_equal(over_cells.uns["truth"]["mask"], simulate_svae(20).uns["truth"]["mask"])


@pytest.mark.parametrize("softmax_axis", [0, 1])
def test_svae_effects_are_those_of_the_cells(softmax_axis) -> None:
    adata = simulate_svae(60, softmax_axis=softmax_axis, seed=2)
    effects = adata.uns["truth"]["effects"]
    counts = adata.X.astype(float)
    level = np.log2(1 + 1e4 * counts / counts.sum(axis=1, keepdims=True))
    z = difference_z(adata, level, effects)
    assert np.abs(z).max() < 5.5
    assert np.sqrt((z**2).mean()) == pytest.approx(1.0, abs=0.3)
    assert np.abs(difference_z(adata, level, 0.0 * effects)).max() > 20.0
    # the error of the control cells is common to all interventions; the rest is that of their own cells
    assert np.sqrt(((z - z.mean(axis=0)) ** 2).mean()) == pytest.approx(np.sqrt(0.5), abs=0.15)


@pytest.mark.parametrize("simulate", SIMULATORS)
def test_expression_tells_the_latents(screens, simulate) -> None:
    adata = screens[simulate]
    y = adata.layers["mean"] if simulate is simulate_sams else np.log(1.0 + adata.X)
    half = adata.n_obs // 2
    z = adata.obsm["z"]
    # the map is injective but not linear
    assert block_r2(y[:half], z[:half], y[half:], z[half:]) > 0.5
    assert block_r2(y[:half], z[half : 2 * half], y[half : 2 * half], z[:half]) < 0.05


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("simulate", "change", "message"),
    [
        (simulate_sams, {"n_treatments": 0}, "`n_treatments` must be a positive integer; received 0"),
        (simulate_sams, {"n_latent": 1.5}, "`n_latent` must be a positive integer"),
        (simulate_sams, {"n_genes": -1}, "`n_genes` must be a positive integer"),
        (simulate_sams, {"n_samples_per_treatment": 0}, "`n_samples_per_treatment` must be"),
        (simulate_sams, {"mask_prob": 1.0}, "`mask_prob` must lie strictly between"),
        (simulate_sams, {"signal": 0.0}, "`signal` must lie strictly between"),
        (simulate_sams, {"seed": -1}, "`seed` must be a non-negative integer"),
        (simulate_svae, {"n_interventions": 1}, "`n_interventions` must be at least 2"),
        (simulate_svae, {"n_latent": 0}, "`n_latent` must be a positive integer"),
        (simulate_svae, {"softmax_axis": 2}, "`softmax_axis` must be one of 0, 1; received 2"),
        (simulate_svae, {"seed": 0.5}, "`seed` must be a non-negative integer"),
    ],
)
def test_bad_inputs(simulate, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(**change)
