"""Each stage of the losses by itself: every backend that runs here, against its counted floor.

What a stage is given comes from the stages before it of the same backend, and is not in its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import floors, kernels, line_up, rivals
from benchmarks.findings import Findings, described, free
from benchmarks.kernels import FAILURES
from benchmarks.line_up import BFLOAT16, FLOAT32, PRECISIONS, TF32, Effort, Precision
from benchmarks.progress import say, track
from benchmarks.rotation import Rotating, graphed
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import side_by_side
from repmtl_kernels._ground.record import Saved
from repmtl_kernels._ground.saliency import NORMALIZERS, OVER
from repmtl_kernels._losses.backward import csa_gradient
from repmtl_kernels._losses.config import Config
from repmtl_kernels._losses.forward import run_stages
from repmtl_kernels._losses.options import CsaOptions, TsrOptions
from repmtl_kernels.backends import choice
from repmtl_kernels.backends.contract import Anchors, CSAGradient, Statistics

BMM, TORCH, TORCH_COMPILED = "bmm", "torch", "torch_compiled"
LAYOUTS = ("contiguous", "channels_last")
TEMPERATURE = 0.5
EFFORTS = {
    "cpu": Effort(seconds=1.0, min_rounds=3, max_rounds=20),
    "cuda": Effort(seconds=0.4, min_rounds=5, max_rounds=20),
}
QUICK = Effort(seconds=0.3, min_rounds=2, max_rounds=10)
# The shapes that are judged, with torch.compile of the plain statistics.
TARGET_SHAPES = ("nyuv2", "cityscapes")


class Work(NamedTuple):
    """What the stages of one backend are given for one set of saliencies."""

    saliencies: list[Tensor]
    statistics: Statistics
    anchors: Anchors
    csa: CSAGradient
    position_grad: Tensor
    outputs: list[Tensor]


@dataclass(frozen=True)
class Variant:
    """A stage with its options."""

    stage: str
    name: str
    options: dict = field(default_factory=dict)

    @property
    def reads_saliencies(self) -> bool:
        """Else its numbers are float32, whatever the saliencies are, and lie in one way."""
        return self.stage in ("statistics", "gram", "saliency_grad")

    def passes(self, shape: Shape, itemsize: int, tiling: floors.Tiling) -> list[floors.Pass]:
        options = {k: v for k, v in self.options.items() if k not in ("over", "normalizer")}
        return getattr(floors, self.stage)(shape, itemsize, tiling, **options)

    def __str__(self) -> str:
        return f"{self.stage} ({self.name})"


BOTH = Variant("statistics", "both", {"positions": True, "channels": True})
GRAM = Variant("gram", "with gradient", {"with_grad": True})
MAIN = (
    BOTH,
    GRAM,
    Variant("gram", "value alone", {"with_grad": False}),
    Variant("saliency_grad", "both losses"),
)
OTHER = (
    Variant("statistics", "positions", {"positions": True, "channels": False}),
    Variant("statistics", "channels", {"positions": False, "channels": True}),
    Variant("contrast", "with gradient", {"with_grad": True}),
    Variant("anchors", "with gradient", {"with_grad": True}),
    *(
        Variant(
            "entropy",
            f"over {over}, {normalizer}",
            {"over": over, "normalizer": normalizer, "with_grad": True},
        )
        for over in OVER
        for normalizer in NORMALIZERS
    ),
)


def run(stages: object, variant: Variant, work: Work) -> object:
    """One call of a stage of the backend ``stages``."""
    options = variant.options
    statistics = work.statistics
    if variant.stage == "statistics":
        return stages.statistics(work.saliencies, **options)
    if variant.stage == "entropy":
        return stages.entropy(statistics.positions, temperature=1.0, eps=0.0, **options)
    if variant.stage == "anchors":
        return stages.anchors(statistics.channels, eps=0.0, **options)
    if variant.stage == "gram":
        unit = work.anchors.unit
        return stages.gram(work.saliencies, statistics.scale, unit, eps=0.0, **options)
    if variant.stage == "contrast":
        return stages.contrast(work.anchors, temperature=TEMPERATURE, **options)
    return stages.saliency_grad(work.saliencies, work.outputs, work.csa, work.position_grad)


def work_of(backend: str, saliencies: list[Tensor]) -> Work:
    """Forward and backward of both losses by this backend, stopped before the gradient's stage."""
    stages = choice.load(backend)
    config = Config(
        backend=backend,
        stacked=False,
        channel_dim=1,
        with_grad=True,
        tsr=TsrOptions(),
        csa=CsaOptions(temperature=TEMPERATURE),
    )
    _, _, saved = run_stages(stages, config, saliencies, None, None)
    saved = Saved(*(value.contiguous() for value in saved))
    csa = csa_gradient(saved.scale.new_ones(()), saved)
    return Work(
        saliencies,
        stages.statistics(saliencies, positions=True, channels=True),
        csa.anchors,
        csa,
        saved.position_grad / saliencies[0].shape[1],
        [torch.empty_like(s) for s in saliencies],
    )


