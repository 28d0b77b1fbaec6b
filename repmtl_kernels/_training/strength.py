"""How strong the regulariser is: its gradient at the representation against that of the tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.autograd import grad

from repmtl_kernels import _distributed
from repmtl_kernels._ground.saliency import accumulation_dtype
from repmtl_kernels._ground.torch_private import is_functorch_wrapped, is_legacy_batched
from repmtl_kernels._training.tasks import Task, distinct, without_hooks

# The ratio is measured on the first calls that apply the regulariser, and on every so many of them
# after that. With wide ASPP heads a measurement takes a third of a step, and without second_order()
# more than half.
FIRST, BETWEEN = 16, 24
# The share of a running mean that an observation leaves as it was: the mean of the ratio follows
# the last three measurements or so, that of sizes, which are seen on every call, the last fifty.
RATIO_DECAY, SIZE_DECAY = 0.6, 0.98


def is_measured(number: int) -> bool:
    """Whether the ratio is measured on this call, of those that apply the regulariser."""
    return number < FIRST or number % BETWEEN == 0


class RunningMean:
    """Bias-corrected exponential mean of scalars that stay on their device.

    An observation that is not finite, or not above 0, leaves it as it was. Its two numbers are
    written in place, so that a captured CUDA graph carries them on: they are never inference
    tensors, whatever mode a checkpoint is loaded in.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._state: Tensor | None = None  # weighted sum of the observations, and of ones

    @property
    def is_empty(self) -> bool:
        """Whether there was neither an observation nor a checkpoint."""
        return self._state is None

    def value(self, device: torch.device, default: float, group: str = "") -> Tensor:
        """The mean, ``default`` before the first observation; over the ranks of a group."""
        state = self._near(device).to(device, non_blocking=True)
        total, weight = (_distributed.summed(state, group) if group else state).unbind()
        return (total / weight).where(weight > 0, default)

    @torch.no_grad()
    def observe(self, observation: Tensor) -> None:
        state = self._near(observation.device)
        observation = observation.to(state.device, non_blocking=True)
        added = torch.stack([observation, torch.ones_like(observation)])
        valid = observation.isfinite() & (observation > 0)
        state.copy_(torch.where(valid, self.decay * state + (1 - self.decay) * added, state))

    def numbers(self) -> list[float]:
        """For a checkpoint. Waits for the device, if there is something to wait for."""
        return [0.0, 0.0] if self._state is None else self._state.tolist()

    def copy(self) -> RunningMean:
        """The same mean, which other observations may go on with."""
        other = RunningMean(self.decay)
        with torch.inference_mode(False):
            other._state = None if self._state is None else self._state.clone()
        return other

    @torch.inference_mode(False)
    def load(self, numbers: Sequence[float]) -> None:
        if self._state is None and not any(numbers):  # from before the first observation
            return
        new = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        self._state = new if self._state is None else self._state.copy_(new)

    def _near(self, device: torch.device) -> Tensor:
        """The state, on a device of that type. Replicas have several; it stays on one of them."""
        if self._state is None or self._state.device.type != device.type:
            with torch.inference_mode(False):
                if self._state is None:
                    self._state = torch.zeros(2, dtype=torch.float32, device=device)
                else:
                    self._state = self._state.to(device)
        return self._state


class Alarm:
    """Tells whether a number on a device was true, without waiting for the device.

    On the CPU that is known at once, on CUDA when the copy has arrived, at a later question.
    Elsewhere it is never told.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, torch.cuda.Event] | None = None

    def __deepcopy__(self, memo: dict) -> Alarm:
        return Alarm()  # an event has no copy

    def __getstate__(self) -> dict:
        return {"_sent": None}

    def rings(self, flag: Tensor) -> bool:
        if flag.is_cpu:
            return bool(flag)
        if not flag.is_cuda or torch.cuda.is_current_stream_capturing():
            return False
        found = False
        if self._sent is not None:
            copy, arrived = self._sent
            if not arrived.query():
                return False
            found = bool(copy)
        with torch.cuda.device(flag.device):
            arrived = torch.cuda.Event()
            self._sent = flag.to("cpu", non_blocking=True), arrived
            arrived.record()
        return found


def gradient_ratio(regularizer: Tensor, tasks: Sequence[Task], scale: Tensor | None) -> Tensor:
    """The norm of the regulariser's gradient at the representations over that of the tasks' sum.

    It takes the first gradient by itself, so that nothing else that reaches the representations
    counts; the second is the weighted sum of the saliencies. float32, on its device.

    Args:
        regularizer: made from the saliencies of ``tasks``, with its graph, which stays.
        scale: what the saliencies have been multiplied with; None: 1.
    """
    zs = distinct(tasks)
    grads: Sequence[Tensor | None] = [None] * len(zs)
    if regularizer.requires_grad:
        # A gradient in float16 needs the scale, as that of the total will have it.
        seed = None if scale is None else scale.to(regularizer.dtype)
        with without_hooks(zs):
            grads = grad(regularizer, zs, seed, retain_graph=True, allow_unused=True)
    of_regularizer, of_tasks = _Sums(), _Sums()
    with torch.no_grad():
        found = dict(zip(map(id, zs), grads, strict=True))
        for task in tasks:
            pairs = zip(task.representations, task.saliencies, strict=True)
            for level, (z, saliency) in enumerate(pairs):
                at = level if task.copies else id(z)
                of_regularizer.add(at, found.pop(id(z), None), 1.0)
                of_tasks.add(at, saliency, task.weight)
        # Both have been multiplied with the scale.
        return (of_regularizer.norm() / of_tasks.norm()).float()


class _Sums:
    """Weighted sums of gradients by the representation that they are at."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, at: int, value: Tensor | None, weight: float) -> None:
        if value is None:
            return
        if at in self._sums:
            self._sums[at].add_(value, alpha=weight)
        else:
            self._sums[at] = value.to(accumulation_dtype(value.dtype), copy=True).mul_(weight)

    def norm(self) -> Tensor | float:
        return norm(list(self._sums.values())) if self._sums else 0.0


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm over all elements of all tensors, at any scale: their squares may have no float32."""
    compact = [unexpanded(x) for x in tensors]
    largest = reduce(torch.maximum, [torch.linalg.vector_norm(x, torch.inf) for x in compact])
    largest = largest.to(accumulation_dtype(largest.dtype)).where(largest != 0, 1)
    norms = [torch.linalg.vector_norm(x / largest, dtype=largest.dtype) for x in compact]
    for i, (x, view) in enumerate(zip(tensors, compact, strict=True)):
        if x.numel() > view.numel():
            norms[i] = norms[i] * math.sqrt(x.numel() // view.numel())
    return largest * (norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms)))


def unexpanded(x: Tensor) -> Tensor:
    """The view of ``x`` with size 1 where it is expanded."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            x = x.narrow(dim, 0, 1)
    return x


def share_below_float16(tensors: Sequence[Tensor]) -> Tensor:
    """The share of elements that are zero or below the normal numbers of float16, float32."""
    small = torch.finfo(torch.float16).tiny
    shares = [(unexpanded(x.detach()).abs() < small).mean(dtype=torch.float32) for x in tensors]
    elements = [x.numel() for x in tensors]
    return sum(s * (n / sum(elements)) for s, n in zip(shares, elements, strict=True))


def is_transformed(x: Tensor) -> bool:
    """Whether ``x`` lives inside ``torch.func``, ``vmap``, batched gradients or a compiler."""
    return (
        torch.compiler.is_compiling()
        or is_functorch_wrapped(x)
        or is_legacy_batched(x)  # of is_grads_batched
    )
