"""Treatment effects: on expression, and in the latent space."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvi_cradle._constants import COLUMNS, CONTROL_UNS_KEY
from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.model._devices import Devices, check_devices
from scvi_cradle.model._draws import (
    as_module_input,
    covariate_tensors,
    draw_libraries,
    library_grid,
    make_generator,
)
from scvi_cradle.model._effect_blocks import EffectBlocks, Particles
from scvi_cradle.model._generation import GenerationMixin
from scvi_cradle.model._stack import as_stack, fit_shrinkage, shrunken_effects, stack_effects
from scvi_cradle.module.base import RATE_FLOOR, LogNormalizedExpectation

N_BIAS_DRAWS = 8
MAX_BIAS = 0.05  # log2 units


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
        expectation: Literal["auto", "exact", "sample"] = "auto",
        stack: bool | float = False,
        seed: int | None = None,
        devices: Devices = None,
    ) -> AnnData:
        """Return the average effect of every perturbation on artifact-free expression (SAMS-VAE, sec. 3.2).

        Parameters
        ----------
        perturbations
            Labels, also unseen combinations. Default: all labels seen in training but the control, sorted.
        n_particles
            Draws of all latent variables per label. Where the posterior of embeddings is a network of masks
            (``posterior="correlated"`` or ``"correlated_embedding"``), two particles share a mask and have embeddings on
            opposite sides of its mean (antithetic draws): half of the evaluations of the network, at some 1.2 times the
            variance of independent draws.
        method
            ``"perturbseq"``: mean of ``log2(1 + 1e4 x / sum(x))``, treated minus control; ``"mean"``: difference of
            mean counts (or values). Default: ``"perturbseq"`` for counts, else ``"mean"``.
        library_size
            ``"observed"``: drawn from training cells that passed QC, the same for all labels, and represented by at most
            eight values; a number fixes it.
        share_basal
            Use the same basal states for treated and control cells, and where counts are sampled the same gamma factors of
            the negative binomial (common random numbers).
        expectation
            ``"exact"``: the observation noise is integrated out, with ``x / L`` of the drawn library size ``L`` in the
            place of ``x / sum(x)``; the integral is read from a table with an error below 1e-3 log2 units. ``"sample"``: counts are sampled. The two differ where a few,
            overdispersed genes hold the library, so that totals vary: to second order by at most ``v / (2 log 2)`` log2
            units in the level of a gene that holds little, with ``v = sum_g rho_g^2 / theta_g + 1 / L`` the squared
            coefficient of variation of the total. ``"auto"`` samples where that is above 0.05 (a coefficient of 26%) for
            the control or a label asked for, on average over 8 draws, the same at every call. Without a logarithm
            (``method="mean"``) they do not differ. A seed gives the same effects whatever the sizes of internal blocks,
            to rounding, if nothing is sampled.
        stack
            Average the model's effects with those of :class:`scvi_cradle.baselines.MultivariateShrinkage`, fitted to the
            training cells that passed QC: more accurate than the model alone, and level with the shrinkage alone where
            that was measured. ``True``: three parts shrinkage and one part model
            for labels with training cells, half and half for unseen combinations (the sum of shrunken single effects).
            A number from 0 to 1: the weight of the shrinkage for all labels. Needs the training data, the scale
            ``"perturbseq"`` and observed library sizes.
        seed
            Seed of the draws; default: from torch's global generator.
        devices
            Devices to share the work, each with a copy of the module, e.g. ``["cuda:0", "cuda:1"]``. Draws do not depend
            on their number. Default: the model's device.

        Returns
        -------
        AnnData of shape ``(n_perturbations, n_genes)`` in the order of the request; ``layers["std"]``: standard
        deviation over particles; ``uns``: ``"control"``, ``"expectation"`` (``"exact"`` or ``"sample"``, as it was computed)
        and, for ``"perturbseq"``, ``"total_count_bias"``, the number behind ``"auto"``. With ``stack``, ``layers["model"]``
        and ``layers["shrinkage"]`` are what was averaged, ``layers["shrinkage_std"]`` and ``layers["lfsr"]`` the posterior
        standard deviations and local false sign rates of the shrinkage, and ``obs["shrinkage_weight"]`` its weight.

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
        check_one_of("expectation", expectation, ("auto", "exact", "sample"))
        check_positive("n_particles", n_particles, integer=True)
        chosen = check_devices(devices)
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
        self.module.eval()
        particles = self._draw_particles(n_particles, library_size, seed)
        members = torch.as_tensor(self._members([control, *labels]), device=self.module.device)
        uns: dict[str, Any] = {CONTROL_UNS_KEY: control}
        if method == "perturbseq":
            few = self._draw_particles(N_BIAS_DRAWS, library_size, seed=0)  # the same at every call
            uns["total_count_bias"] = EffectBlocks(self.module, few, method).bias(members)
        if expectation == "auto":
            expectation = "sample" if uns.get("total_count_bias", 0.0) > MAX_BIAS else "exact"
        sampled = expectation == "sample"
        table = None if sampled or method == "mean" else self._read_table(particles.libraries)
        blocks = EffectBlocks(self.module, particles, method, sampled=sampled, table=table)
        differences = blocks.differences(members, share_basal=share_basal, devices=chosen)
        means, stds = zip(*differences, strict=True)
        effects = AnnData(
            X=np.stack(means),
            obs=pd.DataFrame({COLUMNS.PERTURBATION: pd.Categorical(labels)}, index=pd.Index(labels, dtype=str)),
            var=pd.DataFrame(index=self._genes),
            uns=uns | {"expectation": expectation},
        )
        effects.layers["std"] = np.stack(stds)
        if shrunken is not None:
            stack_effects(effects, shrunken, stack=stack)
        return effects

    def _draw_particles(self, n: int, library_size: float | str, seed: int | None) -> Particles:
        """Draw library sizes and covariates of particles, shared by all labels."""
        pool, device = self._library_pool, self.module.device
        generator = make_generator(seed, device)
        rng = np.random.default_rng(generator.initial_seed())
        drawn = draw_libraries(pool, n, library_size, artifact=False, batch=None, rng=rng)
        grid, group = library_grid(pool, drawn.total, library_size)
        order = np.argsort(group, kind="stable")  # so that a block reads few of the tables
        rows = drawn.rows[order]
        covariates = self.module.covariates(as_module_input(covariate_tensors(pool, rows), device))
        return Particles(
            partial(self._draw_noise, pool, rows, generator),
            covariates[:, None],
            grid,
            torch.as_tensor(group[order], device=device)[:, None, None],
            generator,
        )

    def _read_table(self, libraries: np.ndarray) -> LogNormalizedExpectation:
        """Return the table of expectations, which is kept as long as dispersions and library sizes are the same."""
        theta = self.module.decoder.likelihood.theta
        if self._table_kept is None or not self._table_kept.is_of(theta, libraries, RATE_FLOOR):
            self._table_kept = LogNormalizedExpectation(theta, libraries, RATE_FLOOR)
        return self._table_kept

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
