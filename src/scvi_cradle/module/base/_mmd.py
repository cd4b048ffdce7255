"""Maximum mean discrepancy as a training objective."""

from __future__ import annotations

import torch
from torch import Tensor

N_KERNELS = 10
FIRST_WIDTH = 1000 / 2**5


def multiscale_mmd(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the squared maximum mean discrepancy of two samples, a scalar.

    The kernel is :math:`\sum_{i=0}^{9} \exp(-\lVert a-b\rVert^2 / b_i)` with :math:`b_i = 31.25 \cdot 2^i`; means of the
    kernel matrices include their diagonals.

    Parameters
    ----------
    x, y
        Samples, shapes ``(n, n_genes)`` and ``(m, n_genes)``.
    """
    both = torch.cat([x, y])
    squared = both.square().sum(1)
    distance = (squared[:, None] + squared[None, :] - 2 * both @ both.T).clamp_min(0.0)
    kernel = sum((-distance / (FIRST_WIDTH * 2**i)).exp() for i in range(N_KERNELS))
    n = len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
