"""Times the candidates of a case in turns, and makes rules of those that are faster."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.cases import Effort, input_sets
from benchmarks.results import rounded
from benchmarks.rotation import Rotating, graphed
from benchmarks.static_report import products_of
from benchmarks.timing import Timing, side_by_side
from benchmarks.tune.cases import Case, shown, stage_of
from benchmarks.tune.compiling import Compiled
from repmtl_kernels.backends.triton import tiles as tile_table
from repmtl_kernels.backends.triton.tiles import Rule, Sweep, Tile

# A candidate has to take that much less time than the tile of the tables, and beyond the spread.
GAIN = 0.03
# Largest difference from the result of the tables' tile, relative to the largest element: sums in
# another order, rounded to the dtype; tf32 operands may be cut off or rounded.
TOLERANCE = {"bfloat16": 1e-2, "float16": 1e-2, "tf32": 5e-3, "tf32x3": 1e-4, "ieee": 1e-4}
EFFORT = Effort(seconds=0.6, min_rounds=7, max_rounds=40)


class WrongResultError(Exception):
    """A candidate computes something else than the tile of the tables."""


class Measured(NamedTuple):
    candidate: Compiled
    timing: Timing | None  # None: left out
    error: str | None = None


def measure(case: Case, compiled: Sequence[Compiled], device: torch.device) -> list[Measured]:
    """Return one for each that was compiled, the tile of the tables first.

    Raises a :class:`WrongResultError` for a candidate whose result is another, and what the GPU
    raises: torch.OutOfMemoryError where it is too small for the case.
    """
    left_out = {c: c.error for c in compiled if c.error and not c.is_baseline}
    calls: dict[Compiled, Callable[[], object]] = {}
    sets = input_sets(case.shape.elements * case.dtype.itemsize, device)
    with products_of(case.mode), torch.no_grad():
        stages = _stages(case, sets, device)
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        expected = None
        for candidate in compiled:
            if candidate in left_out:
                continue
            tiles = {case.kernel: candidate.tile}
            call = partial(_run, tiles)
            try:
                expected = _checked(candidate, partial(call, stages[:1]), expected)
                # As a CUDA graph: launches take as long as small kernels, and are the same for all.
                every = Rotating(call, [stages])
                calls[candidate] = every if pool is None else graphed(every, device, pool)
            except (OutOfResources, RuntimeError) as error:
                # A tensor map is made on the host: the GPU knows nothing of its failure.
                if not isinstance(error, OutOfResources) and "tensor map" not in str(error).lower():
                    raise
                left_out[candidate] = str(error)
                if candidate.is_baseline:  # nothing to compare with
                    return [Measured(candidate, None, left_out[candidate])]
        timings = side_by_side(calls, device, EFFORT)
    return [
        Measured(c, None, left_out[c]) if c in left_out else Measured(c, _each(timings[c], sets))
        for c in compiled
    ]


def _stages(case: Case, sets: int, device: torch.device) -> list[Callable[[], Sequence]]:
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    return [stage_of(case, normal) for _ in range(sets)]


def _run(
    tiles: Mapping[str, Tile | Sweep], stages: Sequence[Callable[[], Sequence]]
) -> Sequence[Tensor | None]:
    """Run the stages one after the other with these tiles; return what the last one computes."""
    with tile_table.trying(tiles):
        for stage in stages:
            result = stage()
    return result


def _result(stage: Callable[[], Sequence[Tensor | None]]) -> list[Tensor]:
    """Return what the stage computes, NaN where it does not write."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN then
    try:
        return [value for value in stage() if value is not None]
    finally:
        torch.use_deterministic_algorithms(before)


def _checked(
    candidate: Compiled, stage: Callable[[], Sequence], expected: list[Tensor] | None
) -> list[Tensor]:
    """Return the expected result, which the first candidate gives, or raise if this one differs."""
    result = _result(stage)
    allowed = TOLERANCE[candidate.case.mode]
    for f, e in zip(result, expected or result, strict=True):
        # For the first one: whether it is finite.
        error = ((f.float() - e.float()).abs().max() / e.abs().max()).item()
        if not error <= allowed:
            raise WrongResultError(
                f"{candidate.case}: {shown(candidate.tile)} computes something else than the tile "
                f"of the tables: of {tuple(f.shape)} numbers one differs by {error:.3g} of the "
                f"largest, {allowed:g} is rounding"
            )
    return expected or result


def _each(timing: Timing, sets: int) -> Timing:
    return timing._replace(ms=timing.ms / sets, spread=timing.spread / sets)


def rows_of(measured: Sequence[Measured]) -> list[dict]:
    """Return the rows of a case, whose first one is the tile of the tables."""
    rows, baseline = [], measured[0].timing
    for candidate, timing, error in measured:
        case, tile = candidate.case, candidate.tile
        row = {"kernel": case.kernel, "shape": case.shape.name, "mode": case.mode}
        row |= {"layout": case.layout, "tile": tile and shown(tile), "ms": None, "error": error}
        row["baseline"] = candidate.is_baseline
        if timing is not None and baseline is not None:
            row |= rounded(timing._asdict() | {"ratio": timing.ms / baseline.ms})
        rows.append(row)
    return rows


def faster_rules(measured: Sequence[Sequence[Measured]]) -> list[Rule]:
    """Return a rule for each request that has a faster candidate.

    Cases that ask alike (layouts, batches, both 16-bit dtypes) have one rule: a candidate has to be
    faster in one of them, and slower in none.
    """
    alike: dict[tile_table.Request, list[dict[Tile | Sweep, Timing]]] = defaultdict(list)
    baselines = {}
    for case in measured:
        timings = {m.candidate.tile: m.timing for m in case if m.timing is not None}
        if timings:
            first = case[0].candidate
            alike[first.request].append(timings)
            baselines[first.request] = first.tile
    rules = []
    for request, lines in alike.items():
        best = _fastest(baselines[request], lines)
        if best is None:
            continue
        kernel, kind, odd, rows, depth, capability = request
        rules.append(
            Rule(kernel, (kind,), best, odd, (rows, rows), (depth, depth), (capability, capability))
        )
    return rules


def _fastest(
    baseline: Tile | Sweep, lines: Sequence[dict[Tile | Sweep, Timing]]
) -> Tile | Sweep | None:
    """Return the faster candidate with the least geometric mean."""

    def gains(tile: Tile | Sweep) -> list[float]:
        return [_gain(line[baseline], line[tile]) for line in lines]

    def mean(tile: Tile | Sweep) -> float:
        return sum(math.log(line[tile].ms / line[baseline].ms) for line in lines)

    in_all = [t for t in lines[0] if t != baseline and all(t in line for line in lines)]
    better = [t for t in in_all if max(gains(t)) >= GAIN and min(gains(t)) >= 0]
    return min(better, key=mean, default=None)


def _gain(baseline: Timing, own: Timing) -> float:
    """Return the share of the baseline's time that a candidate saves; 0 within the spread."""
    saved = baseline.ms - own.ms
    return saved / baseline.ms if abs(saved) > max(baseline.spread, own.spread) else 0.0
