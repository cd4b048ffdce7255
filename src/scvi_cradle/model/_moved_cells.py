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

from scvi_cradle._constants import COLUMNS, CONTROL_UNS_KEY
from scvi_cradle._validation import check_one_of, check_positive, preview
from scvi_cradle.model._base import check_indices
from scvi_cradle.model._draws import make_generator
from scvi_cradle.model._loop import PerturbationLoopMixin


class MovedCellsMixin(PerturbationLoopMixin):
    """Generated cells, counterfactuals and effects."""

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
            type; a combination by the sum of those of its treatments. ``"transport"``: as many perturbed cells are drawn
            by their probability, and every control moves to the one that optimal transport of least squared distance
            assigns to it (:func:`scipy.optimize.linear_sum_assignment`).
        cell_type
            Cell type to generate; default: as in the controls, of the types in which all treatments of the label occur.
        seed, batch_size
            Seed of the draws; cells decoded at once.

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
        labels = self._requested_labels(perturbations)
        self._check_request(artifact=artifact, library_size=library_size, output=output, batch=batch)
        check_positive("n_samples", n_samples, integer=True)
        check_one_of("method", method, ("shift", "transport"))
        generator = make_generator(seed, self.module.device)
        rng = np.random.default_rng(generator.initial_seed())
        state, draws = self._latent_state(), rng.random(n_samples)
        blocks, cell_types = [], []
        for label in labels:
            moved, types, _ = self._moved(state, label, draws, method, cell_type, rng)
            blocks.append(self._decode(moved, output, generator, batch_size))
            cell_types.append(types)
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

    def _decode(self, z: np.ndarray, output: str, generator: torch.Generator, batch_size: int | None) -> np.ndarray:
        kind = "mean" if output == "mean" else "sample"
        tensor = torch.as_tensor(z, dtype=torch.float32, device=self.module.device)
        parts = [self.module.reconstruct(part, kind, generator) for part in tensor.split(batch_size or 512)]
        return torch.cat(parts).cpu().numpy()

    def _latent_state(self) -> dict[str, Any]:
        """Return what moves latents: controls and perturbed cells of every category with their weights.

        Raises
        ------
        RuntimeError
            If the model was loaded without its training data.
        """
        if not self._has_training_data():
            msg = "Moving cells needs the training data; received a model without them: load it with `adata`."
            raise RuntimeError(msg)
        screen, weights = self._screen(), self._cell_probability()
        z = self.get_latent_representation()
        return {"screen": screen, "weights": weights, "z": z}

    def _moved(
        self,
        state: dict[str, Any],
        label: str,
        draws: np.ndarray,
        method: str,
        cell_type: str | None,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return latents of controls that were moved to a label, their cell types, and where they came from."""
        screen, z, treatments = state["screen"], state["z"], self._rule.treatments(label)
        controls, types = self._controls()
        allowed = np.isin(types, self._types_of(screen, treatments, cell_type))
        if not allowed.any():
            msg = f"A label must have cells of every treatment in a cell type with controls; received {label!r}{'' if cell_type is None else f' in {cell_type!r}'}, which has none."
            raise ValueError(msg)
        if method == "transport" and len(treatments) > 1:
            msg = f"Optimal transport needs cells of the label itself; received the combination {label!r}: use method='shift'."
            raise NotImplementedError(msg)
        chosen = np.flatnonzero(allowed)[(draws * allowed.sum()).astype(np.int64)]
        start, of_type = z[controls[chosen]], types[chosen]
        if not treatments:
            return start, of_type, start
        moved = start.copy()
        for name in np.unique(of_type):
            here = of_type == name
            for treatment in treatments:
                cells, weights = self._perturbed(state, treatment, name)
                if method == "shift":
                    moved[here] += self._shift(state, treatment, name)
                else:
                    targets = z[rng.choice(cells, here.sum(), p=weights / weights.sum())]
                    rows, columns = linear_sum_assignment(cdist(start[here], targets, "sqeuclidean"))
                    moved[np.flatnonzero(here)[rows]] = targets[columns]
        return moved, of_type, start

    def _types_of(self, screen: Any, treatments: tuple[str, ...], cell_type: str | None) -> list[str]:
        """Return the cell types in which all treatments occur."""
        every = sorted(set(screen.cell_type))
        if cell_type is not None:
            check_one_of("cell_type", cell_type, every)
            every = [cell_type]
        found = set(zip(screen.target, screen.cell_type, strict=True))
        return [name for name in every if all((t, name) in found for t in treatments)]

    @staticmethod
    def _perturbed(state: dict[str, Any], treatment: str, cell_type: str) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and weights of the cells of a category."""
        screen = state["screen"]
        (category,) = np.flatnonzero((screen.target == treatment) & (screen.cell_type == cell_type))
        here = screen.category == category
        return screen.row[here], state["weights"][here]

    def _shift(self, state: dict[str, Any], treatment: str, cell_type: str) -> np.ndarray:
        cells, weights = self._perturbed(state, treatment, cell_type)
        controls, types = self._controls()
        centre = state["z"][controls[types == cell_type]].mean(0)
        return np.average(state["z"][cells], axis=0, weights=weights) - centre

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
            Control cells, or any cells for ``perturbation=None``. Default: the model's own.
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
            state, types = self._latent_state(), self._cell_types(data)[positions]
            shifts: dict[tuple[str, str], np.ndarray] = {}
            for i, (label, cell_type) in enumerate(zip(targets, types, strict=True)):
                treatments = self._rule.treatments(label)
                if not self._types_of(state["screen"], treatments, cell_type):
                    msg = f"Every treatment must have cells of the cell's type; received {label!r} for a cell of {cell_type!r}."
                    raise ValueError(msg)
                for treatment in treatments:
                    if (treatment, cell_type) not in shifts:
                        shifts[treatment, cell_type] = self._shift(state, treatment, cell_type)
                    z[i] += shifts[treatment, cell_type]
        x = self._decode(z, output, make_generator(seed, self.module.device), batch_size)
        return self._values(x, self._counterfactual_obs(data, positions, targets, artifact=False))

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
        seed: int | None = None,
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
        if not share_basal or expectation != "exact":
            msg = f"{type(self).__name__} compares expected values of the same controls; received share_basal={share_basal}, expectation={expectation!r}: leave them out."
            raise NotImplementedError(msg)
        control = self._rule.control_name
        labels = [x for x in self._requested_labels(perturbations) if perturbations is not None or x != control]
        self._check_request(artifact=False, library_size=library_size, output="mean", batch=None)
        check_positive("n_particles", n_particles, integer=True)
        generator = make_generator(seed, self.module.device)
        rng = np.random.default_rng(generator.initial_seed())
        state, draws = self._latent_state(), rng.random(n_particles)
        means, stds = [], []
        for label in labels:
            moved, _, start = self._moved(state, label, draws, "shift", None, rng)
            difference = self._decode(moved, "mean", generator, None) - self._decode(start, "mean", generator, None)
            means.append(difference.mean(0))
            stds.append(difference.std(0))
        index = pd.Index(labels, dtype=str)
        obs = pd.DataFrame({COLUMNS.PERTURBATION: pd.Categorical(labels)}, index=index)
        effects = AnnData(np.stack(means), obs=obs, var=pd.DataFrame(index=self._genes), uns={CONTROL_UNS_KEY: control})
        effects.layers["std"] = np.stack(stds)
        return effects

    def get_perturbation_effects(self) -> AnnData:
        """Return the shift of every treatment in the latent space, averaged over cell types by their cells.

        Returns
        -------
        AnnData of treatments x latent dimensions.
        """
        state = self._latent_state()
        screen = state["screen"]
        targets = sorted(set(screen.target))
        shifts = np.zeros((len(targets), self.module.n_latent), dtype=np.float32)
        for i, target in enumerate(targets):
            types = screen.cell_type[screen.target == target]
            sizes = [len(self._perturbed(state, target, name)[0]) for name in types]
            shifts[i] = np.average([self._shift(state, target, name) for name in types], axis=0, weights=sizes)
        var = pd.DataFrame(index=[f"latent_{i}" for i in range(shifts.shape[1])])
        return AnnData(shifts, obs=pd.DataFrame(index=pd.Index(targets, dtype=str)), var=var)
