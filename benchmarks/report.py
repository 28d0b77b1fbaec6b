"""Plots and the tables of README.md, from the result files alone: ``python -m benchmarks.report``.

A table goes between ``<!-- bench:NAME:MACHINE -->`` and ``<!-- /bench -->``, with NAME one of
``losses`` (default backend against the reference), ``kernels`` (every function and contestant),
``errors`` (their gradients against float64), ``stages`` (each stage against its floor), ``targets``
(what the kernels have to reach on a GPU, and whether they do),
``steps`` (time and memory of a training step by every method), ``phases`` (where that time goes),
``second_order`` (a step with and without it), ``accuracy`` (MultiMNIST by every method),
``kept`` (Gram matrices saved or made again), ``scaling`` (growth with each size, and its figures),
``checkpoint`` (peak of a step under activation checkpointing), ``quality_STUDY`` (``Delta_p`` of a
study), ``static`` (what the compiler made of the kernels) and ``compatibility`` (what works on
which backend, as the tests found: ``pytest --cells FOLDER``). MACHINE ``simulated`` is for what
comes from formulas alone: ``ranks``, the cost of negatives of all ranks, and ``kept``.
Where a document has no such markers nothing is written.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import distributed, kept, plots, scaling, targets
from benchmarks.machine import ROOT
from benchmarks.progress import markdown, say
from benchmarks.quality import tables as quality_tables
from benchmarks.results import RESULTS, load
from repmtl_kernels.backends.choice import BACKENDS

README = ROOT / "README.md"
DOCUMENTS = (
    README, ROOT / "benchmarks" / "README.md", ROOT / "docs" / "tuning.md",
    ROOT / "docs" / "quality.md", ROOT / "docs" / "distributed.md", ROOT / "docs" / "memory.md",
    ROOT / "docs" / "compatibility.md",
)  # fmt: skip
MARKED = re.compile(
    r"(?P<open><!-- bench:(?P<name>[\w-]+):(?P<machine>[\w-]+) -->\n)"
    r".*?(?P<close><!-- /bench -->)",
    re.DOTALL,
)
BACKEND_TITLES = {
    "reference": "reference",
    "reference_compiled": "`torch.compile`",
    "factored": "factored",
    "factored_compiled": "factored, `torch.compile`",
    "materialized": "plain PyTorch, all products",
    "eager": "eager",
    "native": "native",
    "triton": "Triton",
}
STAGE_TITLES = {
    "bmm": "`torch.bmm`",
    "torch": "PyTorch",
    "torch_compiled": "PyTorch, `torch.compile`",
    "eager": "eager",
    "native": "native",
    "triton": "Triton",
}
METHOD_TITLES = {
    "equal_weighting": "equal weighting",
    "rep_mtl_reference": "Rep-MTL, reference losses",
    "rep_mtl": "Rep-MTL, fused losses",
    "rep_mtl_second_order": "Rep-MTL, fused, `second_order()`",
    "rep_mtl_every": "the same, `every=4`",
    "rep_mtl_compiled": "Rep-MTL, step compiled as a whole",
    "nash_mtl": "Nash-MTL (torchjd)",
    "nash_mtl_single_pass": "Nash-MTL, own single pass",
    "nash_mtl_representation": "Nash-MTL, at the representation",
    "fairgrad": "FairGrad (torchjd)",
    "fairgrad_single_pass": "FairGrad, own single pass",
    "fairgrad_representation": "FairGrad, at the representation",
}
SECOND_ORDER_TITLES = {
    "equal_weighting": "equal weighting",
    "rep_mtl": "Rep-MTL, plain PyTorch's double backward",
    "rep_mtl_second_order": "Rep-MTL, `second_order()`",
}
PHASE_TITLES = {
    "encoder_forward": "encoder",
    "heads_forward": "heads",
    "saliencies": "saliencies",
    "regularizer": "regulariser",
    "heads_backward": "heads backward, second order in Rep-MTL",
    "weighting": "weighting",
    "encoder_backward": "encoder backward",
    "compiled": "one graph",
    "optimizer": "optimiser",
}
# What the fused step, the fastest that was measured, is compared with in a table's caption.
RIVALS = (
    "rep_mtl_reference",
    "nash_mtl",
    "nash_mtl_single_pass",
    "fairgrad",
    "fairgrad_single_pass",
)
MAX_NOTES = 10  # under a table
FASTEST = ("rep_mtl_second_order", "rep_mtl")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=raw
    ).parse_args()
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        for path in plots.draw(folder):
            say(f"plot: {path.relative_to(ROOT)}")
        if (reached := targets.table(folder)) is not None:
            say(f"{folder.name}:\n{reached}")
    refresh_documents()


def refresh_documents() -> None:
    for document in DOCUMENTS:
        refresh_readme(document, RESULTS)


def refresh_readme(readme: Path, results: Path) -> None:
    """Replaces what is between the markers whose machine has results."""
    if not readme.exists():
        say(f"no {readme.name}: no tables to refresh")
        return
    text = readme.read_text()
    fresh = MARKED.sub(partial(_filled, results=results), text)
    if fresh != text:
        readme.write_text(fresh)
        say(f"tables: {readme.name}")


def _filled(match: re.Match[str], results: Path) -> str:
    name, machine = match["name"], match["machine"]
    if (name, machine) in SIMULATED:
        return f"{match['open']}{SIMULATED[name, machine]()}\n{match['close']}"
    made = _made(name, machine, results)
    if made is None:
        say(f"marker bench:{name}:{machine}: no results of this machine, left as it is")
        return match[0]
    return f"{match['open']}{made}\n{match['close']}"


def _made(name: str, machine: str, results: Path) -> str | None:
    """The table of that name, None where the machine has no results for it."""
    if name == "targets":  # of several files
        return targets.table(results / machine)
    if name.startswith("quality_"):
        what, make = name, quality_table
    elif name in TABLES:
        what, make = TABLES[name]
    else:
        known = ", ".join([*TABLES, "targets"])
        raise ValueError(f"marker bench:{name}:{machine}: expected a name of {known}")
    found = load(results / machine, what)
    return None if found is None else make(found)


def losses_table(found: dict) -> str:
    """The default backend against the reference, one line per shape, `csa_loss` with its memory."""
    gpu, default = "gpu" in found["machine"], found["default_backend"]
    header = ["shape", "T, B, C, N", "forward", "forward + backward", "peak extra memory"]
    lines = []
    for dtype, group in _groups_of(_without_graphs(found), "precision"):
        for shape, rows in _groups_of(_contiguous(group, "csa_loss"), "shape"):
            cells = [f"{shape}, {dtype}" if gpu else shape, _size(rows[0])]
            for direction in ("forward", "forward_backward"):
                cells.append(_against(rows, direction, default, gpu))
            cells.append(_memory(rows, default))
            lines.append(cells)
    return _with_caption(markdown(header, lines), found, _kernel_units(gpu, default))


def kernels_table(found: dict) -> str:
    """Forward + backward of each function by every contestant."""
    gpu, default = "gpu" in found["machine"], found["default_backend"]
    backends = [b for b in BACKEND_TITLES if any(r["backend"] == b for r in found["rows"])]
    header = ["function", "shape", "dtype", *(BACKEND_TITLES[b] for b in backends)]
    header += ["fraction of the floor"]
    lines = []
    for (function, precision, name), rows in _line_ups(found):
        cells = [f"`{function}`", name, precision]
        cells += [_cell(rows.get(b), rows.get("reference"), gpu) for b in backends]
        best = rows.get(default)
        cells.append("" if best is None or best["ms"] is None else f"{100 * best['fraction']:.2g}%")
        lines.append(cells)
    return _with_caption(markdown(header, lines), found, _kernel_units(gpu, default))


def errors_table(found: dict) -> str:
    """How far each contestant's gradient is from the reference's in float64."""
    backends = [b for b in BACKEND_TITLES if any(r["backend"] == b for r in found["rows"])]
    lines = []
    for (function, precision, name), rows in _line_ups(found | {"rows": _without_graphs(found)}):
        errors = [rows.get(b, {}).get("gradient_error") for b in backends]
        if any(error is not None for error in errors):
            cells = ["" if error is None else f"{error:.1e}" for error in errors]
            lines.append([f"`{function}`", name, precision, *cells])
    header = ["function", "shape", "dtype", *(BACKEND_TITLES[b] for b in backends)]
    units = (
        "Relative error of the gradient, the largest over the tasks, against the reference in "
        "float64 on the same numbers."
    )
    return _with_caption(markdown(header, lines), found | {"notes": []}, units)


def _line_ups(found: dict) -> list[tuple[tuple[str, str, str], dict[str, dict]]]:
    """Function, precision and shape, with layout and CUDA graphs, and the rows of forward and
    backward by contestant."""
    groups: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in found["rows"]:
        if row["direction"] != "forward_backward":
            continue
        name = _place(row) + (", CUDA graph" if row.get("graph") else "")
        groups.setdefault((row["function"], row["precision"], name), {})[row["backend"]] = row
    return list(groups.items())


def _place(row: dict) -> str:
    return row["shape"] if row["layout"] == "contiguous" else f"{row['shape']}, {row['layout']}"


def stages_table(found: dict) -> str:
    """Each stage by every contestant: its time on a GPU, and the fraction of its floor."""
    gpu = "gpu" in found["machine"]
    rows = [row for row in found["rows"] if row["graph"] == gpu]
    backends = [b for b in STAGE_TITLES if any(r["backend"] == b for r in rows)]
    lines = []
    for keys, group in _groups_of(rows, "function", "variant", "shape", "precision", "layout"):
        by_backend = {row["backend"]: row for row in group}
        cells = [f"`{keys[0]}`, {keys[1]}", _place(group[0]), keys[3]]
        cells += [_stage_cell(by_backend.get(b), gpu) for b in backends]
        lines.append(cells)
    header = ["stage", "shape", "dtype", *(STAGE_TITLES[b] for b in backends)]
    units = (
        "Fraction of the stage's floor, its counted bytes and operations at this machine's rates. "
        "A rival of `gram` makes the whole matrix and nothing else."
    )
    if gpu:
        units = f"Microseconds, replayed as CUDA graphs, and in brackets: {units}"
    return _with_caption(markdown(header, lines), found, units)


def _stage_cell(row: dict | None, gpu: bool) -> str:
    if row is None:
        return ""
    if row["ms"] is None:
        return "out of memory" if "OutOfMemory" in row["error"] else "failed"
    fraction = f"{100 * row['fraction']:.2g}%"
    return f"{1e3 * row['ms']:.3g} ({fraction})" if gpu else fraction


def steps_table(found: dict) -> str:
    """Time and memory of a step, a column for each network and precision."""
    gpu = "gpu" in found["machine"]
    groups = _steps(found, gpu)
    header = ["method", *(f"{where}: time, memory" for where, _ in groups)]
    lines = []
    for method, title in _methods(found):
        by_group = [(rows.get(method), rows.get("equal_weighting")) for _, rows in groups]
        lines.append([title, *(_step_cell(row, base, gpu) for row, base in by_group)])
    units = (
        f"{_networks(found)}. Steps of forward, backward and optimiser on random images: "
        f"{'steps per second; ' if gpu else ''}time and memory as multiples of equal weighting's, "
        "all methods in turns in one run."
    )
    return _with_caption(markdown(header, lines), found, units)


def _step_cell(row: dict | None, base: dict | None, gpu: bool) -> str:
    if row is None:
        return ""
    if row["error"]:
        return "out of memory" if "OutOfMemory" in row["error"] else "failed"
    cells = [f"{row['steps_per_s']:.3g}/s"] if gpu else []
    if base is not None and not base["error"]:
        cells += [f"{row['ratio_to_ew']:.2f}x", f"{row['peak_mb'] / base['peak_mb']:.2f}x"]
    return ", ".join(cells)


def _faster(where: str, rows: dict[str, dict]) -> str:
    """How many times faster the fused step is than each rival's."""
    measured = {method: row for method, row in rows.items() if not row["error"]}
    mine = next((method for method in FASTEST if method in measured), None)
    rivals = [method for method in RIVALS if method in measured]
    if mine is None or not rivals:
        return ""
    speed = measured[mine]["steps_per_s"]
    said = [f"{speed / measured[m]['steps_per_s']:.2f} of {METHOD_TITLES[m]}" for m in rivals]
    return f"{where}: for each step of a rival, {METHOD_TITLES[mine]}, makes {'; '.join(said)}. "


