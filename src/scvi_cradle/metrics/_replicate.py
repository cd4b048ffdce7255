"""What a repeat of the experiment would score: disjoint halves of the cells, each with its own controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle._labels import LabelRule
from scvi_cradle._validation import check_positive, preview
from scvi_cradle.metrics._effects import group_means, read_counts, read_labels
from scvi_cradle.metrics._panel import METRICS, Panel, score_panel


@dataclass(frozen=True)
class Cells:
    """Counts with the label of every cell.

    Parameters
    ----------
    matrix
        Counts, shape ``(n_cells, n_genes)``.
    codes
        Position of the label of every cell in ``labels``.
    labels
        Canonical labels, sorted, with the control's.
    genes
        Names of genes.
    rule
        How labels are read.
    """

    matrix: Any
    codes: np.ndarray
    labels: tuple[str, ...]
    genes: pd.Index
    rule: LabelRule

    @classmethod
    def read(
        cls,
        adata: AnnData,
        perturbation_key: str,
        rule: LabelRule,
        *,
        layer: str | None,
        name: str,
        need_control: bool = True,
    ) -> Cells:
        """Check an AnnData and take what is needed of it; nothing is copied."""
        matrix = read_counts(adata, layer, name)
        labels = read_labels(adata, perturbation_key, rule, need_control=need_control)
        return cls(matrix, np.asarray(labels.codes, dtype=np.int64), tuple(labels.categories), adata.var_names, rule)

    @property
    def perturbations(self) -> list[str]:
        """Labels without the control."""
        return [label for label in self.labels if label != self.rule.control_name]

    @property
    def n_cells(self) -> pd.Series:
        """Number of cells of every label."""
        return pd.Series(np.bincount(self.codes, minlength=len(self.labels)), index=list(self.labels))

    def means(self, half: np.ndarray | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return mean log2 expression of the labels in cells with ``half == 0`` and in cells with ``half == 1``.

        A label has a row where it has cells; ``half=None`` takes all cells into the first part.
        """
        n = len(self.labels)
        codes = self.codes if half is None else np.where(half >= 0, self.codes + n * half, -1)
        n_cells, mean = group_means(self.matrix, codes, 2 * n)
        parts = []
        for rows in (slice(0, n), slice(n, 2 * n)):
            frame = pd.DataFrame(mean[rows], index=list(self.labels), columns=self.genes)
            parts.append(frame[n_cells[rows] > 0])
        return parts[0], parts[1]

    def halves(self, rng: np.random.Generator, among: Sequence[str] | None = None) -> np.ndarray:
        """Assign the cells of every label (of ``among`` only) at random to half 0 or 1; all others to half 0."""
        order = np.lexsort((rng.random(len(self.codes)), self.codes))
        n_cells = np.bincount(self.codes, minlength=len(self.labels))
        start = np.concatenate([[0], np.cumsum(n_cells)[:-1]])
        half = np.empty(len(self.codes), dtype=np.int64)
        half[order] = (np.arange(len(order)) - start[self.codes[order]]) % 2
        if among is not None:
            chosen = np.array([label in set(among) for label in self.labels], dtype=bool)
            half[~chosen[self.codes]] = 0
        return half

    def untargeted_genes(self) -> np.ndarray:
        """Mark the genes that no treatment is named after, shape ``(n_genes,)``."""
        targets = {t for label in self.labels for t in self.rule.treatments(label)}
        return ~self.genes.isin(sorted(targets))


def can_be_halved(cells: Cells, labels: Sequence[str]) -> list[str]:
    """Return the labels with at least two cells.

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
    kept = [label for label in labels if n_cells[label] >= 2]
    if not kept:
        msg = f"A replicate needs a perturbation with at least two cells; received {preview(labels) or 'none'} with one cell each."
        raise ValueError(msg)
    return kept


def replicate_scores(cells: Cells, labels: Sequence[str], *, n_repeats: int, rng: np.random.Generator) -> pd.DataFrame:
    """Score one half of the cells against the other; rows are repeats, columns metrics."""
    kept = can_be_halved(cells, labels)
    untargeted = cells.untargeted_genes()
    scores = []
    for _ in range(n_repeats):
        effects, shifts = [], []
        for means in cells.means(cells.halves(rng)):
            labelled = means.loc[kept].to_numpy()
            effects.append(labelled - means.loc[cells.rule.control_name].to_numpy())
            shifts.append(labelled - labelled.mean(axis=0))
        scores.append(score_panel(Panel(effects[0], effects[1], shifts[0], shifts[1], untargeted)))
    return pd.DataFrame(scores, columns=list(METRICS))


def replicate_ceiling(
    adata: AnnData,
    perturbation_key: str,
    *,
    control: str | Sequence[str] = "control",
    sep: str | None = "+",
    layer: str | None = None,
    n_repeats: int = 5,
    seed: int | None = 0,
) -> pd.DataFrame:
    """Score the experiment against itself: what a repeat with half of the cells would reach.

    The cells of every label, controls included, are split at random into two halves, so that the effects of the two
    halves share no cell. With shared controls the score would be too high (two groups of control cells, each minus the
    same controls, correlate at about 0.5).

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
    n_repeats
        Number of random halvings.
    seed
        Seed of the halvings.

    Returns
    -------
    DataFrame with the metrics of :func:`evaluate` as index and the columns ``mean`` and ``sd`` over repeats (``sd`` is
    0 for one repeat). Labels with a single cell are left out.

    Raises
    ------
    KeyError
        If the column or the layer is not there.
    ValueError
        If there are fewer than two controls, or no label with two cells.

    Notes
    -----
    Both sides have half of the cells. A prediction that is less noisy than half an experiment can score higher.
    """
    check_positive("n_repeats", n_repeats, integer=True)
    rule = LabelRule.create(control, sep)
    cells = Cells.read(adata, perturbation_key, rule, layer=layer, name="adata")
    scores = replicate_scores(cells, cells.perturbations, n_repeats=n_repeats, rng=np.random.default_rng(seed))
    sd = scores.std(ddof=1) if n_repeats > 1 else 0.0
    return pd.DataFrame({"mean": scores.mean(), "sd": sd}).rename_axis("metric")
