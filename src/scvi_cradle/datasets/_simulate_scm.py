"""Cells from a causal model of latents, with mechanisms of their own in every environment and known partners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle._validation import check_positive
from scvi_cradle.datasets._latent_shifts import (
    CONTROL,
    N_DRAWS,
    SPLITS,
    decode,
    draw_decoder,
    numbered,
    to_anndata,
)

_WEIGHT_RANGE = (0.2, 1.0)
_MEAN_RANGE = (-2.0, 2.0)
_SCALE_RANGE = (0.1, 2.0)
_EXPECTED_DEGREE = 2.0
_CONTEXT_PROB = 0.3
_N_HIDDEN = 64
_TEST_EVERY = 4  # pairs


def simulate_scm(
    n_cells: int = 4000,
    n_genes: int = 500,
    n_responsive: int = 4,
    n_invariant: int = 7,
    n_environments: int = 12,
    seed: int = 0,
) -> AnnData:
    r"""Simulate expression from a structural causal model of latents, after the identifiability study of PerturbedVAE.

    Invariant latents have the same distribution in all environments. Responsive latents depend on each other along a
    directed acyclic graph and on the invariant ones; every environment has mechanisms of its own.

    Parameters
    ----------
    n_cells
        Number of cells, at least ``8 * n_environments``. Half of them (the larger half) are controls: every perturbed
        cell has a control partner of its own with the same invariant latents, so the pairing decides how many
        controls there are. Environments have equal numbers of cells, up to one.
    n_genes
        Number of genes, at least ``n_responsive + n_invariant``, so that the latents can be told from them.
    n_responsive
        Number of latents that perturbations change, at least 1.
    n_invariant
        Number of latents that they do not, at least 1.
    n_environments
        Number of perturbations, at least ``2 * n_responsive``: with fewer the responsive latents are not identified.
    seed
        Seed of NumPy's generator; no global state is touched. Graph, mechanisms and decoder do not depend on
        ``n_cells``, nor graph and mechanisms on ``n_genes``.

    Returns
    -------
    AnnData of ``n_cells`` x ``n_genes`` with

    - ``X``: expression without noise, dense float32; every gene has mean 0 and standard deviation 1 over the cells;
    - ``obs``: ``perturbation`` (``"E01"``, ``"E02"``, ... and ``"control"``), ``control_partner`` (name of the control
      cell with the same invariant latents; a control names itself) and ``split`` (a quarter of the pairs is
      ``"test"``, the same share of every environment, the rest ``"train"``; partners are never apart, and none is
      ``"val"``);
    - ``obsm["z_responsive"]``, ``obsm["z_invariant"]`` and ``obsm["noise_responsive"]``: latents and the noise
      :math:`n_\nu`, cells x latents;
    - ``uns["control"]``;
    - ``uns["truth"]``, environments in sorted order with the control last (the index of ``mean``): ``weights`` (array, environments x responsive x responsive; row: effect, column: cause), ``context_weights``
      (array, environments x responsive x invariant), ``mean`` and ``scale`` (DataFrames, environments x responsive),
      ``mask`` and ``context_mask`` (boolean DataFrames: weights that are not 0 by construction), ``cut`` (boolean
      DataFrame, environments x responsive: all weights into this latent are 0) and ``effects`` (DataFrame,
      environments without the control x genes).

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    In environment :math:`u`, with :math:`z_\iota \sim N(0, I)`,

    .. math:: z_\nu = \Lambda_{\nu\iota}(u) z_\iota + \Lambda_{\nu\nu}(u) z_\nu + n_\nu, \qquad
        n_\nu \sim N(\mu(u), \mathrm{diag}\,\sigma^2(u)),

    :math:`\mu \sim U(-2, 2)` and :math:`\sigma \sim U(0.1, 2)`; the control has :math:`\mu = 0`, :math:`\sigma = 1`.
    :math:`\Lambda_{\nu\nu}` is strictly lower triangular. ``mask`` is common to all environments, an Erdős-Rényi
    graph: every pair of responsive latents is joined with the probability that gives a latent two neighbours,
    causes and effects together, on average (1 for up to three latents). ``context_mask`` has ones with probability
    0.3. The weights are :math:`\pm U(0.2, 1)`, drawn for every environment and in the same way for the control.

    For every responsive latent there is one environment, another one for each, that cuts all weights into it. This,
    and natural parameters whose differences to the control have full rank (here with probability 1), are conditions of
    the identifiability theorem. So are partners that share their invariant latents; their noise :math:`n_\nu`
    is drawn independently.

    :math:`x = f(z_\nu, z_\iota)` with three linear maps without biases and leaky ReLUs of slope 0.2 between
    them, all with orthonormal rows, and 64 hidden units (not more than genes nor fewer than latents): :math:`f` is
    injective. The fewer hidden units, the less linear it is: at the default sizes a linear regression on the genes
    explains 98 % of the variance of the responsive and 95 % of that of the invariant latents in test cells.

    ``effects`` holds :math:`E[x \mid u] - E[x \mid \mathrm{control}]` in the units of ``X``, as a mean over 4,096 draws of
    :math:`z_\iota` and of standardised noise that all environments share.

    The sizes and the conditions are the paper's; distributions of weights, means and scales, the share of controls and
    the hidden units of :math:`f` are choices of this package.

    Examples
    --------
    >>> from scvi_cradle.datasets import simulate_scm
    >>> adata = simulate_scm(n_cells=400, n_genes=50)
    >>> int((adata.obs["perturbation"] == "control").sum())
    200
    """
    _check_sizes(n_cells, n_genes, n_responsive, n_invariant, n_environments)
    check_positive("seed", seed, integer=True, allow_zero=True)
    graph_rng, decoder_rng, cells_rng, truth_rng = np.random.default_rng(seed).spawn(4)

    model = _draw_mechanisms(graph_rng, n_environments, n_responsive, n_invariant)
    n_latent = n_responsive + n_invariant
    n_hidden = max(n_latent, min(_N_HIDDEN, n_genes))
    decoder = draw_decoder(decoder_rng, [n_latent, n_hidden, n_hidden, n_genes])
    row, partner, split = _draw_pairs(cells_rng, n_cells, n_environments)
    z_invariant = cells_rng.standard_normal((n_cells, n_invariant))[partner]
    z_responsive, noise = model.responsive(row, z_invariant, cells_rng.standard_normal((n_cells, n_responsive)))

    x = decode(decoder, np.hstack([z_responsive, z_invariant]))
    level, spread = x.mean(axis=0), x.std(axis=0)  # (n_genes,)
    environments = numbered("E", n_environments)
    latents = {"z_responsive": z_responsive, "z_invariant": z_invariant, "noise_responsive": noise}
    adata = to_anndata((x - level) / spread, row, split, environments, latents)
    adata.obs["control_partner"] = pd.Categorical(adata.obs_names.to_numpy()[partner])
    effects = model.mean_differences(truth_rng, decoder) / spread
    adata.uns["truth"] = {
        **model.tables([*environments, CONTROL]),
        "effects": pd.DataFrame(
            effects, index=pd.Index(environments, name="environment"), columns=list(adata.var_names)
        ),
    }
    return adata


def _check_sizes(n_cells: Any, n_genes: Any, n_responsive: Any, n_invariant: Any, n_environments: Any) -> None:
    sizes = {"n_cells": n_cells, "n_genes": n_genes, "n_responsive": n_responsive, "n_invariant": n_invariant}
    for name, value in {**sizes, "n_environments": n_environments}.items():
        check_positive(name, value, integer=True)
    if n_environments < 2 * n_responsive:
        msg = (
            f"`n_environments` must be at least 2 * n_responsive = {2 * n_responsive}, without which the responsive "
            f"latents are not identified; received {n_environments}: raise it or lower `n_responsive`."
        )
        raise ValueError(msg)
    least = 2 * _TEST_EVERY * n_environments
    if n_cells < least:
        msg = (
            f"`n_cells` must be at least 8 * n_environments = {least}, four pairs of cells for each; "
            f"received {n_cells}: raise it or lower `n_environments`."
        )
        raise ValueError(msg)
    if n_genes < n_responsive + n_invariant:
        msg = (
            f"`n_genes` must be at least n_responsive + n_invariant = {n_responsive + n_invariant}, to hold all "
            f"latents; received {n_genes}: raise it or ask for fewer latents."
        )
        raise ValueError(msg)


@dataclass(frozen=True)
class _Mechanisms:
    """Structural equations of all environments; the control is the last one.

    Parameters
    ----------
    mask, context_mask
        Shapes ``(n_responsive, n_responsive)`` and ``(n_responsive, n_invariant)``.
    cut
        Shape ``(n_environments + 1, n_responsive)``.
    weights, context_weights
        Shapes ``(n_environments + 1, *mask.shape)`` and ``(n_environments + 1, *context_mask.shape)``.
    mean, scale
        Of the noise, shape ``(n_environments + 1, n_responsive)``.
    """

    mask: np.ndarray
    context_mask: np.ndarray
    cut: np.ndarray
    weights: np.ndarray
    context_weights: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    def responsive(self, row: np.ndarray, z_invariant: np.ndarray, standard: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the responsive latents and their noise; ``row`` is the environment of every cell, -1 for controls."""
        noise = self.mean[row] + self.scale[row] * standard
        z = noise + np.einsum("nij,nj->ni", self.context_weights[row], z_invariant)
        for i in range(1, z.shape[1]):
            z[:, i] += (self.weights[row, i, :i] * z[:, :i]).sum(axis=1)
        return z, noise

    def mean_differences(self, rng: np.random.Generator, decoder: list[np.ndarray]) -> np.ndarray:
        """Return by Monte Carlo the difference of the mean expression to the control, environments x genes."""
        z_invariant = rng.standard_normal((N_DRAWS, self.context_mask.shape[1]))
        standard = rng.standard_normal((N_DRAWS, len(self.mask)))
        means = []
        for environment in range(len(self.mean)):
            z, _ = self.responsive(np.full(N_DRAWS, environment), z_invariant, standard)
            means.append(decode(decoder, np.hstack([z, z_invariant])).mean(axis=0))
        return np.stack(means[:-1]) - means[-1]

    def tables(self, environments: list[str]) -> dict[str, Any]:
        index = pd.Index(environments, name="environment")
        responsive, invariant = (
            numbered(prefix, n)
            for prefix, n in zip(("responsive_", "invariant_"), self.context_mask.shape, strict=True)
        )
        return {
            "weights": self.weights,
            "context_weights": self.context_weights,
            "mean": pd.DataFrame(self.mean, index=index, columns=responsive),
            "scale": pd.DataFrame(self.scale, index=index, columns=responsive),
            "mask": pd.DataFrame(self.mask, index=pd.Index(responsive, name="effect"), columns=responsive),
            "context_mask": pd.DataFrame(
                self.context_mask, index=pd.Index(responsive, name="effect"), columns=invariant
            ),
            "cut": pd.DataFrame(self.cut, index=index, columns=responsive),
        }


