"""Speed and memory of training steps and treatment effects, as ratios within one run.

    OMP_NUM_THREADS=1 python benchmarks/speed.py [--quick] [--json] [--only step memory effects data trainer scaling]

Sides: (a) the published computation (dense, expanded to particles, counts of both branches decoded, sampled and scored, E, M, U
drawn again in the counterfactual pass); (a') the same objective without that waste; (b) SCVI at the same widths; (c) the
roofline, counted operations of matrix products over the rate measured in this run. Losses and gradients are compared before
anything is timed. Rounds are interleaved (A B A B) in one process, one thread, CPU time; a step is forward, backward and Adam.
The last line is one JSON object; ``--quick`` takes fewer rounds and smaller problems (under 10 minutes).
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from _roofline import count_operations, gemm_rate
from _step import (
    BFLOAT16,
    Batch,
    L,
    S,
    Size,
    check,
    gradient_error,
    make_noise,
    make_ours,
    make_plain,
    make_scvi,
    matmul_precision,
    step_ours,
    step_plain,
    step_scvi,
)
from torch import nn

BEST = "medium"  # on the CPU: products of oneDNN instead of MKL
KEYS = (
    *("step_S", "step_L", "step_S_best", "step_L_best", "roofline_S", "roofline_L", "particle_cost"),
    *("effects_S", "effects_S_equal_error", "step_memory_L", "data_gb", "trainer_steps"),
)
PARTS = ("step", "memory", "effects", "data", "trainer", "scaling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    show: Callable[[str], None] = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    parts = args.only or [p for p in PARTS if not (args.quick and p == "scaling")]
    result: dict[str, Any] = dict.fromkeys(KEYS)
    for part in parts:
        start = time.perf_counter()
        result |= RUN[part](quick=args.quick, show=show)
        show(f"({part}: {time.perf_counter() - start:.0f} s)\n")
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}))


# ---- steps -------------------------------------------------------------------------------------------------------------


def run_steps(*, quick: bool, show: Callable[[str], None]) -> dict[str, float]:
    """Time the step of every side at S and L."""
    result: dict[str, float] = {}
    show("| size | side | products | CPU ms, median | (a) / side, median (min..max) | (a') / side |")
    show("|---|---|---|---|---|---|")
    for name, size in (("S", S), ("L", L)):
        result |= time_sides(name, size, (2 if quick else 3) if name == "L" else (3 if quick else 7), show)
    return result


def time_sides(name: str, size: Size, rounds: int, show: Callable[[str], None]) -> dict[str, float]:
    """Return the ratios of a size, after the sides were seen to agree."""
    for published in (True, False):
        small = replace(size, batch=min(size.batch, 48))
        batch = Batch(small)
        ours = make_ours(small, batch)
        errors = check(ours, make_plain(small, batch, ours, as_published=published), batch, make_noise(small))
        side = "published" if published else "plain"
        show(f"| {name} | {LABELS[side]} and ours differ by (losses, gradients) | | | {errors} | |")
    sides = make_sides(size)
    times: dict[str, list[float]] = {key: [] for key in sides}
    for turn in range(rounds + 1):
        for key, (run, setting) in sides.items():
            if turn == 0 and key in ("published", "plain") and size.genes > 5_000:
                continue  # tens of seconds, without anything to warm up
            with matmul_precision(setting):
                used = cpu_time(run)
            if turn:
                times[key].append(used)
    batch = Batch(size)
    floors = {}
    for key, setting in (("ours", "highest"), ("ours best", BEST)):
        with matmul_precision(setting):
            floors[key] = count_operations(size, batch) / gemm_rate()
    for key, (_, setting) in sides.items():
        ratios = [[a / b for a, b in zip(times[side], times[key], strict=True)] for side in ("published", "plain")]
        spread = f"{statistics.median(ratios[0]):.2f} ({min(ratios[0]):.2f}..{max(ratios[0]):.2f})"
        label = f"{name}: {size.genes:,} genes x {size.treatments} treatments, {size.batch} cells"
        show(
            f"| {label} | {LABELS[key]} | {setting} | {1e3 * statistics.median(times[key]):.0f} | {spread} | {statistics.median(ratios[1]):.2f} |"
        )
    for key, floor in floors.items():
        show(
            f"| {name} | roofline of {LABELS[key]} | {sides[key][1]} | {1e3 * floor:.0f} | share {floor / statistics.median(times[key]):.2f} | |"
        )
    module = make_ours(size, batch)
    for setting in (BEST, BFLOAT16):
        error = gradient_error(module, batch, setting)
        show(f"| {name} | largest difference of gradients, {setting} to highest | | | {error:.1e} | |")
    medians = {key: statistics.median(v) for key, v in times.items()}
    found = {
        f"step_{name}": medians["published"] / medians["ours"],
        f"step_{name}_best": medians["published"] / medians["ours best"],
        f"step_{name}_plain": medians["plain"] / medians["ours"],
        f"step_{name}_plain_best": medians["plain"] / medians["ours best"],
        f"roofline_{name}": floors["ours best"] / medians["ours best"],
        f"particle_cost{'' if name == 'S' else '_L'}": medians["ours"] / size.particles / medians["scvi"],
    }
    return {k: float(v) for k, v in found.items()}


LABELS = {
    "published": "(a) published",
    "ours": "scvi_cradle",
    "plain": "(a') plain",
    "ours best": "scvi_cradle, best",
    "ours bf16": "scvi_cradle, bfloat16",
    "scvi": "(b) SCVI, 1 particle",
}


def make_sides(size: Size) -> dict[str, tuple[Callable[[], None], str]]:
    """Return what each side runs, and its precision of products; in the order of a round."""
    batch = Batch(size)
    ours, scvi = make_ours(size, batch), make_scvi(size)
    published = make_plain(size, batch, ours, as_published=True)
    plain = make_plain(size, batch, ours, as_published=False)

    def published_step() -> None:
        make_noise(size)  # drawn again for the counterfactual pass; used from the first draw
        step_plain(published, batch, make_noise(size))

    own = with_adam(ours, lambda: step_ours(ours, batch))
    return {
        "published": (with_adam(published, published_step, fused=False), "highest"),
        "ours": (own, "highest"),
        "plain": (with_adam(plain, lambda: step_plain(plain, batch, make_noise(size))), "highest"),
        "ours best": (own, BEST),
        "ours bf16": (own, BFLOAT16),
        "scvi": (with_adam(scvi, lambda: step_scvi(scvi, batch)), "highest"),
    }


def with_adam(module: nn.Module, backward: Callable[[], Any], *, fused: bool = True) -> Callable[[], None]:
    """Return a full step."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-6, weight_decay=1e-6, fused=fused)

    def run() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return run


