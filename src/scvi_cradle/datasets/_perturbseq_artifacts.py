"""Artifacts and guide counts of the simulated screen."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp

ARTIFACT_KINDS = ("dying", "ambient", "doublet")
_KIND_SHARE = (0.4, 0.4, 0.2)
_SEVERITY = {"dying": (0.45, 0.9), "ambient": (0.1, 0.5)}
_LYSED_SHARE = 0.1
_GUIDE_UMIS = 12.0
_BACKGROUND_UMIS = 0.8


def draw_artifact_kinds(rng: np.random.Generator, n_cells: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the kind of every cell (``"none"`` for clean ones) and its severity (0; doublets are filled in later)."""
    kind = np.full(n_cells, "none", dtype="U8")
    hit = rng.permutation(n_cells)[: round(fraction * n_cells)]
    kind[hit] = np.repeat(ARTIFACT_KINDS, np.diff(np.round(np.cumsum((0.0, *_KIND_SHARE)) * len(hit)).astype(int)))
    severity = np.zeros(n_cells)
    for name, (low, high) in _SEVERITY.items():
        severity[kind == name] = rng.uniform(low, high, (kind == name).sum())
    return kind, severity


def add_artifacts(
    rng: np.random.Generator, clean: sp.csr_matrix, kind: np.ndarray, severity: np.ndarray, types: np.ndarray
) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Return counts with artifacts, the severities with those of doublets, and each cell's doublet partner (-1: none).

    - dying: every count that is not mitochondrial is lost with probability ``severity``;
    - ambient: every count is lost with probability ``severity`` and replaced, on average, by one of the ambient
      profile, the pooled profile with a tenth of haemoglobin;
    - doublet: the counts of another clean cell are added; severity = their share of the sum.
    """
    n_cells, n_genes = clean.shape
    rows = {name: np.flatnonzero(kind == name) for name in ("none", *ARTIFACT_KINDS)}
    mitochondrial = types == "mitochondrial"
    dying = clean[rows["dying"]]
    lost = _per_entry(dying, severity[rows["dying"]]) * ~mitochondrial[dying.indices]
    dying.data = rng.binomial(dying.data.astype(np.int64), 1 - lost).astype(np.float32)

    ambient = clean[rows["ambient"]]
    totals = np.asarray(ambient.sum(axis=1)).ravel()
    lost = _per_entry(ambient, severity[rows["ambient"]])
    ambient.data = rng.binomial(ambient.data.astype(np.int64), 1 - lost).astype(np.float32)
    ambient = ambient + _ambient_counts(rng, clean, types == "haemoglobin", totals * severity[rows["ambient"]])

    partner = np.full(n_cells, -1)
    own = rows["doublet"]
    if own.size:
        partner[own] = (own + rng.integers(1, n_cells, own.size)) % n_cells
    other = clean[partner[own]]
    severity = severity.copy()
    severity[own] = np.asarray(other.sum(axis=1)).ravel() / np.asarray((clean[own] + other).sum(axis=1)).ravel()

    stacked = sp.vstack([clean[rows["none"]], dying, ambient, clean[own] + other], format="csr")
    order = np.argsort(np.concatenate(list(rows.values())))
    counts = sp.csr_matrix(stacked[order], shape=(n_cells, n_genes), dtype=np.float32)
    counts.eliminate_zeros()
    counts.sort_indices()
    return counts, severity, partner


def _per_entry(matrix: sp.csr_matrix, per_row: np.ndarray) -> np.ndarray:
    return np.repeat(per_row, np.diff(matrix.indptr))


def _ambient_counts(
    rng: np.random.Generator, clean: sp.csr_matrix, haemoglobin: np.ndarray, totals: np.ndarray
) -> sp.csr_matrix:
    pooled = np.asarray(clean.sum(axis=0, dtype=np.float64)).ravel()
    lysed = (pooled + 1e-9) * haemoglobin
    profile = (1 - _LYSED_SHARE) * pooled / pooled.sum() + _LYSED_SHARE * lysed / lysed.sum()
    drawn = rng.poisson(totals)
    columns = rng.choice(len(profile), drawn.sum(), p=profile)
    rows = np.repeat(np.arange(len(totals)), drawn)
    shape = (len(totals), len(profile))
    return sp.csr_matrix((np.ones(len(columns), dtype=np.float32), (rows, columns)), shape=shape)


def draw_guides(
    rng: np.random.Generator, targets: list[str], guides_per_target: int, efficiency: float
) -> pd.DataFrame:
    """Return the guides with ``target`` and ``efficacy``, the probability that a carrier is perturbed.

    The efficacies of a target's guides are spread around ``efficiency`` and average to it. Non-targeting guides
    (at least two) have the target ``"control"`` and efficacy 0.
    """
    n_control = max(2, guides_per_target)
    names = [f"{t}_g{j + 1}" for t in targets for j in range(guides_per_target)]
    names += [f"NT_g{j + 1}" for j in range(n_control)]
    offsets = np.linspace(-1, 1, guides_per_target) if guides_per_target > 1 else np.zeros(1)
    spread = min(efficiency, 1 - efficiency) * rng.uniform(0.5, 0.9, (len(targets), 1))
    efficacy = efficiency + spread * rng.permuted(np.tile(offsets, (len(targets), 1)), axis=1)
    return pd.DataFrame(
        {
            "target": np.repeat([*targets, "control"], [*[guides_per_target] * len(targets), n_control]),
            "efficacy": np.concatenate([efficacy.ravel(), np.zeros(n_control)]),
        },
        index=pd.Index(names, name="guide"),
    )


def assign_guides(rng: np.random.Generator, dosage: np.ndarray, guides: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Give every cell one guide per target of its label (controls: a non-targeting one) and decide who is perturbed.

    A cell is perturbed in all its targets or in none, with the mean efficacy of its guides as probability.

    Returns
    -------
    Boolean arrays ``carried`` of shape ``(n_cells, n_guides)`` and ``perturbed`` of shape ``(n_cells,)``.
    """
    n_cells, n_targets = dosage.shape
    n_control = int((guides["target"] == "control").sum())
    per_target = (len(guides) - n_control) // n_targets
    chosen = rng.integers(per_target, size=(n_cells, n_targets, 1)) == np.arange(per_target)
    targeting = (chosen & (dosage[:, :, None] > 0)).reshape(n_cells, -1)
    is_control = dosage.sum(axis=1) == 0
    non_targeting = (rng.integers(n_control, size=(n_cells, 1)) == np.arange(n_control)) & is_control[:, None]
    carried = np.hstack([targeting, non_targeting])
    probability = carried @ guides["efficacy"].to_numpy() / carried.sum(axis=1)
    return carried, rng.random(n_cells) < probability


