"""PerturbedVAE: stability of edges in replicates that are known, exact loadings of genes, cells of the leakage test."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from scvi_cradle import PerturbedVAE, datasets
from scvi_cradle._matrix import log_normalize

pytestmark = [
    pytest.mark.filterwarnings("ignore:The invariant variables are unused:UserWarning"),  # short training
    pytest.mark.filterwarnings("ignore:Generated cells of one label are close:UserWarning"),
]
D, N_INVARIANT = 4, 6
SIZES = {"n_latent_responsive": D, "n_latent_invariant": N_INVARIANT, "n_hidden": 16, "n_layers": 1}


@pytest.fixture(scope="module")
def screen():
    adata = datasets.simulate_perturbseq(
        n_cells=400, n_genes=40, n_perturbations=4, n_combinations=0, artifact_fraction=0.0, seed=3
    )
    adata.layers["log"] = log_normalize(adata.X).astype(np.float32)
    adata.obs["split"] = np.where(np.arange(400) % 3 > 0, "train", "val")
    return adata


def trained(screen, likelihood="mse", **settings):
    adata = screen.copy()
    layer = {} if likelihood == "nb" else {"layer": "log"}
    PerturbedVAE.setup_anndata(adata, perturbation_key="perturbation", **layer)
    torch.manual_seed(0)
    model = PerturbedVAE(adata, mechanism="linear", likelihood=likelihood, **SIZES, **settings)
    model.train(max_epochs=1, split_key="split", enable_progress_bar=False)
    return model


def set_mechanisms(model, edges):
    """Treatment ``t`` moves program ``t`` by 2; the weights of edges ``(source, target)`` are constants."""
    networks = model.module.causal.networks
    with torch.no_grad():
        for network in networks.values():
            network[-1].weight.zero_()
            network[-1].bias.zero_()
        networks["mean"][-1].weight.copy_(2 * torch.eye(D))
        for (source, target), weight in edges.items():
            networks["weights"][-1].bias[target * D + source] = weight


def replicate(model):
    """The same model with parameters of its own."""
    other = copy.copy(model)
    other.module = copy.deepcopy(model.module)
    return other


def permute(model, order):
    """Give program ``order[i]`` the place ``i``; no edge may go backwards."""
    networks, head, first = model.module.causal.networks, model.module.noise_head.linear, model.module.decoder.hidden[0]
    rows = torch.as_tensor(order)
    with torch.no_grad():
        for name in ("mean", "log_variance"):
            networks[name][-1].weight.copy_(networks[name][-1].weight[rows])
            networks[name][-1].bias.copy_(networks[name][-1].bias[rows])
        for parameter in networks["context"][-1].parameters():
            parameter.copy_(parameter.unflatten(0, (D, N_INVARIANT))[rows].flatten(0, 1))
        for parameter in networks["weights"][-1].parameters():
            parameter.copy_(parameter.unflatten(0, (D, D))[rows][:, rows].flatten(0, 1))
        for parameter in head.parameters():
            parameter.copy_(parameter[torch.cat([rows, D + rows])])
        columns = torch.cat([torch.arange(N_INVARIANT), N_INVARIANT + rows])
        first.weight.copy_(first.weight[:, columns])


EDGES = {(0, 2): -0.5, (2, 3): 0.8}


@pytest.fixture(scope="module")
def known(screen):
    model = trained(screen)
    set_mechanisms(model, EDGES)
    return model


# ---- stability ------------------------------------------------------------------------------------------------------


def test_programs_of_a_replicate_are_matched_whatever_their_order(known):
    other, order = replicate(known), [0, 2, 3, 1]
    permute(other, order)
    assert list(other.get_causal_graph().edges) == [("program_01", "program_02"), ("program_02", "program_03")]
    own, theirs = (m.get_latent_representation(component="responsive") for m in (known, other))
    np.testing.assert_allclose(theirs, own[:, order], rtol=1e-4, atol=1e-5)
    expected = known.get_reconstruction_error()["reconstruction_loss"]
    assert other.get_reconstruction_error()["reconstruction_loss"] == pytest.approx(expected, rel=0.1)
    table = known.get_edge_stability([other])
    assert table[["source", "target"]].to_numpy().tolist() == [
        ["program_03", "program_04"],
        ["program_01", "program_03"],
    ]
    np.testing.assert_array_equal(table[["stability", "stability_undirected"]], 1.0)
    np.testing.assert_allclose(list(table.attrs["program_correlation"].values()), 1.0, atol=1e-4)


def test_reversed_and_lacking_edges_count_as_such(known):
    permuted, reversed_, none = (replicate(known) for _ in range(3))
    permute(permuted, [0, 2, 3, 1])
    set_mechanisms(reversed_, {})
    permute(reversed_, [2, 0, 1, 3])
    with torch.no_grad():
        bias = reversed_.module.causal.networks["weights"][-1].bias
        bias[1 * D + 0], bias[3 * D + 0] = -0.5, 0.8  # program 3 comes first: 3 -> 1 and 3 -> 4
    set_mechanisms(none, {(0, 1): 0.2})  # below the threshold
    table = known.get_edge_stability([permuted, reversed_, none]).set_index(["source", "target"])
    assert list(table.index) == [("program_03", "program_04"), ("program_01", "program_03")]
    np.testing.assert_allclose(table["weight"], [0.8, -0.5], rtol=1e-6)
    np.testing.assert_allclose(table["strength"], [0.8, 0.5], rtol=1e-6)
    np.testing.assert_allclose(table["stability"], [2 / 3, 1 / 3])
    np.testing.assert_allclose(table["stability_undirected"], [2 / 3, 2 / 3])
    assert table.attrs["density"] == pytest.approx((2 + 2 + 0) / 3 / 6)
    assert known.get_edge_stability([none]).attrs["density"] == 0.0
    assert known.get_edge_stability([none], threshold=0.1).attrs["density"] == pytest.approx(1 / 6)


# ---- loadings -------------------------------------------------------------------------------------------------------

SHARED = np.array([[0, 0, 0, 0], [2, 0, -1, -0.8], [0, 2, 0, 0], [0, 0, 2, 1.6], [0, 0, 0, 2]])  # control, G01, ...
NOISE = np.tile([1, 1, 1 + 0.25, 1 + 0.8**2 * 1.25], (5, 1))
NOISE[2, 1] = 3.0  # G02 makes program 2 noisier


@pytest.mark.parametrize(
    ("likelihood", "activation"),
    [("mse", "identity"), ("nb", "identity"), ("mse", "softplus"), ("gaussian", "leaky_relu")],
)
def test_loadings_are_the_change_of_the_output_by_one_standard_deviation(screen, likelihood, activation):
    model = trained(screen, likelihood, output_activation=activation)
    set_mechanisms(model, EDGES)
    first, output = model.module.decoder.hidden[0], model.module.decoder.output
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.module.causal.networks["log_variance"][-1].weight[1, 1] = np.log(3.0)
        first.weight.copy_(0.3 * torch.randn(first.weight.shape, generator=generator))
        first.bias.fill_(20.0)  # far from the kink: the decoder is linear
        output.weight.copy_(0.2 * torch.randn(output.weight.shape, generator=generator))
        output.bias.normal_(generator=generator)
    programs = model.get_latent_programs()
    assert list(programs.obs_names) == ["G01", "G02", "G03", "G04"]
    np.testing.assert_allclose(programs.X, SHARED[1:], atol=1e-5)
    np.testing.assert_allclose(programs.layers["noise_std"], np.sqrt(NOISE[1:]), rtol=1e-4)
    step = np.sqrt(SHARED.var(axis=0) + NOISE.mean(axis=0))
    weight, out = first.weight.detach().numpy().astype(float), output.weight.detach().numpy().astype(float)
    expected = step[:, None] * (out @ weight[:, N_INVARIANT:]).T
    # from the mean control cell, whose responsive variables have the mean 0
    state = model.libraries_["state_mean"].mean(axis=0)
    start = out @ (weight[:, :N_INVARIANT] @ state + 20.0) + output.bias.detach().numpy()
    moved = start + expected
    if likelihood == "nb":
        expected = expected - np.log(np.exp(moved - start.max()).sum(1) / np.exp(start - start.max()).sum())[:, None]
        expected = expected / np.log(2)
    if activation != "identity":
        means = [
            np.logaddexp(0, v) if activation == "softplus" else np.where(v > 0, v, 0.2 * v) for v in (start, moved)
        ]
        assert np.abs(means[1] - means[0] - expected).max() > 0.1
        expected = means[1] - means[0]
    loadings = programs.varm["genes"]
    assert list(loadings.index) == [f"program_0{i}" for i in range(1, 5)]
    assert list(loadings.columns) == list(model.adata.var_names)
    np.testing.assert_allclose(loadings.to_numpy(), expected, rtol=1e-3, atol=2e-4)


# ---- cells of the leakage test --------------------------------------------------------------------------------------


def test_labels_are_sought_in_held_out_cells(known):
    held_out = np.flatnonzero(known.adata.obs["split"] == "val")
    table = known.get_perturbation_leakage()
    pd.testing.assert_frame_equal(table, known.get_perturbation_leakage(indices=held_out))
    every = known.get_perturbation_leakage(indices=np.arange(known.adata.n_obs))
    assert (table["n_test"] < every["n_test"] / 2).all()
    pd.testing.assert_frame_equal(known.get_perturbation_leakage(known.adata), every)


def test_test_cells_go_before_validation_cells_and_too_few_held_out_cells_are_not_enough(screen):
    for share, cells in (("test", "test"), ("tiny", None)):
        adata = screen.copy()
        third, order = np.arange(400) % 3, np.arange(400)
        split = np.where(third == 0, "train", np.where(third == 1, "val", "test"))
        if share == "tiny":
            split = np.where(order < 4, "val", "train")
        adata.obs["split"] = split
        model = trained(adata)
        expected = np.flatnonzero(split == cells) if cells else order
        pd.testing.assert_frame_equal(
            model.get_perturbation_leakage(), model.get_perturbation_leakage(indices=expected)
        )
