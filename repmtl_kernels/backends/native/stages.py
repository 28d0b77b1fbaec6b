"""The stages with the compiled operators of ``csrc``. Contract: ``contract.py``.

PyTorch computes the large matrix products, in float32 with the precision that it is set to. Each
operator between two products reads its data once. On CUDA the operators ``losses`` and
``losses_backward`` run all stages in one call.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from repmtl_kernels.backends.contract import (
    AllSamples,
    Anchors,
    Contrast,
    CSAGradient,
    Entropy,
    Gram,
    Statistics,
    TSRGradient,
)
from repmtl_kernels.backends.eager import contrast as eager_contrast
from repmtl_kernels.backends.eager import gradient as eager_gradient
from repmtl_kernels.backends.eager import gram as eager_gram
from repmtl_kernels.backends.eager.values import values
from repmtl_kernels.backends.native import library as native_library

__all__ = [
    "affinity",
    "anchors",
    "contrast",
    "entropy",
    "gram",
    "in_one_call",
    "saliency_grad",
    "statistics",
    "values",
]

MOST_SMALL_TASKS = 64  # kSmallTasks of csrc


def ops_of(x: Tensor) -> ModuleType:
    """Return the operators for a tensor's device."""
    if x.dtype == torch.float16 and _on_cuda(x):
        _check_fp16_products()
    return native_library.load(native_library.library_of(x))


def _check_fp16_products() -> None:
    """Raise if PyTorch may add float16 products in float16: it then has no float32 results."""
    if torch.backends.cuda.matmul.allow_fp16_accumulation:
        raise ValueError(
            "torch.backends.cuda.matmul.allow_fp16_accumulation: expected False for float16 "
            "saliencies with backend='native'; got True"
        )


def in_one_call(saliency: Tensor) -> ModuleType | None:
    """Return the operators ``losses`` and ``losses_backward``, or None on the CPU."""
    return ops_of(saliency) if _on_cuda(saliency) else None


def _on_cuda(x: Tensor) -> bool:
    return native_library.library_of(x) == "cuda"


def statistics(
    saliencies: list[Tensor], *, positions: bool, channels: bool, mask: Tensor | None = None
) -> Statistics:
    """Return the means that are asked for, and the scale with ``channels``."""
    x, a, scale = ops_of(saliencies[0]).statistics(saliencies, positions, channels, mask)
    return Statistics(x if positions else None, *((a, scale) if channels else (None, None)))


