"""Treatment effects: on expression, and in the latent space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scvi_cradle._constants import COLUMNS, CONTROL_UNS_KEY, COUNTS_PER_CELL
from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.model._base import LabelledModel
from scvi_cradle.model._draws import (
    as_module_input,
    covariate_tensors,
    draw_libraries,
    library_grid,
    make_generator,
    sample_counts,
)
from scvi_cradle.module.base import LogNormalizedExpectation, Pairs, softmax_rates

N_MASK_DRAWS = 64


class EffectsMixin(LabelledModel):
    """Average treatment effects."""

    @torch.inference_mode()
    def get_average_treatment_effects(
        self,
        perturbations: str | Sequence[str] | None = None,
        *,
        n_particles: int = 500,
        method: Literal["perturbseq", "mean"] = "perturbseq",
        library_size: float | Literal["observed"] = "observed",
        share_basal: bool = True,
        expectation: Literal["exact", "sample"] = "exact",
        seed: int | None = None,
    ) -> AnnData:
        """Return the average effect of every perturbation on artifact-free expression (SAMS-VAE, sec. 4).

        Parameters
        ----------
        perturbations
            Labels, also unseen combinations. Default: all labels seen in training but the control, sorted.
        n_particles
            Draws of all latent variables per label.
        method
            ``"perturbseq"``: mean of ``log2(1 + 1e4 x / sum(x))``, treated minus control; ``"mean"``: difference of
            mean counts.
        library_size
            ``"observed"``: drawn from training cells that passed QC, the same for all labels; a number fixes it.
        share_basal
            Use the same basal states for treated and control cells (common random numbers).
        expectation
            ``"exact"``: the observation noise is integrated out (error below 1e-3 log2 units, library sizes
            represented by at most eight values); ``"sample"``: counts are sampled.
        seed
            Seed of the draws; default: from torch's global generator.

        Returns
        -------
        AnnData of shape ``(n_perturbations, n_genes)`` in the order of the request; ``layers["std"]``: standard
        deviation over particles; ``uns["control"]``.

        Raises
        ------
        ValueError
            For an unknown treatment or an unknown option.
        """
        check_one_of("method", method, ("perturbseq", "mean"))
        check_one_of("expectation", expectation, ("exact", "sample"))
        check_positive("n_particles", n_particles, integer=True)
        control = self._rule.control_name
        labels = [x for x in self._requested_labels(perturbations) if perturbations is not None or x != control]
        module, device = self.module, self.module.device
        generator = make_generator(seed, device)
        rng = np.random.default_rng(generator.initial_seed())
        libraries = draw_libraries(self._library_pool, n_particles, library_size, artifact=False, batch=None, rng=rng)
        grid, group = library_grid(libraries.total)
        tensors = as_module_input(covariate_tensors(self._library_pool, libraries.rows), device)
        transform = _Transform(module.decoder.theta, grid, group, method, expectation, generator)
        members = torch.as_tensor(self._members([control, *labels]), device=device)
        n_latent = module.effects.mask_logits.shape[1]
        z_basal = torch.randn(1, n_particles, n_latent, generator=generator, device=device)

        def expression(code: int, z: Tensor) -> Tensor:
            pairs = Pairs.from_members(members[code].expand(n_particles, -1))
            draw = module.effects.draw(pairs, 1, per_cell=True, generator=generator)
            z_perturbation = draw.to_cells(draw.rows, pairs)
            return transform(module.decoder(z, z_perturbation, torch.zeros_like(z), module.covariates(tensors))[0])

        base = expression(0, z_basal)
        means, stds = [], []
        for code in range(1, len(labels) + 1):
            z = z_basal if share_basal else torch.randn(z_basal.shape, generator=generator, device=device)
            difference = expression(code, z) - base
            means.append(difference.mean(0).cpu().numpy())
            stds.append(difference.std(0, unbiased=False).cpu().numpy())
        effects = AnnData(
            X=np.stack(means),
            obs=pd.DataFrame({COLUMNS.PERTURBATION: pd.Categorical(labels)}, index=pd.Index(labels, dtype=str)),
            var=pd.DataFrame(index=self._genes),
            uns={CONTROL_UNS_KEY: control},
        )
        effects.layers["std"] = np.stack(stds)
        return effects

    @torch.inference_mode()
    def get_perturbation_effects(self) -> AnnData:
        """Return the latent effect of every treatment.

        Returns
        -------
        AnnData of shape ``(n_treatments, n_latent)``: X the expected effect ``E[e * m]``; layers ``mask_prob``,
        ``embedding_mean`` and ``embedding_std`` (of the posterior); ``obs["n_cells"]`` training cells.
        """
        self._trained_counts()
        effects, device = self.module.effects, self.module.device
        treatment = torch.arange(len(effects.mask_logits), device=device)
        probability = torch.sigmoid(effects.mask_logits)
        if effects.amortized:
            generator = make_generator(0, device)
            shape = (N_MASK_DRAWS, *probability.shape)
            mask = (torch.rand(shape, generator=generator, device=device) < probability).float()
            posterior = effects.embedding_posterior(treatment, mask)
            mean, std = posterior.mean.mean(0), posterior.variance.mean(0).sqrt()
            expected = (mask * posterior.mean).mean(0)
        else:
            posterior = effects.embedding_posterior(treatment, probability)
            mean, std, expected = posterior.mean, posterior.stddev, probability * posterior.mean
        names = pd.Index(self._table.treatments, dtype=str)
        n_cells = self.module.n_obs_per_treatment.cpu().numpy().astype(int)
        result = AnnData(X=expected.cpu().numpy(), obs=pd.DataFrame({"n_cells": n_cells}, index=names))
        result.layers["mask_prob"] = probability.cpu().numpy()
        result.layers["embedding_mean"] = mean.cpu().numpy()
        result.layers["embedding_std"] = std.cpu().numpy()
        return result


class _Transform:
    """From logits to (expected or sampled) expression on the scale of the effects."""

    def __init__(
        self,
        theta: Tensor,
        grid: np.ndarray,
        group: np.ndarray,
        method: str,
        expectation: str,
        generator: torch.Generator,
    ) -> None:
        self.theta, self.method, self.sampled, self.generator = theta, method, expectation == "sample", generator
        self.groups = [torch.as_tensor(np.flatnonzero(group == g), device=theta.device) for g in range(len(grid))]
        self.library = torch.as_tensor(grid[group], dtype=torch.float32, device=theta.device)[:, None]
        exact_log = method == "perturbseq" and not self.sampled
        self.table = LogNormalizedExpectation(theta, grid) if exact_log else None

    def __call__(self, logits: Tensor) -> Tensor:
        mu = softmax_rates(logits, self.library)
        if self.table is not None:
            result = torch.empty_like(mu)
            for g, rows in enumerate(self.groups):
                result[rows] = self.table(mu[rows], g)
            return result
        if not self.sampled:
            return mu
        counts = sample_counts(mu, self.theta, self.generator)
        if self.method == "mean":
            return counts
        return torch.log2(1 + COUNTS_PER_CELL * counts / counts.sum(1, keepdim=True).clamp_min(1))
