"""What a benchmark is run on, and the cells of its matrix."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scvi_cradle._labels import LabelRule
from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.benchmark._models import PRESETS, REGISTRY

EXPERIMENTS = {
    "effects": "effects of held-out cells or combinations, QC pass rates, bounds (CRADLE-VAE, tables 2 to 5; SAMS-VAE, table 1)",
    "ood": "unseen combinations, trained on singles and a share of the other combinations (SAMS-VAE, norman-ood)",
    "efficiency": "seen combinations, trained on singles and a share of their cells (SAMS-VAE, norman-data-efficiency)",
    "doubles": "all combinations, trained on controls and singles (PerturbedVAE)",
}
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
THRESHOLDS = (3.0, 4.0, 5.0)
WITH_FRACTIONS = ("ood", "efficiency")


class Cell(NamedTuple):
    """One cell of the matrix.

    Parameters
    ----------
    experiment
        A key of ``EXPERIMENTS``.
    fraction
        Share of the training combinations, or of their cells; ``None`` for experiments without.
    threshold
        Width of the QC thresholds in MADs; ``None``: flags of the user.
    model
        A key of the registry of models.
    seed
        Seed of the split, of the training and of generated cells.
    """

    experiment: str
    fraction: float | None
    threshold: float | None
    model: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What a benchmark is run on.

    Parameters
    ----------
    data
        AnnData file with raw counts.
    perturbation_key
        Column of ``obs`` with the labels.
    control, sep
        How labels are read, as in :meth:`scvi_cradle.model.CradleVAE.setup_anndata`.
    layer
        Layer with the counts; ``None``: ``X``.
    batch_key
        Column of ``obs`` with batches, for the models and for QC thresholds.
    artifact_key
        Column of ``obs`` that is True for cells that failed quality control.
    thresholds
        Widths of the QC thresholds in MADs, each a part of the matrix; they are fitted on training cells. ``None``:
        3, 4 and 5 unless there is an ``artifact_key``, with which they cannot come together.
    split_key
        Column of ``obs`` with ``"train"``, ``"val"``, ``"test"``, ``"unused"``, for the experiment ``"effects"``.
        ``None``: :func:`scvi_cradle.pp.split_perturbations` holds out combinations, or cells where there are none.
    experiment
        ``"effects"``, ``"ood"``, ``"efficiency"`` or ``"doubles"``.
    fractions
        Shares of the training combinations (``"ood"``) or of their cells (``"efficiency"``). ``None``: 0, .25, .5, .75, 1.
    preset
        Settings of the models: ``"recommended"``, ``"paper"``, or those published for a data set, ``"norman"``,
        ``"dixit"``, ``"replogle"``, ``"adamson"``.
    models
        Names of models and baselines. ``None``: all.
    seeds
        One split, one training and one set of generated cells each.
    max_steps
        Training steps. ``None``: the preset's.
    """

    data: Path
    perturbation_key: str
    control: tuple[str, ...] = ("control",)
    sep: str | None = "+"
    layer: str | None = None
    batch_key: str | None = None
    artifact_key: str | None = None
    thresholds: tuple[float, ...] | None = None
    split_key: str | None = None
    experiment: str = "effects"
    fractions: tuple[float, ...] | None = None
    preset: str = "recommended"
    models: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    max_steps: int | None = None

    @property
    def rule(self) -> LabelRule:
        """How labels of the file are read."""
        return LabelRule.create(list(self.control), self.sep)

    def cells(self) -> list[Cell]:
        """Return the matrix, those cells first that every table needs."""
        thresholds = (None,) if self.artifact_key is not None else map(float, self.thresholds or THRESHOLDS)
        fractions = (self.fractions or FRACTIONS) if self.experiment in WITH_FRACTIONS else (None,)
        models = self.models or tuple(REGISTRY)
        found = itertools.product(self.seeds, fractions, models, thresholds)
        return [Cell(self.experiment, None if f is None else float(f), t, m, s) for s, f, m, t in found]


def check_settings(settings: BenchmarkSettings) -> None:
    """Raise ``ValueError`` for settings that no data set could be used with."""
    check_one_of("experiment", settings.experiment, tuple(EXPERIMENTS))
    check_one_of("preset", settings.preset, PRESETS)
    for model in settings.models or ():
        check_one_of("models", model, tuple(REGISTRY))
    for threshold in settings.thresholds or ():
        check_positive("thresholds", threshold)
    for seed in settings.seeds:
        check_positive("seeds", seed, integer=True, allow_zero=True)
    if settings.max_steps is not None:
        check_positive("max_steps", settings.max_steps, integer=True)
    for fraction in settings.fractions or ():
        if not 0 <= fraction <= 1:
            msg = f"`fractions` must lie between 0 and 1; received {fraction!r}."
            raise ValueError(msg)
    for name in ("models", "seeds", "thresholds", "fractions"):
        values = getattr(settings, name)
        if values is not None and (not values or len(set(values)) < len(values)):
            msg = f"`{name}` must list at least one value, each once; received {list(values)!r}."
            raise ValueError(msg)
    if settings.artifact_key is not None and settings.thresholds is not None:
        msg = (
            f"Cells fail by given flags or by thresholds; received artifact_key={settings.artifact_key!r} and "
            f"thresholds={list(settings.thresholds)!r}: leave one out."
        )
        raise ValueError(msg)
    if settings.fractions is not None and settings.experiment not in WITH_FRACTIONS:
        msg = f"`fractions` belong to the experiments {WITH_FRACTIONS}; received experiment={settings.experiment!r}: leave them out."
        raise ValueError(msg)
    if settings.split_key is not None and settings.experiment != "effects":
        msg = (
            f"The experiment {settings.experiment!r} makes a split of its own; received "
            f"split_key={settings.split_key!r}: leave it out, or use experiment='effects'."
        )
        raise ValueError(msg)
