"""Charts as SVG. Their colours are variables of the page's style, which has a light and a dark set.

Every chart has a title for screen readers. The numbers are in a table beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from repmtl_kernels._monitor.report.markup import Markup, element

POINTS = 100  # a line has no more; each is then the mean of several observations
WIDTH, HEIGHT = 300.0, 100.0  # of a drawing, which the page stretches to its place

Point = tuple[float, float]


def line_chart(
    title: str, steps: Sequence[int], values: Sequence[float], *, reach: float, clear: bool
) -> Markup:
    """Return a line from ``-reach`` to ``reach`` over the steps, with its area.

    The area has the colour of its sign where the direction is ``clear``, and is grey if not.

    A value that is NaN is a gap. There is at least one value.
    """
    steps, values = thinned(steps, values)

    def place(step: float, value: float) -> Point:
        return _across(step, steps), (1 - value / reach) * HEIGHT / 2

    marks = [_level(HEIGHT / 2)]
    runs = _runs(steps, values)
    for style, side in (("help", 1), ("conflict", -1)):
        for run in runs:
            points = [place(step, side * max(side * v, 0.0)) for step, v in _with_zeros(run)]
            outline = [(points[0][0], HEIGHT / 2), *points, (points[-1][0], HEIGHT / 2)]
            marks.append(
                element(
                    "polygon",
                    class_=f"area {style if clear else 'unclear'}",
                    points=_points(outline),
                )
            )
    for run in runs:
        points = [place(*point) for point in run]
        # A line of no length is a dot: its ends are round.
        marks.append(element("polyline", class_="line", points=_points(points * 2)
                             if len(points) == 1 else _points(points)))  # fmt: skip
    return _plot(title, marks, [f"{reach:g}", "0", f"\N{MINUS SIGN}{reach:g}"], steps)


def stack_chart(title: str, steps: Sequence[int], bands: Mapping[str, Sequence[float]]) -> Markup:
    """Return shares of 1 on top of each other over the steps, the first at the bottom.

    A value that is NaN counts as 0: the task was not there.
    """
    at, _ = thinned(steps, [0.0] * len(steps))
    below = [0.0] * len(at)
    marks = []
    for k, values in enumerate(bands.values()):
        _, shares = thinned(steps, values)
        above = [b + (0.0 if math.isnan(s) else s) for b, s in zip(below, shares, strict=True)]
        outline = [*zip(at, above, strict=True), *zip(at[::-1], below[::-1], strict=True)]
        if len(at) == 1:  # one observation is a column
            outline = [*outline[:1], (at[0] + 1, above[0]), (at[0] + 1, below[0]), *outline[1:]]
        points = [(_across(step, at), (1 - share) * HEIGHT) for step, share in outline]
        marks.append(element("polygon", class_=f"band task-{k}", points=_points(points)))
        below = above
    return _plot(title, marks, ["100 %", "50 %", "0"], steps)


def bar(title: str, share: float, level: float) -> Markup:
    """Return a bar of this share of its full width, with a mark at ``level``."""
    length = 0.0 if math.isnan(share) else share * WIDTH
    return _svg(
        title,
        [
            element("rect", class_="track", width=WIDTH, height=HEIGHT),
            element("rect", class_="bar", width=length, height=HEIGHT),
            element("line", class_="mark", x1=level * WIDTH, x2=level * WIDTH, y1=0, y2=HEIGHT),
        ],
    )


def _across(step: float, steps: Sequence[float]) -> float:
    return (step - steps[0]) / max(steps[-1] - steps[0], 1) * WIDTH


def _level(y: float) -> Markup:
    return element("line", class_="level", x1=0, x2=WIDTH, y1=y, y2=y)


def _plot(title: str, marks: list[Markup], heights: list[str], steps: Sequence[int]) -> Markup:
    """Return a drawing with labels beside it, which keep their size when it is stretched."""
    ends = [f"step {steps[0]:,}"] + [f"{steps[-1]:,}"] * (len(steps) > 1)
    return element(
        "div",
        element("div", [element("span", h) for h in heights], class_="y", aria_hidden="true"),
        _svg(title, marks),
        element("div", [element("span", end) for end in ends], class_="x", aria_hidden="true"),
        class_="plot",
    )


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return at most ``POINTS`` points: means over equal numbers of points, gaps left out."""
    width = math.ceil(len(steps) / POINTS)
    blocks = [slice(k, k + width) for k in range(0, len(steps), width)]
    return [steps[b][0] for b in blocks], [mean_there(values[b]) for b in blocks]


def mean_there(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there is none."""
    there = [value for value in values if not math.isnan(value)]
    return math.fsum(there) / len(there) if there else math.nan


def _runs(steps: Sequence[int], values: Sequence[float]) -> list[list[Point]]:
    """Return the stretches without a gap."""
    points = zip(steps, values, strict=True)
    grouped = itertools.groupby(points, key=lambda point: math.isnan(point[1]))
    return [list(run) for gap, run in grouped if not gap]


def _with_zeros(run: Sequence[Point]) -> list[Point]:
    """Return the points, and the ones where the line crosses 0."""
    full = [run[0]]
    for (s, v), (t, w) in itertools.pairwise(run):
        if v * w < 0:
            full.append((s + (t - s) * v / (v - w), 0.0))
        full.append((t, w))
    return full


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(title: str, marks: list[Markup]) -> Markup:
    return element(
        "svg",
        element("title", title),
        *marks,
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        preserveAspectRatio="none",
        role="img",
        aria_label=title,
    )
