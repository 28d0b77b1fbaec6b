"""The training step of every method, in turns on the same batch."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

import torch

from benchmarks.cases import FLOAT32, TF32, Effort, Precision, products_in
from benchmarks.memory import peak_extra_bytes
from benchmarks.methods import (
    DEFAULT,
    EQUAL_WEIGHTING,
    METHODS,
    MONITORED,
    NEED_TORCHJD,
    TITLES,
    EqualWeighting,
    Peer,
    Work,
)
from benchmarks.networks import NETWORKS, Network
from benchmarks.output import by, captioned, failure, groups, markdown, on_gpu, say
from benchmarks.part import FAILURES, Part, Run, described
from benchmarks.peers import ByTorchjd
from benchmarks.phases import PHASES
from benchmarks.results import rounded
from benchmarks.timing import Timing, side_by_side
from repmtl_kernels._training.strength import BETWEEN

BFLOAT16 = Precision(torch.bfloat16, "high", "bfloat16")
PRECISIONS = {"cpu": (FLOAT32,), "cuda": (TF32, BFLOAT16)}
QUICK_NETWORKS = ("nyuv2",)
MIN_ROUNDS, MAX_ROUNDS = 3, 30
# The cost of a method in all, in cycles, with as few rounds as there may be.
SET_UP_CYCLES = 12
OF_DEFAULT = (
    "`RepMTL()` has the mean over its calls: those that apply the regulariser, one in "
    f"{BETWEEN} of which also measures the ratio, and those between."
)
# The first page compares these.
MAIN = (
    EQUAL_WEIGHTING, DEFAULT, "rep_mtl_second_order", "rep_mtl_reference", "nash_mtl", "fairgrad",
)  # fmt: skip
# Instrumented cycles of each method; the median counts.
PHASE_CYCLES = 3


@dataclass(frozen=True)
class Case:
    """The same step on the same batch for all methods."""

    network: Network
    precision: Precision
    makers: Mapping[str, Callable[[int], EqualWeighting]] = field(default_factory=lambda: METHODS)

    def methods(self) -> dict[str, Callable[[int], EqualWeighting]]:
        """Return the methods that can be measured here."""
        without_peers = find_spec("torchjd") is None
        return {
            name: make
            for name, make in self.makers.items()
            if not (without_peers and name in NEED_TORCHJD)
            # Gradients at T representations of different images have no Gram matrix.
            and not (self.network.multi_input and name.endswith("_representation"))
        }

    def labels(self, method: str) -> dict:
        return {
            "network": self.network.name,
            "method": method,
            "dtype": self.precision.name,
            "architecture": str(self.network),
        }

    def __str__(self) -> str:
        return f"steps of {self.network.name} ({self.network}) {self.precision.name}"


def cases(device_type: str, quick: bool) -> list[Case]:
    precisions = PRECISIONS[device_type]
    scaled = [network.scaled(device_type) for network in NETWORKS]
    if quick:
        return [Case(n, precisions[0]) for n in scaled if n.name in QUICK_NETWORKS]
    return [Case(network, precision) for precision in precisions for network in scaled]


def measure(run: Run, planned: list[Case] | None = None) -> None:
    """Measure the planned cases; each has its share of the time."""
    if planned is None:
        planned = cases(run.device.type, run.quick)
        if find_spec("torchjd") is None:
            run.note(f"torchjd is not installed: left out {', '.join(NEED_TORCHJD)}")
    rest = len(planned)

    def one(case: Case) -> list[dict]:
        nonlocal rest
        share, rest = run.left / rest, rest - 1
        return measure_case(run, time.monotonic() + share, case)

    run.each(planned, one)


def measure_case(run: Run, deadline: float, case: Case) -> list[dict]:
    with settings(case.precision):
        work = Work(case.network, case.precision.dtype, run.device)
        ready, errors = prepared(run, case, work, deadline)
        timings, phases = timed(ready, work, deadline)
    rows = []
    base = timings.get(EQUAL_WEIGHTING)
    for name, (_, peak_mb, _) in ready.items():
        rows.append(
            case.labels(name)
            | figures(timings[name], base, peak_mb)
            | {"phases": rounded(phases[name]), "error": None}
        )
    nothing = dict.fromkeys(("steps_per_s", "spread", "ratio_to_ew", "peak_mb", "phases"))
    rows += [case.labels(name) | nothing | {"error": error} for name, error in errors.items()]
    say(f"{case}:")
    for row in rows:
        shown = {k: row[k] for k in ("steps_per_s", "ratio_to_ew", "peak_mb", "phases")}
        say(f"  {row['method']}: {row['error'] or shown}")
    return rows


@contextlib.contextmanager
def settings(precision: Precision) -> Iterator[None]:
    """Set the precision, and the fastest convolution that cuDNN finds, for all methods alike."""
    tries, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        with products_in(precision):
            yield
    finally:
        torch.backends.cudnn.benchmark = tries


# Warm methods with their peaks and the seconds of a cycle.
Ready = dict[str, tuple[EqualWeighting, float, float]]


def prepared(run: Run, case: Case, work: Work, deadline: float) -> tuple[Ready, dict[str, str]]:
    """Return what can be timed, and why other methods failed; note what there is no time for."""
    ready: Ready = {}
    errors: dict[str, str] = {}
    left_out = []
    for name, make in case.methods().items():
        cycles = [seconds for *_, seconds in ready.values()]
        # All rounds that there have to be, and one more method like these.
        rest = (1 + MIN_ROUNDS + PHASE_CYCLES) * sum(cycles)
        rest += SET_UP_CYCLES * statistics.mean(cycles) if cycles else 0
        if cycles and time.monotonic() + rest > deadline:
            left_out.append(name)
            continue
        method = make(len(work.tasks))
        try:
            work.cycle(method)
            if isinstance(method, Peer) and isinstance(method.form, ByTorchjd):
                method.form.tune(partial(work.cycle, method), partial(wait, work.device))
            wait(work.device)
            began = time.monotonic()
            peak_mb = peak_extra_bytes(partial(work.cycle, method), work.device) / 1e6
            ready[name] = method, peak_mb, time.monotonic() - began
        except FAILURES as error:
            errors[name] = described(error)
        if name in errors:  # the failed step's tensors are gone with its error
            work.clear()
    if left_out:
        where = f"{case.network.name}, {case.precision.name}"
        run.note(f"left out for time on {where}: {', '.join(left_out)}")
    return ready, errors


def timed(
    ready: Ready, work: Work, deadline: float
) -> tuple[dict[str, Timing], dict[str, dict[str, float]]]:
    """Return the times of steps in turns, and the phases of a step, apart from these."""
    one_round = sum(seconds for *_, seconds in ready.values())
    # Left for the rounds: without the one that times a cycle, and the instrumented ones.
    seconds = deadline - time.monotonic() - (1 + PHASE_CYCLES) * one_round
    methods = {name: method for name, (method, *_) in ready.items()}
    calls = {
        (name, number): partial(work.step, method, number)
        for name, method in methods.items()
        for number in method.calls
    }
    of_calls = side_by_side(calls, work.device, Effort(seconds, MIN_ROUNDS, MAX_ROUNDS))
    timings = {
        name: mean([(of_calls[name, number], share) for number, share in method.calls.items()])
        for name, method in methods.items()
    }
    cycles = [
        {name: work.phases(method) for name, method in methods.items()} for _ in range(PHASE_CYCLES)
    ]
    phases = {
        name: {p: statistics.median(c[name][p] for c in cycles) for p in cycles[0][name]}
        for name in methods
    }
    return timings, phases


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mean(kinds: list[tuple[Timing, float]]) -> Timing:
    """Return the time of a step, from that of each kind and its share in all steps."""
    ms, spread = (sum(share * timing[k] for timing, share in kinds) for k in (0, 1))
    return Timing(ms, spread, kinds[0][0].rounds)


def figures(timing: Timing, base: Timing | None, peak_mb: float) -> dict:
    """Return the figures of a step; ``base``: equal weighting."""
    return rounded(
        {
            "steps_per_s": 1e3 / timing.ms,
            "spread": timing.spread / timing.ms,
            "ratio_to_ew": timing.ms / base.ms if base else None,
            "peak_mb": peak_mb,
            "rounds": timing.rounds,
        }
    )


def broken(rows: list[dict]) -> list[str]:
    """Return this package's failures: not a peer's or compiler's, and not for want of memory."""
    return [
        f"{r['network']} {r['dtype']} {r['method']}: {r['error']}"
        for r in rows
        if r["error"] and "OutOfMemory" not in r["error"]
        if r["method"] in METHODS and r["method"] not in NEED_TORCHJD
    ]


