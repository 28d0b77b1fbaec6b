"""Pairs of tasks: the matrix, the table of all, and their history."""

from __future__ import annotations

import math
from collections.abc import Iterator

from repmtl_kernels._monitor.numbers import percent, plain
from repmtl_kernels._monitor.report import words
from repmtl_kernels._monitor.report.charts import line_chart
from repmtl_kernels._monitor.report.findings import LEVELS, RECENT, Findings, Pair, Verdict
from repmtl_kernels._monitor.report.markup import Markup, element, table
from repmtl_kernels._monitor.report.periods import periods

CHARTS = 12  # pairs with a chart of their own; the table beside them has all
REACHES = (0.1, 0.2, 0.3, 0.5, 0.75)  # the charts share the smallest that holds all, or 1


def section(findings: Findings) -> Iterator[Markup]:
    """Yield the matrix of the cosines, its key, and the table of all pairs."""
    if not findings.pairs:
        yield element("p", words.ALONE)
        return
    yield element(
        "p",
        "The number is the cosine of two tasks' gradients at the shared representation: 1 means "
        "that they pull the same way, 0 that they have nothing to do with each other, "
        f"{plain(-1, 0)} that they pull in opposite directions. A cell has a colour only where the "
        "direction is clear.",
    )
    yield _matrix(findings)
    yield _key()
    all_pairs = table(
        "All pairs, the strongest conflict first",
        [
            "Pair", "Verdict", "Cosine", f"Last {RECENT} observations", "Samples in conflict",
            "Positions in conflict", "Observations",
        ],
        [(words.names(pair), _pair_cells(pair)) for pair in findings.pairs],
        class_="pairs",
    )  # fmt: skip
    if len(findings.pairs) > CHARTS:
        summary = element("summary", f"Table: all {len(findings.pairs)} pairs")
        all_pairs = element("details", summary, all_pairs)
    yield all_pairs


def _matrix(findings: Findings) -> Markup:
    tasks = findings.summary.tasks
    by_rows = {pair.rows: pair for pair in findings.pairs}
    rows = [
        (task, [_square(by_rows.get((min(t, u), max(t, u)))) for u in range(len(tasks))])
        for t, task in enumerate(tasks)
    ]
    return table("Cosine of each pair of tasks", ["Task", *tasks], rows, class_="matrix")


def _square(pair: Pair | None) -> Markup:
    if pair is None:
        return element("td", "itself", class_="itself")
    return element("td", plain(pair.cosine), class_=colour(pair))


def colour(pair: Pair) -> str:
    """Return the class of a pair's colour: its sign and strength, or "unclear"."""
    if not pair.verdict.sign:
        return "unclear"
    side = "help" if pair.verdict.sign > 0 else "conflict"
    return f"{side}-{sum(abs(pair.recent.mean) >= level for level in LEVELS)}"


def _key() -> Markup:
    steps = range(len(LEVELS), 0, -1)
    squares = [
        *(f"conflict-{k}" for k in steps), "unclear", *(f"help-{k}" for k in reversed(steps))
    ]  # fmt: skip
    colours = [element("span", class_=f"square {square}") for square in squares]
    return element(
        "p",
        "conflict",
        element("span", *colours, aria_hidden="true"),
        "help",
        element("span", f"Steps at {', '.join(map(str, LEVELS))}."),
        class_="key",
    )


def _pair_cells(pair: Pair) -> list[Markup | str]:
    side = {1: "help", -1: "conflict"}.get(pair.verdict.sign, "noise")
    return [
        element("td", pair.verdict.value, class_=f"words {side}"),
        plain(pair.cosine),
        words.interval(pair.recent),
        percent(pair.samples),
        percent(pair.positions),
        f"{pair.seen:,}",
    ]


def history(findings: Findings) -> Iterator[Markup]:
    """Yield the history of the cosines: charts of the strongest pairs, and a table of all."""
    kept = findings.summary.history
    seen = [pair for pair in findings.pairs if pair.verdict is not Verdict.UNSEEN]
    if not seen:
        yield element("p", "There is no history of a pair yet.")
        return
    steps = kept.steps.tolist()
    lines = {pair.tasks: kept.cosine[:, pair.rows[0], pair.rows[1]].tolist() for pair in seen}
    strongest = sorted(seen, key=lambda pair: -abs(pair.cosine))[:CHARTS]
    shown = [pair for pair in seen if pair in strongest]
    reach = _reach([value for pair in shown for value in lines[pair.tasks]])
    yield element(
        "p",
        "Above the line a pair helps each other, below it conflicts. A line that keeps crossing is "
        "noise. ",
        f"The charts have the {CHARTS} strongest pairs, and the table all."
        if len(seen) > CHARTS
        else "",
    )
    charts = [_chart(pair, steps, lines[pair.tasks], reach) for pair in shown]
    yield element("div", charts, class_="charts")
    yield periods(
        "Cosine over the run, mean of each part",
        steps,
        [(words.names(pair), lines[pair.tasks]) for pair in seen],
        plain,
    )


def _reach(values: list[float]) -> float:
    """Return the smallest of a few bounds that holds all values."""
    largest = max((abs(value) for value in values if not math.isnan(value)), default=0.0)
    return next((bound for bound in REACHES if largest <= bound), 1.0)


def _chart(pair: Pair, steps: list[int], values: list[float], reach: float) -> Markup:
    title = f"Cosine of {pair.tasks[0]} and {pair.tasks[1]} over the training steps"
    caption = element(
        "figcaption",
        element("span", words.names(pair)),
        element("span", words.trend(pair), class_="note"),
    )
    clear = pair.verdict.sign != 0
    return element("figure", caption, line_chart(title, steps, values, reach=reach, clear=clear))
