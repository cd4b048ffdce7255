from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_cradle.metrics import (
    ate_pearson,
    evaluate_effects,
    jaccard_top_k,
    pearson_delta,
    perturbation_discrimination,
)

GENES = [f"g{i}" for i in range(40)]


def frame(seed: int, names: list[str], scale: float = 1.0) -> pd.DataFrame:
    return pd.DataFrame(scale * np.random.default_rng(seed).normal(size=(len(names), 40)), index=names, columns=GENES)


def ceiling(value: float = 0.9) -> pd.DataFrame:
    names = [
        *("pearson_delta", "pearson_delta_perturbed_mean", "perturbation_discrimination", "ate_pearson"),
        *("ate_r2", "jaccard_top_20", "jaccard_top_50"),
    ]
    return pd.DataFrame({"full_size": value}, index=names)


@pytest.fixture
def sides() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    real = frame(0, ["A", "B", "g3+C"])
    return real, real + frame(1, list(real.index)), frame(2, ["A", "B", "C", "g3", "g7"])


def test_rows_are_those_of_the_functions(sides) -> None:
    real, predicted, train = sides
    table = evaluate_effects(real, predicted.iloc[::-1, ::-1], train=train, ceiling=ceiling())
    assert table.index.tolist() == ceiling().index.tolist()
    assert table.loc["ate_pearson", "value"] == pytest.approx(ate_pearson(real, predicted))
    centred = pearson_delta(real, predicted, reference="perturbed_mean", train=train)
    assert table.loc["pearson_delta_perturbed_mean", "value"] == pytest.approx(centred)
    kept = perturbation_discrimination(real, predicted, exclude_genes=["g3", "g7"])
    assert table.loc["perturbation_discrimination", "value"] == pytest.approx(kept)
    mean = np.tile(train.mean(), (3, 1))
    assert table.loc["jaccard_top_20", "baseline"] == pytest.approx(jaccard_top_k(real.to_numpy(), mean, 20))
    room = 0.9 - table["baseline"]
    defined = room > 0
    assert defined.sum() >= 6
    expected = ((table["value"] - table["baseline"]) / room)[defined]
    np.testing.assert_allclose(table.loc[defined, "scaled"], expected)
    assert table.loc[~defined, "scaled"].isna().all()


@pytest.mark.parametrize("n", [1, 3, 9])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_mean_effect_is_the_baseline_exactly(n, reverse) -> None:
    real, train = frame(3, [f"p{i}" for i in range(n)]), frame(4, [f"q{i}" for i in range(7)])
    order = train.iloc[::-1] if reverse else train
    same = pd.DataFrame(np.tile(train.to_numpy().mean(axis=0), (n, 1)), index=real.index, columns=GENES)
    table = evaluate_effects(real, same, train=order, ceiling=ceiling())
    np.testing.assert_allclose(table["value"], table["baseline"], atol=1e-12)
    assert table.loc["pearson_delta_perturbed_mean", "value"] == 0.0
    assert "constant change" in table.loc["pearson_delta_perturbed_mean", "note"]
    assert pearson_delta(real, same, reference="perturbed_mean", train=order) == 0.0


def test_arrays_have_no_targets() -> None:
    real = np.random.default_rng(0).normal(size=(8, 8))
    predicted = real + 0.01
    table = evaluate_effects(real, predicted, train=real, ceiling=ceiling())
    assert table.loc["perturbation_discrimination", "value"] == perturbation_discrimination(real, predicted) == 1.0
    with pytest.raises(ValueError, match="names of perturbations"):
        evaluate_effects(real, predicted, train=real, ceiling=ceiling(), exclude_targets=True)


def test_targets_can_be_left_out(sides) -> None:
    real, predicted, train = sides
    huge = real.copy(), predicted.copy()
    for side in huge:
        side.loc["g3+C", "g3"] = -1e6  # its own knock-down
    arguments = {"train": train, "ceiling": ceiling(), "n_bootstrap": 0}
    assert evaluate_effects(*huge, **arguments).loc["ate_pearson", "value"] > 0.999
    without = evaluate_effects(*huge, exclude_targets=True, **arguments)
    pd.testing.assert_frame_equal(without, evaluate_effects(real, predicted, exclude_targets=True, **arguments))


def test_real_controls_do_not_enter_the_perturbed_mean(sides) -> None:
    real, predicted, train = sides
    rng = np.random.default_rng(9)
    level, noise = rng.normal(size=40), 0.3 * rng.normal(size=40)
    clean, noisy = (
        ad.AnnData(real - e, var=pd.DataFrame({"control_mean": level + e}, index=GENES)) for e in (0, noise)
    )
    known = ad.AnnData(train, var=pd.DataFrame({"control_mean": level}, index=GENES))
    values = [
        evaluate_effects(r, predicted, train=known, ceiling=ceiling()).loc["pearson_delta_perturbed_mean", "value"]
        for r in (clean, noisy)
    ]
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize("bad", [pd.DataFrame(), pd.DataFrame({"mean": [1.0]}), {"full_size": 1}, ceiling(np.nan)])
def test_ceiling_has_to_be_one(sides, bad) -> None:
    with pytest.raises(ValueError, match="replicate_ceiling"):
        evaluate_effects(*sides[:2], train=sides[2], ceiling=bad)
