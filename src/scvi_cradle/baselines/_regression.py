"""Regression of mean expression on which treatments a label holds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from anndata import AnnData
from sklearn.linear_model import ElasticNet as LinearRegressor

from scvi_cradle._labels import LabelTable
from scvi_cradle._validation import check_positive
from scvi_cradle.baselines._base import EffectBaseline, raw_arrays

MAX_ITERATIONS = 10_000


class MeanRegression(EffectBaseline):
    """A regression of the mean log2 expression of labels on their treatments (0 or 1), the control among the labels.

    A predicted effect is the predicted mean minus the measured mean of the controls; the control itself has effect 0.
    """

    def _learn(self, effects: AnnData) -> None:
        super()._learn(effects)
        names = [self._rule.control_name, *effects.obs_names]
        rows = [self._table.labels.index(name) for name in names]
        measured = np.vstack([np.zeros(effects.n_vars), raw_arrays(effects)[0]])
        self._regress(self._table.dosage[rows], measured + effects.var["control_mean"].to_numpy())

    def _effects(self, labels: Sequence[str], members: Sequence[tuple[int, ...]]) -> np.ndarray:
        asked = LabelTable(tuple(labels), self._table.treatments, tuple(members)).dosage
        predicted = self._predict(asked) - self._raw.var["control_mean"].to_numpy()
        predicted[[not parts for parts in members]] = 0.0
        return predicted

    @abstractmethod
    def _regress(self, treatments: np.ndarray, expression: np.ndarray) -> None:
        """Learn from labels: treatments ``(n_labels, n_treatments)`` and mean expression ``(n_labels, n_genes)``."""

    @abstractmethod
    def _predict(self, asked: np.ndarray) -> np.ndarray:
        """Return the expression of labels with treatments ``asked``, shape ``(n_asked, n_genes)``."""


class NearestNeighbors(MeanRegression):
    """Predict the mean expression of the labels that have the most similar treatments (k nearest neighbours).

    Distances are Euclidean between rows of 0 and 1, one column per treatment. A seen label is its own nearest neighbour,
    followed by the control (for a single treatment) and by combinations that share its treatments.

    Parameters
    ----------
    n_neighbors
        Number of labels that are averaged with equal weights, the control counted; all of them where there are fewer.

    Raises
    ------
    ValueError
        If ``n_neighbors`` is not a positive integer.

    Notes
    -----
    Single treatments are all equally far from each other, so that ties are the rule. Labels that tie for the last places
    share them equally: the mean of scikit-learn's ``KNeighborsRegressor`` over all orders of the labels.
    """

    def __init__(self, n_neighbors: int = 5) -> None:
        check_positive("n_neighbors", n_neighbors, integer=True)
        self._n_neighbors = n_neighbors

    def _regress(self, treatments: np.ndarray, expression: np.ndarray) -> None:
        self._treatments, self._expression = treatments, expression

    def _predict(self, asked: np.ndarray) -> np.ndarray:
        differ = np.abs(asked[:, None] - self._treatments).sum(2)  # squared distances, (n_asked, n_labels)
        n = min(self._n_neighbors, len(self._treatments))
        last = np.sort(differ, axis=1)[:, n - 1 : n]
        nearer, tied = differ < last, differ == last
        places = n - nearer.sum(1, keepdims=True)
        return (nearer + tied * places / tied.sum(1, keepdims=True)) @ self._expression / n


class ElasticNet(MeanRegression):
    r"""Predict mean expression by a linear regression with L1 and L2 penalty (elastic net), gene by gene.

    Minimises :math:`\frac{1}{2n} \|y - c - X w\|^2 + \alpha \rho \|w\|_1 + \frac{\alpha (1 - \rho)}{2} \|w\|^2` over the
    :math:`n` labels (the control among them), :math:`\rho` being ``l1_ratio``; unseen combinations add up.

    Parameters
    ----------
    alpha
        Strength of the penalty. A treatment is 1 in few of the :math:`n` labels, so that its coefficient is 0 unless
        its effect exceeds about :math:`n \alpha \rho` log2 units. Default: :math:`1/(4n)`, which keeps effects above
        an eighth of a log2 unit. scikit-learn's default, 1, leaves no coefficient and predicts the mean over labels.
    l1_ratio
        Share of the L1 penalty, from 0 (ridge) to 1 (lasso); scikit-learn's default.

    Raises
    ------
    ValueError
        If ``alpha`` is given and not positive or ``l1_ratio`` is not in [0, 1].
    """

    def __init__(self, alpha: float | None = None, l1_ratio: float = 0.5) -> None:
        if alpha is not None:
            check_positive("alpha", alpha)
        check_positive("l1_ratio", l1_ratio, allow_zero=True)
        if l1_ratio > 1:
            msg = f"`l1_ratio` must lie between 0 and 1; received {l1_ratio!r}."
            raise ValueError(msg)
        self._alpha, self._l1_ratio = alpha, l1_ratio

    def _regress(self, treatments: np.ndarray, expression: np.ndarray) -> None:
        alpha = 0.25 / len(treatments) if self._alpha is None else self._alpha
        model = LinearRegressor(alpha=alpha, l1_ratio=self._l1_ratio, max_iter=MAX_ITERATIONS)
        self._model = model.fit(treatments.astype(np.float64), expression)

    def _predict(self, asked: np.ndarray) -> np.ndarray:
        return self._model.predict(asked.astype(np.float64)).reshape(len(asked), -1)
