"""Evidence of guide counts: within the cells of a target, more guide RNA means a likelier perturbation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.special import ndtri
from scipy.stats import rankdata

from scvi_cradle._guides import counts_per_target, guide_table
from scvi_cradle._labels import LabelRule, LabelTable, canonical_labels
from scvi_cradle._validation import near_matches, preview

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike


def rank_to_z(values: ArrayLike, *, offset: float = 0.5) -> np.ndarray:
    r"""Return normal scores of ranks, :math:`\Phi^{-1}((r - c) / (n + 1 - 2c))` less their mean.

    Parameters
    ----------
    values
        Numbers, shape ``(n,)``; ties have their average rank ``r``.
    offset
        ``c``, at least 0 and below 1: 0.5 gives :math:`(r - 1/2) / n`, 0.375 Blom's scores.

    Returns
    -------
    Scores of mean 0, shape ``(n,)``; 0 for all where the values are equal.

    Raises
    ------
    ValueError
        For missing or infinite values, or an offset out of range.

    References
    ----------
    The quantile-hurdle paper, section 4.2; the text leaves the offset open.

    Examples
    --------
    >>> rank_to_z([1, 3, 3, 10])
    array([-1.15034938,  0.        ,  0.        ,  1.15034938])
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        msg = f"`values` must be finite numbers of shape (n,); received shape {numbers.shape} or values that are not."
        raise ValueError(msg)
    _check_offset(offset)
    if not len(numbers):
        return numbers
    scores = ndtri((rankdata(numbers) - offset) / (len(numbers) + 1 - 2 * offset))
    return scores - scores.mean()


def guide_prior(
    guide_counts: Any,
    labels: Sequence[object] | pd.Series,
    targets: pd.DataFrame | Mapping[Any, Any] | Sequence[str] | pd.Series,
    *,
    control_value: float = -5.0,
    offset: float = 0.5,
    cell_types: Sequence[object] | pd.Series | None = None,
    control: str | Sequence[str | None] = "control",
    sep: str | None = "+",
) -> pd.DataFrame:
    """Turn guide counts into evidence that a cell is perturbed, on the scale of log-odds.

    The counts of a target's guides are summed in every cell. Among the cells of one cell type whose label contains the
    target, the sums become normal scores of mean 0 (:func:`rank_to_z`). All other cells have ``control_value``.

    Parameters
    ----------
    guide_counts
        Counts of guides, shape ``(n_cells, n_guides)``: DataFrame whose columns name the guides, array or sparse
        matrix. Only ranks matter, so counts may be normalised.
    labels
        Perturbation label of every cell, which says to which targets a cell belongs; guide counts do not.
    targets
        With a DataFrame of counts: DataFrame with the columns ``guide`` and ``target`` or a mapping from guide to
        target. With an array or sparse matrix: the target of every column, in order. Guides whose target is a control
        are left out.
    control_value
        Value of cells without the target.
    offset
        Of the ranks, see :func:`rank_to_z`.
    cell_types
        Cell type of every cell; ``None``: one type.
    control, sep
        Label (or labels) of controls, and the text between the targets of a combination.

    Returns
    -------
    DataFrame, float64, of cells x targets (sorted). A target that no label contains has ``control_value`` everywhere.
    Its index is that of ``guide_counts`` or ``labels``, if one of them has one.

    Raises
    ------
    KeyError, TypeError
        For ``targets`` of another form.
    ValueError
        For negative or missing counts, a guide without target, a target among the labels without guides, missing labels
        or cell types, or shapes that do not fit.

    References
    ----------
    The quantile-hurdle paper, section 4.2: ``u`` of equation 7, with the lower bound -5 of controls.

    Examples
    --------
    >>> adata = cradle.datasets.simulate_perturbseq()
    >>> u = cradle.pp.guide_prior(adata.obsm["guide_counts"], adata.obs["perturbation"], adata.uns["guide_targets"])
    """
    if not isinstance(control_value, int | float | np.number) or not np.isfinite(control_value):
        msg = f"`control_value` must be a finite number; received {control_value!r}."
        raise ValueError(msg)
    _check_offset(offset)
    rule = LabelRule.create(control, sep)
    counts, names = counts_per_target(guide_counts, _target_of_columns(guide_counts, targets), leave_out=rule.control)
    cells = canonical_labels(pd.Series(labels).reset_index(drop=True), rule)
    index = _index(guide_counts, labels, counts.shape[0])
    types = _codes(cell_types, counts.shape[0])
    belongs = _belongs(cells, names, rule)
    prior = np.full(counts.shape, float(control_value))
    for column in range(len(names)):
        rows = belongs.indices[belongs.indptr[column] : belongs.indptr[column + 1]]
        values = np.asarray(counts[:, [column]].toarray()).ravel()[rows]
        for code in np.unique(types[rows]):
            same = types[rows] == code
            prior[rows[same], column] = rank_to_z(values[same], offset=offset)
    return pd.DataFrame(prior, index=index, columns=pd.Index(names, name="target", dtype=object))


