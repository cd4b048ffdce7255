"""How well a linear classifier reads labels off a representation."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scvi_cradle._validation import check_positive, check_probability, preview
from scvi_cradle.metrics._latents import as_matrix

_MAX_ITER = 1000


def linear_probe(
    representation: ArrayLike,
    labels: ArrayLike,
    *,
    test_fraction: float = 0.2,
    n_components: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return how well a linear classifier tells the labels of held-out cells from their representation.

    Parameters
    ----------
    representation
        Latents or expression of shape ``(n_cells, n_dimensions)``.
    labels
        Label of every cell, e.g. its perturbation, of length ``n_cells``.
    test_fraction
        Share of the cells of every label that is held out, in (0, 1), rounded; at least one cell, and never all.
    n_components
        Number of principal components, fitted on the training cells, that stand for the representation. Default: the
        representation as it is.
    seed
        Seed of the split and of the principal components.

    Returns
    -------
    ``accuracy`` (share of the held-out cells whose label is told) beside ``chance`` (share of the most frequent label
    among them, what a guess without the representation reaches); ``balanced_accuracy`` (mean over the labels) beside
    ``balanced_chance`` (``1 / n_classes``); ``n_classes``; ``n_test``, the number of held-out cells.

    Raises
    ------
    ValueError
        If cells do not match, a value is not finite or a label is missing, there are fewer than two labels or a label
        has fewer than two cells, or an argument is out of range.

    Warns
    -----
    UserWarning
        If the classifier does not converge in 1,000 iterations; its scores are still those of held-out cells.

    Notes
    -----
    Multinomial logistic regression with scikit-learn's penalty ``C=1`` on columns scaled to variance 1 over
    the training cells. It answers two questions about PerturbedVAE: whether a representation tells perturbations, and
    whether the latents that should not depend on them leak them; then both accuracies are near chance. An
    encoder that was given the labels can hand them on, so probe one that was not. An accuracy near chance excludes a
    linear trace only. The paper does not state its protocol; this one is a choice of this package.

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_cradle.metrics import linear_probe
    >>> labels = np.repeat(["A", "B"], 50)
    >>> z = np.random.default_rng(0).normal(size=(100, 3)) + 5 * (labels == "A")[:, None]
    >>> linear_probe(z, labels)["accuracy"]
    1.0
    """
    check_probability("test_fraction", test_fraction)
    check_positive("seed", seed, integer=True, allow_zero=True)
    values = as_matrix(representation, "representation")
    codes, n_classes = _class_codes(labels, len(values))
    test = _held_out(np.random.default_rng(seed), codes, test_fraction)
    steps = [StandardScaler(), LogisticRegression(C=1.0, max_iter=_MAX_ITER)]
    if n_components is not None:
        _check_components(n_components, int((~test).sum()), values.shape[1])
        steps.insert(0, PCA(n_components, random_state=seed))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        told = make_pipeline(*steps).fit(values[~test], codes[~test]).predict(values[test])
    _pass_on(caught)
    return {
        "accuracy": float(accuracy_score(codes[test], told)),
        "balanced_accuracy": float(balanced_accuracy_score(codes[test], told)),
        "chance": float(np.bincount(codes[test]).max() / test.sum()),
        "balanced_chance": 1.0 / n_classes,
        "n_classes": n_classes,
        "n_test": int(test.sum()),
    }


def _class_codes(labels: ArrayLike, n_cells: int) -> tuple[np.ndarray, int]:
    names = pd.Series(np.asarray(labels).ravel(), dtype=object)
    if len(names) != n_cells or names.isna().any():
        msg = (
            f"`labels` must hold a label for each of the {n_cells} cells; "
            f"received {len(names)}, {int(names.isna().sum())} of them missing: drop cells without a label."
        )
        raise ValueError(msg)
    codes, classes = pd.factorize(names)
    sizes = np.bincount(codes)
    if len(classes) < 2:
        msg = f"`labels` must hold at least two different labels; received {preview(classes)}."
        raise ValueError(msg)
    if sizes.min() < 2:
        msg = (
            "Every label must have at least 2 cells, one to train on and one to hold out; received one cell of "
            f"{preview(classes[sizes < 2])}: drop these cells or pool labels."
        )
        raise ValueError(msg)
    return codes, len(classes)


def _held_out(rng: np.random.Generator, codes: np.ndarray, fraction: float) -> np.ndarray:
    """Mark the rounded share of the cells of every class, at least one and never all."""
    test = np.zeros(len(codes), dtype=bool)
    for code, size in enumerate(np.bincount(codes)):
        n_test = int(np.clip(round(fraction * size), 1, size - 1))
        test[rng.permutation(np.flatnonzero(codes == code))[:n_test]] = True
    return test


def _check_components(n_components: int, n_train: int, n_dimensions: int) -> None:
    check_positive("n_components", n_components, integer=True)
    most = min(n_train, n_dimensions)
    if n_components > most:
        msg = (
            f"`n_components` must not exceed the {n_dimensions} dimensions and the {n_train} training cells; "
            f"received {n_components}: lower it to {most} or leave it out."
        )
        raise ValueError(msg)


def _pass_on(caught: list[warnings.WarningMessage]) -> None:
    """Warn once, in our words, if the classifier did not converge; other warnings as they are."""
    failed = [item for item in caught if issubclass(item.category, ConvergenceWarning)]
    if failed:
        text = (
            f"The linear probe did not converge in {_MAX_ITER} iterations: its scores may be too low; "
            "reduce the dimensions with `n_components`."
        )
        warnings.warn(text, UserWarning, stacklevel=3)
    for item in caught:
        if item not in failed:
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
