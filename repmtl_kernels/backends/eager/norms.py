"""Powers of two that scale operands, and norms of products of scaled operands."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels._ground.saliency import in_factors


def power_of_two(largest: Tensor) -> Tensor:
    """Return the power of two that brings ``largest`` into [0.5, 1), exactly; 1 for 0.

    From the bits: not every device has ``torch.frexp``.
    """
    bits, bias, mantissa = (
        (torch.int32, 127, 23) if largest.dtype == torch.float32 else (torch.int64, 1023, 52)
    )
    biased = (largest.view(bits) >> mantissa) & (2 * bias + 1)
    exponent = (2 * bias - 1 - biased).clamp(1, 2 * bias - 1).where(largest != 0, bias)
    return (exponent << mantissa).view(largest.dtype)


def square_norm(x: Tensor) -> Tensor:
    """Return the square of the Frobenius norm (B,) of each matrix.

    Row by row: one long float32 sum is less accurate by one or two orders of magnitude.
    """
    return torch.linalg.vector_norm(x, dim=2).square().sum(1)


def guarded_inverse(norm: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``1 / max(norm, eps scale^2)`` (0 for a norm of 0), and 0 where eps clamps, else 1.

    ``norm`` is the norm of products of operands that were multiplied by ``scale``.
    """
    mantissa, root = in_factors(eps) if norm.dtype == torch.float32 else (eps, 1.0)
    least = mantissa * (root * scale) * (root * scale)  # in this order: scale^2 may overflow
    inverse = torch.maximum(norm, least).reciprocal().where(norm != 0, 0)
    return inverse, (norm >= least).to(norm.dtype)
