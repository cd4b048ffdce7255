"""Time average treatment effects against the published computation, at equal particles and at equal Monte-Carlo error.

    python benchmarks/_effects_speed.py [--quick]

Equal particles: 1,187 genes, 722 treatments, the sizes and the posterior of the paper (latent 200, hidden 400, ``q(e | m)`` a
network), random weights, 2,500 particles. One thread, CPU time, rounds of both sides in turn. The published side draws a block
of 500 particles and computes two treatments of it; ours computes some labels at 2,500 particles, and one whole call for all of
them unless ``--quick``. The totals for 722 treatments are extrapolated from these: the published one from 5 blocks and 723
treatments of each, ours from the time per label, the control counted as one, and the time of the table.

Equal error: a model of simulated cells, trained with recommended settings for its default number of steps. Variances of the
estimated effects over repeated calls, times the particles of a call, summed over genes; their ratio (median over treatments)
times the ratio of times of that model at equal particles is the speed at equal error.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch
from _plain_effects import BLOCK, PlainEffects
from anndata import AnnData

from scvi_cradle import CradleVAE, datasets

GENES, TREATMENTS, PARTICLES = 1187, 722, 2500
TINY = {"max_steps": 1, "batch_size": 64, "enable_progress_bar": False}


def timed(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def screen() -> AnnData:
    """Return three cells of every label: enough to register labels and library sizes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["control", *(f"G{i:03d}" for i in range(TREATMENTS))], 3)
    library = rng.lognormal(math.log(8000), 0.4, (len(labels), 1))
    counts = rng.poisson(rng.gamma(1.0, rng.dirichlet(np.full(GENES, 0.5)) * library)).astype(np.float32)
    obs = pd.DataFrame({"label": labels, "failed": rng.random(len(labels)) < 0.15})
    return AnnData(sp.csr_matrix(counts), obs=obs.set_axis(obs.index.astype(str)))


def random_model() -> CradleVAE:
    """Return a model of the paper's sizes with random masks and dispersions."""
    adata = screen()
    CradleVAE.setup_anndata(adata, perturbation_key="label", artifact_key="failed")
    model = CradleVAE(adata, preset="paper")
    model.train(**TINY)
    torch.manual_seed(0)
    with torch.no_grad():
        model.module.effects.mask.logits.normal_()
        model.module.decoder.likelihood.log_theta.normal_()
    return model


def trained_model(*, quick: bool) -> CradleVAE:
    """Return a model of simulated cells, trained with the recommended settings."""
    size = {"n_cells": 3000, "n_genes": 300} if quick else {"n_cells": 10_000, "n_genes": GENES}
    adata = datasets.simulate_perturbseq(**size, n_perturbations=20, n_combinations=0, seed=0)
    CradleVAE.setup_anndata(adata, perturbation_key="perturbation", artifact_key="true_artifact")
    model = CradleVAE(adata)
    model.train(enable_progress_bar=False)
    return model


def check(model: CradleVAE, treatments: list[int], *, n_blocks: int = 2, tolerance: float = 0.02) -> float:
    """Return the largest difference of the two sides in standard errors; raise if they do not estimate the same.

    ``tolerance`` (log2 units) is for ``x / L`` in the place of ``x / sum(x)`` and for eight library sizes.
    """
    plain, error = PlainEffects(model, seed=0).effects(treatments, n_blocks)
    labels = [model._table.treatments[t] for t in treatments]
    ours = model.get_average_treatment_effects(labels, n_particles=2000, seed=0)
    error = np.sqrt(error**2 + ours.layers["std"] ** 2 / 2000)
    largest = float(np.maximum((np.abs(ours.X - plain) - tolerance) / error, 0).max())
    if largest > 5:
        msg = f"The two sides do not estimate the same effects: they differ by {largest:.1f} standard errors."
        raise RuntimeError(msg)
    return largest


