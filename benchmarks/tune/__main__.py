"""``python -m benchmarks.tune``: the fastest tiles of the Triton kernels here. See ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.machine import describe, slug
from benchmarks.progress import say, table
from benchmarks.shapes import SHAPES, Shape
from benchmarks.static_report import CAPABILITIES, LAYOUTS, MODES
from benchmarks.tune.candidates import shown
from benchmarks.tune.cases import KERNELS, Case, cases, shape_of_size, shapes_named
from benchmarks.tune.compiling import Compiled, Job, compile_all
from benchmarks.tune.measuring import (
    GAIN,
    Measured,
    WrongResultError,
    compilations,
    faster_rules,
    measure,
    rows_of,
)
from repmtl_kernels.backends.triton import tiles as tile_table

DEFAULT_MODES = ("bfloat16", "tf32")
# Containers with fewer cores than their machine may not say so.
WORKERS = min(16, len(os.sched_getaffinity(0)))
# Of --seconds, what compiling may take: the rest is enough to measure what it has made.
COMPILE_SHARE = 0.6


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description="Compiles candidate tiles of the Triton kernels in parallel, times them in "
        "turns on this machine's GPU, and writes a table of those that are faster than the tiles "
        "that are used now.",
    )
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, help="default: all, if there is no --size"
    )
    parser.add_argument(
        "--size", nargs=4, type=int, action="append", metavar=("T", "B", "C", "N"), default=[],
        help="a shape of your own: tasks, batch, channels and positions (height times width); "
        "may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--mode", nargs="+", default=DEFAULT_MODES, choices=MODES,
        help=f"dtype, and of float32 the precision of products; default: {' '.join(DEFAULT_MODES)}",
    )  # fmt: skip
    parser.add_argument(
        "--layout", nargs="+", default=["contiguous"], choices=LAYOUTS,
        help="default: contiguous. A tile holds for all layouts: with several, one is chosen that "
        "is slower in none",
    )  # fmt: skip
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument(
        "--seconds", type=float, metavar="N",
        help="about how long it may take; what there is no time for is left out, the largest "
        "shapes are first",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=WORKERS, metavar="N",
        help=f"processes that compile, of half a GB and more each; default: {WORKERS}",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder of tiles.json, with all times; default: benchmarks/results/<machine>",
    )  # fmt: skip
    parser.add_argument(
        "--write", type=Path, metavar="FILE",
        help=f"write the faster tiles there, as {tile_table.VARIABLE} takes them, before those of "
        f"the table that {tile_table.VARIABLE} names now",
    )  # fmt: skip
    parser.add_argument(
        "--compile-only", action="store_true",
        help="only print what the compiler made of each candidate; needs no GPU",
    )  # fmt: skip
    parser.add_argument(
        "--capability", type=int, choices=CAPABILITIES,
        help="compute capability to compile for, with --compile-only; default: 90",
    )  # fmt: skip
    options = parser.parse_args(given)
    if options.compile_only and (options.write or options.out):
        parser.error("--write and --out: expected no --compile-only, which measures nothing")
    if options.capability and not options.compile_only:
        parser.error("--capability: expected --compile-only; measured is the GPU that is there")
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1; got {options.workers}")
    try:
        options.sizes = [shape_of_size(*size) for size in options.size]
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    options = arguments()
    began = time.monotonic()
    planned = cases(options.kernel, shapes(options), options.mode, options.layout)
    if options.compile_only:
        compile_report(planned, options.capability or 90, options.workers)
        return
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device; with --compile-only it does without")
    device = torch.device("cuda")
    say(f"machine {slug(device)}: measuring its copy and matrix-product rates")
    head = describe(device)
    say(f"  {head['machine']}\n  {head['versions']}\n  {head['measured']}")
    folder = options.out or results.RESULTS / slug(device)
    tune(
        planned,
        device,
        tile_table.capability_of(device),
        head,
        folder=folder,
        write=options.write,
        workers=options.workers,
        seconds=options.seconds,
        began=began,
    )
    say(f"\nresults: {folder / 'tiles.json'}; {time.monotonic() - began:.0f} s")


def shapes(options: argparse.Namespace) -> list[Shape]:
    names = options.shape or ([] if options.sizes else list(SHAPES))
    return options.sizes + shapes_named(names)


def tune(
    planned: Sequence[Case],
    device: torch.device,
    capability: int,
    head: dict,
    *,
    folder: Path,
    write: Path | None,
    workers: int,
    seconds: float | None = None,
    began: float | None = None,
) -> None:
    """Compiles, measures, and saves after each case what is known by then.

    began: ``time.monotonic()`` from which on ``seconds`` count; default: now.
    """
    began = time.monotonic() if began is None else began
    seconds = float("inf") if seconds is None else seconds
    kept = tile_table.own_rules()  # before all else: a bad table is refused
    line_ups, notes = compiled_line_ups(
        planned, capability, workers, until=began + COMPILE_SHARE * seconds
    )
    say(f"compiled; {time.monotonic() - began:.0f} s")
    measured: list[list[Measured]] = []
    rows: list[dict] = []
    rules: list[tile_table.Rule] = []

    def save() -> None:
        results.save(folder, "tiles", head, rows, notes=notes)
        if write is not None:
            write.parent.mkdir(parents=True, exist_ok=True)
            write.write_text(tile_table.as_json((*rules, *kept)))

    def leave_out(case: Case, why: str) -> None:
        notes.append(f"left out: {case}: {why}")
        say(notes[-1])

    with compilations() as again:
        for case, line_up in line_ups.items():
            if time.monotonic() > began + seconds:
                leave_out(case, "no time")
                continue
            try:
                measured.append(measure(case, line_up, device))
            except (torch.OutOfMemoryError, WrongResultError) as error:
                leave_out(case, str(error).partition("\n")[0])
                continue
            new = rows_of(measured[-1], head["measured"])
            say(summary(measured[-1], new))
            rows += new
            rules = faster_rules(measured)
            save()
    if again:
        say(f"compiled once more while measuring, the cache did not have them: {', '.join(again)}")
    if not measured:
        sys.exit("nothing was measured: " + "; ".join(notes))
    save()  # with the last notes
    say("\n" + comparison(measured, rows))
    say(f"\n{len(rules)} rules: a tile that takes at least {100 * GAIN:g} % less time")
    if write is not None:
        say(f"written; use them with {tile_table.VARIABLE}={write}")


def jobs_of(planned: Iterable[Case]) -> list[Job]:
    return [Job(case, tile) for case in planned for tile in (None, *case.candidates)]


def compiled_line_ups(
    planned: Sequence[Case], capability: int, workers: int, until: float
) -> tuple[dict[Case, list[Compiled]], list[str]]:
    """The candidates of each case, each program once, the tables' tile first; and notes."""
    jobs = jobs_of(planned)
    say(f"compiling {len(jobs)} candidates of {len(planned)} cases, {workers} at a time")
    line_ups: dict[Case, list[Compiled]] = {case: [] for case in planned}
    missing = dict.fromkeys(planned, 0)
    for job, compiled in zip(jobs, compile_all(jobs, capability, workers, until), strict=True):
        if compiled is None:
            missing[job.case] += 1
        elif compiled.hash is None or all(
            compiled.hash != other.hash for other in line_ups[job.case]
        ):
            line_ups[job.case].append(compiled)
    notes = [f"left out: {n} candidates of {case}: no time" for case, n in missing.items() if n]
    for case in planned:
        first = next(iter(line_ups[case]), None)
        if first is None or not first.is_baseline or first.request is None:
            why = "not compiled in time" if first is None or not first.is_baseline else first.error
            notes.append(f"left out: {case}: the tile of the tables: {why}")
            del line_ups[case]
    for note in notes:
        say(note)
    return line_ups, notes


