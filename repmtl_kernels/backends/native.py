"""The stages with the compiled operators of ``csrc``. Contract: ``__init__.py``.

Large matrix products are PyTorch's; what is between them is one pass each. On CUDA the operators
``losses`` and ``losses_backward`` are all stages in one call.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from repmtl_kernels import _native
from repmtl_kernels.backends import Contrast, CSAGradient, Entropy, Gram, Statistics, eager


def ops_of(x: Tensor) -> ModuleType:
    """The operators for a tensor's device."""
    return _native.load(_native.library_of(x))


def in_one_call(saliency: Tensor) -> ModuleType | None:
    """The operators ``losses`` and ``losses_backward``, where there are any."""
    return ops_of(saliency) if _on_cuda(saliency) else None


def _on_cuda(x: Tensor) -> bool:
    return _native.library_of(x) == "cuda"


def statistics(saliencies: list[Tensor], *, positions: bool, channels: bool) -> Statistics:
    x, a, scale = ops_of(saliencies[0]).statistics(saliencies, positions, channels)
    return Statistics(x if positions else None, *((a, scale) if channels else (None, None)))


def entropy(
    x: Tensor, *, over: str, normalizer: str, temperature: float, eps: float, with_grad: bool
) -> Entropy:
    over_tasks, softmax = over == "tasks", normalizer == "softmax"
    value, grad = ops_of(x).entropy(
        x.contiguous(), over_tasks, softmax, temperature, eps, with_grad
    )
    return Entropy(value, grad if with_grad else None)


def contrast(a: Tensor, *, temperature: float, eps: float, with_grad: bool) -> Contrast:
    tasks, batch, channels = a.shape
    ops = ops_of(a)
    u, factor, pull = ops.unit_anchors(a.contiguous(), eps, with_grad)
    rows = u.view(tasks * batch, channels)
    step = max(1, eager.CONTRAST_BLOCK // (tasks * len(rows)))
    blocks = range(0, batch, step)

    def dots_of(b: int) -> Tensor:
        """(T, M, T, B): products of one block of samples with all."""
        block = u[:, b : b + step]
        return torch.matmul(block, rows.T).view(tasks, -1, tasks, batch)

    found = []
    for b in blocks:
        dots = dots_of(b)
        found.append(ops.log_sum_exp(dots, b, temperature))
    lse = torch.cat(found)
    if not with_grad:
        return Contrast(u, factor, lse, None, None)

    du = torch.empty_like(u)
    for b in blocks:
        if len(blocks) > 1:  # else those of above are still there
            dots = dots_of(b)
        ops.weigh_dots(dots, lse, b, temperature)
        du[:, b : b + step] = torch.matmul(dots.view(tasks, -1, len(rows)), rows)
    ops.through_normalisation(du, u, factor, pull)
    return Contrast(u, factor, lse, pull, du)


def gram(
    saliencies: list[Tensor], scale: Tensor, anchors: Tensor, *, eps: float, with_grad: bool
) -> Gram:
    first, ops = saliencies[0], ops_of(saliencies[0])
    if _on_cuda(first):
        *found, projection, matrix = ops.gram(saliencies, scale, anchors, eps, with_grad)
        return Gram(*found, *((projection, matrix) if with_grad else (None, None)))
    if not _is_small(first.shape[1], first.shape[2:].numel(), first.dtype):
        return eager.gram(saliencies, scale, anchors, eps=eps, with_grad=with_grad)
    norm, positive, projection, matrix = ops.small_gram(saliencies, scale, anchors, with_grad)
    stored = (projection, matrix) if with_grad else (None, None)
    return eager.gram_of(norm, positive, scale, eps, *stored)


@functools.cache
def small_positions() -> range:
    """Numbers of positions for which own products on the CPU beat the library's: few, but not a
    vector's padding."""
    return range(16, 65) if _native.load("cpu").small_products_are_fast() else range(0)


def _is_small(channels: int, positions: int, dtype: torch.dtype) -> bool:
    return positions in small_positions() and positions <= channels and dtype == torch.float32


def saliency_grad(
    saliencies: list[Tensor],
    outputs: list[Tensor | None],
    csa: CSAGradient,
    position_grad: Tensor | None,
) -> None:
    ops = ops_of(saliencies[0])
    if _on_cuda(saliencies[0]):
        wanted = [t for t, output in enumerate(outputs) if output is not None]
        ops.saliency_grad(
            saliencies,
            [outputs[t] for t in wanted],
            wanted,
            csa.scale,
            csa.contrast.anchors,
            csa.contrast.factor,
            csa.contrast.pull,
            csa.contrast.grad,
            csa.gram.projection,
            csa.gram.matrix,
            csa.rank,
            csa.curl,
            csa.tug,
            csa.negatives,
            None if position_grad is None else position_grad.contiguous(),
        )
        return
    for term in eager.gradient_terms(saliencies, outputs, csa):
        dx = None if position_grad is None else position_grad[term.task].contiguous()
        rest = term.da.contiguous(), dx, term.left.contiguous(), term.right, term.output
        channels, positions = term.a.shape[1], term.b.shape[2]
        if _is_small(channels, positions, term.output.dtype):
            ops.small_gradient(term.a, term.b, *rest)
            continue
        rows, transposed = eager.rows_of(term.output)
        a, b = (term.b.mT, term.a.mT) if transposed else (term.a, term.b)
        if rows is not None and rows.dtype == a.dtype:
            ops.add_outer(None, transposed, *rest)
            rows.baddbmm_(a, b)
        else:
            ops.add_outer(torch.bmm(a, b), transposed, *rest)
