"""How time and memory grow with each size: one is varied, the others stay as they are.

Two things are measured: ``rep_mtl_loss``, forward and backward, and the contrast stage alone with
its gradient, whose anchors are those of all ranks or of one large batch. The plain PyTorch rival of
a sweep grows the fastest, and is stopped where it gets too slow or runs out of memory.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from benchmarks import cases, floors, line_up, output, rivals
from benchmarks.cases import BFLOAT16, FLOAT32, TF32, Case, Precision
from benchmarks.line_up import FORWARD_BACKWARD, REFERENCE, LineUp, Way
from benchmarks.output import TITLES
from benchmarks.part import Part, Run
from benchmarks.parts import kernels
from benchmarks.parts.stages import EFFORTS, QUICK, TEMPERATURE
from benchmarks.rotation import Rotating
from benchmarks.shapes import SHAPES, Shape
from repmtl_kernels.backends import choice, contract
from repmtl_kernels.backends.contract import AllSamples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATERIALIZED = "materialized"
# Pairs that are measured in turn: for the losses, and for the anchors, which are always float32.
PRECISIONS = {"cpu": ((FLOAT32, FLOAT32),), "cuda": ((BFLOAT16, FLOAT32), (TF32, TF32))}
# A fitted power that is more than this above the expected one is worth a look.
TOLERANCE = 0.15


class Sweep(NamedTuple):
    """A varied size, its rival, and the powers of (time, memory) that ours and the rival may have.

    Positions and channels: where the other one is the smaller side of the matrices.
    """

    axis: str
    rival: str
    expected: tuple[int, int] = (1, 1)
    of_rival: tuple[int, int] = (1, 1)


# The decisive sweeps first: when time runs out, the last ones are left out.
SWEEPS = {
    "batch": Sweep("batch B", REFERENCE),
    "anchors": Sweep("samples G of all ranks", MATERIALIZED),
    "positions": Sweep("positions N", REFERENCE),
    "channels": Sweep("channels C", REFERENCE, of_rival=(2, 2)),
    "all_anchors": Sweep("samples B of one process", MATERIALIZED, (2, 1), (2, 2)),
    "tasks": Sweep("tasks T", REFERENCE),
}
OF_ANCHORS = ("anchors", "all_anchors")


class Plan(NamedTuple):
    """The sizes that stay, those that are varied, and the milliseconds that stop a rival."""

    base: Shape
    anchors: Shape  # of the contrast stage; its batch is the local one
    values: dict[str, tuple[int, ...]]  # of each sweep, ascending
    rival_ms: float


# Positions: odd numbers and others that no tile divides, and on both sides of N = C.
PLANS = {
    "cpu": Plan(
        Shape("base", 3, 4, 256, 14, 14, 4, ""),
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
        Shape("base", 3, 16, 1024, 32, 32, 16, ""),
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


@dataclass(frozen=True)
class LossPoint:
    """``rep_mtl_loss`` at one size."""

    sweep: str
    value: int
    case: Case

    def __str__(self) -> str:
        return f"{self.case}, {self.sweep} {self.value}"

    def calls(self, device: torch.device) -> tuple[dict[str, Callable[[], Rotating]], float]:
        """Return makers of the contestants' calls, and the exact value of the first inputs."""
        inputs = cases.make_inputs(self.case, device)
        losses = kernels.contestants(self.case, device)
        makers = {
            name: partial(kernels.call_of, loss, FORWARD_BACKWARD, inputs)
            for name, loss in losses.items()
        }
        with torch.no_grad():
            exact = losses["eager"]([s.double() for s in inputs[0]])
        return makers, exact.item()

    def work(self, tiling: floors.Tiling) -> list[floors.Pass]:
        case = self.case
        return floors.passes(case.function, case.shape, case.itemsize, FORWARD_BACKWARD, tiling)

    def labels(self) -> dict:
        return {"sweep": self.sweep, "value": self.value} | self.case.labels()


