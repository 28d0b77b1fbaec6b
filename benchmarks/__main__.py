"""``python -m benchmarks``: measures this machine. See ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import ceilings, parts, report, results, targets
from benchmarks.machine import describe, slug
from benchmarks.output import say
from benchmarks.part import Part, Run, described

# Seconds for everything, by device and effort.
BUDGETS = {"cpu": {"full": 560, "quick": 90}, "cuda": {"full": 240, "quick": 60}}
# Cores that other processes keep busy, from which on times are not clean.
BUSY = 0.2
PARTS = {part.name: part for part in parts.PARTS if part.measure is not None}


def chosen(only: Sequence[str] | None, device_type: str) -> dict[str, float]:
    """Return the parts of a run in their order, with the share of the time when each is over.

    Parts asked for by name have all of the time. In a default run the shares are of all of it: what
    comes on top of them has what others leave.
    """
    chosen = [p for p in PARTS.values() if (p.name in only if only else device_type in p.on)]
    total, over, shares = min(1.0, sum(part.share for part in chosen)), 0.0, {}
    for part in chosen:
        over += part.share
        shares[part.name] = min(1.0, over / total)
    return shares


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures this machine.",
        epilog="parts: " + "; ".join(part.title for part in PARTS.values()),
    )
    add = parser.add_argument
    add("--quick", action="store_true",
        help="under two minutes: fewer shapes, rounds and steps; its results are not kept, they go "
        "to --out or to a temporary folder")  # fmt: skip
    add("--out", type=Path, metavar="DIR",
        help="write results and pictures there; default: benchmarks/results/<machine>, with the "
        "tables of the documents")  # fmt: skip
    on_request = ", ".join(name for name, part in PARTS.items() if not part.on)
    add("--only", choices=PARTS, nargs="+", metavar="PART",
        help=f"measure only these parts, in their order: {', '.join(PARTS)}; on request alone: "
        f"{on_request}, and stages on a CPU")  # fmt: skip
    add("--seconds", type=float, metavar="N",
        help="about how long it may take; default: by device, at most ten minutes")  # fmt: skip
    add("--rates", type=Path, metavar="FILE",
        help="this machine's rates: taken from there, or measured and written there")  # fmt: skip
    add("--continue", action="store_true", dest="go_on",
        help="go on with the losses in --out: measure the cases that are missing")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one",
        default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    options = arguments()
    began = time.monotonic()
    device = torch.device(options.device)
    torch.set_num_threads(os.cpu_count() or 1)
    budget = options.seconds or BUDGETS[device.type]["quick" if options.quick else "full"]
    keep = options.out is None and not options.quick  # the results that the documents show
    folder = options.out or results.RESULTS / slug(device)
    if options.out is None and options.quick:
        folder = Path(tempfile.mkdtemp(prefix="repmtl-bench-"))
    say(f"machine {slug(device)}: measuring its copy and matrix-product rates")
    head = describe(device, ceilings.of(device, options.rates))
    say(f"  {head['machine']}\n  {head['versions']}\n  {head['measured']}")
    say(f"  commit {head['commit'][:10]}{', with changes' if head['dirty'] else ''}")
    notes = unclean(head)
    say("".join(f"  WARNING: {note}: these times are not clean\n" for note in notes))
    broken: list[str] = []
    for name, share in chosen(options.only, device.type).items():
        part, deadline = PARTS[name], began + share * budget
        # A part on request is short where nobody asked for it.
        quick = options.quick or (options.only is None and "cpu" not in part.on)
        run = Run(name, device, head, folder, quick, options.go_on, deadline, list(notes))
        broken += measure(part, run)
    report.draw_results(folder)
    reached = targets.table(folder)
    if reached is not None:
        say(f"\nTARGETS\n{reached}")
    if keep:
        report.refresh_documents()
    say(f"\nresults: {folder}; {time.monotonic() - began:.0f} s")
    if broken:
        sys.exit("FAILED:\n  " + "\n  ".join(broken))


def measure(part: Part, run: Run) -> list[str]:
    """Run a part and return what is broken."""
    say(f"\n{part.title}")
    try:
        part.measure(run)
        if run.rows:
            run.save()
    except Exception as error:  # noqa: BLE001 -- the other parts are worth having
        traceback.print_exc()
        return [f"{part.name}: {described(error)}"]
    return part.broken(run.rows)


def unclean(head: dict) -> list[str]:
    """Return notes on what disturbs this run."""
    notes = []
    if (busy := head["machine"]["busy_cores_before"] or 0) > BUSY:
        notes.append(f"other processes kept {busy:g} cores busy at the start")
    if tiles := os.environ.get("REPMTL_TILES"):
        notes.append(f"the Triton kernels had tiles from outside, REPMTL_TILES={Path(tiles).name}")
    return notes


if __name__ == "__main__":
    main()
