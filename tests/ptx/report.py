"""Outcomes of the cases of compiled kernels, by architecture, mode and kernel."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]


def kernels_of_the_package() -> list[str]:
    """Return the names of all Triton kernels, in the order of the source.

    Device functions are ``@triton.jit`` too: the name tells kernels apart.
    """
    return [
        node.name
        for source in sorted((ROOT / "repmtl_kernels").rglob("*.py"))
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any(ast.unparse(one).startswith("triton.jit") for one in node.decorator_list)
    ]


class Place(NamedTuple):
    """The key of a row: a kernel ran there."""

    kernel: str
    capability: int
    mode: str


class Report:
    """A pytest plugin that writes ``compiled.json`` and prints it as a table.

    A case counts for each kernel that it launched. One that failed is wrong for all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: Counter[Place] = Counter()
        self.wrong: Counter[Place] = Counter()
        self.failed: list[str] = []
        self.tests = 0
        self.known = set(kernels_of_the_package())

    def pytest_runtest_logreport(self, report) -> None:
        properties = dict(report.user_properties)
        if report.when != "call" or "compiled" not in properties:
            return
        self.tests += 1
        if report.failed:
            self.failed.append(report.nodeid)
        mode = properties["mode"]
        places = {
            Place(kernel, capability, mode)
            for capability, kernels in properties["compiled"]
            for kernel in kernels
            if kernel in self.known
        }
        self.cases.update(places)
        if report.failed:
            self.wrong.update(places)

    def rows(self) -> list[dict]:
        """Return a row for each kernel, architecture and mode that ran; no kernel is left out."""
        order = {name: i for i, name in enumerate(kernels_of_the_package())}
        places = [*self.cases, *(Place(kernel, 0, "") for kernel in self.missing())]
        places.sort(key=lambda place: (order[place.kernel], *place[1:]))
        return [
            {**place._asdict(), "cases": self.cases[place], "wrong": self.wrong[place]}
            for place in places
        ]

    def missing(self) -> set[str]:
        """Return the kernels of the package that no case launched."""
        return self.known - {place.kernel for place in self.cases}

    def pytest_sessionfinish(self, session) -> None:
        if not self.tests:
            return
        from benchmarks import machine, results

        if self.missing() and session.exitstatus == 0:
            session.exitstatus = 1
        head = machine.describe(torch.device("cpu"))
        figures = {"cases": self.tests, "wrong": len(self.failed), "failed": self.failed}
        results.save(self.folder, "compiled", head, self.rows(), **figures)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if not self.tests:
            return
        write = terminalreporter.write_line
        write(f"compiled kernels: {self.tests} cases, {len(self.failed)} wrong")
        for line in table(self.rows()):
            write(line)
        if missing := self.missing():
            write(f"no case launched: {', '.join(sorted(missing))}")


def table(rows: list[dict]) -> list[str]:
    """Return the lines of a table: kernels by architecture and mode, "wrong/cases"."""
    columns = sorted({(row["capability"], row["mode"]) for row in rows if row["cases"]})
    cells = {(r["kernel"], r["capability"], r["mode"]): f"{r['wrong']}/{r['cases']}" for r in rows}
    heads = [f"sm_{capability} {mode}" for capability, mode in columns]
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    width = max(map(len, names))
    lines = [" ".join([" " * width, *heads])]
    for name in names:
        of = [
            cells.get((name, *column), "-").rjust(len(head))
            for column, head in zip(columns, heads, strict=True)
        ]
        lines.append(" ".join([name.ljust(width), *of]))
    return lines
