"""Inner products of the tasks' saliencies."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels.backends.eager.operand import masked

# Elements of all tasks' saliencies that become float64 at a time; more if one sample has more.
AFFINITY_BLOCK = 1 << 20


def affinity(saliencies: list[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """Return the inner products (B, T, T)."""
    first = saliencies[0]
    step = max(1, AFFINITY_BLOCK // (len(saliencies) * first[0].numel()))
    blocks = []
    for b in range(0, len(first), step):
        parts = [s[b : b + step].flatten(2) for s in saliencies]
        if mask is not None:
            parts = [masked(part, mask[b : b + step]) for part in parts]
        x = torch.stack([part.flatten(1).double() for part in parts], 1)
        blocks.append(x @ x.mT)
    lower = torch.cat(blocks).tril()  # a library's product need not be symmetric to the bit
    return lower + lower.tril(-1).mT
