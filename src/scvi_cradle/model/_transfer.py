"""Transfer of sVAE+ to interventions without training cells."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scvi_cradle._constants import KEYS
from scvi_cradle.model._base import check_indices
from scvi_cradle.model._training import TrainingMixin

OPEN_LOGIT = 30.0  # a mask that is drawn as one (or, negative, as zero) every time in single precision


class TransferMixin(TrainingMixin):
    """Transfer to unseen interventions."""

    def transfer_to_unseen(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        max_epochs: int = 300,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Learn interventions that had no training cells, with everything else fixed (Lopez et al. 2023).

        Masks of seen interventions are rounded to 0 or 1 and fixed, networks and shifts trained on without the penalty
        on masks, and then the shifts of unseen interventions, with open masks, are fitted to their cells. Given the
        networks this optimum is known: the mean of ``q(z | x)`` over the cells of the intervention (where combinations are
        additive, over its cells without other treatments). Masks stay fixed from then on, also in a later :meth:`train`.

        Parameters
        ----------
        adata, indices
            Cells of unseen interventions, whose labels the data of :meth:`setup_anndata` must have held. Default: the
            test cells of the model's split.
        max_epochs
            Epochs of the training with fixed masks (original: 300); 0 leaves the networks as they are.
        batch_size
            Cells of a batch in these epochs; default: as in :meth:`train`.
        **kwargs
            Further arguments of :meth:`train` for these epochs.

        Returns
        -------
        Labels that were learnt; they can be asked for like seen ones until the model is trained again.

        Raises
        ------
        ValueError
            If the cells hold no intervention without training cells, or if there are none.
        """
        self._trained_counts()
        data = self._validate_anndata(adata)
        positions = self._held_out() if adata is None and indices is None else check_indices(indices, data)
        codes = np.asarray(self.get_anndata_manager(data, required=True).get_from_registry(KEYS.PERTURBATION))
        self._make_data_loader(data, indices=positions)  # sets the treatments of the data's label codes
        members = self.module.label_members.cpu().numpy()[codes.ravel()[positions].astype(int)]
        treatment = np.where((members >= 0).sum(axis=1) == 1, members[:, 0], -1)  # of cells with one treatment
        n_obs = self.module.n_obs_per_treatment.cpu().numpy()
        unseen = np.unique(treatment[(treatment >= 0) & (n_obs[treatment] == 0)])
        if not len(unseen):
            msg = f"`transfer_to_unseen` needs cells of interventions without training cells; received {len(positions)} cells of seen ones{'' if self._unique else ' and of combinations'} only: hold interventions out with `split_key`."
            raise ValueError(msg)
        before = deepcopy(self.module.state_dict())
        self._fix_masks(unseen)
        if max_epochs:
            parts = [self.train_indices_, self.validation_indices_, self.test_indices_]
            split = [np.empty(0, dtype=int) if part is None else np.asarray(part) for part in parts]
            splitter = {"external_indexing": split}
            try:
                self.train(max_epochs=max_epochs, batch_size=batch_size, datasplitter_kwargs=splitter, **kwargs)
            except Exception:
                self.module.load_state_dict(before)
                raise
        self._fit_shifts(data, positions, treatment, unseen)
        return [self._table.treatments[t] for t in unseen]

    def _fix_masks(self, unseen: np.ndarray) -> None:
        mask = self.module.effects.mask
        opened = mask.probability > 0.5
        opened[torch.as_tensor(unseen, device=opened.device)] = True
        with torch.no_grad():
            mask.logits.copy_(torch.where(opened, OPEN_LOGIT, -OPEN_LOGIT))
        self.module.global_weight.zero_()

    def _learn_from_training_cells(self, train_indices: np.ndarray, source: Any = None) -> None:
        super()._learn_from_training_cells(train_indices, source)
        self.module.effects.mask.logits.requires_grad = bool(self.module.global_weight > 0)  # also in a loaded model

    @torch.inference_mode()
    def _fit_shifts(self, data: AnnData, positions: np.ndarray, treatment: np.ndarray, unseen: np.ndarray) -> None:
        chosen = np.isin(treatment, unseen)
        batches = self._latent_batches(data, positions[chosen], None, n_samples=1, sample=False)
        means = torch.cat([latent.q_basal.loc[0] for _, latent in batches])
        counts = dict(self._trained_counts())
        for t in unseen:
            cells = torch.as_tensor(treatment[chosen] == t, device=means.device)
            self.module.effects.embedding.loc[t] = means[cells].mean(0)
            self.module.n_obs_per_treatment[t] = cells.sum()
            counts[self._table.treatments[t]] = int(cells.sum())
        self.label_counts_ = counts
