"""The arithmetic in plain PyTorch: ATen's own fused batch-norm kernels, few passes over memory.

``native_batch_norm_backward`` computes the projection of the formulas in ``contract.py`` and, on
its way, two sums: ``sum grad ^x`` and ``sum grad``. With another mean and scale these give every
sum that is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels._heads.second_order.contract import Gradients, MaybeTensor, Needs


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
    precise = mean.dtype
    of_weight = precise if weight is None else weight.dtype
    grad = _masked(grad.to(precise), output)
    grad_x, grad_weight, grad_bias = _project(
        grad, x.to(precise), _cast(weight, precise), mean, invstd, training, needs
    )
    return _cast(grad_x, x.dtype), _cast(grad_weight, of_weight), _cast(grad_bias, of_weight)


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
    precise = mean.dtype
    of_grad, of_x, of_weight = grad.dtype, x.dtype, precise if weight is None else weight.dtype
    v, p, q = (_cast(t, precise) for t in (grad_grad_x, grad_grad_weight, grad_grad_bias))
    g, x, w = grad.to(precise), x.to(precise), _cast(weight, precise)
    scale = invstd if w is None else w * invstd
    need_grad, need_x, need_weight = needs
    grad_of_grad = grad_x = grad_weight = None
    zero = torch.zeros_like(mean)
    v_x, v_sum, product = zero, zero, zero  # V, sum v and A; in eval A is sum g v

    if v is not None and training:
        grad_of_grad, *sums = _project(v, x, w, mean, invstd, True, (need_grad, True, True))
        v_x, v_sum = map(_present, sums)
    elif v is not None and need_grad:
        grad_of_grad = v * _per_channel(scale, v)
    if need_grad:
        if p is not None or q is not None:
            slope = zero if p is None else p * invstd
            rest = _affine(x, mean, slope, zero if q is None else q)
            grad_of_grad = rest if grad_of_grad is None else grad_of_grad.add_(rest)
        grad_of_grad = _masked(grad_of_grad, output)

    if need_x or need_weight:
        g = _masked(g, output)
        count = x.numel() // x.shape[1]
        g_x, g_sum = _sums(g, x, mean, invstd) if training else (zero, zero)
        if v is not None:
            product = _dot(g, v) - (g_sum * v_sum + g_x * v_x) / count
    if need_weight:
        grad_weight = invstd * product
    if need_x and training:
        # P(v_factor v + g_factor g), written out with the last term of the formula.
        v_factor = -scale * g_x / count
        g_factor = -scale * v_x / count if p is None else p - scale * v_x / count
        along_x = -(v_factor * v_x + g_factor * g_x + scale * product) / count
        constant = -(v_factor * v_sum + g_factor * g_sum) / count
        grad_x = _affine(x, mean, invstd * invstd * along_x, invstd * constant)
        grad_x.addcmul_(g, _per_channel(invstd * g_factor, x))
        if v is not None:
            grad_x.addcmul_(v, _per_channel(invstd * v_factor, x))
    elif need_x:
        grad_x = torch.zeros_like(x) if p is None else g * _per_channel(p * invstd, x)
    return _cast(grad_of_grad, of_grad), _cast(grad_x, of_x), _cast(grad_weight, of_weight)


def _masked(grad: MaybeTensor, output: Tensor | None) -> MaybeTensor:
    """Return the gradient that passes the ReLU, or ``grad`` itself where there is none."""
    if grad is None or output is None:
        return grad
    return torch.ops.aten.threshold_backward(grad, output, 0)


def _project(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    needs: Needs,
) -> Gradients:
    """Return the gradients of x, weight and bias of batch norm without ReLU."""
    running = (None, None) if training else (mean, invstd.pow(-2))
    batch = (mean, invstd) if training else (None, None)
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(grad, x, weight, *running, *batch, training, 0.0, list(needs))


def _sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum grad (x - mean) invstd`` and ``sum grad`` over all but the channels."""
    _, along_x, total = _project(grad, x, None, mean, invstd, True, (False, True, True))
    return _present(along_x), _present(total)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return ``sum a b`` over all but the channels, in one pass that keeps no product."""
    ones = a.new_ones(a.shape[1])
    zeros = torch.zeros_like(ones)
    return _present(_project(a, b, None, zeros, ones, True, (False, True, False))[1])


def _affine(x: Tensor, mean: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """Return ``slope (x - mean) + shift``, in one pass."""
    ones = torch.ones_like(mean)
    return torch.native_batch_norm(x, slope, shift, mean, ones, False, 0.0, 0.0)[0]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))


def _present(gradient: Tensor | None) -> Tensor:
    """Return a gradient that was asked for."""
    assert gradient is not None
    return gradient


def _cast(tensor: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    return tensor if tensor is None else tensor.to(dtype)
