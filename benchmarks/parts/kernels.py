"""The losses at the shapes of :mod:`benchmarks.shapes`: every implementation side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import repmtl_kernels
from benchmarks import cases, floors, line_up, output, results, rivals
from benchmarks.cases import BFLOAT16, FLOAT16, FLOAT32, PRECISIONS, TF32, TF32X3, Case, Effort
from benchmarks.line_up import FORWARD, FORWARD_BACKWARD, REFERENCE, LineUp, Way
from benchmarks.output import TITLES, by, captioned, groups, markdown
from benchmarks.part import FAILURES, Part, Run
from benchmarks.rotation import Rotating
from benchmarks.shapes import SHAPES
from repmtl_kernels.backends.choice import resolve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPILED, FACTORED, FACTORED_COMPILED = "reference_compiled", "factored", "factored_compiled"
FUNCTIONS = ("csa_loss", "tsr_loss", "rep_mtl_loss")
WEIGHTS = {"lambda_tsr": rivals.LAMBDA, "lambda_csa": rivals.LAMBDA}
# Seconds for compiling the rivals of a case; with less time left they are left out.
COMPILE_SECONDS = {"cpu": 0, "cuda": 45}
# The literal equations in float64 take too long for a CPU above so many operations.
JUDGE_FLOPS = 3e10
EFFORTS = {"cpu": Effort(3.0, 3, 30), "cuda": Effort(1.5, 5, 30)}
QUICK = Effort(1.0, 2, 10)
QUICK_SHAPES = ("office49", "vit196", "cityscapes")
# Memory layouts that networks produce, other than contiguous (B, C, H, W).
LAYOUTS = (("cityscapes", "channels_last"), ("vit196", "tokens"))
# The decisive cases of a GPU, in order; at the end whether torch.compile takes part. It takes
# longer than all others together, so those cases are measured once more with it.
DECISIVE = (
    ("tsr_loss", BFLOAT16, ("nyuv2",), False),
    ("rep_mtl_loss", BFLOAT16, ("nyuv2", "cityscapes", "office49", "office1"), True),
    ("rep_mtl_loss", TF32, ("nyuv2", "cityscapes"), True),
    ("rep_mtl_loss", FLOAT32, ("nyuv2", "cityscapes"), False),
    ("rep_mtl_loss", TF32, ("office49", "office1"), False),
    ("rep_mtl_loss", BFLOAT16, ("vit196", "vit1024"), True),
    ("rep_mtl_loss", FLOAT16, ("nyuv2", "cityscapes"), False),
    ("rep_mtl_loss", TF32X3, ("nyuv2", "cityscapes"), False),
)

Loss = Callable[[Sequence[Tensor]], Tensor]


def planned(device_type: str, quick: bool) -> list[Case]:
    """Return the decisive cases first: when time runs out, the last ones are left out."""
    if device_type == "cuda":
        plain = [replace(case, compiled=False) for case in decisive()]
        return plain if quick else _cuda_cases(plain)
    plan = _cpu_cases()
    if quick:  # compiling takes longer than everything else
        plan = [replace(c, compiled=False) for c in plan if c.layout == "contiguous"]
        plan = [case for case in plan if case.shape.name in QUICK_SHAPES]
    return plan


def decisive() -> list[Case]:
    return [
        Case(function, SHAPES[name], precision, compiled=compiled)
        for function, precision, names, compiled in DECISIVE
        for name in names
    ]


def _cpu_cases() -> list[Case]:
    # Compiled rep_mtl_loss adds nothing to the two losses that it sums.
    plan = [
        Case(f, shape.scaled("cpu"), FLOAT32, compiled=f != "rep_mtl_loss")
        for f in FUNCTIONS
        for shape in SHAPES.values()
    ]
    return plan + [Case("csa_loss", SHAPES[n].scaled("cpu"), FLOAT32, lay) for n, lay in LAYOUTS]


def _cuda_cases(first: list[Case]) -> list[Case]:
    of_layouts = [
        Case("rep_mtl_loss", SHAPES[name], precision, layout)
        for precision in (BFLOAT16, TF32)
        for name, layout in LAYOUTS
    ]
    rest = [
        Case(function, shape, precision)
        for precision in PRECISIONS["cuda"]
        for function in ("rep_mtl_loss", "csa_loss", "tsr_loss")
        for shape in sorted(SHAPES.values(), key=lambda shape: -shape.elements)
        # TSR has no matrix products.
        if not (function == "tsr_loss" and precision in (TF32, TF32X3))
    ]
    of_bfloat16 = [case for case in rest if case.precision == BFLOAT16]
    compiled = [case for case in decisive() if case.compiled]
    return list(dict.fromkeys([*first, *compiled, *of_bfloat16, *of_layouts, *rest]))


def contestants(case: Case, device: torch.device) -> dict[str, Loss]:
    """Return each implementation by its name; the reference is the first."""
    literal = loss_of(case, rivals.LITERAL[case.function])
    losses: dict[str, Loss] = {REFERENCE: literal}
    if case.compiled:
        torch._dynamo.reset()
        losses[COMPILED] = torch.compile(literal, dynamic=False)
    if case.function in rivals.FACTORED:
        losses[FACTORED] = loss_of(case, rivals.FACTORED[case.function])
        if case.compiled and device.type == "cuda":
            losses[FACTORED_COMPILED] = torch.compile(losses[FACTORED], dynamic=False)
    return losses | {b: of_backend(case, b) for b in cases.backends(case.precision, device)}


def of_backend(case: Case, backend: str) -> Loss:
    public = partial(getattr(repmtl_kernels, case.function), backend=backend)
    if case.function == "rep_mtl_loss":
        return loss_of(case, lambda *args, **options: public(*args, **options, **WEIGHTS).total)
    return loss_of(case, public)


def loss_of(case: Case, function: Callable[..., Tensor]) -> Loss:
    """Return a function of saliencies as a function of one of the case's sets of inputs."""
    return lambda saliencies: function(saliencies, channel_dim=case.channel_dim)


