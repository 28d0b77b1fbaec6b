"""Log losses without a regulariser."""

from __future__ import annotations

from torch import Tensor, nn

from repmtl_kernels._ground.checks import check_number
from repmtl_kernels._ground.saliency import has_values
from repmtl_kernels._training.arguments import TaskLosses, Weights, checked_weights
from repmtl_kernels._training.logarithm import check_logarithms
from repmtl_kernels._training.options import logarithm
from repmtl_kernels._training.running_mean import DeferredValue
from repmtl_kernels._training.tasks import Tasks


class LogLosses(nn.Module):
    """``sum_t w_t log L_t`` in place of the sum of the task losses, for losses above 0.

    The logarithm divides each task's gradient by its loss. So it balances tasks whose losses differ
    in scale, without a weight to choose (DB-MTL, arXiv 2308.12029, eq. 2; Rep-MTL's runs have it
    too). ``RepMTL(log_losses=True)`` is the same with the regulariser::

        criterion = LogLosses()
        total = criterion({"segmentation": loss_a, "depth": loss_b})
        total.backward()

    Args:
        log_offset: at least 0; the logarithm is that of ``L_t + log_offset``, in the unit of the
            losses. It is for losses that can be 0, and bounds the weight of a task that is nearly
            learned.
        task_weights: ``w_t``, finite and at least 0: a sequence, or a dict with the keys of the
            losses. None: all 1.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

    def __init__(self, *, log_offset: float = 0.0, task_weights: Weights | None = None) -> None:
        super().__init__()
        self.log_offset = check_number("log_offset", log_offset, minimum=0)
        self.task_weights = checked_weights(task_weights)
        self._seen = DeferredValue()

    def forward(self, losses: TaskLosses) -> Tensor:
        """Return the total, a scalar in float32, or float64 if a loss is.

        Args:
            losses: list, tuple or dict of T scalar losses of shape ``()``. None says that a task is
                absent from this batch.

        Raises:
            ValueError, TypeError: an argument is not as described, or a loss has no logarithm: it
                is negative, or 0 with ``log_offset=0``. On CUDA that is found in a later call, so
                that no call waits for the device; until then the total is NaN or infinite. It stays
                so on other devices, and inside ``torch.func`` and compiled regions.
        """
        tasks = Tasks(
            losses,
            None,
            objective=lambda loss: logarithm(loss, self.log_offset),
            weights=self.task_weights,
            absent=True,
        )
        total = tasks.weighted_sum()
        if has_values(total):
            check_logarithms(tasks, self.log_offset, self._seen)
        return total

    def extra_repr(self) -> str:
        """Return the options as they are in ``repr``."""
        return f"log_offset={self.log_offset!r}, task_weights={self.task_weights!r}"
