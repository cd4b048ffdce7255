"""A screen that stays on disk: QC labels, training and effects in little memory, beside a screen in memory.

    python benchmarks/streaming.py write --cells 1000000 --genes 2000 --out screen.zarr
    python benchmarks/streaming.py run screen.zarr --limit-gb 4
    python benchmarks/streaming.py memory screen.zarr --cells 100000
    python benchmarks/streaming.py shuffle --seeds 0 1 2

``run`` ends itself when its resident memory exceeds the limit. The last line of ``run`` and ``memory`` is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
import scvi
import zarr
from anndata.io import read_elem, sparse_dataset, write_elem

import scvi_cradle as cradle
from scvi_cradle.dataloaders import ScreenDataModule

PIECE, N_BASE = 50_000, 20_000
KEYS = {"perturbation_key": "perturbation"}


# ---- a screen written in pieces -----------------------------------------------------------------------------------------


def base_cells(n_genes: int) -> ad.AnnData:
    """Return the cells that pieces are drawn from."""
    cells = cradle.datasets.simulate_perturbseq(
        n_cells=N_BASE, n_genes=n_genes, n_perturbations=100, n_combinations=50, n_batches=4, seed=0
    )
    cells.obs = cells.obs[["perturbation", "batch"]]
    cells.X = sp.csr_matrix(cells.X, dtype=np.float32)
    return cells


def draw_piece(base: ad.AnnData, n_cells: int, rng: np.random.Generator) -> tuple[sp.csr_matrix, np.ndarray]:
    """Return counts of new cells, and the cells of the base that they are: each count is thinned by its cell's share."""
    rows = rng.integers(base.n_obs, size=n_cells)
    counts = base.X[rows]
    share = np.repeat(rng.uniform(0.5, 1.0, n_cells), np.diff(counts.indptr))
    counts.data = rng.binomial(counts.data.astype(np.int64), share).astype(np.float32)
    counts.eliminate_zeros()
    return counts, rows


def write(path: Path, n_cells: int, n_genes: int) -> None:
    """Write a screen piece by piece; no more than a piece is held."""
    base, rng = base_cells(n_genes), np.random.default_rng(0)
    group = zarr.open_group(path, mode="w")
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    rows = []
    for start in range(0, n_cells, PIECE):
        counts, chosen = draw_piece(base, min(PIECE, n_cells - start), rng)
        if start == 0:
            write_elem(group, "X", counts)
        else:
            sparse_dataset(group["X"]).append(counts)
        rows.append(chosen)
        print(f"{start + counts.shape[0]:>10,} cells", flush=True)
    obs = base.obs.iloc[np.concatenate(rows)].copy()
    obs.index = [f"cell_{i}" for i in range(n_cells)]
    write_elem(group, "obs", obs)
    write_elem(group, "var", base.var)


# ---- measures -----------------------------------------------------------------------------------------------------------


def resident_gb() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


