"""All combinations held out, on simulated screens with additive and interacting pairs whose effects are known.

    python benchmarks/doubles_study.py run --seeds 0 1 2 3 4 --out doubles.csv
    python benchmarks/doubles_study.py table doubles.csv

Every model of every seed appends one row to the CSV, and rows that are in it are not computed again; ``table`` prints
means with standard errors over seeds.

Scores of the first table are those of ``python -m scvi_cradle.benchmark --experiment doubles``. Those of the second
compare predicted with known effects, on the scale of both (differences of mean ``log2(1 + 1e4 x / total)``, escapers
included). The interaction of a pair is its effect less those of its two treatments alone. On this scale it has two parts:

- what the scale makes of effects that add up on the log of rates: small counts bend, and few cells escape less or more.
  Additive pairs have this part only, and it follows from the singles;
- what was drawn for the pair: its known effect less that in the same screen simulated with additive pairs only. Singles
  do not show it, and no method trained on them can know it.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData

from scvi_cradle import datasets
from scvi_cradle.benchmark import BenchmarkSettings
from scvi_cradle.benchmark._cell import N_PARTICLES, load_screen, score
from scvi_cradle.benchmark._folds import Fold, make_fold
from scvi_cradle.benchmark._models import BASELINES, MODELS, REGISTRY, fit, model_settings
from scvi_cradle.benchmark._settings import Cell
from scvi_cradle.benchmark._tables import DOUBLES

WITHOUT_ANSWER = ("SVAEPlus", "SVAEPlus (lopez)")  # to unseen combinations
METHODS = [n for n, row in MODELS.items() if row.failed == "all" and n not in WITHOUT_ANSWER] + list(BASELINES)
KNOWN_PARTS = ("known singles, added", "known, but for what was drawn", "measured in held-out cells")
REFERENCES = ("mean training effect", "repeat of the measurement", *KNOWN_PARTS)
SIZES = ("n_cells", "n_genes", "n_combinations", "interaction_fraction", "preset", "max_steps")
SCORES = (
    *(f"{group}_{form}" for group in ("additive", "interacting") for form in ("flat", "each")),
    *("interaction_additive", "interaction_interacting", "drawn_interacting", "interaction_size"),
)


class Truth(NamedTuple):
    """Known effects, labels x genes: of the screen, and of the same screen with additive pairs only."""

    effects: pd.DataFrame
    if_additive: pd.DataFrame
    additive: pd.Series  # of the pairs: whether they are additive


def simulate(seed: int, options: argparse.Namespace) -> tuple[AnnData, Truth]:
    sizes = {name: getattr(options, name) for name in SIZES[:4]}
    common = {"n_perturbations": 12, "artifact_fraction": 0.0, "seed": seed} | sizes
    adata = datasets.simulate_perturbseq(additive_fraction=0.5, **common)
    twin = datasets.simulate_perturbseq(additive_fraction=1.0, **common)
    effects, if_additive = (x.uns["truth"]["population_effects"] for x in (adata, twin))
    plain = AnnData(adata.X, obs=adata.obs[["perturbation", "true_artifact"]], var=adata.var[[]])
    return plain, Truth(effects, if_additive, adata.uns["truth"]["pairs"]["additive"].astype(bool))


def sum_of_singles(effects: pd.DataFrame, pairs: list[str]) -> pd.DataFrame:
    return pd.DataFrame([effects.loc[pair.split("+")].sum() for pair in pairs], index=pairs)


def correlation(truth: pd.DataFrame, predicted: pd.DataFrame) -> float:
    """Return Pearson's correlation of the flattened tables, NaN where the prediction is constant."""
    x, y = truth.to_numpy(dtype=float).ravel(), predicted.to_numpy(dtype=float).ravel()
    return float(np.corrcoef(x, y)[0, 1]) if y.std() > 0 else np.nan


def known_scores(truth: Truth, predicted: pd.DataFrame, pairs: list[str]) -> dict[str, float]:
    """Compare predicted effects of pairs, and their interactions, with the known ones.

    Parameters
    ----------
    truth
        What is known.
    predicted
        Predicted effects, pairs and singles x genes.
    pairs
        Labels of the pairs to score.

    Returns
    -------
    ``SCORES``. A method that predicts no interaction at all has none of the scores of interactions.
    """
    predicted = predicted[truth.effects.columns]
    real, guess = truth.effects.loc[pairs], predicted.loc[pairs]
    interaction = real - sum_of_singles(truth.effects, pairs)
    drawn = real - truth.if_additive.loc[pairs]
    guessed = guess - sum_of_singles(predicted, pairs)
    if np.linalg.norm(guessed) < 1e-4 * np.linalg.norm(guess):  # rounding
        guessed *= 0.0
    additive = truth.additive.loc[pairs].to_numpy()
    result = {}
    for group, rows in (("additive", additive), ("interacting", ~additive)):
        each = [correlation(real.loc[[p]], guess.loc[[p]]) for p in real.index[rows]]
        result[f"{group}_flat"] = correlation(real[rows], guess[rows])
        result[f"{group}_each"] = float(np.mean(np.nan_to_num(each)))
        result[f"interaction_{group}"] = correlation(interaction[rows], guessed[rows])
    result["drawn_interacting"] = correlation(drawn[~additive], guessed[~additive])
    result["interaction_size"] = float(np.linalg.norm(guessed) / np.linalg.norm(interaction))
    return {name: result[name] for name in SCORES}


