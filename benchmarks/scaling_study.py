"""How steps, batch, latent and hidden size should depend on cells, genes and treatments: simulated screens.

    python benchmarks/scaling_study.py run --sizes 3000x500x20 --variants steps=1 steps=2 --seeds 0 1 --out scaling.csv
    python benchmarks/scaling_study.py run --models CPAVAE CradleVAE --variants default --out scaling.csv
    python benchmarks/scaling_study.py table scaling.csv

A size is cells x genes x treatments (and half as many pairs). A variant is what differs from the reference
(``steps=1``: 1,200 (n / 3,000)^(1/3) steps of 128 cells, latent 50, hidden 128): ``"steps=2 n_hidden=256"``,
``"batch_size=512 steps=0.25"``. ``"default"`` leaves everything to the package.
Every run appends one row to the CSV, and runs that are in it are not repeated; ``table`` prints means with standard
errors over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import resource
import time
import warnings
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch
from cradle_study import correlations
from sams_study import Run, run_missing

import scvi_cradle as cradle

SIZES = ("3000x500x20", "20000x500x200", "10000x2000x60", "3000x5000x20", "20000x5000x200")
BASELINES = ("PerturbedMean", "Additive", "ShrunkenEffects")
REFERENCE = {"n_latent": 50, "n_hidden": 128, "batch_size": 128}
KEYS = ("size", "model", "variant")


@lru_cache(maxsize=1)
def screen(size: str, seed: int) -> ad.AnnData:
    """Return a screen without artifacts whose unseen pairs are ``"test"``; all other cells are for training."""
    n_cells, n_genes, n_treatments = map(int, size.split("x"))
    adata = cradle.datasets.simulate_perturbseq(
        n_cells, n_genes, n_treatments, n_treatments // 2, artifact_fraction=0.0, seed=seed
    )
    adata.obs["split"] = np.where(adata.obs["split"] == "test", "test", "train")
    adata.obs["artifact"] = np.arange(n_cells) % 100 == 0  # CradleVAE wants failed cells; the flag says nothing here
    del adata.layers["clean_counts"]
    return adata


def scores(adata: ad.AnnData, model: Any, **options: Any) -> dict[str, float]:
    """Compare effects on seen labels and on unseen pairs with the known effects on the population."""
    truth = adata.uns["truth"]["population_effects"]
    labels = list(truth.index)
    test = set(adata.obs.loc[adata.obs["split"] == "test", "perturbation"])
    start = time.process_time()
    predicted = np.asarray(model.get_average_treatment_effects(labels, **options)[labels].X)
    result = {"effects, CPU s": time.process_time() - start}
    for name, unseen in (("seen", False), ("unseen", True)):
        rows = [i for i, label in enumerate(labels) if (label in test) == unseen]
        result[f"{name}, flat"], result[f"{name}, each"] = correlations(truth.to_numpy(), predicted, rows)
    return result


def baseline(size: str, name: str, seed: int) -> dict[str, float]:
    adata = screen(size, seed)
    start = time.process_time()
    model = getattr(cradle.baselines, name)()
    model.fit(adata[adata.obs["split"] == "train"].copy(), "perturbation")
    return {"CPU s": time.process_time() - start} | scores(adata, model)


def vae(size: str, name: str, variant: str, seed: int) -> dict[str, float]:
    adata = screen(size, seed).copy()
    n_train = int((adata.obs["split"] == "train").sum())
    model_arguments, train = {}, {}
    if variant != "default":
        given = dict(part.split("=") for part in variant.split())
        steps = float(given.pop("steps", 1)) * 1_200 * (n_train / 3_000) ** (1 / 3)
        model_arguments = REFERENCE | {k: int(v) for k, v in given.items()}
        train = {"max_steps": round(steps), "batch_size": model_arguments.pop("batch_size")}
    keys = {"artifact_key": "artifact"} if name == "CradleVAE" else {}
    getattr(cradle, name).setup_anndata(adata, perturbation_key="perturbation", **keys)
    scvi.settings.seed = seed
    model = getattr(cradle, name)(adata, **model_arguments)
    start = time.process_time()
    model.train(split_key="split", enable_progress_bar=False, **train)
    seconds = time.process_time() - start
    steps = model.trainer.global_step
    result = {"n": n_train, "steps": steps, "CPU s": seconds} | scores(adata, model, seed=seed)
    return result | {"peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def runs(arguments: argparse.Namespace) -> Iterator[Run]:
    for size, seed in itertools.product(arguments.sizes, arguments.seeds):
        for name in BASELINES:
            yield {"size": size, "model": name, "variant": "-", "seed": seed}, partial(baseline, size, name, seed)
        for name, variant in itertools.product(arguments.models, arguments.variants):
            yield (
                {"size": size, "model": name, "variant": variant, "seed": seed},
                partial(vae, size, name, variant, seed),
            )


def table(path: Path) -> str:
    """Return means with standard errors over seeds, and the mean gain over ``steps=1`` of the same seeds."""
    frame = pd.read_csv(path).sort_values(["size", "model"], kind="stable")
    numbers = ["seen, flat", "seen, each", "unseen, flat", "unseen, each"]
    lines = ["| size | model | variant | seeds | steps | " + " | ".join([*numbers, "CPU s"]) + " |", "|" + "---|" * 10]
    for (size, model, variant), group in frame.groupby(list(KEYS), sort=False):
        reference = frame[(frame["size"] == size) & (frame["model"] == model) & (frame["variant"] == "steps=1")]
        gain = group.set_index("seed")[numbers] - reference.set_index("seed")[numbers]
        mean, error, n = group[numbers].mean(), group[numbers].sem().fillna(0), len(group)
        cells = [f"{mean[c]:.3f}" + (f" ± {error[c]:.3f}" if n > 1 else "") for c in numbers]
        if variant != "steps=1" and gain.notna().any(axis=None):
            cells = [f"{text} ({gain[c].mean():+.3f})" for text, c in zip(cells, numbers, strict=True)]
        steps = "" if group["steps"].isna().all() else f"{group['steps'].mean():.0f}"
        row = [size, model, variant, str(n), steps, *cells, f"{group['CPU s'].mean():.0f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--models", nargs="+", default=["SAMSVAE"])
    parser.add_argument("--variants", nargs="+", default=["steps=0.5", "steps=1", "steps=2", "steps=4"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("scaling.csv"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.command == "table":
        print(table(arguments.file))
        return
    run_missing(runs(arguments), arguments.out)


if __name__ == "__main__":
    main()
