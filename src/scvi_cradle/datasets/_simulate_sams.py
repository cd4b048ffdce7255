"""Continuous data from the generative process of SAMS-VAE, with a known mask."""

from __future__ import annotations

import numpy as np
from anndata import AnnData

from scvi_cradle._validation import check_positive, check_probability
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

_N_HIDDEN = 20
_HELD_OUT = 0.25


def simulate_sams(
    n_treatments: int = 100,
    n_latent: int = 15,
    n_genes: int = 50,
    n_samples_per_treatment: int = 100,
    mask_prob: float = 0.1,
    signal: float = 0.8,
    seed: int = 0,
) -> AnnData:
    r"""Simulate Gaussian observations of sparse additive latent shifts :cite:`bereket2023samsvae`, appendix A.5.

    Parameters
    ----------
    n_treatments
        Number of treatments; every cell has one or is a control.
    n_latent
        Number of latent variables.
    n_genes
        Number of features.
    n_samples_per_treatment
        Number :math:`n_t` of training cells of every treatment. On top come ``round(n_t / 4)``, at least one,
        validation cells and as many test cells. The control, which the paper has not, gets the same numbers.
    mask_prob
        Probability, in (0, 1), that a treatment shifts a latent. With 0.1 and 15 latents a fifth of the treatments
        shift none and have no effect.
    signal
        Share, in (0, 1), of the variance of every feature that is not noise.
    seed
        Seed of NumPy's generator; no global state is touched. Mask and embedding do not depend on ``n_genes``,
        ``n_samples_per_treatment`` or ``signal``.

    Returns
    -------
    AnnData of ``(n_treatments + 1) * (n_t + 2 * round(n_t / 4))`` cells x ``n_genes`` with

    - ``X``: observations, float32, not counts; ``layers["mean"]``: the same without noise, float32;
    - ``obs``: ``perturbation`` (``"T001"``, ``"T002"``, ... and ``"control"``) and ``split`` (``"train"``, ``"val"``,
      ``"test"``: other cells of the same treatments);
    - ``obsm["z_basal"]`` and ``obsm["z"]``: latents before and after the shift, cells x ``n_latent``;
    - ``uns["control"]``;
    - ``uns["truth"]``: ``mask`` (boolean) and ``embedding`` (DataFrames, treatments x latents; the shift is
      ``mask * embedding``), ``effects`` (DataFrame, treatments x features) and ``noise_sd`` (array, one value per
      feature).

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    With dosage :math:`d_{it}` of cell :math:`i`,

    .. math:: z_i = z^b_i + \sum_t d_{it}\, m_t \circ e_t, \qquad x_i \sim N(\mu(z_i), \sigma^2 I),

    :math:`z^b \sim N(0, I)`, :math:`m \sim \mathrm{Bern}(p)` with ``mask_prob`` :math:`p`,
    :math:`e \sim \pm N(5, 0.5^2)`. The random sign is that of the authors' code; the paper does not mention it. :math:`\mu` has two hidden layers of
    20 units, no biases, orthogonal weights and leaky ReLUs of slope 0.2; every feature is divided by its standard
    deviation over the cells, so that :math:`\sigma^2 = (1 - s) / s` for the signal :math:`s`.

    ``effects`` holds :math:`E[\mu(z^b + m_t \circ e_t)] - E[\mu(z^b)]`, the expected difference of a feature to the
    control in the units of ``X``, as a mean over 4,096 basal latents that all treatments share.
    It is what a model's average treatment effects approach with ``method="mean"``.

    Latents are known up to order and sign only; see :func:`scvi_cradle.metrics.mask_f1`.

    Examples
    --------
    >>> from scvi_cradle.datasets import simulate_sams
    >>> adata = simulate_sams(n_treatments=5, n_samples_per_treatment=20)
    >>> adata.shape
    (180, 50)
    """
    sizes = {"n_treatments": n_treatments, "n_latent": n_latent, "n_genes": n_genes}
    for name, value in {**sizes, "n_samples_per_treatment": n_samples_per_treatment}.items():
        check_positive(name, value, integer=True)
    check_probability("mask_prob", mask_prob)
    check_probability("signal", signal)
    check_positive("seed", seed, integer=True, allow_zero=True)
    shift_rng, decoder_rng, cells_rng, noise_rng, truth_rng = np.random.default_rng(seed).spawn(5)

    mask = shift_rng.random((n_treatments, n_latent)) < mask_prob
    embedding = draw_embedding(shift_rng, mask.shape)
    decoder = draw_decoder(decoder_rng, [n_latent, _N_HIDDEN, _N_HIDDEN, n_genes])
    n_held_out = max(1, round(_HELD_OUT * n_samples_per_treatment))
    per_group = np.array([[n_samples_per_treatment, n_held_out, n_held_out]])
    cells = draw_cells(cells_rng, mask * embedding, np.repeat(per_group, n_treatments + 1, axis=0))

    mean = decode(decoder, cells.z)
    scale = mean.std(axis=0)  # (n_genes,)
    mean = mean / scale
    noise_sd = np.full(n_genes, np.sqrt((1.0 - signal) / signal))
    effects = mean_changes(truth_rng, mask * embedding, lambda z: decode(decoder, z) / scale)

    treatments = numbered("T", n_treatments)
    x = mean + noise_sd * noise_rng.standard_normal(mean.shape)
    adata = to_anndata(x, cells.row, cells.split, treatments, {"z_basal": cells.z_basal, "z": cells.z})
    adata.layers["mean"] = mean.astype(np.float32)
    adata.uns["truth"] = {**truth_tables(treatments, mask, embedding, effects), "noise_sd": noise_sd}
    return adata
