"""PerturbedVAE: arguments, objective, prediction from control cells, graph and programs."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData, read_h5ad
from lightning.pytorch.callbacks import Callback

from scvi_cradle import PerturbedVAE, datasets, metrics
from scvi_cradle._matrix import log_normalize
from scvi_cradle._perturbedvae_settings import split_latent
from scvi_cradle.train import PairedTrainingPlan

pytestmark = [
    pytest.mark.filterwarnings("ignore:The invariant variables are unused:UserWarning"),  # short training
    pytest.mark.filterwarnings("ignore:Generated cells of one label are close:UserWarning"),
]
KEYS = {"perturbation_key": "perturbation", "layer": "log"}
SIZES = {"n_latent_responsive": 4, "n_latent_invariant": 6, "n_hidden": 24}
QUIET = {"enable_progress_bar": False, "split_key": "split"}


@pytest.fixture(scope="module")
def screen():
    adata = datasets.simulate_perturbseq(
        n_cells=500, n_genes=50, n_perturbations=4, n_combinations=3, artifact_fraction=0.0, n_batches=2, seed=3
    )
    adata.layers["log"] = log_normalize(adata.X).astype(np.float32)
    single = ~adata.obs["perturbation"].astype(str).str.contains("+", regex=False)
    adata.obs["split"] = np.where(single & (np.arange(500) % 5 > 0), "train", np.where(single, "val", "unused"))
    return adata


def fit(adata, seed=0, epochs=6, lr=5e-3, keys=KEYS, **settings):
    adata = adata.copy()
    PerturbedVAE.setup_anndata(adata, **keys)
    torch.manual_seed(seed)
    model = PerturbedVAE(adata, **(SIZES | settings))
    model.train(max_epochs=epochs, lr=lr, **QUIET)
    return model


@pytest.fixture(scope="module")
def model(screen):
    return fit(screen, epochs=15, keys=KEYS | {"batch_key": "batch"})


# ---- arguments ------------------------------------------------------------------------------------------------------


def built(screen, **settings):
    adata = screen.copy()
    PerturbedVAE.setup_anndata(adata, **KEYS)
    return PerturbedVAE(adata, **settings)


def test_published_settings(screen):
    model = built(screen, preset="paper")
    module = model.module
    assert (module.n_responsive, module.n_invariant) == (20, 85)
    torch.testing.assert_close(module.kl_weights, torch.tensor([1e-2, 1e-2]))
    assert (module.alignment, module.alignment_weight) == ("l2", 0.05)
    training = model._training_settings
    assert (training["lr"], training["batch_size"], training["max_epochs"]) == (1e-4, 64, 100)
    assert (training["lr_schedule"], training["weight_decay"]) == ("constant", 0.0)
    widths = [layer.out_features for layer in module.encoder if hasattr(layer, "out_features")]
    assert widths == [256, 256]
    assert {layer.negative_slope for layer in module.encoder if hasattr(layer, "negative_slope")} == {0.2}


@pytest.mark.parametrize(("total", "responsive"), [(105, 20), (75, 14), (35, 7), (10, 2), (2, 1), (4, 1)])
def test_a_total_is_split_as_published(total, responsive):
    sizes = split_latent(total, None, None, {})
    assert sizes == {"n_latent_responsive": responsive, "n_latent_invariant": total - responsive}


def test_weights_suit_the_likelihood_and_the_partners(screen):
    for pairs in ({"control_pairing": "shared", "control_partner_key": "partner"}, {"control_pairing": "fixed"}):
        module = built(screen, **pairs).module
        assert (module.alignment, module.alignment_weight) == ("l2", 0.05)
    assert built(screen, alignment_weight=0.3).module.alignment == "l2"
    assert built(screen).module.alignment == "none"
    assert built(screen, alignment="mmd").module.alignment_weight == 10.0
    module = built(screen, likelihood="gaussian", alignment="l2").module
    assert module.alignment_weight == pytest.approx(0.05 * 50 / 2)
    assert module.kl_weights.tolist() == [1.0, 1.0]
    module = built(screen, kl_weight_responsive=0.5, alignment_weight=0.0, alignment="l2").module
    assert module.kl_weights[0] == 0.5
    assert module.alignment_weight == 0.0


def test_open_weights_of_divergences_are_four_times_those_of_a_gaussian_bound(model, screen):
    """The error times ``n_genes / (2 variance)`` is minus a Gaussian log-likelihood; dividing makes the divergence's weight."""
    train = screen.layers["log"][(screen.obs["split"] == "train").to_numpy()].toarray()
    expected = 4 * 2 * train.var(axis=0, ddof=1).mean() / 50
    torch.testing.assert_close(model.module.kl_weights, torch.full((2,), float(expected)), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_latent": 10, "n_latent_responsive": 3}, "is given instead of them"),
        ({"n_latent": 1}, "at least 2"),
        ({"n_latent": 2.5}, "`n_latent` must be a positive integer"),
        ({"n_latent_responsive": 0}, "`n_latent_responsive` must be a positive integer"),
        ({"n_layers": 0}, "`n_layers` must be a positive integer"),
        ({"mechanism": "tree"}, "`mechanism` must be one of"),
        ({"noise_scale": "free"}, "`noise_scale` must be one of"),
        ({"lambda_bound": "sigmoid"}, "`lambda_bound` must be one of"),
        ({"likelihood": "poisson"}, "`likelihood` must be one of"),
        ({"alignment": "l1"}, "`alignment` must be one of"),
        ({"alignment_weight": -1.0}, "`alignment_weight` must be a non-negative number"),
        ({"kl_weight_invariant": float("nan")}, "`kl_weight_invariant` must be a non-negative number"),
        ({"align_stop_grad": "both"}, "`align_stop_grad` must be one of"),
        ({"n_epochs_kl_warmup": 10}, "`n_epochs_kl_warmup` must be the first and the last epoch"),
        ({"n_epochs_align_warmup": (5, 2)}, "`n_epochs_align_warmup` must be the first"),
        ({"control_pairing": "ot"}, "`control_pairing` must be one of"),
        ({"control_pairing": "shared"}, "`control_partner_key` names the column"),
        ({"alignment": "none", "alignment_weight": 3.0}, "`alignment_weight` has no meaning with alignment='none'"),
        ({"alignment": "none", "control_pairing": "fixed"}, "`control_pairing` has no meaning"),
        ({"sample_latents": "no"}, "`sample_latents` must be one of True, False"),
        ({"preset": "published"}, "`preset` must be one of"),
        ({"likelihood": "nb"}, "needs raw counts"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be(screen, settings, message):
    with pytest.raises(ValueError, match=message):
        built(screen, **settings)


def test_counts_under_a_squared_error_are_warned_of(screen):
    adata = screen.copy()
    PerturbedVAE.setup_anndata(adata, perturbation_key="perturbation")
    with pytest.warns(UserWarning, match="raw counts, and likelihood='mse'"):
        PerturbedVAE(adata)


def test_partners_are_looked_up_before_training(screen):
    model = built(screen, alignment="l2", control_pairing="within:donor", **SIZES)
    with pytest.raises(KeyError, match="'donor'"):
        model.train(max_epochs=1, **QUIET)
    assert not model.is_trained_
    assert model.label_counts_ is None


def test_training_needs_control_cells(screen):
    adata = screen.copy()
    adata.obs["split"] = np.where(adata.obs["perturbation"] == "control", "val", adata.obs["split"])
    model = built(adata, alignment="l2", **SIZES)
    with pytest.raises(ValueError, match="The training split must hold control cells"):
        model.train(max_epochs=1, **QUIET)


def test_counts_can_be_aligned_by_their_discrepancy(screen):
    model = fit(screen, epochs=1, keys={"perturbation_key": "perturbation"}, likelihood="nb", alignment="mmd")
    cells = model.get_generated_expression("G01+G02", n_samples=5, seed=0)
    assert (cells.X.data == np.round(cells.X.data)).all()
    assert np.isfinite(model.get_iwelbo(indices=np.arange(5), n_particles=3)).all()


# ---- objective ------------------------------------------------------------------------------------------------------


def batch_of(model, n=12, seed=0):
    loader = model._make_data_loader(model.adata, indices=np.arange(n))
    tensors = next(iter(loader))
    generator = torch.Generator().manual_seed(seed)
    tensors["control_partner"] = torch.rand(n, 50, generator=generator)
    tensors["control_partner_batch"] = tensors["batch"].flip(0)
    return tensors


def objective(model, tensors, **factors):
    module = model.module.eval()
    torch.manual_seed(0)
    inference, generative, loss = module(tensors, loss_kwargs=factors)
    return inference["latent"], generative, loss


@pytest.mark.parametrize("stop", [None, "control"])
def test_the_objective_is_that_of_algorithm_1(screen, stop):
    model = fit(
        screen, epochs=1, alignment="l2", kl_weight_responsive=0.3, kl_weight_invariant=0.7, align_stop_grad=stop
    )
    tensors = batch_of(model)
    latent, generative, loss = objective(model, tensors, kl_weight=0.5, alignment_ramp=0.25)
    x, partner = tensors["X"].numpy().astype(float), tensors["control_partner"].numpy().astype(float)
    m, s = latent.q_basal.loc[0].detach().numpy(), latent.q_basal.scale[0].detach().numpy()
    m0, s0 = latent.q_partner.loc[0].detach().numpy(), latent.q_partner.scale[0].detach().numpy()
    e, se = latent.q_noise.loc[0].detach().numpy(), latent.q_noise.scale[0].detach().numpy()
    beta = latent.mechanism.variance.detach().numpy()
    output = (generative["features"] @ model.module.decoder.output.weight.T + model.module.decoder.output.bias)[0]
    error = ((x - output.detach().numpy()) ** 2).mean(axis=1)

    def kl(mean, std, variance=1.0):
        return 0.5 * (std**2 / variance + mean**2 / variance - 1 - np.log(std**2 / variance)).sum(axis=1)

    divergence = 0.3 * kl(e, se, beta) + 0.7 * (kl(m, s) + kl(m0, s0))
    aligned = ((m - m0) ** 2).sum(axis=1)
    expected = (error + 0.5 * divergence + 0.25 * 0.05 * aligned).mean()
    assert loss.loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(loss.reconstruction_loss["reconstruction_loss"].numpy(), error, rtol=1e-4)
    # the partner is encoded by the same encoder, from its own expression
    again = model.module.invariant_head(
        model.module.encoder(model.module.standardize(torch.as_tensor(partner).float()))
    )
    np.testing.assert_allclose(again.loc.detach().numpy(), m0, rtol=1e-4, atol=1e-6)
    # z_nu solves its equations, and the decoder sees z_nu and z_iota alone
    z, mechanism = latent.z_responsive[0], latent.mechanism
    solved = (mechanism.weights @ z[..., None])[..., 0] + mechanism.modulation(latent.z_basal[0]) + mechanism.mean
    torch.testing.assert_close(z, solved + latent.noise[0], rtol=1e-4, atol=1e-5)
    parts = {"invariant": latent.z_basal, "responsive": latent.z_responsive}
    torch.testing.assert_close(
        model.module.decoder.features_of(parts, torch.zeros(12, 0)), generative["features"], rtol=1e-5, atol=1e-6
    )


def test_the_partners_mean_can_be_kept_out_of_the_gradient(screen):
    gradients = {}
    for stop in (None, "control"):
        model = fit(screen, epochs=1, alignment="l2", align_stop_grad=stop)
        tensors = batch_of(model)
        tensors["X"] = tensors["X"].requires_grad_()
        tensors["control_partner"] = tensors["control_partner"].requires_grad_()
        _, _, loss = objective(model, tensors, kl_weight=0.0, alignment_ramp=1.0)
        loss.loss.backward()
        gradients[stop] = float(tensors["control_partner"].grad.abs().sum())
    assert gradients["control"] == 0.0
    assert gradients[None] > 0.0


def test_warm_ups(screen):
    model = built(screen, **SIZES)
    plan = PairedTrainingPlan(model.module)
    with pytest.raises(ValueError, match="`n_epochs_kl_warmup` must be the first and the last epoch"):
        PairedTrainingPlan(model.module, n_epochs_kl_warmup=10)
    ramps = {}
    for name in ("kl_weight", "alignment_ramp"):
        plan.warmups[name] = ((10, 50) if name == "kl_weight" else (5, 50), None)
    for epoch in (0, 5, 10, 30, 50, 90):
        type(plan).current_epoch = property(lambda self, epoch=epoch: epoch)
        ramps[epoch] = (plan.ramp("kl_weight"), plan.ramp("alignment_ramp"))
    del type(plan).current_epoch
    assert ramps[0] == ramps[5] == (0.0, 0.0)
    assert ramps[10] == (0.0, pytest.approx(5 / 45))
    assert ramps[30] == (0.5, pytest.approx(25 / 45))
    assert ramps[50] == ramps[90] == (1.0, 1.0)


def test_default_warm_ups_are_shares_of_the_run(screen, monkeypatch):
    seen = []
    step = PairedTrainingPlan.training_step

    def spy(plan, *args):
        loss = step(plan, *args)
        now = plan.current_epoch, plan.global_step / plan.trainer.estimated_stepping_batches
        seen.append((*now, plan.loss_kwargs["kl_weight"], plan.loss_kwargs["alignment_ramp"]))
        return loss

    monkeypatch.setattr(PairedTrainingPlan, "training_step", spy)
    fit(screen, epochs=10)
    _, share, kl, alignment = np.array(seen).T
    np.testing.assert_allclose(kl, np.clip((share - 0.1) / 0.4, 0, 1))
    np.testing.assert_allclose(alignment, np.clip((share - 0.05) / 0.45, 0, 1))
    seen.clear()
    fit(screen, epochs=2, n_epochs_kl_warmup=(0, 0), n_epochs_align_warmup=(0, 4))
    np.testing.assert_allclose(np.array(seen).T[2:], [np.ones(len(seen)), np.array(seen)[:, 0] / 4])
    seen.clear()  # a budget of steps in batches of one label, which are more than cells / batch size
    adata = screen.copy()
    PerturbedVAE.setup_anndata(adata, **KEYS)
    PerturbedVAE(adata, alignment="mmd", **SIZES).train(max_steps=12, batch_size=200, **QUIET)
    assert len(seen) == 12
    assert seen[-1][2:] == (1.0, 1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"alignment": "l2"},
        {"alignment": "l2", "control_pairing": "fixed"},
        {"alignment": "l2", "control_pairing": "within:batch"},
        {"alignment": "mmd"},
        {"alignment": "none", "mechanism": "linear", "noise_scale": "fixed"},
        {"likelihood": "gaussian", "lambda_bound": "tanh"},
        {"likelihood": "gaussian", "output_variance": 0.01, "output_activation": "softplus"},
        {"alignment": "l2", "control_cells": "partners", "noise_encoder": "linear"},
        {"sample_latents": False},
        {"n_latent_responsive": 1, "n_latent_invariant": 1, "n_layers": 1},
    ],
    ids=str,
)
def test_every_choice_trains_answers_and_survives_saving(screen, settings, tmp_path):
    model = fit(screen, epochs=2, **settings)
    cells = model.get_generated_expression(["G01", "G01+G02", "G02+G03+G04"], n_samples=5, seed=1)
    assert np.isfinite(cells.X).all()
    assert list(cells.obs["seen"][::5]) == ["seen", "unseen combination", "unseen combination"]
    model.save(tmp_path / "model")
    loaded = PerturbedVAE.load(tmp_path / "model", adata=False)
    again = loaded.get_generated_expression(["G01", "G01+G02", "G02+G03+G04"], n_samples=5, seed=1)
    np.testing.assert_allclose(again.X, cells.X, rtol=1e-6)
    graph = loaded.get_causal_graph(0.0)
    assert nx.is_directed_acyclic_graph(graph)
    assert graph.number_of_edges() == model.module.n_responsive * (model.module.n_responsive - 1) / 2
    np.testing.assert_allclose(loaded.get_latent_programs().X, model.get_latent_programs().X, rtol=1e-6)
    torch.testing.assert_close(loaded.module.kl_weights, model.module.kl_weights)


