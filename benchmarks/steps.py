"""The training step of every method on the networks of :mod:`benchmarks.networks`, in turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.compiled_step import WholeStep
from benchmarks.kernels import FAILURES, LAMBDA, rounded
from benchmarks.line_up import Precision
from benchmarks.memory import peak_extra_bytes
from benchmarks.networks import NETWORKS, Model, Network, random_batch, task_loss
from benchmarks.peers import (
    AtRepresentation,
    ByTorchjd,
    Forward,
    SinglePass,
    fairgrad,
    nash_mtl,
)
from benchmarks.phases import PHASES, Phases, Unmarked
from benchmarks.progress import say, track
from benchmarks.timing import Timing, side_by_side
from repmtl_kernels import RepMTL, rep_mtl_loss, task_saliencies
from repmtl_kernels._heads.second_order import second_order
from repmtl_kernels._training.strength import FIRST

EQUAL_WEIGHTING = "equal_weighting"
LEARNING_RATE = 1e-4
EVERY = 4
PRECISIONS = {
    "cpu": (Precision(torch.float32, "highest", "float32"),),
    "cuda": (
        Precision(torch.float32, "high", "tf32"),
        Precision(torch.bfloat16, "high", "bfloat16"),
    ),
}
QUICK_NETWORKS = ("nyuv2",)
# What compiling a step may take; with less time left it is left out.
COMPILE_SECONDS = {"cpu": 300, "cuda": 120}
MIN_ROUNDS, MAX_ROUNDS = 3, 30
# What a method costs in all, in cycles, with as few rounds as there may be.
SET_UP_CYCLES = 12
# Instrumented cycles of each method; the median counts.
PHASE_CYCLES = 3


class EqualWeighting:
    every = 1

    def gradients(self, work: Work, marks: Unmarked) -> None:
        """Forward and backward, to gradients in every parameter's ``.grad``; marks its phases."""
        heads = [work.model.heads[task] for task in work.tasks]
        with work.autocast():
            z = [work.model.encoder(images) for images in work.batch.images]
            marks.mark("encoder_forward")
            of_tasks = z * len(heads) if len(z) == 1 else z
            with self.heads(marks):
                losses = [
                    task_loss(task, head(z), work.batch.labels[task])
                    for task, head, z in zip(work.tasks, heads, of_tasks, strict=True)
                ]
            marks.mark("heads_forward")
        self.backward(Forward(work.model.encoder, heads, losses, z), marks)

    def heads(self, marks: Unmarked) -> contextlib.AbstractContextManager:
        """What the heads' forward runs under."""
        return contextlib.nullcontext()

    def backward(self, forward: Forward, marks: Unmarked) -> None:
        marks.mark_at(forward.representations, "heads_backward")
        sum(forward.losses).backward()
        marks.mark("encoder_backward")


class Peer(EqualWeighting):
    """A form of :mod:`benchmarks.peers`; keeps the weights that it used."""

    def __init__(self, form: ByTorchjd | SinglePass | AtRepresentation) -> None:
        self.form = form
        self.backward = form.backward


class RepMTLMethod(EqualWeighting):
    """Rep-MTL with fixed lambdas, which the dissected and the compiled step can write out.

    measured: whether its calls measure the ratio of the gradients; else they are those between.
    """

    def __init__(
        self, backend: str = "auto", *, fast: bool = False, every: int = 1, measured: bool = False
    ) -> None:
        self.criterion = RepMTL(LAMBDA, LAMBDA, backend=backend, every=every)
        self.fast = fast
        self.state = torch.zeros_like(self.criterion.get_extra_state())
        if not measured:
            self.state[0] = every * (FIRST + 1)  # the number of calls
        self.every = every
        self.dissected = 0

    def heads(self, marks: Unmarked) -> contextlib.AbstractContextManager:
        if not self.fast:
            return contextlib.nullcontext()
        if isinstance(marks, Phases):
            return second_order() if self._applies() else contextlib.nullcontext()
        return self.criterion.second_order()

    def backward(self, forward: Forward, marks: Unmarked) -> None:
        z = forward.representations
        if isinstance(marks, Phases):
            self._dissect(forward, marks)
        else:
            if self.criterion.get_extra_state()[0] % self.every == 0:  # a cycle begins
                self.criterion.set_extra_state(self.state)
            self.criterion(forward.losses, z[0] if len(z) == 1 else z).backward()

    def _applies(self) -> bool:
        return self.dissected % self.every == 0

    def _dissect(self, forward: Forward, marks: Phases) -> None:
        """What the criterion does, by its parts: the criterion itself has no place for marks."""
        c, z = self.criterion, forward.representations
        total = sum(forward.losses)
        applies = self._applies()
        self.dissected += 1
        if applies:
            saliencies = task_saliencies(forward.losses, z[0] if len(z) == 1 else z)
            marks.mark("saliencies")
            total = total + self.every * (
                rep_mtl_loss(
                    saliencies,
                    lambda_tsr=c.lambda_tsr,
                    lambda_csa=c.lambda_csa,
                    csa_temperature=c.csa_temperature,
                    backend=c.backend,
                ).total
            )
            marks.mark("regularizer")
            # Its backward comes first: it was computed last.
            marks.mark_at(saliencies, "regularizer")
        marks.mark_at(z, "heads_backward")
        total.backward()
        marks.mark("encoder_backward")


