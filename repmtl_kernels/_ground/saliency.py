"""The canonical view of task saliencies and their precision, shared by every backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from repmtl_kernels._ground.torch_private import is_fake, is_functorch_wrapped, is_legacy_batched

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Choices of TSR.
OVER = ("tasks", "space")
NORMALIZERS = ("abs", "softmax")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, similarities and losses for saliencies of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def held(eps: float, dtype: torch.dtype) -> float:
    """``eps`` where ``dtype`` holds it as a normal number, else 0: its limit."""
    return eps if eps >= torch.finfo(dtype).tiny else 0.0


def in_factors(eps: float) -> tuple[float, float]:
    """``(m, root)`` with ``eps = m root^2``, m below 2 and root a power of two, for the guard ``m
    (root scale)^2`` of norms that have the scale squared: float32 holds them where it does not hold
    eps or ``scale^2``. A root beyond the normal numbers of float32 is 0 or infinite: such an eps is
    below or above the norms that float32 saliencies have."""
    mantissa, exponent = math.frexp(eps)
    half, odd = divmod(exponent, 2)
    if not -126 <= half <= 127:
        return mantissa, 0.0 if half < 0 else math.inf
    return mantissa * (1 + odd), 2.0**half


def float16_gram_factor(depth: int) -> float:
    """The power of two that brings a Gram matrix of scaled saliencies, at most ``4 depth``, to at
    most 2^15: float16 ends at 65504, and smaller numbers than needed would lose bits."""
    return 2.0 ** -max(0, math.ceil(math.log2(depth)) - 13)


def has_values(x: Tensor) -> bool:
    """Whether it is a real tensor: those of a dry run, on meta or fake, have no values."""
    if torch.compiler.is_compiling():  # no compiler traces the question
        return True
    return not (x.is_meta or is_fake(x))


def is_transformed(x: Tensor) -> bool:
    """Whether ``x`` lives inside ``torch.func``, ``vmap``, batched gradients or a compiler."""
    return (
        torch.compiler.is_compiling()
        or is_functorch_wrapped(x)
        or is_legacy_batched(x)  # of is_grads_batched
    )


def is_float16(value: Tensor) -> bool:
    """Whether gradients of this dtype, or those that autocast casts to it here, are float16."""
    if value.dtype == torch.float16:
        return True
    kind = value.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return enabled and torch.get_autocast_dtype(kind) == torch.float16


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Saliencies are computed with in their own precision or better, autocast or not."""
    # The compiler of PyTorch 2.11 can't trace the question; devices that it is for have autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
    if available and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def canonical_tasks(
    operands: Sequence[Tensor | None], stacked: bool, channel_dim: int
) -> list[Tensor | None]:
    """The operands as T ``(B, C, *spatial)`` views with at least one spatial dimension."""
    tasks = operands[0].unbind(0) if stacked else operands
    return [None if s is None else _canonical(s, channel_dim) for s in tasks]


def _canonical(saliency: Tensor, channel_dim: int) -> Tensor:
    # Kernels read memory: a view that is negative only by its flag becomes a copy.
    view = saliency.resolve_neg().movedim(channel_dim, 1)
    return view if view.ndim > 2 else view.unsqueeze(-1)


def canonical_mask(positions: Tensor | None) -> Tensor | None:
    """``positions`` (B, *spatial) as the stages take it: (B, N), contiguous."""
    if positions is None:
        return None
    return positions.reshape(positions.shape[0], -1).contiguous()  # len() is a compiler's constant


def positions_to_saliency(values: Tensor, saliency: Tensor, channel_dim: int) -> Tensor:
    """``(B, N)`` values expanded (not copied) along the channels to the shape of ``saliency``.

    Leading dimensions of ``values`` before B are kept (stacked tasks).
    """
    lead = values.ndim - 2
    task_shape = list(saliency.shape[lead:])
    channel = channel_dim % len(task_shape)
    task_shape[channel] = 1
    return values.reshape(*values.shape[:lead], *task_shape).expand(saliency.shape)
