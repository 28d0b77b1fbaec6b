"""Rows of a study, its tables, and ``Delta_p``: arXiv 2507.21049, eq. 11 and 12."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from benchmarks.output import groups, markdown
from benchmarks.quality.config import EQUAL, SINGLE, Run, Study
from benchmarks.quality.tasks import LOWER_IS_BETTER

BASES = {SINGLE: "delta_p", EQUAL: "delta_p_to_equal"}
AGAINST = "delta_p_to_against"
# So many points of a history are kept in a row.
POINTS = 20
# The metrics of one run: for each task, the value of each metric.
Metrics = dict[str, dict[str, float]]


class Interval(NamedTuple):
    """Mean and half the width of its 95 % interval; NaN for a single value."""

    mean: float
    half: float

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} ± {self.half:.2f}"


def interval(values: Sequence[float]) -> Interval:
    """Return Student's interval of the mean of paired differences."""
    from scipy.stats import t as student

    count, mean = len(values), fmean(values)
    if count < 2:
        return Interval(mean, math.nan)
    quantile = float(student.ppf(0.975, count - 1))
    return Interval(mean, quantile * stdev(values) / math.sqrt(count))


def delta_per_metric(metrics: Metrics, base: Metrics) -> Metrics:
    """Return by how many per cent each metric is better than the base's: eq. 11 for one metric."""
    deltas: Metrics = {}
    for task, values in metrics.items():
        deltas[task] = {}
        for name, value in values.items():
            change = 100 * (value - base[task][name]) / base[task][name]
            deltas[task][name] = -change if LOWER_IS_BETTER[name] else change
    return deltas


def delta_p(metrics: Metrics, base: Metrics) -> dict[str, float]:
    """Return ``Delta_p`` of each task, its metrics' mean, and their ``mean`` over tasks, eq. 12."""
    deltas = delta_per_metric(metrics, base)
    per_task = {task: fmean(values.values()) for task, values in deltas.items()}
    return {**per_task, "mean": fmean(per_task.values())}


def rows(study: Study, runs: list[Run], records: dict[str, dict]) -> list[dict]:
    """Return a row for each data set, method and seed, compared with runs of its seed."""
    by_run: dict[tuple, dict] = {}
    for run in runs:
        record = records[run.key]
        row = by_run.setdefault((run.dataset, run.label, run.seed), _row(run))
        row["metrics"] |= record["metrics"]
        # Another study may have asked for those of the same run.
        if study.spectra and "spectra" in record:
            row.setdefault("spectra", {})[run.task or "all"] = record["spectra"]
        if history := _thinned(record["history"]):
            row["history"] = history
    bases = {m["method"]: m["label"] for m in study.methods if m["method"] in BASES}
    against = {m["label"]: m["against"] for m in study.methods if m["against"]}
    for (dataset, label, seed), row in by_run.items():
        if label in against:
            row["against"] = against[label]
            other = by_run[dataset, against[label], seed]
            row[AGAINST] = _rounded(delta_p(row["metrics"], other["metrics"]))
        for base, base_label in bases.items():
            name, other = BASES[base], by_run[dataset, base_label, seed]
            row[name] = _rounded(delta_p(row["metrics"], other["metrics"]))
    return list(by_run.values())


def _row(run: Run) -> dict:
    return {
        "dataset": run.dataset,
        "method": run.label,
        "family": run.family,
        "seed": run.seed,
        "settings": {"method": run.method, **run.options},
        "metrics": {},
    }


def _thinned(history: list[dict]) -> dict[str, list]:
    """Return the gradient ratio over the steps, at about `POINTS` of them."""
    kept = history[:: max(1, len(history) // POINTS)]
    if all(entry["ratio"] is None for entry in kept):
        return {}
    ratios = [None if e["ratio"] is None else float(f"{e['ratio']:.4g}") for e in kept]
    return {"step": [entry["step"] for entry in kept], "ratio": ratios}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def over_seeds(rows: list[dict], delta: str) -> dict[tuple[str, str], Interval]:
    """Return the interval of a ``Delta_p`` by data set and method, for the rows that have it."""
    return {
        where: interval([row[delta]["mean"] for row in group])
        for where, group in groups([r for r in rows if delta in r], "dataset", "method").items()
    }


def by_base(rows: list[dict]) -> str:
    """Return a table for each base that methods are compared with, a column for each data set."""
    others = dict.fromkeys(row["against"] for row in rows if "against" in row)
    parts = [
        compared("single-task training", rows, BASES[SINGLE]),
        to_equal(rows),
        *(compared(o, [r for r in rows if r.get("against") == o], AGAINST) for o in others),
    ]
    if any("spectra" in row for row in rows):
        parts.append(exponents(rows))
    return "\n\n".join(part for part in parts if part)


def to_equal(rows: list[dict]) -> str:
    """Return the table of ``Delta_p`` to equal weighting."""
    return compared("equal weighting", rows, BASES[EQUAL])


def compared(base: str, rows: list[dict], delta: str) -> str:
    """Return the table of one ``Delta_p``; empty where no row has it."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    intervals = over_seeds(rows, delta)
    table = [
        [method, *(str(intervals.get((dataset, method), "")) for dataset in datasets)]
        for method in methods
        if any((dataset, method) in intervals for dataset in datasets)
    ]
    return markdown([f"Δp to {base}, %", *datasets], table) if table else ""


def exponents_of_parts(rows: list[dict]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Return the power-law exponents of encoder and heads over the seeds, by data set and method.

    They are of networks with all tasks. A part without a fitted exponent has an empty list.
    """
    parts: dict[tuple, dict[str, list[float]]] = {}
    for where, group in groups([r for r in rows if "spectra" in r], "dataset", "method").items():
        for row in group:
            for part, value in row["spectra"].get("all", {}).items():
                values = parts.setdefault(where, {}).setdefault(part, [])
                values += [] if value is None else [value]
    return parts


def exponents(rows: list[dict]) -> str:
    """Return a table of the power-law exponents, mean over seeds."""
    parts = exponents_of_parts(rows)
    names = list(dict.fromkeys(part for of_method in parts.values() for part in of_method))
    table = [
        [*where, *(f"{fmean(values[n]):.2f}" if values.get(n) else "" for n in names)]
        for where, values in parts.items()
    ]
    return markdown(["power-law exponent", "method", *names], table)
