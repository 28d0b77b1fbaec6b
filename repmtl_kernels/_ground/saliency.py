"""The canonical view of task saliencies, and their precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import overload

import torch
from torch import Tensor

from repmtl_kernels._ground.torch_private import is_fake, is_functorch_wrapped, is_legacy_batched

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The choices of TSR.
OVER = ("tasks", "space")
NORMALIZERS = ("abs", "softmax")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics, similarities and losses for saliencies of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def eps_or_zero(eps: float, dtype: torch.dtype) -> float:
    """Return ``eps`` if ``dtype`` holds it as a normal number, else its limit, 0."""
    return eps if eps >= torch.finfo(dtype).tiny else 0.0


def in_factors(eps: float) -> tuple[float, float]:
    """Return ``(m, root)`` with ``eps = m root^2``, m below 2 and root a power of two.

    Norms that contain the scale squared are guarded with ``m (root scale)^2``: float32 holds these
    factors where it does not hold eps or ``scale^2``. A root beyond the normal numbers of float32
    becomes 0 or infinite: such an eps is below or above all norms of float32 saliencies.
    """
    mantissa, exponent = math.frexp(eps)
    half, odd = divmod(exponent, 2)
    if not -126 <= half <= 127:
        return mantissa, 0.0 if half < 0 else math.inf
    return mantissa * (1 + odd), 2.0**half


def float16_gram_factor(depth: int) -> float:
    """Return the power of two that brings a Gram matrix of scaled saliencies to at most 2^15.

    Its elements are at most ``4 depth``. float16 ends at 65504, and smaller numbers than needed
    would lose bits.
    """
    return 2.0 ** -max(0, math.ceil(math.log2(depth)) - 13)


def has_values(x: Tensor) -> bool:
    """Return whether this is a real tensor. Meta and fake tensors of a dry run have no values."""
    if torch.compiler.is_compiling():  # no compiler can trace the question
        return True
    return not (x.is_meta or is_fake(x))


def is_transformed(x: Tensor) -> bool:
    """Return whether ``x`` is inside ``torch.func``, ``vmap``, batched gradients or a compiler."""
    return (
        torch.compiler.is_compiling()
        or is_functorch_wrapped(x)
        or is_legacy_batched(x)  # of is_grads_batched
    )


def is_float16(value: Tensor) -> bool:
    """Return whether gradients of this tensor are float16, by its dtype or by autocast."""
    if value.dtype == torch.float16:
        return True
    device_type = value.device.type
    available = torch.amp.is_autocast_available(device_type)
    enabled = available and torch.is_autocast_enabled(device_type)
    return enabled and torch.get_autocast_dtype(device_type) == torch.float16


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which saliencies keep their own precision or better."""
    # The compiler of PyTorch 2.11 can't trace the question; the devices it is for have autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
    if available and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@overload
def canonical_tasks(
    operands: Sequence[Tensor], stacked: bool, channel_dim: int
) -> list[Tensor]: ...


@overload
def canonical_tasks(
    operands: Sequence[Tensor | None], stacked: bool, channel_dim: int
) -> list[Tensor | None]: ...


def canonical_tasks(
    operands: Sequence[Tensor | None], stacked: bool, channel_dim: int
) -> Sequence[Tensor | None]:
    """Return the operands as T ``(B, C, *spatial)`` views, at least one spatial dimension each."""
    first = operands[0]
    tasks = first.unbind(0) if stacked and first is not None else operands
    return [None if s is None else _canonical(s, channel_dim) for s in tasks]


def _canonical(saliency: Tensor, channel_dim: int) -> Tensor:
    # Kernels read memory: a view that is negative only by its flag becomes a copy.
    view = saliency.resolve_neg()
    if channel_dim != 1:  # a view costs the host as much as an allocation
        view = view.movedim(channel_dim, 1)
    return view if view.ndim > 2 else view.unsqueeze(-1)


def canonical_mask(positions: Tensor | None) -> Tensor | None:
    """Return ``positions`` (B, *spatial) as the stages take it: (B, N), contiguous."""
    if positions is None:
        return None
    return positions.reshape(positions.shape[0], -1).contiguous()  # len() is a compiler's constant


def positions_to_saliency(values: Tensor, saliency: Tensor, channel_dim: int) -> Tensor:
    """Return ``(B, N)`` values expanded along the channels to the shape of ``saliency``.

    Nothing is copied. Dimensions of ``values`` before B are kept (stacked tasks).
    """
    lead = values.ndim - 2
    task_shape = list(saliency.shape[lead:])
    channel = channel_dim % len(task_shape)
    task_shape[channel] = 1
    return values.reshape(*values.shape[:lead], *task_shape).expand(saliency.shape)
