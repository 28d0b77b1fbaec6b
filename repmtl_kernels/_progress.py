"""What the training calls of a criterion leave behind."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from repmtl_kernels._step import RepMTLStep
from repmtl_kernels._strength import RATIO_DECAY, SIZE_DECAY, Alarm, RunningMean


class Progress:
    """The count, the running means and what has been said already; replicas share one.

    The count is on the host, so that no step has to ask the device whether it is its turn.
    """

    def __init__(self) -> None:
        self.calls = 0  # calls of one step are one
        self.step: int | None = None  # of the last call, where it was given
        self.ratio = RunningMean(RATIO_DECAY)  # of the gradients, at lambdas that sum to 1
        self.size = RunningMean(SIZE_DECAY)  # that clip compares with
        self.measured = -1  # the number of the call that the ratio was last measured on
        self.last_ratio: Tensor | None = None  # as applied there
        self.explained = False  # operations without a second derivative
        self.looked_at = False  # the saliencies' means
        self.agreed = False  # with the other ranks, since there is something new to agree on
        self.alarm = Alarm()
        self.warned = False
        self.last: RepMTLStep | None = None

    def number(self, step: int | None) -> int:
        """The number of this training call."""
        return self.calls - 1 if step is not None and step == self.step else self.calls

    def count(self, number: int, step: int | None) -> None:
        self.calls, self.step = max(self.calls, number + 1), step

    def numbers(self) -> list[float]:
        """For a checkpoint."""
        return [self.calls, *self.ratio.numbers(), *self.size.numbers()]

    def load(self, numbers: Sequence[float]) -> None:
        """Takes up where :meth:`numbers` was asked; its first version gave the count alone."""
        self.agreed, self.measured = False, -1
        self.calls = int(numbers[0])
        self.step = self.last_ratio = None
        if len(numbers) > 1:
            self.ratio.load(numbers[1:3])
            self.size.load(numbers[3:5])
