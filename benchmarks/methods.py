"""The methods of a training step: gradients in ``.grad``, and marks of the phases."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch

from benchmarks.networks import Batch, Model, Network, random_batch, task_loss
from benchmarks.peers import AtRepresentation, ByTorchjd, Forward, SinglePass, fairgrad, nash_mtl
from benchmarks.phases import PHASES, Phases, Unmarked
from repmtl_kernels import RepMTL, SaliencyMonitor, rep_mtl_loss, task_saliencies
from repmtl_kernels._training.strength import BETWEEN, FIRST

EQUAL_WEIGHTING = "equal_weighting"
DEFAULT = "rep_mtl_default"
MONITORED = "rep_mtl_monitored"
LAMBDA = 0.01
LEARNING_RATE = 1e-4


class Work:
    """Model, optimizer and batch: all methods take their steps with the same ones."""

    def __init__(self, network: Network, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.tasks = list(network.tasks)
        self.model: Model = network.model().to(device)
        self.batch: Batch = random_batch(network, device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        low = dtype != torch.float32
        self.autocast = partial(torch.autocast, device.type, dtype, enabled=low)

    def step(self, method: EqualWeighting, number: int, marks: Unmarked | None = None) -> None:
        """Take the step of this number, one of ``method.calls``."""
        marks = marks or Unmarked()
        method.begin(number)
        method.gradients(self, marks)
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.mark("optimizer")

    def cycle(self, method: EqualWeighting) -> None:
        """Take one step of each kind."""
        for number in method.calls:
            self.step(method, number)

    def phases(self, method: EqualWeighting) -> dict[str, float]:
        """Return the milliseconds of each phase, the mean over all steps; without marks nothing."""
        total = dict.fromkeys(PHASES, 0.0)
        for number, share in method.calls.items() if method.marked else ():
            marks = Phases(self.device)
            self.step(method, number, marks)
            for name, ms in marks.ms().items():
                total[name] += share * ms
        return {name: ms for name, ms in total.items() if ms > 0}

    def clear(self) -> None:
        """Forget what a step left that failed half-way."""
        for p in self.model.parameters():
            p.grad = None
            if hasattr(p, "jac"):
                del p.jac
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class EqualWeighting:
    """The sum of the task losses."""

    # The numbers of steps that stand for all others, and the share of each in them.
    calls: Mapping[int, float] = {0: 1.0}
    marked = True  # whether it marks its phases

    def begin(self, number: int) -> None:
        """Make the next step the one of this number."""

    def gradients(self, work: Work, marks: Unmarked) -> None:
        """Run forward and backward and mark the phases."""
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

    def heads(self, marks: Unmarked) -> AbstractContextManager:
        """Return what the heads' forward runs under."""
        return contextlib.nullcontext()

    def backward(self, forward: Forward, marks: Unmarked) -> None:
        marks.mark_at(forward.representations, "heads_backward")
        sum(forward.losses).backward()
        marks.mark("encoder_backward")


class Peer(EqualWeighting):
    """A form of :mod:`benchmarks.peers`."""

    def __init__(self, form: ByTorchjd | SinglePass | AtRepresentation) -> None:
        self.form = form
        self.backward = form.backward


class RepMTLMethod(EqualWeighting):
    """Rep-MTL with fixed lambdas, which the dissected step can write out.

    measured: whether its calls measure the ratio of the gradients; else they are those between.
    """

    def __init__(
        self, backend: str = "auto", *, fast: bool = False, measured: bool = False
    ) -> None:
        self.criterion = RepMTL(LAMBDA, LAMBDA, backend=backend)
        self.fast = fast
        self.calls = {0 if measured else FIRST + 1: 1.0}
        self.state = torch.zeros_like(self.criterion.get_extra_state())

    def begin(self, number: int) -> None:
        self.state[0] = number
        self.criterion.set_extra_state(self.state)

    def heads(self, marks: Unmarked) -> AbstractContextManager:
        if not self.fast:
            return contextlib.nullcontext()
        return self.criterion.second_order()

    def backward(self, forward: Forward, marks: Unmarked) -> None:
        z = forward.representations
        if isinstance(marks, Phases):
            self._dissect(forward, marks)
        else:
            self.criterion(forward.losses, z[0] if len(z) == 1 else z).backward()

    def _dissect(self, forward: Forward, marks: Phases) -> None:
        """Do what the criterion does, by its parts: the criterion itself has no marks."""
        c, z = self.criterion, forward.representations
        saliencies = task_saliencies(forward.losses, z[0] if len(z) == 1 else z)
        marks.mark("saliencies")
        lambdas = {"lambda_tsr": c.lambda_tsr, "lambda_csa": c.lambda_csa}
        options = {"csa_temperature": c.csa_temperature, "backend": c.backend}
        total = sum(forward.losses) + rep_mtl_loss(saliencies, **lambdas, **options).total
        marks.mark("regularizer")
        # The regulariser was computed last, so its backward comes first.
        marks.mark_at(saliencies, "regularizer")
        marks.mark_at(z, "heads_backward")
        total.backward()
        marks.mark("encoder_backward")


