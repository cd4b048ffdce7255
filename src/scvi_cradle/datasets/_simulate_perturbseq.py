"""A simulated Perturb-seq screen with known clean twins, effects, artifacts and escapers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import ceil, comb
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle._constants import COLUMNS, CONTROL_UNS_KEY
from scvi_cradle._labels import LabelRule, dosage_rows
from scvi_cradle._validation import check_positive
from scvi_cradle.datasets._perturbseq_artifacts import (
    ARTIFACT_KINDS,
    add_artifacts,
    assign_guides,
    draw_artifact_kinds,
    draw_guide_counts,
    draw_guides,
)
from scvi_cradle.datasets._perturbseq_cells import (
    GENE_TYPES,
    Genes,
    draw_counts,
    draw_effects,
    draw_genes,
    draw_states,
    perturbation_shifts,
)

if TYPE_CHECKING:
    import scipy.sparse as sp

_CONTROL = "control"
_RULE = LabelRule.create(_CONTROL)
_CONTROL_SHARE = 0.18
_MIN_CELLS_PER_LABEL = 6
_TEST_FRACTION = 0.25
_VAL_FRACTION = 0.2
_N_DRAWS = 2000


def simulate_perturbseq(
    n_cells: int = 2000,
    n_genes: int = 500,
    n_perturbations: int = 10,
    n_combinations: int = 5,
    artifact_fraction: float = 0.15,
    guides_per_target: int = 2,
    efficiency: float = 0.7,
    n_batches: int = 1,
    interaction_fraction: float = 0.2,
    seed: int = 0,
    additive_fraction: float = 0.0,
) -> AnnData:
    r"""Simulate a Perturb-seq screen whose clean cells, effects, artifacts and escapers are known.

    Every cell has a basal state (six cell programmes, a cell-cycle angle, and factors of its own on mitochondrial,
    ribosomal and haemoglobin genes), a library size and a perturbation label. Artifacts strike independently of the
    label; the counts before the artifact are kept as the cell's clean twin.

    Parameters
    ----------
    n_cells
        Number of cells, at least 6 for every label and for the control; 18 % and rounding remainders are controls.
    n_genes
        Number of genes, at least ``30 + 2 * n_perturbations``. Of 500, 13 are mitochondrial (``MT-``),
        41 ribosomal (``RPL``, ``RPS``), 6 haemoglobin; the targets ``G01``, ``G02``, ... are genes too.
    n_perturbations
        Number of targets, each with cells of its own.
    n_combinations
        Number of pairs of targets, labelled ``"G01+G02"``; 0 for none.
    artifact_fraction
        Share of cells struck by an artifact, in [0, 1): 40 % of them dying, 40 % ambient, 20 % doublets.
    guides_per_target
        Number of guides of every target; there are as many non-targeting ones, at least two.
    efficiency
        Mean probability, in (0, 1], that a cell with a targeting guide is perturbed; the others are escapers.
    n_batches
        Number of batches, drawn at random for every cell; more than one differ in expression and depth.
    interaction_fraction
        Share, in [0, 1], of the genes changed by a combination whose effect is not the sum of the single ones.
    seed
        Seed of NumPy's generator; no global state is touched. Genes, effects and clean twins do not depend on
        ``artifact_fraction``.
    additive_fraction
        Share, in [0, 1], of the combinations (rounded) without any interaction: their effects are the sum of the
        single ones. ``effects`` of all other labels do not depend on it.

    Returns
    -------
    AnnData of ``n_cells`` x ``n_genes`` with

    - ``X``: counts, CSR float32; ``layers["clean_counts"]``: the clean twins, equal to ``X`` for clean cells;
    - ``obs``: ``perturbation``, ``guide_identity``, ``batch``, ``split`` (a quarter of the combinations, at least one,
      is ``"test"`` with all its cells, a fifth of the other cells of every label ``"val"``, the rest ``"train"``;
      without combinations a quarter of the cells of every label is ``"test"``), ``true_artifact``,
      ``artifact_kind`` (``"none"``, ``"dying"``, ``"ambient"``, ``"doublet"``), ``artifact_severity`` (0 to 1: share
      of non-mitochondrial counts lost; share of ambient counts; share of the partner's counts) and
      ``true_perturbed`` (``False`` for controls and escapers);
    - ``obsm["guide_counts"]``: guide UMI counts, a DataFrame of cells x guides; ``obsm["z_basal"]``: basal states;
    - ``var["gene_type"]``;
    - ``uns["control"]``; ``uns["guide_targets"]``: DataFrame with the columns ``guide`` and ``target``
      (``"control"`` for non-targeting guides);
    - ``uns["truth"]``: ``effects`` and ``population_effects`` (DataFrames, all labels but the control, sorted, x
      genes), ``interactions`` (DataFrame, combinations x genes), ``pairs`` (DataFrame, combinations x ``additive``,
      ``interaction_size``) and ``guide_efficacy`` (DataFrame, guides x ``target``, ``efficacy``).

    Raises
    ------
    ValueError
        If an argument is out of range, or if cells, genes or pairs do not suffice.

    Notes
    -----
    With share :math:`\rho_i = \mathrm{softmax}(a + s_i W)` of a cell of state :math:`s_i`, library size :math:`l_i`
    (log-normal, sd 0.2, median :math:`2500\sqrt{n_{genes}/500}`) and log2 effects :math:`e` of its label,

    .. math:: x_{ig} \sim \mathrm{NB}(l_i \rho_{ig} 2^{e_g}, \theta_g), \qquad
        \theta_g \sim \mathrm{LogNormal}(\log 5, 0.4),

    (:math:`\log 20` for mitochondrial, ribosomal and haemoglobin genes) with :math:`e = 0` for controls and escapers.
    ``effects`` holds :math:`e`: the log2 fold change of the expected counts of a perturbed cell
    against the same cell unperturbed. Combinations are the sum of their treatments plus interactions (normal, sd 0.8),
    so that the difference to the sum shows the interactions: ``interactions`` holds it, and ``interaction_size`` its
    Euclidean norm over the genes (log2 units). ``additive`` combinations have none. Programmes are shared between treatments. Shares of the
    total change by :math:`e` less a constant, which is small: total counts change with the perturbation.
    Mitochondrial, ribosomal and haemoglobin genes, and the few others of more than five times the average share, have
    :math:`e = 0`.

    ``population_effects`` is what a perfect estimate from clean cells approaches, escapers included:
    the mean of :math:`\log_2(1 + 10^4 x / \sum x)` over the label's clean cells less that of the control. It is the
    share of the label's cells that are perturbed, times the mean change in 2,000 simulated cells, the same for all
    labels. Library sizes are those of the simulation, not 1e4.

    A cell with two guides is perturbed in both targets or in none: escape is a property of the cell.

    Examples
    --------
    >>> from scvi_cradle.datasets import simulate_perturbseq
    >>> adata = simulate_perturbseq(n_cells=300, n_genes=100, n_perturbations=4, n_combinations=2)
    >>> adata.shape
    (300, 100)
    >>> sorted(adata.obs["perturbation"].unique())[:2]
    ['G01', 'G02']
    """
    whole = {"n_cells": n_cells, "n_genes": n_genes, "n_perturbations": n_perturbations}
    _check_sizes({**whole, "guides_per_target": guides_per_target, "n_batches": n_batches}, n_combinations)
    _check_share("artifact_fraction", artifact_fraction, one=False)
    _check_share("efficiency", efficiency, zero=False)
    _check_share("interaction_fraction", interaction_fraction)
    _check_share("additive_fraction", additive_fraction)
    check_positive("seed", seed, integer=True, allow_zero=True)
    screen_rng, cells_rng, artifact_rng, split_rng, truth_rng, pairs_rng = np.random.default_rng(seed).spawn(6)

    width = max(2, len(str(n_perturbations)))
    targets = [f"G{i + 1:0{width}d}" for i in range(n_perturbations)]
    dosage = _draw_labels(screen_rng, targets, n_combinations)
    genes = draw_genes(screen_rng, n_genes, targets, n_batches)
    pairs = list(dosage.index[dosage.sum(axis=1) > 1])
    additive = pairs_rng.permutation(pairs)[: round(additive_fraction * len(pairs))]
    drawn = draw_effects(screen_rng, genes, dosage, interaction_fraction, dosage.index.isin(additive))
    effects, interactions = (pd.DataFrame(table, index=dosage.index, columns=genes.names) for table in drawn)
    guides = draw_guides(screen_rng, targets, guides_per_target, efficiency)

    cells = _draw_clean_cells(cells_rng, n_cells, genes, dosage, effects.to_numpy(), guides)
    adata = _with_artifacts(artifact_rng, cells, genes, guides, artifact_fraction)
    labels = pd.Categorical.from_codes(*_codes(cells.row, list(dosage.index)))
    adata.obs.insert(0, COLUMNS.PERTURBATION, labels)
    adata.obs["split"] = _split(split_rng, labels, pairs)

    share = np.array([cells.perturbed[cells.row == row].mean() for row in range(len(dosage))])
    population = share[:, None] * perturbation_shifts(truth_rng, genes, effects.to_numpy(), _N_DRAWS)
    adata.uns[CONTROL_UNS_KEY] = _CONTROL
    adata.uns["guide_targets"] = pd.DataFrame({"guide": list(guides.index), "target": list(guides["target"])})
    adata.uns["truth"] = {
        "effects": effects,
        "population_effects": pd.DataFrame(population, index=dosage.index, columns=genes.names),
        "interactions": interactions.loc[pairs],
        "pairs": _pair_table(interactions.loc[pairs]),
        "guide_efficacy": guides,
    }
    return adata


@dataclass(frozen=True)
class _Cells:
    """Clean cells: ``row`` is the row of the label in the table of effects, -1 for controls."""

    row: np.ndarray
    batch: np.ndarray
    carried: np.ndarray
    perturbed: np.ndarray
    state: np.ndarray
    library: np.ndarray
    counts: sp.csr_matrix


def _check_share(name: str, value: Any, *, zero: bool = True, one: bool = True) -> None:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
        msg = f"`{name}` must lie in {'[' if zero else '('}0, 1{']' if one else ')'}; received {value!r}."
        raise ValueError(msg)


def _check_sizes(sizes: dict[str, Any], n_combinations: Any) -> None:
    for name, value in sizes.items():
        check_positive(name, value, integer=True)
    check_positive("n_combinations", n_combinations, integer=True, allow_zero=True)
    n_targets = sizes["n_perturbations"]
    if n_combinations > comb(n_targets, 2):
        msg = (
            f"`n_combinations` must not exceed the {comb(n_targets, 2)} pairs of {n_targets} targets; "
            f"received {n_combinations}: lower it or raise `n_perturbations`."
        )
        raise ValueError(msg)
    least = 30 + 2 * n_targets
    if sizes["n_genes"] < least:
        msg = (
            f"`n_genes` must be at least 30 + 2 * n_perturbations = {least}, to hold the targets beside mitochondrial, "
            f"ribosomal, haemoglobin and other genes; received {sizes['n_genes']}: raise it or lower `n_perturbations`."
        )
        raise ValueError(msg)
    least = _MIN_CELLS_PER_LABEL * (1 + n_targets + n_combinations)
    if sizes["n_cells"] < least:
        msg = (
            f"`n_cells` must be at least {_MIN_CELLS_PER_LABEL} for each of the {1 + n_targets + n_combinations} "
            f"labels, so {least}; received {sizes['n_cells']}: raise it or ask for fewer labels."
        )
        raise ValueError(msg)


def _draw_labels(rng: np.random.Generator, targets: list[str], n_combinations: int) -> pd.DataFrame:
    """Return the dosage table: sorted labels (without the control) x targets."""
    pairs = list(combinations(targets, 2))
    drawn = [pairs[i] for i in rng.choice(len(pairs), n_combinations, replace=False)] if n_combinations else []
    labels = sorted([*targets, *(_RULE.join(pair) for pair in drawn)])
    return pd.DataFrame(dosage_rows(labels, targets, _RULE), index=pd.Index(labels, name="label"), columns=targets)


def _draw_rows(rng: np.random.Generator, n_cells: int, n_labels: int) -> np.ndarray:
    """Return the label of every cell as a row of the dosage table, -1 for controls; label sizes vary by some 20 %."""
    share = rng.uniform(0.8, 1.2, n_labels)
    n_control = max(_MIN_CELLS_PER_LABEL, round(_CONTROL_SHARE * n_cells))
    sizes = np.floor((n_cells - n_control) * share / share.sum()).astype(int)
    rows = np.full(n_cells, -1)
    rows[: sizes.sum()] = np.repeat(np.arange(n_labels), sizes)
    return rng.permutation(rows)


def _draw_clean_cells(
    rng: np.random.Generator,
    n_cells: int,
    genes: Genes,
    dosage: pd.DataFrame,
    effects: np.ndarray,
    guides: pd.DataFrame,
) -> _Cells:
    row = _draw_rows(rng, n_cells, len(dosage))
    batch = rng.integers(len(genes.batch_depth), size=n_cells)
    cell_dosage = np.vstack([dosage.to_numpy(), np.zeros(dosage.shape[1])])[row]
    carried, perturbed = assign_guides(rng, cell_dosage, guides)
    state, library = draw_states(rng, genes, batch)
    counts = draw_counts(rng, genes, state, library, effects, np.where(perturbed, row, -1))
    return _Cells(row, batch, carried, perturbed, state, library, counts)


def _with_artifacts(
    rng: np.random.Generator, cells: _Cells, genes: Genes, guides: pd.DataFrame, fraction: float
) -> AnnData:
    n_cells, n_batches = len(cells.row), len(genes.batch_depth)
    kind, severity = draw_artifact_kinds(rng, n_cells, fraction)
    counts, severity, partner = add_artifacts(rng, cells.counts, kind, severity, genes.types)
    by_kind = {k: severity * (kind == k) for k in ("dying", "ambient")}
    depth = cells.library / genes.library
    umis = draw_guide_counts(rng, cells.carried, cells.perturbed, guides, depth, by_kind, partner)
    names = pd.Index([f"cell_{i + 1:0{len(str(n_cells))}d}" for i in range(n_cells)])
    batch_names = [f"batch_{i + 1:0{len(str(n_batches))}d}" for i in range(n_batches)]
    obs = pd.DataFrame(
        {
            "guide_identity": pd.Categorical(["+".join(guides.index[carried]) for carried in cells.carried]),
            "batch": pd.Categorical.from_codes(cells.batch, batch_names),
            "true_artifact": kind != "none",
            "artifact_kind": pd.Categorical(kind, categories=["none", *ARTIFACT_KINDS]),
            "artifact_severity": severity,
            "true_perturbed": cells.perturbed,
        },
        index=names,
    )
    var = pd.DataFrame({"gene_type": pd.Categorical(genes.types, categories=GENE_TYPES)}, index=pd.Index(genes.names))
    return AnnData(
        counts,
        obs=obs,
        var=var,
        layers={"clean_counts": cells.counts},
        obsm={
            "guide_counts": pd.DataFrame(umis, index=names, columns=list(guides.index)),
            "z_basal": cells.state[:, :-n_batches],
        },
    )


def _pair_table(interactions: pd.DataFrame) -> pd.DataFrame:
    size = np.linalg.norm(interactions.to_numpy(), axis=1)
    return pd.DataFrame({"additive": size == 0, "interaction_size": size}, index=interactions.index)


def _codes(row: np.ndarray, labels: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return codes and sorted categories of the labels, the control included."""
    categories = sorted([*labels, _CONTROL])
    position = np.array([categories.index(label) for label in [*labels, _CONTROL]])
    return position[row], categories


def _split(rng: np.random.Generator, labels: pd.Categorical, pairs: list[str]) -> pd.Categorical:
    """Hold out a quarter of the combinations (of the cells when there are none); a fifth of the rest is val."""
    held_out = set(rng.permutation(pairs)[: ceil(_TEST_FRACTION * len(pairs))].tolist()) if pairs else set()
    split = np.full(len(labels), "train", dtype="U5")
    for code, label in enumerate(labels.categories):
        cells = rng.permutation(np.flatnonzero(labels.codes == code))
        n_test = len(cells) if label in held_out else round(_TEST_FRACTION * len(cells)) * (not pairs)
        n_val = round(_VAL_FRACTION * (len(cells) - n_test))
        split[cells[:n_test]] = "test"
        split[cells[n_test : n_test + n_val]] = "val"
    return pd.Categorical(split, categories=["train", "val", "test"])
