"""Batch norm, fused with the ReLU that follows it, with a closed-form double backward.

The forward is PyTorch's own. The forward, its gradient and the gradient of that are one node each.
Derivatives beyond these, and all of them under ``vmap``, are PyTorch's own, of the formula in
elementary operations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import Node
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from repmtl_kernels._ground import torch_private
from repmtl_kernels._ground.saliency import accumulation_dtype
from repmtl_kernels._heads.second_order import choice
from repmtl_kernels._heads.second_order.engine import gradients_needed, not_a_leaf


class Operands(NamedTuple):
    """The arguments that a batch norm was computed from."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor
    training: bool


class Made(NamedTuple):
    """How an output of :func:`batch_norm` was made."""

    operands: Operands
    node: Node


# Outputs of batch norm that can be reached and have their graph: a ReLU can be fused with these.
_made = WeakTensorKeyDictionary()


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Return ``torch.nn.functional.batch_norm`` of arguments that are checked already."""
    precise = accumulation_dtype(x.dtype)
    with torch.no_grad():
        result, mean, invstd = torch_private.batch_norm_forward(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
        if not training:
            assert running_mean is not None and running_var is not None
            mean, invstd = running_mean, torch.rsqrt(running_var.to(precise) + eps)
        statistics = mean.to(precise), invstd.to(precise)
    operands = Operands(not_a_leaf(x), not_a_leaf(weight), not_a_leaf(bias), *statistics, training)
    y = BatchNorm.apply([result], *operands)
    y.grad_fn.output = TensorWeakRef(y)
    _made[y] = Made(operands, y.grad_fn)
    return y


def relu(y: Tensor, inplace: bool) -> Tensor | None:
    """Return the ReLU of an output of :func:`batch_norm`, as one node with the batch norm.

    None where ``y`` is no such output. A caller who asks for the gradient at ``y`` still gets it:
    hooks on ``y`` prevent the fusion, and as long as the caller keeps ``y``, the gradient passes
    through it.
    """
    made = _made.get(y)
    if (
        made is None
        or y.grad_fn is not made.node
        or torch_private.backward_hooks(y)
        or y.retains_grad
    ):
        return None
    if inplace:
        del _made[y]
    return BatchNormReLU.apply(None if inplace else TensorWeakRef(y), y, *made.operands)


class BatchNorm(Function):
    """From the batch norm's operands to its output, which is computed already."""

    @staticmethod
    def forward(ctx, result, x, weight, bias, mean, invstd, training):
        ctx.set_materialize_grads(False)
        ctx.training = training
        ctx.save_for_backward(x, weight, mean, invstd)
        return result[0]

    @staticmethod
    def backward(ctx, grad):
        needs = tuple(gradients_needed(ctx)[1:4])
        y = ctx.output()
        if y is not None and not torch_private.keeps_graph():
            _made.pop(y, None)  # frees its operands together with the graph
        if grad is None:
            return (None,) * 7
        gradients = _gradients(ctx.training, needs, grad, *ctx.saved_tensors)
        return None, *gradients, None, None, None


class BatchNormReLU(Function):
    """From the batch norm's operands to the output of the ReLU.

    ``kept`` refers to the batch norm's output ``y``; it is None where the ReLU is in place.
    """

    @staticmethod
    def forward(ctx, kept, y, x, weight, bias, mean, invstd, training):
        ctx.set_materialize_grads(False)
        ctx.training, ctx.kept = training, kept
        if kept is None:
            ctx.mark_dirty(y)
            output = y.relu_()
        else:
            output = y.relu()
        ctx.save_for_backward(x, weight, mean, invstd, output)
        return output

    @staticmethod
    def backward(ctx, grad):
        needs = tuple(gradients_needed(ctx)[2:5])
        if grad is None:
            return (None,) * 8
        *operands, output = ctx.saved_tensors
        output = output.detach()
        if ctx.kept is not None and ctx.kept() is not None:
            through = torch.ops.aten.threshold_backward(grad, output, 0)
            return None, through, *(None,) * 6
        gradients = _gradients(ctx.training, needs, grad, *operands, output=output)
        return None, None, *gradients, None, None, None


def _gradients(training, needs, grad, x, weight, mean, invstd, *, output=None):
    """Return the gradients of x, weight and bias that are needed."""
    if torch_private.is_transform_active():
        gradients = _first_gradient(training, grad, x, weight, mean, invstd, output)
        return _only(needs, gradients)
    operands = not_a_leaf(grad), x, weight, mean, invstd, output
    return BatchNormGradient.apply(training, needs, *operands)


