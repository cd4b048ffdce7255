"""Whether masks of treatments tell their pathways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import ShuffleSplit

from scvi_cradle._validation import check_positive, check_probability, preview
from scvi_cradle.metrics._latents import mask_frame


def pathway_accuracy(
    mask_prob: AnnData | pd.DataFrame,
    pathways: Mapping[str, Any] | pd.Series,
    *,
    n_splits: int = 10,
    test_fraction: float = 0.3,
    seed: int = 0,
) -> dict[str, float]:
    """Predict the pathways of treatments from their binary masks with a random forest.

    Parameters
    ----------
    mask_prob
        Mask probabilities, treatments x latents: the AnnData of a model's ``get_perturbation_effects()``, read from
        ``layers["mask_prob"]``, or a DataFrame. The forest sees whether a probability exceeds 0.5.
    pathways
        Pathway of every treatment, by name: a mapping, or a Series with treatments as index. Treatments without a
        pathway, or with a missing one, are left out; names that are no treatments are ignored.
    n_splits
        Number of random splits, at least 2.
    test_fraction
        Share of the treatments, in (0, 1), that each split holds out; rounded up.
    seed
        Seed of splits and forests; no global state is touched.

    Returns
    -------
    ``accuracy`` and ``sd``: mean and standard deviation (``n - 1``) over the splits of the share of held-out treatments
    whose pathway is predicted; ``baseline``: mean accuracy, on the same splits, of always naming the most
    frequent pathway of the training treatments; ``n_treatments`` and ``n_pathways`` used.

    Raises
    ------
    ValueError
        If fewer than two pathways or too few treatments are left, or an argument is out of range.
    TypeError
        If ``mask_prob`` or ``pathways`` carries no names.
    KeyError
        If the AnnData has no layer ``"mask_prob"``.

    Notes
    -----
    The comparison of :cite:`bereket2023samsvae` on the screen of :cite:`replogle2022`: scikit-learn's
    ``RandomForestClassifier`` with its defaults, 10 random splits of 70/30 %, not stratified, so that a rare pathway
    may be missing from training. The splits overlap: ``sd`` is their spread, not a standard error. Latents may be in
    any order. Guides of one target are near copies; label a single one of them.
    """
    if not isinstance(mask_prob, AnnData | pd.DataFrame):
        msg = f"`mask_prob` must be an AnnData or a DataFrame with treatments as names; received {type(mask_prob).__name__}."
        raise TypeError(msg)
    check_positive("n_splits", n_splits, integer=True)
    if n_splits < 2:
        msg = f"`n_splits` must be at least 2, to give a standard deviation; received {n_splits}."
        raise ValueError(msg)
    check_probability("test_fraction", test_fraction)
    check_positive("seed", seed, integer=True, allow_zero=True)
    labels = _labels(pathways)
    mask = mask_frame(mask_prob, "mask_prob")
    mask = mask[mask.index.isin(labels.index)]
    features, target = mask.to_numpy(), labels.loc[mask.index].to_numpy()
    n_pathways = len(set(target))
    if n_pathways < 2:
        msg = (
            f"`pathways` must give at least two different pathways to the treatments; received {n_pathways} for "
            f"{len(target)} of the treatments: its names must be those of `mask_prob`."
        )
        raise ValueError(msg)

    split_seed, *forest_seeds = np.random.default_rng(seed).integers(2**31, size=n_splits + 1).tolist()
    splits = ShuffleSplit(n_splits, test_size=test_fraction, random_state=split_seed).split(features)
    scores = [
        _score_split(features, target, train, test, at) for (train, test), at in zip(splits, forest_seeds, strict=True)
    ]
    accuracy, baseline = np.array(scores).T
    return {
        "accuracy": float(accuracy.mean()),
        "sd": float(accuracy.std(ddof=1)),
        "baseline": float(baseline.mean()),
        "n_treatments": len(target),
        "n_pathways": n_pathways,
    }


def _labels(pathways: Any) -> pd.Series:
    if not isinstance(pathways, Mapping | pd.Series):
        msg = f"`pathways` must be a mapping or a Series from treatment to pathway; received {type(pathways).__name__}."
        raise TypeError(msg)
    labels = pd.Series(pathways, dtype=object).dropna().astype(str)
    if not labels.index.is_unique:
        doubled = labels.index[labels.index.duplicated()].unique()
        msg = f"`pathways` must give one pathway to a treatment; received several for {preview(doubled)}: choose one."
        raise ValueError(msg)
    return labels


def _score_split(
    features: np.ndarray, target: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int
) -> tuple[float, float]:
    """Return the accuracies of a forest and of the most frequent pathway."""
    forest = RandomForestClassifier(random_state=seed).fit(features[train], target[train])
    names, counts = np.unique(target[train], return_counts=True)
    guesses = forest.predict(features[test]), names[counts.argmax()]
    accuracy, baseline = (float((target[test] == guess).mean()) for guess in guesses)
    return accuracy, baseline
