"""The operator ``repmtl::saliency_affinity``, its gradient, and its forms for ``torch.func``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repmtl_kernels._ground.saliency import (
    canonical_mask,
    canonical_tasks,
    positions_to_saliency,
    without_autocast,
)
from repmtl_kernels._ground.torch_private import is_functorch_wrapped
from repmtl_kernels.backends import choice


def products(
    operands: Sequence[Tensor],
    positions: Tensor | None,
    stacked: bool,
    channel_dim: int,
    backend: str,
) -> Tensor:
    """Return the inner products (B, T, T) of checked operands, float64, differentiable."""
    compiling = torch.compiler.is_compiling()  # no compiler can trace the question
    if not compiling and any(is_functorch_wrapped(s) for s in operands):
        return _Affinity.apply(positions, stacked, channel_dim, backend, *operands)
    return affinity(operands, positions, stacked, channel_dim, backend)


@torch.library.custom_op(
    "repmtl::saliency_affinity",
    mutates_args=(),
    schema="(Tensor[] operands, Tensor? positions, bool stacked, int channel_dim, str backend)"
    " -> Tensor",
)
def affinity(operands, positions, stacked, channel_dim, backend):
    """Return the inner products (B, T, T) of checked operands, float64."""
    stages = choice.load(backend)
    saliencies = canonical_tasks(operands, stacked, channel_dim)
    with without_autocast(saliencies[0].device):
        return stages.affinity(saliencies, mask=canonical_mask(positions))


@affinity.register_fake
def _(operands, positions, stacked, channel_dim, backend):
    saliencies = canonical_tasks(operands, stacked, channel_dim)
    tasks, batch = len(saliencies), saliencies[0].shape[0]
    return saliencies[0].new_empty(batch, tasks, tasks, dtype=torch.float64)


def _set_up_context(ctx, inputs, output):
    operands, positions, stacked, channel_dim, _ = inputs
    ctx.stacked, ctx.channel_dim = stacked, channel_dim
    ctx.save_for_backward(positions, *operands)


def _differentiate(ctx, grad):
    return _gradient(ctx, grad, ctx.needs_input_grad[0]), None, None, None, None


def _gradient(ctx: Any, grad: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients of the operands, None where none is wanted."""
    positions, *operands = ctx.saved_tensors
    tasks = operands[0].unbind(0) if ctx.stacked else operands
    mask = canonical_mask(positions)
    if mask is not None:
        there = positions_to_saliency(mask, tasks[0], ctx.channel_dim)
        tasks = [s.where(there, 0) for s in tasks]
    weights = grad + grad.mT  # a product's two factors are differentiated
    if ctx.stacked:
        return [torch.stack([_row(weights[:, t], tasks) for t in range(len(tasks))])]
    return [_row(weights[:, t], tasks) if w else None for t, w in enumerate(wanted)]


def _row(weights: Tensor, tasks: Sequence[Tensor]) -> Tensor:
    """Return ``sum_u weights[:, u] S_u``, summed in float64: the weights may have no float32."""
    shape = (-1, *[1] * (tasks[0].ndim - 1))
    total = weights[:, 0].view(shape) * tasks[0]
    for u in range(1, len(tasks)):
        total = total + weights[:, u].view(shape) * tasks[u]
    return total.to(tasks[0].dtype)


affinity.register_autograd(_differentiate, setup_context=_set_up_context)


@affinity.register_vmap
def _(info, in_dims, operands, positions, stacked, channel_dim, backend):
    """Fold the mapped dimension into the batch: no sample is compared with another."""
    batch_dim = 1 if stacked else 0
    of_operands, of_positions, *_ = in_dims

    def folded(x: Tensor, dim: int | None, batch_dim: int) -> Tensor:
        moved = x.unsqueeze(batch_dim) if dim is None else x.movedim(dim, batch_dim)
        sizes = list(moved.shape)
        sizes[batch_dim] = info.batch_size
        return moved.expand(sizes).flatten(batch_dim, batch_dim + 1)

    operands = [folded(x, d, batch_dim) for x, d in zip(operands, of_operands, strict=True)]
    if positions is not None:
        positions = folded(positions, of_positions, 0)
    result = affinity(operands, positions, stacked, channel_dim, backend)
    return result.unflatten(0, (info.batch_size, -1)), 0


class _Affinity(torch.autograd.Function):
    """The operator for transforms of ``torch.func``, which know no derivative of an operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(positions, stacked, channel_dim, backend, *operands):
        return affinity(operands, positions, stacked, channel_dim, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        positions, ctx.stacked, ctx.channel_dim, _, *operands = inputs
        ctx.save_for_backward(positions, *operands)

    @staticmethod
    def backward(ctx, grad):
        return None, None, None, None, *_gradient(ctx, grad, ctx.needs_input_grad[4:])
