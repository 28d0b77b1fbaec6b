"""Plots and the tables of README.md, from the result files alone: ``python -m benchmarks.report``.

A table goes between ``<!-- bench:NAME:MACHINE -->`` and ``<!-- /bench -->``, with NAME one of
``losses`` (default backend against the reference), ``kernels`` (every function and contestant),
``training`` and ``static`` (what the compiler made of the kernels). Where a document has no such
markers nothing is written.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import plots
from benchmarks.machine import ROOT
from benchmarks.progress import say
from benchmarks.results import RESULTS, load

README = ROOT / "README.md"
DOCUMENTS = (README, ROOT / "benchmarks" / "README.md")
MARKED = re.compile(
    r"(?P<open><!-- bench:(?P<name>[\w-]+):(?P<machine>[\w-]+) -->\n)"
    r".*?(?P<close><!-- /bench -->)",
    re.DOTALL,
)
BACKEND_TITLES = {
    "reference": "reference",
    "reference_compiled": "`torch.compile`",
    "eager": "eager",
    "triton": "Triton",
}
METHOD_TITLES = {
    "equal_weighting": "equal weighting",
    "rep_mtl_reference": "Rep-MTL, reference losses",
    "rep_mtl": "Rep-MTL, fused losses",
    "nash_mtl": "Nash-MTL (torchjd)",
    "fairgrad": "FairGrad (torchjd)",
}


def main() -> None:
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        for path in plots.draw(folder):
            say(f"plot: {path.relative_to(ROOT)}")
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
    if name not in TABLES:
        raise ValueError(f"marker bench:{name}:{machine}: expected a name of {', '.join(TABLES)}")
    what, make = TABLES[name]
    found = load(results / machine, what)
    if found is None:
        say(f"marker bench:{name}:{machine}: no results of this machine, left as it is")
        return match[0]
    return f"{match['open']}{make(found)}\n{match['close']}"


def losses_table(found: dict) -> str:
    """The default backend against the reference, one line per shape, `csa_loss` with its memory."""
    gpu, default = "gpu" in found["machine"], found["default_backend"]
    header = ["shape", "T, B, C, N", "forward", "forward + backward", "peak extra memory"]
    lines = []
    for dtype, group in _groups(found, "precision"):
        for shape, rows in _groups_of(_contiguous(group, "csa_loss"), "shape"):
            cells = [f"{shape}, {dtype}" if gpu else shape, _size(rows[0])]
            for direction in ("forward", "forward_backward"):
                cells.append(_against(rows, direction, default, gpu))
            cells.append(_memory(rows, default))
            lines.append(cells)
    return _with_caption(markdown(header, lines), found, _kernel_units(gpu, default))


def kernels_table(found: dict) -> str:
    """Forward + backward of each function by every contestant."""
    gpu = "gpu" in found["machine"]
    backends = [b for b in BACKEND_TITLES if any(r["backend"] == b for r in found["rows"])]
    header = ["function", "shape", "dtype", *(BACKEND_TITLES[b] for b in backends)]
    header += ["fraction of the floor"]
    lines = []
    for (function, shape, precision, layout), rows in _groups(
        found, "function", "shape", "precision", "layout"
    ):
        rows = {r["backend"]: r for r in rows if r["direction"] == "forward_backward"}
        name = shape if layout == "contiguous" else f"{shape}, {layout}"
        cells = [f"`{function}`", name, precision]
        cells += [_cell(rows.get(b), rows.get("reference"), gpu) for b in backends]
        best = rows.get(found["default_backend"])
        cells.append("" if best is None or best["ms"] is None else f"{100 * best['fraction']:.2g}%")
        lines.append(cells)
    return _with_caption(
        markdown(header, lines), found, _kernel_units(gpu, found["default_backend"])
    )


def training_table(found: dict) -> str:
    gpu = "gpu" in found["machine"]
    header = ["method", "steps per second" if gpu else "time of a step", "peak memory"]
    header += ["test accuracy, left", "right"]
    base = next(row for row in found["rows"] if row["method"] == "equal_weighting")
    lines = []
    for row in found["rows"]:
        lines.append(
            [
                METHOD_TITLES[row["method"]],
                f"{row['steps_per_s']:.0f}" if gpu else f"{row['ratio_to_ew']:.2f}x",
                f"{row['peak_mb'] / base['peak_mb']:.2f}x",
                *(_accuracy(row, task) for task in ("left", "right")),
            ]
        )
    row = found["rows"][0]
    seeds = f"{len(row['seeds'])} seed" + ("s" if len(row["seeds"]) > 1 else "")
    data = "MultiMNIST" if row["data"] == "MultiMNIST" else "Noise images"
    units = (
        f"{data}, {row['network']}; {row['steps']} steps of {row['batch']} images, {seeds}"
        f"{'' if len(row['seeds']) == 1 else ' (mean and standard deviation)'}. "
        "Time and memory relative to equal weighting, all methods in turns in one run."
    )
    return _with_caption(markdown(header, lines), found, units)


def static_table(found: dict) -> str:
    """One line per kernel and mode: the worst of all shapes."""
    header = ["kernel", "mode", "registers", "spills", "shared memory", "loads", "matrix units"]
    lines = []
    for (capability, kernel, mode), rows in _groups(found, "capability", "kernel", "mode"):
        loads = {int(width) for row in rows for width in row["global_loads"] if width != "tma"}
        units = sorted({name for row in rows for name in row["matrix_instructions"]})
        lines.append(
            [
                f"`{kernel}`, sm_{capability}",
                mode,
                str(max(row["registers"] for row in rows)),
                f"{max(row['spill_bytes'] for row in rows)} B",
                f"{max(row['shared_bytes'] for row in rows) / 1024:.0f} KB",
                " ".join(str(width) for width in sorted(loads, reverse=True)),
                ", ".join(units),
            ]
        )
    shapes = ", ".join(dict.fromkeys(row["shape"] for row in found["rows"]))
    layouts = " and ".join(dict.fromkeys(row["layout"] for row in found["rows"]))
    v = found["versions"]
    return (
        f"{markdown(header, lines)}\n\nThe largest over {shapes}, {layouts}; "
        f"loads: bits that a thread loads at once, in any variant. Triton {v['triton']}, commit "
        f"{found['commit'][:10]}{', with changes' if found['dirty'] else ''}."
    )


TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "losses": ("kernels", losses_table),
    "kernels": ("kernels", kernels_table),
    "training": ("training", training_table),
    "static": ("static", static_table),
}


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def _with_caption(table: str, found: dict, units: str) -> str:
    m, v = found["machine"], found["versions"]
    hardware = m["gpu"] if "gpu" in m else f"{m['cpu']}, {m['threads']} threads"
    where = f"{hardware}; PyTorch {v['torch']}, commit {found['commit'][:10]}"
    where += f"{', with changes' if found['dirty'] else ''}, {found['date'][:10]}"
    notes = "; ".join(found["notes"])
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


def _accuracy(row: dict, task: str) -> str:
    if row["accuracy"] is None:
        return ""
    values = row["accuracy"][task]
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1%}"


if __name__ == "__main__":
    main()
