"""Running means of many numbers at once, each with observations of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RunningMeans:
    """Bias-corrected exponential means of the elements of a vector, which stay on their device.

    An element that is not finite is no observation, and leaves its mean as it was.
    """

    def __init__(self) -> None:
        self.state: Tensor | None = None  # (2, V): weighted sums of the observations, and of ones

    def observe(self, values: Tensor, decay: float) -> None:
        """Take a vector (V,) into the means."""
        if self.state is None:
            self.state = values.new_zeros(2, len(values))
        # A checkpoint's is on the CPU. To wait for a copy is needless on the way to a device alone.
        state = self.state.to(values.device, non_blocking=values.is_cuda)
        added = torch.stack([values, torch.ones_like(values)])
        new = decay * state + (1 - decay) * added
        self.state = torch.where(values.isfinite(), new, state)

    def value(self) -> Tensor:
        """Return the means (V,); NaN where nothing has been observed."""
        assert self.state is not None
        total, weight = self.state
        return (total / weight).where(weight > 0, math.nan)
