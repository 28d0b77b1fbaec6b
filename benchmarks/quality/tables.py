"""Rows of a study's results, and its table."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean
from typing import NamedTuple

from benchmarks import progress
from benchmarks.quality.config import EQUAL, SINGLE, Run, Study
from benchmarks.quality.delta import Interval, delta_p, delta_per_metric, interval

BASES = {SINGLE: "delta_p", EQUAL: "delta_p_to_equal"}
AGAINST = "delta_p_to_against"
# So many points of a history are kept in a row.
POINTS = 20


def rows(study: Study, runs: list[Run], records: dict[str, dict]) -> list[dict]:
    """A row per data set, method and seed, compared with runs of its seed.

    With single-task training, with equal weighting, and with the method that it is ``against``.
    """
    found: dict[tuple, dict] = {}
    for run in runs:
        record = records[run.key]
        where = (run.dataset, run.label, run.seed)
        row = found.setdefault(where, _row(run))
        last = record["evaluations"][-1]
        row["metrics"] |= last["test"]
        if "validation" in last:
            row.setdefault("validation", {}).update(last["validation"])
        row["cpu_seconds"] = round(row["cpu_seconds"] + record["cpu_seconds"], 2)
        # Another study may have asked for those of the same run.
        if study.spectra and "spectra" in record:
            row.setdefault("spectra", {})[run.task or "all"] = record["spectra"]
        if history := _thinned(record["history"]):
            row["history"] = history
    kinds = {m["label"]: m["method"] for m in study.methods}
    bases = {
        (dataset, seed, kinds[label]): row
        for (dataset, label, seed), row in found.items()
        if kinds[label] in BASES
    }
    against = {m["label"]: m["against"] for m in study.methods if m["against"]}
    for (dataset, label, seed), row in found.items():
        if label in against:
            other = found[dataset, against[label], seed]
            row["against"] = against[label]
            row[AGAINST] = _rounded(delta_p(row["metrics"], other["metrics"]))
        for base, name in BASES.items():
            if (other := bases.get((dataset, seed, base))) is None:
                continue
            row[name] = _rounded(delta_p(row["metrics"], other["metrics"]))
            row[f"{name}_per_metric"] = {
                task: _rounded(values)
                for task, values in delta_per_metric(row["metrics"], other["metrics"]).items()
            }
            if "validation" in row:
                row[f"{name}_validation"] = _rounded(
                    delta_p(row["validation"], other["validation"])
                )
    return list(found.values())


def _row(run: Run) -> dict:
    return {
        "dataset": run.dataset,
        "method": run.label,
        "family": run.family,
        "seed": run.seed,
        "settings": {"method": run.method, **run.options},
        "metrics": {},
        "cpu_seconds": 0.0,
    }


def _thinned(history: list[dict]) -> dict[str, list]:
    """Gradient ratio and weight shares over the steps, at about `POINTS` of them."""
    kept = history[:: max(1, len(history) // POINTS)]
    names = [n for n in (kept[-1] if kept else {}) if n == "ratio" or n.startswith("weight_share")]
    if not names:
        return {}
    return {
        "step": [entry["step"] for entry in kept],
        **{n: [_short(entry[n]) if n in entry else None for entry in kept] for n in names},
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


class Line(NamedTuple):
    """What the table says of one method on one data set."""

    dataset: str
    method: str
    family: str
    to_single: Interval | None
    to_equal: Interval | None
    against: str  # the method that it is compared with beside these, or nothing
    to_against: Interval | None
    validation: Interval | None  # to equal weighting, by which options are picked
    tasks: dict[str, float]  # Delta_p of each task
    ratio: float | None  # of the gradients, at the last step logged
    equal_weights: bool  # a weighting method that never weighed tasks apart


def lines(found: list[dict]) -> list[Line]:
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in found:
        groups.setdefault((row["dataset"], row["method"]), []).append(row)
    return [_line(*names, group) for names, group in groups.items()]


def _line(dataset: str, method: str, group: list[dict]) -> Line:
    def over(name: str) -> Interval | None:
        values = [row[name]["mean"] for row in group if name in row]
        return interval(values) if values else None

    deltas = [row["delta_p"] for row in group if "delta_p" in row]
    tasks = {
        task: sum(d[task] for d in deltas) / len(deltas)
        for task in (deltas[0] if deltas else {})
        if task != "mean"
    }
    histories = [row["history"] for row in group if "history" in row]
    ratios = [h["ratio"][-1] for h in histories if "ratio" in h]
    shares = [
        value
        for history in histories
        for name, values in history.items()
        if name.startswith("weight_share")
        for value in values
    ]
    count = len(group[0]["metrics"])
    return Line(
        dataset, method, group[0]["family"], over("delta_p"), over("delta_p_to_equal"),
        group[0].get("against", ""), over(AGAINST), over("delta_p_to_equal_validation"), tasks,
        sum(ratios) / len(ratios) if ratios else None,
        bool(shares) and all(abs(share - 1 / count) < 1e-3 for share in shares),
    )  # fmt: skip


def picked(found: Iterable[Line], study: Study) -> list[Line]:
    """Of each family that asks for it, only the best on the validation split."""
    families = {m["family"] for m in study.methods if m["pick"]}
    best: dict[tuple[str, str], Line] = {}
    kept = []
    for line in found:
        if line.family not in families:
            kept.append(line)
            continue
        if line.validation is None:
            raise ValueError(
                f"{line.family}: pick needs a validation split and equal weighting, and "
                f"{line.dataset} lacks one of them"
            )
        where = (line.dataset, line.family)
        if where not in best or line.validation.mean > best[where].validation.mean:
            best[where] = line
    return kept + list(best.values())


def by_base(rows: list[dict]) -> str:
    """A table for each base that methods are compared with, a column for each data set."""
    found = lines(rows)
    datasets = list(dict.fromkeys(line.dataset for line in found))
    others = dict.fromkeys(line.against for line in found if line.against)
    parts = []
    for base, which, against in [
        ("single-task training", "to_single", ""),
        ("equal weighting", "to_equal", ""),
        *((other, "to_against", other) for other in others),
    ]:
        intervals = {
            (line.method, line.dataset): getattr(line, which)
            for line in found
            if not against or line.against == against
        }
        if not any(intervals.values()):
            continue
        table = []
        for method in dict.fromkeys(method for method, _ in intervals):
            here = [intervals.get((method, dataset)) for dataset in datasets]
            table.append([method, *("" if i is None else str(i) for i in here)])
        parts.append(progress.markdown([f"Δp to {base}, %", *datasets], table))
    if any("spectra" in row for row in rows):
        parts.append(exponents(rows))
    return "\n\n".join(parts)


def exponents(rows: list[dict]) -> str:
    """A table of the power-law exponents, mean over seeds, of networks that have all tasks."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        values = row.get("spectra", {}).get("all", {})
        parts = found.setdefault((row["dataset"], row["method"]), {})
        for part, value in values.items():
            parts.setdefault(part, []).extend([] if value is None else [value])
    names = list(dict.fromkeys(part for parts in found.values() for part in parts))
    table = [
        [dataset, method, *(f"{mean(parts[n]):.2f}" if parts.get(n) else "" for n in names)]
        for (dataset, method), parts in found.items()
        if parts
    ]
    return progress.markdown(["power-law exponent", "method", *names], table)


def markdown(found: list[Line], seeds: int) -> str:
    """A table for each data set."""
    parts = []
    for dataset in dict.fromkeys(line.dataset for line in found):
        here = [line for line in found if line.dataset == dataset]
        tasks = here[0].tasks
        header = [
            "method", "Δp to single task", "Δp to equal weighting", "the same, validation",
            *tasks, "gradient ratio",
        ]  # fmt: skip
        rows = []
        for line in here:
            name = f"{line.method} (equal weights!)" if line.equal_weights else line.method
            intervals = (line.to_single, line.to_equal, line.validation)
            cells = [
                name,
                *("" if i is None else str(i) for i in intervals),
                *(f"{line.tasks[t]:+.2f}" if t in line.tasks else "" for t in tasks),
                "" if line.ratio is None else f"{line.ratio:.3g}",
            ]
            rows.append(cells)
        parts.append(f"### {dataset}\n\n{progress.markdown(header, rows)}")
    count = f"{seeds} seed{'s' if seeds > 1 else ''}"
    note = f"Per cent; mean and 95 % interval over {count}, paired by seed. "
    note += "By task: Δp to single-task training."
    return "\n\n".join([*parts, note]) + "\n"