def affinity(saliencies: list[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """Return the inner products (B, T, T) of the tasks' saliencies."""
    return ops_of(saliencies[0]).affinity(saliencies, mask)


def entropy(
    x: Tensor, *, over: str, normalizer: str, temperature: float, eps: float, with_grad: bool
) -> Entropy:
    """Return TSR of the position means ``x`` (T, B, N), and its gradient."""
    over_tasks, softmax = over == "tasks", normalizer == "softmax"
    value, grad = ops_of(x).entropy(
        x.contiguous(), over_tasks, softmax, temperature, eps, with_grad
    )
    return Entropy(value, grad if with_grad else None)


def anchors(a: Tensor, *, eps: float, with_grad: bool) -> Anchors:
    """Return the unit anchors of the channel means ``a`` (T, B, C)."""
    unit, factor, radial = ops_of(a).unit_anchors(a.contiguous(), eps, with_grad)
    return Anchors(unit, factor, radial if with_grad else None)


def contrast(
    anchors: Anchors,
    *,
    temperature: float,
    with_grad: bool,
    all_samples: AllSamples | None = None,
) -> Contrast:
    """Return the negatives' half of CSA, in blocks of samples."""
    u, ops = anchors.unit, ops_of(anchors.unit)
    others, first = (u, 0) if all_samples is None else all_samples[:2]
    tasks, batch, _ = u.shape
    total = others.shape[1]
    most = eager_contrast.products_at_a_time(others.numel())
    step = max(1, most // (tasks * tasks * total))
    blocks = range(0, batch, step)

    def dots_of(b: int) -> Tensor:
        """Return the products (T, M, T, G) of one block of samples with all samples."""
        return _products(u[:, b : b + step], others)

    columns = u.new_zeros(2, total) if with_grad else None
    block_lse, rows = [], []
    for b in blocks:
        dots = dots_of(b)
        lse, peaks = ops.log_sum_exp(dots, first + b, temperature, columns)
        block_lse.append(lse)
        rows.append(peaks)
    lse = torch.cat(block_lse)
    if columns is None:
        return Contrast(lse, None)

    if all_samples is not None:
        columns = all_samples.join(columns)
    du = torch.empty_like(u)
    for b, peaks in zip(blocks, rows, strict=True):
        if len(blocks) > 1:  # otherwise `dots` still holds them
            dots = dots_of(b)
        ops.weigh_dots(dots, peaks, columns, first + b, temperature)
        du[:, b : b + step] = _weighted_sums(dots, others)
    ops.through_normalisation(du, u, anchors.factor, anchors.radial)
    return Contrast(lse, du)


def _products(x: Tensor, others: Tensor) -> Tensor:
    """Return the products (T, M, T, G) of x (T, M, C) with ``others`` (T, G, C)."""
    tasks, samples, channels = x.shape
    shape = (tasks, samples, tasks, others.shape[1])
    if others.is_contiguous():
        return torch.matmul(x, others.view(-1, channels).T).view(shape)
    # Task by task and in place, since gathered anchors are too large for a copy.
    products, x = x.new_empty(shape), x.reshape(-1, channels)
    for v, other in enumerate(others):
        torch.mm(x, other.T, out=products.view(-1, *shape[2:])[:, v])
    return products


def _weighted_sums(weights: Tensor, others: Tensor) -> Tensor:
    """Return the sums (T, M, C) of ``others`` (T, G, C) with weights (T, M, T, G)."""
    if others.is_contiguous():
        flat = others.view(-1, others.shape[2])
        return torch.matmul(weights.flatten(2), flat)
    weights = weights.flatten(0, 1)
    sums = weights[:, 0] @ others[0]
    for weight, other in zip(weights.unbind(1)[1:], others[1:], strict=True):
        sums.addmm_(weight, other)
    return sums.view(len(others), -1, others.shape[2])


def gram(
    saliencies: list[Tensor],
    scale: Tensor,
    anchors: Tensor,
    *,
    eps: float,
    with_grad: bool,
    mask: Tensor | None = None,
) -> Gram:
    """Return the similarity of each task's affinity with its anchor."""
    first, ops = saliencies[0], ops_of(saliencies[0])
    if _on_cuda(first):
        *similarities, projection, matrix = ops.gram(
            saliencies, scale, anchors, eps, with_grad, mask
        )
        return Gram(*similarities, *((projection, matrix) if with_grad else (None, None)))
    if not _is_small(len(saliencies), first.shape[1], first.shape[2:].numel(), first.dtype):
        return eager_gram.gram(saliencies, scale, anchors, eps=eps, with_grad=with_grad, mask=mask)
    norm, positive, projection, matrix = ops.small_gram(saliencies, scale, anchors, with_grad, mask)
    stored = (projection, matrix) if with_grad else (None, None)
    return eager_gram.gram_of(norm, positive, scale, eps, *stored)


@functools.cache
def small_positions() -> range:
    """Return the numbers of positions for which our products on the CPU beat the library's.

    They are few. A single one has its own sums over the channels.
    """
    return range(1, 65) if native_library.load("cpu").small_products_are_fast() else range(0)


def _is_small(tasks: int, channels: int, positions: int, dtype: torch.dtype) -> bool:
    few = positions in small_positions() and positions <= channels and tasks <= MOST_SMALL_TASKS
    return few and dtype == torch.float32


def saliency_grad(
    saliencies: list[Tensor],
    outputs: list[Tensor | None],
    csa: CSAGradient,
    tsr: TSRGradient | None,
    mask: Tensor | None = None,
) -> None:
    """Write the gradient of each task to ``outputs``."""
    first, ops = saliencies[0], ops_of(saliencies[0])
    operator = None
    if _on_cuda(first):
        operator = ops.saliency_grad
    elif _is_small(len(saliencies), first.shape[1], first.shape[2:].numel(), first.dtype):
        operator = ops.small_gradient
    if operator is not None:
        wanted = [t for t, output in enumerate(outputs) if output is not None]
        coefficients = csa.coefficients()
        operator(
            saliencies,
            [outputs[t] for t in wanted],
            wanted,
            csa.scale,
            csa.anchors.unit,
            csa.anchors.factor,
            csa.anchors.radial,
            csa.contrast_grad,
            csa.gram.projection,
            csa.gram.matrix,
            coefficients.anchor_weight,
            coefficients.affinity_weight,
            coefficients.radial_weight,
            coefficients.negatives,
            None if tsr is None else tsr.of_channel(first.shape[1], mask),
            mask,
        )
        return
    for term in eager_gradient.gradient_terms(saliencies, outputs, csa, tsr, mask):
        dx = None if term.dx is None else term.dx.contiguous()
        rest = term.da.contiguous(), dx, term.left.contiguous(), term.right, term.output
        rows, transposed = eager_gradient.rows_of(term.output)
        a, b = (term.b.mT, term.a.mT) if transposed else (term.a, term.b)
        if rows is not None and rows.dtype == a.dtype:
            ops.add_outer(None, transposed, *rest)
            rows.baddbmm_(a, b)
        else:
            ops.add_outer(torch.bmm(a, b), transposed, *rest)
