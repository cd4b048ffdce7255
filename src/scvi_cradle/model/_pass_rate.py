"""QC pass rates of generated cells, for models that know which cells failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from scvi_cradle import metrics
from scvi_cradle._constants import COLUMNS
from scvi_cradle.model._quality import QualityMixin


class PassRateMixin(QualityMixin):
    """QC pass rates."""

    def qc_pass_rate(
        self,
        perturbations: str | Sequence[str] | None = None,
        *,
        n_samples: int = 100,
        library_size: float | Literal["observed"] = "observed",
        thresholds: dict[str, Any] | None = None,
        artifact: bool = False,
        seed: int | None = None,
    ) -> pd.DataFrame:
        """Return how often generated cells pass the data's QC, beside real cells (CRADLE-VAE, sec. 4.1).

        Parameters
        ----------
        perturbations
            Labels; default: all labels seen in training.
        n_samples
            Generated cells per label.
        library_size
            As in :meth:`get_generated_expression`; a fixed 1e4, as in the paper, makes the count criterion vacuous.
        thresholds
            A stored ``uns["qc_label"]``; default: the one of the training data.
        artifact
            Generate failed cells instead.
        seed
            Seed of the generated cells.

        Returns
        -------
        DataFrame as that of :func:`scvi_cradle.metrics.qc_pass_rate`: a row per label and ``"all"``; columns
        ``generated``, ``real``, ``real_passed``, the same per criterion, and ``criteria_left_out`` (the doublet
        criterion). Without the data of training (``load(adata=False)``) the columns of real cells are left out.
        ``attrs["diagnostics"]`` holds :meth:`get_diagnostics`.

        Raises
        ------
        ValueError
            If there are no thresholds: label the data with :func:`scvi_cradle.pp.qc_label`.
        """
        record = thresholds if thresholds is not None else self.qc_record_
        if record is None:
            msg = "QC thresholds are needed; the training data hold none for this flag: label them with `scvi_cradle.pp.qc_label`, or pass `thresholds=adata.uns['qc_label']`."
            raise ValueError(msg)
        record = {**record, "layer": ""}  # the cells compared here have their counts in X
        generated = self.get_generated_expression(
            perturbations, n_samples=n_samples, artifact=artifact, library_size=library_size, seed=seed
        )
        if not self._has_training_data():
            table = metrics.qc_pass_rate(generated, generated, thresholds=record)
            table = table[[c for c in table if not str(c).startswith(("real", "n_real"))]]
        else:
            real = self._real_cells(self.adata, np.asarray(self.train_indices_))
            table = metrics.qc_pass_rate(real, generated, thresholds=record, artifact_key=COLUMNS.ARTIFACT)
        table.attrs["diagnostics"] = self.diagnostics_
        return table