def phases_table(found: dict) -> str:
    """Where the time of a step goes: milliseconds on a GPU, shares of equal weighting's step."""
    gpu = "gpu" in found["machine"]
    phases = [p for p in PHASE_TITLES if any(p in (r["phases"] or ()) for r in found["rows"])]
    header = ["network", "method", *(PHASE_TITLES[p] for p in phases), "sum"]
    lines = []
    for where, rows in _steps(found, gpu):
        base = rows.get("equal_weighting")
        for method, title in _methods(found):
            row = rows.get(method)
            if row is None or not row["phases"] or not base or base["error"]:
                continue
            unit = 1.0 if gpu else sum(base["phases"].values())
            values = [row["phases"].get(p) for p in phases]
            cells = ["" if v is None else _phase(v / unit, gpu) for v in values]
            cells.append(_phase(sum(row["phases"].values()) / unit, gpu))
            lines.append([where, title, *cells])
    units = "Milliseconds, by events of the device, " if gpu else "Equal weighting's step is 1, "
    units += "in steps of their own, apart from the timed ones. "
    units += "".join(_faster(where, rows) for where, rows in _steps(found, gpu)).strip()
    return _with_caption(markdown(header, lines), found, units)


def second_order_table(found: dict) -> str:
    """A step with and without ``second_order()``, against what its convolutions allow."""
    gpu = "gpu" in found["machine"]
    header = ["method", "convolutions per convolution of a head", "time of a step"]
    header += ["against plain PyTorch", "in the heads alone", "of the floor"]
    header += ["a measurement of the ratio", "peak memory"]
    if gpu:
        header.insert(0, "dtype")
    lines = []
    for row in found["rows"]:
        regularized = row["ratio_to_floor"] is not None
        cells = [row["dtype"]] if gpu else []
        cells += [
            SECOND_ORDER_TITLES[row["method"]],
            f"{row['convolutions_per_head_layer']:.3g}",
            f"{row['ratio_to_ew']:.2f}x",
            f"{1 / row['ratio_to_plain']:.2f}x faster" if regularized else "",
            f"{1 / row['heads_ratio_to_plain']:.2f}x faster" if regularized else "",
            f"{row['ratio_to_floor']:.2f}x" if regularized else "",
            f"{row['measurement']:.0%}, {row['measurement_on_average']:.1%} on average"
            if regularized
            else "",
            f"{row['peak_mb']:.4g} MB",
        ]
        lines.append(cells)
    units = (
        f"{_networks(found)}, 3 x 3 convolutions of dilation 6, 12 and 18 with batch norm. Time of "
        "a step relative to equal weighting, in turns in one run. The floor is the count of "
        "convolutions at equal weighting's speed, its step and once more its heads, without the "
        "regulariser's own time. A measurement of `last.ratio` comes on top of every 24th step."
    )
    return _with_caption(markdown(header, lines), found, units)


