"""What the baselines share: the training effects, and cells that show an effect."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from scvi_cradle._constants import COLUMNS, CONTROL_UNS_KEY
from scvi_cradle._labels import LabelRule, LabelTable, canonical_labels, label_members
from scvi_cradle._matrix import get_matrix, to_csr
from scvi_cradle._validation import check_positive, preview
from scvi_cradle.baselines._shift import CountShifter
from scvi_cradle.metrics import average_treatment_effects

MAX_CONTROLS = 10_000


class EffectBaseline(ABC):
    """A prediction that is one effect vector per label; subclasses say which."""

    def fit(
        self,
        adata: AnnData,
        perturbation_key: str,
        *,
        control: str | Sequence[str] = "control",
        sep: str | None = "+",
        layer: str | None = None,
    ) -> Self:
        """Measure the effects of the training cells.

        Parameters
        ----------
        adata
            Training cells with raw counts, controls among them.
        perturbation_key
            Column of ``adata.obs`` with one label per cell.
        control
            Token, or tokens, of control cells.
        sep
            Text between the treatments of a combination; ``None``: labels are never split.
        layer
            Layer with the counts; ``None``: ``adata.X``.

        Returns
        -------
        The fitted baseline. At most 10,000 control cells are kept, evenly spaced over the rows.

        Raises
        ------
        KeyError
            If the column or the layer is not there.
        ValueError
            If there is no control cell, no perturbed cell, a missing label or a value that is not a count.
        """
        effects = average_treatment_effects(adata, perturbation_key, control=control, sep=sep, layer=layer)
        rule = LabelRule.create(control, sep)
        labels = canonical_labels(adata.obs[perturbation_key], rule)
        rows = np.flatnonzero(np.asarray(labels == rule.control_name))
        if len(rows) > MAX_CONTROLS:
            rows = rows[np.linspace(0, len(rows) - 1, MAX_CONTROLS).astype(np.int64)]
        self._rule = rule
        self._perturbation_key = perturbation_key
        self._table = LabelTable.from_labels(labels.categories, rule)
        self._controls = to_csr(get_matrix(adata, layer)[rows]).astype(np.float32)
        self._shifter = CountShifter(effects.var["control_mean"].to_numpy(), self._controls)
        self._learn(effects)
        return self

    @property
    def seen_perturbations(self) -> list[str]:
        """Perturbations with training cells, sorted, the control not among them."""
        self._check_fitted()
        return [n for n in self._table.labels if n != self._rule.control_name]

    def get_average_treatment_effects(self, perturbations: Iterable[str] | None = None) -> AnnData:
        """Predict effects on the log2 scale of :func:`scvi_cradle.metrics.average_treatment_effects`.

        Parameters
        ----------
        perturbations
            Labels, in any spelling; ``None``: all perturbations seen in training, sorted. The control has effect 0.

        Returns
        -------
        AnnData of shape ``(n_labels, n_genes)`` in the order of the request, named canonically; ``obs["n_cells"]``:
        training cells, ``obs["seen"]``: ``"seen"`` or ``"unseen combination"``, ``uns["control"]``.

        Raises
        ------
        RuntimeError
            Before :meth:`fit`.
        ValueError
            If a treatment is unknown or a label is requested twice.
        """
        labels, members = self._request(perturbations, with_control=False)
        n_cells = self._raw.obs["n_cells"].reindex(labels).fillna(0).astype(np.int64)
        n_cells[[label for label in labels if label == self._rule.control_name]] = self._n_controls
        obs = pd.DataFrame({"n_cells": n_cells, COLUMNS.SEEN: self._seen(labels)}, index=pd.Index(labels))
        effects = self._effects(labels, members)
        var = pd.DataFrame(index=self._raw.var_names.copy())
        uns = {CONTROL_UNS_KEY: self._rule.control_name}
        return AnnData(effects, obs=obs, var=var, layers=self._layers(labels, members), uns=uns)

    def get_generated_expression(
        self, perturbations: Iterable[str] | None = None, n_samples: int = 100, *, seed: int | None = None
    ) -> AnnData:
        """Generate counts: control cells drawn with replacement, changed so that they show the predicted effect.

        Parameters
        ----------
        perturbations
            Labels, in any spelling; ``None``: all labels seen in training, the control too, sorted.
        n_samples
            Cells per label.
        seed
            Seed of the draws; ``None``: a fresh one.

        Returns
        -------
        AnnData of ``len(labels) * n_samples`` cells in the order of the request, ``X`` in CSR, float32, integers. obs:
        ``perturbation`` (and the column used in :meth:`fit`), ``artifact`` (False), ``seen``.

        Raises
        ------
        RuntimeError
            Before :meth:`fit`.
        ValueError
            If a treatment is unknown, a label is requested twice or ``n_samples`` is not a positive integer.

        Notes
        -----
        All labels change the same draw of control cells, so that their differences are the effects and little noise;
        the control itself is the draw as it is. Where the expected share of a gene falls, each of its counts is kept
        with the fitting probability; where it rises, Poisson counts are added at the library size of the cell. Shares
        are matched through the mean log2 expression of Poisson counts at the library sizes of the controls. Totals
        change as far as the effects imply.
        """
        check_positive("n_samples", n_samples, integer=True)
        labels, members = self._request(perturbations, with_control=True)
        rng = np.random.default_rng(seed)
        cells = self._controls[rng.integers(self._controls.shape[0], size=n_samples)]
        blocks = [self._shifter.apply(cells, effect, rng) for effect in self._effects(labels, members)]
        names = np.repeat(labels, n_samples)
        obs = pd.DataFrame(
            {COLUMNS.PERTURBATION: pd.Categorical(names), COLUMNS.ARTIFACT: False}, index=_names(len(names))
        )
        obs[COLUMNS.SEEN] = pd.Categorical(np.repeat(self._seen(labels), n_samples))
        if self._perturbation_key not in obs:
            obs[self._perturbation_key] = obs[COLUMNS.PERTURBATION]
        uns = {CONTROL_UNS_KEY: self._rule.control_name}
        var = pd.DataFrame(index=self._raw.var_names.copy())
        return AnnData(sp.vstack(blocks, format="csr"), obs=obs, var=var, uns=uns)

    def _learn(self, effects: AnnData) -> None:
        """Keep the training effects; subclasses learn more from them."""
        self._raw = effects

    @property
    def _n_controls(self) -> int:
        return int(self._raw.uns["n_control_cells"])

    @abstractmethod
    def _effects(self, labels: Sequence[str], members: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Return effects of canonical labels, shape ``(n_labels, n_genes)``; ``members`` are their treatments."""

    def _layers(self, labels: Sequence[str], members: Sequence[tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Return what is known beside the effects, arrays of their shape."""
        return {}

    def _request(
        self, perturbations: Iterable[str] | None, *, with_control: bool
    ) -> tuple[list[str], tuple[tuple[int, ...], ...]]:
        self._check_fitted()
        if perturbations is None:
            names = list(self._table.labels) if with_control else self.seen_perturbations
        else:
            asked = [perturbations] if isinstance(perturbations, str) else perturbations
            names = [self._rule.canonical(p) for p in asked]
        doubled = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        if doubled or not names:
            what = f"{preview(doubled)} more than once" if doubled else "no label"
            msg = f"`perturbations` must name at least one label, each of them once; received {what}."
            raise ValueError(msg)
        return names, label_members(names, self._table.treatments, self._rule)

    def _check_fitted(self) -> None:
        if not hasattr(self, "_table"):
            msg = (
                f"A baseline must be fitted before it predicts; received an unfitted {type(self).__name__}: call `fit`."
            )
            raise RuntimeError(msg)

    def _seen(self, labels: Sequence[str]) -> list[str]:
        known = set(self._table.labels)
        return ["seen" if label in known else "unseen combination" for label in labels]


class UnseenCombinationError(ValueError):
    """A baseline has no answer to an unseen combination: a treatment of it was not seen alone."""


class SumOfSingles(EffectBaseline):
    """Effects of seen labels are looked up; an unseen combination gets the sum of its single effects."""

    @abstractmethod
    def _label_effects(self) -> np.ndarray:
        """Return effects of the seen labels in the order of the raw effects, shape ``(n_seen, n_genes)``."""

    def _effects(self, labels: Sequence[str], members: Sequence[tuple[int, ...]]) -> np.ndarray:
        effects = self._label_effects()
        return np.stack([effects[rows].sum(axis=0) for rows in self._rows(labels, members)])

    def _rows(self, labels: Sequence[str], members: Sequence[tuple[int, ...]]) -> list[list[int]]:
        """Return for every label the rows of the raw effects that are added up; none for the control."""
        row_of = {label: row for row, label in enumerate(self._raw.obs_names)}
        out = []
        for label, parts in zip(labels, members, strict=True):
            names = [label] if label in row_of else [self._table.treatments[p] for p in parts]
            lacking = [n for n in names if n not in row_of]
            if lacking:
                msg = (
                    f"An unseen combination needs cells of each single treatment; received {label!r}, and "
                    f"{preview(lacking)} is seen in combinations only: add these cells, or use `PerturbedMean`."
                )
                raise UnseenCombinationError(msg)
            out.append([row_of[n] for n in names])
        return out


def _names(n: int) -> list[str]:
    return [f"generated_{i}" for i in range(n)]


def raw_arrays(effects: AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Return effects and their standard errors, each of shape ``(n_labels, n_genes)``."""
    return np.asarray(effects.X), np.asarray(effects.layers["sem"])
