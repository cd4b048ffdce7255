"""Counts from sparse mechanism shifts, with interventions held out for transfer."""

from __future__ import annotations

from typing import Literal

import numpy as np
from anndata import AnnData
from scipy.special import log_softmax, logsumexp

from scvi_cradle._constants import COUNTS_PER_CELL
from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.datasets._latent_shifts import (
    decode,
    draw_cells,
    draw_decoder,
    draw_embedding,
    mean_changes,
    numbered,
    to_anndata,
    truth_tables,
)

_N_GENES = 100
_N_CELLS = 200
_N_HIDDEN = 40
_MAX_TARGETS = 3
_LIBRARY = 1e6
_TRANSFER_FRACTION = 0.2
_VAL_FRACTION = 0.2


def simulate_svae(
    n_interventions: int = 100,
    n_latent: int = 15,
    softmax_axis: Literal[0, 1] = 1,
    seed: int = 0,
) -> AnnData:
    r"""Simulate counts of sparse mechanism shifts with interventions held out, after :cite:`lopez2023svae`.

    Parameters
    ----------
    n_interventions
        Number of interventions, at least 2; every cell has one or is a control. Each has 200 cells, and so has the
        control, which the original simulation has not.
    n_latent
        Number of latent variables.
    softmax_axis
        ``1``: the shares of every cell sum to one over the 100 genes; ``0``: the shares of every gene sum to one over
        the cells. The authors' code does the latter: every gene then has the same total, and the expected counts
        of a cell depend on the other cells and on their number.
    seed
        Seed of NumPy's generator; no global state is touched. Latents, mask and embedding do not depend on
        ``softmax_axis``.

    Returns
    -------
    AnnData of ``200 * (n_interventions + 1)`` cells x 100 genes with

    - ``X``: counts, dense float32: 1e6 in an average cell for ``softmax_axis=1``, 1e6 in an average gene
      for ``softmax_axis=0``;
    - ``obs``: ``perturbation`` (``"T001"``, ``"T002"``, ... and ``"control"``) and ``split``: the last fifth of the
      interventions, at least one, is ``"test"`` with all its cells; of every other intervention and of the control
      a fifth of the cells is ``"val"`` and the rest ``"train"``;
    - ``obsm["z_basal"]`` and ``obsm["z"]``: latents before and after the shift, cells x ``n_latent``;
    - ``uns["control"]``;
    - ``uns["truth"]``: DataFrames ``mask`` (boolean) and ``embedding`` (interventions x latents; the shift is
      ``mask * embedding``) and ``effects`` (interventions x genes).

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    An intervention has one to three targets, drawn with replacement among the latents as in the authors' code, so that
    repeats collapse. With :math:`e \sim \pm N(5, 0.5^2)`,

    .. math:: z_i \sim N(m_t \circ e_t, I), \qquad x_{ig} \sim \mathrm{Poisson}(10^6\, \mathrm{softmax}(f(z_i))_g).

    :math:`f` has three hidden layers of 40 units, no biases, orthogonal weights and leaky ReLUs of slope 0.2;
    its outputs are divided by their standard deviation over the cells. The numbers of genes and cells are choices
    of this package.

    ``effects`` holds the expected difference of :math:`\log_2(1 + 10^4 \rho)` to the control, with :math:`\rho` the
    expected share of a gene in the counts of its cell, as a mean over 4,096 basal latents that all interventions
    share. Poisson noise is left out; it changes means of this transform by less than 0.002 for ``softmax_axis=1``.
    Shares sum to one: a gene may fall because others rise.

    Latents are known up to order and sign only; see :func:`scvi_cradle.metrics.mask_f1`.

    Examples
    --------
    >>> from scvi_cradle.datasets import simulate_svae
    >>> adata = simulate_svae(n_interventions=5)
    >>> adata.shape
    (1200, 100)
    """
    check_positive("n_interventions", n_interventions, integer=True)
    if n_interventions < 2:
        msg = (
            f"`n_interventions` must be at least 2, one to train on and one to transfer to; received {n_interventions}."
        )
        raise ValueError(msg)
    check_positive("n_latent", n_latent, integer=True)
    check_one_of("softmax_axis", softmax_axis, (0, 1))
    check_positive("seed", seed, integer=True, allow_zero=True)
    shift_rng, decoder_rng, cells_rng, counts_rng, truth_rng = np.random.default_rng(seed).spawn(5)

    mask = _draw_targets(shift_rng, n_interventions, n_latent)
    embedding = draw_embedding(shift_rng, mask.shape)
    decoder = draw_decoder(decoder_rng, [n_latent, _N_HIDDEN, _N_HIDDEN, _N_HIDDEN, _N_GENES])
    cells = draw_cells(cells_rng, mask * embedding, _split_sizes(n_interventions))

    logits = decode(decoder, cells.z)
    scale = logits.std(axis=0)  # (n_genes,)
    logits = logits / scale
    total = logsumexp(logits, axis=softmax_axis, keepdims=True)
    counts = counts_rng.poisson(_LIBRARY * np.exp(logits - total))
    per_gene = total if softmax_axis == 0 else np.zeros((1, _N_GENES))  # what axis 0 takes off every gene

    def log_expression(z: np.ndarray) -> np.ndarray:
        share = np.exp(log_softmax(decode(decoder, z) / scale - per_gene, axis=1))
        return np.log2(1.0 + COUNTS_PER_CELL * share)

    treatments = numbered("T", n_interventions)
    adata = to_anndata(counts, cells.row, cells.split, treatments, {"z_basal": cells.z_basal, "z": cells.z})
    effects = mean_changes(truth_rng, mask * embedding, log_expression)
    adata.uns["truth"] = truth_tables(treatments, mask, embedding, effects)
    return adata


def _draw_targets(rng: np.random.Generator, n_interventions: int, n_latent: int) -> np.ndarray:
    """Mark one to three latents, drawn with replacement, for every intervention."""
    mask = np.zeros((n_interventions, n_latent), dtype=bool)
    for row in mask:
        row[rng.integers(n_latent, size=rng.integers(1, _MAX_TARGETS + 1))] = True
    return mask


def _split_sizes(n_interventions: int) -> np.ndarray:
    """Return the numbers of training, validation and test cells; the last row is the control."""
    n_transfer = max(1, round(_TRANSFER_FRACTION * n_interventions))
    n_val = round(_VAL_FRACTION * _N_CELLS)
    sizes = np.tile([_N_CELLS - n_val, n_val, 0], (n_interventions + 1, 1))
    sizes[n_interventions - n_transfer : n_interventions] = (0, 0, _N_CELLS)
    return sizes