def call_of(loss: Loss, direction: str, inputs: list[list[Tensor]]) -> Rotating:
    """Return calls of a loss in a direction; each call takes the next set of inputs."""
    return Rotating(partial(_call, loss, direction == FORWARD_BACKWARD), inputs)


def _call(loss: Loss, with_backward: bool, saliencies: list[Tensor]) -> Tensor:
    with torch.set_grad_enabled(with_backward):
        value = loss(saliencies)
    if with_backward:
        torch.autograd.grad(value, saliencies)
    return value.detach()


def measure(run: Run) -> None:
    run.more["default_backend"] = default_backend(run.device)
    cpu = run.device.type == "cpu"
    effort = QUICK if run.quick and cpu else EFFORTS[run.device.type]
    before = results.load(run.folder, run.name) if run.go_on and run.folder else None
    run.rows += before["rows"] if before else []

    def one(case: Case) -> list[dict]:
        labels = case.labels()
        known = [row for row in run.rows if labels.items() <= row.items()]
        if known and (not case.compiled or any(row["backend"] == COMPILED for row in known)):
            return []
        if case.compiled and run.left < COMPILE_SECONDS[run.device.type]:
            run.note(f"left out for time: {case}")
            return []
        rows = measure_case(case, run.device, run.head["measured"], effort)
        run.rows[:] = [row for row in run.rows if row not in known]
        return rows

    run.each(planned(run.device.type, run.quick), one)
    output.say(f"\n{kernels_table({**run.head, **run.more, 'rows': run.rows})}")


def default_backend(device: torch.device) -> str:
    """Return what ``backend="auto"`` is for float32 on this device."""
    return resolve("auto", torch.empty(0, device=device))


def measure_case(case: Case, device: torch.device, ceilings: dict, effort: Effort) -> list[dict]:
    with cases.products_in(case.precision):
        contest = line_up_of(case, cases.make_inputs(case, device), device)
        return line_up.report_rows(case, contest.rows(device, ceilings, effort))


