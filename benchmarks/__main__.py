"""``python -m benchmarks``: measures this machine. See ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import (
    compiled_step,
    kept,
    kernels,
    plots,
    report,
    results,
    scaling,
    second_order,
    stages,
    steps,
    targets,
)
from benchmarks.findings import described
from benchmarks.machine import describe, slug
from benchmarks.progress import say
from benchmarks.quality import config
from benchmarks.quality.studies import run_study

# Seconds for everything, by device and effort.
BUDGETS = {"cpu": {"full": 560, "quick": 90}, "cuda": {"full": 240, "quick": 60}}
# Cores that other processes keep busy, from which on times are not clean.
BUSY = 0.2


@dataclass(frozen=True)
class Run:
    """What a part is told."""

    name: str  # of the part, and of its result file
    device: torch.device
    head: dict
    folder: Path
    quick: bool
    asked: bool  # by name
    deadline: float  # time.monotonic() when the part should be over
    unclean: list[str]  # notes on what disturbed this run

    def save(self, rows: list[dict], notes: list[str], **more: object) -> None:
        notes = self.unclean + notes
        results.save(self.folder, self.name, self.head, rows, **more, notes=notes)


@dataclass(frozen=True)
class Part:
    """One part of the benchmark.

    measure: measures, saves, and returns what is broken; title: what is said before it; share: of
    the time, against the other parts of a run; on: device types whose default run has it; least:
    seconds, without which a default run leaves it out.
    """

    measure: Callable[[Run], list[str]]
    title: str
    share: float
    on: Sequence[str] = ()
    least: float = 0.0


def rows_of(
    measure: Callable[..., tuple[list[dict], list[str]]], *, rates: bool = False
) -> Callable:
    """A part from ``measure(device, *, quick, deadline)``, short where nobody asked for it.

    With ``rates``, from ``measure(device, ceilings, *, quick, deadline, save)``: rows with floors,
    saved as they come, of which some may be broken.
    """

    def part(run: Run) -> list[str]:
        options = {"quick": run.quick or not run.asked, "deadline": run.deadline}
        if not rates:
            rows, notes = measure(run.device, **options)
        else:
            rows, notes = measure(run.device, run.head["measured"], **options, save=run.save)
        run.save(rows, notes)
        return kernels.broken(rows) if rates else []

    return part


def measure_kernels(run: Run) -> list[str]:
    say(f"  {kernels.scope(run.device.type, run.quick)}")
    default = kernels.default_backend(run.device)
    save = partial(run.save, default_backend=default)
    rows, notes = kernels.measure(
        run.device, run.head["measured"], quick=run.quick, deadline=run.deadline, save=save
    )
    save(rows, notes)
    say("\n" + kernels.summary(rows, default))
    return kernels.broken(rows)


def measure_steps(run: Run) -> list[str]:
    rows, notes = steps.measure(run.device, quick=run.quick, deadline=run.deadline, save=run.save)
    run.save(rows, notes)
    return steps.broken(rows)


def measure_quality(run: Run) -> list[str]:
    missing = [name for name in ("mlxtend", "torchjd") if find_spec(name) is None]
    if missing:
        say(f"  left out: {', '.join(missing)} not installed")
        return []
    study = config.study(config.find("bench"), seeds=[0] if run.quick else None)
    with tempfile.TemporaryDirectory(prefix="repmtl-quality-") as work:
        run_study(
            study,
            run.head,
            folder=None,
            out=run.folder,
            work=Path(work),
            jobs=min(4, os.cpu_count() or 1),
            device=run.device.type,
        )
    return []


def measure_kept(run: Run) -> list[str]:
    rows, notes = kept.measure(run.device, quick=run.quick, deadline=run.deadline)
    run.save(rows, notes, checkpointed=kept.checkpointed(run.device))
    return []


EVERYWHERE = ("cpu", "cuda")
PARTS = {
    "kernels": Part(
        measure_kernels,
        "KERNELS: each loss, forward and forward + backward, all contestants in turns",
        0.45,
        EVERYWHERE,
    ),
    "steps": Part(
        measure_steps,
        "STEPS: a training step by every method, in turns on the same batch",
        0.35,
        EVERYWHERE,
    ),
    "quality": Part(
        measure_quality,
        "QUALITY: MultiMNIST, every method from the same weights on the same batches",
        0.2,
        EVERYWHERE,
    ),
    "stages": Part(
        rows_of(stages.measure, rates=True),
        "STAGES: each stage of the losses by itself, all contestants in turns",
        0.1,
        ("cuda",),
        least=40,
    ),
    "second_order": Part(
        rows_of(second_order.measure),
        "SECOND ORDER: a step with and without second_order(), in turns",
        0.3,
    ),
    "kept": Part(
        measure_kept,
        "KEPT: csa_loss that saves its Gram matrices and that makes them again, in turns",
        0.3,
    ),
    "scaling": Part(
        rows_of(scaling.measure, rates=True),
        "SCALING: rep_mtl_loss and the contrast stage, one size varied at a time",
        0.3,
    ),
    "compiled": Part(
        rows_of(compiled_step.measure),
        "COMPILED: a small network's training step, compiled in several ways",
        0.3,
    ),
}


def chosen(only: Sequence[str] | None, device_type: str) -> dict[str, float]:
    """The parts of a run in their order, each with the share of the time when it is over.

    Parts asked for by name have all of the time. In a default run the shares are of all of it: what
    comes on top of them has what others leave.
    """
    parts = {
        name: part
        for name, part in PARTS.items()
        if (name in only if only else device_type in part.on)
    }
    total, over, found = min(1.0, sum(part.share for part in parts.values())), 0.0, {}
    for name, part in parts.items():
        over += part.share
        found[name] = min(1.0, over / total)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures this machine.",
        epilog="parts: " + "; ".join(part.title for part in PARTS.values()),
    )
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
    on_request = ", ".join(name for name, part in PARTS.items() if not part.on)
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", metavar="PART",
        help=f"measure only these parts, in their order: {', '.join(PARTS)}; on request alone: "
        f"{on_request}, and stages on a CPU",
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
    say(f"  {head['machine']}\n  {head['versions']}\n  {head['measured']}")
    say(f"  commit {head['commit'][:10]}{', with changes' if head['dirty'] else ''}")
    busy = head["machine"]["busy_cores_before"] or 0
    unclean = [f"other processes kept {busy:g} cores busy at the start"] if busy > BUSY else []
    if tiles := os.environ.get("REPMTL_TILES"):
        unclean.append(
            f"the Triton kernels had tiles of one's own, REPMTL_TILES={Path(tiles).name}"
        )
    say("".join(f"  WARNING: {note}: these times are not clean\n" for note in unclean))
    broken: list[str] = []
    for name, share in chosen(options.only, device.type).items():
        part, deadline = PARTS[name], began + share * budget
        if options.only is None and deadline - time.monotonic() < part.least:
            say(f"\nleft out for time: {name} (python -m benchmarks --only {name})")
            continue
        say(f"\n{part.title}")
        run = Run(
            name=name,
            device=device,
            head=head,
            folder=folder,
            quick=options.quick,
            asked=options.only is not None,
            deadline=deadline,
            unclean=unclean,
        )
        try:
            broken += part.measure(run)
        except Exception as error:  # noqa: BLE001 -- the other parts are worth having
            traceback.print_exc()
            broken.append(f"{name}: {described(error)}")
    plots.draw(folder)
    reached = targets.table(folder)
    if reached is not None:
        say(f"\nTARGETS\n{reached}")
    if keep:
        report.refresh_documents()
    elif reached is not None:
        (folder / "targets.md").write_text(f"{reached}\n")
    say(f"\nresults: {folder}; {time.monotonic() - began:.0f} s")
    if broken:
        sys.exit("FAILED:\n  " + "\n  ".join(broken))


def output_folder(options: argparse.Namespace, device: torch.device) -> tuple[Path, bool]:
    """Where results go, and whether they are the ones that README.md shows."""
    if options.out is not None:
        return options.out, False
    if options.quick:
        return Path(tempfile.mkdtemp(prefix="repmtl-bench-")), False
    return results.RESULTS / slug(device), True


if __name__ == "__main__":
    main()
