"""Effects predicted by the model and the baselines, scored on the same held-out cells."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd
from anndata import AnnData

from scvi_cradle import baselines
from scvi_cradle._matrix import get_matrix
from scvi_cradle._qc import flag_cells, qc_metrics, record_gene_masks
from scvi_cradle.benchmark._prepare import LOGGER, TRUE_ARTIFACT, DemoSettings, Prepared
from scvi_cradle.metrics import ate_pearson, average_treatment_effects, evaluate_effects, replicate_ceiling
from scvi_cradle.model import CradleVAE

MODEL = "CradleVAE"
BASELINES = ("MultivariateShrinkage", "ShrunkenEffects", "Additive", "PerturbedMean", "ControlMean")
CEILING = "replicate"
KNOWN = "known_effects_pearson"
N_PARTICLES = 1_000
N_REPEATS = 10
N_BOOTSTRAP = 500


class Scores(NamedTuple):
    """Scores of all methods.

    Parameters
    ----------
    tables
        A report as of :func:`scvi_cradle.metrics.evaluate` for every method.
    table
        Metrics x methods, with the ceiling.
    real, predicted
        Measured effects of the held-out perturbations, and those that the model predicts.
    """

    tables: dict[str, pd.DataFrame]
    table: pd.DataFrame
    real: AnnData
    predicted: AnnData


def score(model: CradleVAE, prepared: Prepared, settings: DemoSettings) -> Scores:
    """Score the model, the baselines and a replicate on the held-out perturbations.

    Parameters
    ----------
    model
        Trained model.
    prepared, settings
        The data and how they are read.

    Notes
    -----
    Measured effects come from held-out cells and from controls that no method was fitted on. Model and baselines
    predict effects against their own training controls; baselines are fitted on training cells that passed. The
    replicate repeats the held-out measurement: as many cells of the held-out perturbations and of those controls.
    """
    arguments = settings.label_arguments | {"layer": settings.layer}
    labels = prepared.held_out
    test, train = prepared.passed("test"), prepared.passed("train")
    real = average_treatment_effects(test, **arguments)[labels].copy()
    raw = average_treatment_effects(train, **arguments)
    predicted = {MODEL: model.get_average_treatment_effects(labels, n_particles=N_PARTICLES, seed=settings.seed)}
    for name in BASELINES:
        try:
            predicted[name] = getattr(baselines, name)().fit(train, **arguments).get_average_treatment_effects(labels)
        except ValueError as error:
            LOGGER.info("      %s is left out: %s", name, error)
    ceiling = replicate_ceiling(test, **arguments, n_repeats=N_REPEATS, seed=settings.seed, train=raw)
    tables = {
        name: evaluate_effects(
            real, effects, train=raw, ceiling=ceiling, sep=settings.sep, n_bootstrap=N_BOOTSTRAP, seed=settings.seed
        )
        for name, effects in predicted.items()
    }
    table = pd.DataFrame({name: scores["value"] for name, scores in tables.items()})
    table[CEILING] = ceiling["full_size"]
    table = table.loc[[name for name in table.index if not name.endswith("top_20")]]
    known = _known_effects(prepared.adata, labels)
    if known is not None:
        table.loc[KNOWN] = {
            name: ate_pearson(known, effects) for name, effects in (predicted | {CEILING: real}).items()
        }
    return Scores(tables, table, real, predicted[MODEL])


def _known_effects(adata: AnnData, labels: list[str]) -> pd.DataFrame | None:
    """Return the effects that a perfect estimate from clean cells approaches, where they are known."""
    truth: Any = adata.uns.get("truth", {})
    known = truth.get("population_effects") if hasattr(truth, "get") else None
    if not isinstance(known, pd.DataFrame) or not set(labels) <= set(known.index):
        return None
    return known.loc[labels] if set(known.columns) == set(adata.var_names) else None


def quality_table(prepared: Prepared, generated: dict[str, AnnData], settings: DemoSettings) -> pd.DataFrame | None:
    """Return how often generated and measured cells of the held-out perturbations are within the QC thresholds.

    Parameters
    ----------
    prepared, settings
        The data and how they are read.
    generated
        Generated cells by name.

    Returns
    -------
    Rows: kinds of cells; columns: ``all`` thresholds together, and every criterion. ``None`` without thresholds.
    """
    record = prepared.record
    if record is None:
        return None
    test = prepared.rows("test", controls=False)
    measured = {"measured": test, "measured, passed": test & ~prepared.failed}
    if TRUE_ARTIFACT in prepared.adata.obs and settings.data is None:
        measured["measured, clean in truth"] = test & ~prepared.adata.obs[TRUE_ARTIFACT].to_numpy(dtype=bool)
    kinds: dict[str, tuple[AnnData, str | None]] = {name: (cells, None) for name, cells in generated.items()}
    kinds |= {name: (prepared.adata[rows], settings.layer) for name, rows in measured.items() if rows.any()}
    table = {}
    for name, (cells, layer) in kinds.items():
        masks = record_gene_masks(record, cells.var_names, name)
        batches = cells.obs[settings.batch_key] if settings.batch_key in cells.obs else None
        passes = ~flag_cells(qc_metrics(get_matrix(cells, layer), masks), record, batches)
        table[name] = {"all": passes.all(axis=1).mean(), **passes.mean()}
    return pd.DataFrame(table).T.rename_axis("cells")
