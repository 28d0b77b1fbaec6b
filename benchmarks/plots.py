"""Plots of the result files of one machine, as SVG beside them."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import scaling
from benchmarks.progress import say
from benchmarks.results import load
from benchmarks.stages import MAIN, TARGET_SHAPES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "reference": "#b8b8b8",
    "reference_compiled": "#e0a458",
    "factored": "#9c755f",
    "factored_compiled": "#e07b54",
    "materialized": "#8c8c8c",
    "bmm": "#b8b8b8",
    "torch": "#b8b8b8",
    "torch_compiled": "#e0a458",
    "eager": "#4c78a8",
    "native": "#7b6cb0",
    "triton": "#3a9d6e",
}
BACKEND_LABELS = {
    "reference": "reference",
    "reference_compiled": "reference, torch.compile",
    "factored": "factored, plain PyTorch",
    "factored_compiled": "factored, torch.compile",
    "materialized": "plain PyTorch, all products",
    "bmm": "torch.bmm",
    "torch": "PyTorch",
    "torch_compiled": "PyTorch, torch.compile",
    "eager": "eager (factored)",
    "native": "native (C++)",
    "triton": "Triton",
}
METHOD_LABELS = {
    "equal_weighting": "equal weighting",
    "rep_mtl_reference": "Rep-MTL, reference",
    "rep_mtl": "Rep-MTL, fused",
    "rep_mtl_second_order": "fused, second_order()",
    "rep_mtl_every": "the same, every=4",
    "rep_mtl_compiled": "fused, compiled step",
    "nash_mtl": "Nash-MTL",
    "nash_mtl_single_pass": "single pass",
    "nash_mtl_representation": "at the representation",
    "fairgrad": "FairGrad",
    "fairgrad_single_pass": "single pass",
    "fairgrad_representation": "at the representation",
}
PHASE_LOOKS = {
    "encoder_forward": ("#9ecae1", "encoder forward"),
    "heads_forward": ("#c6dbef", "heads forward"),
    "saliencies": ("#8fd0b0", "saliencies"),
    "regularizer": ("#3a9d6e", "regulariser"),
    "heads_backward": ("#e07b54", "heads backward (Rep-MTL: second order)"),
    "weighting": ("#e0a458", "weighting"),
    "encoder_backward": ("#4c78a8", "encoder backward"),
    "compiled": ("#7b6fa8", "forward and backward in one graph"),
    "optimizer": ("#b8b8b8", "optimiser"),
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
        figures = {
            "kernels": kernels_figures,
            "stages": stages_figures,
            "steps": steps_figures,
            "scaling": scaling_figures,
        }
        for what, make in figures.items():
            found = load(folder, what)
            if found is None or not found["rows"]:
                continue
            for name, figure in make(found).items():
                path = folder / f"{name}.svg"
                figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
                written.append(path)
    return written


def kernels_figures(found: dict) -> dict[str, Figure]:
    """Speed and memory, forward + backward, in the first precision measured: of the loss with CSA
    that has most rows."""
    precision = found["rows"][0]["precision"]
    wanted = {"layout": "contiguous", "precision": precision, "direction": "forward_backward"}
    rows = [
        r
        for r in found["rows"]
        if r["ms"] and not r.get("graph") and all(r[k] == v for k, v in wanted.items())
    ]
    measured = [r["function"] for r in rows]
    function = max(("csa_loss", "rep_mtl_loss"), key=measured.count)
    if function not in measured:
        return {}
    rows = [r for r in rows if r["function"] == function]
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
    title = f"{function}, forward + backward, {precision}, {_machine(found)}"
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


def stages_figures(found: dict) -> dict[str, Figure]:
    """Fraction of the floor, per cent, of the large stages at the shapes that are judged."""
    gpu, precision = "gpu" in found["machine"], found["rows"][0]["precision"]
    wanted = {"layout": "contiguous", "precision": precision, "graph": gpu}
    main = {(variant.stage, variant.name) for variant in MAIN}
    values: dict[str, dict[str, float]] = {}
    sizes = {}
    for row in found["rows"]:
        if not row["ms"] or any(row[k] != v for k, v in wanted.items()):
            continue
        if (row["function"], row["variant"]) in main and row["shape"] in TARGET_SHAPES:
            name = f"{row['function']}, {row['variant']}"
            here = f"{row['shape']}: {name}"
            values.setdefault(here, {})[row["backend"]] = 100 * row["fraction"]
            sizes[here] = "T{T} B{B} C{C} N{N}".format(**row)
    if not values:
        return {}
    title = f"stages, {precision}, {_machine(found)}"
    least = min(v for here in values.values() for v in here.values())
    power = 10 ** math.floor(math.log10(least))
    label = "per cent of the floor"
    return {"stages": _bars(values, sizes, title, label, "{:.3g}%", power, power)}


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


def steps_figures(found: dict) -> dict[str, Figure]:
    """Time of a step by its phases, a panel for each network in the first precision measured."""
    from matplotlib.figure import Figure

    dtype = found["rows"][0]["dtype"]
    panels: dict[str, list[dict]] = {}
    for row in found["rows"]:
        if row["dtype"] == dtype and row["phases"]:
            panels.setdefault(row["network"], []).append(row)
    panels = {n: rows for n, rows in panels.items() if rows[0]["method"] == "equal_weighting"}
    if not panels:
        return {}
    for rows in panels.values():
        rows.sort(key=lambda row: list(METHOD_LABELS).index(row["method"]))
    heights = [len(rows) for rows in panels.values()]
    figure = Figure(figsize=(8, 0.9 * len(panels) + 0.3 * sum(heights)))
    subplots = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    used = [p for p in PHASE_LOOKS if any(p in row["phases"] for r in panels.values() for row in r)]
    for axes, (network, rows) in zip(subplots, panels.items(), strict=True):
        base = sum(rows[0]["phases"].values())
        left = [0.0] * len(rows)
        for phase in used:
            widths = [row["phases"].get(phase, 0.0) / base for row in rows]
            color, label = PHASE_LOOKS[phase]
            axes.barh(range(len(rows)), widths, 0.7, left, color=color, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for k, row in enumerate(rows):
            text = f" {row['ratio_to_ew']:.2f}x"
            axes.text(left[k], k, text, va="center", fontsize=9)
        axes.set_xlim(0, max(left) * 1.1)
        axes.set_yticks(range(len(rows)), [METHOD_LABELS[row["method"]] for row in rows])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"{network}: {rows[0]['architecture']}, {dtype}", fontsize=10, loc="left")
    subplots[-1].set_xlabel(f"time of a step, equal weighting = 1; {_machine(found)}")
    figure.tight_layout()
    looks = subplots[0].get_legend_handles_labels()
    figure.legend(*looks, loc="upper left", bbox_to_anchor=(0.02, 0.0), ncols=3)
    return {"steps": figure}


def scaling_figures(found: dict) -> dict[str, Figure]:
    """Time and memory against each size that was varied, in the first precision of each sweep."""
    by_sweep: dict[str, list[scaling.Line]] = {}
    for line in scaling.lines(found["rows"]):
        here = by_sweep.setdefault(line.sweep, [])
        if not here or line.precision == here[0].precision:
            here.append(line)
    if not by_sweep:
        return {}
    return {
        "scaling": _curves(by_sweep, "ms", "milliseconds", found),
        "scaling_memory": _curves(by_sweep, "peak_mb", "peak extra memory, MB", found),
    }


def _curves(
    by_sweep: dict[str, list[scaling.Line]], figure_of: str, label: str, found: dict
) -> Figure:
    """A panel for each sweep, both axes logarithmic: a line for each contestant."""
    from matplotlib.figure import Figure

    columns = min(3, len(by_sweep))
    height = math.ceil(len(by_sweep) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.9 * height), layout="constrained")
    subplots = figure.subplots(height, columns, squeeze=False).flat
    looks = {}
    for axes, (sweep, lines) in zip(subplots, by_sweep.items(), strict=False):
        if figure_of == "ms":
            floor = {row["value"]: row["floor_ms"] for line in lines for row in line.rows}
            looks["floor"] = _curve(axes, sorted(floor.items()), "#404040", "--", "")
        for line in lines:
            points = [(row["value"], row[figure_of]) for row in line.rows]
            name = BACKEND_LABELS[line.backend]
            looks[name] = _curve(axes, points, COLORS[line.backend], "-", ".")
        first = lines[0].rows[0]
        if sweep in ("positions", "channels"):  # where the other one becomes the smaller side
            other = first["C" if sweep == "positions" else "N"]
            axes.axvline(other, color="#808080", linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.grid(visible=True, axis="both")
        axes.set_xlabel(scaling.SWEEPS[sweep].axis)
        axes.set_title(f"{first['function']}, {lines[0].precision}", fontsize=9, loc="left")
    for axes in subplots[len(by_sweep) :]:
        axes.set_visible(False)
    figure.supylabel(label, fontsize=10)
    figure.suptitle(_machine(found), fontsize=10, x=0.02, ha="left")
    figure.legend(looks.values(), looks, loc="outside lower center", ncols=len(looks))
    return figure


def _curve(axes: Axes, points: list, color: str, line: str, marker: str) -> object:
    (drawn,) = axes.plot(*zip(*points, strict=True), line, marker=marker, color=color)
    return drawn
