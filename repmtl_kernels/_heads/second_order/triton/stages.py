"""Both functions of the contract as launches of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels._heads.second_order.contract import Gradients, MaybeTensor, Needs
from repmtl_kernels._heads.second_order.triton.apply import _batch_norm_apply_kernel
from repmtl_kernels._heads.second_order.triton.coefficients import (
    _batch_norm_backward_finish_kernel,
    _batch_norm_double_backward_finish_kernel,
)
from repmtl_kernels._heads.second_order.triton.sums import _batch_norm_sums_kernel
from repmtl_kernels._heads.second_order.triton.walk import DEEP, memory_of, walk_of


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    output: Tensor | None,
    training: bool,
    needs: Needs,
) -> Gradients:
    """See ``contract.py``."""
    need_x, need_weight, need_bias = needs
    x, memory = _dense(x)
    grad, output = _laid_out_as(x, grad), _laid_out_as(x, output)
    weight, mean, invstd = _contiguous(weight), _contiguous(mean), _contiguous(invstd)
    walk = walk_of(memory, x.element_size(), x.device)
    sum_x = need_weight or (training and need_x)
    sum_g = need_bias or sum_x
    parts = walk.parts() if sum_g else None
    if sum_g:
        walk.launch(
            _batch_norm_sums_kernel,
            grad,
            output,
            x if sum_x else None,
            None,
            mean,
            parts,
            DEEP=DEEP,
        )
    coefficients = walk.empty(7)
    parameters = mean if weight is None else weight
    grad_weight = torch.empty_like(parameters) if need_weight else None
    grad_bias = torch.empty_like(parameters) if need_bias else None
    walk.finish(
        _batch_norm_backward_finish_kernel,
        parts,
        weight,
        invstd,
        coefficients,
        grad_weight,
        grad_bias,
        TRAINING=training,
        G=sum_g,
        X=sum_x,
    )
    grad_x = None
    if need_x:
        grad_x = torch.empty_like(x)
        walk.launch(
            _batch_norm_apply_kernel,
            grad,
            output,
            x if training else None,
            None,
            mean,
            coefficients,
            None,
            grad_x,
            TRAINING=training,
        )
    return grad_x, grad_weight, grad_bias


def batch_norm_double_backward(
    grad_grad_x: Tensor | None,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    output: Tensor | None,
    training: bool,
    needs: Needs,
) -> Gradients:
    """See ``contract.py``."""
    need_grad, need_x, need_weight = needs
    x, memory = _dense(x)
    grad, output = _laid_out_as(x, grad), _laid_out_as(x, output)
    ggx = _laid_out_as(x, grad_grad_x)
    weight, mean, invstd = _contiguous(weight), _contiguous(mean), _contiguous(invstd)
    ggw, ggb = _contiguous(grad_grad_weight), _contiguous(grad_grad_bias)
    walk = walk_of(memory, x.element_size(), x.device)
    # Where the differentiated results don't depend on x, grad_x is 0.
    x_matters = ggw is not None or (training and ggx is not None)
    write_x = need_x and x_matters
    sum_g = need_weight and ggx is not None
    sum_u, sum_x = sum_g, False
    if training:
        sum_g = sum_g or write_x
        sum_u = ggx is not None and (need_grad or sum_g)
        sum_x = sum_g or sum_u
    parts = walk.parts() if sum_g or sum_u else None
    if parts is not None:
        walk.launch(
            _batch_norm_sums_kernel,
            grad if sum_g else None,
            output if sum_g else None,
            x if sum_x else None,
            ggx if sum_u else None,
            mean,
            parts,
            DEEP=DEEP,
        )
    coefficients = walk.empty(7)
    parameters = mean if weight is None else weight
    grad_weight = torch.empty_like(parameters) if need_weight else None
    walk.finish(
        _batch_norm_double_backward_finish_kernel,
        parts,
        weight,
        invstd,
        ggw,
        ggb,
        coefficients,
        grad_weight,
        TRAINING=training,
        G=sum_g,
        U=sum_u,
        X=sum_x,
    )
    grad_of_grad = torch.empty_like(grad) if need_grad else None
    grad_x = torch.empty_like(x) if write_x else None
    if need_grad or write_x:
        walk.launch(
            _batch_norm_apply_kernel,
            grad if write_x else None,
            output,
            x if x_matters and (need_grad or training) else None,
            ggx if need_grad or training else None,
            mean,
            coefficients,
            grad_of_grad,
            grad_x,
            TRAINING=training,
        )
    if need_x and not x_matters:
        grad_x = torch.zeros_like(x)
    return grad_of_grad, grad_x, grad_weight


def _dense(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Return ``x``, or a copy where it has gaps, and its :func:`memory_of`."""
    x = x.resolve_neg()
    memory = memory_of(x)
    if memory is None:
        x = x.clone()
        memory = memory_of(x)
        assert memory is not None  # a clone has no gaps
    return x, memory


def _laid_out_as(x: Tensor, other: MaybeTensor) -> MaybeTensor:
    """Return ``other`` in the memory layout of ``x``.

    Kernels read both by the same offsets, 16 bytes at a time. A copy is made of an expanded
    gradient alone, or of one that a layer sends back in another layout than it got.
    """
    if other is None:
        return other
    other = other.resolve_neg()
    if _same_strides(x, other):
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


def _contiguous(values: MaybeTensor) -> MaybeTensor:
    """Return the values of channels contiguous: the gradient of a parameter may be expanded."""
    return values if values is None else values.resolve_neg().contiguous()


def _same_strides(x: Tensor, other: Tensor) -> bool:
    strides = zip(x.shape, x.stride(), other.stride(), strict=True)
    return all(mine == others for size, mine, others in strides if size > 1)
