"""How time and memory grow with each size: one is varied, the others stay as they are.

Two things are measured: ``rep_mtl_loss``, forward and backward, and the contrast stage alone with
its gradient, whose anchors are those of all ranks or of one large batch. The plain PyTorch rival of
a sweep grows the fastest, and is stopped where it gets too slow or too large.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import floors, kernels, line_up, rivals
from benchmarks.findings import Findings, described, free
from benchmarks.kernels import FAILURES
from benchmarks.line_up import BFLOAT16, FLOAT32, TF32, Case, Effort, Precision
from benchmarks.progress import say, track
from benchmarks.rotation import Rotating
from benchmarks.shapes import SHAPES, Shape
from benchmarks.stages import EFFORTS, QUICK, TEMPERATURE
from benchmarks.timing import side_by_side
from repmtl_kernels.backends import choice, contract
from repmtl_kernels.backends.contract import AllSamples

FORWARD_BACKWARD = "forward_backward"
MATERIALIZED = "materialized"
# In turn: of the losses, and of the anchors, which are float32 with either.
PRECISIONS = {"cpu": ((FLOAT32, FLOAT32),), "cuda": ((BFLOAT16, FLOAT32), (TF32, TF32))}
# A rival is left out where it is expected to take more than this share of the device's memory.
MEMORY_SHARE = 0.5
# A fitted power that is more than this above the expected one is worth a look.
TOLERANCE = 0.15


class Growth(NamedTuple):
    """Powers of the varied size, at most."""

    time: int
    memory: int


class Sweep(NamedTuple):
    axis: str
    rival: str
    expected: Growth  # positions, channels: where the other one is the smaller side of the matrices
    of_rival: Growth


# Most telling first: when time runs out, what is left out is at the end.
SWEEPS = {
    "batch": Sweep("batch B", kernels.REFERENCE, Growth(1, 1), Growth(1, 1)),
    "anchors": Sweep("samples G of all ranks", MATERIALIZED, Growth(1, 1), Growth(1, 1)),
    "positions": Sweep("positions N", kernels.REFERENCE, Growth(1, 1), Growth(1, 1)),
    "channels": Sweep("channels C", kernels.REFERENCE, Growth(1, 1), Growth(2, 2)),
    "all_anchors": Sweep("samples B of one process", MATERIALIZED, Growth(2, 1), Growth(2, 2)),
    "tasks": Sweep("tasks T", kernels.REFERENCE, Growth(1, 1), Growth(1, 1)),
}  # fmt: skip
OF_ANCHORS = ("anchors", "all_anchors")


class Plan(NamedTuple):
    base: Shape
    anchors: Shape  # of the contrast stage; its batch is the local one
    values: dict[str, tuple[int, ...]]  # of each sweep, ascending
    rival_ms: float  # a rival that took longer is stopped


# Positions: odd numbers and others that no tile divides, and on both sides of N = C.
PLANS = {
    "cpu": Plan(
        Shape("base", tasks=3, batch=4, channels=256, height=14, width=14, cpu_batch=4, network=""),
        SHAPES["office49"],
        {
            "batch": (2, 4, 8, 16, 32, 64),
            "anchors": (64, 256, 1024, 4096, 8192, 16384, 32768),
            "positions": (49, 196, 255, 256, 259, 484, 961, 1728, 3136),
            "channels": (32, 64, 128, 196, 256, 512, 1024, 2048),
            "all_anchors": (64, 128, 256, 512, 1024, 2048),
            "tasks": (1, 2, 3, 4, 6, 8, 9, 12, 16),
        },
        rival_ms=1500,
    ),
    "cuda": Plan(
        Shape(
            "base", tasks=3, batch=16, channels=1024, height=32, width=32, cpu_batch=16, network=""
        ),
        SHAPES["office49"],
        {
            "batch": (2, 4, 8, 16, 32, 64, 128, 256),
            "anchors": (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
            "positions": (49, 196, 441, 784, 1023, 1024, 1025, 1728, 2304, 4096, 6400, 9216),
            "channels": (128, 256, 512, 1024, 2048, 4096, 8192),
            "all_anchors": (64, 128, 256, 512, 1024, 2048, 4096, 8192),
            # Triton compiles its kernels anew for each number of tasks in a launch.
            "tasks": (1, 2, 3, 4, 8, 9, 16),
        },
        rival_ms=250,
    ),
}


class LineUp(NamedTuple):
    """The contestants of a point by name, each made when its turn comes, and the exact value."""

    makers: dict[str, Callable[[], Rotating]]
    exact: float  # of the first set of inputs, by the eager backend in float64


@dataclass(frozen=True)
class LossPoint:
    """``rep_mtl_loss`` at one size."""

    sweep: str
    value: int
    case: Case

    def __str__(self) -> str:
        return str(self.case)

    @property
    def rival_bytes(self) -> int:
        """About: C x C matrices as autograd keeps them and their gradients, and the saliencies'."""
        s = self.case.shape
        matrices = s.tasks * s.batch * s.channels**2
        return (5 * matrices + 4 * s.elements) * self.case.precision.dtype.itemsize

    def line_up(self, device: torch.device) -> LineUp:
        inputs = kernels.make_inputs(self.case, device)
        losses = kernels.contestants(self.case, device)
        makers = {
            name: partial(kernels.Call, FORWARD_BACKWARD, loss, inputs)
            for name, loss in losses.items()
        }
        with torch.no_grad():
            exact = losses["eager"]([s.double() for s in inputs[0]])
        return LineUp(makers, exact.item())

    def work(self, tiling: floors.Tiling) -> list[floors.Pass]:
        case = self.case
        itemsize = case.precision.dtype.itemsize
        return floors.passes(case.function, case.shape, itemsize, FORWARD_BACKWARD, tiling)

    def labels(self, backend: str) -> dict:
        return kernels.labels(self.case, backend, FORWARD_BACKWARD)


