"""Pictures of a study's results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import output
from benchmarks.output import groups
from benchmarks.quality.tables import Interval, exponents_of_parts, interval, over_seeds
from benchmarks.results import load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X"
# Between these power-law exponents a layer counts as well trained (Martin and Mahoney, 2021).
WELL_TRAINED = (2.0, 4.0)


def draw(folder: Path, what: str, *, again: bool = False) -> list[Path]:
    """Draw the pictures that a study's rows allow; ``again``: those that the folder has."""
    rows = load(folder, what)["rows"]
    figures = {
        "delta_p": delta_figure, "strength": strength_figure, "ratio": ratio_figure,
        "exponents": exponents_figure,
    }  # fmt: skip
    makers = {f"{what}_{name}": partial(make, rows) for name, make in figures.items()}
    if again:
        makers = {n: make for n, make in makers.items() if (folder / f"{n}.svg").exists()}
    return output.draw(folder, makers)


def delta_figure(rows: list[dict]) -> Figure | None:
    """Return `Delta_p` to equal weighting of every method with its interval, by data set."""
    intervals = over_seeds(rows, "delta_p_to_equal")
    datasets, methods = (list(dict.fromkeys(key[k] for key in intervals)) for k in (0, 1))
    if not datasets:
        return None
    figure, panels = _panels(datasets, height=0.8 + 0.28 * len(methods))
    for axes, dataset in zip(panels, datasets, strict=True):
        here = {method: i for (d, method), i in intervals.items() if d == dataset}
        places = [methods.index(method) for method in here]
        axes.axvline(0, color="#808080", linewidth=1)
        axes.errorbar(
            [i.mean for i in here.values()], places, xerr=_halves(here.values()), fmt="o",
            color="#4c78a8", capsize=3, markersize=4,
        )  # fmt: skip
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_xlabel("Δp to equal weighting, %")
    return figure


def strength_figure(rows: list[dict]) -> Figure | None:
    """Return `Delta_p` to equal weighting against the strength, where a family's grid varies it."""
    rows = [r for r in rows if "delta_p_to_equal" in r and "strength" in r["settings"]]
    families = {
        family: group
        for (family,), group in groups(rows, "family").items()
        if len({row["settings"]["strength"] for row in group}) > 1
    }
    if not families:
        return None
    datasets = [d for (d,) in groups([r for r in rows if r["family"] in families], "dataset")]
    figure, panels = _panels(datasets, height=2.8)
    for axes, dataset in zip(panels, datasets, strict=True):
        axes.axhline(0, color="#808080", linewidth=1)
        for marker, (family, group) in zip(MARKERS, families.items(), strict=False):
            points: dict[float, list[float]] = {}
            for row in group:
                if row["dataset"] == dataset:
                    delta = row["delta_p_to_equal"]["mean"]
                    points.setdefault(row["settings"]["strength"], []).append(delta)
            xs = sorted(points)
            intervals = [interval(points[x]) for x in xs]
            axes.errorbar(
                xs, [i.mean for i in intervals], yerr=_halves(intervals), fmt=f"{marker}-",
                capsize=3, label=f"{family}, strength", markersize=4,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("strength")
    panels[0].set_ylabel("Δp to equal weighting, %")
    panels[0].legend(fontsize=7)
    return figure


def ratio_figure(rows: list[dict]) -> Figure | None:
    """Return the regulariser's gradient over the tasks', at the representation, during training."""
    rows = [r for r in rows if any(v is not None for v in r.get("history", {}).get("ratio", []))]
    if not rows:
        return None
    by_dataset = groups(rows, "dataset")
    figure, panels = _panels([dataset for (dataset,) in by_dataset], height=2.8)
    for axes, of_dataset in zip(panels, by_dataset.values(), strict=True):
        for (method,), group in groups(of_dataset, "method").items():
            histories = [row["history"] for row in group]
            points = []
            for k, step in enumerate(histories[0]["step"]):
                ratios = [h["ratio"][k] for h in histories if h["ratio"][k] is not None]
                points += [(step, statistics.median(ratios))] if ratios else []
            axes.plot(*zip(*points, strict=True), label=method, linewidth=1.2)
        axes.set_yscale("log")
        axes.set_xlabel("step")
    panels[0].set_ylabel("gradient ratio (median of seeds)")
    panels[0].legend(fontsize=7)
    return figure


def exponents_figure(rows: list[dict]) -> Figure | None:
    """Return the power-law exponents of encoder and heads by method, with the well-trained band."""
    parts = exponents_of_parts(rows)
    if not parts:
        return None
    datasets, methods = (list(dict.fromkeys(key[k] for key in parts)) for k in (0, 1))
    figure, panels = _panels(datasets, height=1.5 + 0.55 * len(methods))
    for axes, dataset in zip(panels, datasets, strict=True):
        here = {method: values for (d, method), values in parts.items() if d == dataset}
        names = list(dict.fromkeys(n for of in here.values() for n, values in of.items() if values))
        axes.axvspan(*WELL_TRAINED, color="#3a9d6e", alpha=0.12, linewidth=0, label="well trained")
        for k, (marker, name) in enumerate(zip(MARKERS, names, strict=False)):
            found = [(m, interval(values[name])) for m, values in here.items() if values.get(name)]
            # The parts of a method below each other, around its line.
            places = [methods.index(m) + 0.6 * ((k + 0.5) / len(names) - 0.5) for m, _ in found]
            axes.errorbar(
                [i.mean for _, i in found], places, xerr=_halves(i for _, i in found), fmt=marker,
                capsize=3, markersize=5, label=name,
            )  # fmt: skip
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_xlabel("power-law exponent")
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.55 / len(methods)))
    return figure


def _panels(titles: list[str], height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 2.6 * len(titles), height))
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for k, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(axis="y", labelleft=k == 0 or height < 3, labelsize=8)
    return figure, panels


def _halves(intervals: Iterable[Interval]) -> list[float]:
    return [0.0 if math.isnan(i.half) else i.half for i in intervals]
