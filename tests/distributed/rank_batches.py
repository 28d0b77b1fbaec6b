"""Batches that ranks share, and the comparison with one process that has the whole batch."""

import os

import torch
import torch.distributed as dist
from torch import Tensor

import repmtl_kernels

T, C, N = 3, 12, 5


def cpu_backends() -> list[str]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return [
        name
        for name in repmtl_kernels.available_backends()
        if name in ("eager", "native") or (name == "triton" and interpreted)
    ]


def whole_batch(batch: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shape = (T, batch, C, N)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values += torch.randn((*shape[:3], 1), generator=generator, dtype=torch.float64)
    return list(values.to(dtype))


def own(rank: int, sizes: tuple[int, int]) -> slice:
    return slice(0, sizes[0]) if rank == 0 else slice(sizes[0], sum(sizes))


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def average(value: Tensor) -> Tensor:
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def assert_as_whole(rank: int, sizes, loss, whole_loss=None, *, tolerance=1e-9, **dtype) -> None:
    """Assert that the average of ``loss(saliencies, samples)`` is ``loss`` of the whole batch.

    The average is over the ranks, of the value and of its gradient.
    """
    whole = whole_batch(sum(sizes), **dtype)
    mine, everything = leaves([s[own(rank, sizes)] for s in whole]), leaves(whole)
    value, exact = loss(mine, own(rank, sizes)), (whole_loss or loss)(everything, slice(None))
    torch.testing.assert_close(average(value), exact.detach(), rtol=tolerance, atol=0)
    # The average over ranks of the gradient at this rank's saliencies: other ranks have none there.
    grads = [g / dist.get_world_size() for g in torch.autograd.grad(value, mine)]
    expected = [g[own(rank, sizes)] for g in torch.autograd.grad(exact, everything)]
    for actual, wanted in zip(grads, expected, strict=True):
        atol = tolerance * wanted.abs().max().item()
        torch.testing.assert_close(actual, wanted, rtol=0, atol=atol)