def cpu_time(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


# ---- memory, effects, data -----------------------------------------------------------------------------------------------


def run_memory(*, quick: bool, show: Callable[[str], None]) -> dict[str, float]:
    """Measure the peak of a step."""
    from _step_memory import measure_step_memory

    found = measure_step_memory(quick=quick)
    show(f"| working memory of a step at L, n = {64 if quick else 128} | MB |\n|---|---|")
    show(f"| (a) published | {found['published_mb']:.0f} |\n| scvi_cradle | {found['ours_mb']:.0f} |")
    return {"step_memory_L": found["step_memory_L"]}


def run_effects(*, quick: bool, show: Callable[[str], None]) -> dict[str, float]:
    """Time average treatment effects."""
    from _effects_speed import measure_effects

    return _reported(measure_effects(quick=quick), show)


def run_data(*, quick: bool, show: Callable[[str], None]) -> dict[str, float]:
    """Measure the memory of the data."""
    from _data_memory import measure_data_memory

    return _reported(measure_data_memory(quick=quick), show)


def run_trainer(*, quick: bool, show: Callable[[str], None]) -> dict[str, float]:
    """Time a step of a training, one and several per call of the trainer."""
    from _trainer_speed import measure_trainer

    return measure_trainer(quick=quick, show=show)


def _reported(found: dict[str, Any], show: Callable[[str], None]) -> dict[str, float]:
    show("\n".join(f"- {k}: {v:.4g}" if isinstance(v, float) else f"- {k}: {v}" for k, v in found.items()))
    return {k: float(v) for k, v in found.items() if k in KEYS}


# ---- scaling -------------------------------------------------------------------------------------------------------------

SCALING = {
    "genes": (1_000, 2_000, 4_000, 8_000),
    "treatments": (50, 200, 800, 3_200),
    "particles": (1, 2, 4, 8),
    "batch": (64, 128, 256, 512),
}


def run_scaling(*, quick: bool, show: Callable[[str], None]) -> dict[str, float]:
    """Fit the time of a step as a line in each size, the others at 2,000 genes, 200 treatments, 5 particles, 256 cells."""
    base = Size(genes=2_000, treatments=200, batch=256, counts_per_gene=1.0)
    show("| size | CPU ms at four values | fit: ms = a + b x | exponent between first and last |\n|---|---|---|---|")
    for name, values in SCALING.items():
        used = [1e3 * min(step_times(replace(base, **{name: value}), 2 if quick else 5)) for value in values]
        slope, start = np.polyfit(values, used, 1)
        exponent = np.log(used[-1] / used[0]) / np.log(values[-1] / values[0])
        points = ", ".join(f"{v:,}: {t:.0f}" for v, t in zip(values, used, strict=True))
        show(f"| {name} | {points} | {start:.0f} + {slope:.3g} x | {exponent:.2f} |")
    return {}


def step_times(size: Size, rounds: int) -> Iterable[float]:
    """Return CPU seconds of our steps."""
    batch = Batch(size)
    module = make_ours(size, batch)
    run = with_adam(module, lambda: step_ours(module, batch))
    run()
    return [cpu_time(run) for _ in range(rounds)]


RUN = {
    "step": run_steps,
    "memory": run_memory,
    "effects": run_effects,
    "data": run_data,
    "trainer": run_trainer,
    "scaling": run_scaling,
}

if __name__ == "__main__":
    main()
