"""Cells of other perturbations: control cells moved in the latent space of the quantile-hurdle autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from scvi_cradle._validation import check_one_of, check_positive, preview
from scvi_cradle.model._base import check_indices, warn
from scvi_cradle.model._devices import Devices, block_generator, check_devices, copies_on, spread
from scvi_cradle.model._draws import make_generator
from scvi_cradle.model._loop import PerturbationLoopMixin

MAX_CONTROLS = 10_000


class MovedCellsMixin(PerturbationLoopMixin):
    """Generated cells, counterfactuals and effects."""

    moves_: dict[str, Any] | None

    @torch.inference_mode()
    def get_generated_expression(
        self,
        perturbations: str | Sequence[str] | None = None,
        *,
        n_samples: int = 100,
        artifact: bool = False,
        library_size: float | Literal["observed"] = "observed",
        output: Literal["counts", "mean", "normalized"] = "counts",
        batch: str | None = None,
        method: Literal["shift", "transport"] = "shift",
        cell_type: str | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        devices: Devices = None,
    ) -> AnnData:
        """Generate perturbed cells: latents of controls are moved to the perturbed population and decoded.

        Cells count as perturbed as far as they probably are: the weights are those of
        :meth:`get_perturbation_probability`, after :meth:`fit_perturbation_loop`, else 1.

        Parameters
        ----------
        perturbations
            Labels; combinations need ``method="shift"``. Default: all labels seen in training, sorted.
        n_samples
            Cells per label; controls are drawn with replacement.
        artifact, library_size, batch
            Not offered by this model.
        output
            ``"counts"``: draws on the scale of the data, with zeros; ``"mean"``: expected values.
        method
            ``"shift"``: every control moves by the difference of the means of perturbed cells and controls of its cell
            type; a combination by the sum of those of its treatments, each from cells with that treatment alone where
            there are any. ``"transport"``: as many perturbed cells are drawn
            by their probability, and every control moves to the one that optimal transport of least squared distance
            assigns to it (:func:`scipy.optimize.linear_sum_assignment`).
        cell_type
            Cell type to generate; default: as in the controls, of the types in which all treatments of the label occur.
        seed, batch_size
            Seed of the draws; cells decoded at once.
        devices
            Devices to share the work, each with a copy of the module, e.g. ``["cuda:0", "cuda:1"]``. Draws do not depend
            on their number. Default: the model's device.

        Returns
        -------
        AnnData of shape ``(len(perturbations) * n_samples, n_genes)``, dense float32 on the scale of the data, blocks of
        cells in the order of the request; ``obs``: ``perturbation`` (and the registered key), ``artifact``, ``seen`` and
        the cell type, if one is registered.

        Raises
        ------
        ValueError
            For an unknown treatment or cell type, or a label without cells in any of the types asked for.
        NotImplementedError
            For an artifact, a library size, a batch, a scale of counts, or ``"transport"`` of a combination.
        """
        check_one_of("method", method, ("shift", "transport"))
        self._check_request(artifact=artifact, library_size=library_size, output=output, batch=batch)
        check_positive("n_samples", n_samples, integer=True)
        workers = copies_on(self.module, check_devices(devices))
        labels = self._movable(perturbations, method)
        chosen = make_generator(seed, self.module.device).initial_seed()
        rng = np.random.default_rng(chosen)
        draws = rng.random(n_samples)
        moved, cell_types, _ = zip(*(self._moved(x, draws, method, cell_type, rng) for x in labels), strict=True)

        def make(module: Any, block: tuple[int, np.ndarray]) -> np.ndarray:
            return decode(module, block[1], output, block_generator(chosen, block[0], module.device), batch_size)

        blocks = list(spread(make, workers, enumerate(moved)))
        obs = self._generated_obs(labels, n_samples, artifact=False)
        if self._cell_type_key is not None:
            obs[self._cell_type_key] = pd.Categorical(np.concatenate(cell_types))
        return self._values(np.concatenate(blocks), obs)

    def _check_request(self, *, artifact: bool, library_size: Any, output: str, batch: str | None) -> None:
        self._artifact_argument(artifact=bool(artifact))
        if library_size != "observed" or batch is not None:
            msg = f"{type(self).__name__} models normalised values without library size or batch; received library_size={library_size!r}, batch={batch!r}: leave them out."
            raise NotImplementedError(msg)
        self._check_output(output)
        if self.module.reconstruction == "mse" and output != "mean":
            msg = f"An autoencoder with reconstruction='mse' predicts means alone; received output={output!r}: pass output='mean'."
            raise NotImplementedError(msg)

    def _moves(self) -> dict[str, Any]:
        """Return what moves latents, kept with the model: at most 10,000 controls, and the shift of every category.

        Raises
        ------
        RuntimeError
            If the model is without its training data, and has not been asked before.
        """
        if self.moves_ is None:
            self._needs_training_data("Moved cells")
            screen, z = self._screen(), self.get_latent_representation()
            controls, types = self._controls()
            chosen = np.arange(len(controls))
            if len(chosen) > MAX_CONTROLS:
                chosen = np.sort(np.random.default_rng(0).choice(len(controls), MAX_CONTROLS, replace=False))
            centres = {name: z[controls[types == name]].mean(0) for name in np.unique(types)}
            cells = [self._perturbed(screen, c) for c in range(screen.n_categories)]
            found = [c for c in range(screen.n_categories) if screen.cell_type[c] in centres]
            self.moves_ = {
                "control_z": z[controls[chosen]],
                "control_type": [str(t) for t in types[chosen]],
                "category": [(str(screen.target[c]), str(screen.cell_type[c])) for c in found],
                "n_cells": [len(cells[c][0]) for c in found],
                "shift": [
                    (np.average(z[cells[c][0]], axis=0, weights=cells[c][1]) - centres[screen.cell_type[c]]).astype(
                        z.dtype
                    )
                    for c in found
                ],
            }
        return self.moves_

    def _perturbed(self, screen: Any, category: int) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and weights of the cells of a category: those with its target alone, if there are any."""
        rows, here = screen.row, screen.category == category
        alone = np.asarray(self._observed_labels(self.adata, rows)).astype(str) == screen.target[category]
        here = here & alone if (here & alone).any() else here
        return rows[here], self._cell_probability()[here]

    def _shifts(self) -> dict[tuple[str, str], np.ndarray]:
        """Return the shift of every target in every cell type that has controls."""
        moves = self._moves()
        return dict(zip(map(tuple, moves["category"]), moves["shift"], strict=True))

    def _moved(
        self, label: str, draws: np.ndarray, method: str, cell_type: str | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return latents of controls that were moved to a label, their cell types, and where they came from."""
        treatments, moves, shifts = self._rule.treatments(label), self._moves(), self._shifts()
        types = np.array(moves["control_type"], dtype=object)
        allowed = np.flatnonzero(np.isin(types, self._types_of(treatments, cell_type)))
        if not len(allowed):
            msg = f"A label must have cells of every treatment in a cell type with controls; received {label!r}{'' if cell_type is None else f' in {cell_type!r}'}, which has none."
            raise ValueError(msg)
        if method == "transport" and len(treatments) > 1:
            msg = f"Optimal transport is offered for single treatments; received the combination {label!r}: use method='shift'."
            raise NotImplementedError(msg)
        chosen = allowed[(draws * len(allowed)).astype(np.int64)]
        start, of_type = moves["control_z"][chosen], types[chosen]
        moved = start.copy()
        for name in np.unique(of_type):
            here = np.flatnonzero(of_type == name)
            if method == "transport" and treatments:
                targets = self._drawn(treatments[0], name, len(here), rng)
                rows, columns = linear_sum_assignment(cdist(start[here], targets, "sqeuclidean"))
                moved[here[rows]] = targets[columns]
            else:
                for treatment in treatments:
                    moved[here] += shifts[treatment, name]
        return moved, of_type, start

    def _drawn(self, treatment: str, cell_type: str, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw latents of the cells of a category by their probability."""
        self._needs_training_data("Optimal transport")
        screen = self._screen()
        (category,) = np.flatnonzero((screen.target == treatment) & (screen.cell_type == cell_type))
        cells, weights = self._perturbed(screen, int(category))
        return self.get_latent_representation(indices=rng.choice(cells, n, p=weights / weights.sum()))

    def _types_of(self, treatments: tuple[str, ...], cell_type: str | None = None) -> list[str]:
        """Return the cell types with controls in which all treatments occur."""
        every, shifts = sorted(set(self._moves()["control_type"])), self._shifts()
        if cell_type is not None:
            check_one_of("cell_type", str(cell_type), every)
            every = [str(cell_type)]
        return [name for name in every if all((t, name) in shifts for t in treatments)]

    def _movable(self, perturbations: Any, method: str = "shift") -> list[str]:
        """Return the labels of a request; of all labels those that can be answered, with a warning of the others."""
        labels = self._requested_labels(perturbations)
        if perturbations is not None:
            return labels
        of_label = {label: self._rule.treatments(label) for label in labels}
        possible = [
            label
            for label in labels
            if self._types_of(of_label[label]) and (method == "shift" or len(of_label[label]) < 2)
        ]
        if len(possible) < len(labels):
            left_out = [label for label in labels if label not in possible]
            warn(f"Left out, as they cannot be generated with method={method!r}: {preview(left_out)}.")
        return possible

    @torch.inference_mode()
    def get_counterfactual_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        perturbation: str | Sequence[str] | None = None,
        artifact: bool = False,
        output: Literal["counts", "mean", "normalized"] = "counts",
        library_size: float | Literal["observed"] = "observed",
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> AnnData:
        """Predict control cells had they received a perturbation: their latents move by the shift of their cell type.

        Parameters
        ----------
        adata, indices
            Control cells, or any cells for ``perturbation=None``. Default: the model's own cells, perturbed ones included.
        perturbation
            One label for all cells or one per cell. None: every cell keeps its own, which is its reconstruction.
        artifact, library_size
            Not offered by this model.
        output, seed, batch_size
            As in :meth:`get_generated_expression`.

        Returns
        -------
        AnnData of the same cells in the same order, their ``obs`` with the label replaced (the old one is kept as
        ``perturbation_observed``).

        Raises
        ------
        ValueError
            For an unknown treatment, a perturbed cell that is to get another label, or a cell type in which a treatment
            does not occur.
        NotImplementedError
            For an artifact, a library size or a scale of counts.
        """
        self._trained_counts()
        self._check_request(artifact=artifact, library_size=library_size, output=output, batch=None)
        data = self._validate_anndata(adata)
        positions = check_indices(indices, data)
        targets = self._target_labels(perturbation, len(positions))
        z = self.get_latent_representation(data, positions, batch_size=batch_size)
        if targets is not None:
            observed = self._observed_labels(data, positions)
            perturbed = sorted({str(x) for x in observed if x != self._rule.control_name})
            if perturbed:
                msg = f"Only control cells can be moved to another perturbation, since what the perturbation of a cell did to it is not known; received cells with {preview(perturbed)}: pass controls."
                raise ValueError(msg)
            shifts, types = self._shifts(), self._cell_types(data)[positions]
            for i, (label, cell_type) in enumerate(zip(targets, types, strict=True)):
                treatments = self._rule.treatments(label)
                lacking = [t for t in treatments if (t, cell_type) not in shifts]
                if lacking:
                    msg = f"Every treatment must have cells, and controls, of the cell's type; received {label!r} for a cell of {cell_type!r}, where {preview(lacking)} has none."
                    raise ValueError(msg)
                for treatment in treatments:
                    z[i] += shifts[treatment, cell_type]
        x = decode(self.module, z, output, make_generator(seed, self.module.device), batch_size)
        return self._values(x, self._counterfactual_obs(data, positions, targets, artifact=False))


def decode(
    module: Any, z: np.ndarray, output: str, generator: torch.Generator | None = None, batch_size: int | None = None
) -> np.ndarray:
    """Return expression of latent states, expected for ``output="mean"``, else drawn, shape ``(n_cells, n_genes)``."""
    kind = "mean" if output == "mean" else "sample"
    tensor = torch.as_tensor(z, dtype=torch.float32, device=module.device)
    parts = [module.reconstruct(part, kind, generator) for part in tensor.split(batch_size or 512)]
    return torch.cat(parts).cpu().numpy()
