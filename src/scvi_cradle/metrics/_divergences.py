"""Closed forms of Kullback-Leibler divergences, element by element."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import rel_entr


def gaussian_kl(mean_q: ArrayLike, std_q: ArrayLike, mean_p: ArrayLike, std_p: ArrayLike) -> np.ndarray:
    r"""Return :math:`KL(N(\mu_q, \sigma_q^2) \| N(\mu_p, \sigma_p^2))` of every element, in nats.

    Parameters
    ----------
    mean_q, std_q, mean_p, std_p
        Means and standard deviations (not variances); shapes broadcast.

    Raises
    ------
    ValueError
        If a standard deviation is not positive and finite, or a mean is not finite.

    Notes
    -----
    .. math:: \log\frac{\sigma_p}{\sigma_q} + \frac{\sigma_q^2 + (\mu_q - \mu_p)^2}{2 \sigma_p^2} - \frac12
    """
    m_q, s_q, m_p, s_p = (np.asarray(a, dtype=np.float64) for a in (mean_q, std_q, mean_p, std_p))
    for name, mean in (("mean_q", m_q), ("mean_p", m_p)):
        if not np.isfinite(mean).all():
            msg = f"`{name}` must be finite; received NaN or infinite values."
            raise ValueError(msg)
    for name, std in (("std_q", s_q), ("std_p", s_p)):
        if not (np.isfinite(std) & (std > 0)).all():
            msg = (
                f"`{name}` must hold positive standard deviations; received values from {np.min(std)} to {np.max(std)}."
            )
            raise ValueError(msg)
    return np.log(s_p / s_q) + (s_q**2 + (m_q - m_p) ** 2) / (2.0 * s_p**2) - 0.5


def bernoulli_kl(prob_q: ArrayLike, prob_p: ArrayLike) -> np.ndarray:
    r"""Return :math:`KL(Bern(q) \| Bern(p))` of every element, in nats.

    Parameters
    ----------
    prob_q, prob_p
        Probabilities of a one in [0, 1]; shapes broadcast. The result is infinite where ``prob_p`` rules out what
        ``prob_q`` allows.

    Raises
    ------
    ValueError
        If a value lies outside of [0, 1].
    """
    q, p = np.asarray(prob_q, dtype=np.float64), np.asarray(prob_p, dtype=np.float64)
    for name, prob in (("prob_q", q), ("prob_p", p)):
        if not ((prob >= 0) & (prob <= 1)).all():
            msg = f"`{name}` must hold values between 0 and 1; received values from {np.min(prob)} to {np.max(prob)}."
            raise ValueError(msg)
    return rel_entr(q, p) + rel_entr(1.0 - q, 1.0 - p)
