"""Single runs of the studies of `sams_study.py`: every function fits one model and returns one row of scores."""

from __future__ import annotations

import math
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scvi
from cradle_study import correlations

import scvi_cradle as cradle

N_LATENT = 50  # the size at which the tables were made; by default it follows the data (scaling_study.py)
N_PARTICLES = 100  # of IWELBO
N_SCORED = 1500  # held-out cells of IWELBO, at most
UNCHECKED = {"check_val_every_n_epoch": 10_000}  # no validation during training: the budget of steps is fixed
LOGIT_PER_CELL = -9 / 50 * math.log(10)  # log-odds of 10 ** (-9 / 50 n), per n
SPARSITY_MODEL: dict[str, Any] = {
    "likelihood": "gaussian",
    "mask_init_logits": 2.0,
    "embedding_prior_scale": 10.0,
    "n_latent": 15,
    "n_hidden": 100,
    "n_layers_encoder": 2,
    "n_layers_decoder": 2,
    "combine": "sum",
    "effect_path": "decoder",
}
PUBLISHED_DECODER = {"combine": "sum", "effect_path": "decoder"}
PAPALEXI_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "CradleVAE": ("CradleVAE", {}),
    "SAMSVAE": ("SAMSVAE", {}),
    "CPAVAE": ("CPAVAE", {}),
    "ConditionalVAE": ("ConditionalVAE", {}),
    "SVAEPlus": ("SVAEPlus", {}),
    "SVAEPlus (lopez)": ("SVAEPlus", {"variant": "lopez"}),
}
FLAG_MODELS = ("SAMSVAE (passed cells)", "SAMSVAE (flag as covariate)")


def fit(model: Any, seed: int, **train: Any) -> float:
    """Train and return the CPU seconds."""
    scvi.settings.seed = seed
    start = time.process_time()
    model.train(split_key="split", enable_progress_bar=False, **(UNCHECKED | train))
    return time.process_time() - start


def iwelbo(model: Any, adata: ad.AnnData, cells: np.ndarray) -> float:
    """Return the mean bound of at most ``N_SCORED`` of the held-out cells, the same ones for every model."""
    chosen = np.sort(np.random.default_rng(0).permutation(cells)[:N_SCORED])
    scvi.settings.seed = 0
    return float(
        model.get_iwelbo(adata, indices=chosen, n_particles=N_PARTICLES, batch_size=500).mean(dtype=np.float64)
    )


# ---- masks: SAMS-VAE, appendix A.5 -----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def latent_shifts(n: int, seed: int) -> ad.AnnData:
    return cradle.datasets.simulate_sams(n_samples_per_treatment=n, seed=seed)


def sparsity(n: int, rule: str, seed: int, *, schedule: str) -> dict[str, float]:
    """Fit SAMSVAE in ``"rounds x steps"``, each from fresh masks and with other draws, and compare with the truth."""
    rounds, steps = map(int, schedule.split(" x "))
    adata = latent_shifts(n, seed).copy()
    logit = LOGIT_PER_CELL * n if rule == "fixed sparsity" else math.log(0.1 / 0.9)
    cradle.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation")
    scvi.settings.seed = seed
    model = cradle.SAMSVAE(adata, mask_prior_logit=logit, **SPARSITY_MODEL)
    seconds = 0.0
    for i in range(rounds):
        if i:
            model.reset_masks()
        seconds += fit(model, seed + 1000 * i, max_steps=steps, batch_size=256, lr=1e-2)
    truth, inferred = adata.uns["truth"], model.get_perturbation_effects()
    labels = list(truth["effects"].index)
    effects = model.get_average_treatment_effects(labels, method="mean", seed=seed)
    flat, _ = correlations(truth["effects"].to_numpy(), np.asarray(effects.X), list(range(len(labels))))
    return {
        "density": float((inferred.layers["mask_prob"] > 0.5).mean()),
        **cradle.metrics.mask_f1(truth["mask"], inferred),
        "effects, flat": flat,
        "IWELBO": iwelbo(model, adata, np.flatnonzero(adata.obs["split"] == "test")),
        "CPU s": seconds,
    }


# ---- posteriors: SAMS-VAE, table 1 -----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def screen(seed: int, n_cells: int, n_genes: int, n_perturbations: int) -> ad.AnnData:
    return cradle.datasets.simulate_perturbseq(
        n_cells=n_cells,
        n_genes=n_genes,
        n_perturbations=n_perturbations,
        n_combinations=0,
        artifact_fraction=0.0,
        seed=seed,
    )


