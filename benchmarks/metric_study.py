"""What the metrics say of predictions whose quality is known.

    python benchmarks/metric_study.py anchors --data papalexi.h5ad      # knows nothing, replicate; shared controls or not
    python benchmarks/metric_study.py null --data papalexi.h5ad         # non-targeting cells against non-targeting cells
    python benchmarks/metric_study.py scaled --data papalexi.h5ad       # `evaluate` on a replicate, a constant, swapped labels
    python benchmarks/metric_study.py full-size --data papalexi.h5ad    # the extrapolated ceiling against a real one
    python benchmarks/metric_study.py coverage                          # of the intervals, in simulation
    python benchmarks/metric_study.py welch --data papalexi.h5ad        # false positives of the weighted Welch test

Tables go to the standard output as Markdown, means with standard errors over random splits.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from scvi_cradle import metrics

N_SPLITS = 5
ARGUMENTS = {"perturbation_key": "perturbation", "control": "NT"}


def read(path: Path) -> ad.AnnData:
    return ad.read_h5ad(path)


def halves(adata: ad.AnnData, rng: np.random.Generator, n: int = 2) -> list[ad.AnnData]:
    """Deal the cells of every label into ``n`` parts."""
    part = np.zeros(adata.n_obs, dtype=int)
    for rows in adata.obs.groupby("perturbation", observed=True).indices.values():
        part[rng.permutation(rows)] = np.arange(len(rows)) % n
    return [adata[part == i].copy() for i in range(n)]


def with_controls_of(cells: ad.AnnData, other: ad.AnnData) -> ad.AnnData:
    """Replace the controls of ``cells`` by those of ``other``."""
    own = cells[cells.obs["perturbation"] != "NT"]
    return ad.concat([own, other[other.obs["perturbation"] == "NT"]])


def scores(real: ad.AnnData, predicted: ad.AnnData, mean: np.ndarray) -> dict[str, float]:
    """Return the columns of the table for two sets of effects; ``mean`` is the reference of Systema's correlation."""
    x, y = np.asarray(real.X), np.asarray(predicted.X)
    expression = real.var["control_mean"].to_numpy() + x, predicted.var["control_mean"].to_numpy() + y
    return {
        "flat": metrics.ate_pearson(x, y),
        "flat top 20": metrics.ate_pearson(x, y, top_k=20),
        "each": metrics.pearson_delta(x, y),
        "each, less the mean": metrics.pearson_delta(x, y, reference="perturbed_mean", train=mean),
        "raw R2": float(np.mean([metrics.r2_of_means(a[None], b[None]) for a, b in zip(*expression, strict=True)])),
        "discrimination": metrics.perturbation_discrimination(
            real, predicted, exclude_genes=[name.split("g")[0] for name in real.obs_names]
        ),
    }


def anchors(options: argparse.Namespace) -> pd.DataFrame:
    """Mean baseline and replicate, with controls of their own and with the truth's."""
    adata, rows = read(options.data), []
    for seed in range(options.splits):
        one, two = halves(adata, np.random.default_rng(seed))
        for controls, other in (("independent", two), ("shared", with_controls_of(two, one))):
            real, again = (metrics.average_treatment_effects(a, **ARGUMENTS) for a in (one, other))
            mean = np.asarray(again.X).mean(axis=0)
            constant = again.copy()
            constant.X = np.tile(mean, (again.n_obs, 1))
            left_out = again.copy()
            left_out.X = (mean * again.n_obs - np.asarray(again.X)) / (again.n_obs - 1)
            for name, guess in {
                "mean effect": constant,
                "mean effect of the others": left_out,
                "replicate": again,
            }.items():
                rows.append({"prediction": name, "controls": controls} | scores(real, guess, mean[None]))
    return summary(rows, ["prediction", "controls"])


def null(options: argparse.Namespace) -> pd.DataFrame:
    """Two groups of non-targeting cells: effects that are nothing, against one group of controls or against two."""
    adata = read(options.data)
    cells = adata[adata.obs["perturbation"] == "NT"].copy()
    rows = []
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(cells.n_obs)[:400].reshape(4, 100)
        names = {"a": order[0], "b": order[1], "control": order[2], "other control": order[3]}

        def effect(group: str, control: str, names: dict[str, np.ndarray] = names) -> np.ndarray:
            part = cells[np.concatenate([names[control], names[group]])].copy()
            part.obs["perturbation"] = np.repeat(["control", "x"], 100)
            return np.asarray(metrics.average_treatment_effects(part, "perturbation").X)

        for which, control in (("shared", "control"), ("independent", "other control")):
            rows.append({"controls": which, "flat": metrics.ate_pearson(effect("a", "control"), effect("b", control))})
    return summary(rows, ["controls"])


def scaled(options: argparse.Namespace) -> pd.DataFrame:
    """`evaluate` on predictions of known quality; a third of the cells each for truth, prediction and training."""
    adata, rows = read(options.data), []
    for seed in range(options.splits):
        rng = np.random.default_rng(seed)
        real, again, train = halves(adata, rng, 3)
        labels = again.obs["perturbation"].astype(str).to_numpy()
        names = sorted(set(labels) - {"NT"})
        swapped, constant = again.copy(), again.copy()
        order = rng.permutation(names)  # a cycle: no label keeps its cells
        turned = dict(zip(order, np.roll(order, 1), strict=True)) | {"NT": "NT"}
        swapped.obs["perturbation"] = [turned[x] for x in labels]
        perturbed = labels != "NT"
        constant.obs.loc[perturbed, "perturbation"] = rng.permutation(labels[perturbed])
        for name, guess in {"replicate": again, "labels shuffled": constant, "labels swapped": swapped}.items():
            table = metrics.evaluate(real, guess, train=train, control="NT", seed=seed)
            inside = {"replicate": 1.0, "labels shuffled": 0.0}.get(name, np.nan)
            for metric, row in table.iterrows():
                covered = row["scaled_low"] <= inside <= row["scaled_high"] if np.isfinite(inside) else np.nan
                rows.append(
                    {"metric": metric, "prediction": name}
                    | row[["value", "baseline", "ceiling", "scaled"]].astype(float).to_dict()
                    | {"interval covers": covered}
                )
    return summary(rows, ["metric", "prediction"])


