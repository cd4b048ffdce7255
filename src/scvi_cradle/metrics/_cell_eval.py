"""Real and predicted cells in the form that cell-eval reads, and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from scvi_cradle._labels import LabelRule
from scvi_cradle._matrix import to_csr
from scvi_cradle.metrics._cells import Cells, check_predicted

TARGET, CONTROL = "target", "non-targeting"  # cell-eval's own defaults


def to_cell_eval(
    real: AnnData,
    predicted: AnnData,
    *,
    perturbation_key: str = "perturbation",
    control: str | Sequence[str] = "control",
    sep: str | None = "+",
    layer: str | None = None,
    seed: int | None = 0,
) -> tuple[AnnData, AnnData]:
    """Bring real and predicted cells into the form that cell-eval and cell-eval2 read.

    Parameters
    ----------
    real, predicted, perturbation_key, control, sep, layer
        As for :func:`evaluate`.
    seed
        Seed of the halves of the controls, where ``predicted`` holds none.

    Returns
    -------
    Real and predicted cells of the perturbations of ``predicted`` and of the controls: raw counts in ``X`` (CSR,
    float32), the genes of ``real`` in its order, labels in ``obs["target"]``, controls ``"non-targeting"``. Without
    controls of its own ``predicted`` gets one half of the real ones and ``real`` keeps the other half.

    Raises
    ------
    KeyError, ValueError
        As :func:`evaluate`; ``ValueError`` also for a predicted perturbation called ``"non-targeting"`` beside other
        controls.
    """
    rule = LabelRule.create(control, sep)
    truth = Cells.read(real, perturbation_key, rule, layer=layer, name="real")
    other = Cells.read_predicted(predicted, perturbation_key, rule, layer)
    check_predicted(truth, other)
    if CONTROL in other.perturbations:
        msg = f"No perturbation may be called {CONTROL!r}, cell-eval's name of the controls; received it beside control={control!r}: name it in `control` if its cells are controls, else rename it."
        raise ValueError(msg)
    kept = [*other.perturbations, rule.control_name]
    if rule.control_name in other.labels:
        return _cells(truth, kept, None), _cells(other, kept, None, truth.genes)
    half = truth.parts(np.random.default_rng(seed), 2, among=[rule.control_name])
    ours, theirs = _cells(truth, kept, half == 0), _cells(truth, [rule.control_name], half == 1)
    cells = _cells(other, kept, None, truth.genes)
    theirs.obs_names = [f"control_{i}" for i in range(theirs.n_obs)]
    matrix = to_csr(sp.vstack([cells.X, theirs.X]))
    obs = pd.concat([cells.obs, theirs.obs]).astype({TARGET: "category"})
    return ours, AnnData(matrix, obs=obs, var=cells.var)


def write_cell_eval(
    real: AnnData,
    predicted: AnnData,
    folder: str | Path,
    *,
    perturbation_key: str = "perturbation",
    control: str | Sequence[str] = "control",
    sep: str | None = "+",
    layer: str | None = None,
    seed: int | None = 0,
) -> tuple[Path, Path]:
    """Write ``real.h5ad`` and ``predicted.h5ad`` for cell-eval or cell-eval2.

    Parameters
    ----------
    real, predicted, perturbation_key, control, sep, layer, seed
        As for :func:`to_cell_eval`.
    folder
        Where to write; made where it does not exist, files of these names are replaced.

    Returns
    -------
    The two paths, real cells first. They hold raw counts, as cell-eval2 wants them (``--preset vcc2026``); cell-eval
    normalises counts by itself.

    Raises
    ------
    KeyError, ValueError
        As :func:`evaluate`.
    """
    arguments = {"perturbation_key": perturbation_key, "control": control, "sep": sep, "layer": layer, "seed": seed}
    pair = to_cell_eval(real, predicted, **arguments)  # type: ignore[arg-type]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "real.h5ad", folder / "predicted.h5ad"
    for adata, path in zip(pair, paths, strict=True):
        adata.write_h5ad(path)
    return paths


def cell_eval_scores(
    real: AnnData,
    predicted: AnnData,
    *,
    preset: str = "vcc2026",
    perturbation_key: str = "perturbation",
    control: str | Sequence[str] = "control",
    sep: str | None = "+",
    layer: str | None = None,
    seed: int | None = 0,
) -> pd.DataFrame:
    """Score predicted cells with cell-eval2, the scorer of the Virtual Cell Challenge (``scvi-cradle[cell-eval]``).

    Parameters
    ----------
    real, predicted, perturbation_key, control, sep, layer, seed
        As for :func:`to_cell_eval`.
    preset
        Set of metrics: a preset of cell-eval2. Where it leaves out the gene that a perturbation targets, this is the
        gene of the same name; combinations leave out none.

    Returns
    -------
    DataFrame indexed by cell-eval2's metrics: ``value`` over perturbations, ``aggregation`` (how), ``baseline``: the same
    for real control cells in the place of every perturbation's. Scores of a repeat of the experiment are not part of it:
    score one half of the real cells against the other for a ceiling.

    Raises
    ------
    ImportError
        Without cell-eval2.
    KeyError, ValueError
        As :func:`evaluate`.
    """
    try:
        from cell_eval2 import EvalConfig, aggregate_metrics, compute_metrics
    except ImportError as error:
        msg = "`cell_eval_scores` needs cell-eval2; received no such package: `pip install 'scvi-cradle[cell-eval]'`."
        raise ImportError(msg) from error
    ours, theirs = to_cell_eval(
        real, predicted, perturbation_key=perturbation_key, control=control, sep=sep, layer=layer, seed=seed
    )
    config = replace(
        EvalConfig.from_preset(preset), target_gene_map=_target_genes(ours, LabelRule.create(control, sep))
    )
    tables = {
        name: pd.DataFrame(
            aggregate_metrics(compute_metrics(cells, ours, config=config)).to_dict(as_series=False)
        ).set_index("metric")
        for name, cells in (("value", theirs), ("baseline", _controls_as(theirs, ours, seed)))
    }
    table = tables["value"].rename(columns={"mean": "value", "agg": "aggregation"})
    return table[["value", "aggregation"]].assign(baseline=tables["baseline"]["mean"].reindex(table.index))


def _target_genes(real: AnnData, rule: LabelRule) -> dict[str, str | None]:
    """Return the gene that each label is named after, whose own change is not scored; none for combinations."""
    targets: dict[str, str | None] = {}
    for label in set(real.obs[TARGET]) - {CONTROL}:
        treatments = rule.treatments(label)
        targets[label] = treatments[0] if len(treatments) == 1 and treatments[0] in real.var_names else None
    return targets


def _controls_as(predicted: AnnData, real: AnnData, seed: int | None) -> AnnData:
    """Return the predicted cells with the counts of real controls, drawn with replacement."""
    controls = np.flatnonzero((real.obs[TARGET] == CONTROL).to_numpy())
    rows = np.random.default_rng(seed).choice(controls, predicted.n_obs)
    return AnnData(real.X[rows], obs=predicted.obs.copy(), var=real.var.copy())


def _cells(cells: Cells, labels: Sequence[str], among: np.ndarray | None, genes: pd.Index | None = None) -> AnnData:
    """Return counts and renamed labels of the cells with one of the labels."""
    chosen = np.isin(cells.codes, [cells.labels.index(x) for x in labels if x in cells.labels])
    rows = np.flatnonzero(chosen if among is None else chosen & among)
    names = np.array(cells.labels, dtype=object)
    names[names == cells.rule.control_name] = CONTROL
    matrix = to_csr(cells.matrix[rows]).astype(np.float32)
    genes = cells.genes if genes is None else genes
    if not cells.genes.equals(genes):
        matrix = matrix[:, cells.genes.get_indexer(genes)]
    obs = pd.DataFrame(
        {TARGET: pd.Categorical(names[cells.codes[rows]])}, index=[f"cell_{i}" for i in range(len(rows))]
    )
    return AnnData(matrix, obs=obs, var=pd.DataFrame(index=genes.copy()))
