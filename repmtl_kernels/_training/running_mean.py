"""Running means of numbers on a device, and a look at such numbers without waiting for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repmtl_kernels import _distributed


class RunningMean:
    """A bias-corrected exponential mean of scalars that stay on their device.

    An observation that is not finite, or not above 0, changes nothing. The two numbers of the state
    are written in place, so that a captured CUDA graph carries them on. They are never inference
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
        """Return the mean of all ranks of a group; ``default`` before the first observation."""
        state = self._state_on(device).to(device, non_blocking=True)
        total, weight = (_distributed.summed(state, group) if group else state).unbind()
        return (total / weight).where(weight > 0, default)

    @torch.no_grad()
    def observe(self, observation: Tensor) -> None:
        """Take a scalar into the mean."""
        state = self._state_on(observation.device)
        observation = observation.to(state.device, non_blocking=True)
        added = torch.stack([observation, torch.ones_like(observation)])
        valid = observation.isfinite() & (observation > 0)
        state.copy_(torch.where(valid, self.decay * state + (1 - self.decay) * added, state))

    def numbers(self) -> list[float]:
        """Return the state for a checkpoint. Waits for the device, if it has one there."""
        return [0.0, 0.0] if self._state is None else self._state.tolist()

    def copy(self) -> RunningMean:
        """Return a copy with a state of its own."""
        other = RunningMean(self.decay)
        with torch.inference_mode(False):
            other._state = None if self._state is None else self._state.clone()
        return other

    @torch.inference_mode(False)
    def load(self, numbers: Sequence[float]) -> None:
        """Take on the numbers of a checkpoint."""
        if self._state is None and not any(numbers):  # from before the first observation
            return
        new = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        self._state = new if self._state is None else self._state.copy_(new)

    def _state_on(self, device: torch.device) -> Tensor:
        """Return the state, moved if it is on no device of this type.

        Replicas have several devices of one type; the state stays on one of them.
        """
        if self._state is None or self._state.device.type != device.type:
            with torch.inference_mode(False):
                if self._state is None:
                    self._state = torch.zeros(2, dtype=torch.float32, device=device)
                else:
                    self._state = self._state.to(device)
        return self._state


class DeferredValue:
    """Reads small tensors of a device without waiting for the device.

    On the CPU the answer is the tensor itself. On CUDA the answers are all earlier ones whose
    copies have arrived since the last call. On other devices there is no answer.
    """

    def __init__(self) -> None:
        self._sent: list[tuple[Tensor, torch.cuda.Event, Any]] = []  # the oldest first

    def __deepcopy__(self, memo: dict) -> DeferredValue:
        return DeferredValue()  # an event has no copy

    def __getstate__(self) -> dict:
        return {"_sent": []}

    def read(self, value: Tensor, label: Any = None) -> list[tuple[Tensor, Any]]:
        """Return the answers with their labels, and send for ``value``."""
        if value.is_cpu:
            return [(value, label)]
        if not value.is_cuda or torch.cuda.is_current_stream_capturing():
            return []
        sent, self._sent = self._sent, []  # a replica in another thread extends the new list
        answers = []
        for copy, arrived, of_copy in sent:
            if arrived.query():
                answers.append((copy, of_copy))
            else:
                self._sent.append((copy, arrived, of_copy))
        with torch.cuda.device(value.device):
            copy, arrived = value.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._sent.append((copy, arrived, label))
        return answers

    def is_true(self, flag: Tensor) -> bool:
        """Return whether a number that was read is true; False without an answer."""
        return any(bool(value) for value, _ in self.read(flag))
