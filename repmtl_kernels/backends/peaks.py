"""Log-sum-exps as two numbers, so that their softmaxes stay exact at any temperature.

The peaks ``(2, n)`` of n sets of similarities ``r >= 0`` are, for each set, the largest similarity
(at least 0) and the sum of ``exp((r - largest) / temperature)``. As one number, ``largest /
temperature + log(sum)``, they would lose the logarithm where the temperature is small.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def peaks(r: Tensor, dim: int, temperature: float) -> Tensor:
    """Return the peaks ``(2, n)`` of the matrix ``r`` over ``dim``; -inf counts for nothing."""
    largest = r.amax(dim).clamp_min(0)
    return torch.stack((largest, _relative(r, largest.unsqueeze(dim), temperature).sum(dim)))


def joined(
    peaks: Tensor,
    temperature: float,
    most: Callable[[Tensor], Tensor],
    total: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the peaks ``(2, n)`` of unions of sets from the peaks ``(2, ...)`` of the sets.

    ``most`` and ``total`` reduce over the sets of a union: to the maximum and to the sum.
    """
    largest, sums = peaks
    top = most(largest)
    return torch.stack((top, total(sums * _relative(largest, top, temperature))))


def share(r: Tensor, peaks: Tensor, temperature: float) -> Tensor:
    """Return the softmax of ``r / temperature`` over sets with these peaks."""
    largest, sums = peaks
    return _relative(r, largest, temperature) / sums


def _relative(r: Tensor, largest: Tensor, temperature: float) -> Tensor:
    return ((r - largest) / temperature).exp()