def full_size(options: argparse.Namespace) -> pd.DataFrame:
    """The ceiling extrapolated within one half of the cells, and the score of that half against the other."""
    adata, rows = read(options.data), []
    for seed in range(options.splits):
        one, two = halves(adata, np.random.default_rng(seed))
        table = metrics.evaluate(one, two, train=two, control="NT", n_bootstrap=0, seed=seed)
        ceiling = metrics.replicate_ceiling(one, **ARGUMENTS, n_repeats=10, seed=seed)
        for name in ceiling.index:
            rows.append(
                {
                    "metric": name,
                    "repeat of half the size": ceiling.loc[name, "mean"],
                    "extrapolated to full size": ceiling.loc[name, "full_size"],
                    "repeat of full size": table.loc[name, "value"],
                }
            )
    return summary(rows, ["metric"])


def coverage(options: argparse.Namespace) -> pd.DataFrame:
    """Share of 95 % intervals that hold the score of all 4,000 perturbations that the sample was drawn from."""
    rows = []
    for spread in (0.0, 0.7):
        rng = np.random.default_rng(0)
        shape = (4_000, 80)
        effects = np.exp(spread * rng.normal(size=(len(range(shape[0])), 1))) * rng.standard_t(4, size=shape)
        real, guess = (effects + noise * rng.normal(size=shape) for noise in (0.5, 1.0))
        fixed = pd.DataFrame({"full_size": 1.0}, index=["pearson_delta", "ate_pearson", "ate_r2", "jaccard_top_20"])
        arguments = {"train": np.zeros((1, shape[1])), "ceiling": fixed}
        truth = metrics.evaluate_effects(real, guess, n_bootstrap=0, **arguments)
        for n in (10, 25, 100):
            for _ in range(400):
                chosen = rng.choice(shape[0], n, replace=False)
                seed = int(rng.integers(2**31))
                table = metrics.evaluate_effects(real[chosen], guess[chosen], seed=seed, **arguments)
                covered = (table["ci_low"] <= truth["value"]) & (truth["value"] <= table["ci_high"])
                rows += [
                    {"metric": m, "perturbations": n, "spread of strengths": spread, "covered": float(c)}
                    for m, c in covered.items()
                ]
    return summary(rows, ["metric", "perturbations", "spread of strengths"])


def welch(options: argparse.Namespace) -> pd.DataFrame:
    """False positives: 200 of 1,000 non-targeting cells are called perturbed and weighted by a classifier's score."""
    adata = read(options.data)
    cells = adata[adata.obs["perturbation"] == "NT"].copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    rows = []
    for seed in range(options.runs):
        rng = np.random.default_rng(seed)
        x = cells[np.sort(rng.choice(cells.n_obs, 1_000, replace=False))].X.toarray()
        x = x[:, np.sort(np.argsort(-x.mean(axis=0))[:200])]
        called = rng.permutation(1_000) < 200
        components = sc.pp.pca(x, n_comps=20, random_state=0)
        model = LogisticRegression(max_iter=1_000, class_weight="balanced")
        fitted = model.fit(components, called).predict_proba(components)[:, 1]
        crossed = cross_val_predict(model, components, called, cv=4, method="predict_proba")[:, 1]
        ones = np.ones(1_000)
        for name, w, v in (
            ("plain Welch", ones, ones),
            ("weights p", fitted, ones),
            ("weights p, cross-fitted", crossed, ones),
            ("weights p, cross-fitted, controls weighted alike", crossed, crossed),
        ):
            table = metrics.weighted_welch(x[called], w[called], x[~called], reference_weights=v[~called])
            p = table["pvalue"].to_numpy()
            rows.append(
                {
                    "weights": name,
                    "p < .05": (p < 0.05).mean(),
                    "runs with a Bonferroni hit": float(p.min() * len(p) < 0.05),
                }
            )
    return summary(rows, ["weights"])


def summary(rows: list[dict[str, object]], keys: list[str]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    groups = frame.groupby(keys, sort=False)
    mean, sem = groups.mean(), groups.sem()
    return mean.round(3).astype(str) + " ± " + sem.round(3).astype(str)


STUDIES: dict[str, Callable[[argparse.Namespace], pd.DataFrame]] = {
    "anchors": anchors,
    "null": null,
    "scaled": scaled,
    "full-size": full_size,
    "coverage": coverage,
    "welch": welch,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--splits", type=int, default=N_SPLITS)
    parser.add_argument("--runs", type=int, default=100)
    options = parser.parse_args()
    if options.study != "coverage" and options.data is None:
        parser.error("this study needs --data")
    warnings.filterwarnings("ignore", category=UserWarning, module="anndata")
    table = STUDIES[options.study](options)
    flat = table.reset_index()
    for cells in ([*flat.columns], ["---"] * flat.shape[1], *flat.to_numpy().tolist()):
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
