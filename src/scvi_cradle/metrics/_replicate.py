"""What a repeat of the experiment would score: disjoint parts of the cells, each with its own controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle._labels import LabelRule
from scvi_cradle._validation import check_positive, preview
from scvi_cradle.metrics._cells import Cells
from scvi_cradle.metrics._distances import energy_distance
from scvi_cradle.metrics._panel import METRICS, Panel, contributions, extrapolate
from scvi_cradle.metrics._rows import less
from scvi_cradle.metrics._scores import mean_effect

N_PARTS = 4
AT_ONCE = 5  # partitions
MAX_CELLS = 100  # of an energy distance
Contributions = dict[str, np.ndarray]


class Reference(NamedTuple):
    """What changes are taken from, besides controls.

    Parameters
    ----------
    mean
        Mean expression of the training perturbations, shape ``(n_genes,)``.
    control
        Mean expression of their controls, shape ``(n_genes,)``, for predictions with controls of their own; ``None``:
        predictions are taken from ``mean`` directly.
    """

    mean: np.ndarray
    control: np.ndarray | None


@dataclass(frozen=True)
class Replicate:
    """Repeats of a part of the experiment, by perturbation.

    Parameters
    ----------
    labels
        The perturbations.
    n_genes
        Number of genes.
    halves
        For every random split what the perturbations contribute to the score of one half against the other.
    quarters
        The same for quarters; empty where there are too few cells.
    """

    labels: list[str]
    n_genes: int
    halves: list[Contributions]
    quarters: list[Contributions]

    @property
    def names(self) -> list[str]:
        """Names of the metrics."""
        return list(self.halves[0])

    def full_size(self, name: str, weights: np.ndarray) -> np.ndarray:
        """Return the score of a repeat of the whole experiment for weights of labels, shape ``(n_draws, n_labels)``."""

        def average(parts: list[Contributions]) -> np.ndarray:
            return np.asarray(np.mean([METRICS[name].score(weights @ part[name]) for part in parts], axis=0))

        halves = average(self.halves)
        return extrapolate(name, self.n_genes, halves, average(self.quarters)) if self.quarters else halves

    def half_size(self) -> pd.DataFrame:
        """Return the score of halves; rows are splits, columns metrics."""
        return pd.DataFrame([{n: float(METRICS[n].score(c.sum(axis=0))) for n, c in h.items()} for h in self.halves])

    @property
    def note(self) -> str:
        """What the ceiling is."""
        kind = (
            "a repeat of the same size, extrapolated from repeats of halves and quarters"
            if self.quarters
            else "one half of the real cells against the other (too few cells for quarters, so not of the same size)"
        )
        return f"ceiling: {kind}, separate controls, {len(self.halves)} splits"


def can_be_parted(cells: Cells, labels: Sequence[str]) -> tuple[list[str], int]:
    """Return the labels that have enough cells, and into how many parts they are dealt: 4, or 2 where no label has 4.

    Raises
    ------
    ValueError
        If there are fewer than two controls or if no label has two cells.
    """
    n_cells = cells.n_cells
    control = cells.rule.control_name
    if n_cells[control] < 2:
        msg = f"A replicate needs at least two control cells, one for each half; received {n_cells[control]} labelled {control!r}."
        raise ValueError(msg)
    if n_cells[control] >= N_PARTS and (kept := [label for label in labels if n_cells[label] >= N_PARTS]):
        return kept, N_PARTS
    if kept := [label for label in labels if n_cells[label] >= 2]:
        return kept, 2
    msg = f"A replicate needs a perturbation with at least two cells; received {preview(labels) or 'none'} with one cell each."
    raise ValueError(msg)


def replicate(
    cells: Cells,
    labels: Sequence[str],
    *,
    n_repeats: int,
    rng: np.random.Generator,
    reference: Reference | None = None,
    exclude_targets: bool = False,
    distances: bool = False,
) -> Replicate:
    """Score parts of the cells against each other, on random splits.

    Without a ``reference`` changes are taken from the mean of the labels, in either part from its own.
    """
    kept, n_parts = can_be_parted(cells, labels)
    untargeted = cells.untargeted_genes()
    scored = ~cells.targets(kept) if exclude_targets else None
    rows = [cells.labels.index(label) for label in kept]
    control = cells.labels.index(cells.rule.control_name)
    halves, quarters = [], []
    partitions = [cells.parts(rng, n_parts) for _ in range(n_repeats)]
    for part, n, total in _sums(cells, partitions, n_parts):
        half = part % 2
        distance = half_distances(cells, kept, half, rng) if distances else None
        pairs = [(slice(0, None, 2), slice(1, None, 2))]
        pairs += [(slice(0, 1), slice(1, 2)), (slice(2, 3), slice(3, 4))] if n_parts == N_PARTS else []
        panels = []
        for pair in pairs:
            means = [total[p].sum(axis=0) / np.maximum(n[p].sum(axis=0), 1)[:, None] for p in pair]
            real, guess = (m[rows] - m[control] for m in means)
            real_shift, shift = _shifts([m[rows] for m in means], means[1][control], reference)
            panels.append(Panel(real, guess, real_shift, shift, untargeted, scored, distance))
        halves.append(contributions(panels[0]))
        quarters += [contributions(p) for p in panels[1:]]
    return Replicate(kept, len(cells.genes), halves, quarters)


def _sums(
    cells: Cells, partitions: list[np.ndarray], n_parts: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield partitions with their sums, a few at a time: each holds a number for every part, label and gene."""
    for i in range(0, len(partitions), AT_ONCE):
        chosen = partitions[i : i + AT_ONCE]
        for part, (n, total) in zip(chosen, cells.sums(chosen, n_parts), strict=True):
            yield part, n, total


