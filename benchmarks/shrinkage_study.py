"""Multivariate shrinkage: against other baselines and models, stacked with models, calibration, and time.

    python benchmarks/shrinkage_study.py papalexi --data papalexi.h5ad --out papalexi.csv
    python benchmarks/shrinkage_study.py screens --out screens.csv
    python benchmarks/shrinkage_study.py calibration --out calibration.csv
    python benchmarks/shrinkage_study.py timing --out timing.csv
    python benchmarks/shrinkage_study.py table papalexi.csv

Every run appends one row to the CSV, and runs that are in it are not repeated; ``table`` prints means with standard
errors over seeds.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scvi
import torch
from cradle_study import CRITERIA, correlations
from sams_runs import fit, papalexi_cells, papalexi_scores
from sams_study import Run, run_missing, table
from scipy.special import ndtr

import scvi_cradle as cradle
from scvi_cradle import baselines
from scvi_cradle.baselines._covariance_mixture import NoisyEffects, Sums, posterior
from scvi_cradle.baselines._multivariate import learn_prior

KEYS = ("data", "size", "model")
LEVELS = {"50 %": 0.6745, "80 %": 1.2816, "95 %": 1.96}
BASELINES: dict[str, Callable[[], Any]] = {
    "PerturbedMean": baselines.PerturbedMean,
    "NearestNeighbors": baselines.NearestNeighbors,
    "ElasticNet (alpha=1)": partial(baselines.ElasticNet, 1.0),
    "ElasticNet": baselines.ElasticNet,
    "Additive": baselines.Additive,
    "ShrunkenEffects": baselines.ShrunkenEffects,
    "MultivariateShrinkage": baselines.MultivariateShrinkage,
    "MultivariateShrinkage(rank=0)": partial(baselines.MultivariateShrinkage, 0),
}
MODELS = ("CradleVAE", "SAMSVAE")
STACKS = {"": False, " stacked": True, " stacked 1:1": 0.5}
SIZES = {"25 x 300": (0, 10), "100 x 600": (0, 10), "700 x 1200": (5, 10, 20)}


# ---- data --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def screen(seed: int, artifacts: float) -> ad.AnnData:
    """Return a screen of 12 treatments and 8 pairs; two pairs are for testing only."""
    adata = cradle.datasets.simulate_perturbseq(
        n_cells=4000, n_genes=500, n_perturbations=12, n_combinations=8, artifact_fraction=artifacts, seed=seed
    )
    cradle.pp.qc_label(adata, n_mads=3, criteria=CRITERIA, reference=(adata.obs["split"] != "test").to_numpy())
    return adata


def draw_model(n_labels: int, n_genes: int, seed: int, rank: int = 10) -> tuple[np.ndarray, NoisyEffects]:
    """Draw effects from factors with a continuous scale per gene, and noisy views of them; genes first."""
    rng = np.random.default_rng(seed)
    loading = rng.normal(scale=0.3, size=(n_labels, rank)) * rng.gamma(1.0, 1.0, size=rank)
    specific = rng.gamma(1.0, 0.05, size=n_labels)
    true = rng.normal(size=(n_genes, rank)) @ loading.T + rng.normal(size=(n_genes, n_labels)) * np.sqrt(specific)
    true *= np.sqrt(rng.gamma(0.3, 3.0, size=(n_genes, 1)))
    own, shared = rng.gamma(2.0, 0.05, size=true.shape), rng.gamma(2.0, 0.005, size=n_genes)
    error = rng.normal(size=true.shape) * np.sqrt(own) + rng.normal(size=(n_genes, 1)) * np.sqrt(shared)[:, None]
    return true, NoisyEffects(true + error, own, shared)


def training(adata: ad.AnnData, *, passed_only: bool) -> ad.AnnData:
    kept = (adata.obs["split"] != "test").to_numpy()
    return adata[kept & ~adata.obs["artifact"].to_numpy() if passed_only else kept].copy()


@lru_cache(maxsize=1)
def trained(data: str, path: Path | None, name: str, seed: int) -> tuple[Any, float]:
    """Return a model fitted with the recommended settings, and its CPU seconds."""
    adata = (papalexi_cells(path, seed) if path else screen(seed, 0.15)).copy()
    cls = getattr(cradle, name)
    flag = {"artifact_key": "artifact"} if name == "CradleVAE" else {}
    cls.setup_anndata(adata, perturbation_key="perturbation", control="NT" if path else "control", **flag)
    scvi.settings.seed = seed
    model = cls(adata)
    return model, fit(model, seed)


# ---- runs --------------------------------------------------------------------------------------------------------------


def papalexi_baseline(path: Path, name: str, seed: int) -> dict[str, float]:
    adata = papalexi_cells(path, seed)
    cells = training(adata, passed_only=False)
    start = time.process_time()
    model = BASELINES[name]().fit(cells, "perturbation", control="NT")
    effects = model.get_average_treatment_effects()
    seconds = time.process_time() - start
    return papalexi_scores(adata, effects) | {"CPU s": seconds}


def papalexi_model(path: Path, name: str, stack: str, seed: int) -> dict[str, float]:
    model, seconds = trained("papalexi", path, name, seed)
    labels = sorted(set(model.adata.obs["perturbation"]) - {"NT"})
    effects = model.get_average_treatment_effects(labels, seed=seed, stack=STACKS[stack])
    return papalexi_scores(papalexi_cells(path, seed), effects) | {"CPU s": seconds}


def screen_scores(adata: ad.AnnData, predict: Callable[[list[str]], ad.AnnData]) -> dict[str, float]:
    """Compare effects with the clean truth, for seen labels and for pairs without training cells."""
    truth = adata.uns["truth"]["population_effects"]
    labels = list(truth.index)
    predicted = np.asarray(predict(labels).X)
    seen = set(adata.obs["perturbation"][(adata.obs["split"] != "test").to_numpy()])
    row = {}
    for name, rows in {
        "seen": [i for i, label in enumerate(labels) if label in seen],
        "unseen": [i for i, label in enumerate(labels) if label not in seen],
    }.items():
        row[f"{name}, flat"], row[f"{name}, each"] = correlations(truth.to_numpy(), predicted, rows)
    return row


def screen_baseline(name: str, cells: str, seed: int) -> dict[str, float]:
    adata = screen(seed, 0.15)
    model = BASELINES[name]().fit(training(adata, passed_only=cells == "passed cells"), "perturbation")
    return screen_scores(adata, model.get_average_treatment_effects)


def screen_mean(cells: str, seed: int) -> dict[str, float]:
    """Half multivariate shrinkage, half elastic net."""
    adata = screen(seed, 0.15)
    names = ("MultivariateShrinkage", "ElasticNet")
    kept = training(adata, passed_only=cells == "passed cells")
    models = [BASELINES[name]().fit(kept, "perturbation") for name in names]

    def predict(labels: list[str]) -> ad.AnnData:
        first, second = (model.get_average_treatment_effects(labels) for model in models)
        first.X = 0.5 * (np.asarray(first.X) + np.asarray(second.X))
        return first

    return screen_scores(adata, predict)


def screen_model(name: str, stack: str, seed: int) -> dict[str, float]:
    model, _ = trained("screen", None, name, seed)
    predict = partial(model.get_average_treatment_effects, seed=seed, stack=STACKS[stack])
    return screen_scores(screen(seed, 0.15), predict)


def coverage(truth: np.ndarray, mean: np.ndarray, std: np.ndarray, lfsr: np.ndarray) -> dict[str, float]:
    """Compare intervals and false sign rates with the truth; all of one shape."""
    distance, wrong = np.abs(truth - mean), np.sign(truth) != np.sign(mean)
    row = {f"{name} interval": float((distance <= z * std).mean()) for name, z in LEVELS.items()}
    row |= {"mean lfsr": float(lfsr.mean()), "wrong signs": float(wrong.mean())}
    confident = lfsr < 0.05
    row |= {"lfsr < .05": float(confident.mean()), "mean lfsr there": float(lfsr[confident].mean())}
    return row | {"wrong signs there": float(wrong[confident].mean())}


def calibration_of_counts(artifacts: float, which: str, seed: int) -> dict[str, float]:
    """Calibrate on simulated counts, in genes that vary."""
    adata = screen(seed, artifacts)
    model = baselines.MultivariateShrinkage().fit(training(adata, passed_only=artifacts > 0), "perturbation")
    truth = adata.uns["truth"]["population_effects"]
    effects = model.get_average_treatment_effects(list(truth.index))
    rows = (effects.obs["seen"] == "seen").to_numpy() == (which == "seen")
    layers = [np.asarray(x)[rows] for x in (effects.X, effects.layers["std"], effects.layers["lfsr"])]
    varies = (layers[1] > 0).all(0)
    return coverage(truth.to_numpy()[rows][:, varies], *(x[:, varies] for x in layers))


def calibration_of_model(size: str, rank: int, seed: int) -> dict[str, float]:
    """Calibrate on effects drawn from the model; "exact" are quantiles of the mixture."""
    n_labels, n_genes = map(int, size.split(" x "))
    true, effects = draw_model(n_labels, n_genes, seed)
    prior, each = learn_prior(effects, rank), Sums.create([[i] for i in range(n_labels)])
    row = coverage(true.T, *posterior(prior, effects, each))
    below = np.concatenate(
        [
            (p.weights[:, :, None] * ndtr((true[genes][:, None] - p.mean) / np.sqrt(p.variance))).sum(1)
            for genes, block in effects.blocks(prior.width)
            for p in [prior.components(block, each)]
        ]
    )
    for level in (50, 80, 95):
        row[f"{level} % exact"] = float((np.abs(below - 0.5) <= level / 200).mean())
    return row


def timing(size: str, rank: int, seed: int) -> dict[str, float]:
    n_labels, n_genes = map(int, size.split(" x "))
    true, effects = draw_model(n_labels, n_genes, seed)
    start = time.process_time()
    prior = learn_prior(effects, rank)
    learnt = time.process_time()
    estimate = posterior(prior, effects, Sums.create([[i] for i in range(n_labels)])).mean.T
    done = time.process_time()
    error, raw = (float(np.sqrt(((x - true) ** 2).mean())) for x in (estimate, effects.raw))
    return {"raw error": raw, "error": error, "prior, CPU s": learnt - start, "posterior, CPU s": done - learnt}


# ---- studies -----------------------------------------------------------------------------------------------------------


def runs(study: str, arguments: argparse.Namespace) -> Iterator[Run]:
    for seed in arguments.seeds:
        if study == "papalexi":
            for name in BASELINES:
                yield {"model": name, "seed": seed}, partial(papalexi_baseline, arguments.data, name, seed)
            for name in MODELS:
                for stack in STACKS:
                    run = partial(papalexi_model, arguments.data, name, stack, seed)
                    yield {"model": name + stack, "seed": seed}, run
        elif study == "screens":
            for cells in ("all cells", "passed cells"):
                for name in BASELINES:
                    yield {"model": f"{name} ({cells})", "seed": seed}, partial(screen_baseline, name, cells, seed)
                name = f"mean of MultivariateShrinkage and ElasticNet ({cells})"
                yield {"model": name, "seed": seed}, partial(screen_mean, cells, seed)
            for name in MODELS:
                for stack in STACKS:
                    yield {"model": name + stack, "seed": seed}, partial(screen_model, name, stack, seed)
        elif study == "calibration":
            for size, ranks in SIZES.items():
                for rank in ranks:
                    if rank in (0, 10) and size != "100 x 600":
                        key = {"data": "own model", "size": size, "model": f"rank={rank}", "seed": seed}
                        yield key, partial(calibration_of_model, size, rank, seed)
            for artifacts in (0.0, 0.15):
                for which in ("seen", "unseen pairs"):
                    key = {"data": f"counts, {artifacts:.0%} artifacts", "size": which, "model": "rank=None"}
                    yield key | {"seed": seed}, partial(calibration_of_counts, artifacts, which, seed)
        else:
            for size, ranks in SIZES.items():
                for rank in ranks:
                    yield {"size": size, "model": f"rank={rank}", "seed": seed}, partial(timing, size, rank, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["papalexi", "screens", "calibration", "timing", "table"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--data", type=Path, help="papalexi.h5ad")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("study.csv"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.study == "table":
        print(table(arguments.file, KEYS))
    else:
        run_missing(runs(arguments.study, arguments), arguments.out)


if __name__ == "__main__":
    main()
