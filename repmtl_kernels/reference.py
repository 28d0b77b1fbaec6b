"""The losses of Rep-MTL exactly as the paper prints them (arXiv 2507.21049, eq. 4 to 9).

These functions are plain PyTorch under autograd, with ``C x C`` affinity matrices: easy to read,
slow, and they need much memory. Tests compare every backend with them in float64. Use them for a
second derivative of the losses. They compute in the dtype of the saliencies, and saliencies below
about 1e-9 in float32 underflow here.
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
    eps_or_zero,
    without_autocast,
)
from repmtl_kernels._losses.arguments import checked_call, checked_operands
from repmtl_kernels._losses.config import Config
from repmtl_kernels._losses.options import CsaOptions, TsrOptions
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
    """Return TSR, eq. 4 to 6, with the arguments of :func:`repmtl_kernels.tsr_loss`."""
    options = TsrOptions(over, normalizer, temperature, floor, eps)
    tsr, _ = _evaluate_call(saliencies, tsr=options, positions=positions, channel_dim=channel_dim)
    return tsr


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
    """Return CSA, eq. 7 to 9, with the arguments of :func:`repmtl_kernels.csa_loss`.

    A ``group`` of several processes raises ``ValueError``, and so does ``memory="recompute"``:
    autograd keeps what it needs.
    """
    options = CsaOptions(temperature, eps, memory)
    _, csa = _evaluate_call(
        saliencies,
        csa=options,
        present=present,
        positions=positions,
        channel_dim=channel_dim,
        group=name_of(group),
    )
    return csa


def saliency_affinity(
    saliencies: Tensor | Sequence[Tensor],
    *,
    positions: Tensor | None = None,
    channel_dim: int = 1,
) -> Tensor:
    """Return the products with the arguments of :func:`repmtl_kernels.saliency_affinity`."""
    operands, stacked = checked_operands(saliencies, positions, channel_dim)
    return products(operands, positions, stacked, channel_dim)


def products(
    operands: Sequence[Tensor], positions: Tensor | None, stacked: bool, channel_dim: int
) -> Tensor:
    """Return the inner products (B, T, T) of checked operands, in float64."""
    s = torch.stack(_flat_tasks(operands, positions, stacked, channel_dim)).double()
    with without_autocast(s.device):
        return torch.einsum("tbcn,ubcn->btu", s, s)


def _evaluate_call(
    saliencies: Tensor | Sequence[Tensor],
    *,
    tsr: TsrOptions | None = None,
    csa: CsaOptions | None = None,
    present: Tensor | None = None,
    positions: Tensor | None,
    channel_dim: int,
    group: str = "",
) -> tuple[Tensor, Tensor]:
    """Check the arguments and return TSR and CSA, without elements if its options are None."""
    call = checked_call(saliencies, tsr, csa, present, positions, channel_dim, group)
    check_supported(call.csa, group)
    config = Config("reference", call.stacked, channel_dim, True, call.tsr, call.csa)
    return evaluate(config, call.operands, present, positions)


def check_supported(csa: CsaOptions | None, group: str) -> None:
    """Raise for what the reference can't do; ``group`` is the name of a group of several."""
    if group:
        raise ValueError(
            "group: the reference contrasts the samples of one process; expected None, or a "
            "backend other than 'reference', got a group of several"
        )
    if csa is not None and csa.recompute:
        raise ValueError(
            "memory: the reference keeps what autograd keeps of the equations; expected 'auto' or "
            "'save', or a backend other than 'reference', got 'recompute'"
        )


def evaluate(
    config: Config,
    operands: Sequence[Tensor],
    present: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return ``(tsr, csa)``, a tensor without elements for a loss that is left out."""
    tasks = _flat_tasks(operands, positions, config.stacked, config.channel_dim)
    mask = canonical_mask(positions)
    tsr = csa = operands[0].new_empty(0)
    with without_autocast(operands[0].device):
        if config.tsr is not None:
            tsr = _entropy(tasks, mask, config.tsr)
        if config.csa is not None:
            csa = _contrastive(tasks, mask, config.csa, present)
    return tsr, csa


def _flat_tasks(
    operands: Sequence[Tensor], positions: Tensor | None, stacked: bool, channel_dim: int
) -> list[Tensor]:
    """Return T tensors (B, C, N), zero at the positions that do not exist."""
    tasks = [task.flatten(2) for task in canonical_tasks(operands, stacked, channel_dim)]
    mask = canonical_mask(positions)
    return tasks if mask is None else [task.where(mask[:, None], 0) for task in tasks]


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over all dimensions; the last ones, (B, N), where positions exist."""
    if mask is None:
        return values.mean()
    count = mask.expand(values.shape).sum().clamp_min(1)
    total = values.where(mask, 0).sum(dtype=accumulation_dtype(values.dtype))
    return total / count


def _entropy(tasks: list[Tensor], mask: Tensor | None, options: TsrOptions) -> Tensor:
    x = torch.stack([s.mean(dim=1) for s in tasks])  # (T, B, N), eq. 4
    over_tasks, temperature = options.over == "tasks", options.temperature
    dim = 0 if over_tasks else 2
    if options.normalizer == "abs":
        magnitude = x.abs()
        if options.floor:
            magnitude = magnitude + options.floor * _mean(magnitude, mask)
            if mask is not None:
                magnitude = magnitude.where(mask, 0)
        total = magnitude.sum(dim, keepdim=True) + eps_or_zero(options.eps, x.dtype)
        p = magnitude / total.where(total != 0, 1)  # eq. 5
    elif over_tasks or mask is None:
        p = torch.softmax(x / temperature, dim)
    else:
        exists = mask | ~mask.any(1, keepdim=True)  # a distribution of nothing is NaN
        p = torch.softmax(x.where(exists, -math.inf) / temperature, dim).where(mask, 0)
    entropy = -(p * p.where(p != 0, 1).log()).sum(dim)
    entropy = _mean(entropy, mask if over_tasks else None)
    return entropy.to(accumulation_dtype(x.dtype))  # eq. 6


def _contrastive(
    tasks: list[Tensor], mask: Tensor | None, options: CsaOptions, present: Tensor | None
) -> Tensor:
    temperature, eps = options.temperature, options.eps
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
    """Return ``(..., C, C)`` over ``max(Frobenius norm, eps)``; a zero matrix stays zero."""
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    eps = eps_or_zero(eps, norm.dtype)
    norm = norm.clamp_min(eps) if eps > 0 else norm.where(norm != 0, 1)
    return matrices / norm


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` without autocast, which its derivatives don't have either."""
    if torch.compiler.is_compiling():
        # Imported while the compiler traces: it must not be loaded by `import repmtl_kernels`.
        from repmtl_kernels._losses.graph_node import product_node

        return product_node(a, b)
    return Product.apply(a, b)
