"""Cells of a screen by cell type and target, and what a round of the perturbation loop computes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_cradle._loop_settings import LoopSettings
from scvi_cradle._matrix import weighted_sums
from scvi_cradle.metrics import kish_effective_size
from scvi_cradle.metrics._welch_many import welch_tests

MIN_CELLS = 10
MIN_EXPRESSING = 50  # below so many expected cells that express a gene its variance has a lower bound


@dataclass(frozen=True)
class Screen:
    """Categories (cell type x target) of a screen, in flat form.

    Parameters
    ----------
    target, cell_type
        Names of every category, each ``(n_categories,)``.
    row, category
        Position and category of every labelled cell, each ``(n_labelled,)``, by category. A cell with two targets occurs
        twice.
    prior
        Guide prior of these, 0 on average over a category, ``(n_labelled,)``.
    guide
        Code of the most abundant guide of these, ``(n_labelled,)``; all 0 without guide counts.
    control_row, control_category
        The same of the controls of every category, each ``(n_controls,)``.
    is_train
        Whether a cell is for training, ``(n_cells,)``.
    """

    target: np.ndarray
    cell_type: np.ndarray
    row: np.ndarray
    category: np.ndarray
    prior: np.ndarray
    guide: np.ndarray
    control_row: np.ndarray
    control_category: np.ndarray
    is_train: np.ndarray

    @property
    def n_categories(self) -> int:
        """Number of categories."""
        return len(self.target)

    @property
    def is_large_enough(self) -> np.ndarray:
        """Whether a category has 10 cells, and 10 controls, for training, ``(n_categories,)``."""
        sizes = [
            np.bincount(category[self.is_train[row]], minlength=self.n_categories)
            for row, category in ((self.row, self.category), (self.control_row, self.control_category))
        ]
        return (sizes[0] >= MIN_CELLS) & (sizes[1] >= MIN_CELLS)

    def matrix(self, weights: np.ndarray, *, controls: bool = False) -> sp.csr_matrix:
        """Return weights of labelled cells (or of controls) as a matrix, shape ``(n_cells, n_categories)``."""
        where = (self.control_row, self.control_category) if controls else (self.row, self.category)
        return sp.csr_matrix((weights, where), shape=(len(self.is_train), self.n_categories))

    def split(self, values: np.ndarray, *, controls: bool = False) -> list[np.ndarray]:
        """Return values of labelled cells (or of controls) by category."""
        category = self.control_category if controls else self.category
        return np.split(values, np.searchsorted(category, np.arange(1, self.n_categories)))


def make_screen(
    labels: pd.Categorical,
    treatments_of: dict[str, tuple[str, ...]],
    treatments: tuple[str, ...],
    cell_types: np.ndarray,
    prior: pd.DataFrame | None,
    guide: np.ndarray | None,
    used: np.ndarray,
    is_train: np.ndarray,
) -> Screen:
    """Sort cells into categories.

    Parameters
    ----------
    labels
        Label of every cell.
    treatments_of
        Treatments of every label; controls have none.
    treatments
        All treatments.
    cell_types
        Cell type of every cell, text.
    prior
        Guide prior, cells x treatments; None: 0.
    guide
        Code of the most abundant guide of every cell and treatment, ``(n_cells, n_treatments)``, or None.
    used, is_train
        Which cells are used at all, and for training.
    """
    codes = labels.codes
    is_control = np.array([not treatments_of[c] for c in labels.categories])[codes]
    names, rows, control_rows, priors, guides = [], [], [], [], []
    for cell_type in np.unique(cell_types[used]):
        of_type = used & (cell_types == cell_type)
        controls = np.flatnonzero(of_type & is_control)
        for t, treatment in enumerate(treatments):
            carries = np.array([treatment in treatments_of[c] for c in labels.categories])[codes]
            cells = np.flatnonzero(of_type & carries)
            if not len(cells):
                continue
            names.append((treatment, cell_type))
            rows.append(cells)
            control_rows.append(controls)
            priors.append(np.zeros(len(cells)) if prior is None else prior[treatment].to_numpy()[cells])
            guides.append(np.zeros(len(cells), dtype=np.int64) if guide is None else guide[cells, t])
    order = sorted(range(len(names)), key=names.__getitem__)

    def joined(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
        return np.concatenate([parts[i] for i in order]).astype(dtype) if order else np.zeros(0, dtype)

    def category(parts: list[np.ndarray]) -> np.ndarray:
        return np.repeat(np.arange(len(order)), [len(parts[i]) for i in order])

    return Screen(
        target=np.array([names[i][0] for i in order], dtype=object),
        cell_type=np.array([names[i][1] for i in order], dtype=object),
        row=joined(rows, np.int64),
        category=category(rows),
        prior=joined(priors, np.float64),
        guide=joined(guides, np.int64),
        control_row=joined(control_rows, np.int64),
        control_category=category(control_rows),
        is_train=is_train,
    )


def gene_tests(
    x: sp.csr_matrix,
    screen: Screen,
    probability: np.ndarray,
    control_score: np.ndarray | None,
    settings: LoopSettings,
) -> dict[str, np.ndarray]:
    """Test every gene in every category with cells weighted by their probability (quantile-hurdle paper, 4.3).

    Parameters
    ----------
    x
        Expression, shape ``(n_cells, n_genes)``.
    screen
        The categories.
    probability
        Of labelled cells, ``(n_labelled,)``.
    control_score
        The same score of controls, ``(n_controls,)``, their weight; None: 1.
    settings
        ``gamma``, ``variance_floor``, ``fdr_level``, ``max_genes``.

    Returns
    -------
    Arrays ``(n_categories, n_genes)``: ``statistic``, ``pvalue``, ``padj`` (Bonferroni), ``mean_difference``,
    ``significant`` and ``selected`` (of these the ``max_genes`` with the smallest p-values); and ``n_eff``,
    ``(n_categories,)``.
    """
    controls = np.ones(len(screen.control_row)) if control_score is None else control_score**settings.gamma
    test, reference = screen.matrix(probability**settings.gamma), screen.matrix(controls, controls=True)
    floor = _sparse_genes(x, screen, probability**settings.gamma) if settings.variance_floor else None
    out = welch_tests(x, test, reference, floor=floor)
    pvalue, difference = out["pvalue"], np.abs(out["mean_difference"])
    padj = np.minimum(pvalue * x.shape[1], 1.0)
    significant = padj <= settings.fdr_level
    rank = np.empty(pvalue.shape, dtype=np.int64)
    for c in range(len(pvalue)):
        rank[c, np.lexsort((-difference[c], pvalue[c]))] = np.arange(x.shape[1])
    return {
        "statistic": out["statistic"],
        "pvalue": pvalue,
        "padj": padj,
        "mean_difference": out["mean_difference"],
        "n_eff": out["n_eff"],
        "significant": significant,
        "selected": significant & (rank < settings.max_genes),
    }


def _sparse_genes(x: sp.csr_matrix, screen: Screen, weights: np.ndarray) -> np.ndarray:
    """Return for which categories and genes few test cells would express a gene at the rate of controls."""
    of_control = screen.matrix(np.ones(len(screen.control_row)), controls=True)
    (n_expressing,) = weighted_sums(x, of_control, lambda values: values > 0)
    rate = n_expressing / np.maximum(np.asarray(of_control.sum(axis=0)).reshape(-1, 1), 1)
    n_eff = [kish_effective_size(w) for w in screen.split(weights)]
    return rate * np.reshape(n_eff, (-1, 1)) < MIN_EXPRESSING


def sampling_weights(screen: Screen, n_significant: np.ndarray, settings: LoopSettings) -> np.ndarray:
    """Return how often cells are drawn in training, ``(n_cells,)``: more often in categories with many significant genes."""
    often = n_significant >= settings.oversample_min_genes
    weights = np.ones(len(screen.is_train))
    weights[screen.row[often[screen.category]]] = settings.oversample
    return weights