@dataclass(frozen=True)
class AnchorPoint(LossPoint):
    """The contrast stage: B samples against all G, or all against each other where B is G."""

    def calls(self, device: torch.device) -> tuple[dict[str, Callable[[], Rotating]], float]:
        s = self.case.shape
        generator = torch.Generator(device).manual_seed(0)
        set_bytes = floors.SUM * s.tasks * s.channels * self.value
        sets = [self._anchors(generator) for _ in range(cases.input_sets(set_bytes, device))]
        makers = {MATERIALIZED: partial(Rotating, _materialized, sets)}
        for backend in cases.backends(self.case.precision, device):
            makers[backend] = partial(_contrast, backend, sets)
        return makers, _exact(*sets[0])

    def _anchors(self, generator: torch.Generator) -> AnchorSet:
        """Make anchors that have something in common: their similarities are not all 0."""
        s, device = self.case.shape, generator.device
        common = torch.randn(s.tasks, s.channels, generator=generator, device=device)
        a = torch.randn(self.value, s.tasks, s.channels, generator=generator, device=device)
        a += common
        own, all_samples = a[: s.batch].transpose(0, 1).contiguous(), None
        if self.sweep == "anchors":
            # As they arrive from the ranks: sample by sample. Any numbers will do for the sums
            # that the other ranks would send.
            unit = choice.load("eager").anchors(a.transpose(0, 1), eps=0.0, with_grad=False).unit
            sums = torch.ones(2, self.value, device=device)
            unit = unit.transpose(0, 1).contiguous().transpose(0, 1)
            all_samples = AllSamples(unit, 0, lambda columns: sums)
        return own, all_samples

    def work(self, tiling: floors.Tiling) -> list[floors.Pass]:
        s = self.case.shape
        return floors.contrast(s, floors.SUM, tiling, with_grad=True, total=self.value)

    def labels(self) -> dict:
        return super().labels() | {"G": self.value}


AnchorSet = tuple[Tensor, AllSamples | None]  # anchors (T, B, C), not yet of unit length


def _contrast(backend: str, sets: Sequence[AnchorSet]) -> Rotating:
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


def points(device_type: str, quick: bool) -> list[LossPoint]:
    """Return every size of every sweep, in two precisions on CUDA, one after the other."""
    plan = PLANS[device_type]
    return [
        point(plan, sweep, value, of_anchors if sweep in OF_ANCHORS else of_losses)
        for of_losses, of_anchors in PRECISIONS[device_type][: 1 if quick else None]
        for sweep in SWEEPS
        for value in plan.values[sweep][:: 2 if quick else 1]
    ]


def point(plan: Plan, sweep: str, value: int, precision: Precision) -> LossPoint:
    if sweep in OF_ANCHORS:
        gathered = sweep == "anchors"
        shape = replace(plan.anchors, name=sweep, batch=plan.anchors.batch if gathered else value)
        layout = "gathered" if gathered else "contiguous"
        return AnchorPoint(sweep, value, Case("contrast", shape, precision, layout))
    sizes = {sweep: value}
    if sweep == "positions":
        height, width = grid(value)
        sizes = {"height": height, "width": width}
    shape = replace(plan.base, name=sweep, **sizes)
    return LossPoint(sweep, value, Case("rep_mtl_loss", shape, precision))


def grid(positions: int) -> tuple[int, int]:
    """Return height and width, as nearly square as they can be."""
    height = next(h for h in range(math.isqrt(positions), 0, -1) if positions % h == 0)
    return height, positions // height


def measure(run: Run) -> None:
    stopped: set[tuple[str, str]] = set()  # sweeps and precisions whose rival is left out
    effort = QUICK if run.quick else EFFORTS[run.device.type]
    most_ms = PLANS[run.device.type].rival_ms

    def one(at: LossPoint) -> list[dict]:
        rival, key = SWEEPS[at.sweep].rival, (at.sweep, at.case.precision.name)
        rows = measure_point(at, run.device, run.head["measured"], effort, key not in stopped)
        for row in rows:
            if row["backend"] == rival and (row["error"] or row["ms"] > most_ms):
                why = row["error"] or f"{row['ms']:.4g} ms, over the limit of {most_ms:g} ms"
                stopped.add(key)
                run.note(f"{rival} left out of {key[0]} ({key[1]}) after {at.value}: {why}")
        return rows

    run.each(points(run.device.type, run.quick), one)


def measure_point(
    at: LossPoint, device: torch.device, ceilings: dict, effort: cases.Effort, rival: bool
) -> list[dict]:
    """Return a row for each contestant; ``rival``: whether the plain PyTorch one takes part."""
    with cases.products_in(at.case.precision):
        makers, exact = at.calls(device)
        if not rival:
            del makers[SWEEPS[at.sweep].rival]
        contest = LineUp(
            {Way(name, FORWARD_BACKWARD): make for name, make in makers.items()},
            at.case.precision,
            lambda way, tiling: at.work(tiling),
            lambda way: at.labels(),
            exact,
            graphs=False,
        )
        return line_up.report_rows(at, contest.rows(device, ceilings, effort))


class Line(NamedTuple):
    """One contestant in one sweep, with the powers of the size that its figures grow with."""

    sweep: str
    precision: str
    backend: str
    rows: list[dict]  # by size, ascending
    time: float | None
    floor: float | None
    memory: float | None
    expected: tuple[int, int]  # of time and memory, at most


