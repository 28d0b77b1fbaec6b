"""A history as a table: the means of a few parts of the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from repmtl_kernels._monitor.report.charts import mean_there
from repmtl_kernels._monitor.report.markup import Markup, element, table

PERIODS = 6  # columns


def periods(
    caption: str,
    steps: list[int],
    lines: list[tuple[Markup, list[float]]],
    say: Callable[[float], str],
) -> Markup:
    """Return the table of a history: a column for each of a few equal parts of the run.

    Args:
        caption: heading of the table.
        steps: those of the observations, at least one.
        lines: the name of each row, and its values at the steps.
        say: returns the text of a mean.
    """
    number = min(PERIODS, len(steps))
    edges = [k * len(steps) // number for k in range(number + 1)]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    heads = [_span(steps[part]) for part in parts]
    rows = [(name, [say(mean_there(values[part])) for part in parts]) for name, values in lines]
    return element(
        "details",
        element("summary", f"Table: {caption.lower()}"),
        table(caption, ["Steps", *heads], rows),
    )


def _span(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"{steps[0]:,}"
    return f"{steps[0]:,} to {steps[-1]:,}"
