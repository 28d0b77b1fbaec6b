"""Counts of the compiled Triton kernels, and the times of an H200 that they predict.

No GPU takes part: ``benchmarks/launches.py`` counts, ``benchmarks/h200.py`` has the rates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import floors, h200
from benchmarks.cases import BFLOAT16, TF32
from benchmarks.output import groups, markdown, say, where
from benchmarks.part import Part, Run
from benchmarks.results import RESULTS, rounded
from benchmarks.shapes import SHAPES, Shape

if TYPE_CHECKING:
    from benchmarks.launches import Launched, Operation

CAPABILITY = 90
MODES = {precision.name: precision for precision in (BFLOAT16, TF32)}
ORDER = ("nyuv2", "cityscapes", "office49", "office1", "vit196", "vit1024")
# Small, with the large tiles and the unaligned rows: what the tests count again.
SMALL = {
    shape.name: shape
    for shape in (
        Shape("small", 2, 2, 512, 16, 24, 2, "none"),
        Shape("small_odd", 2, 2, 96, 7, 7, 2, "none"),
    )
}
SMALL_CASES = (
    ("small", "tf32", 90),
    ("small_odd", "bfloat16", 80),
    ("small", "bfloat16", 90),
    ("small", "bfloat16", 80),
    ("small_odd", "bfloat16", 90),
)
SECTOR = 32  # bytes
# Shown: kernels that take at least this part of a call.
SHARE = 0.08


class Case(NamedTuple):
    shape: Shape
    mode: str
    capability: int

    def __str__(self) -> str:
        return f"{self.shape.name} {self.mode} sm_{self.capability}"


def cases(quick: bool) -> list[Case]:
    small = [Case(SMALL[shape], mode, capability) for shape, mode, capability in SMALL_CASES]
    names = ("office1",) if quick else ORDER
    return [*(Case(SHAPES[s], mode, CAPABILITY) for s in names for mode in MODES), *small]


def measure(run: Run) -> None:
    """Count all cases into the results of the compiler, which no machine has a part in."""
    folder = run.folder
    if folder is not None and folder.parent == RESULTS:
        folder = RESULTS / "compiler"
    head = run.head | {"machine": {"name": "compiler"}, "measured": None}
    of_compiler = dataclasses.replace(run, folder=folder, head=head, rows=[])
    of_compiler.each(cases(run.quick), rows_of)


def rows_of(case: Case, *, predict: bool = True) -> list[dict]:
    """Return a row for each launch, and with a prediction one for each direction."""
    from benchmarks import launches

    labels = {"capability": case.capability, "shape": case.shape.name, "mode": case.mode}
    predict = predict and case.shape.name in SHAPES
    found = launches.counted(case.shape, case.mode, case.capability, latency=predict)
    rows = []
    for launched in found:
        if isinstance(launched, launches.Operation):
            row = _operation(launched)
        else:
            count = launches.registers(launched.ptx, case.capability) if predict else None
            row = _kernel(launched, count)
        rows.append(labels | rounded(row))
    if predict:
        for row in rows:
            row |= _prediction(row)
        rows += [labels | row for row in _calls(case, rows)]
        for call in rows[-2:]:
            say(f"  {case}, {call['direction']}: {_percent(call)} of the floor")
    return rows


def _operation(operation: Operation) -> dict:
    return {
        "kernel": operation.name,
        "direction": _direction(operation.backward),
        "of_pytorch": True,
        "dram_bytes": operation.bytes,
    }


def _direction(backward: bool) -> str:
    return "backward" if backward else "forward"


def _kernel(launched: Launched, registers: int | None) -> dict:
    """Return the counts of the CTAs that ran."""
    counters = launched.counters
    accesses, shared = counters.accesses.values(), counters.shared.values()
    return {
        "kernel": launched.kernel,
        "direction": _direction(launched.backward),
        "of_pytorch": False,
        "grid": list(launched.grid),
        "sampled": counters.ctas,
        "threads": launched.threads,
        "registers": registers,
        "shared_bytes": launched.shared,
        "requests": sum(count["requests"] for count in accesses),
        "sectors": sum(count["sectors"] for count in accesses),
        "requested_sectors": counters.requested,
        "least_sectors": sum(count["least_sectors"] for count in accesses),
        "wavefronts": sum(count["wavefronts"] for count in shared),
        "least_wavefronts": sum(count["least_wavefronts"] for count in shared),
        "conflicts": _conflicts(counters.shared),
        "operand_bytes": counters.operand_bytes,
        "bulk_bytes": counters.bulk_bytes,
        "dram_bytes": counters.read.bytes_of_sectors() + counters.written.bytes_of_sectors(),
        "flop": dict(counters.flop),
        "issued": dict(counters.issued_by_class),
        "latency_clocks": launched.latency_clocks,
    }


def _conflicts(shared: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Return the instructions with bank conflicts: wavefronts over those without them."""
    factors = {
        form: round(count["wavefronts"] / count["least_wavefronts"], 2)
        for form, count in shared.items()
        if count["wavefronts"] > count["least_wavefronts"]
    }
    return dict(sorted(factors.items()))