# ---- prediction -----------------------------------------------------------------------------------------------------


def test_cells_are_generated_from_control_cells_of_the_user(model):
    control = np.flatnonzero(model.adata.obs["perturbation"] == "control")[:3]
    cells = model.get_generated_expression("G01+G03", indices=control, n_samples=60, seed=0)
    assert set(cells.obs["batch"]) <= set(model.adata.obs["batch"].iloc[control])
    states = model.get_latent_representation(indices=control, component="invariant")
    pool = model._pool_of(None, control)
    np.testing.assert_allclose(pool["state_mean"], states, rtol=1e-5, atol=1e-6)
    one = model.get_generated_expression("G01+G03", indices=control[:1], n_samples=60, seed=0)
    assert one.X.var(axis=0).sum() < cells.X.var(axis=0).sum()
    with pytest.raises(ValueError, match="start from control cells; received cells with 'G"):
        model.get_generated_expression(
            "G01", indices=[*control, np.flatnonzero(model.adata.obs["perturbation"] == "G01")[0]]
        )
    with pytest.raises(NotImplementedError, match="no artifact"):
        model.get_generated_expression("G01", artifact=True)


def test_the_states_of_training_controls_are_kept(model):
    pool, obs = model.libraries_, model.adata.obs
    controls = np.flatnonzero(((obs["perturbation"] == "control") & (obs["split"] == "train")).to_numpy())
    np.testing.assert_array_equal(np.sort(pool["cell"]), controls)
    expected = model.get_latent_representation(indices=pool["cell"], component="invariant")
    np.testing.assert_allclose(pool["state_mean"], expected, rtol=1e-5, atol=1e-6)
    batch = np.array(model._batches)[pool["batch"]]
    np.testing.assert_array_equal(batch, obs["batch"].to_numpy()[pool["cell"]].astype(str))


