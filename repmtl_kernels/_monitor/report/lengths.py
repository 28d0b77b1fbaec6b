"""How long the tasks' gradients are: who drowns the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from repmtl_kernels._monitor.numbers import count, percent, plain
from repmtl_kernels._monitor.report import words
from repmtl_kernels._monitor.report.charts import bar, stack_chart
from repmtl_kernels._monitor.report.findings import RECENT, Findings
from repmtl_kernels._monitor.report.markup import Markup, element, table
from repmtl_kernels._monitor.report.periods import periods

BANDS = 7  # colours; of more tasks the quiet ones share the last


def section(findings: Findings) -> Iterator[Markup]:
    """Yield the share of each task in the length of all gradients, and its history."""
    summary = findings.summary
    even = 1 / len(summary.tasks)
    yield element(
        "p",
        "The shared layers follow long gradients first. A bar is the task's share of the length of "
        f"all tasks' gradients; the mark is an even share, {percent(even)}.",
    )
    yield table(
        "Share of the length of all gradients",
        ["Task", "0 to 100 %", "Share", f"Last {RECENT} observations", "In averages of the others"],
        [
            (
                one.task,
                [
                    element("td", bar(f"{one.task}: {percent(one.share)}", one.share, even),
                            class_="bars"),
                    percent(one.share),
                    words.interval_percent(one.recent),
                    plain(one.times, 1),
                ],
            )
            for one in findings.loudness
        ],
        class_="lengths",
    )  # fmt: skip
    steps = summary.history.steps.tolist()
    lines = dict(zip(summary.tasks, summary.history.norm_share.T.tolist(), strict=True))
    bands = _bands(lines, summary.norm_share.tolist())
    legend = [
        element("li", element("span", class_=f"square task-{k}", aria_hidden="true"), task)
        for k, task in enumerate(bands)
    ]
    yield element(
        "figure",
        element("figcaption", "Shares over the run"),
        stack_chart("Share of each task over the training steps, stacked", steps, bands),
        element("ul", legend[::-1], class_="legend"),
        class_="wide",
    )
    yield periods(
        "Share over the run, mean of each part",
        steps,
        [(words.name(task), values) for task, values in lines.items()],
        percent,
    )


def _bands(lines: dict[str, list[float]], shares: Sequence[float]) -> dict[str, list[float]]:
    """Return the lines of all tasks, or of the loudest and the sum of the others."""
    if len(lines) <= BANDS:
        return lines
    order = sorted(
        zip(lines, shares, strict=True), key=lambda one: -(one[1] if one[1] == one[1] else 0)
    )
    loud = [task for task, _ in order[: BANDS - 1]]
    rest = [values for task, values in lines.items() if task not in loud]
    total = [sum(v for v in at if not math.isnan(v)) for at in zip(*rest, strict=True)]
    return {t: v for t, v in lines.items() if t in loud} | {
        f"the other {count(len(rest), 'task')}": total
    }
