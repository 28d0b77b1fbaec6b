"""``python -m benchmarks``: measures this machine. See ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import compiled_step, kept, kernels, plots, report, results, second_order, steps
from benchmarks.machine import describe, slug
from benchmarks.progress import say, table
from benchmarks.quality import config
from benchmarks.quality.studies import run_study

# Seconds for everything, by device and effort, and by which share of it a part has to be over.
BUDGETS = {"cpu": {"full": 560, "quick": 90}, "cuda": {"full": 240, "quick": 60}}
KERNELS_SHARE = 0.45
STEPS_SHARE = 0.8
# Cores that other processes keep busy, from which on times are not clean.
BUSY = 0.2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true",
        help="under two minutes: fewer shapes, rounds and steps; its results are not kept, they "
        "go to --out or to a temporary folder",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="write the results and the plots there; default: "
        "benchmarks/results/<machine>, with the tables of README.md",
    )  # fmt: skip
    parser.add_argument(
        "--only", choices=("kernels", "steps", "quality", "compiled", "second_order", "kept"),
        help="measure only this; compiled, torch.compile of a small network's step, second_order, "
        "one step with and without it, and kept, what CSA keeps for its backward, are measured on "
        "request alone",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, metavar="N",
        help="about how long it may take; default: by device and effort, at most ten minutes",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    options = arguments()
    began = time.monotonic()
    device = torch.device(options.device)
    torch.set_num_threads(os.cpu_count() or 1)
    budget = options.seconds or BUDGETS[device.type]["quick" if options.quick else "full"]
    folder, keep = output_folder(options, device)
    say(f"machine {slug(device)}: measuring its copy and matrix-product rates")
    head = describe(device)
    broken: list[str] = []
    say(f"  {head['machine']}\n  {head['versions']}\n  {head['measured']}")
    say(f"  commit {head['commit'][:10]}{', with changes' if head['dirty'] else ''}")
    busy = head["machine"]["busy_cores_before"] or 0
    unclean = [f"other processes kept {busy:g} cores busy at the start"] if busy > BUSY else []
    say("".join(f"  WARNING: {note}: these times are not clean\n" for note in unclean))
    if options.only in (None, "kernels"):
        say("KERNELS: each loss, forward and forward + backward, all contestants in turns")
        say(f"  {kernels.scope(device.type, options.quick)}")
        share = 1.0 if options.only else KERNELS_SHARE
        rows, notes = kernels.measure(
            device, head["measured"], quick=options.quick, deadline=began + share * budget
        )
        default = kernels.default_backend(device)
        results.save(folder, "kernels", head, rows, default_backend=default, notes=unclean + notes)
        say("\n" + kernels_summary(rows, default))
        broken = kernels.broken(rows)
    if options.only in (None, "steps"):
        say("\nSTEPS: a training step by every method, in turns on the same batch")

        def save(rows: list[dict], notes: list[str]) -> None:
            results.save(folder, "steps", head, rows, notes=unclean + notes)

        until = began + STEPS_SHARE * budget
        rows, notes = steps.measure(device, quick=options.quick, deadline=until, save=save)
        save(rows, notes)
        broken += steps.broken(rows)
    if options.only in (None, "quality"):
        say("\nQUALITY: MultiMNIST, every method from the same weights on the same batches")
        measure_quality(folder, head, device, quick=options.quick)
    if options.only == "second_order":
        say("\nSECOND ORDER: a step with and without second_order(), in turns")
        rows, notes = second_order.measure(device, quick=options.quick, deadline=began + budget)
        results.save(folder, "second_order", head, rows, notes=unclean + notes)
    if options.only == "kept":
        say("\nKEPT: csa_loss that saves its Gram matrices and that makes them again, in turns")
        rows, notes = kept.measure(device, quick=options.quick, deadline=began + budget)
        more = {"checkpointed": kept.checkpointed(device), "notes": unclean + notes}
        results.save(folder, "kept", head, rows, **more)
    if options.only == "compiled":
        say("\nCOMPILED: a small network's training step, compiled in several ways")
        rows, notes = compiled_step.measure(device, quick=options.quick, deadline=began + budget)
        results.save(folder, "compiled", head, rows, notes=unclean + notes)
    plots.draw(folder)
    if keep:
        report.refresh_documents()
    say(f"\nresults: {folder}; {time.monotonic() - began:.0f} s")
    if broken:
        sys.exit("FAILED:\n  " + "\n  ".join(broken))


def measure_quality(folder: Path, head: dict, device: torch.device, *, quick: bool) -> None:
    missing = [name for name in ("mlxtend", "torchjd") if find_spec(name) is None]
    if missing:
        say(f"  left out: {', '.join(missing)} not installed")
        return
    study = config.study(config.find("bench"), seeds=[0] if quick else None)
    with tempfile.TemporaryDirectory(prefix="repmtl-quality-") as work:
        run_study(
            study,
            head,
            folder=None,
            out=folder,
            work=Path(work),
            jobs=min(4, os.cpu_count() or 1),
            device=device.type,
        )


def output_folder(options: argparse.Namespace, device: torch.device) -> tuple[Path, bool]:
    """Where results go, and whether they are the ones that README.md shows."""
    if options.out is not None:
        return options.out, False
    if options.quick:
        return Path(tempfile.mkdtemp(prefix="repmtl-bench-")), False
    return results.RESULTS / slug(device), True


def kernels_summary(rows: list[dict], default: str) -> str:
    """Forward + backward: milliseconds and memory of the default backend and of the reference."""
    lines = []
    for row in rows:
        if row["backend"] != default or row["direction"] != "forward_backward" or not row["ms"]:
            continue
        same = ("function", "shape", "precision", "layout", "direction")
        other = next(
            r for r in rows if r["backend"] == "reference" and all(r[k] == row[k] for k in same)
        )
        literal = [f"{other['ms']:.4g}", f"{other['peak_mb']:.4g}"] if other["ms"] else ["-", "-"]
        ratio = f"{other['ms'] / row['ms']:.3g}x" if other["ms"] else "-"
        lines.append(
            [
                f"{row['function']} {row['shape']} {row['precision']} {row['layout']}",
                literal[0], f"{row['ms']:.4g}", ratio, literal[1], f"{row['peak_mb']:.4g}",
                f"{100 * row['fraction']:.2g}%",
            ]
        )  # fmt: skip
    header = ["forward + backward", "reference ms", f"{default} ms", "faster", "reference MB"]
    return table([*header, f"{default} MB", "of the floor"], lines)


if __name__ == "__main__":
    main()
