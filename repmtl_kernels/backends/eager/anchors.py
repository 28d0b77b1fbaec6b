"""Unit anchors (equation 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels.backends.contract import Anchors
from repmtl_kernels.backends.eager.norms import guarded_inverse, power_of_two, square_norm


def anchors(a: Tensor, *, eps: float, with_grad: bool) -> Anchors:
    """Return the unit anchors of the channel means ``a``."""
    scale = power_of_two(a.abs().amax((0, 2)))  # (B,)
    scaled = a * scale[:, None]
    products = torch.einsum("tbc,ubc->btu", scaled, scaled)
    norm = square_norm(products).sqrt()
    inverse, free = guarded_inverse(norm, scale, eps)
    factor = scale * inverse.sqrt()
    u = scaled * inverse.sqrt()[:, None]
    if not with_grad:
        return Anchors(u, factor, None)
    radial = torch.einsum("btu,ubc->tbc", products * (inverse * free)[:, None, None], u)
    return Anchors(u, factor, radial)
