"""Which models and baselines are compared: one row each.

A further model gets a row in ``MODELS``; baselines come from ``scvi_cradle.baselines.__all__``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from anndata import AnnData

from scvi_cradle import baselines, model, presets
from scvi_cradle._constants import COLUMNS
from scvi_cradle._matrix import log_normalize, to_csr

PRESETS = ("recommended", "paper", *presets.DATA_SETS)
FLAG, PASSED, FAILED = "quality", "passed", "failed"  # a categorical column, for models that take it as a covariate
SPLIT = "split"
LOG_LAYER = "log"
FAMILIES = {"CradleVAE": "CradleVAE", "PerturbedVAE": "PerturbedVAE"}  # whose published settings; others: SAMSVAE


@dataclass(frozen=True)
class Row:
    """How a model is built and what it does with cells that failed quality control.

    Parameters
    ----------
    kind
        Name of the class, in ``scvi_cradle.model`` or in ``scvi_cradle.baselines``.
    failed
        ``"artifact"``: the model has a part for them; ``"all"``: it is trained on all cells and does not know;
        ``"passed"``: it is trained on cells that passed; ``"covariate"``: the flag is a covariate, off in predictions.
    settings
        Arguments of the constructor.
    expression
        What it is trained on and generates: ``"counts"``, or ``"log"``: ``log2(1 + 1e4 x / total)``, so that its effects
        are differences of means.
    """

    kind: str
    failed: Literal["artifact", "all", "passed", "covariate"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    expression: Literal["counts", "log"] = "counts"

    @property
    def is_baseline(self) -> bool:
        """Whether it is one of the predictions without a model."""
        return self.kind in baselines.__all__

    @property
    def knows_flags(self) -> bool:
        """Whether its training depends on which cells failed."""
        return self.failed != "all"


MODELS: dict[str, Row] = {
    "CradleVAE": Row("CradleVAE", "artifact"),
    "CradleVAE (w/o CF)": Row("CradleVAE", "artifact", {"cf_weight": 0.0}),
    "CradleVAE (w/o causal)": Row("CradleVAE", "artifact", {"artifact_latent": "embedding"}),
    "SAMSVAE": Row("SAMSVAE", "all"),
    "SAMSVAE (passed cells)": Row("SAMSVAE", "passed"),
    "SAMSVAE (flag as covariate)": Row("SAMSVAE", "covariate"),
    "CPAVAE": Row("CPAVAE", "all"),
    "ConditionalVAE": Row("ConditionalVAE", "all"),
    "SVAEPlus": Row("SVAEPlus", "all"),
    "SVAEPlus (lopez)": Row("SVAEPlus", "all", {"variant": "lopez"}),
    "SVAEPlus (additive)": Row("SVAEPlus", "all", {"encode_combinations": "additive"}),
    "PerturbedVAE": Row("PerturbedVAE", "all", expression="log"),
    "PerturbedVAE (published)": Row("PerturbedVAE", "all", {"preset": "paper"}, expression="log"),
    "PerturbedVAE (counts)": Row("PerturbedVAE", "all", {"likelihood": "nb"}),
}
BASELINES: dict[str, Row] = {name: Row(name, "passed") for name in baselines.__all__}
REGISTRY: dict[str, Row] = MODELS | BASELINES


def model_settings(row: Row, preset: str, max_steps: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of the constructor and of ``train``.

    Parameters
    ----------
    row
        Row of the registry.
    preset
        One of ``PRESETS``.
    max_steps
        Training steps; ``None``: the preset's.
    """
    if row.is_baseline:
        return dict(row.settings), {}
    published: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})
    if preset in presets.DATA_SETS:
        published = presets.DATA_SETS[preset].get(FAMILIES.get(row.kind, "SAMSVAE"), published)
    base = "paper" if preset in presets.DATA_SETS else preset
    known = presets.MODELS[row.kind][base][0]
    architecture = {name: value for name, value in published[0].items() if name in known}
    training = dict(published[1])
    if max_steps is not None:
        training["max_steps"] = max_steps
    return {"preset": base} | architecture | dict(row.settings), training


def resolved_settings(row: Row, preset: str, max_steps: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return :func:`model_settings` with all values of the preset, those of the constructor and those of ``train``."""
    architecture, training = model_settings(row, preset, max_steps)
    if row.is_baseline:
        return architecture, training
    known = presets.MODELS[row.kind][architecture["preset"]]
    return {**known[0], **architecture}, {**known[1], **training}


def fit(row: Row, cells: AnnData, settings: tuple[dict[str, Any], dict[str, Any]], reading: Mapping[str, Any]) -> Any:
    """Train a model, or fit a baseline, on prepared cells.

    Parameters
    ----------
    row
        Row of the registry.
    cells
        Training and validation cells: counts in ``X``; ``obs``: labels, ``"split"``, ``"artifact"``, ``"quality"``.
    settings
        Result of :func:`model_settings`.
    reading
        ``perturbation_key``, ``control``, ``sep`` and ``batch_key``.

    Returns
    -------
    The model or the baseline.
    """
    architecture, training = settings
    passed = ~cells.obs[COLUMNS.ARTIFACT].to_numpy(dtype=bool)
    if row.failed == "passed":
        cells = cells[passed]
    labels = {name: reading[name] for name in ("control", "sep")}
    if row.is_baseline:
        train = cells[(cells.obs[SPLIT] == "train").to_numpy()].copy()
        return getattr(baselines, row.kind)(**architecture).fit(train, reading["perturbation_key"], **labels)
    extra: dict[str, Any] = {"batch_key": reading["batch_key"]}
    if row.failed == "artifact":
        extra["artifact_key"] = COLUMNS.ARTIFACT
    if row.failed == "covariate":
        extra["categorical_covariate_keys"] = [FLAG]
    cells = cells.copy()
    if row.expression == "log":
        cells.layers[LOG_LAYER] = log_normalize(to_csr(cells.X)).astype(np.float32)
        extra["layer"] = LOG_LAYER
    cls = getattr(model, row.kind)
    cls.setup_anndata(cells, perturbation_key=reading["perturbation_key"], **labels, **extra)
    fitted = cls(cells, **architecture)
    # the budget of steps is fixed: nothing is chosen by validation
    fitted.train(split_key=SPLIT, enable_progress_bar=False, check_val_every_n_epoch=10_000, **training)
    if row.failed == "covariate":  # predictions take covariates and library sizes from cells that passed
        pool = fitted.libraries_
        fitted.libraries_ = pool | {
            "artifact": pool["categorical"][:, 0] == cells.obs[FLAG].cat.categories.get_loc(FAILED)
        }
    return fitted
