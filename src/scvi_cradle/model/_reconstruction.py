"""Training of the quantile-hurdle autoencoder, reconstructions, and cells moved in its latent space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scvi import REGISTRY_KEYS

from scvi_cradle._constants import COLUMNS, CONTROL_UNS_KEY, KEYS
from scvi_cradle._validation import check_one_of, check_positive, preview
from scvi_cradle.data import TrainingStatistics, WeightedSplitter, empirical_quantiles, expression_of
from scvi_cradle.model._base import check_indices
from scvi_cradle.model._draws import as_module_input, make_generator
from scvi_cradle.model._training import TrainingMixin
from scvi_cradle.train import ContinuedTrainingPlan

Kind = Literal["sample", "mean", "median"]
KINDS = ("sample", "mean", "median")


class ReconstructionMixin(TrainingMixin):
    """Training and decoding of :class:`~scvi_cradle.model.QuantileHurdleAE`."""

    _data_splitter_cls = WeightedSplitter
    _training_plan_cls = ContinuedTrainingPlan
    _cell_weights: np.ndarray | None = None
    shifts_: dict[str, Any] | None

    # ---- training ---------------------------------------------------------------------------------------------------

    def set_gene_weights(self, priorities: Any, feature_weight: float) -> None:
        """Set the weights of genes in the objective, ``w = 1 + (feature_weight - 1) * priority`` (section 4.1).

        Parameters
        ----------
        priorities
            Priority of every gene, in [0, 1], shape ``(n_genes,)``; a Series is put in the order of the genes.
        feature_weight
            Weight of a gene of priority 1, 1 or more.

        Raises
        ------
        ValueError
            For a priority outside [0, 1], another number of genes, or a weight below 1.
        """
        if isinstance(priorities, pd.Series):
            priorities = priorities.reindex(self._genes)
        values = np.asarray(priorities, dtype=np.float64)
        if values.shape != (len(self._genes),) or not ((values >= 0) & (values <= 1)).all():
            msg = f"`priorities` must hold a number from 0 to 1 for each of {len(self._genes)} genes; received shape {values.shape}, values from {values.min(initial=np.inf):.3g} to {values.max(initial=-np.inf):.3g}."
            raise ValueError(msg)
        check_positive("feature_weight", feature_weight)
        if feature_weight < 1:
            msg = f"`feature_weight` must be 1 or more; received {feature_weight}."
            raise ValueError(msg)
        self.module.gene_weights.copy_(torch.as_tensor(1.0 + (feature_weight - 1.0) * values))

    def _splitter_arguments(self, split: list[np.ndarray]) -> dict[str, Any]:
        return {"cell_weights": self._cell_weights}

    def _set_statistics(self, statistics: TrainingStatistics, n_train: int) -> None:
        """Keep counts and moments; before the first training the decoder starts at the quantiles of the genes."""
        module = self.module
        with torch.no_grad():
            module.n_obs_per_treatment.copy_(torch.as_tensor(statistics.n_obs_per_treatment))
            module.n_train.fill_(n_train)

    def _learn_from_training_cells(self, train_indices: np.ndarray) -> None:
        super()._learn_from_training_cells(train_indices)
        if not self.is_trained_:
            matrix = self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)
            probability, quantiles = empirical_quantiles(matrix, self.module.levels.cpu().numpy(), train_indices)
            self.module.initialize_output(torch.as_tensor(probability), torch.as_tensor(quantiles))

    def _diagnose(self) -> None:
        """Nothing is sampled in training, so that nothing can collapse to a prior."""
        self.diagnostics_ = {}

    def get_diagnostics(self, *, seed: int = 0) -> dict[str, float]:
        """Not offered: there is no prior that latent variables could collapse to."""
        msg = f"{type(self).__name__} has no variational posterior to diagnose: see `history` and `pl.quantile_qq`."
        raise NotImplementedError(msg)

    def _needs_counts(self, what: str) -> None:
        msg = f"{what} needs counts; {type(self).__name__} models normalised values: compare them with `pl.quantile_qq` and `metrics.mmd_rbf`."
        raise NotImplementedError(msg)

    def _needs_density(self, what: str) -> None:
        msg = f"`{what}` needs a likelihood; {type(self).__name__} has none: see `get_reconstruction_error`."
        raise NotImplementedError(msg)

    def get_iwelbo(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Not offered: the model has no likelihood."""
        self._needs_density("get_iwelbo")
        raise AssertionError

    @torch.inference_mode()
    def get_reconstruction_error(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        dataloader: Any = None,
        return_mean: bool = True,
        n_particles: int = 1,
    ) -> dict[str, Any]:
        """Return ``{"reconstruction_loss": ...}``: quantile and weighted hurdle loss of cells (eq. 5 without penalty).

        Parameters
        ----------
        adata, indices, batch_size, dataloader, return_mean
            As in scvi-tools.
        n_particles
            Not used: the model draws nothing.
        """
        values = []
        for tensors, outputs in self._batches_with_outputs(adata, indices, batch_size, dataloader):
            generated = self.module.generative(**self.module._get_generative_input(tensors, outputs))
            loss = self.module.loss(tensors, outputs, generated)
            values.append(next(iter(loss.reconstruction_loss.values())).cpu().numpy())
        error = np.concatenate(values)
        return {"reconstruction_loss": float(error.mean(dtype=np.float64)) if return_mean else error}

    # ---- reconstructions --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def get_reconstructed_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        kind: Kind = "sample",
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> AnnData:
        """Encode cells and decode them (section 4.1).

        Parameters
        ----------
        adata, indices
            Cells; default: the model's own.
        kind
            ``"sample"``: 0 with the predicted probability, else a draw by linear interpolation between the predicted
            quantiles, which are flat beyond the outermost; ``"mean"`` and ``"median"`` of the same distribution.
        seed
            Seed of the draws; default: from torch's global generator.
        batch_size
            Cells at once.

        Returns
        -------
        AnnData of the same cells in the same order, dense float32 on the scale of the data.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        """
        self._trained_counts()
        check_one_of("kind", kind, KINDS)
        data = self._validate_anndata(adata)
        positions = check_indices(indices, data)
        generator = make_generator(seed, self.module.device)
        blocks = []
        for _, latent in self._latent_batches(data, positions, batch_size):
            blocks.append(self.module.reconstruct(latent.z[0], kind, generator).cpu().numpy())
        obs = data.obs.iloc[positions]
        return self._values(np.concatenate(blocks), obs.drop(columns=[c for c in obs if str(c).startswith("_scvi")]))

    def _values(self, x: np.ndarray, obs: pd.DataFrame) -> AnnData:
        var = pd.DataFrame(index=self._genes)
        return AnnData(x.astype(np.float32), obs=obs, var=var, uns={CONTROL_UNS_KEY: self._rule.control_name})

    # ---- moved cells ------------------------------------------------------------------------------------------------

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
            moved, types = self._moved(state, label, draws, method, cell_type, rng)
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
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return latents of controls that were moved to a label, and their cell types."""
        screen, z, treatments = state["screen"], state["z"], self._rule.treatments(label)
        controls, types = self._controls(screen)
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
            return start, of_type
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
        return moved, of_type

    def _types_of(self, screen: Any, treatments: tuple[str, ...], cell_type: str | None) -> list[str]:
        """Return the cell types in which all treatments occur."""
        every = sorted(set(screen.cell_type))
        if cell_type is not None:
            check_one_of("cell_type", cell_type, every)
            every = [cell_type]
        found = set(zip(screen.target, screen.cell_type, strict=True))
        return [name for name in every if all((t, name) in found for t in treatments)]

    @staticmethod
    def _controls(screen: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and cell types of controls."""
        types = screen.cell_type[screen.control_category]
        rows, first = np.unique(screen.control_row, return_index=True)
        return rows, types[first]

    @staticmethod
    def _perturbed(state: dict[str, Any], treatment: str, cell_type: str) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and weights of the cells of a category."""
        screen = state["screen"]
        (category,) = np.flatnonzero((screen.target == treatment) & (screen.cell_type == cell_type))
        here = screen.category == category
        return screen.row[here], state["weights"][here]

    def _shift(self, state: dict[str, Any], treatment: str, cell_type: str) -> np.ndarray:
        cells, weights = self._perturbed(state, treatment, cell_type)
        controls, types = self._controls(state["screen"])
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

    # ---- registered data --------------------------------------------------------------------------------------------

    @property
    def _cell_type_key(self) -> str | None:
        fields = self.registry_["field_registries"]
        return fields[KEYS.CELL_TYPE]["state_registry"]["original_key"] if KEYS.CELL_TYPE in fields else None

    def _cell_types(self, data: AnnData | MuData) -> np.ndarray:
        """Return the cell type of every cell as text; one type where none is registered."""
        if self._cell_type_key is None:
            return np.full(data.n_obs, "all", dtype=object)
        mod_key = self._state_data(REGISTRY_KEYS.X_KEY).get("mod_key")
        return expression_of(data, mod_key).obs[self._cell_type_key].astype(str).to_numpy(dtype=object)

    def _state_data(self, key: str) -> dict[str, Any]:
        return self.registry_["field_registries"][key]["data_registry"]

    def _screen(self) -> Any:
        raise NotImplementedError

    def _cell_probability(self) -> np.ndarray:
        raise NotImplementedError
