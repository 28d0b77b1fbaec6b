"""The state that the training calls of a criterion leave behind."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from repmtl_kernels._training.calls import CallCount, FirstReplica
from repmtl_kernels._training.running_mean import DeferredValue, RunningMean
from repmtl_kernels._training.step import RepMTLStep

# The share of a running mean that an observation leaves as it was. The mean of the ratio follows
# about the last three measurements. The mean of the sizes, which every call sees, follows about the
# last fifty.
RATIO_DECAY, SIZE_DECAY = 0.6, 0.98
# In a checkpoint: the last call had no number of a step.
NO_STEP = -1


class Progress(CallCount):
    """The count of calls, the running means, and what has been checked and reported already."""

    def __init__(self) -> None:
        super().__init__()
        self.ratio = RunningMean(RATIO_DECAY)  # of the gradients' norms, at lambdas that sum to 1
        self.size = RunningMean(SIZE_DECAY)  # of dR/dS, for clip
        self.last_ratio: Tensor | None = None  # the last measured one, as that call applied it
        self.checked_derivatives: set[Hashable] = set()  # tasks that have second derivatives
        self.checked_means: set[Hashable] = set()  # tasks whose saliencies were checked for means
        self.agreed = False  # whether the ranks have compared their options
        self.weak = DeferredValue()  # whether the lambdas have fallen too far
        self.without_log = DeferredValue()  # which losses have no logarithm
        self.warned_of_weak = False
        self.last: RepMTLStep | None = None
        self._replicas = FirstReplica()

    def of_replica(self, replica: object) -> Progress:
        """Return this progress to the first replica of a forward pass, and copies to the others.

        The copies are dropped, so that nothing depends on which replica's thread is faster.
        """
        return self if self._replicas.is_first(replica, self.calls) else self._copy()

    def _copy(self) -> Progress:
        other = Progress()
        other.__dict__.update(self.__dict__, _replicas=FirstReplica())
        other.ratio, other.size = self.ratio.copy(), self.size.copy()
        return other

    def numbers(self) -> list[float]:
        """Return the numbers that a checkpoint keeps.

        There are always six: ``torch.distributed.checkpoint`` loads into as many only.
        """
        step = NO_STEP if self.step is None else self.step
        return [self.calls, *self.ratio.numbers(), *self.size.numbers(), step]

    def load(self, numbers: Sequence[float]) -> None:
        """Take on the numbers of a checkpoint; old ones have the count alone."""
        self.agreed, self.last_ratio = False, None
        self.calls = int(numbers[0])
        step = int(numbers[5]) if len(numbers) > 5 else NO_STEP
        self.step = None if step == NO_STEP else step
        if len(numbers) > 1:
            self.ratio.load(numbers[1:3])
            self.size.load(numbers[3:5])
