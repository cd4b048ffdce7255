"""From results to one tidy table, its summary over seeds, and the papers' tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from scvi_cradle.benchmark._cell import REPORT_COLUMNS, rows_of
from scvi_cradle.benchmark._cell_scores import OF_EFFECT, SIGNS
from scvi_cradle.benchmark._models import REGISTRY
from scvi_cradle.benchmark._settings import EXPERIMENTS, WITH_FRACTIONS, BenchmarkSettings, Cell

BASELINE, CEILING = "mean training effect", "repeat of the held-out measurement (as many cells)"
MEASURED, MEASURED_PASSED = "measured cells", "measured cells that passed"
RELATIVE = "relative_iwelbo"
ANCHOR = "SAMSVAE"
COLUMNS = ("experiment", "split", "fraction", "threshold", "model", "seed", "metric", *REPORT_COLUMNS)
KEYS = ["experiment", "split", "fraction", "threshold", "model", "metric"]
HEADLINES = ("ate_pearson", "ate_r2", "jaccard_top_50", "qc_pass_rate")
DOUBLES = (
    *("published_relative_rmse", "published_r2_of_means", "relative_rmse", "relative_rmse_of_mean", OF_EFFECT),
    *("r2_of_means", "pearson_delta", "pearson_delta_perturbed_mean"),
)
DOUBLES_NOTE = (
    "`published_*`: the paper's protocol (cells in arbitrary pairs, batches of 32; R2 with sides swapped and clipped at 0). "
    "Both RMSE of cells count the spread of generated cells as an error: a method that generates means has less than one "
    "that generates cells, even cells of the truth. `relative_rmse_of_mean` takes the mean of the generated cells, whose "
    f"noise with n of them costs 1/(2n) of the value; `{OF_EFFECT}` has none: mean of training controls plus predicted effect."
)
OVER_FRACTIONS = (
    *("ate_pearson", "pearson_delta", "pearson_delta_perturbed_mean", "perturbation_discrimination"),
    *("iwelbo", RELATIVE),
)
NOTES = (
    "Effects are scored on held-out cells that passed quality control, against controls that no method was trained on; "
    "QC thresholds are fitted on training cells.",
    f"`{BASELINE}` is predicted for every perturbation by a method that knows nothing else; `{CEILING}`: what "
    "as many held-out cells and controls again would score, extrapolated from halves and quarters (for scores of generated "
    "cells: one half of the held-out cells against the other, and predictions are scored on as many). Methods learn from "
    "more cells than were held out, so that a score above it is possible.",
    "Numbers are means over seeds with a 95 % t interval (each seed has its own split, unless the split is given); for a "
    "single seed a 95 % bootstrap interval over perturbations, where the metric has one.",
    "`qc_pass_rate`: share of generated cells within all thresholds (doublets have none). Measured cells that passed reach "
    "1 by construction, and so does a method that copies them.",
    f"`iwelbo` is in nats per cell, without global terms, and differs between splits; `{RELATIVE}` is the difference from "
    f"{ANCHOR} on the same split. Both compare models of one table only.",
)


def tidy_table(results: Mapping[Cell, dict[str, Any]]) -> pd.DataFrame:
    """Return one row per cell of the matrix and metric.

    ``relative_iwelbo`` is the bound less that of SAMSVAE on the same split, trained without combinations where an
    experiment has shares of them (SAMS-VAE, figure 4).
    """
    rows = [row for content in results.values() if content["error"] is None for row in rows_of(content)]
    tidy = pd.DataFrame(rows, columns=list(COLUMNS))
    numbers = [name for name in COLUMNS if name not in ("experiment", "split", "model", "metric", "note")]
    tidy[numbers] = tidy[numbers].apply(pd.to_numeric)
    return pd.DataFrame([*tidy.to_dict("records"), *_relative_bounds(tidy)], columns=list(COLUMNS)).astype(tidy.dtypes)


def _relative_bounds(tidy: pd.DataFrame) -> list[dict[str, Any]]:
    bounds = tidy[tidy["metric"] == "iwelbo"].to_dict("records")
    value = {
        (str(row["threshold"]), row["seed"]): row["value"]
        for row in bounds
        if row["model"] == ANCHOR and not row["fraction"] > 0
    }
    keyed = [((str(row["threshold"]), row["seed"]), row) for row in bounds]
    note = f"iwelbo less that of {ANCHOR} on the same split"
    return [
        row | {"metric": RELATIVE, "value": row["value"] - value[key], "ci_low": None, "ci_high": None, "note": note}
        for key, row in keyed
        if key in value
    ]


def summarize(tidy: pd.DataFrame) -> pd.DataFrame:
    """Return means and 95 % intervals over seeds.

    Returns
    -------
    Models in the order of the registry; one row per experiment, split, fraction, threshold, model and metric: ``mean``, ``ci_low``, ``ci_high`` (t interval;
    for one seed the interval of the report), ``sd``, ``n_seeds``, means of ``baseline`` and ``ceiling``, and ``scaled``:
    that of the means, NaN where the mean ceiling is not better than the mean baseline. A mean of ratios over the seeds
    where they are defined would be too good.
    """
    rows = []
    for keys, group in tidy.groupby(KEYS, sort=False, dropna=False):
        values = group["value"].to_numpy(dtype=np.float64)
        mean, n = float(values.mean()), len(values)
        sd = float(values.std(ddof=1)) if n > 1 else np.nan
        if n > 1:
            half = float(stats.t.ppf(0.975, n - 1)) * sd / np.sqrt(n)
            low, high = mean - half, mean + half
        else:
            low, high = float(group["ci_low"].iloc[0]), float(group["ci_high"].iloc[0])
        base, top = group[["baseline", "ceiling"]].mean(skipna=False)
        n_perturbations = group["n_perturbations"].mean()
        room = SIGNS.get(keys[-1], 1) * (top - base)
        scaled = (mean - base) / (top - base) if room > 0 and np.isfinite(n_perturbations) else np.nan
        rows.append([*keys, mean, low, high, sd, n, base, top, scaled, n_perturbations])
    measured = ["mean", "ci_low", "ci_high", "sd", "n_seeds", "baseline", "ceiling", "scaled", "n_perturbations"]
    order = {name: position for position, name in enumerate(REGISTRY)}
    table = pd.DataFrame(rows, columns=[*KEYS, *measured])
    return table.sort_values("model", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def errors_table(results: Mapping[Cell, dict[str, Any]]) -> pd.DataFrame:
    """Return the cells that failed, each with its error in one sentence."""
    rows = [[*cell, content["error"]] for cell, content in results.items() if content["error"] is not None]
    return pd.DataFrame(rows, columns=[*Cell._fields, "error"])


def report(settings: BenchmarkSettings, summary: pd.DataFrame, results: Mapping[Cell, dict[str, Any]]) -> str:
    """Return the tables in Markdown, with what has to be known to read them."""
    seeds, name = ", ".join(map(str, settings.seeds)), settings.data.name
    lines = [f"# Benchmark on {name}", "", f"Experiment `{settings.experiment}`: {EXPERIMENTS[settings.experiment]}."]
    lines += [f"Preset `{settings.preset}`; seeds {seeds}; steps: {settings.max_steps or 'as the preset'}.", ""]
    lines += [f"- {note}" for note in NOTES]
    if not summary.empty:
        if settings.experiment in WITH_FRACTIONS:
            lines += _over_fractions(summary)
        else:
            lines += ["", f"Held out: {'; '.join(dict.fromkeys(summary['split']))}.", *_by_threshold(summary)]
    lines += _remarks(results)
    return "\n".join(lines) + "\n"


def _by_threshold(summary: pd.DataFrame) -> list[str]:
    lines: list[str] = []
    metrics = list(dict.fromkeys(summary["metric"]))
    of_report = [m for m in metrics if summary.loc[summary["metric"] == m, "n_perturbations"].notna().any()]
    top = [m for m in of_report if "top_20" in m]
    rates = [m for m in metrics if m.startswith("qc_pass_rate") and not m.endswith("_mads")]
    cells = [m for m in of_report if m in SIGNS or m == OF_EFFECT]
    effects = [*(m for m in of_report if m not in {*top, *cells}), *(m for m in rates if m == "qc_pass_rate")]
    bounds = [m for m in ("iwelbo", RELATIVE, "ate_pearson", "pearson_delta") if m in metrics]
    lead = DOUBLES if summary["experiment"].iloc[0] == "doubles" else ()
    cells = [m for m in cells if m not in lead]
    rest = [m for m in metrics if m not in {*of_report, *rates, "iwelbo", RELATIVE} and not m.endswith("_mads")]
    for threshold, part in summary.groupby("threshold", sort=False, dropna=False):
        lines += ["", f"## {_threshold(threshold)}"]
        if lead:
            table = _pivot(part, "model", lead, (BASELINE, CEILING), decimals=3)
            lines += [*_section("All combinations held out (PerturbedVAE, tables 2 to 4)", table), "", DOUBLES_NOTE]
        for title, chosen, references in (
            ("Effects of held-out perturbations (CRADLE-VAE, table 2)", effects, (BASELINE, CEILING)),
            ("The same, 20 genes (CRADLE-VAE, table 4)", top, (BASELINE, CEILING)),
            ("Generated cells (relative RMSE and R2: PerturbedVAE)", cells, (BASELINE, CEILING)),
            ("QC pass rate, overall and by criterion (CRADLE-VAE, table 2)", rates, (MEASURED, MEASURED_PASSED)),
            ("Likelihood and effects (SAMS-VAE, table 1)", bounds, None),
            ("Training", rest, None),
        ):
            rows = part[part["model"].isin(part.loc[part["metric"] == "iwelbo", "model"])] if chosen is bounds else part
            lines += _section(title, _pivot(rows, "model", chosen, references))
    ablations = summary[summary["model"].str.startswith("CradleVAE") & summary["metric"].isin(HEADLINES)]
    if ablations["model"].nunique() > 1:
        lines += ["", "## Ablations and thresholds"]
        lines += _section(
            "Ablations (CRADLE-VAE, table 3)", _pivot(_with_threshold(ablations), "model", HEADLINES, None)
        )
    quality = [m for m in ("ate_pearson", "ate_r2", *(m for m in metrics if m.endswith("_mads"))) if m in metrics]
    passed = summary[summary["model"].isin(("SAMSVAE (passed cells)", "CradleVAE")) & summary["metric"].isin(quality)]
    if any(m.endswith("_mads") for m in quality):
        lines += _section(
            "Training at one threshold, pass rates at others (CRADLE-VAE, table 5)",
            _pivot(_with_threshold(passed), "model", quality, None),
        )
    return lines


def _over_fractions(summary: pd.DataFrame) -> list[str]:
    lines: list[str] = []
    words = summary.assign(share=[f"{f:.0%}" for f in summary["fraction"]])
    for threshold, part in words.groupby("threshold", sort=False, dropna=False):
        lines += ["", f"## {_threshold(threshold)}"]
        for metric in OVER_FRACTIONS:
            rows = part[part["metric"] == metric]
            shares = list(dict.fromkeys(rows["share"]))
            references = (BASELINE, CEILING) if rows["ceiling"].notna().any() else None
            table = _pivot(rows.assign(metric=rows["share"]), "model", shares, references)
            lines += _section(f"`{metric}` by share of combinations (SAMS-VAE, figure 4)", table)
    return lines


def _with_threshold(summary: pd.DataFrame) -> pd.DataFrame:
    names = [f"{m}, {_threshold(t)}" for m, t in zip(summary["model"], summary["threshold"], strict=True)]
    return summary.assign(model=names).sort_values("threshold", kind="stable")


def _threshold(threshold: Any) -> str:
    return "given flags" if pd.isna(threshold) else f"{threshold:g} MADs"


def _pivot(
    summary: pd.DataFrame,
    rows: str,
    columns: Sequence[str],
    references: tuple[str, str] | None,
    decimals: int = 2,
) -> pd.DataFrame:
    """Return texts such as ``0.52 [0.48, 0.56]``, methods x metrics, and the references' rows below."""
    chosen = summary[summary["metric"].isin(columns)]
    if chosen.empty:
        return pd.DataFrame()
    digits = {metric: _digits(values, decimals) for metric, values in chosen.groupby("metric")["mean"]}
    texts = [_text(row.mean, row.ci_low, row.ci_high, digits[row.metric]) for row in chosen.itertuples()]
    table = chosen.assign(text=texts).pivot(index=rows, columns="metric", values="text")
    table = table.loc[list(dict.fromkeys(chosen[rows])), [c for c in columns if c in table.columns]].fillna("-")
    for name, column in zip(references or (), ("baseline", "ceiling"), strict=False):
        means = chosen.groupby("metric")[column].mean()
        if name in (BASELINE, CEILING):  # those of effects, not of cells
            means = means.where(chosen.groupby("metric")["n_perturbations"].max().notna())
        table.loc[name] = [_text(means[metric], np.nan, np.nan, digits[metric]) for metric in table.columns]
    return table