class Peak:
    """Largest resident memory of every stage; the process ends where it exceeds a limit."""

    def __init__(self, limit_gb: float) -> None:
        self.limit, self.now = limit_gb, 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.now = max(self.now, resident_gb())
            if self.now > self.limit:
                print(f"resident memory exceeds {self.limit} GB", flush=True)
                os._exit(1)
            time.sleep(0.02)

    def stage(self, function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """Return what a function returns, with its time and the largest memory while it ran."""
        self.now, start = resident_gb(), time.perf_counter()
        result = function()
        return result, {"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(self.now, 2)}


def run(path: Path, limit_gb: float, chunk_size: int, n_chunks: int) -> dict[str, Any]:
    """QC labels, one epoch of two models and effects of all labels, from a screen on disk."""
    peak, rows = Peak(limit_gb), {}

    def label() -> ad.AnnData:
        store = zarr.open_group(path, mode="r")
        lazy = ad.AnnData(
            X=ad.experimental.read_elem_lazy(store["X"]), obs=read_elem(store["obs"]), var=read_elem(store["var"])
        )
        cradle.pp.qc_label(lazy, doublets=None, batch_key="batch")
        return lazy

    lazy, rows["qc_label"] = peak.stage(label)
    for name, artifact in (("CradleVAE", {"artifact_key": "artifact"}), ("SAMSVAE", {})):
        screen, rows[f"{name} screen"] = peak.stage(
            lambda artifact=artifact: ScreenDataModule(
                path, obs=lazy.obs, **KEYS, **artifact, chunk_size=chunk_size, n_chunks=n_chunks
            )
        )
        model = getattr(cradle, name)(registry=screen.registry)
        _, rows[f"{name} epoch"] = peak.stage(
            lambda model=model, screen=screen: model.train(max_epochs=1, datamodule=screen, batch_size=512)
        )
        rows[f"{name} epoch"]["cells_per_second"] = round(screen.n_obs / rows[f"{name} epoch"]["seconds"])
        _, rows[f"{name} effects"] = peak.stage(
            lambda model=model: model.get_average_treatment_effects(n_particles=500)
        )
    for stage, row in rows.items():
        print(f"{stage:20}", row)
    return {"n_cells": lazy.n_obs, "peak_gb": max(row["peak_gb"] for row in rows.values()), "stages": rows}


def memory(path: Path, n_cells: int) -> dict[str, Any]:
    """One epoch of two models on the first cells of a screen, read into memory and on disk."""
    store, rates = zarr.open_group(path, mode="r"), {}
    obs = read_elem(store["obs"]).iloc[:n_cells].copy()
    cells = ad.AnnData(X=sparse_dataset(store["X"])[:n_cells], obs=obs, var=read_elem(store["var"]))
    cradle.pp.qc_label(cells, doublets=None, batch_key="batch")
    part = path.with_name(f"{path.stem}_{n_cells}.zarr")
    if not part.exists():
        cells.write_zarr(part)
    for name, artifact in (("CradleVAE", {"artifact_key": "artifact"}), ("SAMSVAE", {})):
        cls = getattr(cradle, name)
        for where in ("memory", "disk", "memory", "disk"):
            if where == "memory":
                cls.setup_anndata(cells, **KEYS, **artifact)
                model, source = cls(cells), {}
            else:
                screen = ScreenDataModule(part, **KEYS, **artifact)
                model, source = cls(registry=screen.registry), {"datamodule": screen}
            start = time.perf_counter()
            model.train(max_epochs=1, batch_size=512, enable_progress_bar=False, **source)
            rates.setdefault(f"{name} {where}", []).append(round(n_cells / (time.perf_counter() - start)))
            print(name, where, rates[f"{name} {where}"][-1], "cells/s", flush=True)
    return rates


def shuffle(seeds: list[int], folder: Path) -> None:
    """Validation loss of training in memory and from disk, of cells that the file holds sorted by perturbation."""
    for seed in seeds:
        cells = cradle.datasets.simulate_perturbseq(n_cells=20_000, n_genes=500, n_perturbations=30, seed=seed)
        cells = cells[np.argsort(cells.obs["perturbation"].astype(str), kind="stable")].copy()
        cradle.pp.qc_label(cells, doublets=None)
        path = folder / f"sorted_{seed}.zarr"
        cells.write_zarr(path)
        for name, reading in (
            ("memory", None),
            ("32 chunks of 512", {}),
            ("4 chunks of 512", {"n_chunks": 4}),
            ("1 chunk of 512", {"n_chunks": 1}),
            ("32 chunks of 16", {"chunk_size": 16}),
        ):
            scvi.settings.seed = seed
            if reading is None:
                cradle.CradleVAE.setup_anndata(cells, **KEYS, artifact_key="artifact")
                model, source = cradle.CradleVAE(cells), {"split_key": "split"}
            else:
                screen = ScreenDataModule(path, **KEYS, artifact_key="artifact", split_key="split", **reading)
                model, source = cradle.CradleVAE(registry=screen.registry), {"datamodule": screen}
            model.train(max_epochs=15, enable_progress_bar=False, **source)
            loss = model.history["elbo_validation"].iloc[:, 0].to_numpy()
            print(f"seed {seed}  {name:18}", " ".join(f"{v:.2f}" for v in loss[[0, 2, 4, 9, 14]]), flush=True)


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("--cells", type=int, default=1_000_000)
    writing.add_argument("--genes", type=int, default=2_000)
    writing.add_argument("--out", type=Path, required=True)
    running = commands.add_parser("run")
    running.add_argument("path", type=Path)
    running.add_argument("--limit-gb", type=float, default=4.0)
    running.add_argument("--chunk-size", type=int, default=512)
    running.add_argument("--n-chunks", type=int, default=32)
    beside = commands.add_parser("memory")
    beside.add_argument("path", type=Path)
    beside.add_argument("--cells", type=int, default=100_000)
    curves = commands.add_parser("shuffle")
    curves.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    curves.add_argument("--folder", type=Path, default=Path())
    chosen = parser.parse_args()
    if chosen.command == "write":
        write(chosen.out, chosen.cells, chosen.genes)
    elif chosen.command == "run":
        print(json.dumps(run(chosen.path, chosen.limit_gb, chosen.chunk_size, chosen.n_chunks)))
    elif chosen.command == "memory":
        print(json.dumps(memory(chosen.path, chosen.cells)))
    else:
        shuffle(chosen.seeds, chosen.folder)


if __name__ == "__main__":
    main()
