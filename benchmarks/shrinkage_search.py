"""Estimators that were tried against multivariate shrinkage on the held-out cells of papalexi.

    python benchmarks/shrinkage_search.py --data papalexi.h5ad --out search.csv
    python benchmarks/shrinkage_study.py table search.csv

Nothing here sees a test cell. ``tests/baselines`` and ``shrinkage_study.py`` have the estimator itself.
"""

from __future__ import annotations

import argparse
import warnings
from functools import lru_cache, partial
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from sams_runs import papalexi_cells, papalexi_scores
from sams_study import run_missing
from scipy.special import logsumexp

from scvi_cradle.baselines import _covariance_mixture as mixture
from scvi_cradle.baselines._covariance_mixture import SCALES, FullPrior, NoisyEffects, Sums, fit_prior, posterior
from scvi_cradle.baselines._factor_mixture import FactorPrior
from scvi_cradle.baselines._multivariate import learn_prior, noisy_effects
from scvi_cradle.metrics import average_treatment_effects

Split = tuple[ad.AnnData, ad.AnnData, NoisyEffects]


@lru_cache(maxsize=1)
def split(path: Path, seed: int) -> Split:
    adata = papalexi_cells(path, seed)
    cells = adata[adata.obs["split"] == "train"].copy()
    raw = average_treatment_effects(cells, "perturbation", control="NT")
    varies, effects = noisy_effects(raw)
    assert varies.all()
    return cells, raw, effects


def each(e: NoisyEffects) -> Sums:
    return Sums.create([[i] for i in range(e.raw.shape[1])])


def shrink(e: NoisyEffects, rank: int = 10) -> np.ndarray:
    return posterior(learn_prior(e, rank), e, each(e)).mean


def log_expression(cells: ad.AnnData) -> np.ndarray:
    x = cells.X.toarray()
    return np.log2(1 + 1e4 * x / np.maximum(x.sum(1, keepdims=True), 1))


# ---- priors ------------------------------------------------------------------------------------------------------------


def rounds(data: Split, n: int, rank: int, pseudo_genes: float) -> np.ndarray:
    e = data[2]
    start = FactorPrior.start(e, rank) if rank else FullPrior.start(e)
    prior = fit_prior(type(start)(*list(vars(start).values())[:-1], pseudo_genes), e, n)
    return posterior(prior, e, each(e)).mean


def scales(data: Split, values: tuple[float, ...]) -> np.ndarray:
    """Other scales in the mixture (any covariance)."""
    kept = mixture.SCALES
    mixture.SCALES = np.array(values)
    try:
        return shrink(data[2], 0)
    finally:
        mixture.SCALES = kept


def canonical(data: Split, names: tuple[str, ...], n_rounds: int = 20) -> np.ndarray:
    """Mixture of the estimated covariance with canonical ones (identity, common shift, single treatments), as in mash."""
    e = data[2]
    n = e.raw.shape[1]
    estimated = learn_prior(e, 0).covariance
    variances = np.diag(estimated)
    matrices = {
        "estimated": [estimated],
        "identity": [np.diag(variances)],
        "common": [np.outer(np.sqrt(variances), np.sqrt(variances)) + 1e-6 * np.diag(variances)],
        "single": [np.diag(np.where(np.arange(n) == i, variances, 1e-6 * variances)) for i in range(n)],
    }
    return fixed_mixture(e, [m for name in names for m in matrices[name]], n_rounds)


def two_covariances(data: Split, n_rounds: int = 20) -> np.ndarray:
    """Two estimated covariances, one for genes of small and one for genes of large scale."""
    e = data[2]
    first = FullPrior.start(e)
    responsibility = (e.raw**2 / (e.own + e.shared[:, None])).mean(1)
    large = responsibility > np.median(responsibility)
    covariances = []
    for genes in (large, ~large):
        part = NoisyEffects(e.raw[genes], e.own[genes], e.shared[genes])
        covariances.append(fit_prior(FullPrior(first.weights, FullPrior.start(part).covariance), part, 20).covariance)
    return fixed_mixture(e, covariances, n_rounds)


def fixed_mixture(e: NoisyEffects, covariances: list[np.ndarray], n_rounds: int) -> np.ndarray:
    """Estimate the weights of all scales of fixed covariances by EM, and return posterior means."""
    logs, means = [], []
    for covariance in covariances:
        prior = FullPrior(np.ones(len(SCALES)), covariance)
        basis, values, z, log_noise = mixture._diagonalize(covariance, e)
        gain, log_likelihood = prior._scales(values, z, log_noise)
        logs.append(log_likelihood)
        means.append((gain * z[:, None]) @ basis.swapaxes(1, 2))
    log_likelihood, mean = np.concatenate(logs, axis=1), np.concatenate(means, axis=1)
    weights = np.full(log_likelihood.shape[1], 1 / log_likelihood.shape[1])
    for _ in range(10 * n_rounds):
        joint = log_likelihood + np.log(np.maximum(weights, 1e-300))
        gamma = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
        weights = gamma.mean(0)
    return np.einsum("gk,gkt->tg", gamma, mean)


