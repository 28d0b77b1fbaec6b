"""``python -m benchmarks.tune``: the fastest tiles of the Triton kernels here. See ``--help``."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.machine import describe, slug
from benchmarks.output import groups, markdown, say
from benchmarks.part import Run
from benchmarks.shapes import SHAPES, Shape
from benchmarks.static_report import LAYOUTS, MODES
from benchmarks.tune import measuring
from benchmarks.tune.cases import KERNELS, Case, cases, shape_of_size, shapes_named
from benchmarks.tune.compiling import Compiled, Job, compile_all
from benchmarks.tune.measuring import GAIN, Measured, WrongResultError, measure
from repmtl_kernels.backends.triton import tiles as tile_table

DEFAULT_MODES = ("bfloat16", "tf32")
# Containers with fewer cores than their machine may not say so.
WORKERS = min(16, len(os.sched_getaffinity(0)))
# The share of --seconds that compiling may take: the rest is enough to measure what it has made.
COMPILE_SHARE = 0.6


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description="Compiles candidate tiles of the Triton kernels in parallel, times them in "
        "turns on this machine's GPU, and writes a table of those that are faster than the tiles "
        "that are used now.",
    )
    add, some = parser.add_argument, {"nargs": "+"}
    add("--shape", **some, choices=SHAPES, help="default: all, if there is no --size")
    add("--size", nargs=4, type=int, action="append", metavar=tuple("TBCN"), default=[],
        help="tasks, batch, channels, positions of your own shape; may be repeated")  # fmt: skip
    add("--mode", **some, default=DEFAULT_MODES, choices=MODES,
        help=f"dtype or precision; default: {' '.join(DEFAULT_MODES)}")  # fmt: skip
    add("--kernel", **some, default=list(KERNELS), choices=KERNELS, help="default: all")
    add("--layout", **some, default=["contiguous"], choices=LAYOUTS,
        help="default: contiguous; with several, a tile has to be slower in none")  # fmt: skip
    add("--seconds", type=float, metavar="N",
        help="about how long it may take; the largest shapes are first")  # fmt: skip
    add("--workers", type=int, default=WORKERS, metavar="N",
        help=f"processes that compile, half a GB each; default: {WORKERS}")  # fmt: skip
    add("--out", type=Path, metavar="DIR",
        help="folder of tiles.json; default: benchmarks/results/<machine>")  # fmt: skip
    add("--write", type=Path, metavar="FILE",
        help=f"write the faster tiles there, as {tile_table.VARIABLE} takes them")  # fmt: skip
    options = parser.parse_args(words)
    if min(options.workers, *itertools.chain(*options.size), 1) < 1:
        parser.error("--workers and --size: expected numbers of at least 1")
    return options


def main() -> None:
    options = arguments()
    began = time.monotonic()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    device = torch.device("cuda")
    head = describe(device)
    say(f"{head['machine']}\n{head['versions']}")
    folder = options.out or results.RESULTS / slug(device)
    run = Run("tiles", device, head, folder)
    if options.seconds is not None:
        run.deadline = began + options.seconds
    planned = cases(shapes(options), options.mode, options.layout, options.kernel)
    tune(planned, run, tile_table.capability_of(device), options.write, options.workers)
    say(f"\nresults: {folder / 'tiles.json'}; {time.monotonic() - began:.0f} s")


def shapes(options: argparse.Namespace) -> list[Shape]:
    names = options.shape or ([] if options.size else list(SHAPES))
    return [shape_of_size(*size) for size in options.size] + shapes_named(names)


def tune(
    planned: Sequence[Case], run: Run, capability: int, write: Path | None, workers: int
) -> None:
    """Compile, measure, and save after each case what is known by then; ``write``: the rules."""
    kept = tile_table.own_rules()  # before all else: a bad table is refused
    until = time.monotonic() + COMPILE_SHARE * run.left
    line_ups = compiled_line_ups(planned, capability, workers, run, until)
    measured: list[list[Measured]] = []
    rules: list[tile_table.Rule] = []

    def one(case: Case) -> list[dict]:
        try:
            measured.append(measure(case, line_ups[case], run.device))
        except WrongResultError as error:
            run.note(f"left out: {case}: {error}")
            return []
        rules[:] = measuring.faster_rules(measured)
        if write is not None:
            results.write(write, tile_table.as_json((*rules, *kept)))
        rows = measuring.rows_of(measured[-1])
        say(comparison(rows))
        return rows

    run.each(list(line_ups), one)
    if not measured:
        sys.exit("nothing was measured: " + "; ".join(run.notes))
    run.save()  # with the last notes
    say(f"\n{comparison(run.rows)}")
    say(f"\n{len(rules)} rules: a tile that takes at least {100 * GAIN:g} % less time")
    if write is not None:
        say(f"written; use them with {tile_table.VARIABLE}={write}")


def compiled_line_ups(
    planned: Sequence[Case], capability: int, workers: int, run: Run, until: float
) -> dict[Case, list[Compiled]]:
    """Return the candidates of each case, each program once, the tables' tile first."""
    jobs = [Job(case, tile) for case in planned for tile in (None, *case.candidates)]
    say(f"compiling {len(jobs)} candidates of {len(planned)} cases, {workers} at a time")
    line_ups: dict[Case, list[Compiled]] = {case: [] for case in planned}
    compiled = compile_all(jobs, capability, workers, until)
    for one in filter(None, compiled):
        here = line_ups[one.case]
        if one.hash is None or all(one.hash != other.hash for other in here):
            here.append(one)
    if missing := compiled.count(None):
        run.note(f"left out for time: {missing} candidates")
    for case in planned:
        first = next(iter(line_ups[case]), None)
        if first is None or not first.is_baseline or first.request is None:
            why = "not compiled in time" if first is None or not first.is_baseline else first.error
            run.note(f"left out: {case}: the tile of the tables: {why}")
            del line_ups[case]
    return line_ups


def comparison(rows: Sequence[dict]) -> str:
    """Return the tile that is used now and the fastest one, a line for each case."""
    lines = []
    for where, case in groups(rows, "kernel", "shape", "mode", "layout").items():
        timed = [row for row in case if row["ms"] is not None]
        if timed:
            best = min(timed, key=lambda row: row["ms"])
            tiles = (f"{row['tile']}, {1e3 * row['ms']:.4g} us" for row in (timed[0], best))
            lines.append([" ".join(where), *tiles, f"{best['ratio']:.3f}"])
    return markdown(["case", "used now", "fastest", "ratio"], lines)


if __name__ == "__main__":
    main()