def _phase(value: float, gpu: bool) -> str:
    return f"{value:.3g}" if gpu else f"{value:.2f}"


def _steps(found: dict, gpu: bool) -> list[tuple[str, dict[str, dict]]]:
    """Network, with its precision where there are several, and its rows by method."""
    groups = _groups(found, "network", "dtype")
    return [
        (f"{network}, {dtype}" if gpu else network, {row["method"]: row for row in rows})
        for (network, dtype), rows in groups
    ]


def _methods(found: dict) -> list[tuple[str, str]]:
    measured = {row["method"] for row in found["rows"]}
    return [(method, title) for method, title in METHOD_TITLES.items() if method in measured]


def _networks(found: dict) -> str:
    return "; ".join(
        dict.fromkeys(f"{row['network']}: {row['architecture']}" for row in found["rows"])
    )


def accuracy_table(found: dict) -> str:
    """Test accuracy of each task by method, mean and standard deviation over seeds."""
    tasks = list(found["rows"][0]["metrics"])
    lines = []
    for method, rows in _groups(found, "method"):
        cells = [method]
        for task in tasks:
            values = [row["metrics"][task]["accuracy"] for row in rows]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f} %{spread}")
        lines.append(cells)
    (settings,) = found["datasets"].values()
    units = (
        f"MultiMNIST, {settings['training']['steps']} steps of {settings['training']['batch']} "
        f"images, {len(found['seeds'])} seeds (mean and standard deviation), test accuracy."
    )
    return _with_caption(markdown(["method", *tasks], lines), found, units)


