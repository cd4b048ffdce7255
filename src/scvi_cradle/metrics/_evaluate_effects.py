"""The report on predicted effects."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle._labels import LabelRule
from scvi_cradle._validation import check_positive
from scvi_cradle.metrics._effects import Effects, align_effects
from scvi_cradle.metrics._panel import METRICS, Panel
from scvi_cradle.metrics._report import build_report
from scvi_cradle.metrics._rows import less
from scvi_cradle.metrics._scores import mean_effect


def evaluate_effects(
    real: Effects,
    predicted: Effects,
    *,
    train: Effects,
    ceiling: pd.DataFrame,
    sep: str | None = "+",
    exclude_targets: bool = False,
    n_bootstrap: int = 200,
    seed: int | None = 0,
) -> pd.DataFrame:
    """Score predicted effects beside the mean training effect and a repeat of the experiment.

    For predictions that are effects, such as those of ``get_average_treatment_effects``; :func:`evaluate` takes cells.

    Parameters
    ----------
    real
        Measured effects of held-out cells, best against controls that no method has seen, as
        :func:`average_treatment_effects` gives them. AnnData, DataFrame, or array of shape ``(n_perturbations, n_genes)``.
    predicted
        Predicted effects of the same perturbations and genes, in any order where they have names.
    train
        Measured effects of the training perturbations; their mean is the baseline, and the reference of
        ``pearson_delta_perturbed_mean``.
    ceiling
        :func:`replicate_ceiling` of the cells that ``real`` was measured on, with the same ``train`` and
        ``exclude_targets``.
    sep
        Text between the treatments of a combination in names of perturbations; ``None``: names are never split.
    exclude_targets
        Leave the genes that a perturbation targets out of its scores.
    n_bootstrap, seed
        Draws of perturbations with replacement, and their seed.

    Returns
    -------
    DataFrame as of :func:`evaluate`, without ``energy_distance``. The interval of ``scaled`` takes the ceiling as known.

    Raises
    ------
    ValueError
        If perturbations or genes do not match, a value is not finite, ``ceiling`` is no result of
        :func:`replicate_ceiling`, or targets are to be left out of effects without names.
    """
    check_positive("n_bootstrap", n_bootstrap, integer=True, allow_zero=True)
    x, y = align_effects(real, predicted)
    if (
        not isinstance(ceiling, pd.DataFrame)
        or "full_size" not in ceiling
        or ceiling.empty
        or not np.isfinite(ceiling["full_size"].to_numpy(dtype=np.float64)).all()
    ):
        msg = "`ceiling` must be the result of `replicate_ceiling`; received one without finite values of 'full_size'."
        raise ValueError(msg)
    mean = mean_effect(train, x.columns)
    offset = np.zeros(len(mean))
    reference = "mean effect of `train`, against controls"
    if isinstance(real, AnnData) and isinstance(train, AnnData) and all("control_mean" in a.var for a in (real, train)):
        # measured cells against the mean training perturbation: no controls enter
        offset = (real.var["control_mean"] - train.var["control_mean"].reindex(real.var_names)).to_numpy()
        reference = "mean profile of `train`, without controls"
    own, untargeted = _targets(x, _names(train), sep)
    if exclude_targets and own is None:
        msg = "`exclude_targets` needs effects with names of perturbations and genes; received arrays."
        raise ValueError(msg)
    scored = ~own if exclude_targets and own is not None else None
    truth, guess = x.to_numpy(), y.to_numpy()
    constant = np.tile(mean, (len(truth), 1))
    shift = less(truth + offset, mean)
    return build_report(
        Panel(truth, guess, shift, less(guess, mean), untargeted, scored),
        Panel(truth, constant, shift, np.zeros_like(constant), untargeted, scored),
        lambda name, weights: np.full(len(weights), float(ceiling.loc[name, "full_size"])),
        names=[name for name in METRICS if name in ceiling.index],
        n_bootstrap=n_bootstrap,
        rng=np.random.default_rng(seed),
        notes=[
            "baseline: mean effect of `train`",
            "ceiling: `full_size` of the given replicate",
            f"perturbed mean: {reference}",
        ],
    )


def _targets(effects: pd.DataFrame, others: list[str], sep: str | None) -> tuple[np.ndarray | None, np.ndarray]:
    """Mark the genes that perturbations are named after: by perturbation, and those that none is; arrays have no names."""
    if any(isinstance(index, pd.RangeIndex) for index in (effects.index, effects.columns)):
        return None, np.ones(effects.shape[1], dtype=bool)
    rule = LabelRule.create("control", sep)
    names, genes = effects.index.astype(str), effects.columns.astype(str)
    own = np.stack([genes.isin(rule.treatments(name)) for name in names])
    return own, ~genes.isin(sorted({t for name in [*names, *others] for t in rule.treatments(name)}))


def _names(effects: Effects) -> list[str]:
    if isinstance(effects, np.ndarray):
        return []
    return [str(name) for name in (effects.obs_names if isinstance(effects, AnnData) else effects.index)]