# ---- genes share -------------------------------------------------------------------------------------------------------


def gene_kernel(data: Split, share: float, *, correlated_noise: bool) -> np.ndarray:
    r"""Let co-expressed genes share effects: prior covariance of genes ``S^(1/2) (share C + (1 - share) I) S^(1/2)``.

    ``C``: correlation of genes over control cells; ``S``: expected scale of every gene under the mixture. With
    ``correlated_noise``, sampling errors of genes are correlated as in the controls.
    """
    cells, _, e = data
    prior = learn_prior(e, 0)
    _, values, z, log_noise = mixture._diagonalize(prior.covariance, e)
    _, joint = prior._scales(values, z, log_noise)
    scale = np.exp(joint - logsumexp(joint, axis=1, keepdims=True)) @ SCALES
    controls = log_expression(cells[cells.obs["perturbation"] == "NT"])
    correlation = np.corrcoef(controls.T)
    deviation = np.sqrt(scale)
    of_genes = deviation[:, None] * (share * correlation + (1 - share) * np.eye(len(scale))) * deviation
    n_genes, n_labels = e.raw.shape
    errors = np.sqrt(e.own)  # one variance per gene and label; correlations between genes from the controls
    like = correlation if correlated_noise else np.eye(n_genes)
    noise = np.zeros((n_genes, n_labels, n_genes, n_labels))
    for t in range(n_labels):
        noise[:, t, :, t] = errors[:, t][:, None] * like * errors[:, t]
    shared = np.sqrt(e.shared)[:, None] * like * np.sqrt(e.shared)
    noise += shared[:, None, :, None]
    size = n_genes * n_labels
    prior_matrix = np.einsum("gh,st->gsht", of_genes, prior.covariance).reshape(size, size)
    total = noise.reshape(size, size) + prior_matrix
    return (prior_matrix @ np.linalg.solve(total, e.raw.ravel())).reshape(n_genes, n_labels).T


# ---- raw effects -------------------------------------------------------------------------------------------------------


def adjusted(data: Split, covariates: str) -> np.ndarray:
    """Shrink effects of expression from which covariates were regressed out, with slopes of the control cells."""
    cells, raw, _ = data
    y, label = log_expression(cells), cells.obs["perturbation"].astype(str).to_numpy()
    control = label == "NT"
    if covariates == "batch":
        x = pd.get_dummies(cells.obs["bio_rep"], dtype=float).to_numpy()[:, 1:]
    else:
        x = np.log(cells.X.sum(1)).reshape(-1, 1)
        x = np.asarray(x)
        if covariates != "depth":
            centred = y - y[control].mean(0)
            axes = np.linalg.svd(centred[control], full_matrices=False)[2][: int(covariates.removeprefix("PC"))]
            x = centred @ axes.T
    x = x - x[control].mean(0)
    slope = np.linalg.lstsq(x[control], y[control] - y[control].mean(0), rcond=None)[0]
    y = y - x @ slope
    table = raw.copy()
    mean0, var0, n0 = y[control].mean(0), y[control].var(0, ddof=1), control.sum()
    table.var["control_sem"] = np.sqrt(var0 / n0)
    for i, name in enumerate(raw.obs_names):
        rows = label == name
        table.X[i] = y[rows].mean(0) - mean0
        table.layers["sem"][i] = np.sqrt(y[rows].var(0, ddof=1) / rows.sum() + var0 / n0)
    return shrink(noisy_effects(table)[1])


def pooled_counts(data: Split, share: float) -> np.ndarray:
    """Raw effects mixed with those of pooled counts (sum over cells), brought to the same slope per gene, then shrunk."""
    cells, _, e = data
    label = cells.obs["perturbation"].astype(str).to_numpy()
    names = ["NT", *sorted(set(label) - {"NT"})]
    x = cells.X.toarray()
    rate = np.stack([x[label == n].sum(0) / x[label == n].sum() for n in names])
    difference = np.log2(1 + 1e4 * rate)
    difference = (difference[1:] - difference[0]).T
    slope = (difference * e.raw).sum(1) / np.maximum((difference**2).sum(1), 1e-12)
    mixed = NoisyEffects((1 - share) * e.raw + share * slope[:, None] * difference, e.own, e.shared)
    return shrink(mixed)


# ---- noise -------------------------------------------------------------------------------------------------------------


def noise_scaled(data: Split, factor: float) -> np.ndarray:
    e = data[2]
    return shrink(NoisyEffects(e.raw, factor * e.own, factor * e.shared))


