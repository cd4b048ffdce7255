"""QuantileHurdleAE: probabilities against known truth, false positives, reconstructed marginals, and a real screen.

    python benchmarks/loop_study.py simulate --seeds 0 1 2 3 4 --out loop.csv
    python benchmarks/loop_study.py mixscape --seeds 0 1 2 3 4 --out loop.csv
    python benchmarks/loop_study.py reconstruction --seeds 0 1 2 3 4 --out reconstruction.csv
    python benchmarks/loop_study.py papalexi papalexi.h5ad --model model --out papalexi.csv
    python benchmarks/loop_study.py null papalexi.h5ad --model model --runs 100 --out null.csv
    python benchmarks/loop_study.py null papalexi.h5ad --model model --whole-loop --runs 5 --out null.csv
    python benchmarks/loop_study.py table --out loop.csv       # and the other files

Every run appends to the CSV; runs that are in it are not computed again. ``simulate`` compares the probability of labelled
cells of :func:`scvi_cradle.datasets.simulate_perturbseq` with ``true_perturbed``; ``mixscape`` adds Mixscape (needs pertpy).
``reconstruction`` compares held-out cells with their reconstructions by the model and by an autoencoder of the same size with
squared errors, both trained with equal weights of genes. ``papalexi`` runs the loop with its defaults and keeps the model, which ``null`` uses.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
import scvi
from scipy.special import expit
from scipy.stats import spearmanr, wasserstein_distance
from sklearn.metrics import brier_score_loss, roc_auc_score

import scvi_cradle as cradle
from scvi_cradle.train import fit_classifiers

SCREEN = {"n_cells": 2_000, "n_genes": 200, "n_perturbations": 8, "n_combinations": 0}
GUIDES = {"guide_counts_key": "guide_counts", "guide_targets": "guide_targets"}
STEPS = 300
STRONG = ("IFNGR2", "JAK2", "IFNGR1", "STAT1", "SMAD4", "IRF1")


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    new = pd.DataFrame(rows)
    old = pd.read_csv(path) if path.exists() else pd.DataFrame()
    pd.concat([old, new]).to_csv(path, index=False)
    print(time.strftime("%H:%M:%S"), *rows, sep="\n  ", flush=True)


def done(path: Path, **keys: Any) -> bool:
    if not path.exists():
        return False
    frame = pd.read_csv(path)
    return bool(np.logical_and.reduce([frame[k] == v for k, v in keys.items()]).any())


def normalised(adata: anndata.AnnData) -> anndata.AnnData:
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


# ---- probabilities against truth -----------------------------------------------------------------------------------------


def simulate(options: argparse.Namespace) -> None:
    for efficiency in options.efficiency:
        for seed in options.seeds:
            if done(options.out, efficiency=efficiency, seed=seed, evidence="expression"):
                continue
            counts = cradle.datasets.simulate_perturbseq(**SCREEN, efficiency=efficiency, seed=seed)
            adata = normalised(counts.copy())
            scvi.settings.seed = seed
            cradle.QuantileHurdleAE.setup_anndata(adata, perturbation_key="perturbation", **GUIDES)
            model = cradle.QuantileHurdleAE(adata)
            start = time.process_time()
            model.fit_perturbation_loop(max_steps=options.steps, seed=seed, progress=False)
            seconds = time.process_time() - start
            labelled = (adata.obs["perturbation"] != "control").to_numpy()
            truth = adata.obs["true_perturbed"].to_numpy()[labelled]
            scores: dict[str, np.ndarray] = {"prevalence alone": np.full(len(truth), truth.mean())}
            for name, arguments in {
                "expression": {"evidence": "expression"},
                "guides": {"evidence": "guides"},
                "both, scale 0.5": {"evidence": "both", "guide_scale": 0.5},
                "both, scale 1": {"evidence": "both", "guide_scale": 1.0},
            }.items():
                table = model.get_perturbation_probability(**arguments)
                scores[name] = table.max(axis=1).to_numpy()[labelled]
            scores["nnNU on the same latents"] = nnnu(model)[labelled]
            screening = model.screening_
            common = {
                "efficiency": efficiency,
                "seed": seed,
                "perturbed": truth.mean(),
                "prevalence": screening["prevalence"].mean(),
                "kept": screening["kept"].mean(),
                "seconds": seconds,
            }
            append(options.out, [common | {"evidence": k} | score(truth, p) for k, p in scores.items()])


def nnnu(model: Any) -> np.ndarray:
    """Return the probability of the published classifiers, from expression alone, on the latents that the model has now."""
    screen = model._screen()
    cells = screen.split(screen.row), screen.split(screen.control_row, controls=True)
    fit = fit_classifiers(model.get_latent_representation(), *cells, screen.is_train)
    probability = np.zeros(model.adata.n_obs)
    probability[screen.row] = expit(np.concatenate(fit.unlabeled_logits))
    return probability


def score(truth: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    constant = np.ptp(probability) == 0
    auroc = 0.5 if constant else roc_auc_score(truth, probability)
    return {"auroc": auroc, "brier": brier_score_loss(truth, probability), "mean_probability": probability.mean()}


def mixscape(options: argparse.Namespace) -> None:
    """Add the posterior probability of Mixscape, as pertpy computes it, for the same screens."""
    import pertpy

    for efficiency in options.efficiency:
        for seed in options.seeds:
            if done(options.out, efficiency=efficiency, seed=seed, evidence="Mixscape"):
                continue
            adata = normalised(cradle.datasets.simulate_perturbseq(**SCREEN, efficiency=efficiency, seed=seed))
            start = time.process_time()
            sc.pp.pca(adata, n_comps=30)
            peer = pertpy.tl.Mixscape()
            peer.perturbation_signature(adata, "perturbation", "control", n_neighbors=20)
            peer.mixscape(adata, "perturbation", "control", layer="X_pert", perturbation_type="KO")
            seconds = time.process_time() - start
            (column,) = [c for c in adata.obs if c.startswith("mixscape_class_p_")]
            labelled = (adata.obs["perturbation"] != "control").to_numpy()
            truth = adata.obs["true_perturbed"].to_numpy()[labelled]
            probability = adata.obs[column].to_numpy(dtype=float)[labelled]
            row = {"efficiency": efficiency, "seed": seed, "perturbed": truth.mean(), "seconds": seconds}
            append(options.out, [row | {"evidence": "Mixscape"} | score(truth, probability)])


# ---- reconstruction ------------------------------------------------------------------------------------------------------


def reconstruction(options: argparse.Namespace) -> None:
    for seed in options.seeds:
        if done(options.out, seed=seed):
            continue
        adata = normalised(cradle.datasets.simulate_perturbseq(**SCREEN, seed=seed))
        cradle.QuantileHurdleAE.setup_anndata(adata, perturbation_key="perturbation")
        rows = []
        for kind in ("quantile-hurdle", "mse"):
            scvi.settings.seed = seed
            model = cradle.QuantileHurdleAE(adata, reconstruction=kind)
            model.train(max_steps=options.steps, split_key="split", enable_progress_bar=False)
            held_out = np.flatnonzero(adata.obs["split"] == "test")
            real = adata.X[held_out].toarray()
            outputs = {"mean": model.get_reconstructed_expression(indices=held_out, kind="mean").X}
            levels = np.asarray(model.module.levels)
            if kind == "mse":
                quantiles = np.repeat(outputs["mean"][..., None], len(levels), axis=-1)
            else:
                outputs["sample"] = model.get_reconstructed_expression(indices=held_out, kind="sample", seed=seed).X
                quantiles = predicted_quantiles(model, held_out)
            error = real[..., None] - quantiles
            pinball = np.maximum(levels * error, (levels - 1) * error).mean(-1)[real > 0].mean()
            for name, values in outputs.items():
                distances = [wasserstein_distance(real[:, j], values[:, j]) for j in range(real.shape[1])]
                rows.append(
                    {
                        "seed": seed,
                        "model": kind,
                        "output": name,
                        "pinball_of_positive": pinball,
                        "qq_error": np.mean(distances),
                        "zeros_error": np.abs((real == 0).mean(0) - (values == 0).mean(0)).mean(),
                        "variance_ratio": values.var(0).sum() / real.var(0).sum(),
                        "mse": ((real - values) ** 2).mean(),
                    }
                )
        append(options.out, rows)


def predicted_quantiles(model: Any, cells: np.ndarray) -> np.ndarray:
    import torch

    z = torch.as_tensor(model.get_latent_representation(indices=cells))
    with torch.inference_mode():
        return model.module.decode(z).quantiles.numpy()


# ---- a real screen -------------------------------------------------------------------------------------------------------


def register(path: Path) -> anndata.AnnData:
    adata = normalised(anndata.read_h5ad(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cradle.QuantileHurdleAE.setup_anndata(adata, perturbation_key="perturbation", control="NT", **GUIDES)
    return adata


def papalexi(options: argparse.Namespace) -> None:
    adata = register(options.data)
    scvi.settings.seed = 0
    model = cradle.QuantileHurdleAE(adata)
    wall, cpu = time.perf_counter(), time.process_time()
    model.fit_perturbation_loop(checkpoint_dir=options.model / "checkpoint", scores=options.scores, progress=False)
    print(f"{time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} CPU s")
    model.save(options.model / "model", overwrite=True)
    print(model.loop_history_.T.to_string())
    probability = model.get_perturbation_probability(evidence="expression")
    table = model.screening_.assign(strong=lambda t: t["target"].isin(STRONG))
    of_guide = adata.uns["guide_targets"].set_index("guide")["target"]
    trend, means = [], []
    for target in table["target"]:
        cells = (adata.obs["perturbation"] == target).to_numpy()
        umi = adata.obsm["guide_counts"].loc[cells, of_guide.index[of_guide == target]].sum(axis=1)
        values = probability.loc[cells, target]
        trend.append(spearmanr(umi, values).statistic)
        means.append([values[umi.rank(pct=True) <= 1 / 3].mean(), values[umi.rank(pct=True) > 2 / 3].mean()])
    table[["low_umi", "high_umi"]] = means
    table["spearman_umi"] = trend
    table.to_csv(options.out, index=False)
    print(table.sort_values("gap", ascending=False).to_string(float_format="{:.3f}".format))


def null(options: argparse.Namespace) -> None:
    model = cradle.QuantileHurdleAE.load(options.model / "model", adata=register(options.data))
    arguments: dict[str, Any] = {"whole_loop": True, "max_steps": options.steps} if options.whole_loop else {}
    arguments |= {"scores": options.scores, "variance_floor": not options.no_floor}
    start = time.perf_counter()
    table = model.get_null_calibration(options.runs, n_cells=options.n_cells, seed=0, **arguments)
    table = table.assign(whole_loop=options.whole_loop, scores=options.scores, floor=not options.no_floor)
    append(options.out, table.to_dict("records"))
    print(f"{time.perf_counter() - start:.0f} s")


# ---- tables --------------------------------------------------------------------------------------------------------------


def table(path: Path) -> str:
    frame = pd.read_csv(path)
    keys = {
        "evidence": ["efficiency", "evidence"],
        "output": ["model", "output"],
        "weights": ["whole_loop", "scores", "floor", "weights"],
    }
    names = next((v for k, v in keys.items() if k in frame), None)
    if names is None:
        return frame.to_markdown(index=False, floatfmt=".3f")
    values = [c for c in frame.select_dtypes(["number", "bool"]) if c not in (*names, "seed", "run")]
    groups = frame.groupby(names, sort=False)[values]
    mean, error = groups.mean(), groups.sem()
    n = groups.size().rename("n")
    text = mean.map("{:.3f}".format) + " ± " + error.map("{:.3f}".format)
    return pd.concat([n, text], axis=1).reset_index().to_markdown(index=False)


STUDIES = {
    "simulate": simulate,
    "mixscape": mixscape,
    "reconstruction": reconstruction,
    "papalexi": papalexi,
    "null": null,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "table"])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="folder of the model of `papalexi`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--efficiency", type=float, nargs="+", default=[0.3, 0.6, 0.9])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the autoencoder (per round)")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--n-cells", type=int, default=200)
    parser.add_argument("--scores", choices=["discriminant", "nnnu"], default="discriminant")
    parser.add_argument("--no-floor", action="store_true", help="variances of sparse genes as they are, as published")
    parser.add_argument("--whole-loop", action="store_true")
    options = parser.parse_args()
    if options.study == "table":
        print(table(options.out))
    else:
        STUDIES[options.study](options)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
