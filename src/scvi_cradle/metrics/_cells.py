"""Counts with labels, and their means over random parts of the cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from scvi_cradle._constants import COLUMNS
from scvi_cradle._labels import LabelRule
from scvi_cradle._matrix import is_dask, log_normalize, rows_of, sum_blocks
from scvi_cradle._validation import preview
from scvi_cradle.metrics._effects import read_counts, read_labels


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

    @classmethod
    def read_predicted(cls, predicted: AnnData, perturbation_key: str, rule: LabelRule, layer: str | None) -> Cells:
        """Read generated cells: the label column, the layer and the control may have the names that models give them."""
        key, own_layer = perturbation_key, layer
        if isinstance(predicted, AnnData):
            if key not in predicted.obs and COLUMNS.PERTURBATION in predicted.obs:
                key = COLUMNS.PERTURBATION
            own_layer = layer if layer in predicted.layers else None
        named = LabelRule(tuple(dict.fromkeys((*rule.control, rule.control_name))), rule.sep, rule.missing_is_control)
        return cls.read(predicted, key, named, layer=own_layer, name="predicted", need_control=False)

    def subset(self, kept: np.ndarray) -> Cells:
        """Return some of the cells; ``kept`` is boolean, and every label must keep a cell."""
        return replace(self, matrix=self.matrix[np.flatnonzero(kept)], codes=self.codes[kept])

    @property
    def perturbations(self) -> list[str]:
        """Labels without the control."""
        return [label for label in self.labels if label != self.rule.control_name]

    @property
    def n_cells(self) -> pd.Series:
        """Number of cells of every label."""
        return pd.Series(np.bincount(self.codes, minlength=len(self.labels)), index=list(self.labels))

    def parts(self, rng: np.random.Generator, n_parts: int, among: Sequence[str] | None = None) -> np.ndarray:
        """Deal the cells of every label (of ``among`` only) at random into parts of equal size; all others into part 0."""
        order = np.lexsort((rng.random(len(self.codes)), self.codes))
        n_cells = np.bincount(self.codes, minlength=len(self.labels))
        start = np.concatenate([[0], np.cumsum(n_cells)[:-1]])
        part = np.empty(len(self.codes), dtype=np.int64)
        part[order] = (np.arange(len(order)) - start[self.codes[order]]) % n_parts
        if among is not None:
            chosen = np.array([label in set(among) for label in self.labels], dtype=bool)
            part[~chosen[self.codes]] = 0
        return part

    def sums(self, parts: Sequence[np.ndarray], n_parts: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return cells, ``(n_parts, n_labels)``, and summed log2 expression, ``(n_parts, n_labels, n_genes)``, of partitions."""
        n = len(self.labels)
        codes = [self.codes + n * part for part in parts]

        def add(totals: list[np.ndarray], raw: sp.csr_matrix, *groups: np.ndarray) -> None:
            block, cells = log_normalize(raw), np.arange(raw.shape[0])
            for group, total in zip(groups, totals, strict=True):
                member = sp.csr_matrix((np.ones(len(cells)), (group, cells)), shape=(len(total), len(cells)))
                total += (member @ block).toarray()

        totals = sum_blocks(self.matrix, add, [(n_parts * n, len(self.genes))] * len(codes), *codes)
        return [
            (np.bincount(code, minlength=n_parts * n).reshape(n_parts, n), total.reshape(n_parts, n, -1))
            for code, total in zip(codes, totals, strict=True)
        ]

    def means(self, part: np.ndarray | None = None, n_parts: int = 1) -> list[pd.DataFrame]:
        """Return mean log2 expression of the labels in every part; a label has a row where it has cells."""
        ((n_cells, total),) = self.sums([np.zeros_like(self.codes) if part is None else part], n_parts)
        return [self.frame(n, s) for n, s in zip(n_cells, total, strict=True)]

    def frame(self, n_cells: np.ndarray, total: np.ndarray) -> pd.DataFrame:
        """Return means from sums; a label has a row where it has cells."""
        mean = total / np.maximum(n_cells, 1)[:, None]
        return pd.DataFrame(mean, index=list(self.labels), columns=self.genes)[n_cells > 0]

    def targets(self, labels: Sequence[str]) -> np.ndarray:
        """Mark for every label the genes that its treatments are named after, shape ``(n_labels, n_genes)``."""
        return np.stack([self.genes.isin(self.rule.treatments(label)) for label in labels])

    def untargeted_genes(self) -> np.ndarray:
        """Mark the genes that no treatment is named after, shape ``(n_genes,)``."""
        treatments = {t for label in self.labels for t in self.rule.treatments(label)}
        return ~self.genes.isin(sorted(treatments))

    def draw(self, labels: Sequence[str], n: int, rng: np.random.Generator) -> np.ndarray:
        """Return rows of at most ``n`` cells of the labels: every label is equally likely where there are several."""
        if len(labels) == 1:
            rows = np.flatnonzero(self.codes == self.labels.index(labels[0]))
            return np.sort(rng.choice(rows, min(n, len(rows)), replace=False))
        rows = np.flatnonzero(np.isin(self.codes, [self.labels.index(x) for x in labels]))
        weight = 1.0 / np.bincount(self.codes, minlength=len(self.labels))[self.codes[rows]]
        return np.sort(rng.choice(rows, min(n, len(rows)), replace=False, p=weight / weight.sum()))

    def expressions(self, draws: Sequence[np.ndarray], genes: pd.Index) -> Iterator[np.ndarray]:
        """Yield log2 expression of several draws of cells, dense, in the order of ``genes``.

        Of a dask array the cells of all draws are read at once: it is passed through once and not once per draw.
        """
        matrix, places = self.matrix, list(draws)
        if is_dask(matrix) and draws:
            rows, position = np.unique(np.concatenate(draws), return_inverse=True)
            matrix = rows_of(matrix, rows)
            places = np.split(position, np.cumsum([len(rows) for rows in draws])[:-1])
        for rows in places:
            values = log_normalize(rows_of(matrix, rows)).toarray()
            yield values if self.genes.equals(genes) else values[:, self.genes.get_indexer(genes)]


def check_same_genes(truth: Cells, cells: Cells, name: str) -> None:
    """Raise ``ValueError`` unless ``cells`` hold the genes of the truth, in any order."""
    if set(cells.genes) != set(truth.genes):
        n_common = len(truth.genes.intersection(cells.genes))
        msg = (
            f"`{name}` must hold the genes of `real`; received {len(cells.genes)} genes, {n_common} among the "
            f"{len(truth.genes)} of `real`: subset both to the genes in common."
        )
        raise ValueError(msg)


def check_predicted(truth: Cells, other: Cells) -> None:
    """Raise ``ValueError`` unless the predicted cells can be compared with the real ones."""
    check_same_genes(truth, other, "predicted")
    if not other.perturbations:
        msg = "`predicted` must hold cells of at least one perturbation; received only controls or no cell."
        raise ValueError(msg)
    unknown = sorted(set(other.perturbations) - set(truth.perturbations))
    if unknown:
        msg = f"Every perturbation of `predicted` must have real cells; received {preview(unknown)} without any: drop them from `predicted`."
        raise ValueError(msg)
