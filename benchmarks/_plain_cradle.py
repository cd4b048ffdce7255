"""The objective of CRADLE-VAE, transcribed plainly: dense, everything repeated for every particle.

The same mathematics as :class:`scvi_cradle.module.CradleVAEModule` (``posterior="correlated"``, ``draws="batch"``,
``kl="analytic"``, ``combine="concat"``, no skip), without any of its savings: expression is repeated per particle,
encoder inputs are concatenated and pass through the whole first layer in each of the factual, counterfactual and reference
passes, ``q(e | m)`` is evaluated for all treatments, dosages are a dense matrix, references a dense cells x genes matrix,
and the negative binomial is the formula over (particles, cells, genes) with lgamma everywhere.

``as_published`` adds the work that the published code does beside: counts are decoded with the artifact on and off, sampled
from both and scored under both, E, M and U are drawn again for the counterfactual pass (here from the same noise, so that the
loss stays the same), and a fourth encoder pass sees the references with the artifact off. None of it changes the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import leaky_relu, softmax, softplus


class Noise(NamedTuple):
    """Draws of one step."""

    mask: Tensor  # uniform, (P, T, D)
    embedding: Tensor  # normal, (P, T, D)
    artifact: Tensor  # normal, (P, 1, D)
    basal: Tensor  # normal, (P, n, D)


class Perceptron(nn.Module):
    """Linear layers with LeakyReLU; the second and later hidden layers add their input; a Gaussian head or none."""

    def __init__(self, n_in: int, n_hidden: int, n_layers: int, n_out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n_in if i == 0 else n_hidden, n_hidden) for i in range(n_layers))
        self.head = nn.Linear(n_hidden, n_out)

    def forward(self, value: Tensor) -> Tensor:
        hidden = leaky_relu(self.layers[0](value), 0.01)
        for layer in self.layers[1:]:
            hidden = hidden + leaky_relu(layer(hidden), 0.01)
        return self.head(hidden)


def gaussian(output: Tensor) -> Normal:
    mean, log_variance = output.chunk(2, dim=-1)
    return Normal(mean, (log_variance.exp() + 1e-4).sqrt(), validate_args=False)


class PlainCradle(nn.Module):
    """Parameters and loss."""

    def __init__(
        self,
        n_genes: int,
        n_treatments: int,
        n_latent: int,
        n_hidden: int,
        n_particles: int,
        *,
        prior_logit: float,
        cf_weight: float,
        as_published: bool = False,
    ) -> None:
        super().__init__()
        self.as_published = as_published
        self.n_treatments, self.n_particles, self.prior_logit, self.cf_weight = (
            n_treatments,
            n_particles,
            prior_logit,
            cf_weight,
        )
        self.mask_logits = nn.Parameter(torch.zeros(n_treatments, n_latent))
        self.embedding = Perceptron(n_latent + n_treatments, n_hidden, 4, 2 * n_latent)
        self.u_mean, self.u_log_std = nn.Parameter(torch.zeros(n_latent)), nn.Parameter(torch.zeros(n_latent))
        self.encoder = Perceptron(n_genes + 2 * n_latent, n_hidden, 1, 2 * n_latent)
        self.decoder = Perceptron(3 * n_latent, n_hidden, 2, n_genes)
        self.log_theta = nn.Parameter(torch.zeros(n_genes))
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("std", torch.ones(n_genes))
        self.register_buffer("n_obs", torch.zeros(n_treatments))
        self.register_buffer("n_failed", torch.zeros(()))

    def encode(self, x: Tensor, z_p: Tensor, z_a: Tensor) -> Normal:
        inputs = ((1 + x).log() - self.mean) / self.std
        inputs = inputs.expand(self.n_particles, *x.shape)
        return gaussian(self.encoder(torch.cat([inputs, z_p, z_a], dim=-1)))

    def log_likelihood(self, x: Tensor, z_b: Tensor, z_p: Tensor, z_a: Tensor) -> Tensor:
        mu = x.sum(1, keepdim=True) * (softmax(self.decoder(torch.cat([z_b, z_p, z_a], dim=-1)), dim=-1) + 1e-8)
        theta = self.log_theta.exp()
        if self.as_published:
            torch.poisson(torch.distributions.Gamma(theta, theta / mu.detach(), validate_args=False).sample())
        log_prob = (
            torch.lgamma(x + theta)
            - torch.lgamma(theta)
            - torch.lgamma(x + 1)
            + theta * (theta / (theta + mu)).log()
            + x * (mu / (theta + mu)).log()
        )
        return log_prob.sum(-1)

    def draw_effects(self, noise: Noise) -> tuple[Tensor, Normal]:
        """Return effects of all treatments, shape ``(P, T, D)``, and ``q(e | m)``."""
        logits = self.mask_logits.expand(self.n_particles, -1, -1)
        relaxed = torch.sigmoid(logits + noise.mask.log() - (1 - noise.mask).log())
        mask = (relaxed > 0.5).to(relaxed) + (relaxed - relaxed.detach())
        one_hot = torch.eye(self.n_treatments).expand(self.n_particles, -1, -1)
        q = gaussian(self.embedding(torch.cat([mask, one_hot], dim=-1)))
        return mask * (q.loc + q.scale * noise.embedding), q

    def draw_artifact(self, noise: Noise) -> tuple[Tensor, Normal]:
        """Return the artifact vector, shape ``(P, 1, D)``, and its posterior."""
        q = Normal(self.u_mean, self.u_log_std.exp() + 1e-4, validate_args=False)
        return q.loc + q.scale * noise.artifact, q

    def loss(
        self, x: Tensor, dosage: Tensor, artifact: Tensor, reference: Tensor, has_reference: Tensor, noise: Noise
    ) -> dict[str, Tensor]:
        """Return the loss and its terms per cell; ``reference`` is cells x genes, ``artifact`` (n, 1)."""
        n, p = len(x), self.n_particles
        logits = self.mask_logits.expand(p, -1, -1)
        effects, q_embedding = self.draw_effects(noise)
        u, q_u = self.draw_artifact(noise)

        z_p = dosage @ effects  # (P, n, D)
        z_a = u * artifact
        q_basal = self.encode(x, z_p, z_a)
        z_b = q_basal.loc + q_basal.scale * noise.basal
        u_on, u_off = u.expand(p, n, -1), torch.zeros_like(z_a)
        if self.as_published:
            on, off = self.log_likelihood(x, z_b, z_p, u_on), self.log_likelihood(x, z_b, z_p, u_off)
            log_prob = artifact[:, 0] * on + (1 - artifact[:, 0]) * off
            z_p = dosage @ self.draw_effects(noise)[0]
            u_on = self.draw_artifact(noise)[0].expand(p, n, -1)
            self.encode(reference, z_p, u_off)
        else:
            log_prob = self.log_likelihood(x, z_b, z_p, z_a)

        standard = Normal(0.0, 1.0, validate_args=False)
        kl_mask = torch.sigmoid(logits) * (logits - self.prior_logit) - softplus(logits)
        kl_mask = kl_mask + softplus(torch.tensor(self.prior_logit))
        kl_treatment = (kl_mask + kl_divergence(q_embedding, standard)).sum(-1)  # (P, T)
        share = torch.where(self.n_obs > 0, (dosage != 0).to(x) / self.n_obs.clamp_min(1), 0.0)  # (n, T)
        q_cf, q_reference = self.encode(x, z_p, u_on), self.encode(reference, z_p, u_on)
        eligible = (artifact[:, 0] == 0) & has_reference
        cf = kl_divergence(q_reference, q_cf).sum(-1) * eligible
        terms = {
            "reconstruction": -log_prob.mean(),
            "kl_basal": kl_divergence(q_basal, standard).sum(-1).mean(),
            "kl_treatment": (share @ kl_treatment.T).sum(0).mean() / n,
            "kl_artifact": kl_divergence(q_u, standard).sum() * artifact.sum() / self.n_failed / n,
            "cf": cf.mean(),
        }
        total = sum(terms[k] for k in terms if k != "cf") + self.cf_weight * terms["cf"]
        return {"loss": total, **terms}
