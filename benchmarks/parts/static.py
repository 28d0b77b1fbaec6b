"""The compiler's report on the Triton kernels, see :mod:`benchmarks.static_report`."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.output import groups, markdown
from benchmarks.part import Part


def table(result: dict) -> str:
    """Return a line for a kernel and its modes that come out alike: the worst of all shapes."""
    rows = result["rows"]
    targets = sorted({row["capability"] for row in rows})
    lines = []
    for (kernel,), of_kernel in groups(rows, "kernel").items():
        modes: dict[tuple, list[str]] = {}
        for (mode,), of_mode in groups(of_kernel, "mode").items():
            by_target = groups(of_mode, "capability")
            cells = _cells([by_target.get((target,), []) for target in targets])
            modes.setdefault(cells, []).append(mode)
        lines += [[f"`{kernel}`", ", ".join(m), *cells] for cells, m in modes.items()]
    shapes = ", ".join(dict.fromkeys(shape for row in rows for shape in row["shapes"]))
    layouts = " and ".join(dict.fromkeys(row["layout"] for row in rows))
    names = ", ".join(f"sm_{target}" for target in targets)
    header = ["kernel", "mode", "registers", "spills", "shared memory", "loads", "matrix units"]
    return (
        f"{markdown(header, lines)}\n\nThe largest over {shapes}, {layouts}; for {names} in turn. "
        f"Loads: bits that a thread loads at once, in any variant. The compiler ran without a GPU. "
        f"Triton {result['versions']['triton']}, commit {result['commit'][:10]}"
        f"{', with changes' if result['dirty'] else ''}."
    )


def _cells(by_target: list[list[dict]]) -> tuple[str, ...]:
    """Return registers, spills, shared memory, loads and matrix units, target by target."""

    def each(show: Callable[[list[dict]], str]) -> str:
        shown = [show(rows) for rows in by_target]
        return shown[0] if len(set(shown)) == 1 else " / ".join(value or "-" for value in shown)

    def widths(rows: list[dict]) -> str:
        bits = {int(width) for row in rows for width in row["global_loads"] if width != "tma"}
        return " ".join(str(width) for width in sorted(bits, reverse=True))

    return (
        each(lambda rows: str(max(row["registers"] for row in rows))),
        each(lambda rows: f"{max(row['spill_bytes'] for row in rows)} B"),
        each(lambda rows: f"{max(row['shared_bytes'] for row in rows) / 1024:.0f} KB"),
        each(widths),
        each(lambda rows: " ".join(sorted({n for r in rows for n in r["matrix_instructions"]}))),
    )


PART = Part("static", tables={"static": table})
