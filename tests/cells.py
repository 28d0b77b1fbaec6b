"""The outcomes of the tests marked ``cell``, as the rows of ``compatibility.json``."""

from __future__ import annotations

from pathlib import Path

import torch


class Cells:
    """A pytest plugin that writes one row for each cell: a feature and a backend.

    All tests of a cell decide on it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tests: dict[tuple[str, str], list[tuple]] = {}

    def pytest_runtest_logreport(self, report) -> None:
        properties = dict(report.user_properties)
        if "cell" not in properties or (report.when != "call" and report.passed):
            return
        number, feature, backend = properties["cell"]
        test = (number, report.nodeid, *outcome(report, properties))
        self.tests.setdefault((feature, backend), []).append(test)

    def pytest_sessionfinish(self, session) -> None:
        if not self.tests:  # no test with a cell ran
            return
        from benchmarks import machine, results

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        head = machine.describe(device)
        results.save(self.folder, "compatibility", head, self.rows(), notes=[])

    def rows(self) -> list[dict]:
        """Return the rows in the order of the source, not in that of pytest-xdist."""
        rows = []
        for (feature, backend), tests in sorted(self.tests.items(), key=lambda x: min(x[1])[0]):
            result, why = min((t[2:] for t in tests), key=lambda t: DECISIVE.index(t[0]))
            names = sorted({t[1] for t in tests})
            row = {"feature": feature, "backend": backend, "outcome": result, "why": why}
            rows.append({**row, "tests": names})
        return rows


# The first of these that a test of the cell has decides: a skipped test only if no other ran.
DECISIVE = ("failed", "refused", "passed", "skipped")


def outcome(report, properties: dict) -> tuple[str, str]:
    """Return the outcome of one test, and its error or the reason why it was skipped."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        return "failed", crash.message.split(":")[0] if crash else report.when
    if report.skipped:
        return "skipped", str(report.longrepr[2]).removeprefix("Skipped: ")
    if "refused" in properties:
        return "refused", properties["refused"]
    return "passed", ""