def quality_table(found: dict) -> str:
    """`Delta_p` of every method and data set."""
    units = (
        f"Per cent, mean over tasks; mean and 95 % interval over {len(found['seeds'])} seeds, each "
        "seed's run against the base's run of that seed."
    )
    return _with_caption(quality_tables.by_base(found["rows"]), found, units)


def kept_table(found: dict) -> str:
    """Bytes until the backward, peak and time of both choices, a line for each backend."""
    header = ["shape", "T, B, C, N", "backend", "kept: saved, made again"]
    header += ["peak: saved, made again", "time, made again"]
    lines = []
    for row in found["rows"]:
        pairs = [
            f"{row[f'save_{what}']:.4g} MB, {row[f'recompute_{what}']:.4g} MB"
            for what in ("mb", "peak_mb")
        ]
        lines.append([row["shape"], _size(row), row["backend"], *pairs, f"{row['ratio']:.2f}x"])
    units = (
        "csa_loss in float32. Kept: between forward and backward, without the saliencies. Peak: "
        "over forward and backward, the gradients included, the saliencies not. Time of forward "
        "and backward, as a multiple of that with saved matrices: the median over neighbouring "
        "pairs of calls."
    )
    return _with_caption(markdown(header, lines), found, units)


def checkpoint_table(found: dict) -> str:
    """Peak of a small network's step, by what of it is checkpointed."""
    header = ["checkpointed", "equal weighting", "Rep-MTL"]
    lines = [
        [
            row["checkpointed"],
            *(f"{row[f'{method}_peak_mb']:.4g} MB" for method in ("equal_weighting", "rep_mtl")),
        ]
        for row in found["checkpointed"]
    ]
    units = (
        f"Peak of a step of a small network: encoder of {2 * kept.LAYERS} convolutions with batch "
        f"norm, {kept.HEADS} heads of {kept.LAYERS}, all of one width and map size."
    )
    return _with_caption(markdown(header, lines), found | {"notes": []}, units)