def main_table(result: dict) -> str:
    """Return the table of the methods that a visitor compares."""
    return table({**result, "rows": [row for row in result["rows"] if row["method"] in MAIN]})


def table(result: dict) -> str:
    """Return time and memory of a step, a column for each network and precision."""
    gpu = on_gpu(result)
    columns = by_network(result)
    header = ["method", *(f"{where}: time, memory" for where in columns)]
    lines = [
        [title, *(_cell(rows.get(m), rows.get(EQUAL_WEIGHTING), gpu) for rows in columns.values())]
        for m, title in titles(result)
    ]
    text = (
        f"{architectures(result)}. Steps of forward, backward and optimiser on random images: "
        f"{'steps per second; ' if gpu else ''}time and memory as multiples of equal weighting's, "
        "all methods in turns in one run."
    )
    if any(row["method"] == DEFAULT for row in result["rows"]):
        text += f" {OF_DEFAULT}"
    text += monitor_text(columns)
    return captioned(markdown(header, lines), result, text)


def monitor_text(columns: dict[str, dict[str, dict]]) -> str:
    """Return what a monitor adds to a step of the default, in each column that has both."""
    shares = []
    for where, rows in columns.items():
        pair = [rows.get(method) for method in (MONITORED, DEFAULT)]
        if all(row and row["steps_per_s"] for row in pair):
            watched, plain = (row["steps_per_s"] for row in pair)
            shares.append(f"{100 * (plain / watched - 1):.1f} % ({where})")
    return f" A monitor adds {', '.join(shares)} to a step." if shares else ""


