"""The report on predicted cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle._labels import LabelRule
from scvi_cradle._matrix import row_sums
from scvi_cradle._validation import check_positive, preview
from scvi_cradle.metrics._cells import Cells, check_predicted, check_same_genes
from scvi_cradle.metrics._distances import energy_distance
from scvi_cradle.metrics._panel import Panel
from scvi_cradle.metrics._replicate import MAX_CELLS, Reference, can_be_parted, replicate
from scvi_cradle.metrics._report import build_report

N_REPEATS = 10
DEPTH_RATIO = 1.2
FEWEST_OWN = 3  # perturbations whose own mean is a baseline


class _Comparison(NamedTuple):
    predicted: Panel
    baseline: Panel
    notes: list[str]
    truth: Cells  # the cells that the truth is measured on
    reference: Reference


def evaluate(
    real: AnnData,
    predicted: AnnData,
    *,
    perturbation_key: str = "perturbation",
    control: str | Sequence[str] = "control",
    sep: str | None = "+",
    train: AnnData | None = None,
    layer: str | None = None,
    exclude_targets: bool = False,
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
        perturbations. ``None``: the perturbations of ``real`` that are not scored (all, three at least, where all are
        scored).
    layer
        Layer with the counts; ``None``: ``X``. ``predicted`` may lack the layer; then its ``X`` is taken.
    exclude_targets
        Leave the genes that a perturbation targets out of its scores on effects: a knock-down of its own target is easily
        predicted. Target genes still count for other perturbations.
    n_bootstrap
        Draws of perturbations with replacement for the intervals; 0: no interval.
    seed
        Seed of the parts and of the bootstrap.

    Returns
    -------
    DataFrame indexed by metric:

    - ``value``; ``ci_low``, ``ci_high``: 95 % interval for other perturbations of the same kind, Student's quantile
      times the bootstrap standard error over perturbations (equal to ``value`` for a single perturbation or
      ``n_bootstrap=0``),
    - ``baseline``: the mean effect of the training perturbations, predicted for every perturbation,
    - ``ceiling``: a repeat of the experiment with as many cells as ``real`` has, extrapolated from halves and quarters
      (``full_size`` of :func:`replicate_ceiling`),
    - ``scaled``: ``(value - baseline) / (ceiling - baseline)``, with its interval ``scaled_low``, ``scaled_high`` from the
      same draws; NaN, with a note, where the ceiling is not better than the baseline and no prediction could be told
      from knowing nothing,
    - ``n_perturbations``: number of scored perturbations,
    - ``note``: which cells, space, library sizes, controls and baseline were used, and what is undefined.

    Raises
    ------
    KeyError
        If a column or a layer is not there.
    ValueError
        If an input is not raw counts, genes differ, a predicted perturbation is not in ``real``, ``real`` (or
        ``train``) lacks controls, or nothing is left for a baseline.

    Notes
    -----
    **Controls.** Predicted effects are taken against the controls of ``predicted``. Without them they are taken against
    one half of the controls of ``real`` and the truth against the other half, since a shared control makes unrelated
    effects correlate. The baseline of ``train=None`` is treated alike.

    **Metrics** on differences of mean ``log2(1 + 1e4 x / total)``. ``pearson_delta``: mean over perturbations of
    Pearson's correlation (0 where one side is constant); ``pearson_delta_perturbed_mean``: the same for changes from
    the mean of the training perturbations (the truth enters without its controls); ``pearson_delta_top_20``: over the 20
    genes with the largest absolute true effects; ``perturbation_discrimination``: :func:`perturbation_discrimination`
    without the genes that are targets; ``ate_pearson``, ``ate_r2`` and their ``_top_20``: over the flattened effects;
    ``jaccard_top_20``, ``jaccard_top_50``. ``energy_distance``: mean over perturbations of :func:`energy_distance` between
    real and predicted cells; its baseline are cells of all training perturbations alike. It sees what means do not:
    collapsed or too noisy cells, and another library size.
    """
    check_positive("n_bootstrap", n_bootstrap, integer=True, allow_zero=True)
    rule = LabelRule.create(control, sep)
    rng = np.random.default_rng(seed)
    truth = Cells.read(real, perturbation_key, rule, layer=layer, name="real")
    other = Cells.read_predicted(predicted, perturbation_key, rule, layer)
    training = None if train is None else Cells.read(train, perturbation_key, rule, layer=layer, name="train")
    check_predicted(truth, other)
    if training is not None:
        check_same_genes(truth, training, "train")
        if not training.perturbations:
            msg = "`train` must hold cells of at least one perturbation for the baseline; received only controls."
            raise ValueError(msg)
    labels = other.perturbations
    can_be_parted(truth, labels)  # before anything is computed
    comparison = _compare(truth, other, training, labels, exclude_targets, rng)
    parts = replicate(
        comparison.truth,
        labels,
        n_repeats=N_REPEATS,
        rng=rng,
        reference=comparison.reference,
        exclude_targets=exclude_targets,
        distances=True,
    )
    others = {"predicted": (predicted, other), "train": (train, training)}
    notes = [*comparison.notes, *_depth_notes(truth, other, labels), *_sharing_notes(others, real, truth), parts.note]
    if left_out := sorted(set(labels) - set(parts.labels)):
        notes.append(f"ceiling and scaled without labels of too few cells ({preview(left_out)})")
    if exclude_targets:
        notes.append("targets of a perturbation left out of its effects")
    return build_report(
        comparison.predicted,
        comparison.baseline,
        parts.full_size,
        among=[labels.index(label) for label in parts.labels],
        names=parts.names,
        n_bootstrap=n_bootstrap,
        rng=rng,
        notes=notes,
    )


