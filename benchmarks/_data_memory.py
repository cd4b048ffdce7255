"""Memory that data take from registration to generated cells: peak of the resident memory of a fresh process.

``python benchmarks/_data_memory.py`` measures the full size, ``--quick`` two smaller ones; nothing else is written.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

N_CELLS, N_GENES, DENSITY = 111_255, 19_018, 0.16
N_TREATMENTS = 105
QUICK_CELLS = (8_000, 16_000)
GB = 1e9
DTYPES = ("float32", "uint16")


def measure_data_memory(quick: bool = False) -> dict[str, Any]:  # noqa: FBT001, FBT002
    """Measure the peak of resident memory, beyond that of the imports, of data of the largest published screen.

    Parameters
    ----------
    quick
        8,000 and 16,000 cells, from which 111,255 are reckoned by a straight line, instead of 111,255.

    Returns
    -------
    ``data_gb`` and ``data_gb_uint16``: peak in 1e9 bytes with counts stored as float32 and as uint16; ``parts``: for each,
    the stored counts and the peak of every stage, and ``model_gb``, the weights with gradients and states of Adam, which is
    part of the peaks of training. With ``quick`` also the sizes measured.
    """
    if not quick:
        parts = {dtype: _in_a_process(N_CELLS, dtype) for dtype in DTYPES}
        return {"data_gb": parts["float32"]["peak"], "data_gb_uint16": parts["uint16"]["peak"], "parts": parts}
    sizes = {n: {dtype: _in_a_process(n, dtype) for dtype in DTYPES} for n in QUICK_CELLS}
    low, high = QUICK_CELLS
    share = (N_CELLS - low) / (high - low)
    parts = {
        dtype: {
            stage: value + share * (sizes[high][dtype][stage] - value) for stage, value in sizes[low][dtype].items()
        }
        for dtype in DTYPES
    }
    return {
        "data_gb": parts["float32"]["peak"],
        "data_gb_uint16": parts["uint16"]["peak"],
        "parts": parts,
        "measured": sizes,
    }


def _in_a_process(n_cells: int, dtype: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--stages", str(n_cells), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2_000:])
    return json.loads(done.stdout.splitlines()[-1])


def _status(field: str) -> float:
    """Return a field of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024.0 * int(line.split()[1])
    raise KeyError(field)


class _Peaks:
    """Peaks of stages over what was resident before the first."""

    def __init__(self) -> None:
        gc.collect()
        self.start, self.of = _status("VmRSS"), {}

    def stage(self, name: str) -> None:
        self.of[name] = (_status("VmHWM") - self.start) / GB
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew


def _counts(n_cells: int, dtype: str, rng: np.random.Generator) -> sp.csr_matrix:
    """Return counts, made in blocks: every cell has a gene in each of the strata that all genes are cut into."""
    per_cell = round(DENSITY * N_GENES)
    edges = np.linspace(0, N_GENES, per_cell + 1).astype(np.int64)
    first, width = edges[:-1], np.diff(edges)
    values = np.minimum(rng.geometric(0.5, 4_096), 200).astype(dtype)
    data, indices = np.empty(n_cells * per_cell, dtype=dtype), np.empty(n_cells * per_cell, dtype=np.int32)
    for start in range(0, n_cells, 1_000):
        n = min(1_000, n_cells - start)
        part = slice(start * per_cell, (start + n) * per_cell)
        data[part] = values[rng.integers(0, len(values), n * per_cell, dtype=np.uint16)]
        indices[part] = (first + rng.random((n, per_cell), dtype=np.float32) * (width - 1e-3)).ravel()
    indptr = (np.arange(n_cells + 1) * per_cell).astype(np.int32)
    counts = sp.csr_matrix((n_cells, N_GENES), dtype=dtype)
    counts.data, counts.indices, counts.indptr = data, indices, indptr
    return counts


def _run_stages(n_cells: int, dtype: str) -> dict[str, float]:
    import anndata as ad
    import pandas as pd
    import torch

    from scvi_cradle import CradleVAE, pp

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    _tiny_run(rng)  # what libraries load and keep on first use is not memory for data
    peaks = _Peaks()
    counts = _counts(n_cells, dtype, rng)
    label = rng.integers(0, N_TREATMENTS + 1, n_cells)
    obs = pd.DataFrame(
        {"perturbation": pd.Categorical(np.array(["control", *(f"T{i:03}" for i in range(N_TREATMENTS))])[label])},
        index=[f"c{i}" for i in range(n_cells)],
    )
    adata = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]))
    del counts
    peaks.stage("data")
    pp.qc_label(adata, doublets=None, key_added="artifact")
    peaks.stage("qc_label")
    adata.obs["artifact"] = rng.random(n_cells) < 0.1
    CradleVAE.setup_anndata(adata, perturbation_key="perturbation", artifact_key="artifact")
    peaks.stage("setup_anndata")
    model = CradleVAE(adata)
    peaks.stage("model")
    model.train(max_steps=3, batch_size=32, accelerator="cpu", enable_progress_bar=False)
    peaks.stage("train")
    model.get_generated_expression(["T000", "control"], n_samples=50, seed=0)
    peaks.stage("generate")
    x = adata.X
    assert x.dtype == dtype  # nothing of the user's was converted
    weights = sum(p.numel() for p in model.module.parameters())
    return {
        "stored": (x.data.nbytes + x.indices.nbytes + x.indptr.nbytes) / GB,
        **peaks.of,
        "peak": max(peaks.of.values()),
        "model_gb": 4 * 4 * weights / GB,
    }


def _tiny_run(rng: np.random.Generator) -> None:
    import anndata as ad
    import pandas as pd

    from scvi_cradle import CradleVAE, pp

    obs = pd.DataFrame({"perturbation": ["control", "A"] * 50, "flag": [True, False, False, True] * 25})
    tiny = ad.AnnData(
        sp.csr_matrix(rng.poisson(2.0, (100, 50)).astype(np.float32)), obs=obs.set_index(obs.index.astype(str))
    )
    pp.qc_label(tiny, doublets=None)
    CradleVAE.setup_anndata(tiny, perturbation_key="perturbation", artifact_key="flag")
    model = CradleVAE(tiny, n_latent=5)
    model.train(max_steps=3, batch_size=32, accelerator="cpu", enable_progress_bar=False)
    model.get_generated_expression(n_samples=10, seed=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stages", nargs=2, metavar=("N_CELLS", "DTYPE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stages:
        print(json.dumps(_run_stages(int(given.stages[0]), given.stages[1])))
    else:
        print(json.dumps(measure_data_memory(quick=given.quick), indent=2))
