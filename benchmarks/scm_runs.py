"""Single runs of ``scm_study.py``: simulation, training, comparison with the truth."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from scvi_cradle import SAMSVAE, PerturbedVAE, datasets
from scvi_cradle._matrix import log_normalize
from scvi_cradle.metrics import block_r2, linear_probe, mean_correlation_coefficient

FIXED: dict[str, Any] = {
    "preset": "paper",
    "n_layers": 2,
    "mechanism": "mlp",
    "noise_scale": "learned",
    "lambda_bound": None,
    "likelihood": "mse",
    "align_stop_grad": None,
    "sample_latents": True,
}
PLAN = {"lr_schedule": "constant", "effect_lr_scale": 1.0, "weight_decay": 0.0}
TRAINER = {"gradient_clip_val": None, "accelerator": "cpu", "enable_progress_bar": False, "logger": False}
LONG = {"lr": 1e-4, "batch_size": 64, "max_epochs": 100}  # the paper's
SHORT = {"lr": 2e-3, "batch_size": 128, "max_epochs": 30}  # a seventh of the steps, for the ablations
CAPACITIES = ((1, 10), (2, 9), (4, 7), (6, 5), (8, 3), (10, 1))
ALIGNED = (("none", "none", 0.0), ("l2", "random", 0.05), ("l2", "shared", 0.05))
THRESHOLD = 0.25
SCORES = ("mcc", "r2_nu", "r2_iota", "leak", "both_nu", "both_iota")
STABILITY = (
    "program_correlation",
    *(f"{name}_{t}" for t in (0.25, 0.1) for name in ("edges", "stable", "stable_undirected")),
)
COLUMNS = (*SCORES, "kl_responsive", "kl_invariant", "cpu_seconds")
GRAPH = ("n_edges", "n_true", "n_right", "n_undirected", "n_strongest_right", "n_strongest_undirected", "auc")


class Config(NamedTuple):
    """One run: the key of its row."""

    study: str
    seed: int
    training_seed: int = 0
    alignment: str = "l2"
    pairing: str = "shared"
    weight: float = 0.05
    kl_weight: float = 1e-3
    n_responsive: int = 4
    n_invariant: int = 7
    length: str = "long"


KEYS = Config._fields


def configs(study: str, seed: int) -> Iterator[Config]:
    """Yield the runs of a study on the data of one seed."""
    if study == "identifiability":
        for alignment, pairing, weight in ALIGNED:
            yield Config(study, seed, alignment=alignment, pairing=pairing, weight=weight)
    elif study == "stability":
        for training_seed in (0, 1, 2):
            yield Config(study, seed, training_seed, length="short")
    elif study == "alignment":
        for kl_weight in (1e-3, 1e-2):
            common = {"kl_weight": kl_weight, "length": "short"}
            yield Config(study, seed, alignment="none", pairing="none", weight=0.0, **common)
            for pairing in ("shared", "random"):
                for weight in (0.005, 0.05, 0.5):
                    yield Config(study, seed, pairing=pairing, weight=weight, **common)
        if seed == 0:
            yield Config(study, seed, alignment="mmd", pairing="random", weight=10.0, length="short")
    elif study == "capacity":
        for sizes in CAPACITIES:
            for alignment, pairing, weight in (ALIGNED[0], ALIGNED[2]):
                yield Config(study, seed, 0, alignment, pairing, weight, 1e-3, *sizes, "short")


def train(adata: AnnData, config: Config) -> PerturbedVAE:
    scvi.settings.seed = config.training_seed
    shared = config.pairing == "shared"
    model = PerturbedVAE(
        adata,
        **FIXED,
        n_latent_responsive=config.n_responsive,
        n_latent_invariant=config.n_invariant,
        n_hidden=128,
        kl_weight_responsive=config.kl_weight,
        kl_weight_invariant=config.kl_weight,
        alignment=config.alignment,
        alignment_weight=config.weight,
        control_pairing="random" if config.pairing == "none" else config.pairing,
        control_partner_key="control_partner" if shared else None,
    )
    length = LONG if config.length == "long" else SHORT
    warmups = {
        name: (start * length["max_epochs"], 0.5 * length["max_epochs"])
        for name, start in (("n_epochs_kl_warmup", 0.1), ("n_epochs_align_warmup", 0.05))
    }
    model.train(split_key="split", **length, plan_kwargs=PLAN | warmups, **TRAINER)
    return model


def recovery(adata: AnnData, responsive: np.ndarray, invariant: np.ndarray) -> dict[str, float]:
    """Compare estimated blocks with the true ones; returns ``SCORES``."""
    train, test = ((adata.obs["split"] == part).to_numpy() for part in ("train", "test"))
    nu, iota = adata.obsm["z_responsive"], adata.obsm["z_invariant"]
    both = np.hstack([responsive, invariant])
    pairs = {
        "r2_nu": (responsive, nu),
        "r2_iota": (invariant, iota),
        "leak": (invariant, nu),
        "both_nu": (both, nu),
        "both_iota": (both, iota),
    }
    scores = {name: block_r2(z[train], truth[train], z[test], truth[test]) for name, (z, truth) in pairs.items()}
    return {"mcc": mean_correlation_coefficient(responsive[test], nu[test])} | scores


def graph_recovery(adata: AnnData, model: PerturbedVAE, responsive: np.ndarray) -> dict[str, float]:
    """Compare the edges of the graph with the true ones, programs matched by correlation; returns ``GRAPH``.

    The scale of a latent is not identified, so a second reading takes strengths in units of the standard deviations of
    the programs: ``n_strongest_...`` counts right edges among as many strongest ones as there are true edges, and ``auc``
    ranks the pairs of programs, joined ones before others; it is missing where all pairs are joined.
    """
    test = (adata.obs["split"] == "test").to_numpy()
    mask = adata.uns["truth"]["mask"].to_numpy()
    n = len(mask)
    size = np.abs(np.corrcoef(adata.obsm["z_responsive"][test].T, responsive[test].T)[:n, n:])
    match = linear_sum_assignment(size, maximize=True)[1]  # program of every true latent
    strength = np.zeros_like(mask, dtype=float)  # effect x cause
    names = {f"program_{m + 1:02d}": i for i, m in enumerate(match)}
    for source, target, weight in model.get_causal_graph(threshold=0.0).edges(data="strength"):
        strength[names[target], names[source]] = weight
    edges, joined = strength > THRESHOLD, mask | mask.T
    spread = responsive[test].std(0)[match]
    scaled = strength * spread[None] / spread[:, None]
    upper = np.triu_indices(n, 1)
    strongest = np.argsort(-scaled.ravel(), kind="stable")[: mask.sum()]
    return {
        "n_edges": int(edges.sum()),
        "n_true": int(mask.sum()),
        "n_right": int((edges & mask).sum()),
        "n_undirected": int((edges & joined).sum()),
        "n_strongest_right": int(mask.ravel()[strongest].sum()),
        "n_strongest_undirected": int(joined.ravel()[strongest].sum()),
        "auc": roc_auc_score(joined[upper], (scaled + scaled.T)[upper]) if not joined[upper].all() else np.nan,
    }


def references(seed: int, adata: AnnData) -> Iterator[dict[str, Any]]:
    """Yield what needs no model: the true latents, linear regression on the genes, and 11 principal components."""
    scaled = PCA(11, random_state=0).fit(adata.X[(adata.obs["split"] == "train").to_numpy()]).transform(adata.X)
    for name, blocks in (
        ("true latents", (adata.obsm["z_responsive"], adata.obsm["z_invariant"])),
        ("all genes (regression)", (adata.X, adata.X)),
        ("11 principal components", (scaled, scaled)),
    ):
        key = Config("reference", seed, alignment=name, pairing="-", weight=0.0, kl_weight=0.0, length="-")
        yield key._asdict() | recovery(adata, *blocks)


def scm_rows(study: str, seed: int, options: argparse.Namespace, done: set[tuple[str, ...]]) -> Iterator[dict]:
    """Yield a row for every run that is not done."""
    missing = [c for c in configs(study, seed) if tuple(map(str, c)) not in done]
    if not missing:
        return
    adata = datasets.simulate_scm(seed=seed)
    PerturbedVAE.setup_anndata(adata, perturbation_key="perturbation")
    if study == "identifiability":
        yield from (r for r in references(seed, adata) if tuple(str(r[k]) for k in KEYS) not in done)
    for config in missing:
        yield config._asdict() | scm_scores(adata, *load_or_train(adata, config, options.models))


def scm_scores(adata: AnnData, model: PerturbedVAE, seconds: float) -> dict[str, float]:
    responsive, invariant = (model.get_latent_representation(component=c) for c in ("responsive", "invariant"))
    scores = recovery(adata, responsive, invariant)
    scores |= {name: model.diagnostics_[name] for name in ("kl_responsive", "kl_invariant")}
    if responsive.shape[1] == adata.obsm["z_responsive"].shape[1]:
        scores |= graph_recovery(adata, model, responsive)
    return scores | {"cpu_seconds": seconds}


def stability_rows(seed: int, options: argparse.Namespace, done: set[tuple[str, ...]]) -> Iterator[dict]:
    """Yield rows of models of the same data with three seeds of training, compared with each other."""
    runs = list(configs("stability", seed))
    if all(tuple(map(str, c)) in done for c in runs):
        return
    adata = datasets.simulate_scm(seed=seed)
    PerturbedVAE.setup_anndata(adata, perturbation_key="perturbation")
    fitted = [load_or_train(adata, config, options.models) for config in runs]
    for config, (model, seconds) in zip(runs, fitted, strict=True):
        row = config._asdict() | scm_scores(adata, model, seconds)
        others = [other for other, _ in fitted if other is not model]
        for threshold in (THRESHOLD, 0.1):
            table = model.get_edge_stability(others, threshold=threshold)
            row |= {f"edges_{threshold}": len(table), f"stable_{threshold}": table["stability"].mean()}
            row |= {f"stable_undirected_{threshold}": table["stability_undirected"].mean()}
        yield row | {"program_correlation": np.mean(list(table.attrs["program_correlation"].values()))}


def load_or_train(adata: AnnData, config: Config, folder: Path | None) -> tuple[PerturbedVAE, float]:
    path = folder / "_".join(map(str, config[1:])) if folder is not None else None
    if path is not None and path.exists():
        return PerturbedVAE.load(path, adata), np.nan
    start = time.process_time()
    model = train(adata, config)
    seconds = time.process_time() - start
    if path is not None:
        model.save(path)
    return model, seconds


def probe_rows(seed: int, options: argparse.Namespace, done: set[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    """Yield accuracies of linear classifiers of perturbations on the test cells of a simulated screen."""
    if ("probe", str(seed)) in done:
        return
    counts = datasets.simulate_perturbseq(
        n_cells=6000, n_genes=500, n_perturbations=20, n_combinations=0, artifact_fraction=0.0, seed=seed
    )
    adata = AnnData(log_normalize(counts.X).astype(np.float32), obs=counts.obs[["perturbation", "split"]])
    adata.var_names = counts.var_names
    test = np.flatnonzero(adata.obs["split"] == "test")
    PerturbedVAE.setup_anndata(adata, perturbation_key="perturbation")
    rows = []
    for kl_weight, alignment, weight in ((1e-3, "l2", 0.05), (1e-2, "l2", 0.05), (1e-3, "none", 0.0)):
        scvi.settings.seed = seed
        model = PerturbedVAE(
            adata,
            **FIXED,
            n_latent_responsive=20,
            n_latent_invariant=85,
            n_hidden=256,
            kl_weight_responsive=kl_weight,
            kl_weight_invariant=kl_weight,
            alignment=alignment,
            alignment_weight=weight,
            control_pairing="random",
        )
        warmups = {"n_epochs_kl_warmup": (3, 15), "n_epochs_align_warmup": (1.5, 15)}
        model.train(split_key="split", lr=1e-3, batch_size=128, max_epochs=30, plan_kwargs=PLAN | warmups, **TRAINER)
        name = f"PerturbedVAE, {'no alignment' if alignment == 'none' else 'random pairs'}, KL weight {kl_weight:g}"
        table = model.get_perturbation_leakage(indices=test, seed=seed)
        kls = {k: model.diagnostics_[k] for k in ("kl_responsive", "kl_invariant")}
        for part, scores in table.iterrows():
            rows.append(
                {"representation": "expression, 50 principal components" if part == "expression" else f"{name}: {part}"}
            )
            rows[-1] |= scores.to_dict() | ({} if part == "expression" else kls)
    SAMSVAE.setup_anndata(counts, perturbation_key="perturbation")
    scvi.settings.seed = seed
    model = SAMSVAE(counts, preset="recommended")
    model.train(split_key="split", accelerator="cpu", enable_progress_bar=False, logger=False)
    basal = model.get_latent_representation(indices=test, component="basal")
    scores = linear_probe(basal, adata.obs["perturbation"].to_numpy()[test], seed=seed)
    rows.append({"representation": "SAMSVAE: basal"} | scores)
    yield from (
        {"study": "probe", "seed": seed} | row
        for row in pd.DataFrame(rows).drop_duplicates("representation").to_dict("records")
    )
