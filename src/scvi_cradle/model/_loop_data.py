"""The cells of the perturbation-probability loop: split, categories, evidence of guides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS

from scvi_cradle._constants import KEYS
from scvi_cradle.data import guide_counts, split_indices
from scvi_cradle.model._base import warn
from scvi_cradle.model._categories import Screen, make_screen
from scvi_cradle.model._reconstruction import ReconstructionMixin
from scvi_cradle.pp import guide_prior

VALIDATION_SHARE = 0.2


class LoopDataMixin(ReconstructionMixin):
    """Cells by category."""

    def _loop_split(self, split_key: str | None, seed: int) -> list[np.ndarray]:
        if split_key is not None:
            return split_indices(self.adata_manager, split_key)
        n = self.adata.n_obs
        labels, types = self._observed_labels(self.adata, np.arange(n)), self._cell_types(self.adata)
        strata = pd.Series(types.astype(str)).str.cat(np.asarray(labels).astype(str), sep="\t")
        order = np.random.default_rng(seed).permutation(n)
        rank = strata.iloc[order].groupby(strata.iloc[order].to_numpy()).cumcount()
        size = strata.map(strata.value_counts()).to_numpy()[order]
        is_val = np.zeros(n, dtype=bool)
        is_val[order] = rank.to_numpy() < np.floor(VALIDATION_SHARE * size)
        return [np.flatnonzero(~is_val), np.flatnonzero(is_val), np.zeros(0, dtype=np.int64)]

    def _make_screen(self, split: Sequence[np.ndarray]) -> Screen:
        n = self.adata.n_obs
        is_train, used = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        is_train[split[0]] = True
        used[np.concatenate([split[0], split[1]])] = True
        labels, types = self._observed_labels(self.adata, np.arange(n)), self._cell_types(self.adata)
        treatments = self._table.treatments
        prior, guide = self._guide_evidence(labels, types, treatments, used)
        of_label = {str(label): self._rule.treatments(label) for label in labels.categories}
        return make_screen(labels, of_label, treatments, types, prior, guide, used, is_train)

    def _guide_evidence(
        self, labels: pd.Categorical, types: np.ndarray, treatments: tuple[str, ...], used: np.ndarray
    ) -> tuple[pd.DataFrame | None, np.ndarray | None]:
        """Return the guide prior and the most abundant guide of every cell and treatment, None without guide counts."""
        fields = self.registry_["field_registries"]
        if KEYS.GUIDES not in fields:
            return None, None
        note = fields[KEYS.GUIDES]["state_registry"]
        counts, targets = guide_counts(self.adata, note, self._state_data(REGISTRY_KEYS.X_KEY).get("mod_key"))
        of_used = guide_prior(
            counts[used],
            np.asarray(labels).astype(str)[used],
            targets,
            cell_types=types[used],
            control=self._rule.control_name,
            sep=self._rule.sep,
        ).reindex(columns=list(treatments), fill_value=0.0)
        prior = pd.DataFrame(0.0, index=np.arange(len(used)), columns=list(treatments))
        prior.loc[used] = of_used.to_numpy()
        guide = np.zeros((counts.shape[0], len(treatments)), dtype=np.int64)
        dense, of_guide = counts.tocsc(), np.array(targets, dtype=object)
        for t, treatment in enumerate(treatments):
            columns = np.flatnonzero(of_guide == treatment)
            if len(columns):
                guide[:, t] = np.asarray(dense[:, columns].argmax(axis=1)).ravel()
        return prior, guide

    def _warn_small(self, screen: Screen) -> None:
        small = ~screen.is_large_enough
        if small.any():
            names = [f"{t} ({c})" for t, c in zip(screen.target[small], screen.cell_type[small], strict=True)]
            warn(
                f"{len(names)} categories have fewer than 10 cells or controls for training ({', '.join(names[:5])}): "
                "their probabilities are those of the guide prior alone."
            )

    def _screen(self) -> Screen:
        """Return the categories as they were in the loop, or those of the cells that the model was trained on."""
        kept = (getattr(self, "loop_", None) or {}).get("screen")
        if kept is None:
            return self._make_screen([self.train_indices_, self.validation_indices_])
        names = {k: np.array(kept[k], dtype=object) for k in ("target", "cell_type")}
        return Screen(**(kept | names))

    def _controls(self) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and cell types of training and validation controls."""
        used = np.sort(np.concatenate([self.train_indices_, self.validation_indices_])).astype(np.int64)
        labels = np.asarray(self._observed_labels(self.adata, used)).astype(str)
        controls = used[labels == self._rule.control_name]
        return controls, self._cell_types(self.adata)[controls]

    def _needs_training_data(self, what: str) -> None:
        if not self._has_training_data():
            msg = f"{what} need the training data; received a model without them: load it with `adata`."
            raise RuntimeError(msg)
