"""Treatment effects: on expression, and in the latent space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scvi_cradle._constants import COLUMNS, CONTROL_UNS_KEY, COUNTS_PER_CELL
from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.model._draws import (
    as_module_input,
    covariate_tensors,
    draw_libraries,
    library_grid,
    make_generator,
)
from scvi_cradle.model._generation import GenerationMixin
from scvi_cradle.model._stack import as_stack, fit_shrinkage, shrunken_effects, stack_effects
from scvi_cradle.module.base import LogNormalizedExpectation, Pairs


class EffectsMixin(GenerationMixin):
    """Average treatment effects."""

    @torch.inference_mode()
    def get_average_treatment_effects(
        self,
        perturbations: str | Sequence[str] | None = None,
        *,
        n_particles: int = 500,
        method: Literal["perturbseq", "mean"] | None = None,
        library_size: float | Literal["observed"] = "observed",
        share_basal: bool = True,
        expectation: Literal["exact", "sample"] = "exact",
        stack: bool | float = False,
        seed: int | None = None,
    ) -> AnnData:
        """Return the average effect of every perturbation on artifact-free expression (SAMS-VAE, sec. 3.2).

        Parameters
        ----------
        perturbations
            Labels, also unseen combinations. Default: all labels seen in training but the control, sorted.
        n_particles
            Draws of all latent variables per label.
        method
            ``"perturbseq"``: mean of ``log2(1 + 1e4 x / sum(x))``, treated minus control; ``"mean"``: difference of
            mean counts (or values). Default: ``"perturbseq"`` for counts, else ``"mean"``.
        library_size
            ``"observed"``: drawn from training cells that passed QC, the same for all labels; a number fixes it.
        share_basal
            Use the same basal states for treated and control cells (common random numbers).
        expectation
            ``"exact"``: the observation noise is integrated out, with ``x / L`` of the drawn library size ``L`` in the
            place of ``x / sum(x)``; the integral is accurate to 1e-3 log2 units, and library sizes are represented by at
            most eight values. ``"sample"``: counts are sampled. The two differ where totals of few, strongly
            overdispersed genes vary a lot (.06 log2 units in the level of a gene at 60 genes, 500 counts and an inverse
            dispersion of 0.2; below .01 at 5,000 counts and 20).
        stack
            Average the model's effects with those of :class:`scvi_cradle.baselines.MultivariateShrinkage`, fitted to the
            training cells that passed QC: more accurate than the model alone, and level with the shrinkage alone where
            that was measured. ``True``: three parts shrinkage and one part model
            for labels with training cells, half and half for unseen combinations (the sum of shrunken single effects).
            A number from 0 to 1: the weight of the shrinkage for all labels. Needs the training data, the scale
            ``"perturbseq"`` and observed library sizes.
        seed
            Seed of the draws; default: from torch's global generator.

        Returns
        -------
        AnnData of shape ``(n_perturbations, n_genes)`` in the order of the request; ``layers["std"]``: standard
        deviation over particles; ``uns["control"]``. With ``stack``, ``layers["model"]`` and ``layers["shrinkage"]`` are
        what was averaged, ``layers["shrinkage_std"]`` and ``layers["lfsr"]`` the posterior standard deviations and local
        false sign rates of the shrinkage, and ``obs["shrinkage_weight"]`` its weight.

        Raises
        ------
        ValueError
            For an unknown treatment or an unknown option, and where ``stack`` has another scale, no training data, or
            no training cells that passed QC with a label or with each of its treatments alone.
        """
        method = method or ("perturbseq" if self.module.decoder.likelihood.counts else "mean")
        check_one_of("method", method, ("perturbseq", "mean"))
        if method == "perturbseq":
            self._needs_counts("method='perturbseq'")
        check_one_of("expectation", expectation, ("exact", "sample"))
        check_positive("n_particles", n_particles, integer=True)
        stack = as_stack(stack, method=method, library_size=library_size)
        control = self._rule.control_name
        labels = [x for x in self._requested_labels(perturbations) if perturbations is not None or x != control]
        if not labels:
            msg = f"Effects are those of perturbations with training cells; received a model that was trained on {control!r} alone: name perturbations."
            raise ValueError(msg)
        shrunken = None
        if stack is not False:  # before anything is drawn: the data may be missing
            self._shrinkage = self._shrinkage or fit_shrinkage(self)
            shrunken = shrunken_effects(self._shrinkage, labels, self._rule)
        module, device = self.module, self.module.device
        generator = make_generator(seed, device)
        rng = np.random.default_rng(generator.initial_seed())
        libraries = draw_libraries(self._library_pool, n_particles, library_size, artifact=False, batch=None, rng=rng)
        grid, group = library_grid(libraries.total)
        tensors = as_module_input(covariate_tensors(self._library_pool, libraries.rows), device)
        transform = _Transform(module.decoder.likelihood, grid, group, method, expectation, generator, device)
        members = torch.as_tensor(self._members([control, *labels]), device=device)
        covariates = module.covariates(tensors)
        noise = self._draw_noise(self._library_pool, libraries.rows, generator)
        module.eval()

        def expression(code: int, z: Tensor) -> Tensor:
            pairs = Pairs.from_members(members[code].expand(n_particles, -1))
            return transform(module.decoder(module.prior(pairs, z, generator=generator), covariates)[0])

        base = expression(0, noise)
        means, stds = [], []
        for code in range(1, len(labels) + 1):
            z = noise if share_basal else self._draw_noise(self._library_pool, libraries.rows, generator)
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
        if shrunken is not None:
            stack_effects(effects, shrunken, stack=stack)
        return effects

    @torch.inference_mode()
    def get_perturbation_effects(self) -> AnnData:
        """Return the latent effect of every treatment.

        Returns
        -------
        AnnData of shape ``(n_treatments, n_latent)``: X the expected effect ``E[e * m]``; layers ``mask_prob``,
        ``embedding_mean`` and ``embedding_std`` (of the posterior); ``obs["n_cells"]`` training cells. Where the
        posterior of an embedding is a network of its mask, moments are averages over 128 drawn masks.
        """
        self._trained_counts()
        if self.module.effects is None:
            other = (
                ", or `get_latent_programs` for responses of latent variables"
                if hasattr(self, "get_latent_programs")
                else ""
            )
            msg = f"{type(self).__name__} has no latent treatment effects: ask `get_average_treatment_effects` for effects on expression{other}."
            raise NotImplementedError(msg)
        treatment = torch.arange(self.module.n_treatments, device=self.module.device)
        summary = {k: v.cpu().numpy() for k, v in self.module.effects.summary(treatment).items()}
        names = pd.Index(self._table.treatments, dtype=str)
        n_cells = self.module.n_obs_per_treatment.cpu().numpy().astype(int)
        result = AnnData(X=summary.pop("expected"), obs=pd.DataFrame({"n_cells": n_cells}, index=names))
        result.layers.update(summary)
        return result


class _Transform:
    """From the decoder's output to (expected or sampled) expression on the scale of the effects."""

    def __init__(
        self,
        likelihood: Any,
        grid: np.ndarray,
        group: np.ndarray,
        method: str,
        expectation: str,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.likelihood, self.method, self.generator = likelihood, method, generator
        self.sampled = expectation == "sample"
        self.groups = [torch.as_tensor(np.flatnonzero(group == g), device=device) for g in range(len(grid))]
        self.library = torch.as_tensor(grid[group], dtype=torch.float32, device=device)[:, None]
        exact_log = method == "perturbseq" and not self.sampled
        self.table = LogNormalizedExpectation(likelihood.theta, grid) if exact_log else None

    def __call__(self, output: Tensor) -> Tensor:
        mean = self.likelihood.mean(output, self.library)
        if self.table is not None:
            result = torch.empty_like(mean)
            for g, rows in enumerate(self.groups):
                result[rows] = self.table(mean[rows], g)
            return result
        if not self.sampled:
            return mean
        values = self.likelihood.sample(mean, self.generator)
        if self.method == "mean":
            return values
        return torch.log2(1 + COUNTS_PER_CELL * values / values.sum(1, keepdim=True).clamp_min(1))
