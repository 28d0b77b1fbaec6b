"""The losses at the shapes of :mod:`benchmarks.shapes`: every implementation side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

import repmtl_kernels
from benchmarks import floors, rivals
from benchmarks.findings import Findings, described, free
from benchmarks.line_up import (
    FLOAT32,
    FULL,
    QUICK,
    QUICK_SHAPES,
    TF32X3,
    Case,
    Effort,
    Precision,
    cases,
    products_in,
)
from benchmarks.memory import peak_extra_bytes
from benchmarks.progress import say, table, track
from benchmarks.rotation import Rotating, graphed
from benchmarks.shapes import SHAPES
from benchmarks.timing import Timing, side_by_side
from repmtl_kernels import reference
from repmtl_kernels.backends.availability import refusal
from repmtl_kernels.backends.choice import resolve

DIRECTIONS = ("forward", "forward_backward")
REFERENCE, COMPILED = "reference", "reference_compiled"
FACTORED, FACTORED_COMPILED = "factored", "factored_compiled"
BACKENDS = ("eager", "native", "triton")
LAMBDA = 0.01
# Different inputs in turn, together larger than this many times the cache of the device.
CACHE_FACTOR = 2
MAX_INPUT_SETS = 16
# A contestant whose loss is further from the judge's than this computes something else.
AGREEMENT = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# What compiling the rivals of a case may take; with less time left they are left out of it.
COMPILE_SECONDS = {"cpu": 0, "cuda": 45}
# FLOPs of the judge, the literal equations in float64, that are not too many for a CPU.
JUDGE_FLOPS = 3e10

DISAGREES = "computes something else"
# What a contestant may fail with: out of memory, a failed compilation, a kernel that can't run.
FAILURES = (RuntimeError,)
if find_spec("triton") is not None:
    from triton.errors import TritonError

    FAILURES = (RuntimeError, TritonError)

Loss = Callable[[Sequence[Tensor]], Tensor]


def measure(
    device: torch.device,
    ceilings: dict,
    *,
    quick: bool,
    deadline: float,
    save: Callable[[list[dict], list[str]], None] | None = None,
) -> tuple[list[dict], list[str]]:
    """Rows for all cases and notes on what was left out.

    deadline: ``time.monotonic()`` after which no further case starts.
    save: is called with the rows and notes of each case as it comes, so that none is lost.
    """
    findings = Findings(save)
    effort = QUICK if quick else FULL[device.type]
    for case in track(cases(device.type, quick), "kernels"):
        if time.monotonic() > deadline:
            findings.note(f"left out for time: {case}")
            continue
        if case.compiled and time.monotonic() + COMPILE_SECONDS[device.type] > deadline:
            findings.note(f"left out for time: torch.compile in {case}")
            case = replace(case, compiled=False)
        run = partial(measure_case, case, device, ceilings, effort)
        if findings.measured(case, run, device) is not None:
            findings.save()
    rows, notes = findings.rows, findings.notes
    measured = [row for row in rows if row["error"] is None]
    unjudged = [
        f"{row['function']} {row['shape']}" for row in measured if row["gradient_error"] is None
    ]
    if unjudged:
        which = ", ".join(dict.fromkeys(unjudged))
        notes.append(f"no errors against float64, which takes too much here: {which}")
    return rows, notes


def scope(device_type: str, quick: bool) -> str:
    """What is measured, for the reader of the output."""
    planned = cases(device_type, quick)
    shapes = ", ".join(dict.fromkeys(case.shape.name for case in planned))
    compiled = sum(case.compiled for case in planned)
    text = f"{len(planned)} cases; shapes {shapes}; "
    text += f"torch.compile in {compiled}" if compiled else "no torch.compile (it takes minutes)"
    if device_type == "cpu":
        text += "; batches scaled to what a CPU does in seconds: "
        text += ", ".join(
            f"{s.name} {s.batch} to {s.cpu_batch}"
            for s in SHAPES.values()
            if s.batch != s.cpu_batch and (not quick or s.name in QUICK_SHAPES)
        )
    return text


def measure_case(case: Case, device: torch.device, ceilings: dict, effort: Effort) -> list[dict]:
    with products_in(case.precision):
        rows = _rows(case, device, ceilings, effort)
    free(device)  # what graphs held
    say(summary_line(case, rows))
    return rows


def _rows(case: Case, device: torch.device, ceilings: dict, effort: Effort) -> list[dict]:
    inputs = make_inputs(case, device)
    calls, accuracy, errors = prepared(case, inputs, device)
    timings = side_by_side(calls, device, **effort._asdict())
    rows = []
    for way, call in calls.items():
        timing = timings[way]
        itemsize = case.precision.dtype.itemsize
        count = partial(floors.passes, case.function, case.shape, itemsize, way.direction)
        figures = {
            **time_and_memory(call, timing, device, graph=way.graph),
            **rates(count, case.precision, timing.ms, ceilings),
            **accuracy[way.backend]._asdict(),
            "error": None,
        }
        rows.append(labels(case, *way) | rounded(figures))
    for way, error in errors.items():
        rows.append(labels(case, *way) | {"ms": None, "error": error})
    return rows


def time_and_memory(
    call: Callable[[], object], timing: Timing, device: torch.device, *, graph: bool
) -> dict:
    return {
        "ms": timing.ms,
        "spread": timing.spread,
        "rounds": timing.rounds,
        # A graph holds its memory all the time.
        "peak_mb": None if graph else peak_extra_bytes(call, device) / 1e6,
    }


def make_inputs(case: Case, device: torch.device) -> list[list[Tensor]]:
    """Sets of T saliencies, or of one stacked tensor."""
    s, layout = case.shape, case.layout
    size = (s.batch, s.channels, s.height, s.width)
    if layout == "tokens":
        size = (s.batch, s.positions, s.channels)
    tensors = s.tasks
    if layout == "stacked":
        size, tensors = (s.tasks, *size), 1
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)
    return [
        [
            torch.randn(size, generator=generator, device=device, dtype=case.precision.dtype)
            .contiguous(memory_format=memory_format)
            .requires_grad_()
            for _ in range(tensors)
        ]
        for _ in range(input_sets(s.elements * case.precision.dtype.itemsize, device))
    ]


def input_sets(set_bytes: int, device: torch.device) -> int:
    """So many that the device's cache does not hold the next one."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(MAX_INPUT_SETS, 1 + CACHE_FACTOR * cache // set_bytes)


