"""``python -m scvi_cradle.benchmark``: the papers' tables over any data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from scvi_cradle.benchmark._benchmark import run_benchmark
from scvi_cradle.benchmark._models import PRESETS, REGISTRY
from scvi_cradle.benchmark._screen import first_line
from scvi_cradle.benchmark._settings import EXPERIMENTS, BenchmarkSettings

USER_ERRORS = (FileNotFoundError, KeyError, TypeError, ValueError)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Parameters
    ----------
    arguments
        Words of the command line. Default: those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scvi_cradle.benchmark",
        description="Compare models and baselines on a perturbation screen; a killed run goes on where it was.",
        epilog="models: " + ", ".join(REGISTRY),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("data", type=Path, help="AnnData file (.h5ad) with raw counts")
    add("--perturbation-key", required=True, help="column of obs with the perturbation labels")
    add("--control", nargs="+", required=True, help="label or labels of control cells")
    add("--out", type=Path, required=True, help="folder for the results")
    add("--sep", default="+", help="text between treatments; '' if labels are never split (default: +)")
    add("--layer", help="layer with the raw counts (default: X)")
    add("--batch-key", help="column of obs with batches")
    add("--artifact-key", help="column of obs that is True for cells that failed QC, instead of --thresholds")
    add("--thresholds", type=float, nargs="+", help="widths of the QC thresholds in MADs (default: 3 4 5)")
    add("--split-key", help="column of obs with train, val, test, unused (default: a split for every seed)")
    known = "; ".join(f"{name}: {what}" for name, what in EXPERIMENTS.items())
    add("--experiment", default="effects", help=f"{known} (default: effects)")
    add("--fractions", type=float, nargs="+", help="shares for ood and efficiency (default: 0 0.25 0.5 0.75 1)")
    add("--preset", default="recommended", help=f"settings of the models: {', '.join(PRESETS)} (default: recommended)")
    add("--models", nargs="+", help="names of models and baselines, see below (default: all)")
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of splits and trainings (default: 0)")
    add("--max-steps", type=int, help="training steps (default: the preset's)")
    add("--jobs", type=int, default=1, help="processes on this machine (default: 1)")
    add("--scheduler", help="address of a Dask scheduler, instead of --jobs (extra: cluster)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Parameters
    ----------
    arguments
        Words of the command line. Default: those of the process.

    Returns
    -------
    0; 1 if a cell failed; 2, with one sentence, for input that cannot be used.
    """
    options = parse(arguments)
    mpl.use("Agg")
    lists = {name: getattr(options, name) for name in ("thresholds", "fractions", "models")}
    settings = BenchmarkSettings(
        data=options.data,
        perturbation_key=options.perturbation_key,
        control=tuple(options.control),
        sep=options.sep or None,
        layer=options.layer,
        batch_key=options.batch_key,
        artifact_key=options.artifact_key,
        split_key=options.split_key,
        experiment=options.experiment,
        preset=options.preset,
        seeds=tuple(options.seeds),
        max_steps=options.max_steps,
        **{name: None if values is None else tuple(values) for name, values in lists.items()},
    )
    try:
        result = run_benchmark(settings, out=options.out, jobs=options.jobs, scheduler=options.scheduler)
    except USER_ERRORS as error:
        sys.stderr.write(f"error: {first_line(error)}.\n")
        return 2
    sys.stdout.write(f"{result.text}\nResults are in {options.out}.\n")
    if len(result.errors):
        sys.stderr.write(
            f"error: {len(result.errors)} cells failed, each with its reason in {options.out / 'errors.csv'}.\n"
        )
    return int(len(result.errors) > 0)


if __name__ == "__main__":
    sys.exit(main())