def draw_guide_counts(
    rng: np.random.Generator,
    carried: np.ndarray,
    perturbed: np.ndarray,
    guides: pd.DataFrame,
    depth: np.ndarray,
    severity: dict[str, np.ndarray],
    partner: np.ndarray,
) -> np.ndarray:
    """Draw guide UMI counts, shape ``(n_cells, n_guides)``.

    A carried guide has a mean of 12 UMIs in an average cell, scaled with its efficacy relative to the others and
    halved in escapers, and negative binomial noise; every guide has an ambient background. Artifacts act on the guides
    as they do on the genes.

    Parameters
    ----------
    depth
        Library size relative to the median, shape ``(n_cells,)``.
    severity
        Severity of ``"dying"`` and ``"ambient"`` cells, 0 elsewhere, each of shape ``(n_cells,)``.
    partner
        Position of the other cell of a doublet, -1 elsewhere.
    """
    efficacy = guides["efficacy"].to_numpy()
    targeting = (guides["target"] != "control").to_numpy()
    strength = np.where(targeting, efficacy / efficacy[targeting].mean(), 1.0)
    escaper = ~perturbed & carried[:, targeting].any(axis=1)
    expression = _GUIDE_UMIS * depth * np.exp(rng.normal(-0.08, 0.4, len(depth))) * np.where(escaper, 0.5, 1.0)
    kept = (1 - severity["dying"]) * (1 - severity["ambient"])
    rate = carried * strength * rng.standard_gamma(5.0, carried.shape) / 5.0
    background = carried.mean(axis=0) * _BACKGROUND_UMIS
    counts = rng.poisson(rate * expression[:, None])
    doublet = partner >= 0
    mixed = counts.copy()
    mixed[doublet] += counts[partner[doublet]]
    mixed = rng.binomial(mixed, kept[:, None])
    return mixed + rng.poisson(background * (depth * (1 + 8 * severity["ambient"]))[:, None])
