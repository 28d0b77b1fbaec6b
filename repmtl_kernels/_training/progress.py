"""The state that the training calls of a criterion leave behind."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence

from torch import Tensor

from repmtl_kernels._training.running_mean import Alarm, RunningMean
from repmtl_kernels._training.step import RepMTLStep

# The share of a running mean that an observation leaves as it was: the mean of the ratio follows
# the last three measurements or so, that of sizes, which are seen on every call, the last fifty.
RATIO_DECAY, SIZE_DECAY = 0.6, 0.98


class Progress:
    """The count, the running means and what has been said already.

    The count is on the host, so that no step has to ask the device whether it is its turn.
    """

    def __init__(self) -> None:
        self.calls = 0  # calls of one step are one
        self.step: int | None = None  # of the last call, where it was given
        self.ratio = RunningMean(RATIO_DECAY)  # of the gradients, at lambdas that sum to 1
        self.size = RunningMean(SIZE_DECAY)  # that clip compares with
        self.last_ratio: Tensor | None = None  # the last one measured, as applied there
        self.explained: set[Hashable] = set()  # tasks whose operations have second derivatives
        self.looked_at: set[Hashable] = set()  # tasks whose saliencies' means were looked at
        self.agreed = False  # with the other ranks, since there is something new to agree on
        self.alarm = Alarm()
        self.warned = False
        self.last: RepMTLStep | None = None
        self._carrier: tuple[int, weakref.ref] | None = None

    def number(self, step: int | None) -> int:
        """The number of this training call."""
        return self.calls - 1 if step is not None and step == self.step else self.calls

    def count(self, number: int, step: int | None) -> None:
        self.calls, self.step = number + 1, step

    def of_replica(self, replica: object) -> Progress:
        """This one for the first replica of a forward pass, a copy that is dropped for the others.

        So that nothing depends on which of their threads is faster.
        """
        if self._carrier is not None:
            calls, carrier = self._carrier
            if calls == self.calls and carrier() is not None:
                return self._copy()
        self._carrier = self.calls, weakref.ref(replica)
        return self

    def _copy(self) -> Progress:
        other = Progress()
        other.__dict__.update(self.__dict__, _carrier=None)
        other.ratio, other.size = self.ratio.copy(), self.size.copy()
        return other

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_carrier": None}

    def numbers(self) -> list[float]:
        """For a checkpoint."""
        step = [] if self.step is None else [self.step]
        return [self.calls, *self.ratio.numbers(), *self.size.numbers(), *step]

    def load(self, numbers: Sequence[float]) -> None:
        """Takes up where :meth:`numbers` was asked; its first version gave the count alone."""
        self.agreed, self.last_ratio = False, None
        self.calls = int(numbers[0])
        self.step = int(numbers[5]) if len(numbers) > 5 else None
        if len(numbers) > 1:
            self.ratio.load(numbers[1:3])
            self.size.load(numbers[3:5])
