"""Effects of a model averaged with multivariate shrinkage of the raw effects of its training cells."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData

from scvi_cradle._constants import COLUMNS
from scvi_cradle._validation import check_positive, preview
from scvi_cradle.baselines import MultivariateShrinkage

SEEN_WEIGHT, UNSEEN_WEIGHT = 0.75, 0.5


def check_stack(*, stack: bool | float, method: str, library_size: float | str) -> None:
    """Raise ``ValueError`` unless the two estimates are on one scale and the weight is one.

    Parameters
    ----------
    stack, method, library_size
        Arguments of ``get_average_treatment_effects``.
    """
    if not isinstance(stack, bool | np.bool_):
        check_positive("stack", stack, allow_zero=True)
        if stack > 1:
            msg = f"`stack` must be True, False or a weight of the shrunken effects from 0 to 1; received {stack!r}."
            raise ValueError(msg)
    if method != "perturbseq" or library_size != "observed":
        msg = f"`stack` needs effects on the scale of the shrunken ones; received method={method!r} and library_size={library_size!r}: use 'perturbseq' and 'observed'."
        raise ValueError(msg)


def stack_effects(effects: AnnData, shrinkage: MultivariateShrinkage, *, stack: bool | float) -> None:
    """Average effects of a model with shrunken ones in place, and keep both and their weights.

    Raises
    ------
    ValueError
        If a treatment has no training cells that passed quality control.
    """
    treatments = shrinkage._table.treatments
    lacking = [x for x in effects.obs_names if not set(shrinkage._rule.treatments(x)) <= set(treatments)]
    if lacking:
        msg = f"`stack` needs training cells that passed QC for every treatment; received {preview(lacking)} without: ask for them with `stack=False`."
        raise ValueError(msg)
    other = shrinkage.get_average_treatment_effects(effects.obs_names)
    seen = (other.obs[COLUMNS.SEEN] == "seen").to_numpy()
    default = np.where(seen, SEEN_WEIGHT, UNSEEN_WEIGHT)
    weight = default if isinstance(stack, bool | np.bool_) else np.full(len(seen), float(stack))
    effects.layers["model"], effects.layers["shrinkage"] = effects.X, np.asarray(other.X)
    effects.layers["shrinkage_std"], effects.layers["lfsr"] = other.layers["std"], other.layers["lfsr"]
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
    cells = model._real_cells(model.adata, np.asarray(model.train_indices_), passed_only=True)
    rule = model._rule
    return MultivariateShrinkage().fit(cells, COLUMNS.PERTURBATION, control=rule.control_name, sep=rule.sep)