def line_up_of(case: Case, inputs: list[list[Tensor]], device: torch.device) -> LineUp:
    losses = contestants(case, device)
    errors = gradient_errors(case, losses, inputs[0], device)
    with torch.no_grad():
        exact = of_backend(case, "eager")([s.double() for s in inputs[0]]).item()
    once = (COMPILED, FACTORED_COMPILED) if device.type == "cuda" else ()
    ways = [
        Way(name, direction)
        for name in losses
        for direction in (FORWARD, FORWARD_BACKWARD)
        # To compile on a GPU takes so long that only training is measured.
        if direction == FORWARD_BACKWARD or name not in once
    ]
    return LineUp(
        {way: partial(call_of, losses[way.backend], way.direction, inputs) for way in ways},
        case.precision,
        lambda way, t: floors.passes(case.function, case.shape, case.itemsize, way.direction, t),
        lambda way: case.labels() | {"gradient_error": errors.get(way.backend)},
        exact,
    )


def gradient_errors(
    case: Case, losses: Mapping[str, Loss], tensors: list[Tensor], device: torch.device
) -> dict[str, float]:
    """Return each contestant's error, the largest over the tasks of ``|g - exact| / |exact|``.

    Exact are the literal equations in float64 on the same numbers. Nothing where they take too
    long, on a CPU, or too much memory.
    """
    if device.type == "cpu" and floors.literal_flops(case.function, case.shape) > JUDGE_FLOPS:
        return {}
    errors = {}
    literal = loss_of(case, rivals.LITERAL[case.function])
    try:
        doubles = [t.detach().double().requires_grad_() for t in tensors]
        exact = torch.autograd.grad(literal(doubles), doubles)
    except torch.OutOfMemoryError:
        return {}
    for name, loss in losses.items():
        try:
            pairs = zip(torch.autograd.grad(loss(tensors), tensors), exact, strict=True)
            each = torch.stack([(g.double() - e).norm() / e.norm() for g, e in pairs])
            errors[name] = float(f"{each.max().item():.5g}")  # NaN where one is
        except FAILURES:  # its calls will fail too, and have the error
            continue
    return errors


def losses_table(result: dict) -> str:
    """Return `csa_loss` by the default backend against the reference, with its memory."""
    gpu, default = output.on_gpu(result), result["default_backend"]
    rows = output.where(result["rows"], function="csa_loss", layout="contiguous", graph=False)
    lines = []
    for (precision, shape), here in groups(rows, "precision", "shape").items():
        ways = {(row["backend"], row["direction"]): row for row in here}
        cells = [f"{shape}, {precision}" if gpu else shape, output.size_of(here[0])]
        for direction in (FORWARD, FORWARD_BACKWARD):
            mine, other = (ways.get((name, direction)) for name in (default, REFERENCE))
            cells.append(_cell(mine, other, gpu))
        memory = f"{mine['peak_mb']:.4g} MB" if mine and not mine["error"] else ""
        if memory and other and not other["error"]:
            memory += f", reference {other['peak_mb']:.4g} MB"
        lines.append([*cells, memory])
    header = ["shape", "T, B, C, N", "forward", "forward + backward", "peak extra memory"]
    return captioned(markdown(header, lines), result, _units(gpu, default))


def kernels_table(result: dict) -> str:
    gpu, default = output.on_gpu(result), result["default_backend"]

    def cells(rows: dict[str, dict], names: list[str]) -> list[str]:
        best = rows.get(default)
        fraction = "" if best is None or best["error"] else f"{100 * best['fraction']:.2g}%"
        return [*(_cell(rows.get(b), rows.get(REFERENCE), gpu) for b in names), fraction]

    table = _table(result["rows"], cells, ["fraction of the floor"])
    return captioned(table, result, _units(gpu, default))


def errors_table(result: dict) -> str:
    """Return how far each contestant's gradient is from the reference's in float64."""

    def cells(rows: dict[str, dict], names: list[str]) -> list[str]:
        errors = [rows.get(b, {}).get("gradient_error") for b in names]
        return ["" if error is None else f"{error:.1e}" for error in errors]

    text = (
        "Relative error of the gradient, the largest over the tasks, against the reference in "
        "float64 on the same numbers."
    )
    return captioned(_table(output.where(result["rows"], graph=False), cells, []), result, text)