def inference(
    name: str,
    posterior: str,
    decoder: str,
    seed: int,
    *,
    n_cells: int = 12_000,
    n_genes: int = 300,
    n_perturbations: int = 100,
    train: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Fit SAMSVAE or CPAVAE with one family of posteriors, everything else alike."""
    adata = screen(seed, n_cells, n_genes, n_perturbations).copy()
    cls = getattr(cradle, name)
    cls.setup_anndata(adata, perturbation_key="perturbation")
    scvi.settings.seed = seed
    model = cls(
        adata, posterior=posterior, n_latent=N_LATENT, **(PUBLISHED_DECODER if decoder == "sum, decoder" else {})
    )
    seconds = fit(model, seed, **(train or {}))
    population = adata.uns["truth"]["population_effects"]
    labels = list(population.index)
    test = np.flatnonzero(adata.obs["split"] == "test")
    held_out = cradle.metrics.average_treatment_effects(adata[test].copy(), "perturbation")
    predicted = np.asarray(model.get_average_treatment_effects(labels, seed=seed).X)
    row = {"IWELBO": iwelbo(model, adata, test)}
    for which, truth in (("truth", population.to_numpy()), ("test cells", np.asarray(held_out[labels].X))):
        row[f"{which}, flat"], row[f"{which}, each"] = correlations(truth, predicted, list(range(len(labels))))
    if name == "SAMSVAE":
        row["mask density"] = float((model.get_perturbation_effects().layers["mask_prob"] > 0.5).mean())
    return row | {"KL z_b": model.diagnostics_["kl_basal"], "steps": model.trainer.global_step, "CPU s": seconds}


# ---- papalexi --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def papalexi_cells(path: Path, seed: int) -> ad.AnnData:
    """Return papalexi with the splits and the QC of `cradle_study.py`."""
    adata = ad.read_h5ad(path)
    rng = np.random.default_rng(seed)
    test = np.zeros(adata.n_obs, dtype=bool)
    for rows in adata.obs.groupby("perturbation", observed=True).indices.values():
        test[rng.choice(rows, round(0.2 * len(rows)), replace=False)] = True
    adata.obs["split"] = np.where(test, "test", "train")
    cradle.pp.qc_label(adata, n_mads=2, criteria=("total_counts", "n_genes", "pct_mt"), reference=~test)
    adata.obs["failed"] = adata.obs["artifact"].astype(str).astype("category")
    return adata


def papalexi_scores(adata: ad.AnnData, effects: ad.AnnData) -> dict[str, float]:
    """Compare effects with those of the held-out cells."""
    test = (adata.obs["split"] == "test").to_numpy()
    held_out = cradle.metrics.average_treatment_effects(adata[test].copy(), "perturbation", control="NT")
    labels = list(held_out.obs_names)
    flat, each = correlations(np.asarray(held_out.X), np.asarray(effects[labels].X), list(range(len(labels))))
    return {"flat": flat, "each": each, "Jaccard 50": cradle.metrics.jaccard_top_k(held_out, effects[labels], k=50)}


def papalexi_baseline(path: Path, name: str, seed: int) -> dict[str, float]:
    adata = papalexi_cells(path, seed)
    training = adata[adata.obs["split"] == "train"].copy()
    labels = sorted(set(adata.obs["perturbation"]) - {"NT"})
    if name == "replicate (halves of all cells)":
        ceiling = cradle.metrics.replicate_ceiling(adata, "perturbation", control="NT", seed=seed)["mean"]
        return {
            "flat": ceiling["ate_pearson"],
            "each": ceiling["pearson_delta"],
            "Jaccard 50": ceiling["jaccard_top_50"],
        }
    baseline = getattr(cradle.baselines, name)()
    baseline.fit(training, "perturbation", control="NT")
    return papalexi_scores(adata, baseline.get_average_treatment_effects(labels))


def papalexi(path: Path, name: str, preset: str, seed: int, *, max_steps: int | None) -> dict[str, float]:
    """Fit one model with the recommended settings or the paper's, the latter for ``max_steps`` steps."""
    full = papalexi_cells(path, seed)
    test = np.flatnonzero(full.obs["split"] == "test")
    adata, setup = full, {}
    if name == "SAMSVAE (passed cells)":
        adata = full[~(full.obs["artifact"] & (full.obs["split"] == "train"))].copy()
    elif name == "SAMSVAE (flag as covariate)":
        setup["categorical_covariate_keys"] = ["failed"]
    elif name == "CradleVAE":
        setup["artifact_key"] = "artifact"
    kind, settings = PAPALEXI_MODELS.get(name, ("SAMSVAE", {}))
    adata = adata.copy()
    cls = getattr(cradle, kind)
    cls.setup_anndata(adata, perturbation_key="perturbation", control="NT", **setup)
    scvi.settings.seed = seed
    size = {"n_latent": N_LATENT} if preset == "recommended" else {}
    model = cls(adata, preset=preset, **size, **settings)
    seconds = fit(model, seed, **({"max_steps": max_steps} if preset == "paper" else {}))
    labels = sorted(set(full.obs["perturbation"]) - {"NT"})
    effects = model.get_average_treatment_effects(labels, seed=seed)
    row = papalexi_scores(full, effects) | {"IWELBO": iwelbo(model, full, test)}
    return row | {"KL z_b": model.diagnostics_["kl_basal"], "steps": model.trainer.global_step, "CPU s": seconds}
