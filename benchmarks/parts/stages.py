"""Each stage of the losses by itself: every backend that runs here, against its counted floor.

A stage works on what the stages before it of the same backend made; that is not in its time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import cases, floors, line_up, output, rivals
from benchmarks.cases import BFLOAT16, FLOAT32, TF32, Effort, Precision
from benchmarks.line_up import FORWARD, LineUp, Way
from benchmarks.output import TITLES
from benchmarks.part import FAILURES, Part, Run, described
from benchmarks.rotation import Rotating
from benchmarks.shapes import SHAPES, Shape
from repmtl_kernels._ground.record import Saved
from repmtl_kernels._ground.saliency import NORMALIZERS, OVER
from repmtl_kernels._losses.backward import csa_gradient
from repmtl_kernels._losses.config import Config
from repmtl_kernels._losses.forward import run_stages
from repmtl_kernels._losses.options import CsaOptions, TsrOptions
from repmtl_kernels.backends import choice
from repmtl_kernels.backends.contract import (
    Anchors,
    CSAGradient,
    LossGradient,
    Statistics,
    TSRGradient,
)

BMM, TORCH, TORCH_COMPILED = "bmm", "torch", "torch_compiled"
TEMPERATURE = 0.5
EFFORTS = {"cpu": Effort(1.0, 3, 20), "cuda": Effort(0.4, 5, 20)}
QUICK = Effort(0.3, 2, 10)
# The shapes that are judged, with torch.compile of the plain statistics.
TARGET_SHAPES = ("nyuv2", "cityscapes")


class Work(NamedTuple):
    """The operands of one backend's stages, for one set of saliencies."""

    saliencies: list[Tensor]
    statistics: Statistics
    anchors: Anchors
    csa: CSAGradient
    tsr: TSRGradient
    outputs: list[Tensor]


@dataclass(frozen=True)
class Variant:
    """A stage with its options."""

    stage: str
    name: str
    options: tuple[tuple[str, object], ...] = ()

    @property
    def reads_saliencies(self) -> bool:
        """Whether it does; else its numbers are float32, whatever the saliencies are."""
        return self.stage in ("statistics", "affinity", "gram", "saliency_grad")


def _variant(stage: str, name: str, **options: object) -> Variant:
    return Variant(stage, name, tuple(options.items()))


BOTH = _variant("statistics", "both", positions=True, channels=True)
GRAM = _variant("gram", "with gradient", with_grad=True)
AFFINITY = _variant("affinity", "inner products")
MAIN = (
    BOTH,
    GRAM,
    _variant("gram", "value alone", with_grad=False),
    _variant("saliency_grad", "both losses"),
)
OTHER = (
    _variant("statistics", "positions", positions=True, channels=False),
    _variant("statistics", "channels", positions=False, channels=True),
    _variant("contrast", "with gradient", with_grad=True),
    _variant("anchors", "with gradient", with_grad=True),
    *(
        _variant("entropy", f"over {over}, {kind}", over=over, normalizer=kind, with_grad=True)
        for over in OVER
        for kind in NORMALIZERS
    ),
    AFFINITY,
)


def call(stages: ModuleType, variant: Variant, work: Work) -> object:
    options, statistics = dict(variant.options), work.statistics
    if variant.stage == "statistics":
        return stages.statistics(work.saliencies, **options)
    if variant.stage == "affinity":
        return stages.affinity(work.saliencies)
    if variant.stage == "entropy":
        return stages.entropy(statistics.positions, temperature=1.0, eps=0.0, **options)
    if variant.stage == "anchors":
        return stages.anchors(statistics.channels, eps=0.0, **options)
    if variant.stage == "gram":
        unit = work.anchors.unit
        return stages.gram(work.saliencies, statistics.scale, unit, eps=0.0, **options)
    if variant.stage == "contrast":
        return stages.contrast(work.anchors, temperature=TEMPERATURE, **options)
    return stages.saliency_grad(work.saliencies, work.outputs, work.csa, work.tsr)


def work_of(backend: str, saliencies: list[Tensor]) -> Work:
    """Run both losses forward and backward by this backend, up to the gradient's stage."""
    stages = choice.load(backend)
    of_losses = {"tsr": TsrOptions(), "csa": CsaOptions(temperature=TEMPERATURE)}
    config = Config(backend=backend, stacked=False, channel_dim=1, with_grad=True, **of_losses)
    _, _, _, *kept = run_stages(stages, config, saliencies, None, None)
    saved = Saved(*(value.contiguous() for value in kept))
    one = LossGradient(saved.scale.new_ones(()), 1.0)
    csa = csa_gradient(one, saved)
    return Work(
        saliencies,
        stages.statistics(saliencies, positions=True, channels=True),
        csa.anchors,
        csa,
        TSRGradient(saved.position_grad, one),
        [torch.empty_like(s) for s in saliencies],
    )


@dataclass(frozen=True)
class Case:
    """Variants that are measured one after the other on the same inputs."""

    variants: tuple[Variant, ...]
    shape: Shape
    precision: Precision

    def of(self, variant: Variant) -> cases.Case:
        return cases.Case(variant.stage, self.shape, self.precision)

    def __str__(self) -> str:
        return f"{len(self.variants)} stages of {self.shape.name} {self.precision.name}"