def test_means_of_latents_can_take_the_place_of_draws(screen):
    model = fit(screen, epochs=1, sample_latents=False)
    control = np.flatnonzero(screen.obs["perturbation"] == "control")[:1]
    cells = model.get_generated_expression("G02", indices=control, n_samples=4, seed=0)
    np.testing.assert_allclose(cells.X, np.repeat(cells.X[:1], 4, axis=0), rtol=1e-5)


def test_predictions_average_over_what_is_drawn(model):
    """Means of generated cells minus those of controls are the effects."""
    effects = model.get_average_treatment_effects(["G01", "G02+G04"], n_particles=4000, seed=0)
    cells = model.get_generated_expression(["control", "G01", "G02+G04"], n_samples=4000, seed=1)
    means = cells.X.reshape(3, 4000, -1).mean(axis=1)
    error = np.sqrt(2 * cells.X.reshape(3, 4000, -1).var(axis=1).max() / 4000)
    assert np.abs(means[1:] - means[0] - effects.X).max() < 5 * error


def test_a_treatment_that_was_never_trained_alone(screen):
    adata = screen.copy()
    obs = adata.obs
    single = (obs["perturbation"] == "G02").to_numpy()
    obs["split"] = np.where(single, "unused", np.where(obs["split"] == "unused", "train", obs["split"]))
    model = fit(adata, epochs=1)
    pair = next(x for x in model.label_counts_ if "G02" in x and "+" in x)
    assert model.get_generated_expression(pair, n_samples=2).n_obs == 2  # seen together
    third = next(t for t in ("G01", "G03", "G04") if t not in pair)
    for request in ("G02", f"{pair}+{third}"):
        with pytest.raises(ValueError, match="'G02' was never trained alone"):
            model.get_generated_expression(request)
        with pytest.raises(ValueError, match="never trained alone"):
            model.get_average_treatment_effects(request)