def time_equal_particles(model: CradleVAE, *, rounds: int, n_labels: int, n_treatments: int) -> dict[str, float]:
    """Return CPU seconds of both sides for all treatments and their ratios per round."""
    plain, labels = PlainEffects(model, seed=1), list(model._table.treatments[:n_labels])
    kept: list[Any] = []
    treatments = [i % model.module.n_treatments for i in range(n_treatments)]

    def draw() -> None:
        kept[:] = [torch.inference_mode()(plain.draw_globals)(BLOCK)]

    def ours(particles: int = PARTICLES) -> Any:
        return model.get_average_treatment_effects(labels, n_particles=particles, seed=0)

    draw()
    plain.block(treatments, BLOCK, kept[0])  # both sides once without being timed
    ours(BLOCK)
    all_labels, found = model.module.n_treatments + 1, []
    for _ in range(rounds):
        once, each = timed(draw), timed(lambda: plain.block(treatments, BLOCK, kept[0])) / n_treatments
        model._table_kept = None
        with_table = timed(lambda: ours(1))
        table = with_table - timed(lambda: ours(1))
        mine = timed(ours) / (n_labels + 1)
        found.append((PARTICLES / BLOCK * (once + all_labels * each), max(table, 0.0) + all_labels * mine, table))
    published, here, table = (statistics.median(x) for x in zip(*found, strict=True))
    ratios = [p / h for p, h, _ in found]
    return {
        "published_s": published,
        "ours_s": here,
        "table_s": table,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def variance_ratio(model: CradleVAE, *, repeats: int) -> dict[str, float]:
    """Return how many times the variance of an effect per particle is larger on the published side."""
    treatments = list(range(model.module.n_treatments))
    plain = PlainEffects(model, seed=2)
    published = np.stack([plain.effects(treatments)[0] for _ in range(repeats)])
    ours = np.stack([model.get_average_treatment_effects(n_particles=BLOCK, seed=i).X for i in range(repeats)])
    variances = [x.var(0, ddof=1) for x in (published, ours)]
    trace = variances[0].sum(1) / variances[1].sum(1)
    return {"trace": float(np.median(trace)), "min": float(trace.min()), "max": float(trace.max())}


def measure_effects(*, quick: bool) -> dict[str, Any]:
    """Return ``effects_S`` (ratio at equal particles), ``effects_S_equal_error``, and what they are made of."""
    torch.set_num_threads(1)
    scvi.settings.seed = 0
    model = random_model()
    result: dict[str, Any] = {"difference": check(model, [0, 1], n_blocks=1 if quick else 4)}
    counts = (
        {"rounds": 3, "n_labels": 12, "n_treatments": 2} if quick else {"rounds": 5, "n_labels": 24, "n_treatments": 4}
    )
    result |= time_equal_particles(model, **counts)
    if not quick:
        result["ours_whole_call_s"] = timed(lambda: model.get_average_treatment_effects(n_particles=PARTICLES, seed=0))
    trained = trained_model(quick=quick)
    result["difference_trained"] = check(trained, [0, 1, 2])
    result["trained"] = time_equal_particles(trained, rounds=3, n_labels=20, n_treatments=4)
    result["variance"] = variance_ratio(trained, repeats=12 if quick else 30)
    result["effects_S"] = result["ratio"]
    result["effects_S_equal_error"] = result["trained"]["ratio"] * result["variance"]["trace"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = measure_effects(quick=parser.parse_args().quick)
    trained, variance = found["trained"], found["variance"]
    print(f"\n{GENES} genes, {TREATMENTS} treatments, {PARTICLES} particles, one thread, torch {torch.__version__}\n")
    print("| | published, CPU s | here, CPU s | ratio, median (min..max) |\n|---|---|---|---|")
    for name, row in (("paper's sizes, random weights", found), ("trained model, recommended settings", trained)):
        spread = f"{row['ratio']:.1f} ({row['ratio_min']:.1f}..{row['ratio_max']:.1f})"
        print(
            f"| {name} | {row['published_s']:.1f} | {row['ours_s']:.1f}, of it the table {row['table_s']:.2f} | {spread} |"
        )
    if "ours_whole_call_s" in found:
        print(f"\nall {TREATMENTS} treatments in one call, not extrapolated: {found['ours_whole_call_s']:.1f} s")
    print(
        f"\nvariance per particle, published over here: {variance['trace']:.0f} ({variance['min']:.0f}..{variance['max']:.0f})"
    )
    print(f"speed at equal error: {found['effects_S_equal_error']:.0f}")
    print(f"largest difference: {found['difference']:.1f}, {found['difference_trained']:.1f} standard errors")


if __name__ == "__main__":
    main()
