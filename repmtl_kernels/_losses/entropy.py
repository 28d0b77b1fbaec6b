"""TSR of position means: the entropy stage with a floor and a mask around it."""

from __future__ import annotations

import math

from torch import Tensor

from repmtl_kernels._ground.saliency import eps_or_zero
from repmtl_kernels._losses.options import TsrOptions
from repmtl_kernels.backends.contract import Entropy, Stages


def entropy_of_means(
    stages: Stages, options: TsrOptions, x: Tensor, mask: Tensor | None, *, with_grad: bool
) -> Entropy:
    """Return TSR of ``x`` (T, B, N) and its gradient; with a floor, of ``|x| + floor * mean |x|``.

    With a mask, ``x`` is 0 at the positions that do not exist. The gradient there is meaningless,
    and the backward pass leaves it out.
    """
    floor = options.floor
    if not floor:
        value, grad = _stage(stages, options, x, mask, with_grad)
    else:
        magnitude = x.abs()
        raised = magnitude + floor * _mean_of_positions(magnitude, mask)
        value, grad = _stage(stages, options, raised, mask, with_grad)
        if grad is not None:
            grad = (grad + floor * _mean_of_positions(grad, mask)) * x.sign()
    if mask is None or options.over == "space":
        return Entropy(value, grad)
    # The stage divides by all positions.
    factor = mask.numel() / mask.sum().clamp_min(1).to(x.dtype)
    return Entropy(value * factor, None if grad is None else grad * factor)


def _stage(
    stages: Stages, options: TsrOptions, x: Tensor, mask: Tensor | None, with_grad: bool
) -> Entropy:
    return stages.entropy(
        _without_others(options, x, mask),
        over=options.over,
        normalizer=options.normalizer,
        temperature=options.temperature,
        eps=eps_or_zero(options.eps, x.dtype),
        with_grad=with_grad,
    )


def _mean_of_positions(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of ``values`` (T, B, N) over all tasks and the positions that exist."""
    if mask is None:
        return values.mean()
    count = len(values) * mask.sum().clamp_min(1)
    return values.where(mask, 0).sum() / count


def _without_others(options: TsrOptions, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x`` (T, B, N) such that the positions that do not exist add nothing to the loss.

    Over space, distributions don't contain them. Over tasks, their distributions have entropy 0.
    """
    if mask is None:
        return x
    if options.normalizer == "abs":
        return x.where(mask, 0)
    x = x.masked_fill(~mask, -math.inf)
    # A distribution without any element gets one, with all of the probability.
    if options.over == "tasks":
        x[0].masked_fill_(~mask, 0)
    else:
        x[:, :, 0].masked_fill_(~mask.any(1), 0)
    return x