def _check_offset(offset: Any) -> None:
    if not isinstance(offset, int | float | np.number) or not 0 <= offset < 1:
        msg = f"`offset` must be at least 0 and below 1; received {offset!r}."
        raise ValueError(msg)


def _target_of_columns(guide_counts: Any, targets: Any) -> Sequence[str] | pd.Series:
    if isinstance(guide_counts, pd.DataFrame):
        return guide_table(guide_counts.columns, targets)
    if isinstance(targets, pd.DataFrame | dict | str):
        msg = f"`targets` of an array of counts must hold one target for every column, in order; received {type(targets).__name__}: give it so, or name the guides by a DataFrame of counts."
        raise TypeError(msg)
    listed = pd.Series(targets, dtype=object)
    if listed.isna().any():
        msg = f"Every column of the guide counts must have a target; received {int(listed.isna().sum())} without: name it, the control for non-targeting guides."
        raise ValueError(msg)
    return listed


def _index(guide_counts: Any, labels: Any, n_cells: int) -> pd.Index:
    """Names of the cells; the same in both tables where both have names."""
    if len(labels) != n_cells:
        msg = f"`labels` must hold one label for every row of the guide counts, {n_cells} of them; received {len(labels)}."
        raise ValueError(msg)
    indices = [x.index for x in (guide_counts, labels) if isinstance(x, pd.DataFrame | pd.Series)]
    named = [i for i in indices if not isinstance(i, pd.RangeIndex)]
    if len(named) == 2 and not named[0].equals(named[1]):
        msg = "`guide_counts` and `labels` must have the same cells in the same order; received different names: reindex one of them."
        raise ValueError(msg)
    return named[0] if named else pd.RangeIndex(n_cells)


def _codes(cell_types: Any, n_cells: int) -> np.ndarray:
    if cell_types is None:
        return np.zeros(n_cells, dtype=np.int64)
    codes = pd.factorize(pd.Series(cell_types).astype(object))[0]
    if len(codes) != n_cells or (codes < 0).any():
        msg = f"`cell_types` must hold one type for every cell, {n_cells} of them; received {len(codes)}, {int((codes < 0).sum())} missing."
        raise ValueError(msg)
    return codes


def _belongs(cells: pd.Categorical, names: Sequence[str], rule: LabelRule) -> sp.csc_matrix:
    """Cells x targets: 1 where the label contains the target."""
    table = LabelTable.from_labels(cells.categories, rule)
    unknown = sorted(set(table.treatments) - set(names))
    if unknown:
        hint = near_matches(unknown[0], names) or f" (targets of guides: {preview(names)})"
        msg = f"Every target among the labels must have a guide; received {preview(unknown)} without{hint}: add the guides, mend the names, or pass `control=`."
        raise ValueError(msg)
    position = {name: i for i, name in enumerate(names)}
    rows = [row for row, members in enumerate(table.members) for _ in members]
    columns = [position[table.treatments[m]] for members in table.members for m in members]
    of_label = sp.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(table.labels), len(names)))
    found = sp.csc_matrix(of_label[cells.codes])
    found.sort_indices()
    return found
