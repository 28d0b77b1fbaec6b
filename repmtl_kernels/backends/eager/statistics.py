"""Means and scales of the saliencies (equations 4 and 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels._ground.saliency import accumulation_dtype
from repmtl_kernels.backends.contract import Statistics
from repmtl_kernels.backends.eager.norms import power_of_two
from repmtl_kernels.backends.eager.operand import masked, masked_together, number_of_positions


def statistics(
    saliencies: list[Tensor], *, positions: bool, channels: bool, mask: Tensor | None = None
) -> Statistics:
    """Return the means and scales that are asked for."""
    dtype = accumulation_dtype(saliencies[0].dtype)
    flat = [s.flatten(2) for s in saliencies]
    x = a = scale = None
    if positions:
        x = torch.stack([s.sum(1, dtype=dtype) for s in flat]).div_(flat[0].shape[1])
        if mask is not None:
            x.masked_fill_(~mask, 0)
    if channels:
        sums, largest = zip(*(_over_positions(s, mask, dtype) for s in flat), strict=True)
        a = torch.stack(sums).div_(number_of_positions(flat[0], mask))
        scale = power_of_two(torch.stack(largest).to(dtype))
    return Statistics(x, a, scale)


def _over_positions(
    saliency: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the sums (B, C) and the largest magnitudes (B,) of (B, C, N)."""
    if mask is None:
        magnitude = torch.maximum(saliency.amax((1, 2)), -saliency.amin((1, 2)))
        return saliency.sum(2, dtype=dtype), magnitude
    parts = (
        _over_positions(masked(saliency[samples], mask[samples]), None, dtype)
        for samples in masked_together(saliency)
    )
    sums, largest = zip(*parts, strict=True)
    return torch.cat(sums), torch.cat(largest)
