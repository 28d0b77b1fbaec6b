"""The factors of matrix products: one task's saliencies, masked and scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels._ground.saliency import float16_gram_factor

# Elements of one task's saliency that are masked, and so copied, at a time; more if one sample has
# more.
MASKED_BLOCK = 1 << 18
# Products of operands with max in [2^-30, 2^30] neither overflow nor underflow in float32.
SAFE_EXPONENT = 30


def masked(saliency: Tensor, mask: Tensor) -> Tensor:
    """Return (B, C, N) with 0 at the positions that are not there, whatever they hold."""
    return saliency.where(mask[:, None], 0)


def masked_together(saliency: Tensor) -> list[slice]:
    """Return the samples in parts that are masked together."""
    step = max(1, MASKED_BLOCK // saliency[0].numel())
    return [slice(first, first + step) for first in range(0, len(saliency), step)]


def number_of_positions(saliency: Tensor, mask: Tensor | None) -> int | Tensor:
    """Return the number of positions: ``N``, or with a mask that of each sample, at least 1.

    With a mask the shape is (B, 1).
    """
    if mask is None:
        return saliency.shape[2:].numel()
    return mask.sum(1, keepdim=True).clamp_min(1)


def is_n_side(saliency: Tensor) -> bool:
    """Return whether positions, not channels, are the smaller side of ``S_bt``."""
    return saliency.shape[2:].numel() <= saliency.shape[1]


def storage_factor(saliency: Tensor) -> float:
    """Return the power of two that the stored Gram matrix is multiplied by."""
    if saliency.dtype != torch.float16:
        return 1.0
    return float16_gram_factor(max(saliency.shape[1], saliency.shape[2:].numel()))


def needs_prescale(saliency: Tensor, scale: Tensor) -> bool:
    """Return whether products of unscaled saliencies may leave the range of their dtype.

    Reads the scales on the CPU only, where that costs no synchronisation; elsewhere operands are
    always scaled.
    """
    if not saliency.is_cpu:
        return True
    bound = 2.0**SAFE_EXPONENT
    return not bool(((scale <= bound) & (scale >= 1 / bound)).all())


def operand(
    saliency: Tensor, scale: Tensor, prescale: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ``x`` (B, C, N) and ``rest`` (B,) with ``x * rest = S^``, in the dtype of ``scale``.

    The dtype is not that of 16-bit saliencies, whose matrix products PyTorch rounds.
    """
    x = saliency.flatten(2)
    if mask is not None:
        x = masked(x, mask)
    x = x.to(scale.dtype)
    if not prescale:
        return x, scale
    return x * scale[:, None, None], torch.ones_like(scale)