def test_counterfactuals_keep_the_cell(model):
    cells = np.flatnonzero((model.adata.obs["perturbation"] == "G01").to_numpy())[:20]
    options = {"indices": cells, "seed": 4}
    own = model.get_counterfactual_expression(**options)
    named = model.get_counterfactual_expression(perturbation="G01", **options)
    np.testing.assert_allclose(own.X, named.X, rtol=1e-4, atol=1e-5)  # the observed treatment changes nothing
    other = model.get_counterfactual_expression(perturbation="control", **options)
    assert list(other.obs_names) == list(model.adata.obs_names[cells])
    assert (other.obs["perturbation"] == "control").all()
    assert (other.obs["perturbation_observed"] == "G01").all()
    assert np.abs(other.X - own.X).max() > 1e-3


def test_what_a_squared_error_has_no_answer_to(model):
    for call in (model.get_elbo, model.get_iwelbo):
        with pytest.raises(NotImplementedError, match="which is none: use 'gaussian'"):
            call()
    with pytest.raises(NotImplementedError, match="needs counts; received a model with `likelihood='mse'`"):
        model.evaluate()
    with pytest.raises(NotImplementedError, match="output='normalized'"):
        model.get_generated_expression(output="normalized")
    assert model.get_reconstruction_error()["reconstruction_loss"] > 0


