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
    """``regularizer(saliencies)``, with ``||dR/dS|| ||S||`` at most ``limit`` times its mean.

    The gradient ``dR/dS`` is taken here and now, and kept for the backward pass: what else is done
    there does not matter. The norms are over the saliencies of all tasks; their product does not
    depend on the scale of the losses. The first observation is never above the limit.

    Args:
        regularizer: gives ``R`` and more, from saliencies that it does not keep.
        saliencies: of all tasks and levels, with their graph.
        mean: of the sizes so far; takes this one, unclipped.
        factor: ``R``'s weight on this call, which the size is divided by: schedules don't count.
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
    """``value``, as a function of the saliencies whose gradient is ``share * grads``."""

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