def planned(device_type: str, quick: bool) -> list[Case]:
    """Return the decisive cases first; ``quick``: the target shapes alone."""
    first, *others = (BFLOAT16, TF32) if device_type == "cuda" else (FLOAT32,)
    shapes = [shape.scaled(device_type) for shape in SHAPES.values()]
    judged = [SHAPES[name].scaled(device_type) for name in TARGET_SHAPES]
    plan = [Case(MAIN, shape, precision) for precision in (first, *others) for shape in judged]
    plan += [Case(OTHER, shape, first) for shape in judged]
    if not quick:
        plan += [Case((*MAIN, *OTHER), shape, first) for shape in shapes if shape not in judged]
    return plan


def measure(run: Run) -> None:
    cpu = run.device.type == "cpu"
    effort = QUICK if run.quick and cpu else EFFORTS[run.device.type]
    run.each(planned(run.device.type, run.quick), partial(measure_case, run, effort))


def measure_case(run: Run, effort: Effort, case: Case) -> list[dict]:
    """Return the rows of the variants that start before the deadline."""
    rows: list[dict] = []
    with cases.products_in(case.precision), torch.no_grad():
        inputs = [
            [s.detach() for s in tensors]
            for tensors in cases.make_inputs(case.of(case.variants[0]), run.device)
        ]
        works, errors = {}, {}
        for backend in cases.backends(case.precision, run.device):
            try:
                works[backend] = [work_of(backend, tensors) for tensors in inputs]
            except FAILURES as error:
                errors[backend] = described(error)
        for done, variant in enumerate(case.variants):
            if run.left < 0:
                run.note(f"left out for time: {len(case.variants) - done} of {case}")
                break
            contest = line_up_of(case, variant, works, inputs)
            of_variant = contest.rows(run.device, run.head["measured"], effort)
            for backend, why in errors.items():
                way = Way(backend, direction_of(variant))
                of_variant.append(contest.labels(way) | way._asdict() | {"ms": None, "error": why})
            rows += line_up.report_rows(f"{case}: {variant.stage} ({variant.name})", of_variant)
    return rows


def direction_of(variant: Variant) -> str:
    return "backward" if variant.stage == "saliency_grad" else FORWARD


def line_up_of(
    case: Case, variant: Variant, works: dict[str, list[Work]], inputs: list[list[Tensor]]
) -> LineUp:
    calls = {
        backend: Rotating(partial(call, choice.load(backend), variant), sets)
        for backend, sets in works.items()
    }
    if variant.stage == "gram":
        calls[BMM] = Rotating(rivals.gram, inputs)
    if variant == AFFINITY:
        calls[TORCH] = Rotating(rivals.affinity, inputs)
    if variant == BOTH:
        calls[TORCH] = Rotating(rivals.statistics, inputs)
        if case.shape.name in TARGET_SHAPES:
            torch._dynamo.reset()
            compiled = torch.compile(rivals.statistics, dynamic=False)
            calls[TORCH_COMPILED] = Rotating(compiled, inputs)
    one = case.of(variant)
    options = {k: v for k, v in variant.options if k not in ("over", "normalizer")}
    count = partial(getattr(floors, variant.stage), **options)
    products = case.precision
    if not variant.reads_saliencies and products.dtype != torch.float32:
        products = FLOAT32
    return LineUp(
        {Way(name, direction_of(variant)): lambda c=c: c for name, c in calls.items()},
        products,
        lambda way, tiling: count(case.shape, one.itemsize, tiling),
        lambda way: one.labels() | {"variant": variant.name},
    )


def table(result: dict) -> str:
    """Return each stage by every contestant: its time on a GPU, and the fraction of its floor."""
    gpu = output.on_gpu(result)
    rows = [row for row in result["rows"] if row["graph"] == gpu]
    names = [b for b in TITLES if any(r["backend"] == b for r in rows)]
    lines = []
    keys = ("function", "variant", "shape", "precision", "layout")
    for (stage, variant, *_, precision, _), here in output.groups(rows, *keys).items():
        of = output.by(here, "backend")
        cells = [_cell(of.get(name), gpu) for name in names]
        lines.append([f"`{stage}`, {variant}", output.place_of(here[0]), precision, *cells])
    text = (
        "Fraction of the stage's floor, its counted bytes and operations at this machine's rates. "
        "The rival of `gram` makes the full matrix and nothing else."
    )
    if gpu:
        text = f"Microseconds, replayed as CUDA graphs, and in brackets: {text}"
    header = ["stage", "shape", "dtype", *(TITLES[name] for name in names)]
    return output.captioned(output.markdown(header, lines), result, text)


def _cell(row: dict | None, gpu: bool) -> str:
    if row is None:
        return ""
    if row["error"]:
        return output.failure(row)
    fraction = f"{100 * row['fraction']:.2g}%"
    return f"{1e3 * row['ms']:.3g} ({fraction})" if gpu else fraction


PART = Part(
    "stages",
    "STAGES: each stage of the losses by itself, all contestants in turns",
    measure,
    {"stages": table},
    broken=line_up.broken,
    share=0.1,
    on=("cuda",),
)
