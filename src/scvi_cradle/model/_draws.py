"""Seeded draws that generation, counterfactuals and effects share."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from scvi_cradle._validation import check_positive

LIBRARY_GRID = 8


class LibraryDraw(NamedTuple):
    """Library sizes with the covariates of the cells that they come from.

    Parameters
    ----------
    total
        Library sizes, shape ``(n,)``.
    rows
        Rows of the model's ``libraries_`` that were drawn, shape ``(n,)``.
    """

    total: np.ndarray
    rows: np.ndarray


def make_generator(seed: int | None, device: torch.device) -> Generator:
    """Return a generator of its own; ``None`` takes entropy from torch's global generator."""
    value = int(torch.randint(2**63 - 1, (1,))) if seed is None else int(seed)
    return torch.Generator(device=device).manual_seed(value)


def draw_libraries(
    pool: dict[str, np.ndarray],
    n: int,
    library_size: float | str,
    *,
    artifact: bool,
    batch: int | None,
    rng: np.random.Generator,
) -> LibraryDraw:
    """Draw library sizes from the training cells of the same flag (and batch), or fix them.

    Raises
    ------
    ValueError
        If ``library_size`` is neither ``"observed"`` nor a positive number, or if no training cell has the flag.
    """
    if isinstance(library_size, str) and library_size != "observed":
        msg = f"`library_size` must be 'observed' or a positive number; received {library_size!r}."
        raise ValueError(msg)
    if not isinstance(library_size, str):
        check_positive("library_size", library_size)
    in_batch = np.ones(len(pool["batch"]), dtype=bool) if batch is None else pool["batch"] == batch
    eligible = np.flatnonzero((pool["artifact"] == artifact) & in_batch)
    if not len(eligible) and not isinstance(library_size, str) and (pool["artifact"] == artifact).any():
        eligible = np.flatnonzero(in_batch)  # the size is given, only covariates are drawn
    if not len(eligible):
        kind = "failed" if artifact else "passed"
        msg = f"Library sizes are drawn from training cells that {kind} QC; received a request for which there is none{'' if batch is None else ' in this batch'}: {'ask for another batch' if batch is not None else f'train with such cells or ask for `artifact={not artifact}`'}."
        raise ValueError(msg)
    weight = pool["weight"][eligible]
    rows = rng.choice(eligible, n, p=weight / weight.sum())
    total = pool["total"][rows] if isinstance(library_size, str) else np.full(n, float(library_size))
    return LibraryDraw(np.maximum(total, 1.0).astype(np.float32), rows)


def covariate_tensors(pool: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, Tensor]:
    """Return the batch and covariates of rows of the pool, by the names that scvi-tools gives them."""
    tensors = {"batch": torch.as_tensor(pool["batch"][rows])[:, None]}
    if "categorical" in pool:
        tensors["extra_categorical_covs"] = torch.as_tensor(pool["categorical"][rows])
    if "continuous" in pool:
        tensors["extra_continuous_covs"] = torch.as_tensor(pool["continuous"][rows], dtype=torch.float32)
    return tensors


def library_grid(
    pool: dict[str, np.ndarray], total: np.ndarray, library_size: float | str
) -> tuple[np.ndarray, np.ndarray]:
    """Return at most eight representative library sizes and the nearest one, in its logarithm, of every drawn size.

    They do not depend on the draw: midpoints of quantiles of the training cells that passed QC, or the fixed size.
    """
    if not isinstance(library_size, str):
        return np.array([total[0]], dtype=np.float64), np.zeros(len(total), dtype=int)
    passed = pool["artifact"] == False  # noqa: E712 - an array
    order = np.argsort(pool["total"][passed])
    sizes, weight = np.maximum(pool["total"][passed][order], 1.0), pool["weight"][passed][order]
    grid = np.unique(sizes)
    if len(grid) > LIBRARY_GRID:
        middle = (np.arange(LIBRARY_GRID) + 0.5) / LIBRARY_GRID
        grid = np.unique(sizes[np.searchsorted(weight.cumsum() / weight.sum(), middle)])
    grid = grid.astype(np.float64)
    return grid, np.searchsorted(np.sqrt(grid[1:] * grid[:-1]), total)


def as_module_input(tensors: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move tensors to a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in tensors.items()}