def references(truth: Truth, fold: Fold, rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the rows that no method is behind."""
    for name, column in (("mean training effect", "baseline"), ("repeat of the measurement", "ceiling")):
        yield {"model": name} | rows[column].to_dict()
    pairs = fold.held_out
    added, real, train = sum_of_singles(truth.effects, pairs), fold.real.to_df(), fold.train.to_df()
    singles = truth.effects.drop(index=truth.additive.index)
    tables = pd.concat([added, singles]), truth.if_additive, pd.concat([real, train])
    for name, table in zip(KNOWN_PARTS, tables, strict=True):
        yield {"model": name} | known_scores(truth, table, pairs)


def runs(seed: int, options: argparse.Namespace, done: set[str]) -> Iterator[dict[str, Any]]:
    """Yield a row for every method that is not done."""
    missing = [name for name in options.models if name not in done]
    if not missing:
        return
    adata, truth = simulate(seed, options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "screen.h5ad"
        adata.write_h5ad(path)
        settings = BenchmarkSettings(
            data=path,
            perturbation_key="perturbation",
            artifact_key="true_artifact",  # there are none
            experiment="doubles",
            preset=options.preset,
            max_steps=options.max_steps,
            seeds=(seed,),
        )
        screen = load_screen(settings)
        fold = make_fold(screen, Cell("doubles", None, None, "", seed), None)
        singles = sorted(set(truth.effects.index) - set(truth.additive.index))
        for name in missing:
            start, row = time.process_time(), REGISTRY[name]
            scvi.settings.seed = seed
            arguments = model_settings(row, options.preset, options.max_steps)
            fitted = fit(row, fold.prepared(screen), arguments, screen.reading | {"batch_key": None})
            seconds = time.process_time() - start
            scored = score(settings, Cell("doubles", None, None, name, seed), fold, fitted)
            rows = pd.DataFrame(scored["rows"]).set_index("metric").reindex(DOUBLES).astype({"baseline": float})
            kind = options.preset if options.preset in N_PARTICLES else "paper"
            drawn = {} if row.is_baseline else {"n_particles": N_PARTICLES[kind], "seed": seed}
            effects = fitted.get_average_treatment_effects([*fold.held_out, *singles], **drawn).to_df()
            result = {"model": name} | rows["value"].to_dict() | known_scores(truth, effects, fold.held_out)
            yield result | {"cpu_seconds": seconds, "n_pairs": len(fold.held_out)}
            if not done & set(REFERENCES):
                yield from references(truth, fold, rows)
                done = done | set(REFERENCES)


def run_missing(options: argparse.Namespace) -> None:
    sizes = {name: getattr(options, name) for name in SIZES}
    for seed in options.seeds:
        key = sizes | {"seed": seed}
        same = _read(options.out, list(key))
        same = same[(same[list(key)].astype(str) == pd.Series(key, dtype=object).astype(str)).all(axis=1)]
        for row in runs(seed, options, set(same["model"])):
            frame = pd.concat(
                [_read(options.out, list(key)), pd.DataFrame([key | row]).astype(dict.fromkeys(key, str))]
            )
            frame.to_csv(options.out, index=False)
            print(*key.values(), row["model"], "done", flush=True)


def _read(path: Path, keys: list[str]) -> pd.DataFrame:
    """Return the CSV with its keys as texts."""
    if not path.exists():
        return pd.DataFrame(columns=[*keys, "model"])
    return pd.read_csv(path, dtype=dict.fromkeys(keys, str), keep_default_na=False, na_values=[""])


def table(path: Path) -> str:
    """Return means with standard errors over seeds, two Markdown tables for every size of the screens."""
    frame, lines = _read(path, [*SIZES, "seed"]), []
    order = {name: i for i, name in enumerate([*REGISTRY, *REFERENCES])}
    for size, part in frame.groupby(list(SIZES), sort=False):
        seeds = ", ".join(dict.fromkeys(part["seed"]))
        lines += ["", ", ".join(f"{k}={v}" for k, v in zip(SIZES, size, strict=True)) + f"; seeds {seeds}"]
        for columns in ((*DOUBLES, "cpu_seconds"), SCORES):
            groups = part.dropna(subset=list(columns), how="all").groupby("model", sort=False)[list(columns)]
            mean, error = groups.mean(), groups.sem()
            text = mean.map(_number) + error.map(lambda v: "" if np.isnan(v) else f" ± {v:.3f}")
            lines += ["", "| " + " | ".join(["model", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
            lines += [f"| {name} | " + " | ".join(text.loc[name]) + " |" for name in sorted(text.index, key=order.get)]
    return "\n".join(lines[1:])


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", choices=["run", "table"])
    add("file", nargs="?", type=Path, default=Path("doubles.csv"), help="for table")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--models", nargs="+", default=METHODS, choices=list(REGISTRY), metavar="NAME", help=f"default: {METHODS}")
    add("--n-cells", type=int, default=6000)
    add("--n-genes", type=int, default=500)
    add("--n-combinations", type=int, default=30)
    add("--interaction-fraction", type=float, default=0.3)
    add("--preset", default="recommended")
    add("--max-steps", type=int, help="default: the preset's")
    add("--out", type=Path, default=Path("doubles.csv"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if options.study == "table":
        print(table(options.file))
    else:
        run_missing(options)


if __name__ == "__main__":
    main()
