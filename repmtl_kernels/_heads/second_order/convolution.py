"""Convolution of any kind with an efficient double backward.

The output, the gradient of the input and the gradient of the weight are three bilinear maps. The
derivatives of each map are the other two. So derivatives of every order are made of the library's
own convolutions, and each is computed only where it is asked for. PyTorch's double backward
computes the weight's gradient as a convolution whose kernel is the output's gradient, which no
library is fast at. Under ``vmap`` the maps are PyTorch's nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from repmtl_kernels._ground import torch_private
from repmtl_kernels._ground.saliency import without_autocast
from repmtl_kernels._heads.second_order.engine import gradients_needed, not_a_leaf


class Geometry(NamedTuple):
    """The arguments of ``aten.convolution`` after input, weight and bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def convolution(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``aten.convolution`` of a batch."""
    if torch_private.is_transform_active():
        return _output(geometry, x, weight, bias)
    return Output.apply(geometry, not_a_leaf(x), not_a_leaf(weight), not_a_leaf(bias))


class Output(Function):
    """From ``x``, ``weight`` and ``bias`` to the output."""

    @staticmethod
    def forward(ctx, geometry, x, weight, bias):
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        ctx.save_for_backward(x, weight)
        return _output(geometry, x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        _, for_x, for_weight, for_bias = gradients_needed(ctx)
        if grad is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        all_but_channels = [0, *range(2, grad.ndim)]
        return (
            None,
            _input_gradient(ctx.geometry, grad, weight, x) if for_x else None,
            _weight_gradient(ctx.geometry, grad, x, weight) if for_weight else None,
            grad.sum(all_but_channels) if for_bias else None,
        )


class InputGradient(Function):
    """From ``grad`` and ``weight`` to the gradient of the input; ``like`` has the input's form."""

    @staticmethod
    def forward(ctx, geometry, grad, weight, like):
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        ctx.save_for_backward(grad, weight)
        return _backward(geometry, grad, like, weight, 0)

    @staticmethod
    def backward(ctx, v):
        _, for_grad, for_weight, _ = gradients_needed(ctx)
        if v is None:
            return None, None, None, None
        grad, weight = ctx.saved_tensors
        return (
            None,
            convolution(ctx.geometry, v, weight, None) if for_grad else None,
            _weight_gradient(ctx.geometry, grad, v, weight) if for_weight else None,
            None,
        )


class WeightGradient(Function):
    """From ``grad`` and ``x`` to the gradient of the weight; ``like`` has the weight's form."""

    @staticmethod
    def forward(ctx, geometry, grad, x, like):
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        ctx.save_for_backward(grad, x)
        return _backward(geometry, grad, x, like, 1)

    @staticmethod
    def backward(ctx, v):
        _, for_grad, for_x, _ = gradients_needed(ctx)
        if v is None:
            return None, None, None, None
        grad, x = ctx.saved_tensors
        return (
            None,
            convolution(ctx.geometry, x, v, None) if for_grad else None,
            _input_gradient(ctx.geometry, grad, v, x) if for_x else None,
            None,
        )


def _input_gradient(geometry: Geometry, grad: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    if torch_private.is_transform_active():
        return _backward(geometry, grad, like.detach(), weight, 0)
    return InputGradient.apply(geometry, not_a_leaf(grad), not_a_leaf(weight), like.detach())


def _weight_gradient(geometry: Geometry, grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
    if torch_private.is_transform_active():
        return _backward(geometry, grad, x, like.detach(), 1)
    return WeightGradient.apply(geometry, not_a_leaf(grad), not_a_leaf(x), like.detach())


def _output(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with without_autocast(x.device):  # on CUDA it would cast the operands of a backward
        return torch.ops.aten.convolution(x, weight, bias, *geometry)


def _backward(geometry: Geometry, grad: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
    mask = [which == i for i in range(3)]
    backward = torch.ops.aten.convolution_backward
    return backward(grad, x, weight, None, *geometry, mask)[which]
