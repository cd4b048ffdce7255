from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scvi_cradle.metrics import importance_weighted_bound, iwelbo_summary


def test_bound_by_hand() -> None:
    bound = importance_weighted_bound([[-1.0, -2], [-3, -2.5]])
    np.testing.assert_allclose(bound, [-1.5662191695, -2.2190701964], atol=1e-10)
    np.testing.assert_allclose(iwelbo_summary(bound).loc["all", "mean"], -1.8926446829, atol=1e-10)


def test_bound_at_the_edges() -> None:
    np.testing.assert_allclose(importance_weighted_bound([[-1000.0], [-np.inf]]), [-1000 - np.log(2)])
    np.testing.assert_allclose(importance_weighted_bound([[1e4]]), [1e4])
    for bad in ([[np.nan], [0]], [[-np.inf], [-np.inf]], [0.0, 1.0], [[np.inf], [0]]):
        with pytest.raises(ValueError, match="must h"):
            importance_weighted_bound(bad)


def test_summary_by_group() -> None:
    values = np.array([1.0, 2, 4, 7])
    table = iwelbo_summary(values, pd.Series(["b", "a", "b", "b"]))
    assert list(table.index) == ["a", "b", "all"]
    np.testing.assert_allclose(table["mean"], [2, 4, 3.5])
    np.testing.assert_allclose(table["sem"], [0, 3 / np.sqrt(3), values.std(ddof=1) / 2])
    assert list(table["n_cells"]) == [1, 3, 4]
    with pytest.raises(ValueError, match="4 of them"):
        iwelbo_summary(values, ["a"])
    with pytest.raises(ValueError, match="finite"):
        iwelbo_summary([np.nan])


def test_groups_without_a_name_of_their_own() -> None:
    values = np.array([1.0, 2, 4])
    for missing in (None, np.nan, pd.NA):
        with pytest.raises(ValueError, match="name the group of every cell; received 1 missing names"):
            iwelbo_summary(values, pd.Series(["a", missing, "b"]))
    with pytest.raises(ValueError, match="must not hold 'all'.*received it for 2 cells: rename"):
        iwelbo_summary(values, ["all", "a", "all"])
    table = iwelbo_summary(values, pd.Categorical(["b", "a", "nan"]))  # a name, not a missing one
    assert list(table.index) == ["a", "b", "nan", "all"]