@dataclass(frozen=True)
class AnchorPoint:
    """The contrast stage: B samples against all G, or all against each other where B is G."""

    sweep: str
    value: int
    case: Case

    def __str__(self) -> str:
        s = self.case.shape
        size = f"T{s.tasks} B{s.batch} G{self.value} C{s.channels}"
        return f"contrast {self.sweep} ({size}) {self.case.precision.name}"

    @property
    def rival_bytes(self) -> int:
        """About: the products, their squares, and the gradients of both."""
        s = self.case.shape
        return 4 * floors.SUM * s.tasks**2 * s.batch * self.value

    def line_up(self, device: torch.device) -> LineUp:
        s = self.case.shape
        generator = torch.Generator(device).manual_seed(0)
        set_bytes = floors.SUM * s.tasks * s.channels * self.value
        sets = [self._anchors(generator) for _ in range(kernels.input_sets(set_bytes, device))]
        makers = {MATERIALIZED: partial(Rotating, _materialized, sets)}
        makers |= {
            name: partial(_of_backend, name, sets)
            for name in kernels.backends(self.case.precision, device)
        }
        return LineUp(makers, _exact(*sets[0]))

    def _anchors(self, generator: torch.Generator) -> AnchorSet:
        """Of samples that have something in common: similarities that are not all 0."""
        s, device = self.case.shape, generator.device
        common = torch.randn(s.tasks, s.channels, generator=generator, device=device)
        a = torch.randn(self.value, s.tasks, s.channels, generator=generator, device=device)
        a += common
        own, all_samples = a[: s.batch].transpose(0, 1).contiguous(), None
        if self.sweep == "anchors":
            # As they arrive from the ranks: sample by sample. Any number will do for the sums that
            # the other ranks would tell.
            unit = choice.load("eager").anchors(a.transpose(0, 1), eps=0.0, with_grad=False).unit
            told = torch.ones(2, self.value, device=device)
            unit = unit.transpose(0, 1).contiguous().transpose(0, 1)
            all_samples = AllSamples(unit, 0, lambda columns: told)
        return own, all_samples

    def work(self, tiling: floors.Tiling) -> list[floors.Pass]:
        return floors.contrast(
            self.case.shape, floors.SUM, tiling, with_grad=True, total=self.value
        )

    def labels(self, backend: str) -> dict:
        return kernels.labels(self.case, backend, FORWARD_BACKWARD) | {"G": self.value}


Point = LossPoint | AnchorPoint
AnchorSet = tuple[Tensor, AllSamples | None]  # anchors (T, B, C), not yet unit ones


