"""What the tests marked ``cell`` found, as the rows of ``compatibility.json``."""

from __future__ import annotations

from pathlib import Path

import torch


class Cells:
    """A pytest plugin. A cell is a feature and a backend; all of its tests decide on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[tuple[str, str], list[tuple]] = {}

    def pytest_runtest_logreport(self, report) -> None:
        properties = dict(report.user_properties)
        if "cell" not in properties or (report.when != "call" and report.passed):
            return
        number, feature, backend = properties["cell"]
        test = (number, report.nodeid, *outcome(report, properties))
        self.found.setdefault((feature, backend), []).append(test)

    def pytest_sessionfinish(self, session) -> None:
        if not self.found:  # nothing but tests without a cell, or none at all
            return
        from benchmarks import machine, results

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        head = machine.describe(device, measure=False)
        results.save(self.folder, "compatibility", head, self.rows(), notes=[])

    def rows(self) -> list[dict]:
        """In the order of the tests, which pytest-xdist runs in another."""
        rows = []
        for (feature, backend), tests in sorted(self.found.items(), key=lambda x: min(x[1])[0]):
            # One failure decides; a skipped test does not while another one ran.
            result, why = min((t[2:] for t in tests), key=lambda t: RANK.index(t[0]))
            names = sorted({t[1] for t in tests})
            row = {"feature": feature, "backend": backend, "outcome": result, "why": why}
            rows.append({**row, "tests": names})
        return rows


RANK = ("failed", "refused", "passed", "skipped")


def outcome(report, properties: dict) -> tuple[str, str]:
    """The outcome of one test, and its error or the reason why it was skipped."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        return "failed", crash.message.split(":")[0] if crash else report.when
    if report.skipped:
        return "skipped", str(report.longrepr[2]).removeprefix("Skipped: ")
    if "refused" in properties:
        return "refused", properties["refused"]
    return "passed", ""
