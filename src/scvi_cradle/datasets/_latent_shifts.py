"""What the simulations from latents share: shifts, a random decoder, cells with labels and a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle._constants import COLUMNS, CONTROL_UNS_KEY

CONTROL = "control"
_LEAK = 0.2
_SHIFT_MEAN, _SHIFT_SD = 5.0, 0.5
SPLITS = ("train", "val", "test")
N_DRAWS = 4096


@dataclass(frozen=True)
class Cells:
    """Cells in random order.

    Parameters
    ----------
    row
        Treatment of every cell, -1 for controls, shape ``(n_cells,)``.
    split
        Position in ``("train", "val", "test")`` of every cell.
    z_basal, z
        Latents before and after the shift of the cell's treatment, shape ``(n_cells, n_latent)``.
    """

    row: np.ndarray
    split: np.ndarray
    z_basal: np.ndarray
    z: np.ndarray


def numbered(prefix: str, n: int) -> list[str]:
    """Return ``n`` names with zero-padded numbers, so that sorting keeps their order."""
    width = max(2, len(str(n)))
    return [f"{prefix}{i + 1:0{width}d}" for i in range(n)]


def draw_embedding(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Draw shifts N(5, 0.5²) with random signs."""
    return rng.normal(_SHIFT_MEAN, _SHIFT_SD, shape) * rng.choice([-1.0, 1.0], shape)


def draw_decoder(rng: np.random.Generator, widths: list[int]) -> list[np.ndarray]:
    """Draw matrices of shape ``(n_in, n_out)`` with orthonormal rows or columns, whichever are fewer."""
    return [_draw_orthogonal(rng, n_in, n_out) for n_in, n_out in zip(widths[:-1], widths[1:], strict=True)]


def _draw_orthogonal(rng: np.random.Generator, n_in: int, n_out: int) -> np.ndarray:
    normal = rng.standard_normal((max(n_in, n_out), min(n_in, n_out)))
    q, r = np.linalg.qr(normal)
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)  # without the signs of r the draw is not uniform
    return q if n_in >= n_out else q.T


def decode(weights: list[np.ndarray], z: np.ndarray) -> np.ndarray:
    """Apply the linear maps without biases, with a leaky ReLU of slope 0.2 between them."""
    hidden = z @ weights[0]
    for weight in weights[1:]:
        hidden = np.maximum(hidden, _LEAK * hidden) @ weight
    return hidden


def draw_cells(rng: np.random.Generator, shifts: np.ndarray, sizes: np.ndarray) -> Cells:
    """Draw standard normal basal latents and add the shift of the cell's treatment.

    Parameters
    ----------
    rng
        Source of randomness.
    shifts
        Shape ``(n_treatments, n_latent)``.
    sizes
        Number of training, validation and test cells of every treatment and, in the last row, of the control,
        shape ``(n_treatments + 1, 3)``.
    """
    groups = np.append(np.arange(len(shifts)), -1)
    row = np.repeat(np.repeat(groups, len(SPLITS)), sizes.ravel())
    split = np.repeat(np.tile(np.arange(len(SPLITS)), len(groups)), sizes.ravel())
    order = rng.permutation(len(row))
    row, split = row[order], split[order]
    z_basal = rng.standard_normal((len(row), shifts.shape[1]))
    return Cells(row, split, z_basal, z_basal + np.vstack([shifts, np.zeros(shifts.shape[1])])[row])


def mean_changes(
    rng: np.random.Generator, shifts: np.ndarray, expression: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Compute by Monte Carlo how far every shift moves the mean expression.

    The same 4,096 basal latents, each with its mirror image, serve all treatments and the control: a treatment
    without a shift has the effect 0, and the odd part of the basal variation cancels.

    Parameters
    ----------
    rng
        Source of randomness.
    shifts
        Shape ``(n_treatments, n_latent)``.
    expression
        Noise-free expression, ``(n_cells, n_genes)``, of latents, ``(n_cells, n_latent)``.

    Returns
    -------
    Array of shape ``(n_treatments, n_genes)``.
    """
    half = rng.standard_normal((N_DRAWS // 2, shifts.shape[1]))
    z_basal = np.concatenate([half, -half])
    level = expression(z_basal).mean(axis=0)
    return np.stack([expression(z_basal + shift).mean(axis=0) - level for shift in shifts])


def to_anndata(
    x: np.ndarray, row: np.ndarray, split: np.ndarray, treatments: list[str], obsm: dict[str, np.ndarray]
) -> AnnData:
    """Return the cells with their names, labels, split, latents and ``uns["control"]``.

    ``row`` and ``split`` are those of :class:`Cells`.
    """
    labels = pd.Categorical.from_codes(np.where(row < 0, len(treatments), row), [*treatments, CONTROL])
    obs = pd.DataFrame(
        {
            COLUMNS.PERTURBATION: labels.reorder_categories(sorted(labels.categories)),
            "split": pd.Categorical.from_codes(split, SPLITS),
        },
        index=pd.Index(numbered("cell_", len(x))),
    )
    return AnnData(
        x.astype(np.float32),
        obs=obs,
        var=pd.DataFrame(index=pd.Index(numbered("gene_", x.shape[1]))),
        obsm=obsm,
        uns={CONTROL_UNS_KEY: CONTROL},
    )


def truth_tables(
    treatments: list[str], mask: np.ndarray, embedding: np.ndarray, effects: np.ndarray
) -> dict[str, pd.DataFrame]:
    """Return ``mask`` and ``embedding`` (treatments x latents) and ``effects`` (treatments x genes) with names."""
    index = pd.Index(treatments, name="treatment")
    latents, genes = numbered("z_", mask.shape[1]), numbered("gene_", effects.shape[1])
    return {
        "mask": pd.DataFrame(mask, index=index, columns=latents),
        "embedding": pd.DataFrame(embedding, index=index, columns=latents),
        "effects": pd.DataFrame(effects, index=index, columns=genes),
    }