def _table(
    rows: list[dict], cells: Callable[[dict[str, dict], list[str]], list[str]], more: list[str]
) -> str:
    """Return a table of forward + backward with a column for each contestant."""
    names = [b for b in TITLES if any(r["backend"] == b for r in rows)]
    training, lines = output.where(rows, direction=FORWARD_BACKWARD), []
    keys = ("function", "precision", "shape", "layout", "graph")
    for (function, precision, *_, graph), here in groups(training, *keys).items():
        if any(values := cells(by(here, "backend"), names)):
            place = output.place_of(here[0]) + (", CUDA graph" if graph else "")
            lines.append([f"`{function}`", place, precision, *values])
    header = ["function", "shape", "dtype", *(TITLES[b] for b in names), *more]
    return markdown(header, lines)


def _cell(row: dict | None, reference: dict | None, gpu: bool) -> str:
    """Return milliseconds on a GPU; else only the ratio: a CPU's times say little elsewhere."""
    if row is None:
        return ""
    if row["error"]:
        return output.failure(row)
    known = reference is not None and not reference["error"]
    ratio = f"{reference['ms'] / row['ms']:.3g}x" if known else ""
    if not gpu:
        return ratio
    return f"{row['ms']:.3g}" + (f" ({ratio})" if ratio and row is not reference else "")


def _units(gpu: bool, default: str) -> str:
    if gpu:
        return f"Milliseconds; in brackets how many times faster than the reference ({default})."
    return (
        f"How many times faster than the reference (`{default}` is the default here); the batch is "
        "scaled to fit a CPU, the matrices are not."
    )


def speed_figure(result: dict) -> Figure | None:
    """Return bars of forward + backward against the reference, in the first precision."""
    from matplotlib.figure import Figure

    precision = result["rows"][0]["precision"]
    wanted = {"layout": "contiguous", "precision": precision, "direction": FORWARD_BACKWARD}
    rows = [r for r in output.where(result["rows"], **wanted, graph=False) if r["ms"]]
    measured = [r["function"] for r in rows]
    function = max(("csa_loss", "rep_mtl_loss"), key=measured.count)
    speed: dict[str, dict[str, float]] = {}  # by shape and contestant
    for here in groups(output.where(rows, function=function), "shape").values():
        name = "{shape}\nT{T} B{B} C{C} N{N}".format(**here[0])
        ms = {row["backend"]: row["ms"] for row in here}
        if REFERENCE in ms:
            speed[name] = {b: ms[REFERENCE] / ms[b] for b in ms if b != REFERENCE}
    if not speed:
        return None
    names = [b for b in output.COLORS if any(b in here for here in speed.values())]
    height = 0.8 / len(names)
    figure = Figure(figsize=(7.5, 0.9 + 0.26 * len(speed) * (len(names) + 0.8)))
    axes = figure.add_subplot()
    for i, name in enumerate(names):
        here = [(k, v[name]) for k, v in enumerate(speed.values()) if name in v]
        places = [k + (i - (len(names) - 1) / 2) * height for k, _ in here]
        color, label = output.COLORS[name], TITLES[name].replace("`", "")
        bars = axes.barh(
            places, [v - 1 for _, v in here], height * 0.92, 1, color=color, label=label
        )
        axes.bar_label(bars, [f"{v:.3g}x" for _, v in here], padding=2, fontsize=8)
    ratios = [v for here in speed.values() for v in here.values()]
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlim(0.8 * min([1.0, *ratios]), 1.6 * max(ratios))
    axes.axvline(1, color="#808080", linewidth=1)
    axes.set_yticks(range(len(speed)), speed)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("times faster than the reference")
    title = f"{function}, forward + backward, {precision}, {output.machine_of(result)}"
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(loc="upper left", bbox_to_anchor=(0.1, -0.02), ncols=len(names))
    return figure


PART = Part(
    "kernels",
    "KERNELS: each loss, forward and forward + backward, all contestants in turns",
    measure,
    {"losses": losses_table, "kernels": kernels_table, "errors": errors_table},
    {"speed": speed_figure},
    line_up.broken,
    share=0.45,
    on=("cpu", "cuda"),
)
