"""Clean cells of the simulated screen: genes, cell states, perturbation effects and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from scipy.special import ndtri

from scvi_cradle._constants import COUNTS_PER_CELL

if TYPE_CHECKING:
    import pandas as pd

N_PROGRAMMES = 6
BLOCK_SIZE = 2048
GENE_TYPES = ("mitochondrial", "ribosomal", "haemoglobin", "target", "other")
_MITOCHONDRIAL = ("ND1", "ND2", "CO1", "CO2", "ATP8", "ATP6", "CO3", "ND3", "ND4L", "ND4", "ND5", "ND6", "CYB")
_HAEMOGLOBIN = ("HBB", "HBA1", "HBA2", "HBD", "HBG1", "HBG2")
_FAMILIES = ("TMEM", "ZNF", "CCDC", "FAM", "SLC", "LRRC", "KLHL", "RBM", "CDK", "PSM", "EIF", "HSPA")
_GROUP_SHARE = {"mitochondrial": 0.06, "ribosomal": 0.18, "haemoglobin": 0.006}
_GROUP_SPREAD = {"mitochondrial": 0.7, "ribosomal": 0.5, "haemoglobin": 0.6, "target": 0.4, "other": 3.6}
_GROUP_CELL_SD = {"mitochondrial": 0.16, "ribosomal": 0.08, "haemoglobin": 0.2}
_LIBRARY_SD = 0.2


@dataclass(frozen=True)
class Genes:
    """Parameters of the genes.

    Parameters
    ----------
    names, types
        Symbols and their :data:`GENE_TYPES`, shape ``(n_genes,)``.
    log_share
        Log of the share of the counts in an average cell, shape ``(n_genes,)``.
    dispersion
        Inverse dispersion theta of the negative binomial: variance mu + mu²/theta.
    loadings
        Change of the log-rates per unit of every axis of the cell state, shape ``(n_axes, n_genes)``;
        the axes are programmes, cosine and sine of the cell cycle, three gene-group factors, batches.
    batch_depth
        Log factor on the library size of every batch.
    library
        Median library size.
    """

    names: np.ndarray
    types: np.ndarray
    log_share: np.ndarray
    dispersion: np.ndarray
    loadings: np.ndarray
    batch_depth: np.ndarray
    library: float


def regulated_genes(types: np.ndarray, log_share: np.ndarray) -> np.ndarray:
    """Return the positions of the genes that programmes and perturbations may change.

    Mitochondrial, ribosomal and haemoglobin genes are left out, and genes of more than five times the average share:
    with them a single gene could move the total counts of a label.
    """
    ordinary = np.isin(types, ("target", "other"))
    return np.flatnonzero(ordinary & (log_share < np.log(5 / len(types))))


def gene_names(n_genes: int, targets: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return unique gene names and their types; the same for every seed."""
    n_mt = int(np.clip(n_genes // 20, 3, 13))
    n_ribo = int(np.clip(n_genes // 12, 4, 56))
    n_hb = int(np.clip(n_genes // 40, 2, 6))
    ribosomal = [f"RP{'LS'[i % 2]}{i // 2 + 3}" for i in range(n_ribo)]
    n_other = n_genes - n_mt - n_ribo - n_hb - len(targets)
    other = ["HBEGF"] + [f"{_FAMILIES[i % 12]}{i // 12 + 1}" for i in range(n_other - 1)]
    groups = ([f"MT-{m}" for m in _MITOCHONDRIAL[:n_mt]], ribosomal, list(_HAEMOGLOBIN[:n_hb]), targets, other)
    names = np.array([name for group in groups for name in group], dtype=str)
    types = np.repeat(np.array(GENE_TYPES), [len(group) for group in groups])
    return names, types


def draw_genes(rng: np.random.Generator, n_genes: int, targets: list[str], n_batches: int) -> Genes:
    """Draw baseline expression, dispersions and the loadings of the cell state."""
    names, types = gene_names(n_genes, targets)
    library = 2500.0 * np.sqrt(n_genes / 500.0)
    shares = {**_GROUP_SHARE, "target": min(0.3, 2.5 * len(targets) / library)}
    shares["other"] = 1.0 - sum(shares.values())
    log_share = np.zeros(n_genes)
    for group, share in shares.items():
        members = types == group
        n_members = members.sum()
        quantiles = rng.permutation(ndtri((np.arange(n_members) + 0.5) / n_members))
        spread = _GROUP_SPREAD[group] * min(1.0, (n_genes / 500.0) ** 0.35)
        level = spread * np.clip(quantiles, -1.1, 1.8)
        log_share[members] = level - np.log(np.exp(level).sum()) + np.log(share)
    regulated = regulated_genes(types, log_share)
    ordinary = np.isin(types, ("target", "other"))
    dispersion = np.exp(rng.normal(np.log(np.where(ordinary, 5.0, 20.0)), 0.4))
    programmes = np.zeros((N_PROGRAMMES, n_genes))
    for k in range(N_PROGRAMMES):
        members = rng.choice(regulated, max(3, round(0.12 * len(regulated))), replace=False)
        programmes[k, members] = rng.choice([-1.0, 1.0], len(members)) * rng.uniform(0.3, 0.8, len(members))
    cycle = np.zeros((2, n_genes))
    members = rng.choice(regulated, max(3, round(0.1 * len(regulated))), replace=False)
    phase = rng.uniform(0, 2 * np.pi, len(members))
    cycle[:, members] = 0.6 * np.stack([np.cos(phase), np.sin(phase)])
    factors = np.stack([sd * (types == group) for group, sd in _GROUP_CELL_SD.items()])
    batches = rng.normal(0.0, 0.2, (n_batches, n_genes)) * (n_batches > 1)
    depth = rng.normal(0.0, 0.1, n_batches) * (n_batches > 1)
    loadings = np.concatenate([programmes, cycle, factors, batches])
    return Genes(names, types, log_share, dispersion, loadings, depth, library)


def draw_effects(
    rng: np.random.Generator,
    genes: Genes,
    dosage: pd.DataFrame,
    interaction_fraction: float,
    additive: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw log2 effects of every label on the rates, and the interactions among them.

    A treatment shifts one or two programmes, changes some 5 % of the genes directly and knocks its own gene down
    (log2 fold change -3 to -2). A combination is the sum of its treatments, plus interactions on
    ``interaction_fraction`` of the genes that the sum changes (its targets excluded). Interactions of ``additive``
    combinations are drawn and dropped, so that the effects of all others do not depend on it.

    Parameters
    ----------
    dosage
        Labels x treatments, 0/1; singles are the rows with one treatment.
    additive
        Which labels have no interactions, shape ``(n_labels,)``.

    Returns
    -------
    Effects and, as a part of them, interactions, each of shape ``(n_labels, n_genes)``.
    """
    regulated = regulated_genes(genes.types, genes.log_share)
    target_position = np.flatnonzero(genes.types == "target")
    singles = np.zeros((dosage.shape[1], len(genes.names)))
    for t in range(dosage.shape[1]):
        shift = np.zeros(N_PROGRAMMES)
        moved = rng.choice(N_PROGRAMMES, rng.integers(1, 3), replace=False)
        shift[moved] = rng.choice([-1.0, 1.0], len(moved)) * rng.uniform(1.0, 2.0, len(moved))
        singles[t] = shift @ genes.loadings[:N_PROGRAMMES] / np.log(2)
        direct = rng.choice(regulated, max(2, round(0.05 * len(regulated))), replace=False)
        singles[t, direct] += rng.choice([-1.0, 1.0], len(direct)) * rng.uniform(0.5, 2.0, len(direct))
        singles[t, target_position[t]] = -rng.uniform(2.0, 3.0)
    effects = dosage.to_numpy(dtype=float) @ singles
    interactions = np.zeros_like(effects)
    for row in np.flatnonzero(dosage.sum(axis=1).to_numpy() > 1):
        own_targets = target_position[dosage.to_numpy()[row] > 0]
        candidates = np.setdiff1d(np.flatnonzero(effects[row]), own_targets)
        chosen = rng.choice(candidates, round(interaction_fraction * len(candidates)), replace=False)
        drawn = rng.normal(0.0, 0.8, len(chosen))
        if not additive[row]:
            interactions[row, chosen] = drawn
    return effects + interactions, interactions


def draw_states(rng: np.random.Generator, genes: Genes, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw the state (cells x axes of ``genes.loadings``) and the library size of unperturbed cells."""
    n_cells, n_batches = len(batch), len(genes.batch_depth)
    programmes = rng.normal(0.0, 0.6, (n_cells, N_PROGRAMMES))
    angle = rng.uniform(0, 2 * np.pi, n_cells)
    factors = rng.standard_normal((n_cells, len(_GROUP_CELL_SD)))
    state = np.column_stack([programmes, np.cos(angle), np.sin(angle), factors, np.eye(n_batches)[batch]])
    library = genes.library * np.exp(rng.normal(0.0, _LIBRARY_SD, n_cells) + genes.batch_depth[batch])
    return state, library


def draw_rates(rng: np.random.Generator, genes: Genes, state: np.ndarray, library: np.ndarray) -> np.ndarray:
    """Draw gamma-distributed Poisson rates of unperturbed cells, shape ``(n_cells, n_genes)``."""
    rate = np.exp(genes.log_share + state @ genes.loadings)
    rate *= (library / rate.sum(axis=1))[:, None]
    return rate * rng.standard_gamma(genes.dispersion, rate.shape) / genes.dispersion


def draw_counts(
    rng: np.random.Generator, genes: Genes, state: np.ndarray, library: np.ndarray, effects: np.ndarray, row: np.ndarray
) -> sp.csr_matrix:
    """Draw clean counts block by block; ``row`` is the row of ``effects`` of a cell, -1 for unperturbed cells."""
    fold = np.vstack([np.exp2(effects), np.ones(len(genes.names))])
    blocks = []
    for start in range(0, len(row), BLOCK_SIZE):
        cells = slice(start, start + BLOCK_SIZE)
        rates = draw_rates(rng, genes, state[cells], library[cells]) * fold[row[cells]]
        blocks.append(sp.csr_matrix(rng.poisson(rates).astype(np.float32)))
    return sp.vstack(blocks, format="csr")


def perturbation_shifts(rng: np.random.Generator, genes: Genes, effects: np.ndarray, n_draws: int) -> np.ndarray:
    """Compute the mean change of log2(1 + 1e4 x / L) when a cell is perturbed, by Monte Carlo.

    The same ``n_draws`` unperturbed cells serve every label. Counts after the perturbation are made from the counts
    before: a gene that falls to the share r keeps every count with probability r, a gene that rises gains Poisson
    counts. The marginal distributions are exact, and genes that do not change add no sampling noise.

    Returns
    -------
    Array of shape ``(n_labels, n_genes)``.
    """
    batch = rng.integers(len(genes.batch_depth), size=n_draws)
    rates = draw_rates(rng, genes, *draw_states(rng, genes, batch))
    before = rng.poisson(rates)
    level = _mean_log_expression(before)
    shifts = np.zeros_like(effects)
    for row, effect in enumerate(effects):
        after = before.copy()
        up, down = np.flatnonzero(effect > 0), np.flatnonzero(effect < 0)
        after[:, up] += rng.poisson(rates[:, up] * (np.exp2(effect[up]) - 1))
        after[:, down] = rng.binomial(before[:, down], np.exp2(effect[down]))
        shifts[row] = _mean_log_expression(after) - level
    return shifts


def _mean_log_expression(counts: np.ndarray) -> np.ndarray:
    scaled = counts.astype(np.float32)
    scaled *= (COUNTS_PER_CELL / np.maximum(counts.sum(axis=1), 1)).astype(np.float32)[:, None]
    scaled += 1
    return np.log2(scaled, out=scaled).mean(axis=0, dtype=np.float64)
