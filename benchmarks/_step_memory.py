"""Peak of resident memory during one training step, above weights, gradients and batch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path


def measure_step_memory(*, quick: bool = False) -> dict[str, float]:
    """Return the peaks in MB of both sides (each in a process of its own) and their ratio.

    128 cells at 19,018 genes x 105 treatments; for ``quick`` 64 cells.
    """
    n_cells = 64 if quick else 128
    peaks = {}
    for side in ("ours", "published"):
        command = [sys.executable, __file__, side, str(n_cells)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        peaks[side] = float(result.stdout.split()[-1])
    return {
        "ours_mb": peaks["ours"],
        "published_mb": peaks["published"],
        "step_memory_L": peaks["published"] / peaks["ours"],
    }


def peak(side: str, n_cells: int) -> float:
    """Return the peak of one side in MB."""
    import torch
    from _step import Batch, L, make_noise, make_ours, make_plain, step_ours, step_plain

    torch.set_num_threads(1)
    size = replace(L, batch=n_cells)
    batch = Batch(size)
    module = make_ours(size, batch)
    if side == "published":
        module = make_plain(size, batch, module, as_published=True)
    small = Batch(replace(size, batch=2))
    for data, scale in ((small, 2), (batch, n_cells)):  # the first step loads libraries
        if data is batch:
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter).add_(0.0)
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        if side == "ours":
            step_ours(module, data)
        else:
            step_plain(module, data, make_noise(replace(size, batch=scale)))
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> float:
    """Return a field of the process's memory in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    print(peak(sys.argv[1], int(sys.argv[2])))
