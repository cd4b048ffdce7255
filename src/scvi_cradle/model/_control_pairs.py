"""Training with control partners, and new cells from the states of control cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS, settings
from torch import Generator, Tensor

from scvi_cradle._constants import KEYS
from scvi_cradle._matrix import row_sums
from scvi_cradle._validation import preview
from scvi_cradle.data import PairedSplitter, find_partners, pool_of_cells
from scvi_cradle.model._base import check_indices
from scvi_cradle.model._devices import Devices
from scvi_cradle.model._generation import Output, Request
from scvi_cradle.model._training import TrainingMixin
from scvi_cradle.train import ALIGN_WARMUP, KL_WARMUP, PairedTrainingPlan

STATES = ("state_mean", "state_std")


class ControlPairsMixin(TrainingMixin):
    """Training, and generation from control cells."""

    _data_splitter_cls = PairedSplitter
    _looks_up_cells = True
    _training_plan_cls = PairedTrainingPlan

    # ---- training ---------------------------------------------------------------------------------------------------

    def _splitter_arguments(self, split: list[np.ndarray]) -> dict[str, Any]:
        alignment = self.module.alignment
        if alignment == "none":
            return {}
        if not len(self._batch_cells(split[0])):
            msg = f"control_cells='partners' trains on perturbed cells; received {len(split[0])} training cells that are all controls: add perturbed ones."
            raise ValueError(msg)
        partners = find_partners(
            self.adata_manager,
            split,
            self._control_code,
            pairing=self._architecture["control_pairing"],
            column_key=self._architecture["control_partner_key"],
            pair_controls=self._trains_on_controls,
            seed=settings.seed or 0,
        )
        return {"partners": partners, "members": self._members_of_batches(), "by_label": alignment == "mmd"}

    def _batch_cells(self, cells: np.ndarray) -> np.ndarray:
        return cells[self._members_of_batches()[cells]]

    def _members_of_batches(self) -> np.ndarray:
        """Return which cells are members of batches, and not partners alone, shape ``(n_cells,)``."""
        codes = np.asarray(self.adata_manager.get_from_registry(KEYS.PERTURBATION)).ravel()
        return (codes != self._control_code) | self._trains_on_controls

    @property
    def _trains_on_controls(self) -> bool:
        return bool(self._architecture["control_cells"] == "included")

    @property
    def _control_code(self) -> int:
        return self._table.labels.index(self._rule.control_name)

    def _sources(self) -> np.ndarray:
        return np.array(self._table.labels) == self._rule.control_name

    def _stopping_arguments(self, max_epochs: int) -> dict[str, Any]:
        """Follow the objective, in which the divergences have their weights, from the end of the warm-ups on."""
        return {
            "early_stopping_monitor": "validation_loss",
            "early_stopping_warmup_epochs": math.ceil(max(KL_WARMUP[1], ALIGN_WARMUP[1]) * max_epochs),
        }

    def _diagnose(self) -> None:
        """Keep the states of training controls, which generation starts from, and compute the diagnostics."""
        self._library_pool  # noqa: B018 - encodes them
        super()._diagnose()

    @property
    def _library_pool(self) -> dict[str, np.ndarray]:
        """Training controls with their states, which are encoded when a training has ended, in whatever way."""
        pool = self.libraries_ or {}
        if pool and STATES[0] not in pool:
            pool = self.libraries_ = pool | self._states(self.adata, pool["cell"])
        return pool

    @torch.inference_mode()
    def _states(self, data: Any, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Return mean and standard deviation of ``q(z_iota | x)`` of cells, each ``(n_cells, n_invariant)``."""
        cells, inverse = np.unique(positions, return_inverse=True)  # backed data are read in their order
        means, stds = [], []
        for _, latent in self._latent_batches(data, cells, None, n_samples=1, sample=False):
            means.append(latent.q_basal.loc[0].cpu().numpy())
            stds.append(latent.q_basal.scale[0].cpu().numpy())
        return {"state_mean": np.concatenate(means)[inverse], "state_std": np.concatenate(stds)[inverse]}

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _requested_labels(self, perturbations: str | Sequence[str] | None) -> list[str]:
        labels = super()._requested_labels(perturbations)
        counts = self._trained_counts()
        for label in labels:
            if counts.get(label):
                continue
            lacking = [t for t in self._rule.treatments(label) if not counts.get(t)]
            if lacking:
                msg = f"A combination without training cells needs training cells with each of its treatments alone, since mechanisms of a treatment that never acts alone are not learnt; received {label!r}, and {preview(lacking)} was never trained alone."
                raise ValueError(msg)
        return labels

    # ---- generation -------------------------------------------------------------------------------------------------

    def _draw_noise(
        self, pool: dict[str, np.ndarray], rows: np.ndarray, generator: Generator, *, vary: bool = True
    ) -> Tensor:
        device, module = generator.device, self.module
        mean, std = (torch.as_tensor(pool[name][rows], device=device) for name in STATES)
        noise = torch.randn((1, len(rows), module.n_latent), generator=generator, device=device)
        if not vary:
            mean = torch.as_tensor(pool["state_mean"].mean(0), device=device).expand_as(mean)
        unit = noise if vary and self._draws_latents else torch.zeros_like(noise)
        state, responsive = unit.split([module.n_invariant, module.n_responsive], dim=-1)
        return torch.cat([mean + std * state, responsive], dim=-1)

    def get_generated_expression(
        self,
        perturbations: str | Sequence[str] | None = None,
        *,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 100,
        artifact: bool = False,
        library_size: float | Literal["observed"] = "observed",
        output: Output = "counts",
        batch: str | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        devices: Devices = None,
    ) -> AnnData:
        """Generate new cells: control cells are drawn, and given a perturbation (PerturbedVAE, prediction).

        ``z_iota ~ q(. | x)`` of a control cell, ``z_nu ~ p(. | u, z_iota)``, and the decoder's mean of both, without
        observation noise for ``likelihood="mse"``.

        Parameters
        ----------
        perturbations
            Labels, also unseen combinations of any number of treatments that were trained alone. Default: all labels seen
            in training, sorted.
        adata, indices
            Control cells to start from, also of other data. Default: the training controls, of which at most 10,000 a
            batch are kept with the model.
        n_samples
            Cells per label; control cells are drawn with replacement.
        artifact
            Not offered by this model.
        library_size
            For counts: ``"observed"``: that of the control cell. A number fixes it.
        output
            ``"counts"``: integer counts as CSR (values of the data's scale for other likelihoods); ``"mean"``: expected
            ones; ``"normalized"``: expected counts per 10,000.
        batch
            Batch of the control cells; default: any.
        seed, batch_size
            Seed of the draws (default: from torch's global generator), and cells decoded at once.
        devices
            Devices to share the work, each with a copy of the module, e.g. ``["cuda:0", "cuda:1"]``. Draws do not depend
            on their number. Default: the model's device.

        Returns
        -------
        AnnData as of the other models: blocks of ``n_samples`` cells in the order of the request; ``obs``:
        ``perturbation`` (and the registered key), ``artifact``, ``seen`` (``"seen"`` or ``"unseen combination"``),
        ``library_size`` (of counts) and the batch.

        Raises
        ------
        ValueError
            For an unknown treatment, an unseen combination with a treatment that was never trained alone, and cells
            that are no controls.
        NotImplementedError
            For an artifact.
        RuntimeError
            If the model is not trained.
        """
        pool = None if adata is None and indices is None else self._pool_of(adata, indices)
        return self._generate(
            perturbations, Request(n_samples, artifact, library_size, output, batch, seed, batch_size, devices), pool
        )

    @torch.inference_mode()
    def _pool_of(self, adata: AnnData | None, indices: Sequence[int] | None) -> dict[str, np.ndarray]:
        """Return given control cells in the form of the model's pool."""
        data = self._validate_anndata(adata)
        positions = check_indices(indices, data)
        observed = self._observed_labels(data, positions)
        others = sorted({str(x) for x in observed if x != self._rule.control_name})
        if others:
            msg = f"New cells start from control cells; received cells with {preview(others)}: pass controls, or ask `get_counterfactual_expression` for other cells."
            raise ValueError(msg)
        manager = self.get_anndata_manager(data, required=True)
        totals = row_sums(manager.get_from_registry(REGISTRY_KEYS.X_KEY)[positions])
        n = len(positions)
        pool = pool_of_cells(manager, positions, totals, np.zeros(n, dtype=bool), np.ones(n))
        return pool | self._states(data, positions)
