"""The objectives of the conditional VAE and of sVAE+ against a numpy computation, cell by cell, from their equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats

from scvi_cradle.module import ConditionalVAEModule, SVAEPlusModule

N_GENES, N_LATENT, N_PARTICLES, N_TRAIN = 7, 3, 2, 40.0
MEMBERS = np.array([[-1, -1], [0, -1], [1, -1], [2, -1], [0, 2]])  # control, three interventions and a pair of them
TREATMENTS = [[t for t in row if t >= 0] for row in MEMBERS]
LABEL = np.array([0, 1, 4, 1, 2, 3, 0, 4, 3])
BATCH = np.array([0, 1, 1, 2, 0, 1, 2, 0, 2])
COUNTS_OF = np.array([7.0, 11.0, 4.0])  # training cells of each intervention
BETA = (1.0, 5.0)
SIZES = {"n_latent": N_LATENT, "n_hidden": 5, "n_layers_encoder": 2, "n_layers_decoder": 2, "n_particles": N_PARTICLES}
SVAE = {"mask_beta": BETA, "mask_init_logit": 0.0, "embedding_init_scale": 0.1, "gs_temperature": 1.0}


def make_module(kind, settings):
    torch.manual_seed(3)
    module = kind(N_GENES, 3, n_levels=(3, 1), n_continuous=1, **SIZES, **settings).double()
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.as_tensor(rng.normal(0, 0.4, parameter.shape)))
        for name, buffer in module.named_buffers():
            if name.endswith(("_mean", "_std", "_var")):
                buffer.copy_(torch.as_tensor(rng.uniform(0.5, 1.5, buffer.shape)))
        module.n_obs_per_treatment.copy_(torch.as_tensor(COUNTS_OF))
        module.n_train.fill_(N_TRAIN)
    module.set_labels(MEMBERS)
    covariates = module.covariates
    module.covariates = lambda tensors: covariates(tensors).double()
    return module.eval()  # batch normalisation by running moments, no dropout


def make_tensors():
    rng = np.random.default_rng(8)
    return {
        "X": torch.as_tensor(rng.poisson(rng.gamma(0.5, 6.0, (len(LABEL), N_GENES))).astype(float)),
        "perturbation": torch.as_tensor(LABEL)[:, None],
        "batch": torch.as_tensor(BATCH)[:, None],
        "extra_categorical_covs": torch.zeros(len(LABEL), 1),
        "extra_continuous_covs": torch.as_tensor(rng.normal(size=(len(LABEL), 1))),
    }


def run(module, tensors, **kwargs):
    outputs = module.inference(**module._get_inference_input(tensors))
    decoded = module.generative(**module._get_generative_input(tensors, outputs))
    return module.loss(tensors, outputs, decoded, **kwargs)


class Equations:
    """Terms of every cell and particle from weights, noise and data."""

    def __init__(self, nets, settings, noise, tensors):
        self.nets, self.s = nets, settings
        self.noise = [v.numpy() for v in noise]
        self.x = tensors["X"].numpy()
        self.covariates = np.column_stack([np.eye(3)[BATCH], tensors["extra_continuous_covs"].numpy()])

    def prior_mean(self, p, i):
        """``m * mu``, summed over the cell's interventions; the conditional VAE has none, controls have zero."""
        mean = np.zeros(N_LATENT)
        if "draws" not in self.s:
            return mean
        before = sum(len(TREATMENTS[label]) for label in LABEL[:i])
        for slot, treatment in enumerate(TREATMENTS[LABEL[i]]):
            row = before + slot if self.s["draws"] == "cell" else treatment
            logit, uniform = self.nets.w["effects.mask.logits"][treatment], self.noise[0][p, row]
            mean = mean + (logit + special.logit(uniform) > 0) * self.nets.w["effects.embedding.loc"][treatment]
        return mean

    def share(self, i):
        """Share of ``-log Beta(p; 1, K)``, whatever was drawn: ``q(m) = p(m | p)``."""
        if "draws" not in self.s:
            return 0.0
        penalty = -stats.beta.logpdf(special.expit(self.nets.w["effects.mask.logits"]), *BETA).sum(1)
        if self.s["variant"] == "lopez":
            return penalty.sum() / N_TRAIN
        return sum(penalty[t] / COUNTS_OF[t] for t in TREATMENTS[LABEL[i]])

    def cell(self, p, i):
        """``log p(x)``, divergence of ``z``, its value at the draw, share of the global terms."""
        dosage = {} if "draws" in self.s else {"dosage": np.isin(range(3), TREATMENTS[LABEL[i]]).astype(float)}
        prior_mean = self.prior_mean(p, i)
        mean, std = self.nets.encode(self.x[i], dosage)
        z = mean + std * self.noise[-1][p, i]
        output = self.nets.decode({"basal": z} | dosage, self.covariates[i])
        at_draw = np.sum(stats.norm.logpdf(z, mean, std) - stats.norm.logpdf(z, prior_mean))
        kl = at_draw if self.s["kl"] == "sampled" else self.nets.kl_normal(mean, std, prior_mean, 1)
        return self.nets.log_likelihood(self.x[i], output, self.s["likelihood"]), kl, at_draw, self.share(i)

    def terms(self):
        """Terms of all particles and cells, each of shape ``(n_particles, n_cells)``."""
        table = [[self.cell(p, i) for i in range(len(LABEL))] for p in range(N_PARTICLES)]
        return np.moveaxis(np.array(table), -1, 0)