def compile_report(planned: Sequence[Case], capability: int, workers: int) -> None:
    header = ["candidate", "registers", "spills", "shared", "left out because"]
    line_ups, _ = compiled_line_ups(planned, capability, workers, until=float("inf"))
    for case, line_up in line_ups.items():
        lines = [
            [
                named(c),
                *("" if v is None else str(v) for v in (c.registers, c.spill_bytes)),
                "" if c.shared_bytes is None else f"{c.shared_bytes / 1024:.0f} KB",
                c.error or "",
            ]
            for c in line_up
        ]
        say(f"\nsm_{capability} {case}\n{table(header, lines)}")


def named(candidate: Compiled) -> str:
    text = shown(candidate.tile)
    return f"{text} (used now)" if candidate.is_baseline else text


def summary(measured: Sequence[Measured], rows: Sequence[dict]) -> str:
    """The times of a case, and what was left out of it."""
    times = sorted(
        (row["ms"], f"{named(m.candidate)} {1e3 * row['ms']:.4g} us, {100 * row['fraction']:.2g}%")
        for m, row in zip(measured, rows, strict=True)
        if row["ms"] is not None
    )
    left_out = [f"  left out: {named(m.candidate)}: {m.error}" for m in measured if m.error]
    return "\n".join(
        [f"{measured[0].candidate.case}: " + "; ".join(text for _, text in times), *left_out]
    )


def comparison(measured: Sequence[Sequence[Measured]], rows: Sequence[dict]) -> str:
    """The tile that is used now and the fastest one, a line for each case."""
    lines = []
    rest = iter(rows)
    for case in measured:
        timed = [(m, row) for m in case if (row := next(rest))["ms"] is not None]
        if not timed:
            continue
        (now, now_row), (best, row) = timed[0], min(timed, key=lambda pair: pair[1]["ms"])
        lines.append(
            [
                str(now.candidate.case),
                shown(now.candidate.tile), f"{1e3 * now_row['ms']:.4g}",
                shown(best.candidate.tile), f"{1e3 * row['ms']:.4g}",
                f"{row['ratio']:.3f}", f"{100 * row['fraction']:.2g}%",
            ]
        )  # fmt: skip
    return table(["case", "used now", "us", "fastest", "us", "ratio", "of the floor"], lines)


if __name__ == "__main__":
    main()
