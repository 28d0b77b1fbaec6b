"""Plots of the result files of one machine, as SVG beside them."""

from __future__ import annotations

import math
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.progress import say
from benchmarks.results import load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "reference": "#b8b8b8",
    "reference_compiled": "#e0a458",
    "eager": "#4c78a8",
    "triton": "#3a9d6e",
}
BACKEND_LABELS = {
    "reference": "reference",
    "reference_compiled": "reference, torch.compile",
    "eager": "eager (factored)",
    "triton": "Triton",
}
METHOD_LABELS = {
    "equal_weighting": "equal weighting",
    "rep_mtl_reference": "Rep-MTL, reference",
    "rep_mtl": "Rep-MTL, fused",
    "nash_mtl": "Nash-MTL",
    "fairgrad": "FairGrad",
}
# The same numbers give the same file, byte for byte.
STYLE = {
    "svg.hashsalt": "repmtl_kernels",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}


def draw(folder: Path) -> list[Path]:
    """Draws what ``folder`` has results for; returns the files."""
    if find_spec("matplotlib") is None:
        say("matplotlib is not installed: no plots (python -m benchmarks.report makes them later)")
        return []
    import matplotlib

    matplotlib.use("Agg")
    written = []
    with matplotlib.rc_context(STYLE):
        for what, make in (("kernels", kernels_figures), ("training", training_figures)):
            found = load(folder, what)
            if found is None or not found["rows"]:
                continue
            for name, figure in make(found).items():
                path = folder / f"{name}.svg"
                figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
                written.append(path)
    return written


def kernels_figures(found: dict) -> dict[str, Figure]:
    """Speed and memory of `csa_loss`, forward + backward, in the first precision measured."""
    precision = found["rows"][0]["precision"]
    wanted = {"function": "csa_loss", "layout": "contiguous", "precision": precision}
    wanted["direction"] = "forward_backward"
    rows = [r for r in found["rows"] if r["ms"] and all(r[k] == v for k, v in wanted.items())]
    by_shape: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_shape.setdefault(row["shape"], {})[row["backend"]] = row
    with_reference = {s: b for s, b in by_shape.items() if "reference" in b}
    speed = {
        shape: {b: here["reference"]["ms"] / r["ms"] for b, r in here.items() if b != "reference"}
        for shape, here in with_reference.items()
    }
    memory = {shape: {b: r["peak_mb"] for b, r in here.items()} for shape, here in by_shape.items()}
    sizes = {row["shape"]: "T{T} B{B} C{C} N{N}".format(**row) for row in rows}
    title = f"csa_loss, forward + backward, {precision}, {_machine(found)}"
    ratios = [v for here in speed.values() for v in here.values()]
    least = min((v for here in memory.values() for v in here.values()), default=1.0)
    # Speed starts at 1, the reference; memory at a power of ten below the least.
    slowest = 0.8 * min([1.0, *ratios])
    power = 10 ** math.floor(math.log10(least))
    faster, megabytes = "times faster than the reference", "peak extra memory, MB"
    return {
        "speed": _bars(speed, sizes, title, faster, "{:.3g}x", 1, slowest),
        "memory": _bars(memory, sizes, title, megabytes, "{:.3g}", power, power),
    }


def _machine(found: dict) -> str:
    m = found["machine"]
    return m["gpu"] if "gpu" in m else f"{m['cpu']}, {m['threads']} threads"


def _bars(
    values: dict[str, dict[str, float]],
    sizes: dict[str, str],
    title: str,
    label: str,
    number: str,
    start: float,
    low: float,
) -> Figure:
    """Horizontal bars from ``start`` on a logarithmic axis: a group per shape, a color each."""
    from matplotlib.figure import Figure

    backends = [b for b in COLORS if any(b in here for here in values.values())]
    height = 0.8 / max(len(backends), 1)
    figure = Figure(figsize=(7.5, 0.9 + 0.26 * len(values) * (len(backends) + 0.8)))
    axes = figure.add_subplot()
    for i, backend in enumerate(backends):
        here = [(k, v[backend]) for k, v in enumerate(values.values()) if backend in v]
        places = [k + (i - (len(backends) - 1) / 2) * height for k, _ in here]
        widths = [v - start for _, v in here]
        axes.barh(
            places, widths, height * 0.92, start, color=COLORS[backend],
            label=BACKEND_LABELS[backend],
        )  # fmt: skip
        for place, (_, v) in zip(places, here, strict=True):
            text = " " + number.format(v)
            axes.text(max(v, start), place, text, va="center", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlim(low, 1.6 * max((v for here in values.values() for v in here.values()), default=1))
    axes.axvline(start, color="#808080", linewidth=1)
    axes.set_yticks(range(len(values)), [f"{name}\n{sizes[name]}" for name in values])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(loc="upper left", bbox_to_anchor=(0.1, -0.02), ncols=len(backends))
    return figure


def training_figures(found: dict) -> dict[str, Figure]:
    """Time of a step by its phases, and the accuracy of every seed."""
    from matplotlib.figure import Figure

    rows = found["rows"]
    names = [METHOD_LABELS[row["method"]] for row in rows]
    accuracy = all(row["accuracy"] for row in rows)
    figure = Figure(figsize=(10 if accuracy else 6, 0.6 + 0.5 * len(rows)))
    steps, *more = figure.subplots(1, 2 if accuracy else 1, sharey=True, squeeze=False)[0]
    base = sum(rows[0]["phases"].values())
    phases = list(dict.fromkeys(phase for row in rows for phase in row["phases"]))
    phases.sort(key=["forward", "criterion", "aggregation", "backward", "optimizer"].index)
    tones = {
        "forward": "#9ecae1", "criterion": "#3a9d6e", "aggregation": "#e0a458",
        "backward": "#4c78a8", "optimizer": "#b8b8b8",
    }  # fmt: skip
    left = [0.0] * len(rows)
    for phase in phases:
        widths = [row["phases"].get(phase, 0.0) / base for row in rows]
        steps.barh(range(len(rows)), widths, 0.65, left, color=tones[phase], label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for k, row in enumerate(rows):
        steps.text(left[k], k, f" {row['ratio_to_ew']:.2f}x", va="center", fontsize=9)
    steps.set_xlim(0, max(left) * 1.15)
    steps.set_yticks(range(len(rows)), names)
    steps.invert_yaxis()
    steps.set_xlabel("time of a step, equal weighting = 1")
    steps.set_title(f"{rows[0]['data']} step, {_machine(found)}", fontsize=10, loc="left")
    for axes in more:
        for task, color in (("left", "#4c78a8"), ("right", "#e07b54")):
            for k, row in enumerate(rows):
                values = [100 * v for v in row["accuracy"][task]]
                shift = -0.12 if task == "left" else 0.12
                axes.plot(values, [k + shift] * len(values), "o", color=color, ms=5, alpha=0.6,
                          label=f"{task} digit" if k == 0 else None)  # fmt: skip
                axes.plot(statistics.mean(values), k + shift, "|", color=color, ms=13, mew=2)
        axes.set_xlabel("test accuracy, % (points: seeds, bars: means)")
        axes.set_title(
            f"after {rows[0]['steps']} steps of {rows[0]['batch']} images", fontsize=10, loc="left"
        )
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.22), ncols=2)
    steps.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.22), ncols=3)
    figure.tight_layout()
    return {"training": figure}