def as_launch(row: dict) -> h200.Launch:
    """Return the whole launch that the sampled CTAs of a row stand for."""
    x, y, z = row["grid"]
    ctas = x * y * z
    times = ctas / row["sampled"]
    waved = h200.SHARED_BYTES * row["wavefronts"] + row["operand_bytes"] + row["bulk_bytes"]
    return h200.Launch(
        ctas=ctas,
        resident=h200.resident(row["threads"], row["registers"], row["shared_bytes"]),
        dram_bytes=times * row["dram_bytes"],
        l2_bytes=times * SECTOR * row["requested_sectors"],
        shared_bytes=times * waved,
        flop={name: times * flop for name, flop in row["flop"].items()},
        issued={name: times * number for name, number in row["issued"].items()},
        latency_clocks=row["latency_clocks"],
    )


def _prediction(row: dict) -> dict:
    """Return microseconds with the slower and the faster L2 cache, and the bounds."""
    if row["of_pytorch"]:
        moved = row["dram_bytes"] / h200.COPY_GBS / 1e3
        us = moved + h200.LAUNCH_US
        bound = "dram" if moved > h200.LAUNCH_US else "launch"
        return rounded({"us": us, "us_fast_l2": us, "bound": bound})
    launch = as_launch(row)
    slow, fast = (h200.times_us(launch, gbs) for gbs in h200.L2_GBS)
    first, second, *_ = sorted(slow, key=slow.__getitem__, reverse=True)
    return {
        **rounded(
            {
                "us": slow[first] + h200.LAUNCH_US,
                "us_fast_l2": max(fast.values()) + h200.LAUNCH_US,
                "waves": h200.waves(launch),
            }
        ),
        "resident": launch.resident,
        "bound": "launch" if slow[first] < h200.LAUNCH_US else first,
        "times_us": rounded(slow),
        "next": second,
    }


def _calls(case: Case, rows: Sequence[dict]) -> Iterator[dict]:
    precision = MODES[case.mode]
    for direction in ("forward", "forward_backward"):
        work = floors.passes(
            "rep_mtl_loss", case.shape, precision.dtype.itemsize, direction, floors.TENSOR_CORES
        )
        taken = [row for row in rows if direction != "forward" or row["direction"] == "forward"]
        floor = 1e3 * floors.floor_ms(work, h200.COPY_GBS, h200.MATMUL_TFLOPS[case.mode])
        figures = {"floor_us": floor}
        for key in ("us", "us_fast_l2"):
            figures[key] = sum(row[key] for row in taken)
        yield {
            "kernel": None,
            "direction": direction,
            "launches": len(taken),
            "launches_of_pytorch": sum(row["of_pytorch"] for row in taken),
            **rounded(figures),
        }


def _percent(call: dict) -> str:
    slow, fast = (100 * call["floor_us"] / call[key] for key in ("us", "us_fast_l2"))
    return f"{_range(slow, fast)}%"


def _us(row: dict) -> str:
    return _range(row["us_fast_l2"], row["us"])


