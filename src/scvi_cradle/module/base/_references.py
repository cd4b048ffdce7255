"""Reference profiles of the counterfactual term: what failed cells of a label look like."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class References(nn.Module):
    """One profile of counts for every label with failed training cells (CRADLE-VAE, sec. 3.3.4).

    Parameters
    ----------
    n_genes
        Number of genes.
    resample
        Make a new profile from ``n_samples`` failed cells at every call instead of returning the stored one.
    n_samples
        Failed cells drawn (with replacement) per profile.
    statistic
        ``"median"`` or ``"mean"`` of the drawn cells.
    """

    row_of_label: Tensor
    profiles: Tensor

    def __init__(self, n_genes: int, *, resample: bool, n_samples: int, statistic: str) -> None:
        super().__init__()
        self.resample, self.n_samples, self.statistic = resample, n_samples, statistic
        self.register_buffer("row_of_label", torch.full((1,), -1), persistent=False)
        self.register_buffer("profiles", torch.zeros(0, n_genes), persistent=False)
        self.pools: tuple[Any, ...] = ()

    def resize(self, n_labels: int) -> None:
        """Make room for the labels of a query, which have no profile."""
        rows = self.row_of_label.new_full((n_labels,), -1)
        known = min(n_labels, len(self.row_of_label))
        rows[:known] = self.row_of_label[:known]
        self.row_of_label = rows

    def set(self, labels: np.ndarray, profiles: np.ndarray, pools: tuple[Any, ...]) -> None:
        """Set the profiles of some label codes, and the failed cells (CSR) that they come from."""
        device = self.profiles.device
        self.row_of_label = torch.full_like(self.row_of_label, -1)
        self.row_of_label[torch.as_tensor(labels, device=device)] = torch.arange(len(labels), device=device)
        self.profiles = torch.as_tensor(profiles, dtype=self.profiles.dtype, device=device)
        self.pools = pools

    def available(self, labels: Tensor) -> Tensor:
        """Return which label codes have a profile."""
        return self.row_of_label[labels] >= 0

    def forward(self, labels: Tensor) -> Tensor:
        """Return the counts of the profiles of label codes, shape ``(n_labels, n_genes)``."""
        rows = self.row_of_label[labels]
        return torch.stack([self._draw(row) for row in rows.tolist()]) if self.resample else self.profiles[rows]

    def _draw(self, row: int) -> Tensor:
        pool = self.pools[row]
        chosen = torch.randint(pool.shape[0], (min(self.n_samples, pool.shape[0]),)).numpy()
        cells = torch.as_tensor(pool[chosen].toarray(), dtype=self.profiles.dtype, device=self.profiles.device)
        return cells.mean(0) if self.statistic == "mean" else cells.quantile(0.5, dim=0)
