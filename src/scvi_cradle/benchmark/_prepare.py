"""What the demo does before training: read or simulate, hold out, label, register."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle import datasets, pp
from scvi_cradle._constants import COLUMNS, QC_UNS_KEY
from scvi_cradle._labels import LabelRule, canonical_labels, check_has_control
from scvi_cradle._validation import as_flags, check_key, preview
from scvi_cradle.benchmark._screen import read_counts, scored_labels
from scvi_cradle.model import CradleVAE

LOGGER = logging.getLogger("scvi_cradle.benchmark.demo")
SIMULATION = {"n_cells": 4000, "n_genes": 500, "n_perturbations": 12, "n_combinations": 16}
SPLIT = "split"
TRUE_ARTIFACT = "true_artifact"
MANY_VALUES = 5e7


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo is run on.

    Parameters
    ----------
    data
        AnnData file with raw counts; ``None``: a simulated screen.
    perturbation_key
        Column of ``obs`` with the labels; needed with ``data``.
    control, sep, layer, batch_key
        As in :meth:`scvi_cradle.model.CradleVAE.setup_anndata`.
    artifact_key
        Column of ``obs`` that is True for cells that failed quality control; ``None``:
        :func:`scvi_cradle.pp.qc_label` makes one.
    n_mads
        Width of its thresholds.
    max_steps
        Training steps; ``None``: the model's default.
    seed
        Seed of the simulation, the split, the training and the generated cells.
    simulation
        Arguments of :func:`scvi_cradle.datasets.simulate_perturbseq`.
    """

    data: Path | None = None
    perturbation_key: str | None = None
    control: tuple[str, ...] = ("control",)
    sep: str | None = "+"
    layer: str | None = None
    batch_key: str | None = None
    artifact_key: str | None = None
    n_mads: float = 5.0
    max_steps: int | None = None
    seed: int = 0
    simulation: dict[str, Any] = field(default_factory=lambda: dict(SIMULATION))

    @property
    def key(self) -> str:
        """Column with the labels."""
        return self.perturbation_key or COLUMNS.PERTURBATION

    @property
    def label_arguments(self) -> dict[str, Any]:
        """How labels and counts are read, for functions of the package that take an AnnData."""
        return {"perturbation_key": self.key, "control": list(self.control), "sep": self.sep}


@dataclass(frozen=True)
class Prepared:
    """Labelled, split and registered data.

    Parameters
    ----------
    adata
        The data, with ``obs["split"]`` and the artifact column.
    scheme
        ``"combinations"`` or ``"cells"``: what was held out.
    labels
        Canonical label of every cell, shape ``(n_cells,)``.
    failed
        True for cells that failed quality control, shape ``(n_cells,)``.
    held_out
        Perturbations to predict, with enough held-out cells that passed.
    control_split
        The part of the split whose controls the measured effects are taken against; the model is not trained on it.
    control_name
        Canonical label of controls.
    report
        Result of :func:`scvi_cradle.pp.qc_report`.
    """

    adata: AnnData
    scheme: str
    labels: np.ndarray
    failed: np.ndarray
    held_out: list[str]
    control_split: str
    control_name: str
    report: pd.DataFrame

    def rows(self, part: str, *, controls: bool = True) -> np.ndarray:
        """Mark the cells of ``"train"``, or the held-out cells to predict (``"test"``) with their controls."""
        split = self.adata.obs[SPLIT].astype(str).to_numpy()
        if part == "train":
            return split == "train"
        held_out = (split == "test") & np.isin(self.labels, self.held_out)
        return held_out | ((self.labels == self.control_name) & (split == self.control_split) & controls)

    def passed(self, part: str) -> AnnData:
        """Return the cells of :meth:`rows` that passed quality control."""
        return self.adata[self.rows(part) & ~self.failed]

    @property
    def record(self) -> Any:
        """Thresholds of the quality control, or ``None`` if the flags came from elsewhere."""
        return self.adata.uns.get(QC_UNS_KEY)


def prepare(settings: DemoSettings) -> Prepared:
    """Read, split, label and register the data.

    Parameters
    ----------
    settings
        What to run on.

    Raises
    ------
    FileNotFoundError, KeyError, ValueError, TypeError
        For input that cannot be used, in one sentence.
    """
    adata = _read(settings)
    rule = LabelRule.create(list(settings.control), settings.sep)
    labels = canonical_labels(adata.obs[settings.key], rule)
    check_has_control(labels, rule, f"`obs[{settings.key!r}]`")
    names = [label for label in labels.categories if label != rule.control_name]
    if not names:
        msg = f"`obs[{settings.key!r}]` must hold at least one perturbation; received only {rule.control_name!r}."
        raise ValueError(msg)
    n_pairs = sum(len(rule.treatments(name)) > 1 for name in names)
    LOGGER.info(
        "      %s cells x %s genes; %d perturbations, %d of them combinations; %d controls",
        *(f"{adata.n_obs:,}", f"{adata.n_vars:,}", len(names), n_pairs, int((labels == rule.control_name).sum())),
    )
    if adata.n_obs * adata.n_vars > MANY_VALUES:
        LOGGER.info("      this is a large file: training takes minutes; fewer genes or --max-steps shorten it")
    scheme = _split(adata, settings, n_pairs)
    failed = _label(adata, settings)
    return _register(adata, settings, scheme, np.asarray(labels, dtype=object), failed, rule)


