"""The losses of Rep-MTL exactly as the paper prints them (arXiv 2507.21049, eq. 4 to 9).

Plain PyTorch under autograd, ``C x C`` affinity matrices and all: slow, hungry and easy to read.
Every backend is judged against these functions in float64, and they are the ones to use where a
second derivative of the losses is needed. They compute in the dtype they are given and are not
scale-safe: saliencies below about 1e-9 in float32 underflow here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from repmtl_kernels._distributed import Group, name_of
from repmtl_kernels._ground.saliency import (
    accumulation_dtype,
    canonical_mask,
    canonical_tasks,
    held,
    without_autocast,
)
from repmtl_kernels._losses.arguments import csa_arguments, tsr_arguments
from repmtl_kernels._losses.product import Product


def tsr_loss(
    saliencies: Tensor | Sequence[Tensor],
    *,
    over: str = "tasks",
    normalizer: str = "abs",
    temperature: float = 1.0,
    floor: float = 0.0,
    eps: float = 0.0,
    positions: Tensor | None = None,
    channel_dim: int = 1,
) -> Tensor:
    """Task-specific saliency regulation, eq. 4 to 6, as :func:`repmtl_kernels.tsr_loss`."""
    operands, stacked = tsr_arguments(
        saliencies,
        over=over,
        normalizer=normalizer,
        temperature=temperature,
        floor=floor,
        eps=eps,
        positions=positions,
        channel_dim=channel_dim,
    )
    tasks, mask = _with_zeros(canonical_tasks(operands, stacked, channel_dim), positions)
    with without_autocast(operands[0].device):
        return _entropy(tasks, mask, over, normalizer, float(temperature), float(floor), float(eps))


def _with_zeros(
    tasks: list[Tensor], positions: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """The saliencies (B, C, N), zero where no position is, and a mask (B, N) of those there."""
    tasks = [task.flatten(2) for task in tasks]
    mask = canonical_mask(positions)
    if mask is not None:
        tasks = [task.where(mask[:, None], 0) for task in tasks]
    return tasks, mask


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the last dimensions, of size (B, N), and over those before."""
    if mask is None:
        return values.mean()
    count = mask.expand(values.shape).sum().clamp_min(1)
    total = values.where(mask, 0).sum(dtype=accumulation_dtype(values.dtype))
    return total / count


def _entropy(
    tasks: list[Tensor],
    mask: Tensor | None,
    over: str,
    normalizer: str,
    temperature: float,
    floor: float,
    eps: float,
) -> Tensor:
    x = torch.stack([s.mean(dim=1) for s in tasks])  # (T, B, N), eq. 4
    dim = 0 if over == "tasks" else 2
    if normalizer == "abs":
        magnitude = x.abs()
        if floor:
            magnitude = magnitude + floor * _mean(magnitude, mask)
            if mask is not None:
                magnitude = magnitude.where(mask, 0)
        total = magnitude.sum(dim, keepdim=True) + held(eps, x.dtype)
        p = magnitude / total.where(total != 0, 1)  # eq. 5
    elif over == "tasks" or mask is None:
        p = torch.softmax(x / temperature, dim)
    else:
        there = mask | ~mask.any(1, keepdim=True)  # a distribution of nothing is NaN
        p = torch.softmax(x.where(there, -math.inf) / temperature, dim).where(mask, 0)
    entropy = -(p * p.where(p != 0, 1).log()).sum(dim)
    entropy = _mean(entropy, mask if over == "tasks" else None)
    return entropy.to(accumulation_dtype(x.dtype))  # eq. 6


def csa_loss(
    saliencies: Tensor | Sequence[Tensor],
    *,
    temperature: float = 0.5,
    eps: float = 0.0,
    present: Tensor | None = None,
    positions: Tensor | None = None,
    channel_dim: int = 1,
    group: Group | None = None,
    memory: str = "auto",
) -> Tensor:
    """Cross-task saliency alignment, eq. 7 to 9, as :func:`repmtl_kernels.csa_loss`.

    The samples are those of one process: a ``group`` of several raises ``ValueError``, and so does
    ``memory="recompute"``, since autograd keeps what it needs.
    """
    check_group_of_one(name_of(group))
    operands, stacked = csa_arguments(
        saliencies,
        temperature=temperature,
        eps=eps,
        present=present,
        positions=positions,
        channel_dim=channel_dim,
        group="",
        memory=memory,
    )
    check_nothing_is_recomputed(memory)
    tasks, mask = _with_zeros(canonical_tasks(operands, stacked, channel_dim), positions)
    with without_autocast(operands[0].device):
        return _contrastive(tasks, mask, float(temperature), float(eps), present)


def check_group_of_one(name: str) -> None:
    if name:
        raise ValueError(
            "group: the reference contrasts the samples of one process; expected None, or a "
            "backend other than 'reference', got a group of several"
        )


def check_nothing_is_recomputed(memory: str) -> None:
    if memory == "recompute":
        raise ValueError(
            "memory: the reference keeps what autograd keeps of the equations; expected 'auto' or "
            "'save', or a backend other than 'reference', got 'recompute'"
        )


def _contrastive(
    tasks: list[Tensor], mask: Tensor | None, temperature: float, eps: float, present: Tensor | None
) -> Tensor:
    s = torch.stack(tasks)  # (T, B, C, N)
    affinity = _normalized(_product(s, s.mT), eps)  # (T, B, C, C), eq. 7
    a = s.mean(dim=3)
    if mask is not None:
        count = mask.sum(1, keepdim=True).clamp_min(1)
        a = (s.sum(dim=3, dtype=accumulation_dtype(s.dtype)) / count).to(s.dtype)
    a = a.permute(1, 2, 0)  # (B, C, T)
    anchor = _normalized(_product(a, a.mT), eps)  # (B, C, C), eq. 8
    positive = (anchor * affinity).sum((2, 3))  # (T, B)
    negative = _product(anchor.flatten(1), anchor.flatten(1).T)  # (B, B)
    own = torch.eye(negative.shape[0], dtype=torch.bool, device=negative.device)
    negative = (negative / temperature).masked_fill(own, float("-inf")).logsumexp(1)
    if present is None:
        positive = positive.mean(0)
    else:
        positive = (positive * present).sum(0) / present.sum(0).clamp_min(1)
    return (negative - positive / temperature).mean().to(accumulation_dtype(s.dtype))  # eq. 9


def _normalized(matrices: Tensor, eps: float) -> Tensor:
    """``(..., C, C)`` divided by ``max(Frobenius norm, eps)``; a zero matrix stays zero."""
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    eps = held(eps, norm.dtype)
    norm = norm.clamp_min(eps) if eps > 0 else norm.where(norm != 0, 1)
    return matrices / norm


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``. Its derivatives too are without autocast, wherever they are taken."""
    if torch.compiler.is_compiling():
        # Imported while the compiler traces: it must not be loaded by `import repmtl_kernels`.
        from repmtl_kernels._losses.graph_node import product_node

        return product_node(a, b)
    return Product.apply(a, b)
