"""The measuring of a case: its contestants in turns, each checked, timed and given its floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import floors
from benchmarks.cases import FLOAT32, Effort, Precision
from benchmarks.memory import peak_extra_bytes
from benchmarks.output import say
from benchmarks.part import FAILURES, described, free
from benchmarks.results import rounded
from benchmarks.rotation import Rotating, graphed
from benchmarks.timing import side_by_side

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
REFERENCE = "reference"
BACKENDS = ("eager", "native", "triton")
# A contestant whose loss is further from the one in float64 than this computes something else.
AGREEMENT = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
LEAST_VALUE = 0.01  # of a loss: smaller values agree absolutely
DISAGREES = "computes something else"


class Way(NamedTuple):
    """A contestant, a direction, and whether it is replayed as CUDA graphs."""

    backend: str
    direction: str = FORWARD
    graph: bool = False


@dataclass(frozen=True)
class LineUp:
    """All that a case has to say about its contestants.

    makers: of the calls, used when the turn of each comes; precision: of the products; work: counts
    the passes of a way; labels: the first fields of a way's row; exact: the value in float64, None
    where values are not compared; graphs: whether they are replayed as CUDA graphs too.
    """

    makers: Mapping[Way, Callable[[], Rotating]]
    precision: Precision
    work: Callable[[Way, floors.Tiling], list[floors.Pass]]
    labels: Callable[[Way], dict]
    exact: float | None = None
    graphs: bool = True

    def rows(self, device: torch.device, ceilings: dict, effort: Effort) -> list[dict]:
        """Return a row for each contestant: its time, memory and floor, or its error."""
        calls, errors = self.prepared(device)
        timings = side_by_side(calls, device, effort)
        rows = []
        for way, call in calls.items():
            figures = {
                **timings[way]._asdict(),
                # A graph holds its memory all the time.
                "peak_mb": None if way.graph else peak_extra_bytes(call, device) / 1e6,
                **self.rates(way, timings[way].ms, ceilings),
                "error": None,
            }
            rows.append(self.labels(way) | way._asdict() | rounded(figures))
        for way, error in errors.items():
            rows.append(self.labels(way) | way._asdict() | {"ms": None, "error": error})
        free(device)  # what graphs and inputs of this size held
        return rows

    def prepared(self, device: torch.device) -> tuple[dict[Way, Rotating], dict[Way, str]]:
        """Return warm calls, and why the other contestants are left out."""
        calls: dict[Way, Rotating] = {}
        errors: dict[Way, str] = {}

        def admit(way: Way, make: Callable[[], Rotating]) -> None:
            try:
                call = make()
                result = call()
                value = None if self.exact is None else result.float().mean().item()
            except FAILURES as failure:
                errors[way] = described(failure)
                free(device)
                return
            wrong = None if value is None else disagreement(self.precision, way, value, self.exact)
            if wrong is None:
                calls[way] = call
            else:
                errors[way] = wrong

        for way, make in self.makers.items():
            admit(way, make)
        if self.graphs and device.type == "cuda":
            # A failed capture can leave traces: calls that are known to work come first.
            for way in sorted(calls, key=lambda way: way.backend not in BACKENDS):
                admit(way._replace(graph=True), partial(graphed, calls[way], device))
        return calls, errors

    def rates(self, way: Way, ms: float, ceilings: dict) -> dict:
        """Return the floor on this machine, the fraction of it, and the bytes per second."""
        tiling = floors.EXACT if self.precision == FLOAT32 else floors.TENSOR_CORES
        matmul_tflops = floors.matmul_rate(ceilings["matmul_tflops"], self.precision.name)
        floor = floors.floor_ms(self.work(way, tiling), ceilings["copy_gbs"], matmul_tflops)
        moved = sum(p.bytes for p in self.work(way, floors.EXACT))
        return {"floor_ms": floor, "fraction": floor / ms, "gbs": moved / ms / 1e6}


def disagreement(precision: Precision, way: Way, value: float, exact: float) -> str | None:
    """Return what is wrong with a value; the reference in 16 bits may be wrong altogether."""
    allowed = AGREEMENT[precision.dtype] * max(abs(exact), LEAST_VALUE)
    if way.backend == REFERENCE or abs(value - exact) <= allowed:
        return None
    return f"{DISAGREES}: {value:.6g} instead of {exact:.6g}"


def broken(rows: list[dict]) -> list[str]:
    """Return the failures of this package: not a rival's, and not for want of memory."""
    return [
        f"{r['function']} {r['shape']} {r['precision']} {r['layout']} {r['direction']} "
        f"{r['backend']}{' in a CUDA graph' if r['graph'] else ''}: {r['error']}"
        for r in rows
        if r["error"] and "OutOfMemory" not in r["error"]
        if r["backend"] in BACKENDS or (r["backend"] == REFERENCE and not r["graph"])
    ]


def report_rows(what: object, rows: list[dict]) -> list[dict]:
    shown = [
        f"{row['backend']}{' graph' if row['graph'] else ''} "
        + (row["error"] or f"{row['ms']:.4g} ms, {100 * row['fraction']:.2g}%")
        for row in rows
        if row["direction"] != FORWARD or len({r["direction"] for r in rows}) == 1
    ]
    say(f"{what}: {'; '.join(shown)}")
    return rows
