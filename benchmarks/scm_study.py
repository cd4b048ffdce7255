"""PerturbedVAE on data from known causal models: identifiability, alignment, capacity, graph, linear probes.

    python benchmarks/scm_study.py identifiability --seeds 0 1 2 3 4 --out scm.csv
    python benchmarks/scm_study.py alignment --seeds 0 1 --out scm.csv
    python benchmarks/scm_study.py capacity --seeds 0 1 --out scm.csv
    python benchmarks/scm_study.py stability --seeds 0 --out scm.csv --models models
    python benchmarks/scm_study.py probe --seeds 0 1 2 --out probe.csv
    python benchmarks/scm_study.py table --out scm.csv      # and --out probe.csv

Every run appends one row to the CSV, and rows that are in it are not computed again; ``table`` prints means with standard
errors over seeds. ``--models`` keeps the trained models in a folder, and takes from it those that are there.

The first four studies train on :func:`scvi_cradle.datasets.simulate_scm` and compare posterior means with the true latents:
``mcc`` (mean correlation coefficient of the responsive latents, test cells), ``r2_nu`` and ``r2_iota`` (linear regression
of a true block on the estimated block, fitted on training cells, R2 on test cells), ``leak`` (the same for the true
responsive block from the estimated *invariant* block), ``both_nu`` and ``both_iota`` (from both estimated blocks: what
is kept at all). The true blocks depend on each other, so that even the true invariant block has a leak above 0. Nothing is
left to defaults of the package: all settings are in ``FIXED``, ``PLAN``, ``LONG`` and ``SHORT`` of ``scm_runs.py``.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scm_runs import COLUMNS, GRAPH, KEYS, STABILITY, THRESHOLD, probe_rows, scm_rows, stability_rows

PAPER = {"paper, no alignment": (0.81, 0.93, 0.66), "paper, alignment": (0.86, 0.95, 0.97)}


def run_missing(options: argparse.Namespace) -> None:
    keys = ["study", "seed"] if options.study == "probe" else list(KEYS)
    for seed in options.seeds:
        done = set(map(tuple, _read(options.out, keys)[keys].to_numpy()))
        rows = {"probe": probe_rows, "stability": stability_rows}.get(options.study, partial(scm_rows, options.study))
        for row in rows(seed, options, done):
            new = pd.DataFrame([row]).astype(dict.fromkeys(keys, str))
            pd.concat([_read(options.out, keys), new]).to_csv(options.out, index=False)
            print(
                time.strftime("%H:%M:%S"),
                {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()},
                flush=True,
            )


def _read(path: Path, keys: list[str]) -> pd.DataFrame:
    """Return the CSV with its keys as texts."""
    if not path.exists():
        return pd.DataFrame(columns=keys)
    return pd.read_csv(path, dtype=dict.fromkeys(keys, str), keep_default_na=False, na_values=[""])


def table(path: Path) -> str:
    """Return Markdown tables of all studies in the CSV: means with standard errors over seeds."""
    frame = pd.read_csv(path, dtype={"seed": str})
    if "representation" in frame:
        return markdown(
            frame,
            ["representation"],
            ["accuracy", "chance", "balanced_accuracy", "balanced_chance", "kl_responsive", "kl_invariant"],
        )
    parts = []
    for study, part in frame[frame["study"] != "reference"].groupby("study", sort=False):
        names = [k for k in KEYS[2:] if part[k].nunique() > 1]
        rows = frame[frame["study"].isin([study, "reference"])] if study == "identifiability" else part
        parts += [f"**{study}**", markdown(rows, names, [*COLUMNS] if study != "stability" else [*COLUMNS, *STABILITY])]
        if study == "identifiability":
            paper = pd.DataFrame([[k, *map(_number, v)] for k, v in PAPER.items()], columns=["", *COLUMNS[:3]])
            parts += [lines(paper), per_seed(part), graph_table(part)]
    return "\n\n".join(parts)


def markdown(frame: pd.DataFrame, names: list[str], columns: list[str]) -> str:
    groups = frame.groupby(names, sort=False)
    mean, error, count = groups[columns].mean(), groups[columns].sem(), groups["seed"].nunique()
    text = mean.map(_number) + error.map(lambda v: "" if np.isnan(v) else f" ± {_number(v)}")
    text["seeds"] = count.astype(str)
    return lines(text.reset_index())


def per_seed(part: pd.DataFrame) -> str:
    """Return what alignment with shared pairs changes in every seed."""
    wide = part.set_index(["seed", "pairing"])[["r2_iota", "leak"]].unstack()
    rows = pd.DataFrame(
        {
            "rise of r2_iota, shared pairs": wide["r2_iota"]["shared"] - wide["r2_iota"]["none"],
            "rise of r2_iota, random pairs": wide["r2_iota"]["random"] - wide["r2_iota"]["none"],
            "leak, shared pairs": wide["leak"]["shared"],
            "leak, no alignment": wide["leak"]["none"],
        }
    )
    return lines(rows.map(_number).reset_index())


def graph_table(part: pd.DataFrame) -> str:
    """Return edges pooled over seeds, beside what as many edges between random programs would score."""
    rows = []
    for pairing, group in part.groupby("pairing", sort=False):
        n, total = len(group), group[list(GRAPH)].sum()
        pairs = 4 * 3  # ordered pairs of programs
        rows.append(
            {
                "pairs": pairing,
                "true edges": total["n_true"],
                f"edges above {THRESHOLD}": total["n_edges"],
                "right": total["n_right"],
                "right (random)": (group["n_edges"] * group["n_true"] / pairs).sum(),
                "right but for the direction": total["n_undirected"],
                "(random)": (2 * group["n_edges"] * group["n_true"] / pairs).sum(),
                "strongest: right": total["n_strongest_right"],
                "(random) ": (group["n_true"] ** 2 / pairs).sum(),
                "strongest: but for the direction": total["n_strongest_undirected"],
                "(random)  ": (2 * group["n_true"] ** 2 / pairs).sum(),
                "AUC of joined pairs (random 0.5)": f"{group['auc'].mean():.2f} ({group['auc'].count()} of {n})",
            }
        )
    text = pd.DataFrame(rows).map(lambda v: f"{v:.3g}" if isinstance(v, float) else str(v))
    return lines(text)


def lines(text: pd.DataFrame) -> str:
    rows = [list(text.columns), ["---"] * text.shape[1], *text.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(c).strip() for c in row) + " |" for row in rows)


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", choices=["identifiability", "alignment", "capacity", "stability", "probe", "table"])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--out", type=Path, default=Path("scm.csv"))
    add("--models", type=Path, help="folder of trained models")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if options.study == "table":
        print(table(options.out))
    else:
        run_missing(options)


if __name__ == "__main__":
    main()
