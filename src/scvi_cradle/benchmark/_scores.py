"""Effects predicted by the model and the baselines, scored on the same held-out cells."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle import baselines
from scvi_cradle._labels import LabelRule
from scvi_cradle._matrix import get_matrix
from scvi_cradle._qc import flag_cells, qc_metrics, record_gene_masks
from scvi_cradle.benchmark._prepare import LOGGER, TRUE_ARTIFACT, DemoSettings, Prepared
from scvi_cradle.metrics import average_treatment_effects
from scvi_cradle.metrics._effects import align_effects
from scvi_cradle.metrics._evaluate import REPORT_COLUMNS
from scvi_cradle.metrics._panel import METRICS, Panel, bootstrap_panel, score_panel
from scvi_cradle.metrics._replicate import Cells, can_be_halved, replicate_scores
from scvi_cradle.model import CradleVAE

MODEL = "CradleVAE"
BASELINES = ("ShrunkenEffects", "Additive", "PerturbedMean", "ControlMean")
REFERENCE = "PerturbedMean"
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
    replicate is one half of all passed cells of the held-out perturbations and of the controls against the other half.
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
    rule = LabelRule.create(list(settings.control), settings.sep)
    scored = np.isin(prepared.labels, [*labels, prepared.control_name]) & ~prepared.failed
    cells = Cells.read(prepared.adata[scored], settings.key, rule, layer=settings.layer, name="data")
    rng = np.random.default_rng(settings.seed)
    ceiling = replicate_scores(cells, can_be_halved(cells, labels), n_repeats=N_REPEATS, rng=rng).mean()
    targets = {t for label in set(prepared.labels) for t in rule.treatments(label)}
    kept = ~real.var_names.isin(sorted(targets))
    panels = {name: _panel(real, effects, raw, kept) for name, effects in predicted.items()}
    baseline = score_panel(panels[REFERENCE])
    tables = {name: _report(panel, baseline, ceiling, settings.seed) for name, panel in panels.items()}
    table = pd.DataFrame({name: scores["value"] for name, scores in tables.items()})
    table[CEILING] = ceiling
    table = table.drop(index="jaccard_top_20")
    known = _known_effects(prepared.adata, labels)
    if known is not None:
        table.loc[KNOWN] = {
            name: _flat_pearson(known, effects) for name, effects in (predicted | {CEILING: real}).items()
        }
    return Scores(tables, table, real, predicted[MODEL])


def _panel(real: AnnData, predicted: AnnData, raw: AnnData, kept: np.ndarray) -> Panel:
    """Put effects side by side; shifts are changes from the mean of the training perturbations."""
    truth, guess = (frame.to_numpy() for frame in align_effects(real, predicted))
    mean_effect = np.asarray(raw.X).mean(axis=0)
    # measured cells against the mean training perturbation: no controls enter
    offset = real.var["control_mean"].to_numpy() - raw.var["control_mean"].to_numpy()
    return Panel(truth, guess, truth + offset - mean_effect, guess - mean_effect, kept)


def _report(panel: Panel, baseline: dict[str, float], ceiling: pd.Series, seed: int) -> pd.DataFrame:
    value = score_panel(panel)
    n = len(panel.real)
    intervals = bootstrap_panel(panel, N_BOOTSTRAP, np.random.default_rng(seed)) if n > 1 else {}
    rows = {}
    for name in METRICS:
        low, high = intervals.get(name, (value[name], value[name]))
        room = float(ceiling[name]) - baseline[name]
        scaled = (value[name] - baseline[name]) / room if room > 0 else np.nan
        note = "" if room > 0 else "scaled is undefined: the ceiling is not above the baseline"
        rows[name] = [value[name], low, high, baseline[name], float(ceiling[name]), scaled, n, note]
    return pd.DataFrame.from_dict(rows, orient="index", columns=REPORT_COLUMNS).rename_axis("metric")


def _known_effects(adata: AnnData, labels: list[str]) -> pd.DataFrame | None:
    """Return the effects that a perfect estimate from clean cells approaches, where they are known."""
    truth: Any = adata.uns.get("truth", {})
    known = truth.get("population_effects") if hasattr(truth, "get") else None
    if not isinstance(known, pd.DataFrame) or not set(labels) <= set(known.index):
        return None
    return known.loc[labels] if set(known.columns) == set(adata.var_names) else None


def _flat_pearson(real: pd.DataFrame, predicted: AnnData) -> float:
    x, y = (frame.to_numpy().ravel() for frame in align_effects(real, predicted))
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(y) > 0 else 0.0


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