class BatchNormGradient(Function):
    """The gradients of x, weight and bias; see ``contract.py``."""

    @staticmethod
    def forward(ctx, training, needs, grad, x, weight, mean, invstd, output):
        ctx.set_materialize_grads(False)
        ctx.training = training
        operands = grad, x, weight, mean, invstd, output
        ctx.save_for_backward(*operands)
        return choice.load(x).batch_norm_backward(*operands, training, needs)

    @staticmethod
    def backward(ctx, *vectors):
        needs = tuple(gradients_needed(ctx)[2:5])
        if all(vector is None for vector in vectors):
            return (None,) * 8
        if torch_private.is_transform_active():
            second = _second_gradient_of_rows(ctx.training, vectors, *ctx.saved_tensors)
            gradients = _only(needs, second)
        else:
            operands = *map(not_a_leaf, vectors), *ctx.saved_tensors
            gradients = BatchNormSecondGradient.apply(ctx.training, needs, *operands)
        return None, None, *gradients, None, None, None


class BatchNormSecondGradient(Function):
    """The gradients of grad, x and weight; see ``contract.py``."""

    @staticmethod
    def forward(ctx, training, needs, v, p, q, grad, x, weight, mean, invstd, output):
        ctx.set_materialize_grads(False)
        ctx.training, ctx.needs = training, needs
        operands = v, p, q, grad, x, weight, mean, invstd, output
        ctx.save_for_backward(*operands)
        return choice.load(x).batch_norm_double_backward(*operands, training, needs)

    @staticmethod
    def backward(ctx, *vectors):
        *operands, mean, invstd, output = ctx.saved_tensors
        needs = gradients_needed(ctx)[2:8]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Separate inputs: in the outer graph they may depend on each other.
            operands = [None if t is None else _separate(t) for t in operands]
            second = _second_gradient(ctx.training, operands, mean, invstd, output)
            targets = [t for t, need in zip(operands, needs, strict=True) if need]
            outputs = _only(ctx.needs, second)
            gradients = iter(_vector_jacobian(outputs, targets, vectors, create_graph))
        return None, None, *(next(gradients) if need else None for need in needs), None, None, None


def _only(needs, gradients):
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


def _first_gradient(training, grad, x, weight, mean, invstd, output):
    """Compute ``batch_norm_backward`` in operations that PyTorch can differentiate."""
    over, column = [0, *range(2, x.ndim)], [-1, *[1] * (x.ndim - 2)]
    g, z = grad.to(mean.dtype), x.to(mean.dtype)
    if output is not None:
        g = torch.ops.aten.threshold_backward(g, output, 0)
    if training:
        z = z - z.mean(over, keepdim=True)
        variance = z.square().mean(over)
        eps = (invstd.pow(-2) - variance).detach()
        invstd = torch.rsqrt(variance + eps)
    else:
        z = z - mean.view(column)
    z = z * invstd.view(column)
    scale = invstd if weight is None else weight * invstd
    along = (g * z).sum(over)
    grad_bias = g.sum(over)
    if training:
        g = g - g.mean(over, keepdim=True) - z * (g * z).mean(over, keepdim=True)
    of_weight = mean.dtype if weight is None else weight.dtype
    return (g * scale.view(column)).to(x.dtype), along.to(of_weight), grad_bias.to(of_weight)


def _second_gradient(training, operands, mean, invstd, output):
    """Compute ``batch_norm_double_backward``, in the same way."""
    v, p, q, grad, x, weight = operands
    first = _first_gradient(training, grad, x, weight, mean, invstd, output)
    targets = [grad, x] if weight is None else [grad, x, weight]
    gradients = _vector_jacobian(first, targets, (v, p, q), True)
    return (*gradients, None) if weight is None else gradients


def _second_gradient_of_rows(training, vectors, grad, x, weight, *rest):
    """Compute the same under ``vmap``, where tensors get gradients from ``torch.func`` alone."""

    def first(grad, x, weight=None):
        return _first_gradient(training, grad, x, weight, *rest)

    targets = (grad, x) if weight is None else (grad, x, weight)
    outputs, vector_jacobian = torch.func.vjp(first, *targets)[:2]
    pairs = zip(vectors, outputs, strict=True)
    gradients = vector_jacobian(tuple(torch.zeros_like(y) if v is None else v for v, y in pairs))
    return (*gradients, None) if weight is None else gradients


def _vector_jacobian(outputs, inputs, vectors, create_graph):
    """Return the gradients of the outputs that have a vector, at all inputs."""
    pairs = [
        (output, vector.to(output.dtype))
        for output, vector in zip(outputs, vectors, strict=True)
        if vector is not None and output is not None and output.requires_grad
    ]
    if not pairs or not inputs:
        return (None,) * len(inputs)
    outputs, vectors = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, inputs, vectors, create_graph=create_graph, allow_unused=True
    )


def _separate(tensor: Tensor) -> Tensor:
    """Return the same values as a separate input, which is still connected to the outer graph."""
    if tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()
