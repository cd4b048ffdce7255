"""Effects of a model averaged with multivariate shrinkage of the raw effects of its training cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from anndata import AnnData

from scvi_cradle._constants import COLUMNS
from scvi_cradle._labels import LabelRule
from scvi_cradle._validation import check_positive, preview
from scvi_cradle.baselines import MultivariateShrinkage

SEEN_WEIGHT, UNSEEN_WEIGHT = 0.75, 0.5


def as_stack(stack: Any, *, method: str, library_size: float | str) -> bool | float:
    """Return ``stack`` as a ``bool`` or a weight, after a check that the two estimates are on one scale.

    Parameters
    ----------
    stack, method, library_size
        Arguments of ``get_average_treatment_effects``.

    Raises
    ------
    ValueError
        If ``stack`` is neither a flag nor a weight, or is asked for on another scale.
    """
    if isinstance(stack, bool | np.bool_):
        stack = bool(stack)
    else:
        check_positive("stack", stack, allow_zero=True)
        if stack > 1:
            msg = f"`stack` must be True, False or a weight of the shrunken effects from 0 to 1; received {stack!r}."
            raise ValueError(msg)
        stack = float(stack)
    if stack is not False and (method != "perturbseq" or library_size != "observed"):
        msg = f"`stack` needs effects on the scale of the shrunken ones; received method={method!r} and library_size={library_size!r}: use 'perturbseq' and 'observed'."
        raise ValueError(msg)
    return stack


def shrunken_effects(shrinkage: MultivariateShrinkage, labels: Sequence[str], rule: LabelRule) -> AnnData:
    """Return the shrunken effects of canonical labels.

    Raises
    ------
    ValueError
        If a label has no training cells that passed quality control, and neither has each of its treatments alone.
    """
    known = set(shrinkage.seen_perturbations)
    lacking = [x for x in labels if x not in known and not set(rule.treatments(x)) <= known]
    if lacking:
        msg = f"`stack` needs training cells that passed QC with every label, or with each of its treatments alone; received {preview(lacking)} without: ask for them with `stack=False`."
        raise ValueError(msg)
    return shrinkage.get_average_treatment_effects(labels)


def stack_effects(effects: AnnData, shrunken: AnnData, *, stack: bool | float) -> None:
    """Average effects of a model with shrunken ones of the same labels in place, and keep both and their weights."""
    seen = (shrunken.obs[COLUMNS.SEEN] == "seen").to_numpy()
    weight = np.where(seen, SEEN_WEIGHT, UNSEEN_WEIGHT) if stack is True else np.full(len(seen), stack)
    effects.layers["model"], effects.layers["shrinkage"] = effects.X, np.asarray(shrunken.X)
    effects.layers["shrinkage_std"], effects.layers["lfsr"] = shrunken.layers["std"], shrunken.layers["lfsr"]
    effects.X = weight[:, None] * effects.layers["shrinkage"] + (1 - weight[:, None]) * effects.layers["model"]
    effects.obs["shrinkage_weight"] = weight


def fit_shrinkage(model: Any) -> MultivariateShrinkage:
    """Fit the shrinkage to the training cells of a model that passed quality control.

    Raises
    ------
    ValueError
        If the model has no data, or others than those of training.
    """
    if not model._has_training_data():
        msg = f"`stack` needs the training cells; received a {type(model).__name__} without its own data: load it with them."
        raise ValueError(msg)
    cells = model._training_cells(passed_only=True)
    rule = model._rule
    return MultivariateShrinkage().fit(cells, COLUMNS.PERTURBATION, control=rule.control_name, sep=rule.sep)
