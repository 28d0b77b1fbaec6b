"""The maps of a summary: where each task's saliency lies, as pictures, regions and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repmtl_kernels._monitor.numbers import NOT_SEEN, percent, plain
from repmtl_kernels._monitor.report import words
from repmtl_kernels._monitor.report.findings import Findings
from repmtl_kernels._monitor.report.markup import Markup, element, join, table, void
from repmtl_kernels._monitor.report.png import data_uri

TENTH = 0.1
EVEN = 1.25  # the largest tenth of a map below so many times its average: no place stands out
# The value with the brightest colour: few positions have more, and would leave the rest dark.
BRIGHTEST = 0.99
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
ALONG = ("beginning", "middle", "end")


class Region(NamedTuple):
    """A ninth of a picture (a third of a sequence), and the mean of the map there."""

    name: str
    mean: float


def plane(grid: Tensor) -> Tensor:
    """Return one task's map as ``(H, W)``: a sequence as one row, a volume averaged over depth."""
    if grid.ndim == 1:
        return grid[None]
    return grid.flatten(0, -3).nanmean(0) if grid.ndim > 2 else grid


def regions(values: Tensor) -> list[Region]:
    """Return the means of a plane's parts, row by row."""
    if len(values) == 1:
        return [Region(where, part.nanmean().item()) for where, part in _thirds(values, 1, ALONG)]
    return [
        Region("centre" if (row, column) == ("middle", "centre") else f"{row} {column}",
               part.nanmean().item())
        for row, band in _thirds(values, 0, ROWS)
        for column, part in _thirds(band, 1, COLUMNS)
    ]  # fmt: skip


def _thirds(values: Tensor, dim: int, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Return the parts along a dimension with their names; of two, none is in the middle."""
    parts = values.tensor_split(min(3, values.shape[dim]), dim)
    first, middle, last = names
    used = {1: (middle,), 2: (first, last)}.get(len(parts), names)
    return zip(used, parts, strict=True)


def concentration(values: Tensor) -> float:
    """Return the share of a map that the largest tenth of its positions carries."""
    there = values[~values.isnan()]
    if not len(there):
        return math.nan
    return (there.topk(_tenth(len(there))).values.sum() / there.sum()).item()


def _tenth(positions: int) -> int:
    return max(1, round(TENTH * positions))


def section(findings: Findings) -> Iterator[Markup]:
    """Yield the maps of all levels, a sentence for each task, and the table of the regions."""
    summary = findings.summary
    if not summary.maps:
        yield element("p", "The representation has no positions, so there are no maps.")
        return
    yield element(
        "p",
        "A bright place is one where a change of the shared representation changes the task's loss "
        "most. Each map is divided by its own mean: 1 is average.",
    )
    for level, maps in summary.maps.items():
        planes = {
            task: plane(grid) for task, grid in zip(summary.tasks, maps, strict=True)
        }  # fmt: skip
        of_level = f", level {level}" if level else ""
        if level:
            yield element("h3", f"Level {level}")
        largest = _brightest(torch.stack(list(planes.values())))
        yield element(
            "div",
            [_figure(task, values, largest, level) for task, values in planes.items()],
            class_="maps",
        )
        yield _scale(largest, maps.ndim - 1)
        yield element("ul", [element("li", _sentence(t, v)) for t, v in planes.items()])
        of_tasks = {task: regions(values) for task, values in planes.items()}
        parts = next(iter(of_tasks.values()))
        yield table(
            f"Saliency by region, in averages of the task's own map{of_level}",
            ["Task", *(part.name for part in parts)],
            [(task, [plain(part.mean) for part in found]) for task, found in of_tasks.items()],
        )


def _brightest(planes: Tensor) -> float:
    there = planes[~planes.isnan()]
    top = there.quantile(BRIGHTEST).item() if len(there) else 0.0
    return max(top, 1.0)


def _figure(task: str, values: Tensor, largest: float, level: str) -> Markup:
    height, width = values.shape
    where = f"{task}, level {level}" if level else task
    # A sequence is a band: one row of pixels would be a hairline.
    ratio = f"{width}" if height > 1 else f"{max(width // 8, 4)}"
    image = void(
        "img",
        src=data_uri(values, largest),
        alt=f"Map of {where}: {_plain_sentence(values)}",
        width=ratio,
        height=f"{height}",
    )
    return element("figure", image, element("figcaption", task))


def _scale(largest: float, dims: int) -> Markup:
    ramp = void(
        "img",
        src=data_uri(torch.linspace(0, 1, 64)[None], 1.0),
        alt="Colours from black over violet and orange to pale yellow",
        width="64",
        height="4",
    )
    volume = " Volumes are averaged over their depth." if dims > 2 else ""
    text = (
        f"0 to {plain(largest, 1)} times the task's average, and more. All tasks share this scale. "
        f"Each map is a mean over samples: it shows where a task looks on the whole.{volume}"
    )
    return element("p", ramp, " ", text, class_="scale")


def _sentence(task: str, values: Tensor) -> Markup:
    return join(words.name(task), ": ", _plain_sentence(values), ".")


def _plain_sentence(values: Tensor) -> str:
    share = concentration(values)
    if math.isnan(share):
        return NOT_SEEN
    positions = int((~values.isnan()).sum())
    if share < EVEN * _tenth(positions) / positions:
        return "even, no place stands out"
    seen = [region for region in regions(values) if not math.isnan(region.mean)]
    strongest = max(seen, key=lambda region: region.mean)
    few = positions * TENTH < 1  # the one position is more than a tenth
    largest = f"one of {positions} positions" if few else "a tenth of the positions"
    where = f"{largest} carries {percent(share)} of it"
    if strongest.mean < 1 + TENTH:
        return f"{where}, scattered"
    return f"strongest at the {strongest.name}; {where}"