def _range(least: float, most: float) -> str:
    low, high = _number(least), _number(most)
    return low if low == high else f"{low} to {high}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def calls_table(result: dict) -> str:
    """Return a line for each shape, mode and direction."""
    header = ["shape", "dtype", "direction", "floor, us", "predicted, us", "of the floor",
              "launches, of them PyTorch's"]  # fmt: skip
    lines = [
        [
            row["shape"],
            row["mode"],
            row["direction"].replace("_", " and "),
            _number(row["floor_us"]),
            _us(row),
            _percent(row),
            f"{row['launches']}, {row['launches_of_pytorch']}",
        ]
        for row in where(result["rows"], kernel=None)
    ]
    return f"{markdown(header, lines)}\n\n{_caption(result)}"


def _caption(result: dict) -> str:
    slow, fast = (gbs / 1e3 for gbs in h200.L2_GBS)
    return (
        f"Predicted, not measured: the compiled kernels ran on a CPU, which counted. The rates are "
        f"those of an H200: {h200.COPY_GBS / 1e3:g} TB/s of memory, an L2 cache of {slow:g} to "
        f"{fast:g} TB/s, {h200.MATMUL_TFLOPS['bfloat16']:g} and {h200.MATMUL_TFLOPS['tf32']:g} "
        f"TFLOP/s, {h200.CLOCK_GHZ:g} GHz, {h200.LAUNCH_US:g} us for each launch "
        f"(`benchmarks/h200.py`). Triton {result['versions']['triton']}, commit "
        f"{result['commit'][:10]}{', with changes' if result['dirty'] else ''}."
    )


def kernels_table(result: dict) -> str:
    """Return a line for each kernel that takes a visible part of a call."""
    header = ["shape", "dtype", "kernel", "predicted, us", "bound by", "then, us",
              "sectors a request (least)", "bank conflicts", "useful FLOP",
              "programs a multiprocessor", "waves"]  # fmt: skip
    predicted = [row for row in result["rows"] if "us" in row]
    lines = []
    for (name, mode), rows in groups(predicted, "shape", "mode").items():
        whole = max(row["us"] for row in rows if row["kernel"] is None)
        for row in rows:
            if row["kernel"] is None or row["of_pytorch"] or row["us"] < SHARE * whole:
                continue
            lines.append([name, mode, f"`{row['kernel']}`", *_cells(row, SHAPES[name])])
    return (
        f"{markdown(header, lines)}\n\nKernels with at least {SHARE:.0%} of a call. Bank conflicts:"
        " wavefronts of shared memory over those without a conflict. Useful FLOP: exact ones of "
        "the shape over those that the matrix units execute, in the parts of split factors too."
    )


def _cells(row: dict, shape: Shape) -> Iterator[str]:
    yield _us(row)
    yield row["bound"]
    yield f"{row['next']} {_number(row['times_us'][row['next']])}"
    requests = max(1, row["requests"])
    yield f"{row['sectors'] / requests:.3g} ({row['least_sectors'] / requests:.3g})"
    yield _shown_conflicts(row)
    exact = exact_flop(row["kernel"], shape)
    executed = sum(as_launch(row).flop.values())
    yield f"{exact / executed:.0%}" if exact and executed else ""
    yield str(row["resident"])
    yield f"{row['waves']:.3g}"


def _shown_conflicts(row: dict) -> str:
    """Return the factor of all accesses, and the instruction with the most conflicts."""
    if not row["least_wavefronts"]:
        return ""
    shown = f"{row['wavefronts'] / row['least_wavefronts']:.3g}x"
    if not row["conflicts"]:
        return shown
    worst = max(row["conflicts"], key=row["conflicts"].__getitem__)
    return f"{shown}, `{worst}` {row['conflicts'][worst]:g}x"


def exact_flop(kernel: str, shape: Shape) -> float | None:
    """Return the FLOP that a kernel's matrix products need, None where they are few."""
    small, large = sorted((shape.channels, shape.positions))
    with_anchors = 2 * shape.elements * shape.tasks
    if kernel == "_gram_kernel":
        return floors.gram(shape, 2, floors.EXACT, with_grad=True)[0].flops
    if kernel == "_gradient_kernel":
        return 2 * shape.tasks * shape.batch * small**2 * large + with_anchors
    return with_anchors if kernel == "_gradient_pull_kernel" else None


PART = Part(
    "predicted",
    "counts of the compiled kernels, and what they predict for an H200",
    measure,
    tables={"predicted": calls_table, "counters": kernels_table},
)
