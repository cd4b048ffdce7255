"""Which claims about CRADLE-VAE hold: simulated screens with known clean truth, and papalexi.

    python benchmarks/cradle_study.py simulated --fractions 0.15 0.5 --seeds 0 1 2 3 4 --out simulated.csv
    python benchmarks/cradle_study.py papalexi --data papalexi.h5ad --seeds 0 1 2 --out papalexi.csv
    python benchmarks/cradle_study.py table simulated.csv

Every run appends one row to the CSV; ``table`` prints means with standard errors.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch

import scvi_cradle as cradle

CRITERIA = ("total_counts", "n_genes", "pct_mt", "pct_ribo", "pct_hb")
N_LATENT = 50  # the size at which the tables were made; by default it follows the data (scaling_study.py)
SETTINGS = {
    "default": {},
    "cf_weight=0": {"cf_weight": 0.0},
    "cf_weight=0.5": {"cf_weight": 0.5},
    "cf_direction=counterfactual_first": {"cf_weight": 0.5, "cf_direction": "counterfactual_first"},
    "cf summed (published)": {"cf_weight": 0.5, "cf_reduction": "sum"},
    "embedding": {"artifact_latent": "embedding"},
    "effect_path=both": {"effect_path": "both"},
    "no artifact part": {},
    "passed cells only": {},
}

PAPALEXI_SETTINGS = ["default", "effect_path=both", "no artifact part", "cf summed (published)"]


def correlations(truth: np.ndarray, predicted: np.ndarray, rows: list[int]) -> tuple[float, float]:
    """Return Pearson's correlation of the flattened effects and its mean over perturbations (0 for constant effects)."""
    flat = np.corrcoef(truth[rows].ravel(), predicted[rows].ravel())[0, 1]
    each = [np.corrcoef(truth[r], predicted[r])[0, 1] if predicted[r].std() > 0 else 0.0 for r in rows]
    return float(flat), float(np.mean(each))


def log_normalize(x: np.ndarray) -> np.ndarray:
    return np.log2(1 + 1e4 * x / np.maximum(x.sum(1, keepdims=True), 1))


def train(
    adata: ad.AnnData, variant: str, seed: int, flag: str = "artifact", **setup: str
) -> tuple[cradle.CradleVAE, float]:
    if variant == "passed cells only":
        adata = adata[~adata.obs[flag]].copy()
    elif variant == "no artifact part":
        adata = adata.copy()
        adata.obs[flag] = False
    cradle.CradleVAE.setup_anndata(adata, artifact_key=flag, **setup)
    scvi.settings.seed = seed
    model = cradle.CradleVAE(adata, n_latent=N_LATENT, **SETTINGS[variant])
    start = time.process_time()
    model.train(split_key="split", enable_progress_bar=False)
    return model, time.process_time() - start


def simulated(fraction: float, seed: int, variants: list[str]) -> list[dict[str, object]]:
    adata = cradle.datasets.simulate_perturbseq(
        n_cells=4000, n_genes=500, n_perturbations=12, n_combinations=8, artifact_fraction=fraction, seed=seed
    )
    training = (adata.obs["split"] != "test").to_numpy()
    cradle.pp.qc_label(adata, n_mads=3, criteria=CRITERIA, reference=training)
    truth = adata.uns["truth"]["population_effects"]
    labels = list(truth.index)
    held_out = [
        i
        for i, label in enumerate(labels)
        if (adata.obs.loc[adata.obs["perturbation"] == label, "split"] == "test").all()
    ]
    seen = [i for i in range(len(labels)) if i not in held_out]
    clean = adata[~adata.obs["true_artifact"]].copy()
    known = {"fraction": fraction, "seed": seed, "flagged": float(adata.obs["artifact"].mean())}

    def scores(effects: ad.AnnData) -> dict[str, float]:
        predicted = np.asarray(effects[labels].X)
        result = {}
        for name, rows in (("seen", seen), ("unseen", held_out)):
            result[f"{name}_flat"], result[f"{name}_each"] = correlations(truth.to_numpy(), predicted, rows)
        return result

    rows: list[dict[str, object]] = []
    for cells, kept in (("all", training), ("passed", training & ~adata.obs["artifact"].to_numpy())):
        for baseline in (
            cradle.baselines.PerturbedMean(),
            cradle.baselines.Additive(),
            cradle.baselines.ShrunkenEffects(),
        ):
            baseline.fit(adata[kept].copy(), "perturbation")
            name = f"{type(baseline).__name__} ({cells} cells)"
            rows.append(known | {"model": name} | scores(baseline.get_average_treatment_effects(labels)))
    clean_rates = cradle.metrics.qc_pass_rate(clean, clean, thresholds=adata.uns["qc_label"]).loc["all"]
    for variant in variants:
        model, seconds = train(adata, variant, seed, perturbation_key="perturbation")
        generated = model.get_generated_expression(n_samples=200, seed=seed)
        rates = cradle.metrics.qc_pass_rate(clean, generated, thresholds=adata.uns["qc_label"]).loc["all"]
        row = (
            known
            | {"model": variant, "seconds": seconds}
            | scores(model.get_average_treatment_effects(labels, seed=seed))
        )
        row |= {"pass_generated": rates["generated"], "pass_clean": clean_rates["generated"]}
        row |= {f"gap_{c}": rates[f"generated_{c}"] - clean_rates[f"generated_{c}"] for c in CRITERIA}
        row |= model.diagnostics_
        if variant not in ("no artifact part", "passed cells only"):
            failed = model.get_generated_expression(n_samples=200, artifact=True, seed=seed)
            row["pass_artifact"] = cradle.metrics.qc_pass_rate(clean, failed, thresholds=adata.uns["qc_label"]).loc[
                "all", "generated"
            ]
            artifacts = adata[adata.obs["true_artifact"]].copy()
            row["pass_true_artifacts"] = cradle.metrics.qc_pass_rate(
                clean, artifacts, thresholds=adata.uns["qc_label"]
            ).loc["all", "generated"]
            row |= rescue(model, adata, seed)
        rows.append(row)
    return rows