def test_latent_blocks(model):
    cells = np.arange(6)
    blocks = {
        c: model.get_latent_representation(indices=cells, component=c) for c in ("invariant", "responsive", "hidden")
    }
    assert {c: b.shape for c, b in blocks.items()} == {"invariant": (6, 6), "responsive": (6, 4), "hidden": (6, 24)}
    full = model.get_latent_representation(indices=cells, component="full")
    np.testing.assert_array_equal(full, np.hstack([blocks["invariant"], blocks["responsive"]]))


# ---- graph, programs, leakage ---------------------------------------------------------------------------------------


def set_mechanisms(model):
    """Linear mechanisms that are known: the treatment's number in ``mean``, one edge from program 1 to program 3."""
    networks = model.module.causal.networks
    with torch.no_grad():
        for network in networks.values():
            network[-1].weight.zero_()
            network[-1].bias.zero_()
        networks["mean"][-1].weight[:, :] = 2 * torch.eye(4)  # treatment t moves program t
        networks["weights"][-1].bias[2 * 4 + 0] = -0.5  # program_01 -> program_03
        networks["weights"][-1].bias[0 * 4 + 2] = 9.0  # above the diagonal: without effect
        networks["context"][-1].weight[0 * 6 + 0, 1] = 3.0  # G02: program_01 listens to the first invariant variable


