"""The stages in plain PyTorch: ATen's own fused batch-norm kernels, few passes over memory.

``native_batch_norm_backward`` is the projection of the formulas in ``stages.py`` and, on its way,
two sums: ``sum grad ^x`` and ``sum grad``. With another mean and scale these give every sum needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

Triple = tuple[Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool]


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    output: Tensor | None,
    training: bool,
    needs: Needs,
) -> Triple:
    """See ``stages.py``."""
    precise = mean.dtype
    of_weight = precise if weight is None else weight.dtype
    grad = _masked(grad.to(precise), output)
    found = _project(grad, x.to(precise), _cast(weight, precise), mean, invstd, training, needs)
    return _results(found, (x.dtype, of_weight, of_weight))


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
) -> Triple:
    """See ``stages.py``."""
    precise = mean.dtype
    dtypes = grad.dtype, x.dtype, precise if weight is None else weight.dtype
    v, p, q, g, x, w = (
        _cast(t, precise) for t in (grad_grad_x, grad_grad_weight, grad_grad_bias, grad, x, weight)
    )
    scale = invstd if w is None else w * invstd
    of_grad, of_x, of_weight = needs
    grad_of_grad = grad_x = grad_weight = None
    zero = torch.zeros_like(mean)
    v_x, v_sum, product = zero, zero, zero  # V, sum v and A; in eval A is sum g v

    if v is not None and training:
        grad_of_grad, v_x, v_sum = _project(v, x, w, mean, invstd, True, (of_grad, True, True))
    elif v is not None and of_grad:
        grad_of_grad = v * _per_channel(scale, v)
    if of_grad:
        if p is not None or q is not None:
            slope = zero if p is None else p * invstd
            rest = _affine(x, mean, slope, zero if q is None else q)
            grad_of_grad = rest if grad_of_grad is None else grad_of_grad.add_(rest)
        grad_of_grad = _masked(grad_of_grad, output)

    if of_x or of_weight:
        g = _masked(g, output)
        count = x.numel() // x.shape[1]
        g_x, g_sum = _sums(g, x, mean, invstd) if training else (zero, zero)
        if v is not None:
            product = _dot(g, v) - (g_sum * v_sum + g_x * v_x) / count
    if of_weight:
        grad_weight = invstd * product
    if of_x and training:
        # P(of_v v + of_g g), written out with the last term of the formula.
        of_v = -scale * g_x / count
        of_g = -scale * v_x / count if p is None else p - scale * v_x / count
        along_x = -(of_v * v_x + of_g * g_x + scale * product) / count
        constant = -(of_v * v_sum + of_g * g_sum) / count
        grad_x = _affine(x, mean, invstd * invstd * along_x, invstd * constant)
        grad_x.addcmul_(g, _per_channel(invstd * of_g, x))
        if v is not None:
            grad_x.addcmul_(v, _per_channel(invstd * of_v, x))
    elif of_x:
        grad_x = torch.zeros_like(x) if p is None else g * _per_channel(p * invstd, x)
    return _results((grad_of_grad, grad_x, grad_weight), dtypes)


def _masked(grad: Tensor, output: Tensor | None) -> Tensor:
    """What passes the ReLU: a new tensor, or ``grad`` itself where there is none."""
    return grad if output is None else torch.ops.aten.threshold_backward(grad, output, 0)


def _project(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    needs: Needs,
) -> Triple:
    """Gradients of x, weight and bias of batch norm without ReLU."""
    if training:
        statistics = None, None, mean, invstd
    else:
        statistics = mean, invstd.pow(-2), None, None
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(grad, x, weight, *statistics, training, 0.0, list(needs))


def _sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Over all but the channels, ``sum grad (x - mean) invstd`` and ``sum grad``."""
    return _project(grad, x, None, mean, invstd, True, (False, True, True))[1:]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """``sum a b`` over all but the channels, in one pass that keeps no product."""
    ones = a.new_ones(a.shape[1])
    return _project(a, b, None, torch.zeros_like(ones), ones, True, (False, True, False))[1]


def _affine(x: Tensor, mean: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """``slope (x - mean) + shift``, in one pass."""
    ones = torch.ones_like(mean)
    return torch.native_batch_norm(x, slope, shift, mean, ones, False, 0.0, 0.0)[0]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _results(found: Triple, dtypes: tuple[torch.dtype, ...]) -> Triple:
    return tuple(_cast(t, dtype) for t, dtype in zip(found, dtypes, strict=True))
