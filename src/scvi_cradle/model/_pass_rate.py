"""QC pass rates of generated cells, for models that know which cells failed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd
from anndata import AnnData
from mudata import MuData

from scvi_cradle import metrics
from scvi_cradle._constants import COLUMNS, QC_UNS_KEY
from scvi_cradle.model._quality import QualityMixin


class PassRateMixin(QualityMixin):
    """QC pass rates."""

    def _keep_qc_record(self) -> None:
        self.qc_record_ = stored_qc_record(self.adata, self._artifact_key)

    def _attach(self, screen: Any) -> None:
        super()._attach(screen)
        self._keep_qc_record()

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
            real = self._training_cells()
            table = metrics.qc_pass_rate(real, generated, thresholds=record, artifact_key=COLUMNS.ARTIFACT)
        table.attrs["diagnostics"] = self.diagnostics_
        return table


def stored_qc_record(data: AnnData | MuData | None, artifact_key: str | None) -> dict[str, Any] | None:
    """Return a copy of the thresholds that :func:`scvi_cradle.pp.qc_label` stored for this flag, if any."""
    if data is None or artifact_key is None:
        return None
    sources = [data, *(data.mod.values() if isinstance(data, MuData) else ())]
    records = [s.uns[QC_UNS_KEY] for s in sources if QC_UNS_KEY in s.uns]
    return copy.deepcopy(dict(records[0])) if records and records[0].get("key_added") == artifact_key else None
