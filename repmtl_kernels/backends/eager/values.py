"""CSA and the total of both losses from their parts (equations 9 and 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_kernels.backends.contract import Values


def values(
    similarity: Tensor,
    logsumexp: Tensor,
    present: Tensor | None,
    *,
    temperature: float,
    tsr: Tensor | None = None,
    lambdas: tuple[float, float] | None = None,
) -> Values:
    """Return CSA, its derivative with respect to the similarities, and the total."""
    weight = _positive_weight(similarity, present, temperature)
    csa = logsumexp.mean() + (weight * similarity).sum()
    total = None
    if tsr is not None and lambdas is not None:
        total = lambdas[0] * tsr + lambdas[1] * csa
    return Values(csa, weight, total)


def _positive_weight(similarity: Tensor, present: Tensor | None, temperature: float) -> Tensor:
    """Return d csa / d s (T, B) of the mean over (present) tasks and the batch."""
    tasks, batch = similarity.shape
    if present is None:
        return torch.full_like(similarity, -1 / (tasks * batch * temperature))
    share = present.to(similarity.dtype) / present.sum(0).clamp_min(1)
    return share * (-1 / (batch * temperature))
