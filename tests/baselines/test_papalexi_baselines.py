from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

from scvi_cradle.baselines import Additive, MultivariateShrinkage, PerturbedMean, ShrunkenEffects
from scvi_cradle.metrics import ate_pearson, average_treatment_effects, evaluate, replicate_ceiling


@pytest.fixture(scope="module")
def cells(papalexi_path) -> ad.AnnData:
    return ad.read_h5ad(papalexi_path)


def split(cells: ad.AnnData, seed: int) -> tuple[ad.AnnData, ad.AnnData]:
    """80 % of the cells of every label for training."""
    rng = np.random.default_rng(seed)
    labels = cells.obs["perturbation"].astype(str).to_numpy()
    test = np.zeros(cells.n_obs, dtype=bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        test[rows[: round(0.2 * len(rows))]] = True
    return cells[~test].copy(), cells[test].copy()


def test_known_ranking_on_held_out_cells(cells) -> None:
    """Flattened: mean effect < raw training effects < shrunken ones; per perturbation raw effects are ahead.

    Multivariate shrinkage is ahead of all in both, on every split.
    """
    models = {
        "mean": PerturbedMean,
        "raw": Additive,
        "shrunken": ShrunkenEffects,
        "multivariate": MultivariateShrinkage,
    }
    scores: dict[str, list] = {name: [] for name in models}
    for seed in range(3):
        train, test = split(cells, seed)
        real = average_treatment_effects(test, "perturbation", control="NT")
        for name, cls in models.items():
            effects = cls().fit(train, "perturbation", control="NT").get_average_treatment_effects()
            scores[name].append([ate_pearson(real, effects, average=a) for a in ("flat", "perturbation")])
    for others in ("raw", "shrunken"):
        assert (np.array(scores["multivariate"]) > np.array(scores[others])).all()
    mean, raw, shrunken, multivariate = (np.mean(scores[k], axis=0) for k in models)
    np.testing.assert_allclose(multivariate, [0.63, 0.33], atol=0.03)
    np.testing.assert_allclose([mean[0], raw[0], shrunken[0]], [0.23, 0.58, 0.62], atol=0.04)
    np.testing.assert_allclose([mean[1], raw[1], shrunken[1]], [0.18, 0.31, 0.28], atol=0.05)
    assert raw[0] < shrunken[0]
    assert raw[1] > shrunken[1]


def test_replicate_of_the_experiment(cells) -> None:
    table = replicate_ceiling(cells, "perturbation", control="NT", n_repeats=3)["mean"]
    np.testing.assert_allclose(table["ate_pearson"], 0.67, atol=0.04)
    np.testing.assert_allclose(table["pearson_delta"], 0.35, atol=0.04)
    np.testing.assert_allclose(table["pearson_delta_perturbed_mean"], 0.56, atol=0.04)


def test_generated_cells_score_like_the_effects(cells) -> None:
    train, test = split(cells, 0)
    model = ShrunkenEffects().fit(train, "perturbation", control="NT")
    generated = model.get_generated_expression(n_samples=200, seed=0)
    table = evaluate(test, generated, control="NT", train=train, n_bootstrap=20)
    real = average_treatment_effects(test, "perturbation", control="NT")
    exact = ate_pearson(real, model.get_average_treatment_effects())
    np.testing.assert_allclose(table.loc["ate_pearson", "value"], exact, atol=0.05)
    assert table.loc["ate_pearson", "baseline"] < 0.3