def _draw_mechanisms(rng: np.random.Generator, n_environments: int, n_responsive: int, n_invariant: int) -> _Mechanisms:
    joined = min(1.0, _EXPECTED_DEGREE / max(n_responsive - 1, 1))
    mask = np.tril(rng.random((n_responsive, n_responsive)) < joined, -1)
    context_mask = rng.random((n_responsive, n_invariant)) < _CONTEXT_PROB
    shape = (n_environments, n_responsive)
    mean = np.vstack([rng.uniform(*_MEAN_RANGE, shape), np.zeros(n_responsive)])
    scale = np.vstack([rng.uniform(*_SCALE_RANGE, shape), np.ones(n_responsive)])
    cut = np.zeros((n_environments + 1, n_responsive), dtype=bool)
    cut[rng.permutation(n_environments)[:n_responsive], np.arange(n_responsive)] = True
    weights, context_weights = (
        _draw_weights(rng, (n_environments + 1, *allowed.shape)) * (allowed & ~cut[:, :, None])
        for allowed in (mask, context_mask)
    )
    return _Mechanisms(mask, context_mask, cut, weights, context_weights, mean, scale)


def _draw_weights(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(*_WEIGHT_RANGE, shape) * rng.choice([-1.0, 1.0], shape)


def _draw_pairs(
    rng: np.random.Generator, n_cells: int, n_environments: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return environment (-1: control), position of the control partner and position in ``SPLITS`` of every cell.

    Cells are in random order. Perturbed cells and their partners share a split; a control left over by an odd number
    is for training.
    """
    n_pairs = n_cells // 2
    environment = np.arange(n_pairs) * n_environments // n_pairs  # blocks of equal sizes
    in_test = np.arange(n_pairs) % _TEST_EVERY == _TEST_EVERY - 1
    place = rng.permutation(n_cells)
    perturbed, control = place[:n_pairs], place[n_pairs : 2 * n_pairs]
    row, split = np.full(n_cells, -1), np.full(n_cells, SPLITS.index("train"))
    partner = np.arange(n_cells)
    row[perturbed], partner[perturbed] = environment, control
    for cells in (perturbed, control):
        split[cells[in_test]] = SPLITS.index("test")
    return row, partner, split