def contestants(case: Case, device: torch.device) -> dict[str, Loss]:
    """Each implementation by its name; the reference first."""
    literal = partial(LITERAL[case.function], channel_dim=case.channel_dim)
    found: dict[str, Loss] = {REFERENCE: literal}
    if case.compiled:
        torch._dynamo.reset()
        found[COMPILED] = torch.compile(literal, dynamic=False)
    if case.function in FACTORED_FORMS:
        factored = partial(FACTORED_FORMS[case.function], channel_dim=case.channel_dim)
        found[FACTORED] = factored
        if case.compiled and device.type == "cuda":
            found[FACTORED_COMPILED] = torch.compile(factored, dynamic=False)
    public = getattr(repmtl_kernels, case.function)
    for backend in backends(case.precision, device):
        call = partial(public, channel_dim=case.channel_dim, backend=backend)
        found[backend] = partial(_total, call) if case.function == "rep_mtl_loss" else call
    return {name: of_tensors(case, call) for name, call in found.items()}


def backends(precision: Precision, device: torch.device) -> list[str]:
    """Those that run here and have this precision to themselves."""
    if precision == TF32X3:
        return ["triton"]
    names = ["eager", "triton"] if device.type == "cuda" else ["eager"]
    if refusal("native", precision.dtype, device) is None:
        names.append("native")
    return names


def of_tensors(case: Case, loss: Callable) -> Loss:
    """The loss as a function of a set of inputs."""
    return partial(_of_stacked, loss) if case.layout == "stacked" else loss


def _of_stacked(loss: Callable, tensors: Sequence[Tensor]) -> Tensor:
    (stacked,) = tensors
    return loss(stacked)


def literal_rep_mtl(saliencies: Sequence[Tensor], channel_dim: int) -> Tensor:
    """Both of the paper's losses as :func:`repmtl_kernels.rep_mtl_loss` weighs them."""
    tsr = reference.tsr_loss(saliencies, channel_dim=channel_dim)
    return LAMBDA * tsr + LAMBDA * reference.csa_loss(saliencies, channel_dim=channel_dim)


LITERAL = {
    "csa_loss": reference.csa_loss,
    "tsr_loss": reference.tsr_loss,
    "rep_mtl_loss": literal_rep_mtl,
}
# TSR has nothing to factor.
FACTORED_FORMS = {
    "csa_loss": rivals.csa_loss,
    "rep_mtl_loss": partial(rivals.rep_mtl_loss, weight=LAMBDA),
}


