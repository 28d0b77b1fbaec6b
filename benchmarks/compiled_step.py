"""torch.compile of the training step, against the same step uncompiled, in turns."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import cross_entropy, l1_loss

from benchmarks.kernels import FAILURES, LAMBDA, rounded
from benchmarks.memory import peak_extra_bytes
from benchmarks.progress import say, track
from benchmarks.timing import Timing, side_by_side
from repmtl_kernels import RepMTL, rep_mtl_loss

TaskLoss = Callable[[str, Tensor, Tensor], Tensor]
Batch = tuple[Tensor, dict[str, Tensor]]  # images, labels by task

EQUAL_WEIGHTING = "equal_weighting"
REP_MTL = "rep_mtl"
CHANNELS = (32, 64)
OUTPUTS = {"segmentation": 8, "depth": 1}
# Small, since compiling takes about two seconds for each of its some 25 kernels.
NETWORK = "3 convolutions with batch norm at stride 4, 64 channels; 2 heads of 2 convolutions"
# Batch and side of the square images.
SIZES = {"cpu": (8, 96), "cuda": (32, 256)}
SECONDS = {True: 3.0, False: 20.0}
MIN_ROUNDS, MAX_ROUNDS = 3, 40
# Relative error of all gradients, in float32, up to which two forms are the same step.
AGREEMENT = 1e-3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first, width = CHANNELS
        self.encoder = nn.Sequential(
            *layer(3, first, stride=2), *layer(first, first), *layer(first, width, stride=2)
        )  # fmt: skip
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(*layer(width, width, dilation=2), nn.Conv2d(width, n, 1))
                for task, n in OUTPUTS.items()
            }
        )


def layer(inputs: int, outputs: int, **options: int) -> list[nn.Module]:
    padding = options.get("dilation", 1)
    convolution = nn.Conv2d(inputs, outputs, 3, padding=padding, bias=False, **options)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def task_loss(task: str, found: Tensor, label: Tensor) -> Tensor:
    return (l1_loss if task == "depth" else cross_entropy)(found, label)


def random_batch(device: torch.device) -> Batch:
    size, side = SIZES[device.type]
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    images = torch.randn(size, 3, side, side, **options)
    shape = (size, side // 4, side // 4)
    labels = {
        "segmentation": torch.randint(OUTPUTS["segmentation"], shape, **options),
        "depth": torch.randn(size, 1, *shape[1:], **options),
    }
    return images, labels


# --- the forms of a step: each leaves gradients in `.grad` of every parameter ---


class WholeStep:
    """Rep-MTL with all gradients by ``torch.func.grad``, as one compiled graph.

    model: has an ``encoder`` and a ``ModuleDict`` of ``heads``. What it calls is the documented
    way; running statistics are updated where they are.
    """

    def __init__(
        self, model: nn.Module, loss: TaskLoss, *, strength: float = LAMBDA, compiled: bool = True
    ) -> None:
        self.loss, self.strength = loss, strength
        self.modules: Mapping[str, nn.Module] = {"encoder": model.encoder, **model.heads}
        self.tasks = list(model.heads)
        self.parameters = {k: dict(m.named_parameters()) for k, m in self.modules.items()}
        self.buffers = {k: dict(m.named_buffers()) for k, m in self.modules.items()}
        gradients = grad_and_value(self._objective)
        self.gradients = torch.compile(gradients, fullgraph=True) if compiled else gradients

    def __call__(self, images: Tensor, labels: dict[str, Tensor]) -> None:
        with torch.no_grad():
            grads, _ = self.gradients(self.parameters, self.buffers, images, labels)
        for name, parameters in self.parameters.items():
            for key, parameter in parameters.items():
                parameter.grad = grads[name][key]

    def _objective(self, parameters, buffers, images, labels) -> Tensor:
        encoder = parameters["encoder"], buffers["encoder"]
        z = functional_call(self.modules["encoder"], encoder, images)
        losses, saliencies = [], []
        for task in self.tasks:
            saliency, loss = grad_and_value(self._task_loss)(
                z, buffers[task], parameters[task], task, labels[task]
            )
            losses.append(loss)
            saliencies.append(saliency)
        lambdas = {"lambda_tsr": self.strength, "lambda_csa": self.strength}
        return sum(losses) + rep_mtl_loss(saliencies, **lambdas).total

    def _task_loss(self, z, buffers, parameters, task, label) -> Tensor:
        found = functional_call(self.modules[task], (parameters, buffers), z)
        return self.loss(task, found, label)


def equal_weighting(model: Model, compiled: bool) -> Callable[..., None]:
    """The usual way: the forward is compiled, and its backward with it."""

    def total(images: Tensor, labels: dict[str, Tensor]) -> Tensor:
        z = model.encoder(images)
        return sum(task_loss(t, head(z), labels[t]) for t, head in model.heads.items())

    forward = torch.compile(total, fullgraph=True) if compiled else total

    def step(images: Tensor, labels: dict[str, Tensor]) -> None:
        model.zero_grad()
        forward(images, labels).backward()

    return step


def rep_mtl(model: Model, *, encoder: bool = False, fast: bool = False) -> Callable[..., None]:
    """The criterion, with eager heads; ``encoder`` compiles the encoder alone."""
    criterion = RepMTL(LAMBDA, LAMBDA)
    encode = torch.compile(model.encoder, fullgraph=True) if encoder else model.encoder

    def step(images: Tensor, labels: dict[str, Tensor]) -> None:
        model.zero_grad()
        z = encode(images)
        with criterion.second_order() if fast else contextlib.nullcontext():
            losses = {t: task_loss(t, head(z), labels[t]) for t, head in model.heads.items()}
        criterion(losses, z).backward()

    return step


class Form(NamedTuple):
    make: Callable[[Model], Callable[..., None]]
    compiled: str  # what is
    same_as: str  # the form that computes the same gradients


# Most telling first: when time runs out, what is left out is at the end.
FORMS = {
    EQUAL_WEIGHTING: Form(partial(equal_weighting, compiled=False), "nothing", EQUAL_WEIGHTING),
    REP_MTL: Form(rep_mtl, "nothing", REP_MTL),
    "rep_mtl_second_order": Form(partial(rep_mtl, fast=True), "nothing", REP_MTL),
    "rep_mtl_compiled": Form(lambda model: WholeStep(model, task_loss), "whole step", REP_MTL),
    "equal_weighting_compiled": Form(
        partial(equal_weighting, compiled=True), "whole step", EQUAL_WEIGHTING
    ),
    "rep_mtl_encoder_compiled": Form(
        partial(rep_mtl, encoder=True, fast=True), "encoder", REP_MTL
    ),
}  # fmt: skip


class Ready(NamedTuple):
    step: Callable[[], None]
    setup_seconds: float  # of the first call: compilation
    peak_mb: float
    error: float  # of the gradients, against the form that is the same


def measure(device: torch.device, *, quick: bool, deadline: float) -> tuple[list[dict], list[str]]:
    """Rows for all forms, and notes on what was left out.

    deadline: ``time.monotonic()`` after which no further form is compiled.
    """
    notes: list[str] = []
    if device.type == "cpu" and shutil.which("g++") is None:
        return [], ["no C++ compiler: torch.compile was not measured"]
    torch.manual_seed(0)
    model = Model().to(device)
    batch = random_batch(device)
    ready: dict[str, Ready] = {}
    gradients: dict[str, list[Tensor]] = {}
    for name, form in track(FORMS.items(), "compiling"):
        if ready and time.monotonic() > deadline:
            notes.append(f"left out for time: {name}")
            continue
        try:
            ready[name], gradients[name] = prepared(form, model, batch, device, gradients)
        except FAILURES as error:
            first_line = str(error).strip().partition("\n")[0]
            notes.append(f"{name} failed: {type(error).__name__}: {first_line}")
            continue
        if not ready[name].error <= AGREEMENT:
            notes.append(f"{name}: gradients are off by {ready[name].error:.1e}, left out")
            del ready[name]
    timings = side_by_side(
        {name: found.step for name, found in ready.items()}, device,
        seconds=SECONDS[quick], min_rounds=MIN_ROUNDS, max_rounds=MAX_ROUNDS,
    )  # fmt: skip
    rows = [row(name, ready[name], timings, device) for name in ready]
    for line in (*notes, *map(summary_line, rows)):
        say(line)
    return rows, notes


def prepared(
    form: Form,
    model: Model,
    batch: Batch,
    device: torch.device,
    gradients: dict[str, list[Tensor]],
) -> tuple[Ready, list[Tensor]]:
    """A form after its first calls, and the gradients that it gives."""
    step = partial(form.make(model), *batch)
    began = time.monotonic()
    step()
    seconds = time.monotonic() - began
    found = [p.grad.clone() for p in model.parameters()]
    exact = gradients.get(form.same_as, found)
    peak = peak_extra_bytes(step, device) / 1e6
    return Ready(step, seconds, peak, relative_error(found, exact)), found


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    off = sum((f - e).double().square().sum() for f, e in zip(found, exact, strict=True))
    return (off / sum(e.double().square().sum() for e in exact)).sqrt().item()


def row(name: str, found: Ready, timings: dict[str, Timing], device: torch.device) -> dict:
    batch, side = SIZES[device.type]
    time_of = timings[name]
    return rounded(
        {
            "network": NETWORK,
            "method": name,
            "compiled": FORMS[name].compiled,
            "B": batch,
            "height": side,
            "width": side,
            "ms": time_of.ms,
            "spread": time_of.spread,
            "steps_per_s": 1e3 / time_of.ms,
            "ratio_to_ew": time_of.ms / timings[EQUAL_WEIGHTING].ms,
            "peak_mb": found.peak_mb,
            "first_step_s": found.setup_seconds,
            "gradient_error": found.error,
        }
    )


def summary_line(found: dict) -> str:
    return (
        f"{found['method']}: {found['ms']:.4g} ms a step, {found['ratio_to_ew']:.3g} x equal "
        f"weighting, {found['peak_mb']:.4g} MB, first step {found['first_step_s']:.3g} s"
    )
