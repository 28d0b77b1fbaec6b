"""Lines of a run, and the pieces of tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Contestants of the losses and their stages, in the order of a table's columns.
TITLES = {
    "reference": "reference",
    "reference_compiled": "`torch.compile`",
    "factored": "factored",
    "factored_compiled": "factored, `torch.compile`",
    "materialized": "plain PyTorch, all products",
    "bmm": "`torch.bmm`",
    "torch": "PyTorch",
    "torch_compiled": "PyTorch, `torch.compile`",
    "eager": "eager",
    "native": "native",
    "triton": "Triton",
}
COLORS = {
    "reference": "#b8b8b8",
    "reference_compiled": "#e0a458",
    "factored": "#9c755f",
    "factored_compiled": "#e07b54",
    "materialized": "#8c8c8c",
    "eager": "#4c78a8",
    "native": "#7b6cb0",
    "triton": "#3a9d6e",
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


def say(text: str = "") -> None:
    print(text, flush=True)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with all columns but the first aligned to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def of_rows(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a Markdown table of rows that map a column's title to a cell."""
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def captioned(table: str, result: dict, text: str) -> str:
    """Return a table with its caption: ``text``, then machine, PyTorch, commit and date."""
    changed = ", with changes" if result["dirty"] else ""
    return (
        f"{table}\n\n{text} {machine_of(result)}; PyTorch {result['versions']['torch']}, commit "
        f"{result['commit'][:10]}{changed}, {result['date'][:10]}."
    )


def machine_of(result: dict) -> str:
    """Return the hardware of a result file in words."""
    machine = result["machine"]
    if "gpu" in machine:
        return machine["gpu"]
    return f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"


def on_gpu(result: dict) -> bool:
    return "gpu" in result["machine"]


def where(rows: Sequence[dict], **values: object) -> list[dict]:
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def groups(rows: Sequence[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Return the rows by the values of these keys, in the order of the rows."""
    by_values: dict[tuple, list[dict]] = {}
    for row in rows:
        by_values.setdefault(tuple(row[key] for key in keys), []).append(row)
    return by_values


def by(rows: Sequence[dict], key: str) -> dict[str, dict]:
    return {row[key]: row for row in rows}


def failure(row: dict) -> str:
    """Return the cell of a row that has an error."""
    return "out of memory" if "OutOfMemory" in row["error"] else "failed"


def place_of(row: dict) -> str:
    return row["shape"] if row["layout"] == "contiguous" else f"{row['shape']}, {row['layout']}"


def size_of(row: dict) -> str:
    return ", ".join(str(row[key]) for key in "TBCN")


def amount(size: float) -> str:
    """Return bytes in MB, GB or TB."""
    units = {"TB": 1e12, "GB": 1e9, "MB": 1e6}
    unit = next((unit for unit, scale in units.items() if size >= scale), "MB")
    return f"{size / units[unit]:.3g} {unit}"


def draw(folder: Path, makers: Mapping[str, Callable[[], Figure | None]]) -> list[Path]:
    """Save each figure as ``folder/NAME.svg`` and return the files; None is no figure."""
    if find_spec("matplotlib") is None:
        say("matplotlib is not installed: no pictures (python -m benchmarks.report makes them)")
        return []
    import matplotlib

    written = []
    with matplotlib.rc_context(STYLE):
        for name, make in makers.items():
            if (figure := make()) is not None:
                written.append(folder / f"{name}.svg")
                figure.savefig(written[-1], metadata={"Date": None}, bbox_inches="tight", dpi=130)
    return written