class CompiledRepMTL(EqualWeighting):
    """Rep-MTL with the same lambdas, forward and backward as one compiled graph."""

    def __init__(self) -> None:
        self.whole: WholeStep | None = None

    def gradients(self, work: Work, marks: Unmarked) -> None:
        if self.whole is None:
            self.whole = WholeStep(work.model, task_loss)
        self.whole(*work.batch.images, work.batch.labels)
        marks.mark("compiled")


# Most telling first: when time runs out, what is left out is at the end.
METHODS: dict[str, Callable[[Network], EqualWeighting]] = {
    EQUAL_WEIGHTING: lambda _: EqualWeighting(),
    "rep_mtl_second_order": lambda _: RepMTLMethod(fast=True),
    "rep_mtl": lambda _: RepMTLMethod(),
    "rep_mtl_reference": lambda _: RepMTLMethod("reference"),
    "rep_mtl_every": lambda _: RepMTLMethod(fast=True, every=EVERY),
    "nash_mtl": lambda n: Peer(ByTorchjd(nash_mtl(len(n.tasks)))),
    "fairgrad": lambda n: Peer(ByTorchjd(fairgrad(len(n.tasks)))),
    "nash_mtl_single_pass": lambda n: Peer(SinglePass(nash_mtl(len(n.tasks)))),
    "fairgrad_single_pass": lambda n: Peer(SinglePass(fairgrad(len(n.tasks)))),
    "nash_mtl_representation": lambda n: Peer(AtRepresentation(nash_mtl(len(n.tasks)))),
    "fairgrad_representation": lambda n: Peer(AtRepresentation(fairgrad(len(n.tasks)))),
}
COMPILED: dict[str, Callable[[Network], EqualWeighting]] = {
    EQUAL_WEIGHTING: METHODS[EQUAL_WEIGHTING],
    "rep_mtl_compiled": lambda _: CompiledRepMTL(),
}
NEED_TORCHJD = tuple(name for name in METHODS if name.startswith(("nash_mtl", "fairgrad")))
OWN = [name for name in METHODS if name not in NEED_TORCHJD]