def _compare(
    truth: Cells,
    other: Cells,
    training: Cells | None,
    labels: list[str],
    exclude_targets: bool,  # noqa: FBT001
    rng: np.random.Generator,
) -> _Comparison:
    """Take effects of truth, prediction and baseline so that the truth shares its controls with neither of them."""
    control = truth.rule.control_name
    own_control = control in other.labels
    if own_control and training is not None:
        measured, (real_means,) = truth, truth.means()
        spare = real_means
    else:
        half = truth.parts(rng, 2, among=[control])
        measured, (real_means, spare) = truth.subset(half == 0), truth.means(half, 2)
    predicted_means = other.means()[0][truth.genes]
    base_means, base_control, base_note = _baseline_means(real_means, spare, truth, training, labels)
    if own_control:
        effects = predicted_means.loc[labels] - predicted_means.loc[control]
        shifts = effects - (base_means - base_control)
        note = "prediction against its own controls"
        if training is None:
            note += ", the truth and the ceiling against half of the real ones"
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
    scored = ~truth.targets(labels) if exclude_targets else None
    of_prediction, of_pool = _cell_distances(truth, other, training, labels, rng)
    reference = Reference(base_means.to_numpy(), base_control.to_numpy() if own_control else None)
    return _Comparison(
        Panel(real_effects, effects.to_numpy(), real_shifts, shifts.to_numpy(), kept, scored, of_prediction),
        Panel(real_effects, constant, real_shifts, np.zeros_like(constant), kept, scored, of_pool),
        [note, base_note],
        measured,
        reference,
    )


def _cell_distances(
    truth: Cells, other: Cells, training: Cells | None, labels: list[str], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the energy distance of real cells from predicted ones and from those of any training perturbation.

    Without training cells these are cells of the perturbations that are not scored, or of all others.
    """
    pool = training or truth
    known = pool.perturbations if training else (sorted(set(truth.perturbations) - set(labels)) or labels)
    out = np.full((2, len(labels)), np.nan)
    scored: list[int] = []
    of_truth: list[np.ndarray] = []
    of_other: list[np.ndarray] = []
    of_pool: list[np.ndarray] = []
    for i, label in enumerate(labels):
        others = known if training else [x for x in known if x != label]
        any_cells = pool.draw(others, MAX_CELLS, rng)
        n = min(int(truth.n_cells[label]), int(other.n_cells[label]), len(any_cells), MAX_CELLS)
        if n < 2:
            continue
        scored.append(i)
        of_truth.append(truth.draw([label], n, rng))
        of_other.append(other.draw([label], n, rng))
        of_pool.append(any_cells[rng.permutation(len(any_cells))[:n]])
    cells = ((truth, of_truth), (other, of_other), (pool, of_pool))
    for i, real, guess, any_ in zip(scored, *(c.expressions(rows, truth.genes) for c, rows in cells), strict=True):
        out[:, i] = energy_distance(real, guess), energy_distance(real, any_)
    return out[0], out[1]


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
    elif len(labels) < FEWEST_OWN:
        msg = (
            f"The baseline needs training cells, perturbations that are not scored, or {FEWEST_OWN} scored ones; received "
            f"train=None and {len(labels)}, all of them scored: pass `train`."
        )
        raise ValueError(msg)
    else:
        note = "train=None and every perturbation of `real` is scored: the baseline is their own mean effect"
    known = others or labels
    return real_means.loc[known].mean(), spare.loc[control], f"{note}, against a half of the real controls of its own"


def _depth_notes(truth: Cells, other: Cells, labels: list[str]) -> list[str]:
    """Say how many cells there are, in which space they are compared, and how deep they are."""
    said, depths = [], []
    for cells, name in ((truth, "real"), (other, "predicted")):
        chosen = np.isin(cells.codes, [cells.labels.index(x) for x in labels])
        totals = row_sums(cells.matrix)
        depths.append(float(np.median(totals[chosen])))
        n_controls = int(cells.n_cells.get(cells.rule.control_name, 0))
        said.append(f"{name}: {int(chosen.sum())} cells and {n_controls} controls, median total {depths[-1]:.0f}")
    shallow, deep = sorted(depths)
    if deep > DEPTH_RATIO * shallow:
        said.append("library sizes differ, which moves means of log expression: generate at observed library sizes")
    return [*said, "space: log2(1 + 1e4 x / total)"]


def _sharing_notes(inputs: dict[str, tuple[AnnData | None, Cells | None]], real: AnnData, truth: Cells) -> list[str]:
    """Say where cells of `real` occur in another input: same name and same total."""
    own = _totals(real, truth)
    notes = []
    for name, (adata, cells) in inputs.items():
        if adata is None or cells is None:
            continue
        totals = _totals(adata, cells)
        for what, wanted in (("control", True), ("perturbed", False)):
            ours = own.loc[own["control"] == wanted, "total"]
            theirs = totals.loc[totals["control"] == wanted, "total"]
            common = ours.index.intersection(theirs.index)
            n_shared = int((ours[common] == theirs[common]).sum())
            if n_shared:
                why = "shared controls raise its scores" if wanted else "it has seen the truth"
                notes.append(f"{n_shared} {what} cells of `real` are also in `{name}`: {why}")
    return notes


def _totals(adata: AnnData, cells: Cells) -> pd.DataFrame:
    """Return the total of every cell, and whether it is a control, by its name; of a repeated name the first."""
    is_control = np.array([label == cells.rule.control_name for label in cells.labels], dtype=bool)[cells.codes]
    totals = pd.DataFrame({"total": row_sums(cells.matrix), "control": is_control}, index=adata.obs_names)
    return totals[~totals.index.duplicated()]