@dataclass(frozen=True)
class Case:
    """Variants that are measured one after the other on the same inputs."""

    variants: tuple[Variant, ...]
    shape: Shape
    precision: Precision
    layout: str

    def __str__(self) -> str:
        return f"{self.shape.name} {self.precision.name} {self.layout}"

    def of(self, variant: Variant) -> line_up.Case:
        return line_up.Case(variant.stage, self.shape, self.precision, self.layout, False)


def cases(device_type: str, quick: bool) -> list[Case]:
    """Most telling first; quick: the target shapes alone."""
    first, *_ = PRECISIONS[device_type]
    precisions = (BFLOAT16, TF32) if device_type == "cuda" else (FLOAT32,)
    shapes = {name: shape.scaled(device_type) for name, shape in SHAPES.items()}
    found = [
        Case(MAIN, shapes[name], precision, "contiguous")
        for precision in precisions
        for name in TARGET_SHAPES
    ]
    found += [Case(OTHER, shapes[name], first, "contiguous") for name in TARGET_SHAPES]
    if quick:
        return found
    for layout in LAYOUTS:
        for precision in PRECISIONS[device_type]:
            for shape in shapes.values():
                if layout == "channels_last" and shape.positions == 1:  # the same memory
                    continue
                done = [v for c in found if _same(c, shape, precision, layout) for v in c.variants]
                wanted = [
                    v
                    for v in (*MAIN, *OTHER)
                    if v not in done and _is_new(v, precision, layout, first)
                ]
                if wanted:
                    found.append(Case(tuple(wanted), shape, precision, layout))
    return found


def _same(case: Case, shape: Shape, precision: Precision, layout: str) -> bool:
    return (case.shape, case.precision, case.layout) == (shape, precision, layout)


def _is_new(variant: Variant, precision: Precision, layout: str, first: Precision) -> bool:
    """Whether the variant is anything else here than in the first precision, contiguous."""
    if variant.reads_saliencies or (precision, layout) == (first, "contiguous"):
        return True
    # Its products of float32 numbers have a precision.
    return variant.stage == "contrast" and layout == "contiguous" and precision == TF32


def measure(
    device: torch.device,
    ceilings: dict,
    *,
    quick: bool,
    deadline: float,
    save: Callable[[list[dict], list[str]], None] | None = None,
) -> tuple[list[dict], list[str]]:
    """Rows for all cases and notes on what was left out.

    deadline: ``time.monotonic()`` after which no further stage starts.
    save: is called with the rows and notes of each case as it comes, so that none is lost.
    """
    findings = Findings(save)
    effort = QUICK if quick and device.type == "cpu" else EFFORTS[device.type]
    for case in track(cases(device.type, quick), "stages"):
        run = partial(measure_case, case, device, ceilings, effort, deadline)
        found = findings.measured(case, run, device)
        if found is None:
            continue
        done = {(row["function"], row["variant"]) for row in found}
        if left := len(case.variants) - len(done):
            findings.note(f"left out for time: {left} of {len(case.variants)} stages of {case}")
        else:
            findings.save()
    return findings.rows, findings.notes