class Default(RepMTLMethod):
    """``RepMTL()`` as it comes, under ``second_order()``, when its first calls are over.

    One kind of its calls measures the ratio of the gradients, besides those that apply the
    regulariser without that and those between.
    """

    marked = False  # a dissected step has fixed lambdas and measures nothing

    def __init__(self, monitor: SaliencyMonitor | None = None) -> None:
        # Random labels leave the tasks hardly a gradient, which the criterion reports.
        warnings.filterwarnings("ignore", message="strength: the lambdas have fallen")
        self.criterion = RepMTL(monitor=monitor)
        self.fast = True
        self.calls = self._kinds()
        self.state = torch.zeros_like(self.criterion.get_extra_state())
        self.state[1:3] = 1.0  # a mean of the ratio, as its first calls leave one

    def _kinds(self) -> dict[int, float]:
        """Return a call of each kind, and the share of its kind in all calls."""
        every, monitor = self.criterion.every, self.criterion.monitor
        turns = [every, BETWEEN * every, *([] if monitor is None else [monitor.every])]
        period = math.lcm(*turns)
        kinds = defaultdict(list)
        for number in range(period, 2 * period):
            kinds[tuple(number % turn == 0 for turn in turns)].append(number)
        return {numbers[0]: len(numbers) / period for numbers in kinds.values()}


class Monitored(Default):
    """The same with a monitor. Some of its calls are observed, and each kind may be."""

    def __init__(self) -> None:
        super().__init__(SaliencyMonitor())

    def begin(self, number: int) -> None:
        super().begin(number)
        self.criterion.monitor._count.calls = number


# The decisive methods first: when time runs out, the last ones are left out.
METHODS: dict[str, Callable[[int], EqualWeighting]] = {
    EQUAL_WEIGHTING: lambda tasks: EqualWeighting(),
    DEFAULT: lambda tasks: Default(),
    MONITORED: lambda tasks: Monitored(),
    "rep_mtl_second_order": lambda tasks: RepMTLMethod(fast=True),
    "rep_mtl": lambda tasks: RepMTLMethod(),
    "rep_mtl_reference": lambda tasks: RepMTLMethod("reference"),
    "nash_mtl": lambda tasks: Peer(ByTorchjd(nash_mtl(tasks))),
    "fairgrad": lambda tasks: Peer(ByTorchjd(fairgrad(tasks))),
    "nash_mtl_single_pass": lambda tasks: Peer(SinglePass(nash_mtl(tasks))),
    "fairgrad_single_pass": lambda tasks: Peer(SinglePass(fairgrad(tasks))),
    "nash_mtl_representation": lambda tasks: Peer(AtRepresentation(nash_mtl(tasks))),
    "fairgrad_representation": lambda tasks: Peer(AtRepresentation(fairgrad(tasks))),
}
NEED_TORCHJD = tuple(name for name in METHODS if name.startswith(("nash_mtl", "fairgrad")))
TITLES = {
    EQUAL_WEIGHTING: "equal weighting",
    DEFAULT: "Rep-MTL as it comes: `RepMTL()`, `second_order()`",
    MONITORED: "the same with a `SaliencyMonitor()`",
    "rep_mtl_reference": "Rep-MTL, reference losses",
    "rep_mtl": "Rep-MTL, fused losses",
    "rep_mtl_second_order": "Rep-MTL, fused, `second_order()`",
    "nash_mtl": "Nash-MTL (torchjd)",
    "nash_mtl_single_pass": "Nash-MTL, own single pass",
    "nash_mtl_representation": "Nash-MTL, at the representation",
    "fairgrad": "FairGrad (torchjd)",
    "fairgrad_single_pass": "FairGrad, own single pass",
    "fairgrad_representation": "FairGrad, at the representation",
}
