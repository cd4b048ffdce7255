"""What all models of one split and one QC threshold share: split, flags, measured effects, ceiling; kept on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_cradle import metrics, pp
from scvi_cradle._constants import COLUMNS, QC_CRITERIA, QC_UNS_KEY
from scvi_cradle._validation import preview
from scvi_cradle.benchmark._cell_scores import references
from scvi_cradle.benchmark._models import FAILED, FLAG, PASSED, SPLIT
from scvi_cradle.benchmark._screen import Screen, scored_labels
from scvi_cradle.benchmark._settings import THRESHOLDS, Cell
from scvi_cradle.benchmark._store import new_folder

TEST_FRACTION, VAL_FRACTION = 0.25, 0.2
N_REPEATS = 10
DOUBLETS_SEED = 0


@dataclass(frozen=True)
class Fold:
    """Split, flags and what predictions are compared with.

    Parameters
    ----------
    name
        What is held out.
    split
        ``"train"``, ``"val"``, ``"test"`` or ``"unused"``, shape ``(n_cells,)``.
    failed
        True for cells that failed quality control, shape ``(n_cells,)``.
    held_out
        Labels to predict.
    control_split
        Part of the split with the controls of the measured effects.
    real, train
        Measured effects of held-out cells and of training cells, of those that passed.
    ceiling
        Result of :func:`scvi_cradle.metrics.replicate_ceiling` for the cells that ``real`` is measured on.
    generated
        What generated cells are compared with, as of ``_cell_scores.references``.
    records
        Records of :func:`scvi_cradle.pp.qc_label`: ``"own"`` thresholds, and those of the papers by their width.
    notes
        Labels that are not predicted, and warnings that were given on the way.
    """

    name: str
    split: np.ndarray
    failed: np.ndarray
    held_out: list[str]
    control_split: str
    real: AnnData
    train: AnnData
    ceiling: pd.DataFrame
    generated: dict[str, Any]
    records: dict[str, Any]
    notes: tuple[str, ...] = ()

    def prepared(self, screen: Screen) -> AnnData:
        """Return the training and validation cells as models take them."""
        rows = np.isin(self.split, ("train", "val"))
        cells = screen.adata[rows].copy()
        cells.obs = cells.obs.assign(**self._columns(rows))
        return cells

    def held_out_cells(self, screen: Screen, *, passed: bool) -> AnnData:
        """Return the held-out cells of the labels to predict, all or those that passed."""
        rows = (self.split == "test") & np.isin(screen.labels, self.held_out)
        rows = rows & ~self.failed if passed else rows
        cells = screen.adata[rows].copy()
        cells.obs = cells.obs.assign(**self._columns(rows))
        return cells

    def _columns(self, rows: np.ndarray) -> dict[str, Any]:
        failed = self.failed[rows]
        quality = pd.Categorical(np.where(failed, FAILED, PASSED), categories=[PASSED, FAILED])
        return {SPLIT: self.split[rows], COLUMNS.ARTIFACT: failed, FLAG: quality}

    def write(self, path: Path) -> None:
        """Write the fold into a folder, in one step."""
        uns = {"name": self.name, "held_out": np.array(self.held_out, dtype=str), "control_split": self.control_split}
        uns |= {
            "ceiling": self.ceiling,
            "generated": self.generated,
            "records": self.records,
            "notes": np.array(self.notes, dtype=str),
        }
        obs = pd.DataFrame({SPLIT: pd.Categorical(self.split), "failed": self.failed})
        with new_folder(path) as folder:
            AnnData(obs=obs.set_index(obs.index.astype(str)), uns=uns).write_h5ad(folder / "cells.h5ad")
            self.real.write_h5ad(folder / "real.h5ad")
            self.train.write_h5ad(folder / "train.h5ad")

    @classmethod
    def read(cls, path: Path) -> Fold:
        """Read a fold from a folder."""
        cells, real, train = (anndata.read_h5ad(path / f"{name}.h5ad") for name in ("cells", "real", "train"))
        return cls(
            name=str(cells.uns["name"]),
            split=cells.obs[SPLIT].astype(str).to_numpy(),
            failed=cells.obs["failed"].to_numpy(dtype=bool),
            held_out=[str(label) for label in cells.uns["held_out"]],
            control_split=str(cells.uns["control_split"]),
            real=real,
            train=train,
            ceiling=cells.uns["ceiling"],
            generated=dict(cells.uns["generated"]),
            records=dict(cells.uns["records"]),
            notes=tuple(str(note) for note in cells.uns["notes"]),
        )


def make_fold(screen: Screen, cell: Cell, doublets: np.ndarray | None) -> Fold:
    """Split the cells, flag those that failed, and measure what is to be predicted.

    Parameters
    ----------
    screen
        The data.
    cell
        Any cell of the matrix with this split and threshold.
    doublets
        Doublet calls, shape ``(n_cells,)``; needed unless the flags are the user's.

    Raises
    ------
    ValueError
        If the data lack what the experiment needs, in one sentence.
    """
    name, split, candidates = make_split(screen, cell)
    failed, records = _label(screen, cell, split, doublets)
    labels, control = screen.labels, screen.rule.control_name
    trained = set(labels[(split == "train") & ~failed])
    known = {t for label in trained for t in screen.rule.treatments(label)}
    if candidates is None:
        candidates = sorted(set(labels[split == "test"]) - {control})
    trainable = [label for label in candidates if known.issuperset(screen.rule.treatments(label))]
    held_out, control_split, _ = scored_labels(labels, split, failed, control, trainable)
    lacking = sorted(set(candidates) - set(held_out))
    truth = ~failed & (
        ((split == "test") & np.isin(labels, held_out)) | ((split == control_split) & (labels == control))
    )
    measured = screen.adata[truth].copy()
    train = metrics.average_treatment_effects(screen.adata[(split == "train") & ~failed], **screen.reading)
    others = screen.adata[(split == "train") & ~failed & (labels != control)].copy()
    controls = labels[truth] == control
    return Fold(
        name=name,
        split=split,
        failed=failed,
        held_out=held_out,
        control_split=control_split,
        real=metrics.average_treatment_effects(measured, **screen.reading)[held_out].copy(),
        train=train,
        ceiling=metrics.replicate_ceiling(measured, **screen.reading, n_repeats=N_REPEATS, seed=cell.seed, train=train),
        generated=references(measured[~controls], others, measured[controls], held_out, seed=cell.seed),
        records=records,
        notes=(f"Not predicted, too few held-out or training cells that passed: {preview(lacking, 20)}.",)
        * bool(lacking),
    )


def make_split(screen: Screen, cell: Cell) -> tuple[str, np.ndarray, list[str] | None]:
    """Return what is held out in words, the part of every cell, and the labels to predict (``None``: all held-out ones)."""
    if cell.experiment != "effects":
        return _split_combinations(screen, cell)
    if screen.split is not None:
        return "given split", screen.split, None
    try:
        return "combinations", _split(screen, cell.seed, "combinations", TEST_FRACTION), None
    except ValueError:  # none that could be held out
        return "cells", _split(screen, cell.seed, "cells", TEST_FRACTION), None


def _split(screen: Screen, seed: int, scheme: str, test_fraction: float) -> np.ndarray:
    labelled = AnnData(obs=screen.adata.obs[[COLUMNS.PERTURBATION]].copy())
    options = {"test_fraction": test_fraction, "val_fraction": VAL_FRACTION, "seed": seed, "key_added": SPLIT}
    pp.split_perturbations(labelled, scheme=scheme, **screen.reading, **options)  # type: ignore[arg-type]
    return np.array(labelled.obs[SPLIT].astype(str), dtype=object)


def _split_combinations(screen: Screen, cell: Cell) -> tuple[str, np.ndarray, list[str]]:
    """Split for experiments on combinations whose treatments also occur alone.

    Controls: 64 % train, 16 % val, 20 % test. Other cells that are not held out: train and val.
    """
    parts = {label: screen.rule.treatments(label) for label in screen.perturbations}
    alone = {treatments[0] for treatments in parts.values() if len(treatments) == 1}
    pairs = [label for label, treatments in parts.items() if len(treatments) > 1 and alone.issuperset(treatments)]
    if not pairs:
        n = sum(len(treatments) > 1 for treatments in parts.values())
        msg = (
            f"The experiment {cell.experiment!r} needs combinations whose treatments also occur alone; received none "
            f"among {n} combinations: check `sep`, or use experiment='effects'."
        )
        raise ValueError(msg)
    rng = np.random.default_rng(cell.seed)
    labels = screen.labels
    split = _split(screen, cell.seed, "cells", VAL_FRACTION)
    combined = np.array([len(parts.get(label, ())) > 1 for label in labels])
    control = labels == screen.rule.control_name
    if cell.experiment == "efficiency":
        split[combined & ~np.isin(labels, pairs)] = "unused"
        split[~combined & ~control & (split == "test")] = "train"
        cells = rng.permutation(np.flatnonzero(combined & np.isin(split, ("train", "val"))))
        split[cells[int((cell.fraction or 0.0) * len(cells)) :]] = "unused"
        return f"cells; training on {cell.fraction:.0%} of those of combinations", split, pairs
    split[~control & (split == "test")] = "train"
    n_test = len(pairs) if cell.experiment == "doubles" else math.ceil(TEST_FRACTION * len(pairs))
    shuffled = rng.permutation(pairs).tolist()
    rest, held_out = shuffled[: len(pairs) - n_test], sorted(shuffled[len(pairs) - n_test :])
    kept = rest[: int((cell.fraction or 0.0) * len(rest))]
    split[combined & ~np.isin(labels, kept)] = "unused"
    split[np.isin(labels, held_out)] = "test"
    if cell.experiment == "doubles":
        return f"all {len(pairs)} combinations of singles", split, held_out
    return f"{n_test} combinations; training on {cell.fraction:.0%} of {len(rest)} others", split, held_out


def call_doublets(screen: Screen) -> np.ndarray:
    """Return doublet calls, shape ``(n_cells,)``; they depend neither on a split nor on a threshold."""
    cells = screen.adata.copy()
    pp.qc_label(cells, criteria=(QC_CRITERIA.DOUBLET,), batch_key=screen.batch_key, seed=DOUBLETS_SEED)
    return cells.obs[f"qc_{QC_CRITERIA.DOUBLET}"].to_numpy(dtype=bool)


def _label(
    screen: Screen, cell: Cell, split: np.ndarray, doublets: np.ndarray | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return flags and records; thresholds are fitted on training cells."""
    if screen.failed is not None:
        return screen.failed, {} if screen.record is None else {"own": screen.record}
    if doublets is None or cell.threshold is None:
        msg = f"Quality control needs a threshold and doublet calls; received {cell!r} and {doublets!r}."
        raise ValueError(msg)
    failed, records = np.zeros(0, dtype=bool), {}
    for n_mads in dict.fromkeys((cell.threshold, *THRESHOLDS)):
        cells = AnnData(screen.adata.X, obs=screen.adata.obs.assign(called_doublet=doublets), var=screen.adata.var)
        options = {"batch_key": screen.batch_key, "reference": split == "train", "doublets": "called_doublet"}
        pp.qc_label(cells, n_mads=n_mads, **options)
        records[f"{n_mads:g}"] = cells.uns[QC_UNS_KEY]
        if n_mads == cell.threshold:
            failed = cells.obs[COLUMNS.ARTIFACT].to_numpy(dtype=bool)
            records["own"] = cells.uns[QC_UNS_KEY]
    return failed, records
