"""Norms of gradients, at any scale and of expanded tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from repmtl_kernels._ground.saliency import accumulation_dtype


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm over all elements of all tensors, whose squares may have no float32."""
    compact = [unexpanded(x) for x in tensors]
    largest = reduce(torch.maximum, [torch.linalg.vector_norm(x, torch.inf) for x in compact])
    largest = largest.to(accumulation_dtype(largest.dtype)).where(largest != 0, 1)
    norms = [torch.linalg.vector_norm(x / largest, dtype=largest.dtype) for x in compact]
    for i, (x, view) in enumerate(zip(tensors, compact, strict=True)):
        if x.numel() > view.numel():
            norms[i] = norms[i] * math.sqrt(x.numel() // view.numel())
    return largest * (norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms)))


def unexpanded(x: Tensor) -> Tensor:
    """Return the view of ``x`` with size 1 where it is expanded."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            x = x.narrow(dim, 0, 1)
    return x


def share_below_float16(tensors: Sequence[Tensor]) -> Tensor:
    """Return the share of elements that are zero or below float16's normal numbers, float32."""
    small = torch.finfo(torch.float16).tiny
    count = sum(x.numel() for x in tensors)
    shares = [
        (unexpanded(x.detach()).abs() < small).mean(dtype=torch.float32) * (x.numel() / count)
        for x in tensors
    ]
    return torch.stack(shares).sum()