def lines(rows: Sequence[dict]) -> Iterator[Line]:
    """Yield the lines in the order of the file; rows without a time are no points of a line."""
    measured = [row for row in rows if row["ms"] is not None]
    for where, group in output.groups(measured, "sweep", "precision", "backend").items():
        sweep, _, backend = where
        group.sort(key=lambda row: row["value"])
        sizes = [row["value"] for row in group]
        slopes = (slope(sizes, [r[key] for r in group]) for key in ("ms", "floor_ms", "peak_mb"))
        about = SWEEPS[sweep]
        expected = about.of_rival if backend == about.rival else about.expected
        yield Line(*where, group, *slopes, expected)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the power of the size that the last half of the values grows with.

    A least-squares fit of the logarithms. Small sizes are bound by launches, not by their work.
    """
    if len(sizes) < 2:
        return None
    kept = max(2, len(sizes) // 2)
    x, y = ([math.log(v) for v in numbers[-kept:]] for numbers in (sizes, values))
    return statistics.linear_regression(x, y).slope


def table(result: dict) -> str:
    """Return how time and memory grow with each size, with the pictures of it."""
    gpu = output.on_gpu(result)
    cells = []
    for line in lines(result["rows"]):
        first, last = line.rows[0], line.rows[-1]
        time, memory = line.expected
        cells.append([SWEEPS[line.sweep].axis, *([line.precision] if gpu else [])])
        cells[-1] += [f"{first['value']:,}, {last['value']:,}", TITLES[line.backend]]
        cells[-1] += [_growth(line.time, time), str(time), _growth(line.floor)]
        cells[-1] += [_growth(line.memory, memory), str(memory), f"{100 * last['fraction']:.2g}%"]
    header = ["varied", *(["precision"] if gpu else []), "from, to", "contestant", "time"]
    header += ["at most", "the floor's", "memory", "at most", "of the floor at the largest"]
    folder = f"../benchmarks/results/{result['machine']['name']}"
    text = (
        f"![Time]({folder}/scaling.svg)\n![Memory]({folder}/scaling_memory.svg)\n\n"
        "The power of the varied size that time and memory grow with, fitted to the last half of "
        f"the sizes; bold where it is more than {TOLERANCE:g} above what is expected at most. "
        "Forward and backward of rep_mtl_loss; where samples are varied beyond a batch, the "
        "contrast stage, whose memory is counted without its input, the anchors."
    )
    return output.captioned(output.markdown(header, cells), result, text)


def _growth(power: float | None, most: int | None = None) -> str:
    if power is None:
        return ""
    bold = "**" if most is not None and power > most + TOLERANCE else ""
    return f"{bold}{power:.2f}{bold}"


def curves(key: str, label: str, result: dict) -> Figure:
    """Return a panel for each sweep in its first precision, with a line for each contestant."""
    from matplotlib.figure import Figure

    by_sweep: dict[str, list[Line]] = {}
    for line in lines(result["rows"]):
        here = by_sweep.setdefault(line.sweep, [])
        if not here or line.precision == here[0].precision:
            here.append(line)
    columns = min(3, len(by_sweep))
    height = math.ceil(len(by_sweep) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.9 * height), layout="constrained")
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    looks = {}
    for axes, (sweep, contestants) in zip(panels, by_sweep.items(), strict=False):
        if key == "ms":
            floor = {row["value"]: row["floor_ms"] for line in contestants for row in line.rows}
            x, y = zip(*sorted(floor.items()), strict=True)
            (looks["floor"],) = axes.plot(x, y, "--", color="#404040")
        for line in contestants:
            x, y = ([row[k] for row in line.rows] for k in ("value", key))
            color = output.COLORS[line.backend]
            (looks[TITLES[line.backend]],) = axes.plot(x, y, "-", marker=".", color=color)
        first = contestants[0].rows[0]
        if sweep in ("positions", "channels"):  # where the other one becomes the smaller side
            other = first["C" if sweep == "positions" else "N"]
            axes.axvline(other, color="#808080", linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.grid(visible=True, axis="both")
        axes.set_xlabel(SWEEPS[sweep].axis)
        axes.set_title(f"{first['function']}, {contestants[0].precision}", fontsize=9, loc="left")
    for axes in panels[len(by_sweep) :]:
        axes.set_visible(False)
    figure.supylabel(label, fontsize=10)
    figure.suptitle(output.machine_of(result), fontsize=10, x=0.02, ha="left")
    figure.legend(looks.values(), looks, loc="outside lower center", ncols=len(looks))
    return figure


PART = Part(
    "scaling",
    "SCALING: rep_mtl_loss and the contrast stage, one size varied at a time",
    measure,
    {"scaling": table},
    {
        "scaling": partial(curves, "ms", "milliseconds"),
        "scaling_memory": partial(curves, "peak_mb", "peak extra memory, MB"),
    },
    line_up.broken,
)