def _digits(values: pd.Series, least: int) -> int:
    """Return decimals, ``least`` or as many as show two digits of the largest value."""
    largest = float(values.abs().max())
    if largest >= 100 or not largest > 0:
        return 1 if largest else least
    return max(least, 1 - math.floor(math.log10(largest)))


def _text(mean: float, low: float, high: float, digits: int) -> str:
    if not np.isfinite(mean):
        return "-"
    text = f"{round(mean, digits) + 0.0:.{digits}f}"
    return text if not np.isfinite(low + high) or low == high else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def _section(title: str, table: pd.DataFrame) -> list[str]:
    return [] if table.empty else ["", f"### {title}", "", markdown(table.rename_axis("model"))]


def markdown(table: pd.DataFrame, text: Callable[[Any], str] = str) -> str:
    """Return a Markdown table."""
    header = [str(table.index.name or ""), *map(str, table.columns)]
    rows = [[str(name), *map(text, row)] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    lines = [header, ["---", *("---:" for _ in table.columns)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _remarks(results: Mapping[Cell, dict[str, Any]]) -> list[str]:
    """Return what is missing from the tables, and why, each reason once."""
    failed: dict[str, list[Cell]] = {}
    without: dict[tuple[str, str], dict[str, None]] = {}
    notes: dict[str, None] = {}
    for cell, content in results.items():
        if content["error"] is not None:
            failed.setdefault(content["error"], []).append(cell)
        for part, reason in content.get("without", {}).items():
            without.setdefault((cell.model, reason), {})[part] = None
        notes |= dict.fromkeys(content["notes"])
    lines: list[str] = []
    for title, entries in (
        (
            "Failed",
            [f"{len(cells)} cells ({_models(c.model for c in cells)}): {error}" for error, cells in failed.items()],
        ),
        ("No answer", [f"{model} ({', '.join(parts)}): {reason}." for (model, reason), parts in without.items()]),
        ("Notes", list(notes)),
    ):
        if entries:
            lines += ["", f"## {title}", "", *(f"- {entry}" for entry in entries)]
    return lines


def _models(names: Any) -> str:
    return ", ".join(sorted(set(names)))