def _read(settings: DemoSettings) -> AnnData:
    if settings.data is None:
        LOGGER.info("[1/6] Simulate a screen of which everything is known")
        return datasets.simulate_perturbseq(**settings.simulation, seed=settings.seed)
    LOGGER.info("[1/6] Read %s", settings.data)
    return read_counts(settings.data, settings.perturbation_key, settings.layer)


def _split(adata: AnnData, settings: DemoSettings, n_combinations: int) -> str:
    """Hold out combinations, or cells where no combination can be."""
    common = settings.label_arguments | {"seed": settings.seed, "key_added": SPLIT}
    scheme = "cells"
    if n_combinations:
        try:
            pp.split_perturbations(adata, scheme="combinations", **common)
            scheme = "combinations"
        except ValueError as error:
            LOGGER.info("      no combination can be held out: %s", error)
    if scheme == "cells":
        pp.split_perturbations(adata, scheme="cells", **common)
    counts = adata.obs[SPLIT].value_counts()
    what = (
        "whole combinations, never seen in training"
        if scheme == "combinations"
        else "a quarter of the cells of every label"
    )
    LOGGER.info("[2/6] Hold out %s: %s", what, ", ".join(f"{counts.get(s, 0):,} {s}" for s in ("train", "val", "test")))
    return scheme


def _label(adata: AnnData, settings: DemoSettings) -> np.ndarray:
    """Flag failed cells with thresholds of the training cells, unless the user has flags."""
    key = settings.artifact_key
    if key is not None:
        check_key(adata.obs, key, "adata.obs", "artifact_key")
        failed = as_flags(adata.obs[key], f"`obs[{key!r}]`", "drop these cells, or leave out `--artifact-key`")
        record = adata.uns.get(QC_UNS_KEY)
        if record is not None and str(record.get("key_added", "")) != key:
            del adata.uns[QC_UNS_KEY]  # thresholds of other flags
        LOGGER.info("[3/6] Quality labels of obs[%r]: %.1f %% of the cells failed", key, 100 * failed.mean())
        return failed
    training = (adata.obs[SPLIT] == "train").to_numpy()
    pp.qc_label(
        adata,
        n_mads=settings.n_mads,
        layer=settings.layer,
        batch_key=settings.batch_key,
        reference=training,
        seed=settings.seed,
    )
    failed = adata.obs[COLUMNS.ARTIFACT].to_numpy(dtype=bool)
    flags = [c for c in (f"qc_{c}" for c in np.ravel(adata.uns[QC_UNS_KEY]["criteria"])) if c in adata.obs]
    shares = ", ".join(f"{c.removeprefix('qc_')} {100 * adata.obs[c].mean():.1f} %" for c in flags)
    LOGGER.info(
        "[3/6] Quality labels, thresholds from training cells: %.1f %% of the cells failed (%s)",
        *(100 * failed.mean(), shares),
    )
    if TRUE_ARTIFACT in adata.obs and settings.data is None:
        true = adata.obs[TRUE_ARTIFACT].to_numpy(dtype=bool)
        LOGGER.info(
            "      known truth: %.0f %% of the simulated artifacts are found, %.1f %% of the clean cells are flagged",
            *(100 * failed[true].mean(), 100 * failed[~true].mean()),
        )
    return failed


def _register(
    adata: AnnData, settings: DemoSettings, scheme: str, labels: np.ndarray, failed: np.ndarray, rule: LabelRule
) -> Prepared:
    artifact_key = settings.artifact_key or COLUMNS.ARTIFACT
    report = pp.qc_report(adata, **settings.label_arguments, artifact_key=artifact_key, batch_key=settings.batch_key)
    confounded = report.index[report["confounded"].to_numpy(dtype=bool)]
    LOGGER.info(
        "      perturbations whose cells fail clearly more often than controls: %s",
        preview(confounded) or "none",
    )
    held_out, control_split = _scored(adata, labels, failed, rule.control_name)
    CradleVAE.setup_anndata(
        adata,
        **settings.label_arguments,
        layer=settings.layer,
        batch_key=settings.batch_key,
        artifact_key=artifact_key,
    )
    return Prepared(adata, scheme, labels, failed, held_out, control_split, rule.control_name, report)


def _scored(adata: AnnData, labels: np.ndarray, failed: np.ndarray, control: str) -> tuple[list[str], str]:
    """Return the perturbations to predict and the part of the split that their controls are from."""
    split = adata.obs[SPLIT].astype(str).to_numpy()
    kept, control_split, enough = scored_labels(labels, split, failed, control)
    if left_out := sorted(set(labels[split == "test"]) - set(kept) - {control}):
        LOGGER.info("      not scored, fewer than %d held-out cells that passed: %s", enough, preview(left_out))
    return kept, control_split
