"""What a model learns from its training cells before gradient descent."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from scvi import REGISTRY_KEYS, settings

from scvi_cradle._constants import KEYS
from scvi_cradle.data import StoredManager, TrainingStatistics, check_values, holds_counts, training_statistics
from scvi_cradle.dataloaders import LabelledDataModule
from scvi_cradle.model._base import warn
from scvi_cradle.model._quality import QualityMixin


class LearningMixin(QualityMixin):
    """Per-treatment counts, moments, library sizes and reference profiles."""

    _non_negative: bool

    def _sources(self) -> np.ndarray | None:
        """Return which labels new cells take library sizes and covariates from, shape ``(n_labels,)``; None: all."""
        return None

    def _check_training_controls(self, train_indices: np.ndarray) -> None:
        codes = np.asarray(self.adata_manager.get_from_registry(KEYS.PERTURBATION)).ravel().astype(int)
        control = self._table.labels.index(self._rule.control_name)
        if not (codes[train_indices] == control).any():
            msg = (
                f"The training split must hold control cells; received {len(train_indices)} training cells without one."
            )
            raise ValueError(msg)

    def _learn_from_training_cells(self, train_indices: np.ndarray, source: LabelledDataModule | None = None) -> None:
        """Set what is learnt outside gradient descent; moments and output bias only before the first training."""
        table = self._table
        members = table.padded_members()
        is_counts = holds_counts(self._state(REGISTRY_KEYS.X_KEY))
        statistics = training_statistics(
            self.adata_manager if source is None else source.manager,
            train_indices,
            members=members,
            n_treatments=len(table.treatments),
            log=self.module.log_input,
            statistic=self.module.references.statistic if self.module.has_artifact else "median",
            sources=self._sources(),
            keep_pools=self.module.has_artifact and self.module.references.resample,
            check=partial(check_values, counts=is_counts, non_negative=self._non_negative),
            collected=None if source is None else source.collected,
            seed=settings.seed or 0,
        )
        if is_counts and statistics.n_empty and (source is not None or isinstance(self.adata_manager, StoredManager)):
            warn(
                f"{statistics.n_empty} training cells have no count at all; they are kept with a library size of 1: remove them if they are empty droplets."
            )
        self._set_statistics(statistics, len(train_indices))
        self.module.set_labels(members)
        self.label_counts_ = {label: int(n) for label, n in zip(table.labels, statistics.n_obs_per_label, strict=True)}
        self.libraries_ = statistics.libraries
        self._shrinkage = None
        if self.module.has_artifact:
            self._set_references(statistics)

    def _set_references(self, statistics: TrainingStatistics) -> None:
        """Keep the reference profiles of the counterfactual term."""
        profiles, labels = statistics.reference_profiles, self._table.labels
        self.module.references.set(statistics.reference_labels, profiles.toarray(), statistics.pools)
        self.references_ = {
            "labels": [labels[code] for code in statistics.reference_labels],
            "n_failed": {t: int(n) for t, n in zip(labels, statistics.n_failed_per_label, strict=True) if n},
            "data": profiles.data,
            "indices": profiles.indices,
            "indptr": profiles.indptr,
        }

    def _set_statistics(self, statistics: TrainingStatistics, n_train: int) -> None:
        module = self.module
        with torch.no_grad():
            module.n_obs_per_treatment.copy_(torch.as_tensor(statistics.n_obs_per_treatment))
            module.n_train.fill_(n_train)
            if module.has_artifact:
                module.n_failed.fill_(statistics.n_failed)
            if not self.is_trained_:
                module.input_mean.copy_(torch.as_tensor(statistics.input_mean))
                module.input_std.copy_(torch.as_tensor(statistics.input_std))
                if self._architecture["output_bias"] == "data":
                    module.decoder.initialize_output(
                        *(
                            torch.as_tensor(v).float()
                            for v in (statistics.gene_share, statistics.input_mean, statistics.input_std)
                        )
                    )
