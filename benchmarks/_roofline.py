"""The least time that the matrix products of a step can take: counted operations over a measured rate."""

from __future__ import annotations

import statistics
import time

import torch
from _step import Batch, Size

SIDE, ROUNDS = 2_048, 5


def gemm_rate() -> float:
    """Return the rate of a square float32 product at the present setting, in operations per second of CPU time."""
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    torch.mm(a, b)
    rates = []
    for _ in range(ROUNDS):
        start = time.process_time()
        torch.mm(a, b)
        rates.append(2 * SIDE**3 / (time.process_time() - start))
    return statistics.median(rates)


def count_operations(size: Size, batch: Batch) -> float:
    """Return the operations of the matrix products of a step, forward and backward, without any that could be spared.

    A layer costs two operations per weight and row, three times: values, gradients of inputs, gradients of weights; twice
    where the inputs need no gradient. Expression is projected once per cell, effects once per treatment of the batch,
    reference profiles once per label.
    """
    p, n, d, h = size.particles, size.batch, size.latent, size.hidden
    rows, effects = p * n, p * len(batch.treatments)
    eligible = (batch.plain["artifact"][:, 0] == 0) & batch.plain["has_reference"]
    labels = len(batch.ours["perturbation"][:, 0][eligible].unique())
    cells = int(eligible.sum())
    data = 4 * (n + labels) * size.genes * h
    products = {
        "q(e | m)": effects * (d * h + 3 * h * h + h * 2 * d),
        "effects in the first layers": effects * 2 * d * h,
        "heads of the encoder": (rows + p * cells + p * labels) * h * 2 * d,
        "decoder": rows * (d * h + h * h),
        "output layer": rows * h * size.genes,
    }
    return data + 6 * sum(products.values())
