"""``python -m scvi_cradle.benchmark.demo``: the whole way, on simulated data or on a file."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from scvi import settings as scvi_settings

from scvi_cradle.benchmark._prepare import LOGGER, DemoSettings, prepare
from scvi_cradle.benchmark._run import quiet, run_prepared
from scvi_cradle.benchmark._store import make_folder

USER_ERRORS = (FileNotFoundError, KeyError, TypeError, ValueError)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Parameters
    ----------
    arguments
        Words of the command line. Default: those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scvi_cradle.benchmark.demo",
        description="Label failed cells, train CradleVAE, generate cells of held-out perturbations and compare with baselines.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", type=Path, help="AnnData file (.h5ad) with raw counts; default: a simulated screen")
    add("--perturbation-key", help="column of obs with the perturbation labels (needed with --data)")
    add("--control", nargs="+", default=["control"], help="label or labels of control cells (default: control)")
    add(
        "--sep",
        default="+",
        help="text between the treatments of a combination; '' if labels are never split (default: +)",
    )
    add("--layer", help="layer with the raw counts (default: X)")
    add("--batch-key", help="column of obs with batches")
    add("--artifact-key", help="column of obs that is True for failed cells (default: made by pp.qc_label)")
    add("--n-mads", type=float, default=5.0, help="width of the QC thresholds in MADs (default: 5)")
    add("--out", type=Path, default=Path("demo_output"), help="folder for the results (default: demo_output)")
    add("--seed", type=int, default=0, help="seed of everything that is random (default: 0)")
    add("--max-steps", type=int, help="training steps (default: the model's)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code: 0, or 2 with one sentence for input that cannot be used.

    Parameters
    ----------
    arguments
        Words of the command line. Default: those of the process.
    """
    options = parse(arguments)
    mpl.use("Agg")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level, propagate = LOGGER.level, LOGGER.propagate
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    LOGGER.addHandler(handler)
    try:
        return _run(options)
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate


def _run(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    scvi_settings.seed = options.seed
    settings = DemoSettings(
        data=options.data,
        perturbation_key=options.perturbation_key,
        control=tuple(options.control),
        sep=options.sep or None,
        layer=options.layer,
        batch_key=options.batch_key,
        artifact_key=options.artifact_key,
        n_mads=options.n_mads,
        max_steps=options.max_steps,
        seed=options.seed,
    )
    with quiet():
        try:
            prepared = prepare(settings)
            make_folder(options.out)
        except USER_ERRORS as error:
            sys.stderr.write(f"error: {error.args[0] if error.args else error}\n")
            return 2
        run_prepared(prepared, settings, options.out)
    LOGGER.info("\nDone in %.0f s.", time.perf_counter() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