def _shifts(
    labelled: list[np.ndarray], control: np.ndarray, reference: Reference | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return changes of truth and repeat from the mean perturbation, as they are taken of truth and prediction."""
    real, again = labelled
    if reference is None:
        return less(real, real.mean(axis=0)), less(again, again.mean(axis=0))
    if reference.control is None:
        return real - reference.mean, again - reference.mean
    return real - reference.mean, (again - control) - (reference.mean - reference.control)


def half_distances(cells: Cells, labels: Sequence[str], half: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the energy distance of the halves of every label, shape ``(n_labels,)``; NaN where a half has one cell."""
    out = np.full(len(labels), np.nan)
    scored, draws = [], []
    for i, label in enumerate(labels):
        rows = np.flatnonzero(cells.codes == cells.labels.index(label))
        sides = [rows[half[rows] == h] for h in (0, 1)]
        n = min(len(sides[0]), len(sides[1]), MAX_CELLS)
        if n >= 2:
            scored.append(i)
            draws += [np.sort(rng.choice(s, n, replace=False)) for s in sides]
    values = cells.expressions(draws, cells.genes)
    out[scored] = [energy_distance(x, y) for x, y in zip(values, values, strict=True)]
    return out


def replicate_ceiling(
    adata: AnnData,
    perturbation_key: str,
    *,
    control: str | Sequence[str] = "control",
    sep: str | None = "+",
    layer: str | None = None,
    train: AnnData | None = None,
    exclude_targets: bool = False,
    n_repeats: int = 10,
    seed: int | None = 0,
) -> pd.DataFrame:
    """Score the experiment against itself: what a repeat with half of the cells, or with all of them, would reach.

    The cells of every label, controls included, are split at random, so that the effects of two parts share no cell.
    With shared controls the score would be too high (two groups of control cells, each minus the same controls,
    correlate at about 0.5).

    Parameters
    ----------
    adata
        Cells with raw counts.
    perturbation_key
        Column of ``adata.obs`` with one label per cell.
    control
        Token, or tokens, of control cells.
    sep
        Text between the treatments of a combination; ``None``: labels are never split.
    layer
        Layer with the counts; ``None``: ``adata.X``.
    train
        Effects of the training perturbations, from :func:`average_treatment_effects`: what
        ``pearson_delta_perturbed_mean`` is taken from, as in :func:`evaluate_effects`. ``None``: the mean of the
        perturbations of ``adata`` themselves; with a single one the score is left out.
    exclude_targets
        Leave the genes that a perturbation targets out of its scores.
    n_repeats
        Number of random splits.
    seed
        Seed of the splits.

    Returns
    -------
    DataFrame with the metrics of :func:`evaluate_effects` as index and the columns ``mean`` and ``sd`` over splits, of
    one half against the other (``sd`` is 0 for one split), and ``full_size``: the score of a repeat with as many cells
    as there are. Labels with fewer than four cells are left out; where no label, or not the controls, have four, those
    with fewer than two are, and ``full_size`` is that of the halves.

    Raises
    ------
    KeyError
        If the column or the layer is not there.
    ValueError
        If there are fewer than two controls, no label with two cells, or ``train`` lacks genes.

    Notes
    -----
    ``full_size`` is extrapolated from halves and quarters: the odds of a score, on a scale on which noise is 0 and a
    perfect repeat 1, are taken to grow by one factor whenever the cells double: by 2 for correlations of all effects (the
    Spearman-Brown formula), else by what quarters and halves say, at most 2.5. ``benchmarks/RESULTS.md`` compares it with
    repeats of the full size. A prediction with less noise than a repeat can score higher.
    """
    check_positive("n_repeats", n_repeats, integer=True)
    rule = LabelRule.create(control, sep)
    cells = Cells.read(adata, perturbation_key, rule, layer=layer, name="adata")
    rng = np.random.default_rng(seed)
    reference = None if train is None else reference_of(train, cells.genes)
    labels = cells.perturbations
    parts = replicate(cells, labels, n_repeats=n_repeats, rng=rng, reference=reference, exclude_targets=exclude_targets)
    scores = parts.half_size()
    sd = scores.std(ddof=1) if n_repeats > 1 else 0.0
    everything = np.ones((1, len(parts.labels)))
    full = {name: float(parts.full_size(name, everything)[0]) for name in parts.names}
    table = pd.DataFrame({"mean": scores.mean(), "sd": sd, "full_size": full}).rename_axis("metric")
    undefined = reference is None and len(parts.labels) == 1
    return table.drop(index="pearson_delta_perturbed_mean") if undefined else table


def reference_of(train: AnnData, genes: pd.Index) -> Reference:
    """Return mean expression of the training perturbations and of their controls."""
    if not isinstance(train, AnnData) or "control_mean" not in train.var:
        msg = f"`train` must be the result of `average_treatment_effects`; received {type(train).__name__}{' without `var[control_mean]`' if isinstance(train, AnnData) else ''}."
        raise ValueError(msg)
    control = train.var["control_mean"].reindex(genes).to_numpy(dtype=np.float64)
    return Reference(control + mean_effect(train, genes), control)
