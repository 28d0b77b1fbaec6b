"""How strong the regulariser is: its gradient at the representation against that of the tasks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import grad

from repmtl_kernels._ground.saliency import accumulation_dtype
from repmtl_kernels._training.norms import norm
from repmtl_kernels._training.saliencies import without_hooks
from repmtl_kernels._training.tasks import Tasks, distinct

# The ratio is measured on the first calls that apply the regulariser, and on every so many of them
# after that. With wide ASPP heads a measurement takes a third of a step, and without second_order()
# more than half.
FIRST, BETWEEN = 16, 24
# The regulariser's gradient is taken to be at least this share of the tasks' at lambdas that sum to
# 1: where it vanishes at the representation, e.g. behind heads without curvature, no weight makes
# it the share that was asked for, and a large one would ruin the heads.
SMALLEST_RATIO = 0.01
# Lambdas that have fallen below `strength` by this factor are reported.
LARGEST_RATIO = 100.0


def is_measured(applications: int) -> bool:
    """Return whether the ratio is measured after so many calls that applied the regulariser."""
    return applications < FIRST or applications % BETWEEN == 0


def gradient_ratio(regularizer: Tensor, tasks: Tasks, scale: Tensor | None) -> Tensor:
    """Return the norm of the regulariser's gradient at the representations over the tasks'.

    The first gradient is taken by itself, so that nothing else that reaches the representations
    counts. The second is the weighted sum of the saliencies.

    Args:
        regularizer: made from the saliencies of ``tasks``, with its graph, which stays.
        tasks: with their saliencies.
        scale: what the saliencies have been multiplied with; None: 1.

    Returns:
        A float32 scalar on the device of ``regularizer``.
    """
    zs = distinct(tasks)
    grads: tuple[Tensor | None, ...] = (None,) * len(zs)
    if regularizer.requires_grad:
        # A gradient in float16 needs the scale, as that of the total will have it.
        seed = None if scale is None else scale.to(regularizer.dtype)
        with without_hooks(zs):
            grads = grad(regularizer, zs, seed, retain_graph=True, allow_unused=True)
    of_regularizer, of_tasks = _Sums(), _Sums()
    with torch.no_grad():
        at_tensor = dict(zip(map(id, zs), grads, strict=True))
        for task in tasks:
            pairs = zip(task.representations, task.saliencies, strict=True)
            for level, (z, saliency) in enumerate(pairs):
                place = level if task.copies else id(z)
                of_regularizer.add(place, at_tensor.pop(id(z), None), 1.0)
                of_tasks.add(place, saliency, task.weight)
        # Both have been multiplied with the scale.
        return (of_regularizer.norm(like=regularizer) / of_tasks.norm(like=regularizer)).float()


class _Sums:
    """Weighted sums of the gradients at each representation."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, place: int, value: Tensor | None, weight: float) -> None:
        if value is None:
            return
        if place in self._sums:
            self._sums[place].add_(value, alpha=weight)
        else:
            self._sums[place] = value.to(accumulation_dtype(value.dtype), copy=True).mul_(weight)

    def norm(self, *, like: Tensor) -> Tensor:
        return norm(list(self._sums.values())) if self._sums else like.new_zeros(())
