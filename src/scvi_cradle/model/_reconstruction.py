"""Training of the quantile-hurdle autoencoder, and reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS

from scvi_cradle._constants import CONTROL_UNS_KEY, KEYS
from scvi_cradle._validation import check_key, check_one_of, check_positive, preview
from scvi_cradle.data import TrainingStatistics, WeightedSplitter, empirical_quantiles, expression_of
from scvi_cradle.model._base import check_indices
from scvi_cradle.model._draws import make_generator
from scvi_cradle.model._training import TrainingMixin
from scvi_cradle.train import ContinuedTrainingPlan

Kind = Literal["sample", "mean", "median"]
KINDS = ("sample", "mean", "median")


class ReconstructionMixin(TrainingMixin):
    """Training and decoding of :class:`~scvi_cradle.model.QuantileHurdleAE`."""

    _data_splitter_cls = WeightedSplitter
    _looks_up_cells = True
    _training_plan_cls = ContinuedTrainingPlan
    _cell_weights: np.ndarray | None = None
    moves_: dict[str, Any] | None

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
            given = priorities.index.astype(str)
            if not given.is_unique or set(given) != set(self._genes):
                msg = f"A Series of priorities must have every gene once; received {preview(sorted(set(given) ^ set(self._genes))) or 'doubled names'} too many or missing: reindex it with `model.get_var_names()`."
                raise ValueError(msg)
            priorities = priorities.set_axis(given).loc[self._genes]
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
        """Keep the counts; the input is not standardised."""
        module = self.module
        with torch.no_grad():
            module.n_obs_per_treatment.copy_(torch.as_tensor(statistics.n_obs_per_treatment))
            module.n_train.fill_(n_train)

    def _learn_from_training_cells(self, train_indices: np.ndarray, source: Any = None) -> None:
        super()._learn_from_training_cells(train_indices, source)
        if not self.is_trained_:
            matrix = self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)
            probability, quantiles = empirical_quantiles(matrix, self.module.levels.cpu().numpy(), train_indices)
            self.module.initialize_output(torch.as_tensor(probability), torch.as_tensor(quantiles))

    def _diagnose(self) -> None:
        """Nothing is sampled in training, so that nothing can collapse to a prior."""
        self.diagnostics_, self.moves_ = {}, None

    def get_diagnostics(self, *, seed: int = 0) -> dict[str, float]:
        """Not offered: there is no prior that latent variables could collapse to.

        Parameters
        ----------
        seed
            Not used.

        Raises
        ------
        NotImplementedError
            Always.
        """
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
        obs = expression_of(data, mod_key).obs
        check_key(obs, self._cell_type_key, "adata.obs", "cell_type_key")
        return obs[self._cell_type_key].astype(str).to_numpy(dtype=object)

    def _state_data(self, key: str) -> dict[str, Any]:
        return self.registry_["field_registries"][key]["data_registry"]
