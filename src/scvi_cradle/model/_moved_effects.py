"""Effects of perturbations as differences of moved and unmoved control cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvi_cradle._constants import COLUMNS, CONTROL_UNS_KEY
from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.model._devices import Devices, check_devices, copies_on, spread
from scvi_cradle.model._draws import make_generator
from scvi_cradle.model._moved_cells import MovedCellsMixin, decode


class MovedEffectsMixin(MovedCellsMixin):
    """Average effects on expression, and shifts of the latent space."""

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
        seed: int | None = None,
        devices: Devices = None,
    ) -> AnnData:
        """Return the average effect of perturbations on expected expression, on the scale of the data.

        Parameters
        ----------
        perturbations
            Labels, also combinations. Default: all labels seen in training but the control, sorted.
        n_particles
            Controls that are drawn and moved (``method="shift"`` of :meth:`get_generated_expression`).
        method
            ``"mean"`` (default), the only one for values that are no counts.
        library_size, share_basal, expectation
            As by default: the model has no library size, the same controls are moved and not moved, and expected values
            are compared.
        seed
            Seed of the draws.
        devices
            Devices to share the work, each with a copy of the module. Default: the model's device.

        Returns
        -------
        AnnData of shape ``(n_perturbations, n_genes)`` in the order of the request; ``layers["std"]``: standard deviation
        over controls; ``uns["control"]``.

        Raises
        ------
        ValueError
            As :meth:`get_generated_expression`.
        NotImplementedError
            For another method, a library size, controls drawn anew, or sampled expression.
        """
        if method == "perturbseq":
            self._needs_counts("method='perturbseq'")
        check_one_of("method", method, (None, "mean"))
        if not share_basal or expectation not in ("auto", "exact"):
            msg = f"{type(self).__name__} compares expected values of the same controls; received share_basal={share_basal}, expectation={expectation!r}: leave them out."
            raise NotImplementedError(msg)
        control = self._rule.control_name
        self._check_request(artifact=False, library_size=library_size, output="mean", batch=None)
        labels = [x for x in self._movable(perturbations) if perturbations is not None or x != control]
        if not labels:
            msg = f"Effects are those of perturbations with training cells; received a model that was trained on {control!r} alone: name perturbations."
            raise ValueError(msg)
        check_positive("n_particles", n_particles, integer=True)
        workers = copies_on(self.module, check_devices(devices))
        rng = np.random.default_rng(make_generator(seed, self.module.device).initial_seed())
        draws = rng.random(n_particles)

        def compare(module: Any, states: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
            moved, _, start = states
            difference = decode(module, moved, "mean") - decode(module, start, "mean")
            return difference.mean(0), difference.std(0)

        states = (self._moved(label, draws, "shift", None, rng) for label in labels)
        means, stds = zip(*spread(compare, workers, states), strict=True)
        index = pd.Index(labels, dtype=str)
        obs = pd.DataFrame({COLUMNS.PERTURBATION: pd.Categorical(labels)}, index=index)
        effects = AnnData(np.stack(means), obs=obs, var=pd.DataFrame(index=self._genes), uns={CONTROL_UNS_KEY: control})
        effects.layers["std"] = np.stack(stds)
        return effects

    def get_perturbation_effects(self) -> AnnData:
        """Return the shift of every treatment in the latent space, averaged over cell types with controls by their cells.

        Returns
        -------
        AnnData of treatments x latent dimensions.
        """
        moves = self._moves()
        targets = sorted({target for target, _ in moves["category"]})
        shifts = np.zeros((len(targets), self.module.n_latent), dtype=np.float32)
        for i, target in enumerate(targets):
            here = [c for c, (name, _) in enumerate(moves["category"]) if name == target]
            sizes = [moves["n_cells"][c] for c in here]
            shifts[i] = np.average([moves["shift"][c] for c in here], axis=0, weights=sizes)
        var = pd.DataFrame(index=[f"latent_{i}" for i in range(shifts.shape[1])])
        return AnnData(shifts, obs=pd.DataFrame(index=pd.Index(targets, dtype=str)), var=var)
