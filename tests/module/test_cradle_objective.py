"""The objective of CRADLE-VAE against a numpy computation, cell by cell, written from its equations.

Noise is recorded where torch draws it (fixture ``tape``: m, e, u and z_b, and again m, e, u if redrawn) and given to the
numpy side; everything is in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from scvi_cradle.module import CradleVAEModule
from scvi_cradle.module._counterfactual import counterfactual_kl
from scvi_cradle.presets import RECOMMENDED

N_GENES, N_LATENT, N_HIDDEN, N_PARTICLES = 9, 3, 5, 2
MEMBERS = np.array([[-1, -1], [0, -1], [1, -1], [0, 1], [1, 2], [2, -1]])  # control, A, B, A+B, B+C, C
LABEL = np.array([0, 1, 1, 2, 3, 0, 4])
FAILED = np.array([0, 1, 0, 0, 0, 1, 0])
BATCH = np.array([0, 1, 2, 0, 1, 2, 2])
COUNTS_OF = np.array([7.0, 11.0, 4.0])  # training cells of each treatment
N_FAILED, N_TRAIN, PRIOR_LOGIT, PRIOR_SCALE = 6.0, 40.0, -3.0, 1.3
REFERENCE_LABELS = np.array([0, 1, 3, 5])
SETTINGS = {k: v for k, v in RECOMMENDED.items() if k not in ("mask_prior_prob", "mask_init_logits", "output_bias")}
SETTINGS |= {
    "n_latent": N_LATENT,
    "n_hidden": N_HIDDEN,
    "n_layers_encoder": 2,
    "n_layers_decoder": 2,
    "embedding_n_layers": 3,
    "embedding_n_hidden": 4,
    "mask_prior_logit": PRIOR_LOGIT,
    "mask_init_logit": 0.0,
    "embedding_prior_scale": PRIOR_SCALE,
    "n_particles": N_PARTICLES,
    "cf_weight": 0.7,
}


def make_module(**settings):
    torch.manual_seed(3)
    module = CradleVAEModule(N_GENES, 3, n_levels=(3, 1), n_continuous=1, **(SETTINGS | settings)).double()
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.as_tensor(rng.normal(0, 0.5, parameter.shape)))
        module.input_mean.copy_(torch.as_tensor(rng.uniform(0.2, 1, N_GENES)))
        module.input_std.copy_(torch.as_tensor(rng.uniform(0.5, 2, N_GENES)))
        module.n_obs_per_treatment.copy_(torch.as_tensor(COUNTS_OF))
        module.n_failed.fill_(N_FAILED)
        module.n_train.fill_(N_TRAIN)
    module.set_labels(MEMBERS)
    module.references.set(REFERENCE_LABELS, rng.poisson(2.0, (4, N_GENES)), ())
    module.references.double()
    covariates = module.covariates
    module.effect_path_of_test = (SETTINGS | settings)["effect_path"]
    module.covariates = lambda tensors: covariates(tensors).double()
    return module


def make_tensors():
    rng = np.random.default_rng(8)
    x = rng.poisson(rng.gamma(0.5, 6.0, (len(LABEL), N_GENES))).astype(float)
    return {
        "X": torch.as_tensor(x),
        "perturbation": torch.as_tensor(LABEL)[:, None],
        "artifact": torch.as_tensor(FAILED, dtype=torch.float64)[:, None],
        "batch": torch.as_tensor(BATCH)[:, None],
        "extra_categorical_covs": torch.zeros(len(LABEL), 1),
        "extra_continuous_covs": torch.as_tensor(rng.normal(size=(len(LABEL), 1))),
    }


# ---- the equations in numpy -------------------------------------------------------------------------------------------


def leaky(v):
    return np.where(v > 0, v, 0.01 * v)


def perceptron(hidden, w, name):
    hidden = leaky(hidden)
    i = 0
    while f"{name}.hidden.layers.{i}.weight" in w:
        hidden = hidden + leaky(w[f"{name}.hidden.layers.{i}.weight"] @ hidden + w[f"{name}.hidden.layers.{i}.bias"])
        i += 1
    return hidden


def gaussian_head(hidden, w, name):
    out = w[f"{name}.head.linear.weight"] @ hidden + w[f"{name}.head.linear.bias"]
    return out[:N_LATENT], np.sqrt(np.exp(out[N_LATENT:]) + 1e-4)


def kl_normal(m1, s1, m2, s2):
    return np.sum(np.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5)


class Equations:
    """Loss of one batch from weights ``w`` (arrays by name), noise and data; loops over particles and cells."""

    def __init__(self, module, noise, tensors, dosage=None):
        self.w = {k: v.detach().numpy().copy() for k, v in module.state_dict().items()}
        self.references = module.references.profiles.numpy()
        self.m, self.effect_path = module, module.effect_path_of_test
        self.data = {k: v.numpy() for k, v in tensors.items()}
        if dosage is None:
            dosage = np.zeros((len(LABEL), 3))
            for i, label in enumerate(LABEL):
                dosage[i, MEMBERS[label][MEMBERS[label] >= 0]] = 1
        self.dosage = dosage
        self.noise = [v.numpy() for v in noise]

    def row(self, i, t):
        """Row of the noise that treatment ``t`` of cell ``i`` reads."""
        if self.m.per_cell:
            return int((self.dosage[:i] != 0).sum() + (self.dosage[i, :t] != 0).sum())
        return int((self.dosage != 0).any(0)[:t].sum())

    def effect(self, p, i, t, start):
        """Sample ``e_t * m_t`` and the divergence of ``q(m_t, e_t)``."""
        uniform, normal = self.noise[start][p, self.row(i, t)], self.noise[start + 1][p, self.row(i, t)]
        logit = self.w["effects.mask.logits"][t]
        mask = (logit + np.log(uniform / (1 - uniform)) > 0).astype(float)
        if "effects.embedding.loc" not in self.w:
            name = "effects.embedding"
            hidden = self.w[f"{name}.mask_layer.weight"] @ mask + self.w[f"{name}.mask_layer.bias"]
            mean, std = gaussian_head(perceptron(hidden + self.w[f"{name}.treatment"][t], self.w, name), self.w, name)
        else:
            mean = self.w["effects.embedding.loc"][t]
            std = np.exp(self.w["effects.embedding.log_scale"][t]) + 1e-4
        embedding = mean + std * normal
        q, alpha = 1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(-PRIOR_LOGIT))
        if self.m.sampled_kl:
            kl = np.sum(stats.bernoulli.logpmf(mask, q) - stats.bernoulli.logpmf(mask, alpha))
            kl += np.sum(stats.norm.logpdf(embedding, mean, std) - stats.norm.logpdf(embedding, 0, PRIOR_SCALE))
        else:
            kl = np.sum(q * np.log(q / alpha) + (1 - q) * np.log((1 - q) / (1 - alpha)))
            kl += kl_normal(mean, std, 0, PRIOR_SCALE)
        return mask * embedding, kl

    def artifact_vector(self, noise, p, i):
        """Draw ``u`` for a cell."""
        if "artifact.vector" in self.w:
            return self.w["artifact.vector"]
        std = np.exp(self.w["artifact.posterior.log_scale"]) + 1e-4
        return self.w["artifact.posterior.loc"] + std * noise[p, i if self.m.per_cell else 0]

    def kl_u(self):
        """Divergence of ``q(u)``; at the draws: their mean."""
        if "artifact.vector" in self.w:
            return 0.0
        mean, std = self.w["artifact.posterior.loc"], np.exp(self.w["artifact.posterior.log_scale"]) + 1e-4
        if not self.m.sampled_kl:
            return kl_normal(mean, std, 0, PRIOR_SCALE)
        u = mean + std * self.noise[2]
        return (stats.norm.logpdf(u, mean, std) - stats.norm.logpdf(u, 0, PRIOR_SCALE)).sum(-1).mean()

    def encode(self, x, z_p, z_a):
        """``q(z_b | x, z_p, z_a)``."""
        w, parts = self.w, ["x", "perturbation", "artifact"] if self.m.sees_effects else ["x"]
        weight = np.concatenate([w[f"encoder.first.weights.{k}"] for k in parts], axis=1)
        standardized = (np.log(1 + x) - w["input_mean"]) / w["input_std"]
        inputs = np.concatenate([standardized, z_p, z_a]) if self.m.sees_effects else standardized
        return gaussian_head(perceptron(weight @ inputs + w["encoder.first.bias"], w, "encoder"), w, "encoder")

    def log_likelihood(self, i, z_b, z_p, z_a):
        w, x = self.w, self.data["X"][i]
        covariates = np.concatenate([np.eye(3)[BATCH[i]], self.data["extra_continuous_covs"][i]])
        parts = {"basal": z_b, "perturbation": z_p, "artifact": z_a}
        if self.effect_path == "linear":
            del parts["perturbation"]
        names, latent = ["latent"], sum(parts.values())
        if self.m.decoder.combine == "concat":
            names, latent = list(parts), np.concatenate(list(parts.values()))
        weight = np.concatenate([w[f"decoder.first.weights.{k}"] for k in [*names, "covariates"]], axis=1)
        hidden = weight @ np.concatenate([latent, covariates]) + w["decoder.first.bias"]
        hidden = perceptron(hidden, w, "decoder")
        if self.effect_path != "decoder":
            hidden = np.concatenate([hidden, z_p])
        logits = w["decoder.output.weight"] @ hidden + w["decoder.output.bias"]
        share = np.exp(logits) / np.exp(logits).sum()
        mu, theta = x.sum() * (share + 1e-8), np.exp(w["decoder.likelihood.log_theta"])
        return stats.nbinom.logpmf(x, theta, theta / (theta + mu)).sum()

    def reconstruction_weight(self, i):
        failed = FAILED.mean()
        if self.m.reconstruction_balance == "batch":
            return 1 - failed if FAILED[i] else failed
        if self.m.reconstruction_balance == "dataset":
            return 0.5 / (N_FAILED / N_TRAIN) if FAILED[i] else 0.5 / (1 - N_FAILED / N_TRAIN)
        return 1.0

    def counterfactual(self, p, i, z_p, u):
        """``KL(q(z_b | reference, z_p, u) || q(z_b | x, z_p, u))`` of a passed cell, or the other way round."""
        if FAILED[i] or LABEL[i] not in REFERENCE_LABELS or not self.m.sees_effects:
            return 0.0
        factual = self.encode(self.data["X"][i], z_p, u)
        if not self.m.share_global_samples:
            z_p = self.effects_of(p, i, start=4)[0]
            u = self.artifact_vector(self.noise[-1], p, i)
        reference = self.encode(self.references[list(REFERENCE_LABELS).index(LABEL[i])], z_p, u)
        if self.m.cf_direction == "counterfactual_first":
            return kl_normal(*factual, *reference)
        return kl_normal(*reference, *factual)

    def effects_of(self, p, i, start=0):
        """``z_p`` of a cell, and its share of the divergences of its treatments."""
        z_p, kl = np.zeros(N_LATENT), 0.0
        for t in np.flatnonzero(self.dosage[i]):
            effect, divergence = self.effect(p, i, t, start)
            z_p += self.dosage[i, t] * effect
            kl += divergence / COUNTS_OF[t]
        return z_p, kl

    def terms(self):
        total = dict.fromkeys(("reconstruction", "weighted", "basal", "treatment", "cf"), 0.0)
        for p in range(N_PARTICLES):
            for i in range(len(LABEL)):
                z_p, kl_treatment = self.effects_of(p, i)
                u = self.artifact_vector(self.noise[2], p, i)
                mean, std = self.encode(self.data["X"][i], z_p, FAILED[i] * u)
                z_b = mean + std * self.noise[2 if "artifact.vector" in self.w else 3][p, i]
                log_prob = self.log_likelihood(i, z_b, z_p, FAILED[i] * u)
                if self.m.sampled_kl:
                    kl_basal = np.sum(stats.norm.logpdf(z_b, mean, std) - stats.norm.logpdf(z_b))
                else:
                    kl_basal = kl_normal(mean, std, 0, 1)
                total["reconstruction"] -= log_prob / N_PARTICLES
                total["weighted"] -= self.reconstruction_weight(i) * log_prob / N_PARTICLES
                total["basal"] += kl_basal / N_PARTICLES
                total["treatment"] += kl_treatment / N_PARTICLES
                total["cf"] += self.counterfactual(p, i, z_p, u) / N_PARTICLES
        total["artifact"] = self.kl_u() * FAILED.sum() / N_FAILED
        return total

    def loss(self, kl_weight=1.0):
        total, n = self.terms(), len(LABEL)
        kl = total["basal"] + total["treatment"] + total["artifact"]
        cf = total["cf"] if self.m.cf_reduction == "sum" else total["cf"] / n
        return total["weighted"] / n + kl_weight * kl / n + self.m.cf_weight * cf


def run(module, tensors, **kwargs):
    outputs = module.inference(**module._get_inference_input(tensors))
    decoded = module.generative(**module._get_generative_input(tensors, outputs))
    return module.loss(tensors, outputs, decoded, **kwargs)


def check(module, tape, tensors, dosage=None):
    """Compare every term and the loss."""
    output = run(module, tensors, kl_weight=0.6, n_obs=100)
    equations = Equations(module, tape, tensors, dosage)
    expected, n = equations.terms(), len(LABEL)
    n_eligible = sum(not f and label in REFERENCE_LABELS for f, label in zip(FAILED, LABEL, strict=True))
    close = {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(float(output.reconstruction_loss_sum), expected["reconstruction"], **close)
    np.testing.assert_allclose(float(output.kl_local_sum), expected["basal"], **close)
    np.testing.assert_allclose(float(output.extra_metrics["kl_treatment"]), expected["treatment"] / n, **close)
    np.testing.assert_allclose(float(output.extra_metrics["kl_artifact"]), expected["artifact"] / n, **close)
    np.testing.assert_allclose(float(output.extra_metrics["cf_kl"]), expected["cf"] / n_eligible, **close)
    global_ = (expected["treatment"] + expected["artifact"]) * 100 / n
    np.testing.assert_allclose(float(output.kl_global_sum), global_, **close)
    np.testing.assert_allclose(float(output.loss.detach()), equations.loss(kl_weight=0.6), **close)
    return output, expected


VARIANTS = [
    {"combine": "sum", "effect_path": "decoder"},
    {"combine": "concat", "effect_path": "both", "reconstruction_balance": "batch"},
    {"combine": "sum", "effect_path": "linear", "cf_direction": "counterfactual_first"},
    {"combine": "concat", "effect_path": "decoder", "reconstruction_balance": "dataset", "cf_reduction": "sum"},
]
CASES = [
    {"posterior": posterior, "draws": draws, "kl": kl} | VARIANTS[(i + j + 2 * k) % 4]
    for i, posterior in enumerate(("correlated", "correlated_basal", "correlated_embedding", "mean_field"))
    for j, draws in enumerate(("cell", "batch"))
    for k, kl in enumerate(("analytic", "sampled"))
]
CASES += [{"posterior": "correlated", "draws": draws} | v for v in VARIANTS for draws in ("cell", "batch")]
REDRAWN = {"posterior": "correlated", "share_global_samples": False}
CASES += [REDRAWN | {"draws": draws, "kl": kl} for draws in ("cell", "batch") for kl in ("analytic", "sampled")]
CASES += [
    {"combine": combine, "effect_path": path} for combine in ("concat", "sum") for path in ("linear", "decoder", "both")
]
CASES += [{"artifact_latent": "embedding", "draws": draws, "kl": "sampled"} for draws in ("cell", "batch")]


@pytest.mark.parametrize("settings", CASES, ids=lambda s: "-".join(map(str, s.values())))
def test_every_term_equals_the_equations(settings, tape):
    _, expected = check(make_module(**settings), tape, make_tensors())
    sees_effects = settings.get("posterior", "correlated_basal") in ("correlated", "correlated_basal")
    assert (expected["cf"] > 0.01) == sees_effects
    assert min(abs(expected[k]) for k in ("reconstruction", "basal", "treatment")) > 0.01


@pytest.mark.parametrize("draws", ["cell", "batch"])
def test_doses_scale_effects_and_count_once(draws, tape):
    module, tensors = make_module(draws=draws, posterior="correlated"), make_tensors()
    dosage = np.zeros((len(LABEL), 3))
    dosage[1, 0], dosage[2, 0], dosage[3, 1], dosage[4, :2], dosage[6, 1:] = 0.5, 2.0, 1.0, (0.3, 0.7), (1.0, 3.0)
    tensors["dosage"] = torch.as_tensor(dosage)
    check(module, tape, tensors, dosage)


@pytest.mark.parametrize("direction", ["reference_first", "counterfactual_first"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("draws", ["cell", "batch"])
def test_directions_and_reductions_of_the_counterfactual_term(direction, reduction, draws, tape):
    check(make_module(draws=draws, cf_direction=direction, cf_reduction=reduction), tape, make_tensors())


@pytest.mark.parametrize("settings", CASES, ids=lambda s: "-".join(map(str, s.values())))
def test_gradient_equals_finite_differences_of_the_equations(settings, tape):
    # masks are steps of their logits: their gradient is tested with the straight-through estimator
    module, tensors = make_module(**settings), make_tensors()
    run(module, tensors, kl_weight=0.6).loss.backward()
    equations, rng, step = Equations(module, tape, tensors), np.random.default_rng(1), 1e-5
    for group in ("encoder", "decoder", "effects.embedding", "artifact"):
        parameters = {k: p for k, p in module.named_parameters() if k.startswith(group) and p.grad is not None}
        direction = {k: rng.normal(size=p.shape) for k, p in parameters.items()}
        slope = sum(float((p.grad.numpy() * direction[k]).sum()) for k, p in parameters.items())
        losses = []
        for sign in (1, -1):
            for k, v in direction.items():
                equations.w[k] = parameters[k].detach().numpy() + sign * step * v
            losses.append(equations.loss(kl_weight=0.6))
        for k in direction:
            equations.w[k] = parameters[k].detach().numpy()
        assert abs(slope) > 1e-6
        np.testing.assert_allclose(slope, (losses[0] - losses[1]) / (2 * step), rtol=2e-5, atol=1e-6, err_msg=group)


def test_detaching_the_reference_changes_the_gradient_but_not_the_value(tape):
    module, tensors = make_module(), make_tensors()
    outputs = module.inference(**module._get_inference_input(tensors))
    arguments = (outputs["latent"], outputs["pairs"], module._get_inference_input(tensors))
    for module.cf_direction in ("reference_first", "counterfactual_first"):
        values, slopes = [], []
        for module.cf_detach_reference in (False, True):
            kl, eligible = counterfactual_kl(module, *arguments)
            values.append(kl.sum().item())
            slopes.append(torch.autograd.grad(kl.sum(), module.encoder.head.linear.bias, retain_graph=True)[0])
        assert eligible.tolist() == [True, False, True, False, True, False, False]
        assert values[0] == values[1]
        both, one = slopes[0][:N_LATENT], slopes[1][:N_LATENT]  # of the bias of the means, which shifts both sides
        torch.testing.assert_close(both, torch.zeros(N_LATENT), atol=1e-12, rtol=0)
        assert one.abs().min() > 1e-3
