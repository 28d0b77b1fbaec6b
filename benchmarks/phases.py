"""The phases of a training step: where the time goes between its start and its end."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

# In the order of a step, with their titles. The weighting of peers is the Gram matrix, the weights
# and the weighted sum.
PHASES = {
    "encoder_forward": "encoder",
    "heads_forward": "heads",
    "saliencies": "saliencies",
    "regularizer": "regulariser",
    "heads_backward": "heads backward, second order in Rep-MTL",
    "weighting": "weighting",
    "encoder_backward": "encoder backward",
    "optimizer": "optimiser",
}


class Unmarked:
    """For steps whose time counts: marks nothing."""

    def mark(self, name: str) -> None: ...

    def mark_at(self, tensors: Sequence[Tensor], name: str, times: int = 1) -> None: ...


class Phases(Unmarked):
    """Milliseconds from each mark to the next, by name; on CUDA the device's own time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.marks = [self._now()]

    def mark(self, name: str) -> None:
        """End the phase ``name``, which began at the last mark."""
        self.names.append(name)
        self.marks.append(self._now())

    def mark_at(self, tensors: Sequence[Tensor], name: str, times: int = 1) -> None:
        """End the phase when a gradient is complete for the ``times``-th time at any of them."""
        arrived = 0

        def hook(_: Tensor) -> None:
            nonlocal arrived
            arrived += 1
            if arrived == times:
                self.mark(name)

        for tensor in tensors:
            tensor.register_hook(hook)

    def ms(self) -> dict[str, float]:
        """Wait for the device and return the times; a name that was marked twice has the sum."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        times: dict[str, float] = {}
        for name, begin, end in zip(self.names, self.marks, self.marks[1:], strict=False):
            times[name] = times.get(name, 0.0) + self._between(begin, end)
        return times

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin, end) -> float:
        return begin.elapsed_time(end) if self.device.type == "cuda" else (end - begin) * 1e3
