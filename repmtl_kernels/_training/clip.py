"""Clipping of the regulariser's gradient where it enters the saliencies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from repmtl_kernels._ground.saliency import has_values
from repmtl_kernels._training.norms import norm, unexpanded
from repmtl_kernels._training.running_mean import RunningMean

Rest = TypeVar("Rest")


def clipped(
    regularizer: Callable[[list[Tensor]], tuple[Tensor, Rest]],
    saliencies: Sequence[Tensor],
    *,
    limit: float,
    mean: RunningMean,
    factor: float,
    scale: Tensor | None,
) -> tuple[Tensor, Rest]:
    """Return ``regularizer(saliencies)``, with its gradient at the saliencies clipped.

    The size ``||dR/dS|| ||S||`` is at most ``limit`` times its running mean. The gradient
    ``dR/dS`` is taken in this call, and kept for the backward pass: nothing else that happens there
    matters. The norms are over the saliencies of all tasks; their product does not depend on the
    scale of the losses. The first observation is never above the limit.

    Args:
        regularizer: returns ``R`` and more, from saliencies that it does not keep.
        saliencies: all of them, of all tasks and levels, with their graph.
        limit: above 0.
        mean: the mean of the sizes so far. It takes this size too, unclipped.
        factor: the weight of ``R`` on this call. The size is divided by it, so that schedules
            don't count.
        scale: what the gradient is multiplied with until the backward pass, for float16.
    """
    leaves = [s.detach().requires_grad_() for s in saliencies]
    with torch.enable_grad():
        value, rest = regularizer(leaves)
    seed = torch.ones_like(value) if scale is None else scale.to(value.dtype)
    grads = torch.autograd.grad(value, leaves, seed)
    with torch.no_grad():
        size = (norm(grads) * norm(leaves) / (seed * factor)).float()
        share = 1 / seed
        if has_values(size):
            bound = limit * mean.value(size.device, torch.inf)
            share = share * (bound / size).where(size > bound, 1)  # a NaN stays in the gradient
            mean.observe(size)
    return _WithGradient.apply(value.detach(), share, len(grads), *grads, *saliencies), rest


class _WithGradient(torch.autograd.Function):
    """``value`` as a function of the saliencies; its gradient is ``share * grads``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, share: Tensor, count: int, *tensors: Tensor) -> Tensor:
        grads = tensors[:count]
        ctx.shapes = [g.shape for g in grads]
        ctx.save_for_backward(share, *map(unexpanded, grads))
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        share, *grads = ctx.saved_tensors
        factor = incoming * share
        of_saliencies = [(g * factor).expand(s) for g, s in zip(grads, ctx.shapes, strict=True)]
        return None, None, None, *(None for _ in grads), *of_saliencies
