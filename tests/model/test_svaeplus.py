"""SVAEPlus: the prior of its latent state, and transfer to interventions without training cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scvi_cradle import SVAEPlus, datasets
from scvi_cradle.module.base import Pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
KEYS = {"perturbation_key": "perturbation"}


@pytest.fixture(scope="module")
def simulated():
    """1,100 cells x 50 genes with ten interventions, two of them held out."""
    full = datasets.simulate_svae(n_interventions=10, n_latent=5, seed=0)
    cells = np.sort(np.random.default_rng(0).choice(full.n_obs, 1100, replace=False))
    return full[cells, :50].copy()


@pytest.fixture(scope="module")
def held_out(simulated):
    return sorted(simulated.obs.loc[simulated.obs["split"] == "test", "perturbation"].unique())


def fit(adata, with_seed, max_steps, **settings):
    SVAEPlus.setup_anndata(adata, **KEYS)
    with with_seed(0):
        model = SVAEPlus(adata, n_latent=8, n_hidden=64, **settings)
        model.train(
            max_steps=max_steps, lr=1e-2, split_key="split", check_val_every_n_epoch=50, enable_progress_bar=False
        )
    return model


@pytest.fixture(scope="module")
def model(simulated, with_seed):
    """Trained without the held-out interventions; not to be changed."""
    return fit(simulated.copy(), with_seed, 300)


@pytest.fixture(scope="module")
def transferred(model, simulated, with_seed, tmp_path_factory):
    """The same model after the transfer."""
    folder = tmp_path_factory.mktemp("model")
    model.save(folder, overwrite=True)
    copy = SVAEPlus.load(folder, adata=simulated.copy())
    with with_seed(0):
        copy.learnt = copy.transfer_to_unseen(max_epochs=20, check_val_every_n_epoch=20, enable_progress_bar=False)
    return copy


def columns(model, labels):
    return [model._table.treatments.index(label) for label in labels]


# ---- prior of the latent state -----------------------------------------------------------------------------------------


def latent_of_new_cells(model, label, n, noise=None):
    members = torch.as_tensor(model._members([label])).expand(n, -1)
    noise = torch.randn(1, n, 8, generator=torch.Generator().manual_seed(0)) if noise is None else noise
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        return model.module.prior(Pairs.from_members(members), noise, generator=generator)["basal"][0].numpy()


def test_new_cells_have_the_masked_shift_as_mean(model):
    effects, n = model.get_perturbation_effects(), 4000
    expected = effects.to_df()
    np.testing.assert_allclose(expected, effects.layers["mask_prob"] * effects.layers["embedding_mean"], rtol=1e-5)
    assert (effects.layers["embedding_std"] == 0).all()
    spread = effects.layers["mask_prob"] * (1 - effects.layers["mask_prob"]) * effects.layers["embedding_mean"] ** 2
    for row, label in enumerate(expected.index[:3]):
        z = latent_of_new_cells(model, label, n)
        error = np.sqrt((1 + spread[row]) / n)
        assert (np.abs(z.mean(0) - expected.loc[label]) < 4.5 * error).all()
        np.testing.assert_allclose(z.var(0), 1 + spread[row], rtol=0.15)
    assert np.abs(expected.iloc[:3]).max().max() > 1  # there is something to see
    noise = torch.ones(1, 3, 8)
    np.testing.assert_array_equal(latent_of_new_cells(model, "control", 3, noise), noise[0])


def test_effects_are_those_of_the_simulation(model, simulated):
    truth = simulated.uns["truth"]["effects"]
    effects = model.get_average_treatment_effects(seed=0)
    wanted = truth.loc[list(effects.obs_names), list(effects.var_names)].to_numpy()
    assert np.corrcoef(effects.X.ravel(), wanted.ravel())[0, 1] > 0.88


def test_additive_combinations_have_the_sum_of_the_masked_shifts_as_mean(shared_screen, with_seed):
    model, n = fit(shared_screen.copy(), with_seed, 60, encode_combinations="additive"), 20_000
    logits = model.module.effects.mask.logits
    with torch.no_grad():  # large shifts, open and closed masks
        logits.copy_(torch.where(torch.arange(8) % 3 == 0, -2.0, torch.linspace(0, 3, 8)).expand(4, -1))
        model.module.effects.embedding.loc.mul_(20)
    effects = model.get_perturbation_effects()
    assert list(effects.obs_names) == ["G01", "G02", "G03", "G04"]
    single = effects.to_df()
    spread = effects.layers["mask_prob"] * (1 - effects.layers["mask_prob"]) * effects.layers["embedding_mean"] ** 2
    for first, second in (("G01", "G03"), ("G02", "G04")):  # neither has training cells
        z = latent_of_new_cells(model, f"{first}+{second}", n)
        variance = 1 + spread[[int(first[1:]) - 1, int(second[1:]) - 1]].sum(0)
        error = np.sqrt(variance / n)
        assert (np.abs(z.mean(0) - single.loc[first] - single.loc[second]) < 4.5 * error).all()
        np.testing.assert_allclose(z.var(0), variance, rtol=0.06)
    assert single.abs().max(axis=1).min() > 0.5


# ---- transfer ----------------------------------------------------------------------------------------------------------


def test_before_the_transfer_held_out_interventions_are_errors(model, held_out):
    for call in (model.get_generated_expression, model.get_average_treatment_effects):
        with pytest.raises(ValueError, match="none in the training split"):
            call(held_out)
    assert not set(held_out) & set(model.get_generated_expression(n_samples=1).obs["perturbation"])


def test_unseen_combinations_are_refused_with_the_reason(shared_screen, with_seed):
    adata = shared_screen.copy()
    held_out = adata.obs["perturbation"].astype(str).str.contains("+", regex=False)
    adata.obs["split"] = np.where(held_out, "test", "train")
    model = fit(adata, with_seed, 3)
    for label in ("G01+G02", "G01+G03"):  # held out, and not in the data
        with pytest.raises(NotImplementedError, match="cannot predict"):
            model.get_generated_expression(label)
    with pytest.raises(NotImplementedError, match="or `transfer_to_unseen` with cells of it"):
        model.evaluate()


def test_after_the_transfer_their_effects_are_those_of_the_simulation(transferred, simulated, held_out):
    assert transferred.learnt == held_out
    effects = transferred.get_average_treatment_effects(held_out, seed=0)
    wanted = simulated.uns["truth"]["effects"][list(simulated.var_names)]
    trivial = wanted.drop(index=held_out).mean()
    for label in held_out:
        score = np.corrcoef(effects[label].X.ravel(), wanted.loc[label])[0, 1]
        assert score > 0.8
        assert score > np.corrcoef(trivial, wanted.loc[label])[0, 1] + 0.1
    cells = transferred.get_generated_expression(held_out, n_samples=5, seed=0)
    assert list(cells.obs["perturbation"]) == [label for label in held_out for _ in range(5)]
    assert set(cells.obs["seen"]) == {"seen"}
    assert set(held_out) <= set(transferred.get_generated_expression(n_samples=1).obs["perturbation"])


def test_the_transfer_fixes_masks_and_counts_the_cells(model, transferred, simulated, held_out):
    before = model.get_perturbation_effects().layers["mask_prob"]
    after = transferred.get_perturbation_effects().layers["mask_prob"]
    seen = [i for i in range(10) if i not in columns(model, held_out)]
    np.testing.assert_allclose(after[seen], before[seen] > 0.5, atol=1e-6)
    np.testing.assert_allclose(after[columns(model, held_out)], 1)
    n_cells = simulated.obs["perturbation"].value_counts()
    assert [transferred.label_counts_[label] for label in held_out] == [n_cells[label] for label in held_out]
    n_obs = transferred.module.n_obs_per_treatment[columns(model, held_out)]
    assert n_obs.tolist() == [n_cells[label] for label in held_out]


def test_a_shift_is_the_mean_posterior_of_its_cells(transferred, simulated, held_out):
    effects = transferred.get_perturbation_effects().to_df()
    for label in held_out:
        cells = np.flatnonzero(simulated.obs["perturbation"] == label)
        z = transferred.get_latent_representation(indices=cells)
        np.testing.assert_allclose(effects.loc[label], z.mean(0), rtol=1e-4, atol=1e-5)


def test_a_transfer_survives_saving(transferred, simulated, held_out, with_seed, tmp_path):
    transferred.save(tmp_path / "m")
    loaded = SVAEPlus.load(tmp_path / "m", adata=simulated.copy())
    assert loaded.label_counts_ == transferred.label_counts_
    assert torch.equal(loaded.module.n_obs_per_treatment, transferred.module.n_obs_per_treatment)
    cells, same = (m.get_generated_expression(held_out, n_samples=4, seed=0).X for m in (transferred, loaded))
    assert abs(cells - same).sum() == 0
    bounds = []
    for each in (transferred, loaded):
        with with_seed(0):
            bounds.append((each.get_elbo(return_mean=False), each.get_iwelbo(n_particles=2, score_global=True)))
    np.testing.assert_array_equal(*bounds)
    masks = loaded.get_perturbation_effects().layers["mask_prob"]
    loaded.train(max_epochs=2, split_key="split", enable_progress_bar=False)
    np.testing.assert_array_equal(masks, loaded.get_perturbation_effects().layers["mask_prob"])
    with pytest.raises(ValueError, match="none in the training split"):  # shifts of the old networks
        loaded.get_generated_expression(held_out)
    assert loaded.transfer_to_unseen(max_epochs=0) == held_out


def test_transfer_without_epochs_leaves_the_networks(simulated, held_out, with_seed):
    model = fit(simulated.copy(), with_seed, 3, variant="lopez")
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    query = simulated[(simulated.obs["perturbation"] == held_out[0]).to_numpy()].copy()
    assert model.transfer_to_unseen(query, max_epochs=0) == held_out[:1]
    after = model.module.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"effects.mask.logits", "effects.embedding.loc", "n_obs_per_treatment", "global_weight"}
    assert model.get_generated_expression(held_out[:1], n_samples=2).n_obs == 2
    with pytest.raises(ValueError, match="none in the training split"):
        model.get_generated_expression(held_out[1:])
    with pytest.raises(ValueError, match="of seen ones only"):
        model.transfer_to_unseen(indices=[0, 1], max_epochs=0)


def test_an_additive_transfer_learns_from_cells_of_a_single_treatment(shared_screen, with_seed):
    adata = shared_screen.copy()
    labels = adata.obs["perturbation"].astype(str)
    adata.obs["split"] = np.where(labels.str.contains("G04"), "test", "train")
    model = fit(adata, with_seed, 3, encode_combinations="additive")
    with pytest.raises(ValueError, match="of seen ones and of combinations only"):
        model.transfer_to_unseen(indices=np.flatnonzero(labels == "G02+G04"), max_epochs=0)
    assert model.transfer_to_unseen(max_epochs=0) == ["G04"]
    z = model.get_latent_representation(indices=np.flatnonzero(labels == "G04"))
    np.testing.assert_allclose(model.get_perturbation_effects().to_df().loc["G04"], z.mean(0), rtol=1e-4, atol=1e-5)
    assert model.label_counts_["G04"] == (labels == "G04").sum()
    assert set(model.get_generated_expression("G01+G04", n_samples=2, seed=0).obs["seen"]) == {"unseen combination"}


def test_a_transfer_that_fails_leaves_the_model_as_it_was(simulated, with_seed):
    model = fit(simulated.copy(), with_seed, 3)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    with pytest.raises(TypeError):
        model.transfer_to_unseen(max_epochs=1, no_such_argument=1)
    assert all(torch.equal(before[k], v) for k, v in model.module.state_dict().items())
    model.train(max_steps=3, split_key="split", enable_progress_bar=False)
    assert not torch.equal(before["effects.mask.logits"], model.module.effects.mask.logits)  # they still learn


def test_an_untrained_model_cannot_transfer(simulated):
    adata = simulated.copy()
    SVAEPlus.setup_anndata(adata, **KEYS)
    with pytest.raises(RuntimeError, match="trained"):
        SVAEPlus(adata).transfer_to_unseen()