def _of_backend(backend: str, sets: Sequence[AnchorSet]) -> Rotating:
    stages = choice.load(backend)
    of_sets = [(stages.anchors(a, eps=0.0, with_grad=True), all_samples) for a, all_samples in sets]

    def run(inputs: tuple[contract.Anchors, AllSamples | None]) -> Tensor:
        anchors, all_samples = inputs
        options = {"temperature": TEMPERATURE, "with_grad": True, "all_samples": all_samples}
        return stages.contrast(anchors, **options).logsumexp

    return Rotating(run, of_sets)


def _materialized(inputs: AnchorSet) -> Tensor:
    logsumexp, _ = rivals.contrast(*inputs, temperature=TEMPERATURE)
    return logsumexp


def _exact(a: Tensor, all_samples: AllSamples | None) -> float:
    stages = choice.load("eager")
    if all_samples is not None:
        all_samples = all_samples._replace(unit=all_samples.unit.double())
    anchors = stages.anchors(a.double(), eps=0.0, with_grad=False)
    options = {"temperature": TEMPERATURE, "with_grad": False, "all_samples": all_samples}
    return stages.contrast(anchors, **options).logsumexp.mean().item()


def points(device_type: str, quick: bool) -> list[Point]:
    """Every size of every sweep, in two precisions on CUDA, the second after all of the first."""
    plan = PLANS[device_type]
    found: list[Point] = []
    for of_losses, of_anchors in PRECISIONS[device_type][: 1 if quick else None]:
        for sweep in SWEEPS:
            precision = of_anchors if sweep in OF_ANCHORS else of_losses
            values = plan.values[sweep][:: 2 if quick else 1]
            found += [_point(plan, sweep, value, precision) for value in values]
    return found


def _point(plan: Plan, sweep: str, value: int, precision: Precision) -> Point:
    if sweep in OF_ANCHORS:
        over_all = sweep == "anchors"
        batch = plan.anchors.batch if over_all else value
        shape = replace(plan.anchors, name=sweep, batch=batch)
        layout = "gathered" if over_all else "contiguous"
        return AnchorPoint(sweep, value, Case("contrast", shape, precision, layout, False))
    if sweep == "positions":
        height, width = grid(value)
        sizes = {"height": height, "width": width}
    else:
        sizes = {sweep: value}
    shape = replace(plan.base, name=sweep, **sizes)
    return LossPoint(sweep, value, Case("rep_mtl_loss", shape, precision, "contiguous", False))


def grid(positions: int) -> tuple[int, int]:
    """Height and width, as nearly square as they can be."""
    height = next(h for h in range(math.isqrt(positions), 0, -1) if positions % h == 0)
    return height, positions // height


def measure(
    device: torch.device,
    ceilings: dict,
    *,
    quick: bool,
    deadline: float,
    save: Callable[[list[dict], list[str]], None] | None = None,
) -> tuple[list[dict], list[str]]:
    """Rows for every point and notes on what was left out.

    deadline: ``time.monotonic()`` after which no further point starts.
    save: is called with the rows and notes of each point as it comes, so that none is lost.
    """
    findings = Findings(save)
    stops = Stops(PLANS[device.type].rival_ms, MEMORY_SHARE * total_bytes(device))
    effort = QUICK if quick else EFFORTS[device.type]
    for point in track(points(device.type, quick), "scaling"):
        if time.monotonic() > deadline:
            findings.note(f"left out for time: {point}")
            continue
        without = stops.before(point)
        for note in without or ():
            findings.note(note)
        run = partial(measure_point, point, device, ceilings, effort, rival=without is None)
        found = findings.measured(point, run, device)
        if found is None:  # the inputs alone
            continue
        stops.see(point, found)
        say(summary_line(point, found))
        findings.save()
    return findings.rows, findings.notes


