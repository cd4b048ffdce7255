"""The report: every score with an interval, what knows nothing scores, and what a repeat of the experiment scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle._constants import COLUMNS
from scvi_cradle._labels import LabelRule
from scvi_cradle._matrix import row_sums
from scvi_cradle._validation import check_positive, preview
from scvi_cradle.metrics._panel import METRICS, Panel, bootstrap_panel, score_panel
from scvi_cradle.metrics._replicate import Cells, can_be_halved, replicate_scores
from scvi_cradle.metrics._scores import is_constant

N_REPEATS = 5
REPORT_COLUMNS = ["value", "ci_low", "ci_high", "baseline", "ceiling", "scaled", "n_perturbations", "note"]


class _Comparison(NamedTuple):
    predicted: Panel
    baseline: Panel
    notes: list[str]


def evaluate(
    real: AnnData,
    predicted: AnnData,
    *,
    perturbation_key: str = "perturbation",
    control: str | Sequence[str] = "control",
    sep: str | None = "+",
    train: AnnData | None = None,
    layer: str | None = None,
    n_bootstrap: int = 200,
    seed: int | None = 0,
) -> pd.DataFrame:
    """Compare predicted cells with real ones, beside a baseline that knows nothing and a repeat of the experiment.

    Parameters
    ----------
    real
        Measured cells with raw counts and with controls, best cells that no model has seen.
    predicted
        Generated cells with raw counts of the same genes (any order); its perturbations are scored, all of them must
        occur in ``real``. Labels come from ``obs[perturbation_key]``, else from ``obs["perturbation"]``.
    perturbation_key
        Column of ``obs`` with one label per cell.
    control
        Token, or tokens, of control cells.
    sep
        Text between the treatments of a combination; ``None``: labels are never split.
    train
        Training cells of the same experiment, with controls, for the baseline and for the mean of the training
        perturbations. ``None``: the perturbations of ``real`` that are not scored (all, where all are scored).
    layer
        Layer with the counts; ``None``: ``X``. ``predicted`` may lack the layer; then its ``X`` is taken.
    n_bootstrap
        Draws of perturbations with replacement for the interval; 0: no interval.
    seed
        Seed of the halves and of the bootstrap.

    Returns
    -------
    DataFrame indexed by metric:

    - ``value``; ``ci_low``, ``ci_high``: 95 % bootstrap interval over perturbations (equal to ``value`` for a single
      perturbation or ``n_bootstrap=0``),
    - ``baseline``: the mean effect of the training perturbations, predicted for every perturbation,
    - ``ceiling``: one half of the real cells against the other, as in :func:`replicate_ceiling`,
    - ``scaled``: ``(value - baseline) / (ceiling - baseline)``; NaN, with a note, where the ceiling is not above the
      baseline and no prediction could be told from knowing nothing,
    - ``n_perturbations``: number of scored perturbations,
    - ``note``: which controls and which baseline were used, and what is undefined.

    Raises
    ------
    KeyError
        If a column or a layer is not there.
    ValueError
        If an input is not raw counts, genes differ, a predicted perturbation is not in ``real``, or ``real`` (or
        ``train``) lacks controls.

    Notes
    -----
    **Controls.** Predicted effects are taken against the controls of ``predicted``. Without them they are taken against
    one half of the controls of ``real`` and the truth against the other half, since a shared control makes unrelated
    effects correlate. The baseline of ``train=None`` is treated alike.

    **Metrics** on differences of mean ``log2(1 + 1e4 x / total)``. ``pearson_delta``: mean over perturbations of
    Pearson's correlation (0 where one side is constant); ``pearson_delta_perturbed_mean``: the same for changes from
    the mean of the training perturbations (the truth enters without its controls); ``perturbation_discrimination``:
    :func:`perturbation_discrimination` without the genes that are targets; ``ate_pearson``, ``ate_r2``: over the
    flattened effects; ``jaccard_top_20``, ``jaccard_top_50``.
    """
    check_positive("n_bootstrap", n_bootstrap, integer=True, allow_zero=True)
    rule = LabelRule.create(control, sep)
    rng = np.random.default_rng(seed)
    truth = Cells.read(real, perturbation_key, rule, layer=layer, name="real")
    other = _read_predicted(predicted, perturbation_key, rule, layer)
    training = None if train is None else Cells.read(train, perturbation_key, rule, layer=layer, name="train")
    labels = _scored_labels(truth, other, training)
    halvable = can_be_halved(truth, labels)
    comparison = _compare(truth, other, training, labels, rng)
    ceiling = replicate_scores(truth, labels, n_repeats=N_REPEATS, rng=rng).mean()
    intervals = bootstrap_panel(comparison.predicted, n_bootstrap, rng) if n_bootstrap and len(labels) > 1 else {}
    others = {"predicted": (predicted, other), "train": (train, training)}
    notes = comparison.notes + _sharing_notes(others, real, truth)
    notes.append(f"ceiling: halves of the real cells with separate controls, mean of {N_REPEATS}")
    if left_out := sorted(set(labels) - set(halvable)):
        notes.append(f"ceiling without labels of one cell ({preview(left_out)})")
    if not intervals:
        notes.append("no interval: " + ("one perturbation" if n_bootstrap else "n_bootstrap=0"))
    return _report(comparison, ceiling, intervals, notes)


def _read_predicted(predicted: AnnData, perturbation_key: str, rule: LabelRule, layer: str | None) -> Cells:
    key, own_layer = perturbation_key, layer
    if isinstance(predicted, AnnData):
        if key not in predicted.obs and COLUMNS.PERTURBATION in predicted.obs:
            key = COLUMNS.PERTURBATION
        own_layer = layer if layer in predicted.layers else None
    named = LabelRule(tuple(dict.fromkeys((*rule.control, rule.control_name))), rule.sep, rule.missing_is_control)
    return Cells.read(predicted, key, named, layer=own_layer, name="predicted", need_control=False)


def _scored_labels(truth: Cells, other: Cells, training: Cells | None) -> list[str]:
    for cells, name in ((other, "predicted"), (training, "train")):
        if cells is not None and set(cells.genes) != set(truth.genes):
            n_common = len(truth.genes.intersection(cells.genes))
            msg = (
                f"`{name}` must hold the genes of `real`; received {len(cells.genes)} genes, {n_common} among the "
                f"{len(truth.genes)} of `real`: subset both to the genes in common."
            )
            raise ValueError(msg)
    if not other.perturbations:
        msg = "`predicted` must hold cells of at least one perturbation; received only controls or no cell."
        raise ValueError(msg)
    unknown = sorted(set(other.perturbations) - set(truth.perturbations))
    if unknown:
        msg = f"Every perturbation of `predicted` must have real cells; received {preview(unknown)} without any: drop them from `predicted`."
        raise ValueError(msg)
    if training is not None and not training.perturbations:
        msg = "`train` must hold cells of at least one perturbation for the baseline; received only controls."
        raise ValueError(msg)
    return other.perturbations


def _compare(
    truth: Cells, other: Cells, training: Cells | None, labels: list[str], rng: np.random.Generator
) -> _Comparison:
    """Take effects of truth, prediction and baseline so that the truth shares its controls with neither of them."""
    control = truth.rule.control_name
    own_control = control in other.labels
    half = None if own_control and training is not None else truth.halves(rng, among=[control])
    real_means, spare = truth.means(half)
    predicted_means = other.means()[0][truth.genes]
    base_means, base_control, base_note = _baseline_means(real_means, spare, truth, training, labels)
    if own_control:
        effects = predicted_means.loc[labels] - predicted_means.loc[control]
        shifts = effects - (base_means - base_control)
        note = "prediction against its own controls"
    else:
        effects = predicted_means.loc[labels] - spare.loc[control]
        shifts = predicted_means.loc[labels] - base_means
        note = (
            "`predicted` holds no controls: it is compared with one half of the real controls, the truth with the other"
        )
    real_effects = (real_means.loc[labels] - real_means.loc[control]).to_numpy()
    real_shifts = (real_means.loc[labels] - base_means).to_numpy()
    constant = np.tile((base_means - base_control).to_numpy(), (len(labels), 1))
    kept = truth.untargeted_genes()
    return _Comparison(
        Panel(real_effects, effects.to_numpy(), real_shifts, shifts.to_numpy(), kept),
        Panel(real_effects, constant, real_shifts, np.zeros_like(constant), kept),
        [note, base_note],
    )


def _baseline_means(
    real_means: pd.DataFrame, spare: pd.DataFrame, truth: Cells, training: Cells | None, labels: list[str]
) -> tuple[pd.Series, pd.Series, str]:
    """Return mean expression of the perturbations that the baseline knows, that of its controls, and a note."""
    control = truth.rule.control_name
    if training is not None:
        means = training.means()[0][truth.genes]
        return means.loc[training.perturbations].mean(), means.loc[control], "baseline: mean effect of `train`"
    others = sorted(set(truth.perturbations) - set(labels))
    if others:
        note = (
            f"train=None: baseline is the mean effect of the {len(others)} perturbations of `real` that are not scored"
        )
    else:
        note = "train=None and every perturbation of `real` is scored: the baseline is their own mean effect"
    known = others or labels
    return real_means.loc[known].mean(), spare.loc[control], f"{note}, against a half of the real controls of its own"


def _sharing_notes(inputs: dict[str, tuple[AnnData | None, Cells | None]], real: AnnData, truth: Cells) -> list[str]:
    """Say where control cells of `real` occur in another input: same name and same total."""
    own = _control_totals(real, truth)
    notes = []
    for name, (adata, cells) in inputs.items():
        if adata is None or cells is None or truth.rule.control_name not in cells.labels:
            continue
        totals = _control_totals(adata, cells)
        common = own.index.intersection(totals.index)
        n_shared = int((own[common] == totals[common]).sum())
        if n_shared:
            notes.append(f"{n_shared} control cells of `real` are also in `{name}`: shared controls raise its scores")
    return notes


def _control_totals(adata: AnnData, cells: Cells) -> pd.Series:
    rows = np.flatnonzero(cells.codes == cells.labels.index(cells.rule.control_name))
    totals = pd.Series(row_sums(cells.matrix[rows]), index=adata.obs_names[rows])
    return totals[~totals.index.duplicated()]


def _report(
    comparison: _Comparison, ceiling: pd.Series, intervals: dict[str, tuple[float, float]], notes: list[str]
) -> pd.DataFrame:
    value, baseline = score_panel(comparison.predicted), score_panel(comparison.baseline)
    n = len(comparison.predicted.real)
    rows = {}
    for name in METRICS:
        low, high = intervals.get(name, (value[name], value[name]))
        room = float(ceiling[name]) - baseline[name]
        scaled = (value[name] - baseline[name]) / room if room > 0 else np.nan
        said = notes + _metric_notes(name, comparison.predicted)
        if room <= 0:
            said.append("scaled is undefined: the ceiling is not above the baseline")
        elif scaled > 1:
            said.append(
                "above the ceiling: the prediction is less noisy than one half of the real cells, or has seen them"
            )
        rows[name] = [value[name], low, high, baseline[name], float(ceiling[name]), scaled, n, "; ".join(said)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=REPORT_COLUMNS).rename_axis("metric")


def _metric_notes(name: str, panel: Panel) -> list[str]:
    n, n_genes = panel.real.shape
    if name.startswith("jaccard"):
        k = int(name.rsplit("_", 1)[1])
        if k >= n_genes:
            return [f"only {n_genes} genes: every gene with an effect is among the top {k}"]
        return [f"by chance about {k / (2 * n_genes - k):.3f}"]
    if name == "perturbation_discrimination":
        if n == 1:
            return ["one perturbation: undefined, set to 0.5"]
        return [f"chance 0.5; {int((~panel.kept).sum())} genes that are targets left out"]
    sides = (
        (panel.real_shift, panel.predicted_shift) if name.endswith("perturbed_mean") else (panel.real, panel.predicted)
    )
    constant = int((is_constant(sides[0]) | is_constant(sides[1])).sum())
    if name.startswith("pearson_delta") and constant:
        return [f"{constant} of {n} perturbations have a constant change: undefined, counted as 0"]
    if name.startswith("ate") and any(np.ptp(side) == 0 for side in sides):
        return ["all effects of one side are equal: a correlation is undefined, set to 0"]
    return []
