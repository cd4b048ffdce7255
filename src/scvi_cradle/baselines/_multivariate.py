"""Multivariate shrinkage of effects: treatments borrow strength from each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from anndata import AnnData

from scvi_cradle._validation import check_positive
from scvi_cradle.baselines._base import SumOfSingles
from scvi_cradle.baselines._covariance_mixture import (
    FullPrior,
    MixturePrior,
    NoisyEffects,
    Posterior,
    Sums,
    fit_prior,
    posterior,
)
from scvi_cradle.baselines._factor_mixture import FactorPrior

N_ROUNDS = 20
PRIOR_CELLS = 50  # weight of the controls' variance in that of a label
MIN_VARIANCE = 1e-3  # of a label, as a share of the mean over labels
LARGEST_FULL = 20  # labels
MAX_RANK = 10


class MultivariateShrinkage(SumOfSingles):
    r"""Predict training effects shrunk together; unseen combinations get the sum of shrunken single effects.

    For every gene, raw effects :math:`r` of all labels are noisy views of true ones, and they share the error of the
    control: :math:`r \sim N(b, \mathrm{diag}(v) + v_0 1 1')`. The prior is a mixture over scales,
    :math:`b \sim \sum_k \pi_k N(0, w_k U)` with seven scales :math:`w` from 0.001 to 3; weights and the covariance
    :math:`U` of the labels are estimated by 20 rounds of EM over genes (the idea of mash, Urbut et al. 2019, with one
    estimated covariance and a shared control error). The estimate is the posterior mean.

    :meth:`get_average_treatment_effects` adds ``layers["std"]``, the posterior standard deviation, and
    ``layers["lfsr"]``, the local false sign rate :math:`\min(P(b \le 0), P(b \ge 0))`, exact under the mixture. Those of
    an unseen combination come from the joint posterior of its single effects. The control has effect 0, deviation 0
    and rate 1 (any sign would be false), as have genes that do not vary in any label. Deviations are conditional on
    the estimated prior and on additive effects.

    Parameters
    ----------
    rank
        Factors of ``U`` = factors + diagonal, which costs far less for hundreds of labels; 0: any covariance.
        Default: any covariance up to 20 labels, 10 factors above.

    Raises
    ------
    ValueError
        If ``rank`` is not an integer from 0 up; and by :meth:`fit`, if no label has two cells.
    """

    def __init__(self, rank: int | None = None) -> None:
        if rank is not None:
            check_positive("rank", rank, integer=True, allow_zero=True)
        self._rank = rank

    def _learn(self, effects: AnnData) -> None:
        super()._learn(effects)
        self._varies, self._noisy = noisy_effects(self._raw)
        self._prior = learn_prior(self._noisy, self._rank) if self._varies.any() else None
        self._seen_posterior = self._posterior([[row] for row in range(self._raw.n_obs)])

    def _posterior(self, members: Sequence[Sequence[int]]) -> Posterior:
        """Return the posterior of sums of effects of seen labels, over all genes."""
        shape = (len(members), self._raw.n_vars)
        result = Posterior(np.zeros(shape), np.zeros(shape), np.ones(shape))
        if self._prior is not None:
            for values, part in zip(result, posterior(self._prior, self._noisy, Sums.create(members)), strict=True):
                values[:, self._varies] = part
        return result

    def _label_effects(self) -> np.ndarray:
        return self._seen_posterior.mean

    def _layers(self, labels: Sequence[str], members: Sequence[tuple[int, ...]]) -> dict[str, np.ndarray]:
        rows = self._rows(labels, members)
        shape = (len(labels), self._raw.n_vars)
        std, lfsr = np.zeros(shape), np.ones(shape)
        seen = [i for i, parts in enumerate(rows) if len(parts) == 1]
        of_seen = [rows[i][0] for i in seen]
        std[seen], lfsr[seen] = self._seen_posterior.std[of_seen], self._seen_posterior.lfsr[of_seen]
        unseen = [i for i, parts in enumerate(rows) if len(parts) > 1]
        if unseen:
            _, std[unseen], lfsr[unseen] = self._posterior([rows[i] for i in unseen])
        return {"std": std, "lfsr": lfsr}


def noisy_effects(effects: AnnData) -> tuple[np.ndarray, NoisyEffects]:
    """Return which genes vary, and raw effects with the sampling variances of labels and control for these genes.

    Parameters
    ----------
    effects
        Result of :func:`scvi_cradle.metrics.average_treatment_effects`.

    Raises
    ------
    ValueError
        If no label has two cells, so that no variance is known.

    Notes
    -----
    The variance between cells of a label is averaged with that of the controls, weighted by its cells and by 50.
    """
    n_cells = effects.obs["n_cells"].to_numpy()[:, None]
    n_controls = effects.uns["n_control_cells"]
    of_control = effects.var["control_sem"].to_numpy() ** 2  # (n_genes,)
    if not np.isfinite(of_control).all():
        msg = "Sampling variances need a label, or the control, with at least two cells; received single cells only."
        raise ValueError(msg)
    between_cells = np.maximum(effects.layers["sem"] ** 2 - of_control, 0.0) * n_cells
    pooled = (n_cells * between_cells + PRIOR_CELLS * of_control * n_controls) / (n_cells + PRIOR_CELLS)
    own = pooled / n_cells
    varies = own.max(0) > 0
    own = np.maximum(own, MIN_VARIANCE * own.mean(0))[:, varies]
    raw = np.asarray(effects.X)[:, varies]
    return varies, NoisyEffects(np.ascontiguousarray(raw.T), np.ascontiguousarray(own.T), of_control[varies])


def learn_prior(effects: NoisyEffects, rank: int | None) -> MixturePrior:
    """Return the prior after the rounds of EM; ``rank`` 0: any covariance, ``None``: by the number of labels."""
    n_labels = effects.raw.shape[1]
    if rank is None:
        rank = 0 if n_labels <= LARGEST_FULL else MAX_RANK
    rank = min(rank, n_labels)
    start = FactorPrior.start(effects, rank) if rank else FullPrior.start(effects)
    return fit_prior(start, effects, N_ROUNDS)
