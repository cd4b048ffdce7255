"""Treatment effects as published: everything drawn, both branches of the artifact, all treatments for every one.

From the descriptions in the papers (SAMS-VAE, sec. 3.2; CRADLE-VAE, Alg. 3): particles come in blocks of 500; a block draws
masks and embeddings of all treatments for each of its particles, and then, treatment by treatment, multiplies all of them with
a dense matrix of dosages, draws basal states anew, decodes with the artifact on and off, draws counts from both, and averages
``log2(1 + 1e4 x / sum(x))`` of the artifact-free ones. The control is one such treatment without dosages.

Where the description leaves a choice, the cheaper one is taken: effects are drawn once per block and not once per treatment,
and the control once per call.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scvi_cradle import CradleVAE
from scvi_cradle.module.base import AmortizedEmbedding, softmax_rates

BLOCK = 500


class PlainEffects:
    """Treatment effects of a trained :class:`CradleVAE` without batches and covariates."""

    def __init__(self, model: CradleVAE, seed: int) -> None:
        self.module, self.rng = model.module.eval(), np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        pool = model.libraries_
        passed = ~pool["artifact"].astype(bool)
        self.libraries, self.weight = pool["total"][passed], pool["weight"][passed] / pool["weight"][passed].sum()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def draw_globals(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Masks and embeddings of all treatments ``(n, n_treatments, n_latent)``, and artifact vectors ``(n, n_latent)``."""
        effects = self.module.effects
        logits = effects.mask.logits
        noise = torch.rand((n, *logits.shape), generator=self.generator)
        mask = torch.sigmoid(logits + torch.log(noise) - torch.log1p(-noise)).round()
        if isinstance(effects.embedding, AmortizedEmbedding):
            rows = torch.arange(len(logits))
            embedding = torch.empty_like(mask)
            for i in range(n):  # particle by particle: a hidden layer of all of them does not fit into memory
                q = effects.embedding(rows, mask[i])
                embedding[i] = q.loc + q.scale * self.normal(*logits.shape)
        else:
            q = effects.embedding()
            embedding = q.loc + q.scale * self.normal(*mask.shape)
        q = self.module.artifact.posterior()
        return mask, embedding, q.loc + q.scale * self.normal(n, len(q.loc))

    def expression(self, dosage: Tensor, mask: Tensor, embedding: Tensor, vector: Tensor) -> Tensor:
        """Mean over particles of log-normalised counts without the artifact, and its variance, shape ``(2, n_genes)``."""
        n, decoder = len(dosage), self.module.decoder
        z_perturbation = torch.bmm(dosage[:, None], embedding * mask)[:, 0]
        z_basal = self.normal(n, self.module.n_latent)
        library = torch.as_tensor(self.rng.choice(self.libraries, (n, 1), p=self.weight), dtype=torch.float32)
        theta = decoder.likelihood.theta.expand(n, -1)
        for artifact in (vector, torch.zeros_like(vector)):  # the last one counts
            z = {"basal": z_basal, "perturbation": z_perturbation, "artifact": artifact}
            output = decoder.output(decoder.features_of({k: v[None] for k, v in z.items()}, torch.zeros(n, 0)))[0]
            mean = softmax_rates(output, library)
            gamma = torch._standard_gamma(theta.contiguous(), generator=self.generator)
            counts = torch.poisson(gamma * mean / theta, generator=self.generator)
        value = torch.log2(1 + 1e4 * counts / counts.sum(1, keepdim=True).clamp_min(1))
        return torch.stack([value.mean(0), value.var(0) / n])

    @torch.inference_mode()
    def block(self, treatments: list[int], n: int, drawn: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Mean expression of treatments (-1: the control) in one block, and its variance, ``(n_treatments, 2, n_genes)``."""
        means = []
        for treatment in treatments:
            dosage = torch.zeros(n, self.module.n_treatments)
            if treatment >= 0:
                dosage[:, treatment] = 1.0
            means.append(self.expression(dosage, *drawn))
        return torch.stack(means)

    @torch.inference_mode()
    def effects(self, treatments: list[int], n_blocks: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Effects of treatments and their standard errors from blocks of 500 particles, ``(n_treatments, n_genes)``."""
        blocks = [self.block([-1, *treatments], BLOCK, self.draw_globals(BLOCK)) for _ in range(n_blocks)]
        mean, variance = torch.stack(blocks).mean(0).unbind(1)
        return (mean[1:] - mean[0]).numpy(), ((variance[1:] + variance[0]) / n_blocks).sqrt().numpy()
