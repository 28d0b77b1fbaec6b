"""The losses at the shapes of :mod:`benchmarks.shapes`: every implementation side by side."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

import repmtl_kernels
from benchmarks import floors
from benchmarks.memory import peak_extra_bytes
from benchmarks.progress import say, track
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import side_by_side
from repmtl_kernels import reference
from repmtl_kernels.backends import resolve
from repmtl_kernels.backends._availability import refusal

DIRECTIONS = ("forward", "forward_backward")
FUNCTIONS = ("csa_loss", "tsr_loss", "rep_mtl_loss")
COMPILED = "reference_compiled"
LAMBDA = 0.01
# Different inputs in turn, together larger than this many times the cache of the device.
CACHE_FACTOR = 2
MAX_INPUT_SETS = 16
# A contestant whose loss is further from the first one's than this computes something else.
AGREEMENT = {torch.float32: 2e-3, torch.bfloat16: 5e-2}

DISAGREES = "computes something else"
# What a contestant may fail with: out of memory, a failed compilation, a kernel that can't run.
FAILURES = (RuntimeError,)
if find_spec("triton") is not None:
    from triton.errors import TritonError

    FAILURES = (RuntimeError, TritonError)

Loss = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Precision:
    """A dtype with a setting of ``torch.set_float32_matmul_precision``."""

    dtype: torch.dtype
    matmul: str
    name: str  # as in the results and in the measured ceilings


PRECISIONS = {
    "cpu": (Precision(torch.float32, "highest", "float32"),),
    "cuda": (
        Precision(torch.bfloat16, "highest", "bfloat16"),
        Precision(torch.float32, "medium", "tf32"),
        Precision(torch.float32, "highest", "float32"),
    ),
}


@dataclass(frozen=True)
class Case:
    """One line-up: the same call on the same inputs for all contestants."""

    function: str
    shape: Shape
    precision: Precision
    layout: str
    compiled: bool

    @property
    def channel_dim(self) -> int:
        return -1 if self.layout == "tokens" else 1

    def __str__(self) -> str:
        s = self.shape
        size = f"T{s.tasks} B{s.batch} C{s.channels} {s.height}x{s.width}"
        return f"{self.function} {s.name} ({size}) {self.precision.name} {self.layout}"


class Effort(NamedTuple):
    """How long to measure: seconds and rounds for each case."""

    seconds: float
    min_rounds: int
    max_rounds: int


FULL = Effort(seconds=3.0, min_rounds=3, max_rounds=30)
QUICK = Effort(seconds=1.0, min_rounds=2, max_rounds=10)
QUICK_SHAPES = ("office49", "vit196", "cityscapes")
# Other memory layouts than contiguous (B, C, H, W), where networks produce them.
LAYOUTS = (("cityscapes", "channels_last"), ("vit196", "tokens"))


def cases(device_type: str, quick: bool) -> list[Case]:
    """Most telling first: when time runs out, what is left out is at the end."""
    found = []
    for precision in PRECISIONS[device_type]:
        for function in FUNCTIONS:
            for shape in SHAPES.values():
                if quick and shape.name not in QUICK_SHAPES:
                    continue
                # Compiling takes longer than everything else, and rep_mtl_loss adds nothing to the
                # two losses that it sums.
                compiled = function != "rep_mtl_loss" and precision is PRECISIONS[device_type][0]
                compiled = compiled and not quick
                scaled = shape.scaled(device_type)
                found.append(Case(function, scaled, precision, "contiguous", compiled))
        if not quick:
            for name, layout in LAYOUTS:
                scaled = SHAPES[name].scaled(device_type)
                found.append(Case("csa_loss", scaled, precision, layout, False))
    return found


def measure(
    device: torch.device, ceilings: dict, *, quick: bool, deadline: float
) -> tuple[list[dict], list[str]]:
    """Rows for all cases and notes on what was left out.

    deadline: ``time.monotonic()`` after which no further case starts.
    """
    rows: list[dict] = []
    notes: list[str] = []
    planned = cases(device.type, quick)
    for case in track(planned, "kernels"):
        if time.monotonic() > deadline:
            notes.append(f"left out for time: {case}")
            say(notes[-1])
            continue
        rows += measure_case(case, device, ceilings, QUICK if quick else FULL)
    return rows, notes


def scope(device_type: str, quick: bool) -> str:
    """What is measured, for the reader of the output."""
    first = PRECISIONS[device_type][0].name
    compiled = f"torch.compile of the reference: csa_loss and tsr_loss in {first}"
    shapes = ", ".join(QUICK_SHAPES if quick else SHAPES)
    text = f"shapes {shapes}; {'no torch.compile (it takes minutes)' if quick else compiled}"
    if device_type == "cpu":
        text += "; batches scaled to what a CPU does in seconds: "
        text += ", ".join(
            f"{s.name} {s.batch} to {s.cpu_batch}"
            for s in SHAPES.values()
            if s.batch != s.cpu_batch and (not quick or s.name in QUICK_SHAPES)
        )
    return text


def measure_case(case: Case, device: torch.device, ceilings: dict, effort: Effort) -> list[dict]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(case.precision.matmul)
    try:
        inputs = make_inputs(case, device)
        calls, errors = prepared(case, inputs, device)
        timings = side_by_side(calls, device, **effort._asdict())
        rows = []
        for (backend, direction), call in calls.items():
            timing = timings[backend, direction]
            figures = {
                "ms": timing.ms,
                "spread": timing.spread,
                "rounds": timing.rounds,
                "peak_mb": peak_extra_bytes(call, device) / 1e6,
                **rates(case, direction, timing.ms, ceilings),
                "error": None,
            }
            rows.append(labels(case, backend, direction) | rounded(figures))
        for backend, error in errors.items():
            for direction in DIRECTIONS:
                rows.append(labels(case, backend, direction) | {"ms": None, "error": error})
    finally:
        torch.set_float32_matmul_precision(before)
    say(summary_line(case, rows))
    return rows


def make_inputs(case: Case, device: torch.device) -> list[list[Tensor]]:
    """Sets of T saliencies: enough sets that the device's cache does not hold the next one."""
    s, layout = case.shape, case.layout
    size = (s.batch, s.channels, s.height, s.width)
    if layout == "tokens":
        size = (s.batch, s.positions, s.channels)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    set_bytes = s.elements * case.precision.dtype.itemsize
    sets = min(MAX_INPUT_SETS, 1 + CACHE_FACTOR * cache // set_bytes)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)
    return [
        [
            torch.randn(size, generator=generator, device=device, dtype=case.precision.dtype)
            .contiguous(memory_format=memory_format)
            .requires_grad_()
            for _ in range(s.tasks)
        ]
        for _ in range(sets)
    ]


def contestants(case: Case, device: torch.device) -> dict[str, Loss]:
    """Each implementation by its name; the reference first."""
    literal = partial(LITERAL[case.function], channel_dim=case.channel_dim)
    found: dict[str, Loss] = {"reference": literal}
    if case.compiled:
        torch._dynamo.reset()
        found[COMPILED] = torch.compile(literal, dynamic=False)
    backends = ["eager"]
    if device.type == "cuda":
        backends.append("triton")
    if refusal("native", case.precision.dtype, device) is None:
        backends.append("native")
    public = getattr(repmtl_kernels, case.function)
    for backend in backends:
        call = partial(public, channel_dim=case.channel_dim, backend=backend)
        found[backend] = partial(_total, call) if case.function == "rep_mtl_loss" else call
    return found


def literal_rep_mtl(saliencies: Sequence[Tensor], channel_dim: int) -> Tensor:
    """Both of the paper's losses as :func:`repmtl_kernels.rep_mtl_loss` weighs them."""
    tsr = reference.tsr_loss(saliencies, channel_dim=channel_dim)
    return LAMBDA * tsr + LAMBDA * reference.csa_loss(saliencies, channel_dim=channel_dim)


LITERAL = {
    "csa_loss": reference.csa_loss,
    "tsr_loss": reference.tsr_loss,
    "rep_mtl_loss": literal_rep_mtl,
}


def _total(call: Callable, saliencies: Sequence[Tensor]) -> Tensor:
    return call(saliencies, lambda_tsr=LAMBDA, lambda_csa=LAMBDA).total


def prepared(
    case: Case, inputs: list[list[Tensor]], device: torch.device
) -> tuple[dict[tuple[str, str], Callable[[], object]], dict[str, str]]:
    """Warm calls by (backend, direction), and why a contestant is out of this case by its name."""
    calls, errors, values = {}, {}, {}
    for backend, loss in contestants(case, device).items():
        mine = {direction: Call(direction, loss, inputs) for direction in DIRECTIONS}
        try:
            value, _ = (call().item() for call in mine.values())
        except FAILURES as error:
            first_line = str(error).strip().partition("\n")[0]
            errors[backend] = f"{type(error).__name__}: {first_line}"
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        expected = next(iter(values.values()), value)
        allowed = AGREEMENT[case.precision.dtype] * max(abs(expected), LAMBDA)
        if not abs(value - expected) <= allowed:
            errors[backend] = f"{DISAGREES}: {value:.6g}, {next(iter(values))} gives {expected:.6g}"
            continue
        values[backend] = value
        calls |= {(backend, direction): call for direction, call in mine.items()}
    return calls, errors


class Call:
    """One call of a loss in a direction; each call takes the next set of inputs."""

    def __init__(self, direction: str, loss: Loss, inputs: list[list[Tensor]]) -> None:
        self.with_backward = direction == "forward_backward"
        self.loss = loss
        self.inputs = itertools.cycle(inputs)

    def __call__(self) -> Tensor:
        saliencies = next(self.inputs)
        with torch.set_grad_enabled(self.with_backward):
            value = self.loss(saliencies)
        if self.with_backward:
            torch.autograd.grad(value, saliencies)
        return value.detach()


def rates(case: Case, direction: str, ms: float, ceilings: dict) -> dict:
    """The floor on this machine, the fraction of it, and the counted work per second."""
    dtype = case.precision.dtype
    tensor_cores = case.precision.name != "float32"
    tiling = floors.TENSOR_CORES if tensor_cores else floors.EXACT
    count = partial(floors.passes, case.function, case.shape, dtype.itemsize, direction)
    floor = floors.floor_ms(
        count(tiling), ceilings["copy_gbs"], ceilings["matmul_tflops"][case.precision.name]
    )
    exact = count(floors.EXACT)
    return {
        "floor_ms": floor,
        "fraction": floor / ms,
        "gbs": sum(p.bytes for p in exact) / ms / 1e6,
        "tflops": sum(p.flops for p in exact) / ms / 1e9,
    }


def broken(rows: list[dict]) -> list[str]:
    """Failures that are this package's fault: not of torch.compile, nor for want of memory."""
    return [
        f"{r['function']} {r['shape']} {r['precision']} {r['layout']} {r['backend']}: {r['error']}"
        for r in rows
        if r["error"] and r["backend"] != COMPILED and "OutOfMemory" not in r["error"]
    ]


def labels(case: Case, backend: str, direction: str) -> dict:
    s = case.shape
    full = asdict(SHAPES[s.name])
    return {
        "function": case.function,
        "shape": s.name,
        "T": s.tasks,
        "B": s.batch,
        "C": s.channels,
        "N": s.positions,
        "full_B": full["batch"],
        "dtype": str(case.precision.dtype).removeprefix("torch."),
        "precision": case.precision.name,
        "layout": case.layout,
        "direction": direction,
        "backend": backend,
    }


def rounded(figures: dict) -> dict:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items()}


def summary_line(case: Case, rows: list[dict]) -> str:
    parts = []
    for row in rows:
        if row["direction"] == "forward_backward":
            shown = row["error"] or f"{row['ms']:.4g} ms, {row['peak_mb']:.4g} MB"
            parts.append(f"{row['backend']} {shown}")
    return f"{case}: forward + backward: " + "; ".join(parts)


def default_backend(device: torch.device) -> str:
    """What ``backend="auto"`` is for float32 on this device."""
    return resolve("auto", torch.empty(0, device=device))