def scaling_table(found: dict) -> str:
    """How time and memory grow with each size, and the figures of it."""
    header = ["varied", "from, to", "contestant", "time", "at most", "the floor's"]
    header += ["memory", "at most", "of the floor at the largest"]
    if "gpu" in found["machine"]:
        header.insert(1, "precision")
    lines = []
    for line in scaling.lines(found["rows"]):
        first, last = line.rows[0], line.rows[-1]
        cells = [
            scaling.SWEEPS[line.sweep].axis,
            f"{first['value']:,}, {last['value']:,}",
            BACKEND_TITLES[line.backend],
            _growth(line.time, line.expected.time),
            str(line.expected.time),
            _growth(line.floor),
            _growth(line.memory, line.expected.memory),
            str(line.expected.memory),
            f"{100 * last['fraction']:.2g}%",
        ]
        if "gpu" in found["machine"]:
            cells.insert(1, line.precision)
        lines.append(cells)
    folder = f"results/{found['machine']['name']}"
    units = (
        f"![Time]({folder}/scaling.svg)\n![Memory]({folder}/scaling_memory.svg)\n\n"
        "The power of the varied size that time and memory grow with, fitted to the last half of "
        "the sizes; bold where it is more than "
        f"{scaling.TOLERANCE:g} above what is expected at most. Forward and backward of "
        "rep_mtl_loss; of the contrast stage where samples are varied beyond a batch, its memory "
        "without the anchors that it is given."
    )
    return _with_caption(markdown(header, lines), found, units)