def measure_case(
    case: Case, device: torch.device, ceilings: dict, effort: Effort, deadline: float
) -> list[dict]:
    """Rows of the variants that start before the deadline."""
    rows: list[dict] = []
    if time.monotonic() > deadline:
        return rows
    with line_up.products_in(case.precision), torch.no_grad():
        inputs = [
            [s.detach() for s in tensors]
            for tensors in kernels.make_inputs(case.of(case.variants[0]), device)
        ]
        works, errors = {}, {}
        for backend in kernels.backends(case.precision, device):
            try:
                works[backend] = [work_of(backend, tensors) for tensors in inputs]
            except FAILURES as error:
                errors[backend] = described(error)
        for variant in case.variants:
            if time.monotonic() > deadline:
                break
            found = _rows(case, variant, works, inputs, device, ceilings, effort)
            found += [_failed(case, variant, name, False, why) for name, why in errors.items()]
            free(device)
            say(f"{case} {variant}: {_shown(found)}")
            rows += found
    return rows


def contestants(
    case: Case, variant: Variant, works: dict[str, list[Work]], inputs: list[list[Tensor]]
) -> dict[str, Rotating]:
    found = {
        backend: Rotating(partial(run, choice.load(backend), variant), sets)
        for backend, sets in works.items()
    }
    if variant.stage == "gram":
        found[BMM] = Rotating(rivals.gram, inputs)
    if variant == BOTH:
        found[TORCH] = Rotating(rivals.statistics, inputs)
        if case.shape.name in TARGET_SHAPES and case.layout == "contiguous":
            torch._dynamo.reset()
            compiled = torch.compile(rivals.statistics, dynamic=False)
            found[TORCH_COMPILED] = Rotating(compiled, inputs)
    return found


def _rows(
    case: Case,
    variant: Variant,
    works: dict[str, list[Work]],
    inputs: list[list[Tensor]],
    device: torch.device,
    ceilings: dict,
    effort: Effort,
) -> list[dict]:
    calls: dict[tuple[str, bool], Rotating] = {}
    rows = []
    for name, call in contestants(case, variant, works, inputs).items():
        graph = False
        try:
            call()
            calls[name, False] = call
            if graph := device.type == "cuda":
                calls[name, True] = graphed(call, device)
        except FAILURES as error:
            rows.append(_failed(case, variant, name, graph, described(error)))
    timings = side_by_side(calls, device, **effort._asdict())
    products = case.precision
    if not variant.reads_saliencies and products.dtype != torch.float32:
        products = FLOAT32
    count = partial(variant.passes, case.shape, case.precision.dtype.itemsize)
    for (name, graph), call in calls.items():
        timing = timings[name, graph]
        figures = {
            **kernels.time_and_memory(call, timing, device, graph=graph),
            **kernels.rates(count, products, timing.ms, ceilings),
            "error": None,
        }
        rows.append(_labels(case, variant, name, graph) | kernels.rounded(figures))
    return rows


def _labels(case: Case, variant: Variant, name: str, graph: bool) -> dict:
    direction = "backward" if variant.stage == "saliency_grad" else "forward"
    labels = kernels.labels(case.of(variant), name, direction, graph)
    return labels | {"variant": variant.name}


def _failed(case: Case, variant: Variant, name: str, graph: bool, error: str) -> dict:
    return _labels(case, variant, name, graph) | {"ms": None, "error": error}


def _shown(rows: list[dict]) -> str:
    return "; ".join(
        f"{row['backend']}{' graph' if row['graph'] else ''} "
        + (row["error"] or f"{1e3 * row['ms']:.4g} us, {100 * row['fraction']:.2g}%")
        for row in rows
    )