@pytest.fixture(scope="module")
def known(screen):
    model = fit(screen, epochs=2, mechanism="linear")
    set_mechanisms(model)
    return model


def test_the_graph_has_the_edges_of_the_weights(known):
    graph = known.get_causal_graph()
    assert list(graph.nodes) == [f"program_0{i}" for i in range(1, 5)]
    assert list(graph.edges) == [("program_01", "program_03")]
    edge = graph.edges["program_01", "program_03"]
    assert edge == {"weight": pytest.approx(-0.5), "strength": pytest.approx(0.5)}
    assert [graph.nodes[n]["treatments"] for n in graph.nodes] == ["G01", "G02", "G03", "G04"]
    assert graph.graph == {"threshold": 0.25}
    assert not known.get_causal_graph(0.6).edges
    with pytest.raises(ValueError, match="`threshold` must be a non-negative number"):
        known.get_causal_graph(-1.0)


def test_programs_are_shared_effects_beside_the_modulation_by_context(known):
    programs = known.get_latent_programs(["G01", "G02", "G01+G03", "G03+G04"])
    expected = [[2, 0, -1, 0], [0, 2, 0, 0], [2, 0, 1, 0], [0, 0, 2, 2]]  # -.5 of program_01 arrives at program_03
    np.testing.assert_allclose(programs.X, expected, atol=1e-6)
    assert list(programs.obs["program"]) == ["program_01", "program_02", "program_01", "program_03"]
    states = known.libraries_["state_mean"][:, 0]
    context = np.zeros((4, 4))
    context[1] = [3, 0, -1.5, 0]
    np.testing.assert_allclose(programs.layers["context_mean"], context * states.mean(), atol=1e-5)
    np.testing.assert_allclose(programs.layers["context_std"], np.abs(context) * states.std(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(programs.layers["noise_std"], np.tile([1, 1, 1.25**0.5, 1], (4, 1)), rtol=1e-5)
    moved = ((context[1][:, None] * states) ** 2).sum(0).mean()
    np.testing.assert_allclose(programs.obs["shared_fraction"], [1, 4 / (4 + moved), 1, 1], rtol=1e-4)
    loadings = programs.varm["genes"]
    assert loadings.shape == (4, 50)
    assert list(loadings.columns) == known._genes
    assert np.isfinite(loadings.to_numpy()).all()


def test_the_decomposition_adds_up_to_the_expected_response(model):
    programs = model.get_latent_programs(["G01+G02"])
    rows = model.libraries_["cell"][:2000]
    with torch.inference_mode():
        states = torch.as_tensor(model.libraries_["state_mean"])
        change = []
        for label in ("G01+G02", "control"):
            mechanism = model._mechanism([label])
            change.append(mechanism.respond(torch.zeros(len(rows), 4), states).mean(0))
    np.testing.assert_allclose(
        programs.X[0] + programs.layers["context_mean"][0], (change[0] - change[1]).numpy(), rtol=1e-4, atol=1e-5
    )


def test_stability_counts_the_replicates_with_the_same_edge(known, screen):
    twin, mirror, other = (fit(screen, epochs=1, mechanism="linear") for _ in range(3))
    for model in (twin, mirror, other):
        model.module.load_state_dict(known.module.state_dict())
    with torch.no_grad():
        other.module.causal.networks["weights"][-1].bias.zero_()
    table = known.get_edge_stability([twin, mirror, other])
    assert table[["source", "target"]].to_numpy().tolist() == [["program_01", "program_03"]]
    assert table["stability"].iloc[0] == pytest.approx(2 / 3)
    assert min(table.attrs["program_correlation"].values()) > 0.5
    graph = known.get_causal_graph(replicates=[twin, other])
    assert graph.edges["program_01", "program_03"]["stability"] == 0.5
    with pytest.raises(ValueError, match="at least one trained model"):
        known.get_edge_stability([])
    with pytest.raises(ValueError, match="as many programs"):
        known.get_edge_stability([fit(screen, epochs=1, n_latent_responsive=3)])


def test_leakage_tells_a_block_that_holds_the_label(screen):
    model = fit(screen, epochs=3)
    table = model.get_perturbation_leakage(indices=np.arange(400))
    assert list(table.index) == ["invariant", "responsive (given the label)", "hidden", "expression"]
    labels = screen.obs["perturbation"].astype(str).to_numpy()[:400]
    cells = np.flatnonzero(np.array([(labels == x).sum() >= 5 for x in labels]))
    for component in ("invariant", "hidden"):
        latent = model.get_latent_representation(indices=cells, component=component)
        expected = metrics.linear_probe(latent, labels[cells], seed=0)
        assert table.loc[component].to_dict() == pytest.approx(expected)
    set_mechanisms(fit_linear := fit(screen, epochs=1, mechanism="linear"))
    with torch.no_grad():
        fit_linear.module.noise_head.linear.weight.zero_()
        fit_linear.module.noise_head.linear.bias.zero_()
    given = fit_linear.get_perturbation_leakage(indices=np.flatnonzero(screen.obs["split"] != "unused"))
    assert given.loc["responsive (given the label)", "accuracy"] > 0.95  # four programs, one per treatment
    assert given.loc["invariant", "accuracy"] < 0.7
    with pytest.raises(ValueError, match="two labels with at least 5 cells"):
        model.get_perturbation_leakage(indices=[0, 1, 2])


def test_programs_of_many_controls_are_those_of_all(known, monkeypatch):
    """Context moments are weighted samples of the pool, whatever the order of its rows."""
    everything = known.get_latent_programs(["G02"])
    states = known.libraries_["state_mean"]
    monkeypatch.setattr("scvi_cradle.model._causal.MAX_CELLS", 40)
    order = np.argsort(states[:, 0])
    pool = {k: v[order] for k, v in known.libraries_.items()}
    monkeypatch.setattr(known, "libraries_", pool)
    some = known.get_latent_programs(["G02"])
    error = 3 * states[:, 0].std() / np.sqrt(40)
    assert some.layers["context_mean"][0, 0] == pytest.approx(everything.layers["context_mean"][0, 0], abs=3 * error)


def test_nothing_that_responds_is_shared_in_full(known):
    programs = known.get_latent_programs("control")
    assert (programs.X == 0).all()
    assert programs.obs["shared_fraction"].tolist() == [1.0]


# ---- interruption, storage ------------------------------------------------------------------------------------------


def test_a_training_that_stops_leaves_a_model_that_answers(screen):
    class Stop(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    model = fit(screen, epochs=1)
    with pytest.raises(RuntimeError, match="stop"):
        model.train(max_epochs=2, callbacks=[Stop()], **QUIET)
    cells = model.get_generated_expression("G01", n_samples=4, seed=0)
    assert np.isfinite(cells.X).all()
    expected = model.get_latent_representation(indices=model.libraries_["cell"], component="invariant")
    np.testing.assert_allclose(model.libraries_["state_mean"], expected, rtol=1e-5, atol=1e-6)


def test_backed_data_with_batches_and_a_random_split(screen, tmp_path):
    adata = AnnData(screen.layers["log"], obs=screen.obs[["perturbation", "batch"]])
    adata.write_h5ad(tmp_path / "screen.h5ad")
    backed = read_h5ad(tmp_path / "screen.h5ad", backed="r+")
    PerturbedVAE.setup_anndata(backed, perturbation_key="perturbation", batch_key="batch")
    model = PerturbedVAE(backed, control_pairing="within:batch", **SIZES)
    model.train(max_epochs=1, train_size=0.9, batch_size=50, enable_progress_bar=False)
    assert model.get_generated_expression("G01", n_samples=3).n_obs == 3
    cells = model.libraries_["cell"]
    order = np.argsort(cells)
    expected = model.get_latent_representation(indices=cells[order], component="invariant")
    np.testing.assert_allclose(model.libraries_["state_mean"][order], expected, rtol=1e-5, atol=1e-6)
    backed.file.close()


def test_early_stopping_follows_the_objective_after_the_warm_ups(screen):
    adata = screen.copy()
    PerturbedVAE.setup_anndata(adata, **KEYS)
    model = PerturbedVAE(adata, **SIZES)
    model.train(max_epochs=12, early_stopping=True, early_stopping_patience=1, lr=0.05, **QUIET)
    stopping = model.trainer.early_stopping_callback
    assert stopping.monitor == "validation_loss"
    assert len(model.history["validation_loss"]) >= 6


def test_means_of_latents_in_counterfactuals(screen):
    model = fit(screen, epochs=1, sample_latents=False)
    one, two = (model.get_counterfactual_expression(indices=np.arange(5), perturbation="G02", seed=s) for s in (0, 1))
    np.testing.assert_array_equal(one.X, two.X)


# ---- collapse -------------------------------------------------------------------------------------------------------


def test_collapses_are_warned_of(screen):
    adata = screen.copy()
    PerturbedVAE.setup_anndata(adata, **KEYS)
    torch.manual_seed(0)
    model = PerturbedVAE(adata, kl_weight_responsive=10.0, kl_weight_invariant=10.0, **SIZES)
    with pytest.warns(UserWarning, match="Generated cells|invariant variables") as caught:
        model.train(max_epochs=20, lr=5e-3, **QUIET)
    texts = [str(w.message) for w in caught]
    assert any("invariant variables are unused: KL" in t and "lower `kl_weight_invariant`" in t for t in texts)
    assert any("close to one mean" in t and "(to a tenth, say)" in t for t in texts)
    diagnostics = model.diagnostics_
    assert set(diagnostics) == {"kl_invariant", "kl_responsive", "variance_ratio", "expected_variance_ratio"}
    assert diagnostics["expected_variance_ratio"] == pytest.approx(diagnostics["variance_ratio"], rel=0.3)
    assert diagnostics["kl_invariant"] < 0.1
    assert diagnostics["variance_ratio"] < 0.1


@pytest.mark.parametrize("likelihood", ["gaussian", "nb"])
def test_collapses_hide_behind_observation_noise(screen, likelihood):
    """Generated cells vary as real ones do, by noise alone."""
    keys = {"perturbation_key": "perturbation"} if likelihood == "nb" else KEYS
    model = fit(screen, 0, 20, keys=keys, likelihood=likelihood, kl_weight_responsive=100.0, kl_weight_invariant=100.0)
    assert model.diagnostics_["variance_ratio"] > 0.3
    assert model.diagnostics_["expected_variance_ratio"] < 0.02
    assert any("close to one mean" in text for text in model._diagnostic_warnings(model.diagnostics_))


def test_a_model_that_has_not_collapsed_is_not_warned_of(screen):
    model = fit(screen, epochs=15, lr=1e-2, kl_weight_responsive=1e-3, kl_weight_invariant=1e-3)
    assert not model._diagnostic_warnings(model.diagnostics_)
    assert model.diagnostics_["kl_invariant"] > 0.1
    assert model.diagnostics_["variance_ratio"] > 0.1


def test_dosages_and_covariates(screen):
    adata = AnnData(screen.layers["log"], obs=screen.obs.copy())
    dosage = np.zeros((500, 2), dtype=np.float32)
    labels = adata.obs["perturbation"].astype(str)
    dosage[:, 0], dosage[:, 1] = 0.5 * labels.str.contains("G01"), labels.str.contains("G02")
    adata.obsm["doses"] = sp.csr_matrix(dosage)
    adata.uns["doses_names"] = ["G01", "G02"]
    model = fit(
        adata,
        epochs=1,
        keys={"perturbation_obsm_key": "doses", "categorical_covariate_keys": ["batch"]},
        alignment="l2",
    )
    assert model.get_generated_expression(["G01+G02"], n_samples=3).shape == (3, 50)
    assert model.get_counterfactual_expression(indices=np.arange(4), perturbation="G02").n_obs == 4