@dataclass(frozen=True)
class Case:
    """One line-up: the same step on the same batch for all methods."""

    network: Network
    precision: Precision
    compiled: bool = False

    def methods(self) -> dict[str, Callable[[Network], EqualWeighting]]:
        """Those that can be measured here."""
        if self.compiled:
            return COMPILED
        found = dict(METHODS)
        for name in METHODS:
            without_peers = name in NEED_TORCHJD and find_spec("torchjd") is None
            # Gradients at T representations of different images have no Gram matrix.
            apart = self.network.multi_input and name.endswith("_representation")
            if without_peers or apart:
                del found[name]
        return found

    def __str__(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        return f"{self.network.name} ({self.network}) {self.precision.name}{compiled}"


def cases(device_type: str, quick: bool) -> list[Case]:
    """Most telling first; what has to be compiled is last, for it takes longer than the rest."""
    precisions = PRECISIONS[device_type]
    scaled = [network.scaled(device_type) for network in NETWORKS]
    if quick:
        return [Case(n, precisions[0]) for n in scaled if n.name in QUICK_NETWORKS]
    found = [Case(network, precision) for precision in precisions for network in scaled]
    found += [Case(n, precisions[0], compiled=True) for n in scaled if not n.multi_input]
    return found


class Work:
    """Model, optimizer and batch of a case: all methods take their steps with the same ones."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.tasks = list(case.network.tasks)
        self.model = Model(case.network).to(device)
        self.batch = random_batch(case.network, device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        low = case.precision.dtype != torch.float32
        self.autocast = partial(torch.autocast, device.type, case.precision.dtype, enabled=low)

    def step(self, method: EqualWeighting, marks: Unmarked | None = None) -> None:
        marks = marks or Unmarked()
        method.gradients(self, marks)
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.mark("optimizer")

    def cycle(self, method: EqualWeighting) -> None:
        """As many steps as it takes until they repeat."""
        for _ in range(method.every):
            self.step(method)

    def phases(self, method: EqualWeighting) -> dict[str, float]:
        """Milliseconds of each phase in one step, the mean of a cycle."""
        total = dict.fromkeys(PHASES, 0.0)
        for _ in range(method.every):
            marks = Phases(self.device)
            self.step(method, marks)
            for name, ms in marks.ms().items():
                total[name] += ms / method.every
        return {name: ms for name, ms in total.items() if ms > 0}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """After a step that failed half-way."""
        for p in self.model.parameters():
            p.grad = None
            if hasattr(p, "jac"):
                del p.jac
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(
    device: torch.device,
    *,
    quick: bool,
    deadline: float,
    save: Callable[[list[dict], list[str]], object] = lambda rows, notes: None,
) -> tuple[list[dict], list[str]]:
    """Rows for all cases and notes on what was left out.

    deadline: ``time.monotonic()`` when it should be over; each case gets its share. save: is given
    all rows and notes so far after each case, so that an interruption leaves what was measured.
    """
    rows: list[dict] = []
    notes: list[str] = []
    if find_spec("torchjd") is None:
        notes.append(f"torchjd is not installed: left out {', '.join(NEED_TORCHJD)}")
        say(notes[-1])
    planned = cases(device.type, quick)
    uncompiled = sum(not case.compiled for case in planned)
    for done, case in enumerate(track(planned, "steps")):
        now = time.monotonic()
        if now + (COMPILE_SECONDS[device.type] if case.compiled else 0) > deadline:
            notes.append(f"left out for time: steps of {case}")
            say(notes[-1])
            continue
        share = (deadline - now) / max(uncompiled - done, 1)
        found, more = measure_case(case, device, deadline=now + share)
        rows += found
        notes += more
        save(rows, notes)
    return rows, notes


def measure_case(
    case: Case, device: torch.device, *, deadline: float
) -> tuple[list[dict], list[str]]:
    with settings(case.precision):
        work = Work(case, device)
        ready = prepared(case, work, deadline)
        # Left for the rounds: without the one that times a cycle, and the instrumented ones.
        one_round = sum(found.cycle_seconds for found in ready.methods.values())
        seconds = deadline - time.monotonic() - (1 + PHASE_CYCLES) * one_round
        timings = side_by_side(
            {name: partial(work.cycle, found.method) for name, found in ready.methods.items()},
            device,
            seconds=seconds,
            min_rounds=MIN_ROUNDS,
            max_rounds=MAX_ROUNDS,
        )
        # In turns too, and apart from the steps whose time counts.
        cycles = [
            {name: work.phases(found.method) for name, found in ready.methods.items()}
            for _ in range(PHASE_CYCLES)
        ]
    rows, notes = [], list(ready.notes)
    for name, found in ready.methods.items():
        phases = {p: statistics.median(c[name][p] for c in cycles) for p in cycles[0][name]}
        figures = of_method(found, timings[name], timings.get(EQUAL_WEIGHTING), phases)
        rows.append(labels(case, name) | figures)
        notes += weights_note(rows[-1])
    if case.compiled:  # the others have rows of their own
        rows = [row for row in rows if row["method"] not in METHODS]
    rows += [labels(case, name) | failed(error) for name, error in ready.errors.items()]
    say(f"{case}:")
    for row in rows:
        say(f"  {summary_line(row)}")
    return rows, notes


@contextlib.contextmanager
def settings(precision: Precision) -> Iterator[None]:
    """The precision, and the fastest convolution that cuDNN finds, for everyone alike."""
    matmul, tries = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision(precision.matmul)
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.benchmark = tries


@dataclass
class Prepared:
    method: EqualWeighting
    peak_mb: float
    cycle_seconds: float


class Ready(NamedTuple):
    methods: dict[str, Prepared]
    errors: dict[str, str]
    notes: list[str]


def prepared(case: Case, work: Work, deadline: float) -> Ready:
    """Warm methods with their memory, and why the others failed or were left out."""
    ready = Ready({}, {}, [])
    left_out = []
    for name, make in case.methods().items():
        cycles = [found.cycle_seconds for found in ready.methods.values()]
        # All rounds that there have to be, and one more method like these.
        rest = (1 + MIN_ROUNDS + PHASE_CYCLES) * sum(cycles)
        rest += SET_UP_CYCLES * statistics.mean(cycles) if cycles else 0
        if cycles and time.monotonic() + rest > deadline:
            left_out.append(name)
            continue
        method = make(case.network)
        try:
            work.cycle(method)
            if isinstance(method, Peer) and isinstance(method.form, ByTorchjd):
                method.form.tune(partial(work.step, method), work.wait)
            work.wait()
            began = time.monotonic()
            peak = peak_extra_bytes(partial(work.cycle, method), work.device) / 1e6
            ready.methods[name] = Prepared(method, peak, time.monotonic() - began)
        except FAILURES as error:
            first_line = str(error).strip().partition("\n")[0]
            ready.errors[name] = f"{type(error).__name__}: {first_line}"
        if name in ready.errors:  # the failed step's tensors are gone with its error
            work.clear()
    if left_out:
        where = f"{case.network.name}, {case.precision.name}"
        ready.notes.append(f"left out for time on {where}: {', '.join(left_out)}")
        say(ready.notes[-1])
    return ready


def labels(case: Case, method: str) -> dict:
    n = case.network
    return {
        "network": n.name,
        "method": method,
        "dtype": case.precision.name,
        "architecture": str(n),
        "T": len(n.tasks),
        "B": n.batch,
        "height": n.height,
        "width": n.width,
    }


def of_method(
    found: Prepared, timing: Timing, base: Timing | None, phases: dict[str, float]
) -> dict:
    every = found.method.every
    weights = getattr(getattr(found.method, "form", None), "weights", None)
    figures = rounded(
        {
            "steps_per_s": 1e3 * every / timing.ms,
            "spread": timing.spread / timing.ms,
            "ratio_to_ew": timing.ms / every / base.ms if base else None,
            "peak_mb": found.peak_mb,
        }
    )
    return figures | {
        "rounds": timing.rounds,
        "phases": rounded(phases),
        "weights": None if weights is None else weights_summary(torch.stack(weights)),
        "error": None,
    }


def failed(error: str) -> dict:
    figures = dict.fromkeys(("steps_per_s", "spread", "ratio_to_ew", "peak_mb"))
    return figures | {"rounds": 0, "phases": None, "weights": None, "error": error}


def broken(rows: list[dict]) -> list[str]:
    """Failures that are this package's fault: of no peer or compiler, nor for want of memory."""
    return [
        f"{r['network']} {r['dtype']} {r['method']}: {r['error']}"
        for r in rows
        if r["error"] and r["method"] in OWN and "OutOfMemory" not in r["error"]
    ]


def weights_summary(weights: Tensor) -> dict:
    """Mean share of each task's weight ``(steps, T)``, and whether they were ever apart."""
    weights = weights.double().cpu()
    shares = weights / weights.sum(1, keepdim=True)
    apart = (shares - 1 / weights.shape[1]).abs().amax(1)
    return {
        "mean": [float(f"{w:.5g}") for w in weights.mean(0).tolist()],
        "mean_share": [round(w, 5) for w in shares.mean(0).tolist()],
        "largest_share_off_equal": round(apart.max().item(), 5),
        "steps_off_equal": round((apart > 1e-3).double().mean().item(), 4),
    }


def weights_note(row: dict) -> list[str]:
    """A warning when a method's weights were equal all along: that is equal weighting."""
    weights = row["weights"]
    if weights is None or weights["steps_off_equal"] > 0:
        return []
    note = (
        f"{row['method']} on {row['network']}, {row['dtype']}, weighed the tasks equally in every "
        "step: its figures are no peer's"
    )
    say(f"WARNING: {note}")
    return [note]


def summary_line(row: dict) -> str:
    if row["error"]:
        return f"{row['method']}: {row['error']}"
    line = f"{row['method']}: {row['steps_per_s']:.4g} steps/s"
    if row["ratio_to_ew"]:
        line += f", {row['ratio_to_ew']:.3g} x the time of equal weighting"
    line += f", {row['peak_mb']:.4g} MB; "
    return line + ", ".join(f"{phase} {ms:.3g}" for phase, ms in row["phases"].items()) + " ms"
