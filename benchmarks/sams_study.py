"""SAMS-VAE and its relatives: recovery of masks, families of posteriors, and all models on papalexi.

    python benchmarks/sams_study.py sparsity --out sparsity.csv
    python benchmarks/sams_study.py inference --out inference.csv
    python benchmarks/sams_study.py papalexi --data papalexi.h5ad --out papalexi.csv
    python benchmarks/sams_study.py table sparsity.csv

Every run appends one row to the CSV, and runs that are in it are not repeated; ``table`` prints means with standard
errors over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sams_runs
import torch

KEYS = ("n", "prior", "schedule", "model", "posterior", "decoder", "preset")
BASELINES = ("PerturbedMean", "Additive", "ShrunkenEffects", "replicate (halves of all cells)")
POSTERIORS = [
    *(("SAMSVAE", p) for p in ("mean_field", "correlated_embedding", "correlated_basal", "correlated")),
    *(("CPAVAE", p) for p in ("mean_field", "correlated_basal")),
]
Run = tuple[dict[str, Any], Callable[[], dict[str, float]]]


def sparsity(arguments: argparse.Namespace) -> Iterator[Run]:
    for schedule, seed, n, prior in itertools.product(
        arguments.schedules, arguments.seeds, arguments.n, arguments.priors
    ):
        yield (
            {"n": n, "prior": prior, "schedule": schedule, "seed": seed},
            partial(sams_runs.sparsity, n, prior, seed, schedule=schedule),
        )


def inference(arguments: argparse.Namespace) -> Iterator[Run]:
    for decoder, seed in itertools.product(arguments.decoders, arguments.seeds):
        for model, posterior in POSTERIORS:
            yield (
                {"model": model, "posterior": posterior, "decoder": decoder, "seed": seed},
                partial(sams_runs.inference, model, posterior, decoder, seed),
            )


def papalexi(arguments: argparse.Namespace) -> Iterator[Run]:
    for seed in arguments.seeds:
        for name in BASELINES:
            yield (
                {"model": name, "preset": "-", "seed": seed},
                partial(sams_runs.papalexi_baseline, arguments.data, name, seed),
            )
        for preset, name in itertools.product(arguments.presets, sams_runs.PAPALEXI_MODELS):
            yield (
                {"model": name, "preset": preset, "seed": seed},
                partial(sams_runs.papalexi, arguments.data, name, preset, seed, max_steps=arguments.max_steps),
            )
        for name in sams_runs.FLAG_MODELS:
            yield (
                {"model": name, "preset": "recommended", "seed": seed},
                partial(sams_runs.papalexi, arguments.data, name, "recommended", seed, max_steps=None),
            )


def run_missing(runs: Iterator[Run], out: Path) -> None:
    """Do the runs that the CSV does not hold, one row after the other."""
    for key, run in runs:
        known = pd.read_csv(out) if out.exists() else pd.DataFrame(columns=list(key))
        if (known[list(key)].astype(str) == pd.Series(key).astype(str)).all(axis=1).any():
            continue
        pd.concat([known, pd.DataFrame([key | run()])]).to_csv(out, index=False)
        print(*key.values(), "done", flush=True)


def table(path: Path, keys: Iterable[str] = KEYS) -> str:
    """Return means with standard errors over seeds as a Markdown table."""
    frame = pd.read_csv(path)
    keys = [k for k in keys if k in frame]
    numbers = [c for c in frame.columns if c not in (*keys, "seed")]
    groups = frame.groupby(keys, sort=False, dropna=False)[numbers]
    mean, error, runs = groups.mean(), groups.sem(), groups.size()
    text = mean.map(lambda v: "" if np.isnan(v) else f"{v:.3f}")
    text += error.map(lambda v: "" if np.isnan(v) else f" ± {v:.3f}")
    lines = ["| " + " | ".join([*keys, "runs", *numbers]) + " |", "|" + "---|" * (len(keys) + 1 + len(numbers))]
    for index, values in zip(text.index, text.to_numpy(), strict=True):
        labels = [str(v) for v in (index if isinstance(index, tuple) else (index,))]
        lines.append("| " + " | ".join([*labels, str(runs[index]), *values]) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["sparsity", "inference", "papalexi", "table"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--data", type=Path, help="papalexi.h5ad")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 4, for papalexi 0 to 2")
    parser.add_argument("--n", type=int, nargs="+", default=[50, 100, 200], help="cells per treatment, for sparsity")
    parser.add_argument("--priors", nargs="+", default=["fixed prior", "fixed sparsity"], help="for sparsity")
    parser.add_argument("--schedules", nargs="+", default=["4 x 2000"], help="rounds x steps, for sparsity")
    parser.add_argument("--decoders", nargs="+", default=["concat, linear", "sum, decoder"], help="for inference")
    parser.add_argument("--presets", nargs="+", default=["recommended", "paper"], help="for papalexi")
    parser.add_argument("--max-steps", type=int, default=600, help="steps of preset 'paper', for papalexi")
    parser.add_argument("--out", type=Path, default=Path("study.csv"))
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or list(range(3 if arguments.study == "papalexi" else 5))
    return arguments


def main() -> None:
    arguments = parse()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.study == "table":
        print(table(arguments.file))
        return
    studies = {"sparsity": sparsity, "inference": inference, "papalexi": papalexi}
    run_missing(studies[arguments.study](arguments), arguments.out)


if __name__ == "__main__":
    main()