def _total(call: Callable, saliencies: Sequence[Tensor]) -> Tensor:
    return call(saliencies, lambda_tsr=LAMBDA, lambda_csa=LAMBDA).total


class Exact(NamedTuple):
    """What the judge found: the literal equations in float64 on the same numbers."""

    value: float
    grads: Sequence[Tensor]  # by task


class Accuracy(NamedTuple):
    """Relative errors; None where there was no judge."""

    value_error: float | None
    gradient_error: float | None  # the largest over the tasks of |g - exact| / |exact|


def judged(case: Case, tensors: Sequence[Tensor], device: torch.device) -> Exact | None:
    """None where the judge takes too long, on a CPU, or too much memory."""
    if device.type == "cpu" and floors.literal_flops(case.function, case.shape) > JUDGE_FLOPS:
        return None
    literal = of_tensors(case, partial(LITERAL[case.function], channel_dim=case.channel_dim))
    try:
        return _evaluated(case, literal, [t.detach().double().requires_grad_() for t in tensors])
    except torch.OutOfMemoryError:
        return None


def _evaluated(case: Case, loss: Loss, tensors: Sequence[Tensor]) -> Exact:
    value = loss(tensors)
    grads = torch.autograd.grad(value, tensors)
    return Exact(value.item(), grads[0].unbind(0) if case.layout == "stacked" else grads)


def _run(
    case: Case, loss: Loss, tensors: Sequence[Tensor], exact: Exact | None
) -> tuple[float, Accuracy]:
    """The value of a loss, and how far it and its gradient are from the judge's."""
    found = _evaluated(case, loss, tensors)
    if exact is None:
        return found.value, Accuracy(None, None)
    pairs = zip(found.grads, exact.grads, strict=True)
    errors = torch.stack([(g.double() - e).norm() / e.norm() for g, e in pairs])
    value_error = abs(found.value - exact.value) / abs(exact.value)
    return found.value, Accuracy(value_error, errors.max().item())  # NaN where one is


class Way(NamedTuple):
    """Who, in which direction, and whether as replays of CUDA graphs."""

    backend: str
    direction: str
    graph: bool


def prepared(
    case: Case, inputs: list[list[Tensor]], device: torch.device
) -> tuple[dict[Way, Rotating], dict[str, Accuracy], dict[Way, str]]:
    """Warm calls, the accuracy of each contestant, and why one is out of this case."""
    calls, accuracy, errors = {}, {}, {}
    exact = judged(case, inputs[0], device)
    expected = None if exact is None else exact.value
    for backend, loss in contestants(case, device).items():
        mine = {
            Way(backend, direction, False): Call(direction, loss, inputs)
            for direction in directions(backend, device)
        }
        try:
            value, error = _run(case, loss, inputs[0], exact)
            for call in mine.values():
                call()
        except FAILURES as failure:
            errors |= dict.fromkeys(mine, described(failure))
            free(device)
            continue
        expected = value if expected is None else expected
        if wrong := disagreement(case.precision, backend, value, expected):
            errors |= dict.fromkeys(mine, wrong)
            continue
        accuracy[backend] = error
        calls |= mine
    del exact
    if device.type == "cuda":
        # A failed capture can leave traces: those that are known to work come first.
        for way in sorted(calls, key=lambda way: way.backend not in BACKENDS):
            replayed = way._replace(graph=True)
            try:
                replay = graphed(calls[way], device)
                value = replay().item()
            except FAILURES as failure:
                errors[replayed] = described(failure)
                free(device)
                continue
            if wrong := disagreement(case.precision, way.backend, value, expected):
                errors[replayed] = wrong
                continue
            calls[replayed] = replay
    return calls, accuracy, errors


def directions(backend: str, device: torch.device) -> Sequence[str]:
    """A direction is a compilation of its own: on a GPU only the one that training needs."""
    once = device.type == "cuda" and backend in (COMPILED, FACTORED_COMPILED)
    return DIRECTIONS[1:] if once else DIRECTIONS


def disagreement(precision: Precision, backend: str, value: float, expected: float) -> str | None:
    """The reference is what it is, and in 16 bits it may be wrong altogether."""
    allowed = AGREEMENT[precision.dtype] * max(abs(expected), LAMBDA)
    if backend == REFERENCE or abs(value - expected) <= allowed:
        return None
    return f"{DISAGREES}: {value:.6g} instead of {expected:.6g}"


