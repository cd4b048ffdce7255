"""PerturbedVAE: discrepancy, activations and variances of the output, importance-weighted bounds, open weights.

Each beside a computation of its own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import gammaln, logsumexp
from torch.distributions import MultivariateNormal, Normal

from scvi_cradle import PerturbedVAE, datasets
from scvi_cradle._matrix import log_normalize

pytestmark = [
    pytest.mark.filterwarnings("ignore:The invariant variables are unused:UserWarning"),  # short training
    pytest.mark.filterwarnings("ignore:Generated cells of one label are close:UserWarning"),
]
D, N_INVARIANT, N_GENES = 4, 6, 50
SIZES = {"n_latent_responsive": D, "n_latent_invariant": N_INVARIANT, "n_hidden": 16, "n_layers": 1}
DRAW = 0.5


@pytest.fixture(scope="module")
def screen():
    adata = datasets.simulate_perturbseq(
        n_cells=300, n_genes=N_GENES, n_perturbations=4, n_combinations=0, artifact_fraction=0.0, n_batches=2, seed=3
    )
    adata.layers["log"] = log_normalize(adata.X).astype(np.float32).toarray()
    adata.obs["split"] = np.where(np.arange(300) % 5 > 0, "train", "val")
    return adata


def built(screen, likelihood, **settings):
    adata = screen.copy()
    PerturbedVAE.setup_anndata(
        adata,
        perturbation_key="perturbation",
        batch_key="batch",
        **({} if likelihood == "nb" else {"layer": "log"}),
    )
    torch.manual_seed(0)
    return PerturbedVAE(adata, likelihood=likelihood, **(SIZES | settings))


def trained(screen, likelihood, **settings):
    model = built(screen, likelihood, **settings)
    model.train(max_epochs=1, split_key="split", enable_progress_bar=False)
    return model


# ---- the discrepancy ------------------------------------------------------------------------------------------------


class ByHand:
    """The networks of a module with one hidden layer and linear mechanisms, from their weights, in double precision."""

    def __init__(self, module, scale):
        generator = torch.Generator().manual_seed(1)
        for name, parameter in module.named_parameters():
            small = 0.05 if "_head" in name else 1.0
            parameter.data = small * scale * torch.randn(parameter.shape, generator=generator)
        self.values = {name: value.detach().numpy().astype(float) for name, value in module.state_dict().items()}

    def linear(self, name, x):
        return x @ self.values[f"{name}.weight"].T + self.values[f"{name}.bias"]

    def layer(self, name, x):
        value = self.linear(name, x)
        return np.where(value > 0, value, 0.2 * value)

    def head(self, name, hidden):
        mean, log_variance = np.split(self.linear(f"{name}.linear", hidden), 2, axis=1)
        return mean, np.sqrt(np.exp(log_variance) + 1e-4)

    def noise(self, hidden, doses):
        return self.head("noise_head", self.layer("noise_encoder.0", np.hstack([hidden, doses])))

    def mechanism(self, name, doses):
        return self.linear(f"causal.networks.{name}.0", doses)

    def variance(self, doses):
        return np.exp(np.clip(self.mechanism("log_variance", doses), -5, 5))

    def respond(self, doses, noise, state):
        weights = np.tril(self.mechanism("weights", doses).reshape(-1, D, D), -1)
        context = self.mechanism("context", doses).reshape(-1, D, N_INVARIANT)
        inputs = noise + self.mechanism("mean", doses) + np.einsum("nij,nj->ni", context, state)
        return np.linalg.solve(np.eye(D) - weights, inputs[..., None])[..., 0]

    def decode(self, state, responsive, batch):
        covariates = np.eye(2)[batch]
        return self.linear("decoder.output", self.layer("decoder.hidden.0", np.hstack([state, responsive, covariates])))


def kl_to(mean, std, variance=1.0):
    return 0.5 * ((std**2 + mean**2) / variance - 1 - np.log(std**2 / variance)).sum(axis=1)


def discrepancy_of(x, y):
    def kernel(a, b):
        squared = ((a[:, None] - b[None]) ** 2).sum(-1)
        return sum(np.exp(-squared / (1000 / 2**5 * 2**i)) for i in range(10)).mean()

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def softmax(logits):
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True) + 1e-8


def count_log_prob(x, mu, theta):
    value = gammaln(x + theta) - gammaln(theta) - gammaln(x + 1)
    return (value + theta * np.log(theta / (theta + mu)) + x * np.log(mu / (theta + mu))).sum(axis=1)


@pytest.mark.parametrize("likelihood", ["mse", "nb"])
def test_the_discrepancy_is_that_of_cells_predicted_from_their_partners(screen, likelihood, monkeypatch):
    """All draws are 0.5 posterior (or prior) standard deviations above the mean, so that the objective is one number."""
    n = 16
    model = built(
        screen,
        likelihood,
        mechanism="linear",
        alignment="mmd",
        alignment_weight=7.0,
        kl_weight_responsive=0.3,
        kl_weight_invariant=0.7,
    )
    module = model.module.eval()
    hand = ByHand(module, 0.6)
    rng = np.random.default_rng(2)
    if likelihood == "nb":
        x, partner = (rng.poisson(rng.gamma(2.0, size, (n, N_GENES))).astype(float) for size in (8.0, 3.0))
        seen, seen_partner = np.log1p(x), np.log1p(partner)
    else:
        x, partner = seen, seen_partner = rng.normal(0, 4, (n, N_GENES)), rng.normal(1, 0.5, (n, N_GENES))
    codes = np.resize([model._table.labels.index("G02"), model._table.labels.index("G04")], n)
    batch, partner_batch = rng.integers(0, 2, n), rng.integers(0, 2, n)
    assert (batch != partner_batch).any()
    tensors = {
        "X": torch.as_tensor(x).float(),
        "perturbation": torch.as_tensor(codes)[:, None],
        "batch": torch.as_tensor(batch)[:, None],
        "control_partner": torch.as_tensor(partner).float(),
        "control_partner_batch": torch.as_tensor(partner_batch)[:, None],
    }
    monkeypatch.setattr(torch, "randn", lambda shape, **kwargs: torch.full(tuple(shape), DRAW))
    loss = module(tensors, loss_kwargs={"kl_weight": 0.5, "alignment_ramp": 0.25})[2]

    treated = np.zeros((n, 4))
    for column, name in ((1, "G02"), (3, "G04")):
        assert model._table.treatments[column] == name
        treated[codes == model._table.labels.index(name), column] = 1.0
    control = np.zeros_like(treated)
    hidden, hidden_partner = (hand.layer("encoder.0", value) for value in (seen, seen_partner))
    own, of_partner = hand.head("invariant_head", hidden), hand.head("invariant_head", hidden_partner)
    noise, noise_partner = hand.noise(hidden, treated), hand.noise(hidden_partner, control)
    state = of_partner[0] + DRAW * of_partner[1]
    responsive = hand.respond(control, noise_partner[0] + DRAW * noise_partner[1], state)
    output = hand.decode(state, responsive, partner_batch)
    moved = hand.decode(state, hand.respond(treated, DRAW * np.sqrt(hand.variance(treated)), state), batch)
    if likelihood == "nb":
        theta = np.exp(hand.values["decoder.likelihood.log_theta"])
        mean = softmax(output) * partner.sum(axis=1, keepdims=True)
        error = -count_log_prob(partner, mean, theta)
        discrepancy = discrepancy_of(np.log1p(softmax(moved) * x.sum(axis=1, keepdims=True)), np.log1p(x))
    else:
        error = ((partner - output) ** 2).mean(axis=1)
        discrepancy = discrepancy_of(moved, x)
    assert discrepancy > 0.05
    responsive_kl = kl_to(*noise, hand.variance(treated)) + kl_to(*noise_partner, hand.variance(control))
    divergence = 0.3 * responsive_kl + 0.7 * (kl_to(*own) + kl_to(*of_partner))
    assert loss.extra_metrics["alignment"].item() == pytest.approx(discrepancy, rel=1e-4)
    np.testing.assert_allclose(loss.reconstruction_loss["reconstruction_loss"].numpy(), error, rtol=1e-4)
    expected = (error + 0.5 * divergence).mean() + 0.25 * 7.0 * discrepancy
    assert loss.loss.item() == pytest.approx(expected, rel=1e-5)


# ---- activation and variance of the output --------------------------------------------------------------------------

ACTIVATIONS = {
    "identity": lambda output: output,
    "softplus": lambda output: np.logaddexp(0.0, output),
    "leaky_relu": lambda output: np.where(output > 0, output, 0.2 * output),
}
OUTPUTS = [
    ("mse", "softplus", "learned"),
    ("mse", "leaky_relu", "learned"),
    ("gaussian", "softplus", "learned"),
    ("gaussian", "identity", 0.01),
    ("gaussian", "leaky_relu", 2.5),
]


def error_of(hand, x, mean, likelihood, variance):
    """The error of cells: mean of squares, or minus the log-likelihood."""
    if likelihood == "mse":
        return ((x - mean) ** 2).mean(axis=1)
    learned = variance == "learned"
    std = np.exp(hand.values["decoder.likelihood.log_std"]) + 1e-3 if learned else np.sqrt(variance)
    return (0.5 * ((x - mean) / std) ** 2 + np.log(std) + 0.5 * np.log(2 * np.pi)).sum(axis=1)


@pytest.mark.parametrize(("likelihood", "activation", "variance"), OUTPUTS)
def test_the_objective_has_the_activation_and_the_variance(screen, likelihood, activation, variance, monkeypatch):
    n, options = 16, {"output_activation": activation, "output_variance": variance}
    weights = {"kl_weight_responsive": 0.3, "kl_weight_invariant": 0.7}
    model = built(screen, likelihood, mechanism="linear", alignment="none", **weights, **options)
    hand = ByHand(model.module.eval(), 0.6)
    x = np.random.default_rng(2).normal(0, 4, (n, N_GENES))
    batch = np.arange(n) % 2
    treated = np.zeros((n, 4))
    treated[:, model._table.treatments.index("G02")] = 1.0
    tensors = {
        "X": torch.as_tensor(x).float(),
        "perturbation": torch.full((n, 1), model._table.labels.index("G02")),
        "batch": torch.as_tensor(batch)[:, None],
    }
    monkeypatch.setattr(torch, "randn", lambda shape, **kwargs: torch.full(tuple(shape), DRAW))
    loss = model.module(tensors, loss_kwargs={"kl_weight": 0.5})[2]
    hidden = hand.layer("encoder.0", x)
    own, noise = hand.head("invariant_head", hidden), hand.noise(hidden, treated)
    state = own[0] + DRAW * own[1]
    output = hand.decode(state, hand.respond(treated, noise[0] + DRAW * noise[1], state), batch)
    error = error_of(hand, x, ACTIVATIONS[activation](output), likelihood, variance)
    assert (output < 0).any()
    np.testing.assert_allclose(loss.reconstruction_loss["reconstruction_loss"].numpy(), error, rtol=1e-4)
    divergence = 0.3 * kl_to(*noise, hand.variance(treated)) + 0.7 * kl_to(*own)
    assert loss.loss.item() == pytest.approx((error + 0.5 * divergence).mean(), rel=1e-5)


@pytest.mark.parametrize(("likelihood", "activation", "variance"), OUTPUTS)
def test_predictions_have_the_activation_and_the_variance(screen, likelihood, activation, variance):
    """All latents at their means: expected expression of generated cells and counterfactuals is one pass by hand."""
    options = {"output_activation": activation, "output_variance": variance}
    model = trained(screen, likelihood, mechanism="linear", sample_latents=False, **options)
    hand = ByHand(model.module, 0.6)
    (cell,) = np.flatnonzero(model.adata.obs["perturbation"] == "control")[:1]
    x = model.adata.layers["log"][[cell]].astype(float)
    seen = (x - hand.values["input_mean"]) / hand.values["input_std"]
    batch, moved = model.adata.obs["_scvi_batch"].to_numpy()[[cell]].astype(int), np.eye(4)[[1]]
    assert model._table.treatments[1] == "G02"
    hidden = hand.layer("encoder.0", seen)
    state = hand.head("invariant_head", hidden)[0]

    def decoded(noise):
        return ACTIVATIONS[activation](hand.decode(state, hand.respond(moved, noise, state), batch))[0]

    generated = model.get_generated_expression("G02", indices=[cell], n_samples=2, output="mean", seed=0)
    np.testing.assert_allclose(generated.X, np.tile(decoded(np.zeros((1, D))), (2, 1)), rtol=1e-3, atol=1e-4)
    drawn = model.get_generated_expression("G02", indices=[cell], n_samples=3000, seed=0).X - generated.X[:1]
    if likelihood == "mse":
        np.testing.assert_allclose(drawn, 0.0, atol=1e-5)
    elif variance != "learned":
        assert drawn.var() == pytest.approx(variance, rel=0.03)
    # a counterfactual keeps the noise in units of its standard deviation
    untreated = np.zeros((1, 4))
    unit = hand.noise(hidden, untreated)[0] / np.sqrt(hand.variance(untreated))
    kept = model.get_counterfactual_expression(indices=[cell], perturbation="G02", output="mean", seed=0)
    np.testing.assert_allclose(kept.X[0], decoded(unit * np.sqrt(hand.variance(moved))), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_output_starts_at_the_means_of_the_training_cells(screen, activation):
    model = built(screen, "mse", output_activation=activation)
    model.train(max_epochs=1, lr=1e-12, split_key="split", enable_progress_bar=False)
    mean = screen.layers["log"][(screen.obs["split"] == "train").to_numpy()].mean(axis=0)
    assert mean.min() > 1e-3
    start = ACTIVATIONS[activation](model.module.decoder.output.bias.detach().numpy())
    np.testing.assert_allclose(start, mean, rtol=1e-4, atol=1e-6)


# ---- bounds ---------------------------------------------------------------------------------------------------------


def full_gaussian(inverse, center, variance):
    """The responsive variables of cells as Gaussians, through ``(I - weights)^-1``."""
    mean = (inverse @ center[..., None])[..., 0]
    return MultivariateNormal(mean, inverse @ torch.diag_embed(variance) @ inverse.transpose(1, 2))


@pytest.mark.parametrize("likelihood", ["gaussian", "nb"])
def test_importance_weights_are_ratios_of_full_densities(screen, likelihood, monkeypatch):
    """The responsive variables' densities go through their full covariances, at the draws of the bound."""
    model = trained(screen, likelihood)
    module, n, n_particles = model.module, 8, 3
    with torch.no_grad():
        for network in module.causal.networks.values():
            network[-1].weight.mul_(10)
            network[-1].bias.add_(0.3)
    draws, inference = [], module.inference

    def spy(**inputs):
        draws.append((inputs, inference(**inputs)["latent"]))
        return {"latent": draws[-1][1], "pairs": module.pairs(inputs["label"], inputs.get("dosage"))}

    monkeypatch.setattr(module, "inference", spy)
    cells = np.arange(n)
    bounds = model.get_iwelbo(indices=cells, n_particles=n_particles)
    assert len(draws) == n_particles
    batch = torch.as_tensor(np.eye(2)[model.adata.obs["_scvi_batch"].to_numpy()[cells]])
    weights = np.zeros((n_particles, n))
    for k, (inputs, latent) in enumerate(draws):
        mean, variance, weight, context = (value.double() for value in latent.mechanism)
        state, response = latent.z_basal[0].double(), latent.z_responsive[0].double()
        inverse = torch.linalg.inv(torch.eye(D, dtype=torch.float64) - weight)
        center = mean + (context @ state[..., None])[..., 0]
        assert (weight.abs().amax(dim=(1, 2)) > 0.2).all()

        loc, std = (value[0].double() for value in (latent.q_noise.loc, latent.q_noise.scale))
        q_state = Normal(*(value[0].double() for value in (latent.q_basal.loc, latent.q_basal.scale)))
        prior = full_gaussian(inverse, center, variance).log_prob(response) + Normal(0.0, 1.0).log_prob(state).sum(-1)
        posterior = full_gaussian(inverse, center + loc, std**2).log_prob(response) + q_state.log_prob(state).sum(-1)
        features = module.decoder.hidden(torch.cat([state, response, batch], dim=-1).float())
        output = (features @ module.decoder.output.weight.T + module.decoder.output.bias).double().detach()
        x = inputs["x"].double()
        if likelihood == "nb":
            theta = module.decoder.likelihood.log_theta.detach().double().exp().numpy()
            mu = softmax(output.numpy()) * x.numpy().sum(axis=1, keepdims=True)
            fit = torch.as_tensor(count_log_prob(x.numpy(), mu, theta))
        else:
            std = module.decoder.likelihood.log_std.detach().double().exp() + 1e-3
            fit = Normal(output, std).log_prob(x).sum(-1)
        weights[k] = (fit + prior - posterior).numpy()
    np.testing.assert_allclose(bounds, logsumexp(weights, axis=0) - np.log(n_particles), rtol=1e-5, atol=2e-3)