def _cell(row: dict | None, base: dict | None, gpu: bool) -> str:
    if row is None:
        return ""
    if row["error"]:
        return failure(row)
    cells = [f"{row['steps_per_s']:.3g}/s"] if gpu else []
    if base is not None and not base["error"]:
        cells += [f"{row['ratio_to_ew']:.2f}x", f"{row['peak_mb'] / base['peak_mb']:.2f}x"]
    return ", ".join(cells)


def phases_table(result: dict) -> str:
    """Return where the time of a step goes, against equal weighting's step or in milliseconds."""
    gpu = on_gpu(result)
    used = [p for p in PHASES if any(p in (r["phases"] or ()) for r in result["rows"])]
    lines = []
    for where, rows in by_network(result).items():
        base = rows.get(EQUAL_WEIGHTING)
        for method, title in titles(result):
            row = rows.get(method)
            if row is None or not row["phases"] or not base or base["error"]:
                continue
            unit = 1.0 if gpu else sum(base["phases"].values())
            values = [row["phases"].get(p) for p in used] + [sum(row["phases"].values())]
            shown = ("" if v is None else f"{v / unit:{'.3g' if gpu else '.2f'}}" for v in values)
            lines.append([where, title, *shown])
    text = "Milliseconds, by events of the device" if gpu else "Equal weighting's step is 1"
    text += ", in steps of their own, apart from the timed ones."
    header = ["network", "method", *(PHASES[p] for p in used), "sum"]
    return captioned(markdown(header, lines), result, text)


def by_network(result: dict) -> dict[str, dict[str, dict]]:
    """Return the rows by method, for each network, with its precision on a GPU."""
    return {
        f"{network}, {dtype}" if on_gpu(result) else network: by(rows, "method")
        for (network, dtype), rows in groups(result["rows"], "network", "dtype").items()
    }


def titles(result: dict) -> list[tuple[str, str]]:
    measured = {row["method"] for row in result["rows"]}
    return [(method, title) for method, title in TITLES.items() if method in measured]


def architectures(result: dict) -> str:
    return "; ".join(
        dict.fromkeys(f"{row['network']}: {row['architecture']}" for row in result["rows"])
    )


PART = Part(
    "steps",
    "STEPS: a training step by every method, in turns on the same batch",
    measure,
    {"steps": table, "steps_main": main_table, "phases": phases_table},
    broken=broken,
    share=0.35,
    on=("cpu", "cuda"),
)