def pooled_variances(data: Split, weight: float) -> np.ndarray:
    """Average the variance of a label with that within all labels, which counts as ``weight`` cells."""
    raw = data[1]
    n = np.append(raw.obs["n_cells"].to_numpy(), raw.uns["n_control_cells"])[:, None]
    of_control = raw.var["control_sem"].to_numpy() ** 2
    variance = np.vstack([raw.layers["sem"] ** 2 - of_control, of_control]) * n
    within = ((n - 1) * variance).sum(0) / (n - 1).sum()
    pooled = (n * variance + weight * within) / (n + weight) / n
    return shrink(NoisyEffects(data[2].raw, np.ascontiguousarray(pooled[:-1].T), pooled[-1]))


def control_error_left_out(data: Split) -> np.ndarray:
    """Treat the error of the control as independent between labels."""
    e = data[2]
    return shrink(NoisyEffects(e.raw, e.own + e.shared[:, None], np.zeros_like(e.shared)))


def bagged(data: Split, ranks: tuple[int, ...]) -> np.ndarray:
    """Mean over numbers of factors."""
    return np.mean([shrink(data[2], rank) for rank in ranks], axis=0)


CEILING = "true effects (expected)"
TRIED = {
    "as released (10 factors)": lambda d: shrink(d[2]),
    "any covariance": lambda d: shrink(d[2], 0),
    "2 factors": lambda d: shrink(d[2], 2),
    "5 factors": lambda d: shrink(d[2], 5),
    "20 factors": lambda d: shrink(d[2], 20),
    "mean over 2, 5, 10, 20 factors": partial(bagged, ranks=(2, 5, 10, 20)),
    "5 rounds": partial(rounds, n=5, rank=10, pseudo_genes=1.0),
    "10 rounds": partial(rounds, n=10, rank=10, pseudo_genes=1.0),
    "60 rounds": partial(rounds, n=60, rank=10, pseudo_genes=1.0),
    "no pseudo-gene": partial(rounds, n=20, rank=10, pseudo_genes=0.0),
    "6 pseudo-genes": partial(rounds, n=20, rank=10, pseudo_genes=6.0),
    "one scale": partial(scales, values=(1.0,)),
    "scales .03 to 10": partial(scales, values=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
    "17 scales": partial(scales, values=tuple(np.logspace(-3, 1, 17))),
    "with identity": partial(canonical, names=("estimated", "identity")),
    "with identity and common shift": partial(canonical, names=("estimated", "identity", "common")),
    "with all canonical covariances": partial(canonical, names=("estimated", "identity", "common", "single")),
    "two covariances": two_covariances,
    "variances pooled, 200 cells": partial(pooled_variances, weight=200),
    "variances pooled, 1,000 cells": partial(pooled_variances, weight=1000),
    "independent control errors": control_error_left_out,
    "noise x .8": partial(noise_scaled, factor=0.8),
    "noise x 1.25": partial(noise_scaled, factor=1.25),
    "depth regressed out": partial(adjusted, covariates="depth"),
    "replicate regressed out": partial(adjusted, covariates="batch"),
    "3 PCs regressed out": partial(adjusted, covariates="PC3"),
    "half pooled counts": partial(pooled_counts, share=0.5),
    "pooled counts": partial(pooled_counts, share=1.0),
    "noise correlated over genes": partial(gene_kernel, share=0.0, correlated_noise=True),
    "gene kernel .3": partial(gene_kernel, share=0.3, correlated_noise=False),
    "gene kernel .3, correlated noise": partial(gene_kernel, share=0.3, correlated_noise=True),
    "gene kernel 0 (one Gaussian)": partial(gene_kernel, share=0.0, correlated_noise=False),
}


def ceiling(adata: ad.AnnData) -> dict[str, float]:
    """Return the correlation that the known true effects would have, from the sampling errors of the held-out cells."""
    test = adata[adata.obs["split"] == "test"].copy()
    held_out = average_treatment_effects(test, "perturbation", control="NT")
    effects, errors = np.asarray(held_out.X), held_out.layers["sem"] ** 2
    by_label = 1 - errors.mean(1) / effects.var(1)
    flat = 1 - errors.mean() / effects.var()
    return {"flat": float(np.sqrt(flat)), "each": float(np.sqrt(np.maximum(by_label, 0)).mean())}


def run(path: Path, name: str, seed: int) -> dict[str, float]:
    if name == CEILING:
        return ceiling(papalexi_cells(path, seed))
    data = split(path, seed)
    effects = data[1].copy()
    effects.X = TRIED[name](data)
    return papalexi_scores(papalexi_cells(path, seed), effects)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="papalexi.h5ad")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[*TRIED, CEILING], help="names of estimators")
    parser.add_argument("--out", type=Path, default=Path("search.csv"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    run_missing(
        (
            ({"model": name, "seed": seed}, partial(run, arguments.data, name, seed))
            for seed in arguments.seeds
            for name in arguments.only
        ),
        arguments.out,
    )


if __name__ == "__main__":
    main()