# ---- controls of the user, open weights -----------------------------------------------------------------------------


def test_new_cells_take_the_library_sizes_of_the_controls_of_the_user(screen):
    model = trained(screen, "nb")
    controls = np.flatnonzero(model.adata.obs["perturbation"] == "control")
    totals = np.asarray(model.adata.X.sum(axis=1)).ravel()
    chosen = controls[np.argsort(totals[controls])[[0, 1, -1]]]
    assert len(set(totals[chosen])) == 3
    cells = model.get_generated_expression(["G01", "control"], indices=chosen, n_samples=60, seed=0)
    assert set(cells.obs["library_size"].astype(float)) == set(totals[chosen].astype(float))
    own, deep = chosen[:1], chosen[2:]
    of_own, of_deep = (
        model.get_generated_expression("G01", indices=i, n_samples=30, output="mean", seed=0).X.sum(axis=1)
        for i in (own, deep)
    )
    np.testing.assert_allclose(np.asarray(of_own).ravel(), totals[own[0]], rtol=1e-4)
    np.testing.assert_allclose(np.asarray(of_deep).ravel(), totals[deep[0]], rtol=1e-4)


def test_constant_genes_have_no_variance_in_the_weights_of_divergences(screen):
    adata = screen.copy()
    adata.layers["log"][:, ::2] = 0.0
    model = trained(adata, "mse")
    train = adata.layers["log"][(adata.obs["split"] == "train").to_numpy()].astype(float)
    expected = 8 * train.var(axis=0, ddof=1).mean() / N_GENES
    assert expected > 0
    torch.testing.assert_close(model.module.kl_weights, torch.full((2,), expected), rtol=1e-4, atol=0)
