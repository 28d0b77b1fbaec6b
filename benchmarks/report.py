"""Pictures and tables of the documents, from the result files: ``python -m benchmarks.report``.

A table goes between ``<!-- bench:NAME:MACHINE -->`` and ``<!-- /bench -->``. NAME is one of a
part's tables (``parts/``), ``targets`` (what the kernels have to reach on a GPU, and whether they
do), ``headlines`` (three figures for a first page), ``quality_STUDY`` (``Delta_p`` of a study) or
``summary_STUDY`` (to equal weighting alone).
MACHINE is a folder of results, or ``simulated`` for what comes from formulas alone: ``ranks``, the
cost of negatives of all ranks, and ``kept``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import headlines, targets
from benchmarks.machine import ROOT
from benchmarks.output import draw, say
from benchmarks.parts import PARTS, distributed, kept, quality
from benchmarks.quality import pictures
from benchmarks.results import RESULTS, load

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
MARKED = re.compile(
    r"(?P<open><!-- bench:(?P<name>[\w-]+):(?P<machine>[\w-]+) -->\n)"
    r".*?(?P<close><!-- /bench -->)",
    re.DOTALL,
)
TABLES = {name: (part.name, make) for part in PARTS for name, make in part.tables.items()}
# Made from several result files.
OF_SEVERAL: dict[str, Callable[[Path], str | None]] = {
    "headlines": headlines.table,
    "targets": targets.table,
}
SIMULATED: dict[str, Callable[[], str]] = {"ranks": distributed.table, "kept": kept.table}


def main() -> None:
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        written = draw_results(folder)
        for path in sorted(folder.glob("quality_*.json")):
            written += pictures.draw(folder, path.stem, again=True)
        for path in written:
            say(f"picture: {path.relative_to(ROOT)}")
    refresh_documents()


def draw_results(folder: Path) -> list[Path]:
    """Draw the pictures of the parts that ``folder`` has results for; return the files."""
    makers = {}
    for part in PARTS:
        result = load(folder, part.name)
        if result is not None and result["rows"]:
            makers |= {name: partial(make, result) for name, make in part.figures.items()}
    return draw(folder, makers)


def refresh_documents() -> None:
    for document in DOCUMENTS:
        refresh(document, RESULTS)


def refresh(document: Path, results: Path) -> None:
    """Replace what is between the markers whose machine has results."""

    def filled(match: re.Match[str]) -> str:
        made = _made(match["name"], match["machine"], results)
        return match[0] if made is None else f"{match['open']}{made}\n{match['close']}"

    text = document.read_text()
    fresh = MARKED.sub(filled, text)
    if fresh != text:
        document.write_text(fresh)
        say(f"tables: {document.name}")


def _made(name: str, machine: str, results: Path) -> str | None:
    """Return the table of that name, None where the machine has no results for it."""
    if machine == "simulated":
        return SIMULATED[name]()
    if name in OF_SEVERAL:
        return OF_SEVERAL[name](results / machine)
    what, make = TABLES.get(name) or _of_study(name) or (None, None)
    if make is None:
        known = ", ".join([*TABLES, *OF_SEVERAL])
        raise ValueError(f"marker bench:{name}:{machine}: expected a name of {known}")
    result = load(results / machine, what)
    return None if result is None else make(result)


def _of_study(name: str) -> tuple[str, Callable[[dict], str]] | None:
    """Return the result file of a study, and what makes this table from it."""
    kind, _, study = name.partition("_")
    make = {"quality": quality.study_table, "summary": quality.study_summary}.get(kind)
    return (f"quality_{study}", make) if make else None


if __name__ == "__main__":
    main()
