"""``python -m benchmarks.gpu_run --out DIR``: nine minutes of a GPU, what decides most first.

Each step is a command with a log of its own and an end on the clock: what a step leaves of its time
goes to the next one. All that they write is in ``DIR/results.tgz``, a few seconds old at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DRY = ROOT / "tests" / "bench" / "dry.py"
PACKED, EVERY = "results.tgz", 10.0  # seconds
# Seconds from the signal that ends a step to the one that kills it: pytest gives workers ten.
GRACE = 15
# Exit status of timeout, which its own KILL ends too.
OUT_OF_TIME = (124, 128 + signal.SIGKILL, -signal.SIGKILL)
MARGIN = 10  # seconds that a benchmark may take beyond its own deadline: its start, its last case
FAILED, CUT = 1, 3  # exit status
TAIL = 12  # lines of a step's log that are shown
NEEDED = """
import hypothesis, pytest, sys, torch, triton
if not torch.cuda.is_available():
    sys.exit(f"PyTorch {torch.__version__} sees no CUDA device")
print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, sep=", ")
print("%d.%d" % torch.cuda.get_device_capability())
"""


class Step(NamedTuple):
    """Commands that run side by side; ``{work}`` is the folder of results.

    seconds: what the step adds to the plan. A command's ``{seconds}`` is the time that it has.
    """

    name: str
    seconds: float
    commands: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


BENCHMARKS = "-m benchmarks --rates {work}/rates.json --seconds {seconds}"
ONE_THREAD = (("OMP_NUM_THREADS", "1"), ("TORCHINDUCTOR_COMPILE_THREADS", "1"))
# Only compiled kernels can show this; one run has all cells of the table of compatibility.
FIRST = "(decisive or gpu and not slow) and not cell"
PYTEST = "-m pytest tests --ignore tests/ptx {workers} --junitxml {work}"
STEPS = (
    Step("build", 60, ("setup.py -q build_ext --inplace", "-m benchmarks.prewarm")),
    Step("first tests", 80, (f"{PYTEST}/first_tests.xml -m '{FIRST}'",), ONE_THREAD),
    Step("stages", 50, (f"{BENCHMARKS} --only stages --quick --out {{work}}",)),
    Step("kernels", 100, (f"{BENCHMARKS} --only kernels --quick --out {{work}}",)),
    Step(
        "tune", 90,
        ("-m benchmarks.tune --shape nyuv2 cityscapes --mode bfloat16 --kernel gram gradient "
         "--seconds {seconds} --out {work} --write {work}/own.json",),
    ),
    Step(
        "stages with the tuned tiles", 30,
        (f"{BENCHMARKS} --only stages --quick --out {{work}}/tuned",),
        (("REPMTL_TILES", "{work}/own.json"),),
    ),
    Step("compiled rivals", 60, (f"{BENCHMARKS} --only kernels --continue --out {{work}}",)),
    Step(
        "other tests", 50,
        (f"{PYTEST}/other_tests.xml --cells {{work}} -m 'not slow_cpu and not ({FIRST})'",),
        ONE_THREAD,
    ),
)  # fmt: skip


class Outcome(NamedTuple):
    """How a command ended; ``said``: the last line of its log."""

    step: str
    status: int | None  # None: there was no time to begin it
    seconds: float
    said: str
    limit: float = 0.0  # seconds that it had

    @property
    def failed(self) -> bool:
        out_of_time = self.status in OUT_OF_TIME and self.seconds >= self.limit - 1
        return self.status not in (0, None) and not out_of_time

    def __str__(self) -> str:
        if self.status is None:
            return f"{self.step}: CUT, no time to begin"
        ended = f"FAILED ({self.status})" if self.failed else "CUT" if self.status else "done"
        return f"{self.step}: {ended} in {self.seconds:.0f} s: {self.said}"


def run(steps: Sequence[Step], work: Path, launcher: Sequence[str], more: dict) -> list[Outcome]:
    """Run the steps one after the other; one that fails or is cut stops no other."""
    outcomes: list[Outcome] = []
    end = time.monotonic()
    for step in steps:
        end += step.seconds
        outcomes += run_step(step, work, launcher, more, end - time.monotonic())
        write_summary(outcomes, work)
    return outcomes


def run_step(
    step: Step, work: Path, launcher: Sequence[str], more: dict, limit: float
) -> list[Outcome]:
    if limit <= MARGIN:
        return [Outcome(step.name, None, 0.0, "")]
    print(f"\n=== {step.name}: at most {limit:.0f} s", flush=True)
    workers = f"-n {min(16, os.cpu_count() or 1)} --maxschedchunk 1" if find_spec("xdist") else ""
    values = {"work": work, "seconds": int(limit - MARGIN), "workers": workers}
    more = more | {name: value.format(**values) for name, value in step.environment}
    began, logs, running = time.monotonic(), [], []
    (work / "logs").mkdir(exist_ok=True)
    try:
        for number, command in enumerate(step.commands):
            logs.append(work / "logs" / f"{step.name.replace(' ', '_')}_{number}.log")
            # INT, not TERM: pytest then still writes the XML of what it has run.
            words = ["timeout", "-s", "INT", "-k", str(GRACE), f"{limit:.1f}", *launcher]
            words += shlex.split(command.format(**values))
            with open(logs[-1], "w") as log:
                running.append(subprocess.Popen(words, cwd=ROOT, env=more, stdout=log, stderr=log))
        ended = [(process.wait(), time.monotonic() - began) for process in running]
    except KeyboardInterrupt:
        for process in running:
            process.send_signal(signal.SIGINT)  # timeout passes it on
        raise
    outcomes = []
    for log, (status, seconds) in zip(logs, ended, strict=True):
        lines = log.read_text(errors="replace").split("\n")
        lines = [line for line in lines if line.strip()][-TAIL:] or ["(silent)"]
        print("\n".join(lines), flush=True)
        outcomes.append(Outcome(step.name, status, seconds, lines[-1].strip("= "), limit))
    return outcomes


def write_summary(outcomes: Sequence[Outcome], work: Path) -> str:
    """Return how the steps ended and what their results leave out; write it to ``work``."""
    lines = [str(outcome) for outcome in outcomes]
    for path in sorted(work.rglob("[!.]*.json")):  # a dot: half of a file, of a killed process
        result = json.loads(path.read_text())
        if "rows" in result:
            left_out = [note for note in result["notes"] if "left out" in note]
            lines.append(
                f"{path.relative_to(work)}: {len(result['rows'])} rows, {len(left_out)} left out"
            )
    text = "\n".join(lines)
    (work / "summary.txt").write_text(f"{text}\n")
    return text


def pack(work: Path, out: Path) -> None:
    """Put all files of ``work`` into one archive, in place of the one before."""
    fresh = out / f".{PACKED}"
    with tarfile.open(fresh, "w:gz") as archive:
        for path in sorted(work.rglob("*")):
            # A file that is being written has a dot; its name is gone a moment later.
            if path.is_file() and not path.name.startswith("."):
                archive.add(path, path.relative_to(work))
    fresh.replace(out / PACKED)


@contextlib.contextmanager
def packed(work: Path, out: Path) -> Iterator[None]:
    """Pack the files of ``work`` all the time, and once more at the end."""
    over = threading.Event()

    def keep_packing() -> None:
        while not over.wait(EVERY):
            with contextlib.suppress(OSError):  # a file changed: the next archive has it
                pack(work, out)

    thread = threading.Thread(target=keep_packing, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        pack(work, out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_run",
        description="Builds, tests, measures and tunes on this machine's GPU in nine minutes, what "
        "decides most first. Exit status: 1 if a step failed, 3 if time cut one.",
        epilog="steps, with their seconds: " + ", ".join(f"{s.name} {s.seconds}" for s in STEPS),
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
        help=f"folder of {PACKED}: results, table of targets, logs, summary")  # fmt: skip
    parser.add_argument("--dry", action="store_true",
        help="without a GPU: every command on tiny shapes, by tests/ptx")  # fmt: skip
    options = parser.parse_args()
    if not options.out.name:  # make without OUT=
        parser.error("--out: expected a folder of its own (make gpu OUT=DIR)")
    return options


def environment(dry: bool) -> dict[str, str]:
    """Return the variables of all commands, or exit if something is missing."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    more = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if dry:
        return more
    found = subprocess.run([sys.executable, "-c", NEEDED], stdout=subprocess.PIPE, text=True)
    if found.returncode:
        sys.exit("needs CUDA, PyTorch, Triton, pytest and hypothesis")
    print(found.stdout, flush=True)
    more["TORCH_CUDA_ARCH_LIST"] = found.stdout.split()[-1]
    if shutil.which("nvcc"):
        more |= {"REPMTL_REQUIRE_NATIVE": "1", "REPMTL_REQUIRE_CUDA": "1"}
    return more


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    launcher = [sys.executable, str(DRY)] if options.dry else [sys.executable]
    more = environment(options.dry)
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="repmtl-gpu-"))
    # A dry run has its time from other processes of the machine too.
    steps = [s._replace(seconds=s.seconds * (10 if options.dry else 1)) for s in STEPS]
    with packed(work, options.out):
        outcomes = run(steps, work, launcher, more)
    table = work / "targets.md"
    if table.exists():
        lines = table.read_text().splitlines()
        print("\n" + "\n".join(line for line in lines if not line.endswith("not measured |")))
    print(f"\n{write_summary(outcomes, work)}\nresults: {options.out / PACKED}, {work}")
    if any(outcome.failed for outcome in outcomes):
        sys.exit(FAILED)
    if any(outcome.status != 0 for outcome in outcomes):
        sys.exit(CUT)


if __name__ == "__main__":
    main()