class Call(Rotating):
    """One call of a loss in a direction; each call takes the next set of inputs."""

    def __init__(self, direction: str, loss: Loss, inputs: list[list[Tensor]]) -> None:
        super().__init__(partial(_call, loss, direction == "forward_backward"), inputs)


def _call(loss: Loss, with_backward: bool, saliencies: list[Tensor]) -> Tensor:
    with torch.set_grad_enabled(with_backward):
        value = loss(saliencies)
    if with_backward:
        torch.autograd.grad(value, saliencies)
    return value.detach()


def rates(
    count: Callable[[floors.Tiling], list[floors.Pass]],
    precision: Precision,
    ms: float,
    ceilings: dict,
) -> dict:
    """The floor on this machine, the fraction of it, and the counted work per second."""
    tiling = floors.EXACT if precision == FLOAT32 else floors.TENSOR_CORES
    matmul_tflops = floors.matmul_rate(ceilings["matmul_tflops"], precision.name)
    floor = floors.floor_ms(count(tiling), ceilings["copy_gbs"], matmul_tflops)
    exact = count(floors.EXACT)
    return {
        "floor_ms": floor,
        "fraction": floor / ms,
        "gbs": sum(p.bytes for p in exact) / ms / 1e6,
        "tflops": sum(p.flops for p in exact) / ms / 1e9,
    }


def broken(rows: list[dict]) -> list[str]:
    """Failures that are this package's fault: not of a rival, nor for want of memory."""
    return [
        f"{r['function']} {r['shape']} {r['precision']} {r['layout']} {r['direction']} "
        f"{r['backend']}{' in a CUDA graph' if r['graph'] else ''}: {r['error']}"
        for r in rows
        if r["error"] and "OutOfMemory" not in r["error"]
        if r["backend"] in BACKENDS or (r["backend"] == REFERENCE and not r["graph"])
    ]


def labels(case: Case, backend: str, direction: str, graph: bool = False) -> dict:
    s = case.shape
    return {
        "function": case.function,
        "shape": s.name,
        "T": s.tasks,
        "B": s.batch,
        "C": s.channels,
        "N": s.positions,
        "full_B": SHAPES.get(s.name, s).batch,
        "dtype": str(case.precision.dtype).removeprefix("torch."),
        "precision": case.precision.name,
        "layout": case.layout,
        "direction": direction,
        "backend": backend,
        "graph": graph,
    }


def rounded(figures: dict) -> dict:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items()}


def summary_line(case: Case, rows: list[dict]) -> str:
    parts = []
    for row in rows:
        if row["direction"] == "forward_backward":
            shown = row["error"] or f"{row['ms']:.4g} ms"
            if row["ms"] and not row["graph"]:
                shown += f", {row['peak_mb']:.4g} MB"
            parts.append(f"{row['backend']}{' graph' if row['graph'] else ''} {shown}")
    return f"{case}: forward + backward: " + "; ".join(parts)


def summary(rows: list[dict], default: str) -> str:
    """Forward + backward: milliseconds and memory of the default backend and of the reference."""
    lines = []
    found = {(_case_of(r), r["backend"]): r for r in rows if _is_plain_training(r)}
    for (case, backend), row in found.items():
        if backend != default or not row["ms"]:
            continue
        other = found[case, REFERENCE]
        literal = [f"{other['ms']:.4g}", f"{other['peak_mb']:.4g}"] if other["ms"] else ["-", "-"]
        ratio = f"{other['ms'] / row['ms']:.3g}x" if other["ms"] else "-"
        lines.append(
            [
                " ".join(case),
                literal[0], f"{row['ms']:.4g}", ratio, literal[1], f"{row['peak_mb']:.4g}",
                f"{100 * row['fraction']:.2g}%",
            ]
        )  # fmt: skip
    header = ["forward + backward", "reference ms", f"{default} ms", "faster", "reference MB"]
    return table([*header, f"{default} MB", "of the floor"], lines)


def _case_of(row: dict) -> tuple[str, ...]:
    return tuple(row[key] for key in ("function", "shape", "precision", "layout"))


def _is_plain_training(row: dict) -> bool:
    return row["direction"] == "forward_backward" and not row["graph"]


def default_backend(device: torch.device) -> str:
    """What ``backend="auto"`` is for float32 on this device."""
    return resolve("auto", torch.empty(0, device=device))
