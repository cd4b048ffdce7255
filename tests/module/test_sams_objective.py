"""The objectives of SAMS-VAE and CPA-VAE against a numpy computation, cell by cell, written from their equations.

Noise is recorded where torch draws it (fixture ``tape``) and given to the numpy side; everything is in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats

from scvi_cradle.module import SAMSVAEModule

N_GENES, N_LATENT, N_PARTICLES = 7, 3, 2
MEMBERS = np.array([[-1, -1], [0, -1], [1, -1], [0, 1], [1, 2], [2, -1]])  # control, A, B, A+B, B+C, C
LABEL = np.array([0, 1, 1, 2, 3, 0, 4])
BATCH = np.array([0, 1, 2, 0, 1, 2, 2])
COUNTS_OF = np.array([7.0, 11.0, 4.0])  # training cells of each treatment
PRIOR_LOGIT, PRIOR_SCALE, BETA, EXTRA = -3.0, 1.3, (1.5, 4.0), 0.02
SETTINGS = {
    "n_latent": N_LATENT,
    "n_hidden": 5,
    "n_layers_encoder": 2,
    "n_layers_decoder": 2,
    "mask_prior": "bernoulli",
    "mask_prior_logit": PRIOR_LOGIT,
    "mask_beta": BETA,
    "mask_prob_posterior": "point",
    "prior_weight_per_cell": 0.0,
    "embedding_prior_scale": PRIOR_SCALE,
    "posterior": "correlated",
    "embedding_n_layers": 3,
    "embedding_n_hidden": 4,
    "embedding_init_scale": 0.3,
    "likelihood": "nb",
    "combine": "concat",
    "effect_path": "decoder",
    "draws": "cell",
    "n_particles": N_PARTICLES,
    "kl": "analytic",
}


def make_module(**settings):
    torch.manual_seed(3)
    module = SAMSVAEModule(N_GENES, 3, n_levels=(3, 1), n_continuous=1, **(SETTINGS | settings)).double()
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.as_tensor(rng.normal(0, 0.4, parameter.shape)))
        module.input_mean.copy_(torch.as_tensor(rng.uniform(0.2, 1, N_GENES)))
        module.input_std.copy_(torch.as_tensor(rng.uniform(0.5, 2, N_GENES)))
        module.n_obs_per_treatment.copy_(torch.as_tensor(COUNTS_OF))
    module.set_labels(MEMBERS)
    covariates = module.covariates
    module.covariates = lambda tensors: covariates(tensors).double()
    return module


def make_tensors(likelihood="nb"):
    rng = np.random.default_rng(8)
    x = rng.poisson(rng.gamma(0.5, 6.0, (len(LABEL), N_GENES))).astype(float)
    return {
        "X": torch.as_tensor(x if likelihood != "gaussian" else rng.normal(size=x.shape)),
        "perturbation": torch.as_tensor(LABEL)[:, None],
        "batch": torch.as_tensor(BATCH)[:, None],
        "extra_categorical_covs": torch.zeros(len(LABEL), 1),
        "extra_continuous_covs": torch.as_tensor(rng.normal(size=(len(LABEL), 1))),
    }


def run(module, tensors, **kwargs):
    outputs = module.inference(**module._get_inference_input(tensors))
    decoded = module.generative(**module._get_generative_input(tensors, outputs))
    return module.loss(tensors, outputs, decoded, **kwargs)


# ---- the equations in numpy -------------------------------------------------------------------------------------------


class Equations:
    """Terms of every cell and particle from weights, noise and data."""

    def __init__(self, nets, settings, noise, tensors, dosage, *, at_draws):
        self.nets, self.w, self.s, self.noise = nets, nets.w, SETTINGS | settings, [v.detach().numpy() for v in noise]
        self.x = tensors["X"].numpy()
        self.covariates = np.column_stack([np.eye(3)[BATCH], tensors["extra_continuous_covs"].numpy()])
        self.dosage, self.at_draws = dosage, at_draws
        self.mask_noise = None if self.s["mask_prior"] == "none" else self.noise.pop(0)
        self.embedding_noise, self.basal_noise = self.noise.pop(0), self.noise.pop()

    def row(self, i, t):
        """Row of the noise that treatment ``t`` of cell ``i`` reads."""
        if self.s["draws"] == "cell":
            return int((self.dosage[:i] != 0).sum() + (self.dosage[i, :t] != 0).sum())
        return int((self.dosage != 0).any(0)[:t].sum())

    def mask(self, p, i, t):
        """Draw of ``m_t``, ``log q - log p`` of the mask with all it brings along, and ``log p(m_t)``."""
        if self.mask_noise is None:
            return np.ones(N_LATENT), 0.0, 0.0
        uniform, logit = self.mask_noise[p, self.row(i, t)], self.w["effects.mask.logits"][t]
        mask, q = (logit + special.logit(uniform) > 0).astype(float), special.expit(logit)
        m = mask if self.at_draws else q  # both terms are linear in the mask
        log_q = m * np.log(q) + (1 - m) * np.log(1 - q)
        if self.s["mask_prior"] == "bernoulli":
            log_p, log_not, extra = np.log(special.expit(PRIOR_LOGIT)), np.log(special.expit(-PRIOR_LOGIT)), 0.0
        elif self.s["mask_prob_posterior"] == "point":
            log_p, log_not, extra = np.log(q), np.log(1 - q), -stats.beta.logpdf(q, *BETA)
        else:
            log_p, log_not, extra = self.beta(p, i, t)
        log_prior = m * log_p + (1 - m) * log_not
        return mask, np.sum(log_q - log_prior + extra), np.sum(log_prior)

    def beta(self, p, i, t):
        """``log p``, ``log(1 - p)`` and ``log q(p) - log p(p)`` at the draw, or their expectations by quadrature."""
        a, b = np.log1p(np.exp(self.w["effects.mask.raw_concentration"][:, t])) + 1e-4
        if self.at_draws:
            one, two = (gamma[p, self.row(i, t)] for gamma in self.noise)
            prob = one / (one + two)
            ratio = stats.beta.logpdf(prob, a, b) - stats.beta.logpdf(prob, *BETA)
            return np.log(prob), np.log(1 - prob), ratio
        s = np.arange(-250, 250, 0.1)[:, None]  # p = expit(s), by the trapezoid rule
        log_p, log_not = special.log_expit(s), special.log_expit(-s)
        density = 0.1 * np.exp(a * log_p + b * log_not - special.betaln(a, b))
        a0, b0 = BETA
        ratio = (a - a0) * log_p + (b - b0) * log_not - special.betaln(a, b) + special.betaln(a0, b0)
        return tuple((density * v).sum(0) for v in (log_p, log_not, ratio))

    def effect(self, p, i, t):
        """Sample ``e_t * m_t``, its divergence and ``log p(m_t)``."""
        mask, kl, log_prior = self.mask(p, i, t)
        if "effects.embedding.loc" in self.w:
            mean = self.w["effects.embedding.loc"][t]
            std = np.exp(self.w["effects.embedding.log_scale"][t]) + 1e-4
        else:
            name = "effects.embedding"
            hidden = self.nets.linear(f"{name}.mask_layer", mask) + self.w[f"{name}.treatment"][t]
            mean, std = self.nets.head(self.nets.perceptron(hidden, name), name)
        embedding = mean + std * self.embedding_noise[p, self.row(i, t)]
        if self.at_draws:
            kl += np.sum(stats.norm.logpdf(embedding, mean, std) - stats.norm.logpdf(embedding, 0, PRIOR_SCALE))
        else:
            kl += self.nets.kl_normal(mean, std, 0, PRIOR_SCALE)
        return mask * embedding, kl, log_prior

    def cell(self, p, i):
        """``log p(x)``, divergence of ``z_b``, its value at the draw, share of the global terms, extra weight of priors."""
        z_p, share, extra = np.zeros(N_LATENT), 0.0, 0.0
        for t in np.flatnonzero(self.dosage[i]):
            effect, kl, log_prior = self.effect(p, i, t)
            z_p = z_p + self.dosage[i, t] * effect
            share += kl / COUNTS_OF[t]
            extra -= self.s["prior_weight_per_cell"] * log_prior
        sees = self.s["posterior"] in ("correlated", "correlated_basal")
        log = self.s["likelihood"] != "gaussian"
        mean, std = self.nets.encode(self.x[i], {"perturbation": z_p} if sees else {}, log=log)
        z_b = mean + std * self.basal_noise[p, i]
        paths = {k: self.s[k] for k in ("combine", "effect_path")}
        output = self.nets.decode({"basal": z_b, "perturbation": z_p}, self.covariates[i], **paths)
        log_prob = self.nets.log_likelihood(self.x[i], output, self.s["likelihood"])
        at_draw = np.sum(stats.norm.logpdf(z_b, mean, std) - stats.norm.logpdf(z_b))
        kl_basal = at_draw if self.s["kl"] == "sampled" else self.nets.kl_normal(mean, std, 0, 1)
        return log_prob, kl_basal, at_draw, share, extra

    def terms(self):
        """Terms of all particles and cells, each of shape ``(n_particles, n_cells)``."""
        n_particles = self.basal_noise.shape[0]
        table = [[self.cell(p, i) for i in range(len(LABEL))] for p in range(n_particles)]
        return np.moveaxis(np.array(table), -1, 0)


def dosage_of(labels):
    dosage = np.zeros((len(labels), 3))
    for i, label in enumerate(labels):
        dosage[i, MEMBERS[label][MEMBERS[label] >= 0]] = 1
    return dosage


def check(settings, networks, tape, *, objective="elbo", dosage=None):
    """Compare every term and the loss."""
    module, tensors = make_module(**settings), make_tensors(settings.get("likelihood", "nb"))
    module.objective = objective
    if dosage is not None:
        tensors["dosage"] = torch.as_tensor(dosage)
    output = run(module, tensors, kl_weight=0.6, n_obs=100)
    at_draws = objective == "iwelbo" or settings.get("kl") == "sampled"
    dosage = dosage_of(LABEL) if dosage is None else dosage
    equations = Equations(networks(module), settings, tape, tensors, dosage, at_draws=at_draws)
    log_prob, kl_basal, at_draw, share, extra = equations.terms()
    loss = np.mean(-log_prob + 0.6 * (kl_basal + share + extra))
    if objective == "iwelbo":  # the global terms of a cell are part of its weight
        bound = special.logsumexp(log_prob - at_draw - share, axis=0) - np.log(len(log_prob))
        loss = np.mean(extra) - np.mean(bound)
    close = {"rtol": 1e-9, "atol": 1e-11}
    (error,) = output.reconstruction_loss.values()
    np.testing.assert_allclose(error.detach(), -log_prob.mean(0), **close)
    np.testing.assert_allclose(output.kl_local["kl_basal"], kl_basal.mean(0), **close)
    np.testing.assert_allclose(float(output.extra_metrics["kl_treatment"]), share.mean(), **close)
    np.testing.assert_allclose(float(output.kl_global_sum), 100 * share.mean(), **close)
    np.testing.assert_allclose(float(output.loss.detach()), loss, **close)
    return log_prob, kl_basal, share


MASKS = [
    {"mask_prior": "bernoulli"},
    {"mask_prior": "beta_bernoulli", "mask_prob_posterior": "point"},
    {"mask_prior": "beta_bernoulli", "mask_prob_posterior": "beta"},
    {"mask_prior": "bernoulli", "prior_weight_per_cell": EXTRA},
]
PATHS = [{"combine": c, "effect_path": p} for c in ("concat", "sum") for p in ("decoder", "linear", "both")]
CASES = [
    {"posterior": posterior, "draws": draws, "kl": kl, "likelihood": likelihood}
    | MASKS[(h + i + 2 * j + k) % 4]
    | PATHS[(2 * h + i + 3 * j + k) % 6]
    for h, posterior in enumerate(("correlated", "correlated_basal", "correlated_embedding", "mean_field"))
    for i, draws in enumerate(("cell", "batch"))
    for j, kl in enumerate(("analytic", "sampled"))
    for k, likelihood in enumerate(("nb", "poisson", "gaussian"))
]
CASES += [
    mask | {"draws": draws, "kl": kl} for mask in MASKS for draws in ("cell", "batch") for kl in ("analytic", "sampled")
]
CPA = [
    {"mask_prior": "none", "posterior": posterior, "draws": draws, "kl": kl} | PATHS[(2 * i + j + 3 * k) % 6]
    for i, posterior in enumerate(("correlated_basal", "mean_field"))
    for j, draws in enumerate(("cell", "batch"))
    for k, kl in enumerate(("analytic", "sampled"))
]


def name(settings):
    return "-".join(map(str, settings.values()))


@pytest.mark.parametrize("settings", CASES + CPA, ids=name)
def test_every_term_equals_the_equations(settings, networks, tape):
    terms = check(settings, networks, tape)
    assert min(np.abs(v).mean() for v in terms) > 0.01


@pytest.mark.parametrize("n_particles", [1, 3])
@pytest.mark.parametrize("settings", CASES[::5] + CPA[::3], ids=name)
def test_the_importance_weighted_objective_equals_the_equations(settings, n_particles, networks, tape):
    check(settings | {"n_particles": n_particles}, networks, tape, objective="iwelbo")


@pytest.mark.parametrize("mask", [*MASKS, {"mask_prior": "none", "posterior": "mean_field"}], ids=name)
@pytest.mark.parametrize("draws", ["cell", "batch"])
def test_doses_scale_effects_and_count_once(draws, mask, networks, tape):
    dosage = np.zeros((len(LABEL), 3))
    dosage[1, 0], dosage[2, 0], dosage[3, 1], dosage[4, :2], dosage[6, 1:] = 0.5, 2.0, 1.0, (0.3, 0.7), (1.0, 3.0)
    check(mask | {"draws": draws}, networks, tape, dosage=dosage)