def _growth(power: float | None, most: int | None = None) -> str:
    if power is None:
        return ""
    bold = "**" if most is not None and power > most + scaling.TOLERANCE else ""
    return f"{bold}{power:.2f}{bold}"


def static_table(found: dict) -> str:
    """A line per kernel and its modes that come out alike: the worst of all shapes and layouts."""
    targets = sorted({row["capability"] for row in found["rows"]})
    header = ["kernel", "mode", "registers", "spills", "shared memory", "loads", "matrix units"]
    lines = []
    for kernel, rows in _groups(found, "kernel"):
        modes: dict[tuple, list[str]] = {}
        for mode in dict.fromkeys(row["mode"] for row in rows):
            per_target = [
                [r for r in rows if r["mode"] == mode and r["capability"] == target]
                for target in targets
            ]
            modes.setdefault(_static_cells(per_target), []).append(mode)
        lines += [[f"`{kernel}`", ", ".join(m), *cells] for cells, m in modes.items()]
    shapes = ", ".join(dict.fromkeys(shape for row in found["rows"] for shape in row["shapes"]))
    layouts = " and ".join(dict.fromkeys(row["layout"] for row in found["rows"]))
    v = found["versions"]
    names = ", ".join(f"sm_{target}" for target in targets)
    return (
        f"{markdown(header, lines)}\n\nThe largest over {shapes}, {layouts}; for {names} in turn. "
        f"Loads: bits that a thread loads at once, in any variant. Triton {v['triton']}, "
        f"commit {found['commit'][:10]}{', with changes' if found['dirty'] else ''}."
    )


def _static_cells(per_target: list[list[dict]]) -> tuple[str, ...]:
    """Registers, spills, shared memory, loads and matrix units of one kernel, target by target."""

    def each(show: Callable[[list[dict]], str]) -> str:
        shown = [show(rows) for rows in per_target]
        return shown[0] if len(set(shown)) == 1 else " / ".join(value or "-" for value in shown)

    def widths(rows: list[dict]) -> str:
        found = {int(width) for row in rows for width in row["global_loads"] if width != "tma"}
        return " ".join(str(width) for width in sorted(found, reverse=True))

    return (
        each(lambda rows: str(max(row["registers"] for row in rows))),
        each(lambda rows: f"{max(row['spill_bytes'] for row in rows)} B"),
        each(lambda rows: f"{max(row['shared_bytes'] for row in rows) / 1024:.0f} KB"),
        each(widths),
        each(lambda rows: " ".join(sorted({n for r in rows for n in r["matrix_instructions"]}))),
    )


def compatibility_table(found: dict) -> str:
    """A line for each feature, a column for each backend; what no test ran is "not run"."""
    lines = []
    for feature, rows in _groups(found, "feature"):
        by_backend = {row["backend"]: row for row in rows}
        lines.append([feature, *(_works(by_backend.get(name)) for name in BACKENDS)])
    tests = {test for row in found["rows"] for test in row["tests"]}
    units = (
        f"What {len(tests)} tests found. yes: all of a cell's tests passed; no: refused with that "
        "error, as tested; not run: the backend is not on this machine, or the test needs a GPU."
    )
    if "gpu" not in found["machine"]:
        units += " Triton's kernels ran under its interpreter."
    return _with_caption(markdown(["", *BACKENDS], lines), found, units)


def _works(row: dict | None) -> str:
    if row is None or row["outcome"] == "skipped":
        return "not run"
    if row["outcome"] == "passed":
        return "yes"
    return f"{'no' if row['outcome'] == 'refused' else 'failed'}: `{row['why']}`"


TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "losses": ("kernels", losses_table),
    "kernels": ("kernels", kernels_table),
    "steps": ("steps", steps_table),
    "phases": ("steps", phases_table),
    "second_order": ("second_order", second_order_table),
    "accuracy": ("quality_bench", accuracy_table),
    "kept": ("kept", kept_table),
    "checkpoint": ("kept", checkpoint_table),
    "scaling": ("scaling", scaling_table),
    "static": ("static", static_table),
    "compatibility": ("compatibility", compatibility_table),
    "errors": ("kernels", errors_table),
    "stages": ("stages", stages_table),
}

SIMULATED: dict[tuple[str, str], Callable[[], str]] = {
    ("ranks", "simulated"): distributed.table,
    ("kept", "simulated"): kept.table,
}


def _with_caption(table: str, found: dict, units: str) -> str:
    m, v = found["machine"], found["versions"]
    hardware = m["gpu"] if "gpu" in m else f"{m['cpu']}, {m['threads']} threads"
    where = f"{hardware}; PyTorch {v['torch']}, commit {found['commit'][:10]}"
    where += f"{', with changes' if found['dirty'] else ''}, {found['date'][:10]}"
    notes = found["notes"][:MAX_NOTES]
    if more := len(found["notes"]) - len(notes):
        notes.append(f"{more} more are in the result file")
    notes = "; ".join(notes)
    return f"{table}\n\n{units} {where}.{f' Notes: {notes}.' if notes else ''}"


def _kernel_units(gpu: bool, default: str) -> str:
    if gpu:
        return f"Milliseconds; in brackets how many times faster than the reference ({default})."
    return (
        f"How many times faster than the reference (`{default}` is the default here); the batch is "
        "scaled to fit a CPU, the matrices are whole."
    )


def _groups(found: dict, *keys: str) -> list[tuple]:
    return _groups_of(found["rows"], *keys)


def _groups_of(rows: list[dict], *keys: str) -> list[tuple]:
    """``(values of keys, rows)`` in the order of the file; a single key is not a tuple."""
    groups: dict = {}
    for row in rows:
        values = tuple(row[key] for key in keys)
        groups.setdefault(values if len(keys) > 1 else values[0], []).append(row)
    return list(groups.items())


def _without_graphs(found: dict) -> list[dict]:
    return [row for row in found["rows"] if not row.get("graph")]


def _contiguous(rows: list[dict], function: str) -> list[dict]:
    return [r for r in rows if r["function"] == function and r["layout"] == "contiguous"]


def _size(row: dict) -> str:
    return ", ".join(str(row[key]) for key in "TBCN")


def _pick(rows: list[dict], direction: str, backend: str) -> dict | None:
    return next((r for r in rows if (r["direction"], r["backend"]) == (direction, backend)), None)


def _against(rows: list[dict], direction: str, backend: str, gpu: bool) -> str:
    return _cell(_pick(rows, direction, backend), _pick(rows, direction, "reference"), gpu)


def _cell(row: dict | None, reference: dict | None, gpu: bool) -> str:
    """Milliseconds on a GPU; otherwise only the ratio: a CPU's times tell little elsewhere."""
    if row is None:
        return ""
    if row["ms"] is None:
        return "out of memory" if "OutOfMemory" in row["error"] else "failed"
    ratio = ""
    if reference is not None and reference["ms"] is not None:
        ratio = f"{reference['ms'] / row['ms']:.3g}x"
    if not gpu:
        return ratio
    return f"{row['ms']:.3g}" + (f" ({ratio})" if ratio and row is not reference else "")


def _memory(rows: list[dict], backend: str) -> str:
    mine, reference = (_pick(rows, "forward_backward", name) for name in (backend, "reference"))
    if mine is None or mine["ms"] is None:
        return ""
    text = f"{mine['peak_mb']:.4g} MB"
    if reference is None or reference["ms"] is None:
        return text
    return f"{text}, reference {reference['peak_mb']:.4g} MB"


if __name__ == "__main__":
    main()
