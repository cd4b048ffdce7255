"""QuantileHurdleModule: its objective in numpy, its gradients, its starts and its reconstructions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit

from scvi_cradle.module import QuantileHurdleModule
from scvi_cradle.module._quantilehurdleae import LatentCode
from scvi_cradle.module.base import _quantile_decoder as decoder_file

LEVELS = (0.1, 0.3, 0.6, 0.9)
N_GENES, N_CELLS = 5, 7
SETTINGS = {"n_levels": (1,), "n_continuous": 0, "n_latent": 3, "n_hidden": 6, "hurdle_weight": 0.5, "latent_l2": 0.01}


def build(n_genes=N_GENES, quantiles=LEVELS, **settings):
    torch.manual_seed(0)
    settings = {"quantile_rank": None, "monotone": "cumsum"} | SETTINGS | settings
    return QuantileHurdleModule(n_genes, 2, quantiles=quantiles, **settings).double()


def expression(seed=0, n_cells=N_CELLS, n_genes=N_GENES):
    """Non-negative values; the last gene is never positive, the first cell has none."""
    rng = np.random.default_rng(seed)
    x = rng.gamma(2.0, size=(n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.6)
    x[:, -1] = x[0] = 0.0
    return torch.as_tensor(x)


def loss_of(module, x, latent=None):
    outputs = module.inference(x, torch.zeros(len(x), dtype=torch.long))
    if latent is not None:
        outputs["latent"] = LatentCode(latent[None])
    generative = module.generative(outputs["latent"], outputs["pairs"], x.new_zeros(len(x), 0))
    return module.loss({"X": x}, outputs, generative)


def constant(module, probability, quantiles):
    """Let the outputs be the same for all cells."""
    module.initialize_output(torch.as_tensor(np.asarray(probability)), torch.as_tensor(np.asarray(quantiles)))
    for layer in (module.decoder.hurdle, module.decoder.quantiles.output):
        layer.weight.data.zero_()
    return module


# ---- numbers -----------------------------------------------------------------------------------------------------------


def test_hurdle_is_the_probability_of_a_positive_value():
    module = constant(build(1, hurdle_weight=1.0, latent_l2=0.0), [0.8], [[1.0, 2.0, 3.0, 4.0]])
    for x, expected in ((1.0, 0.2231435513), (0.0, 1.6094379124)):
        metrics = loss_of(module, torch.full((3, 1), x, dtype=torch.float64)).extra_metrics
        assert abs(metrics["hurdle"].item() - expected) < 1e-9


@pytest.mark.parametrize(
    ("second", "normalization", "expected"),
    [
        (1.2, "all", 0.0636363636363636),
        (1.2, "positive", 0.0636363636363636),
        (0.0, "all", 0.2 / 11),  # a zero counts in the denominator of eq. 4
        (0.0, "positive", 0.2),
    ],
)
def test_gene_weights_of_the_worked_example(second, normalization, expected):
    module = build(2, (0.25, 0.75), hurdle_weight=0.0, latent_l2=0.0, quant_normalization=normalization)
    constant(module, [0.5, 0.5], [[1.0, 2.6], [1.0, 1.4]])  # losses of 0.2 and 0.05 between the quantiles
    module.gene_weights.copy_(torch.tensor([1.0, 10.0]))
    output = loss_of(module, torch.tensor([[2.0, second]], dtype=torch.float64))
    assert abs(output.loss.item() - expected) < 1e-9


# ---- the whole objective in numpy ---------------------------------------------------------------------------------------


def perceptron(w, name, value, n_layers):
    for i in range(n_layers):
        value = np.maximum(value @ w[f"{name}.{2 * i}.weight"].T + w[f"{name}.{2 * i}.bias"], 0)
    return value


def in_numpy(module, x):
    """Objective, per-cell error and parts, cell by cell and gene by gene."""
    w = {k: v.detach().numpy() for k, v in module.state_dict().items()}
    levels, weights = w["levels"], w["gene_weights"]
    y = np.log1p(x) if module.magnitude_transform == "log1p" else x
    z = perceptron(w, "encoder", x, 2) @ w["encoder.4.weight"].T + w["encoder.4.bias"]
    penalty = (z**2).sum(1).mean()
    n, n_genes = x.shape
    scale = n * n_genes * weights.mean()
    if module.reconstruction == "mse":
        output = perceptron(w, "decoder.0", z, 2) @ w["decoder.1.weight"].T + w["decoder.1.bias"]
        error = (weights * (y - output) ** 2).sum(1) * n / scale
        return error.mean() + module.latent_l2 * penalty, error, {"mse": error.mean(), "latent_l2": penalty}
    hidden = perceptron(w, "decoder.hidden", z, 2)
    theta = expit(hidden @ w["decoder.hurdle.weight"].T + w["decoder.hurdle.bias"])
    basis = hidden @ w["decoder.quantiles.basis.weight"].T if "decoder.quantiles.basis.weight" in w else hidden
    a = (basis @ w["decoder.quantiles.output.weight"].T + w["decoder.quantiles.output.bias"]).reshape(n, n_genes, -1)
    quant, hurdle, positive_weight = np.zeros(n), np.zeros(n), 0.0
    for c, j in np.ndindex(n, n_genes):
        hurdle[c] -= weights[j] * np.log(theta[c, j] if x[c, j] > 0 else 1 - theta[c, j])
        if x[c, j] == 0:
            continue
        s, total = np.log1p(np.exp(a[c, j])), 0.0
        q = {"cumsum": np.cumsum, "sort": np.sort, "penalty": np.asarray}[module.decoder.quantiles.monotone](s)
        for tau, q_tau in zip(levels, q, strict=True):
            total += tau * max(0, y[c, j] - q_tau) + (1 - tau) * max(0, q_tau - y[c, j])
        crossing = np.mean([max(0, low - high) for low, high in zip(q[:-1], q[1:], strict=True)])
        quant[c] += weights[j] * (total / len(levels) + crossing)  # crossing is 0 but for "penalty"
        positive_weight += weights[j]
    quant *= n / (positive_weight if module.quant_normalization == "positive" else scale)
    hurdle *= n / scale
    error = quant + module.hurdle_weight * hurdle
    parts = {"quantile": quant.mean(), "hurdle": hurdle.mean(), "latent_l2": penalty}
    return error.mean() + module.latent_l2 * penalty, error, parts


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quant_normalization": "positive"},
        {"magnitude_transform": "log1p"},
        {"monotone": "sort"},
        {"monotone": "penalty"},
        {"quantile_rank": 2, "quant_normalization": "positive", "magnitude_transform": "log1p"},
        {"reconstruction": "mse"},
        {"reconstruction": "mse", "magnitude_transform": "log1p"},
    ],
    ids=lambda s: "-".join(map(str, s.values())) or "default",
)
def test_objective_equals_its_equations(settings):
    module, x = build(**settings), expression()
    module.gene_weights.copy_(torch.tensor([1.0, 100.0, 3.0, 1.0, 7.0]))
    output = loss_of(module, x)
    loss, error, parts = in_numpy(module, x.numpy())
    assert output.loss.item() == pytest.approx(loss, rel=1e-9)
    np.testing.assert_allclose(output.reconstruction_loss["reconstruction_loss"].numpy(), error, rtol=1e-9)
    assert {k: v.item() for k, v in output.extra_metrics.items()} == pytest.approx(parts, rel=1e-9)
    assert output.kl_local_sum == output.kl_global_sum == 0


def test_gradients_of_the_objective():
    for settings in ({}, {"monotone": "penalty", "quantile_rank": 2}, {"reconstruction": "mse"}):
        module, x = build(n_hidden=4, **settings), expression(n_cells=4)
        names, values = zip(*module.named_parameters(), strict=True)

        def objective(*parameters, module=module, names=names, x=x):
            def run():
                return loss_of(module, x).loss

            module.forward, plain = run, module.forward
            try:
                return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), ())
            finally:
                module.forward = plain

        leaves = [v.detach().clone().requires_grad_() for v in values]
        assert torch.autograd.gradcheck(objective, leaves)


@pytest.mark.parametrize("monotone", ["cumsum", "sort", "penalty"])
@pytest.mark.parametrize("rank", [None, 2])
def test_gathered_loss_equals_its_plain_form(monkeypatch, monotone, rank):
    monkeypatch.setattr(decoder_file, "BLOCK_VALUES", 6)  # several blocks, also of genes without values
    head, x = build(monotone=monotone, quantile_rank=rank).decoder.quantiles, expression()
    features = torch.randn(N_CELLS, 6, dtype=torch.float64).requires_grad_()
    gene, cell = (x.t() > 0).nonzero(as_tuple=True)
    arguments = torch.tensor(LEVELS).double(), cell, gene, x[cell, gene], torch.rand(len(cell)).double()
    leaves = [features, *head.parameters()]
    plain, losses = head.dense_loss(features, *arguments)
    value, gathered = head.weighted_loss(features, *arguments)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(gathered, losses)
    assert not gathered.requires_grad
    slopes = torch.autograd.grad(2 * value, leaves)
    for slope, expected in zip(slopes, torch.autograd.grad(2 * plain, leaves), strict=True):
        torch.testing.assert_close(slope, expected)
        assert slope.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(head.weighted_loss(features, *arguments)[0], plain.detach())


@pytest.mark.parametrize("settings", [{}, {"quant_normalization": "positive"}, {"monotone": "penalty"}])
def test_loss_is_safe_without_positive_values(settings):
    for x in (torch.zeros(4, N_GENES), torch.full((4, N_GENES), 1e6)):
        module = build(**settings).float()
        module.gene_weights.copy_(torch.tensor([1.0, 1e4, 1.0, 1.0, 1.0]))
        module.decoder.hurdle.bias.data.fill_(-200.0)
        output = loss_of(module, x)
        output.loss.backward()
        assert torch.isfinite(output.loss)
        assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
        if not x.any():
            assert output.extra_metrics["quantile"] == 0


# ---- starts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"monotone": "sort"}, {"monotone": "penalty"}, {"quantile_rank": 2}])
@pytest.mark.parametrize("transform", [None, "log1p"])
def test_start_at_the_data(settings, transform):
    module = build(magnitude_transform=transform, **settings)
    before = module.decoder.quantiles.output.weight.detach().clone()
    quantiles = np.sort(np.random.default_rng(0).gamma(2.0, size=(N_GENES, 4)) + 0.05)
    probability = np.array([0.0, 0.2, 0.5, 0.9, 1.0])
    module.initialize_output(torch.as_tensor(probability), torch.as_tensor(quantiles))
    torch.testing.assert_close(module.decoder.quantiles.output.weight, 0.1 * before)
    constant(module, probability, quantiles)
    with torch.no_grad():
        logits, values = module.decode(torch.randn(3, 3, dtype=torch.float64))
    expected = np.log1p(quantiles) if transform else quantiles
    np.testing.assert_allclose(values.numpy(), np.broadcast_to(expected, (3, N_GENES, 4)), rtol=1e-9)
    np.testing.assert_allclose(logits.sigmoid()[0].numpy(), probability.clip(1e-6, 1 - 1e-6), rtol=1e-9)


# ---- reconstructions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [None, "log1p"])
def test_draws_have_the_predicted_marginals(transform):
    levels = tuple(np.linspace(0.05, 0.95, 10))
    quantiles = np.sort(np.random.default_rng(1).gamma(2.0, size=(2, 10)))
    module = constant(build(2, levels, magnitude_transform=transform), [0.3, 0.8], quantiles)
    n, z = 100_000, torch.zeros(100_000, 3, dtype=torch.float64)
    with torch.no_grad():
        draws = module.reconstruct(z, "sample", torch.Generator().manual_seed(0)).numpy()
        mean, median = (module.reconstruct(z[:1], kind)[0].numpy() for kind in ("mean", "median"))
        again = module.reconstruct(z, "sample", torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_array_equal(draws, again)
    positive = draws > 0
    np.testing.assert_allclose(positive.mean(0), [0.3, 0.8], atol=0.006)
    assert (np.abs(draws.mean(0) - mean) < 5 * draws.std(0) / np.sqrt(n)).all()
    np.testing.assert_allclose(np.median(draws, axis=0), median, atol=0.03)
    assert median[0] == 0
    inner = levels[1:-1]  # the outermost quantiles are atoms: tails are flat
    for gene in range(2):
        below = [(draws[positive[:, gene], gene] <= q * (1 + 1e-9)).mean() for q in quantiles[gene, 1:-1]]
        np.testing.assert_allclose(below, inner, atol=0.012)


def test_mse_has_a_mean_only():
    module = build(reconstruction="mse", magnitude_transform="log1p")
    probability, quantiles = torch.full((N_GENES,), 0.5), torch.ones(N_GENES, 4)
    module.initialize_output(probability.double(), quantiles.double())
    module.decoder[1].weight.data.zero_()
    value = module.reconstruct(torch.zeros(2, 3, dtype=torch.float64), "mean")
    np.testing.assert_allclose(value.detach().numpy(), np.expm1(0.5 * np.log(2)), rtol=1e-9)
    with pytest.raises(ValueError, match="`kind` must be 'mean'.*received 'sample'"):
        module.reconstruct(torch.zeros(2, 3, dtype=torch.float64), "sample")


# ---- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("monotone", ["cumsum", "sort", "penalty"])
def test_conditional_quantiles_are_learnt(monotone):
    """Given a state s, ``x = exp(s) Exp(1)`` with probability ``sigmoid(2 s)`` (first gene) or ``sigmoid(-2 s)``."""
    levels = np.linspace(0.05, 0.95, 10)
    sign, rng = np.array([1.0, -1.0]), np.random.default_rng(0)
    s = rng.uniform(-1, 1, (2000, 1))
    x = np.exp(sign * s) * rng.exponential(size=(2000, 2)) * (rng.random((2000, 2)) < expit(2 * sign * s))
    module = build(2, tuple(levels), n_latent=1, n_hidden=32, latent_l2=0.0, monotone=monotone).float()
    start = [np.quantile(x[x[:, j] > 0, j], levels) for j in range(2)]
    module.initialize_output(torch.as_tensor((x > 0).mean(0)).float(), torch.as_tensor(np.stack(start)).float())
    grid = torch.linspace(-0.9, 0.9, 19)[:, None]
    true = np.exp(sign * grid.numpy())[..., None] * -np.log(1 - levels)
    share = expit(2 * sign * grid.numpy())

    @torch.no_grad()
    def errors():
        logits, quantiles = module.decode(grid)
        assert (quantiles.diff(dim=-1) >= 0).all()
        return np.abs(quantiles.numpy() - true).mean(), np.abs(logits.sigmoid().numpy() - share).mean()

    first = errors()
    optimizer, generator = torch.optim.Adam(module.parameters(), 5e-3), torch.Generator().manual_seed(0)
    x, s = torch.as_tensor(x).float(), torch.as_tensor(s).float()
    for _ in range(300):
        cells = torch.randint(2000, (256,), generator=generator)
        optimizer.zero_grad()
        loss_of(module, x[cells], latent=s[cells]).loss.backward()
        optimizer.step()
    last = errors()
    assert last[0] < first[0] / 3
    assert last[1] < first[1] / 3