CASES = [
    (ConditionalVAEModule, {"likelihood": likelihood, "kl": kl})
    for likelihood in ("nb", "poisson")
    for kl in ("analytic", "sampled")
]
CASES += [
    (SVAEPlusModule, {"variant": variant, "draws": draws, "kl": kl, "likelihood": ("nb", "poisson")[(i + j) % 2]})
    for variant in ("sams", "lopez")
    for i, draws in enumerate(("cell", "batch"))
    for j, kl in enumerate(("analytic", "sampled"))
]
IDS = ["-".join([kind.__name__, *settings.values()]) for kind, settings in CASES]


@pytest.mark.parametrize("objective", ["elbo", "iwelbo"])
@pytest.mark.parametrize(("kind", "settings"), CASES, ids=IDS)
def test_every_term_equals_the_equations(kind, settings, objective, networks, tape):
    module, tensors = make_module(kind, settings | (SVAE if kind is SVAEPlusModule else {})), make_tensors()
    module.objective = objective
    tape.clear()  # draws of the start
    output = run(module, tensors, kl_weight=0.6, n_obs=100)
    log_prob, kl, at_draw, share = Equations(networks(module), settings, tape, tensors).terms()
    loss = np.mean(-log_prob + 0.6 * (kl + share))
    if objective == "iwelbo":
        loss = -np.mean(special.logsumexp(log_prob - at_draw - share, axis=0) - np.log(N_PARTICLES))
    (error,) = output.reconstruction_loss.values()
    close = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(error.detach(), -log_prob.mean(0), **close)
    np.testing.assert_allclose(output.kl_local["kl_basal"], kl.mean(0), **close)
    np.testing.assert_allclose(float(output.kl_global_sum), 100 * share.mean(), **close)
    np.testing.assert_allclose(float(output.loss.detach()), loss, **close)
    assert (abs(share).mean() > 0.01) == (kind is SVAEPlusModule)


@pytest.mark.parametrize("variant", ["sams", "lopez"])
def test_frozen_masks_cost_nothing(variant, tape):
    settings = {"variant": variant, "draws": "cell", "kl": "analytic", "likelihood": "nb"} | SVAE
    module, tensors = make_module(SVAEPlusModule, settings), make_tensors()
    outputs = module.inference(**module._get_inference_input(tensors))
    inputs = module._get_inference_input(tensors)
    assert module.global_shares(outputs["latent"], outputs["pairs"], inputs).abs().sum() > 0.1
    module.global_weight.zero_()
    assert module.global_shares(outputs["latent"], outputs["pairs"], inputs).abs().sum() == 0


def test_the_sampled_divergence_from_a_moved_prior_averages_to_the_closed_form():
    """``KL(q(z | x) || N(m mu, I))`` at many draws of ``z`` and at each draw of ``m``."""
    settings = {"variant": "sams", "draws": "cell", "kl": "sampled", "likelihood": "nb"} | SVAE
    module, tensors = make_module(SVAEPlusModule, settings).float(), make_tensors()
    with torch.no_grad():
        module.effects.embedding.loc.mul_(5)
        inputs = module._get_inference_input(tensors) | {"x": tensors["X"].float()}
        latent = module.inference(**inputs, n_samples=20_000, generator=torch.Generator().manual_seed(0))["latent"]
        assert latent.prior_mean.abs().amax((0, 2))[LABEL > 0].min() > 0.5
        assert latent.prior_mean[:, LABEL == 0].abs().max() == 0
        difference = module.kl_basal(latent, sampled=True) - module.kl_basal(latent, sampled=False)
    error = difference.std(0) / np.sqrt(len(difference))
    assert (difference.mean(0).abs() < 4.5 * error).all()
    assert (error < 0.05 * module.kl_basal(latent, sampled=False).mean(0)).all()