def rescue(model: cradle.CradleVAE, adata: ad.AnnData, seed: int) -> dict[str, float]:
    """How far failed cells move towards their clean twins when decoded without the artifact."""
    cells = np.flatnonzero(adata.obs["artifact"] & adata.obs["true_artifact"] & (adata.obs["split"] != "test"))
    twin, observed = adata.layers["clean_counts"][cells].toarray(), adata.X[cells].toarray()
    without, with_ = (
        model.get_counterfactual_expression(indices=cells, artifact=a, output="mean", seed=seed).X
        for a in (False, True)
    )
    error = [((log_normalize(x) - log_normalize(twin)) ** 2).mean(1) for x in (without, with_)]
    profile = {k: mean_profile(x) for k, x in {"twin": twin, "observed": observed, "without": without}.items()}
    left = np.linalg.norm(profile["without"] - profile["twin"]) / np.linalg.norm(profile["observed"] - profile["twin"])
    return {"moved_nearer": float((error[0] < error[1]).mean()), "distance_left": float(left)}


def mean_profile(x: np.ndarray) -> np.ndarray:
    """Return log2 of the mean counts per 10,000."""
    return np.log2(1 + 1e4 * (x / np.maximum(x.sum(1, keepdims=True), 1)).mean(0))


def papalexi(path: Path, seed: int, variants: list[str]) -> list[dict[str, object]]:
    adata = ad.read_h5ad(path)
    rng = np.random.default_rng(seed)
    test = np.zeros(adata.n_obs, dtype=bool)
    for rows in adata.obs.groupby("perturbation", observed=True).indices.values():
        test[rng.choice(rows, round(0.2 * len(rows)), replace=False)] = True
    adata.obs["split"] = np.where(test, "test", "train")
    adata.obs["rep"] = adata.obs["bio_rep"].astype(str)
    cradle.pp.qc_label(adata, n_mads=2, criteria=("total_counts", "n_genes", "pct_mt"), reference=~test)
    held_out = cradle.metrics.average_treatment_effects(adata[test].copy(), "perturbation", control="NT")
    labels = list(held_out.obs_names)
    truth = np.asarray(held_out.X)
    everything = list(range(len(labels)))
    known = {"seed": seed, "flagged": float(adata.obs["artifact"].mean())}

    def row(name: str, effects: ad.AnnData, **more: float) -> dict[str, object]:
        flat, each = correlations(truth, np.asarray(effects[labels].X), everything)
        return known | {"model": name, "flat": flat, "each": each} | more

    training = adata[~test].copy()
    rows = []
    for baseline in (cradle.baselines.PerturbedMean(), cradle.baselines.Additive(), cradle.baselines.ShrunkenEffects()):
        baseline.fit(training, "perturbation", control="NT")
        rows.append(row(type(baseline).__name__, baseline.get_average_treatment_effects(labels)))
    ceiling = cradle.metrics.replicate_ceiling(adata, "perturbation", control="NT", seed=seed)
    rows.append(
        known
        | {
            "model": "replicate (halves of all cells)",
            "flat": ceiling.loc["ate_pearson", "mean"],
            "each": ceiling.loc["pearson_delta", "mean"],
        }
    )
    for variant in variants:
        model, seconds = train(adata, variant, seed, perturbation_key="perturbation", control="NT")
        effects = model.get_average_treatment_effects(labels, seed=seed)
        rows.append(row(f"CradleVAE {variant}", effects, seconds=seconds, **model.diagnostics_))
    return rows


def table(path: Path) -> str:
    """Return means with standard errors over seeds, by model (and fraction)."""
    frame = pd.read_csv(path)
    keys = [k for k in ("fraction", "model") if k in frame]
    numbers = [c for c in frame.columns if c not in (*keys, "seed")]
    groups = frame.groupby(keys, sort=False)[numbers]
    mean, error = groups.mean(), groups.sem()
    text = mean.map(lambda v: "" if np.isnan(v) else f"{v:.3f}") + error.map(
        lambda v: "" if np.isnan(v) else f" ± {v:.3f}"
    )
    text = text.where(mean.notna(), "")
    header = "| " + " | ".join([*keys, *numbers]) + " |\n|" + "---|" * (len(keys) + len(numbers))
    lines = [
        "| " + " | ".join([*map(str, index if isinstance(index, tuple) else (index,)), *values]) + " |"
        for index, values in zip(text.index, text.to_numpy(), strict=True)
    ]
    return "\n".join([header, *lines])


def append(path: Path, rows: list[dict[str, object]]) -> None:
    frame = pd.DataFrame(rows)
    if path.exists():
        frame = pd.concat([pd.read_csv(path), frame])
    frame.to_csv(path, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["simulated", "papalexi", "table"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.15, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--models", nargs="+", help="default: all, and four of them for papalexi")
    parser.add_argument("--out", type=Path, default=Path("study.csv"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.study == "table":
        print(table(arguments.file))
        return
    for seed in arguments.seeds:
        if arguments.study == "papalexi":
            append(arguments.out, papalexi(arguments.data, seed, arguments.models or PAPALEXI_SETTINGS))
        else:
            for fraction in arguments.fractions:
                append(arguments.out, simulated(fraction, seed, arguments.models or list(SETTINGS)))
        print(f"seed {seed} done", flush=True)


if __name__ == "__main__":
    main()