class Stops:
    """Which sweeps their plain PyTorch rival is out of, from some size on."""

    def __init__(self, most_ms: float, most_bytes: float) -> None:
        self.most_ms, self.most_bytes = most_ms, most_bytes
        self.why: dict[tuple[str, str], str] = {}
        self.noted: set[tuple[str, str]] = set()

    def before(self, point: Point) -> list[str] | None:
        """None where the rival takes part; else what has to be noted, once for each sweep."""
        key = point.sweep, point.case.precision.name
        if point.rival_bytes > self.most_bytes:
            self.why.setdefault(
                key,
                f"about {point.rival_bytes / 1e9:.3g} GB, over the limit of "
                f"{self.most_bytes / 1e9:.3g} GB",
            )
        if key not in self.why:
            return None
        if key in self.noted:
            return []
        self.noted.add(key)
        rival, (sweep, precision) = SWEEPS[point.sweep].rival, key
        return [f"{rival} left out of {sweep} ({precision}) from {point.value} on: {self.why[key]}"]

    def see(self, point: Point, rows: Sequence[dict]) -> None:
        """Stops a rival that failed or took too long."""
        rival = SWEEPS[point.sweep].rival
        row = next((row for row in rows if row["backend"] == rival), None)
        if row is None:
            return
        why = row["error"]
        if why is None and row["ms"] > self.most_ms:
            why = f"{row['ms']:.4g} ms, over the limit of {self.most_ms:g} ms"
        if why is not None:
            self.why[point.sweep, point.case.precision.name] = f"at {point.value} {why}"


def total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_point(
    point: Point, device: torch.device, ceilings: dict, effort: Effort, *, rival: bool
) -> list[dict]:
    """A row for each contestant; ``rival``: whether the plain PyTorch one takes part."""
    with line_up.products_in(point.case.precision):
        rows = _rows(point, device, ceilings, effort, rival)
    free(device)  # what points of other sizes can't use
    return rows


def _rows(
    point: Point, device: torch.device, ceilings: dict, effort: Effort, rival: bool
) -> list[dict]:
    precision = point.case.precision
    makers, exact = point.line_up(device)
    if not rival:
        del makers[SWEEPS[point.sweep].rival]
    calls: dict[str, Rotating] = {}
    errors: dict[str, str] = {}
    for name, make in makers.items():
        try:
            call = make()
            value = call().mean().item()
        except FAILURES as failure:
            errors[name] = described(failure)
            free(device)
            continue
        if wrong := kernels.disagreement(precision, name, value, exact):
            errors[name] = wrong
            continue
        calls[name] = call
    timings = side_by_side(calls, device, **effort._asdict())
    rows = []
    for name in makers:
        figures: dict = {"ms": None, "error": errors.get(name)}
        if name in calls:
            timing = timings[name]
            figures = {
                **kernels.time_and_memory(calls[name], timing, device, graph=False),
                **kernels.rates(point.work, precision, timing.ms, ceilings),
                "error": None,
            }
        row = {"sweep": point.sweep, "value": point.value} | point.labels(name)
        rows.append(row | kernels.rounded(figures))
    return rows


def summary_line(point: Point, rows: Sequence[dict]) -> str:
    shown = (
        f"{r['backend']} " + (r["error"] or f"{r['ms']:.4g} ms, {r['peak_mb']:.4g} MB")
        for r in rows
    )
    return f"{point}: {'; '.join(shown)}"


# --- what the rows say ---


class Line(NamedTuple):
    """One contestant in one sweep, with the powers of the size that its figures grow with."""

    sweep: str
    precision: str
    backend: str
    rows: list[dict]  # by size, ascending
    time: float | None
    floor: float | None
    memory: float | None
    expected: Growth


def lines(rows: Sequence[dict]) -> Iterator[Line]:
    """Of measured rows, in the order of the file; rows without a time are no points of a line."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        if row["ms"] is not None:
            groups.setdefault((row["sweep"], row["precision"], row["backend"]), []).append(row)
    for (sweep, precision, backend), group in groups.items():
        group.sort(key=lambda row: row["value"])
        sizes = [row["value"] for row in group]
        slopes = (slope(sizes, [r[key] for r in group]) for key in ("ms", "floor_ms", "peak_mb"))
        about = SWEEPS[sweep]
        expected = about.of_rival if backend == about.rival else about.expected
        yield Line(sweep, precision, backend, group, *slopes, expected)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The power of the size that the last half of the values grows with; None of a single one.

    A least-squares fit of the logarithms. Small sizes are bound by launches, not by their work.
    """
    kept = max(2, len(sizes) // 2)
    if len(sizes) < 2:
        return None
    x, y = ([math.log(v) for v in some[-kept:]] for some in (sizes, values))
    return statistics.linear_regression(x, y).slope
