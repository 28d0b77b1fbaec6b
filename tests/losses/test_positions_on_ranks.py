"""A mask of positions on two processes against one that has all samples."""

from functools import partial

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

from repmtl_kernels import (
    CSALoss,
    csa_loss,
    rep_mtl_loss,
)

T, C, N = 3, 12, 6


def whole_batch(batch: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(batch)
    values = torch.randn(T, batch, C, N, generator=generator, dtype=torch.float64)
    values += torch.randn(T, batch, C, 1, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, N, generator=generator) < 0.6
    mask[1] = False
    return list(values), mask


def check_average_is_that_of_the_whole_batch(rank: int) -> None:
    for sizes, over, options in (
        ((3, 3), "tasks", {}),
        ((5, 2), "tasks", {"normalizer": "softmax"}),
        ((1, 4), "tasks", {"memory": "recompute"}),
        ((2, 4), "space", {"normalizer": "softmax"}),
        ((2, 4), "space", {}),
    ):
        values, mask = whole_batch(sum(sizes))
        samples = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        module = partial(rep_mtl_loss, lambda_tsr=0.7, lambda_csa=1.3, over=over, **options)
        everything = [v.clone().requires_grad_() for v in values]
        mine = [v[samples].clone().requires_grad_() for v in values]
        exact = module(everything, positions=mask)
        actual = module(mine, positions=mask[samples], group="world")
        for field in ("tsr", "csa", "total"):
            value = getattr(actual, field).detach().clone()
            dist.all_reduce(value)
            torch.testing.assert_close(value / 2, getattr(exact, field), rtol=1e-10, atol=1e-12)
        grads = torch.autograd.grad(actual.total, mine)
        for grad, wanted in zip(grads, torch.autograd.grad(exact.total, everything), strict=True):
            torch.testing.assert_close(grad / 2, wanted[samples], rtol=1e-8, atol=1e-12)


def check_csa_alone_and_by_modules(rank: int) -> None:
    values, mask = whole_batch(6)
    samples = slice(0, 2) if rank == 0 else slice(2, None)
    actual = CSALoss(group="world")([v[samples] for v in values], positions=mask[samples])
    dist.all_reduce(actual)
    torch.testing.assert_close(actual / 2, csa_loss(values, positions=mask), rtol=1e-10, atol=0)


def check_nothing_there_on_one_rank_or_on_all(rank: int) -> None:
    values, mask = whole_batch(6)
    for empty in (slice(3, None), slice(None)):
        mask[empty] = False
        samples = slice(0, 3) if rank == 0 else slice(3, None)
        mine = [v[samples].clone().requires_grad_() for v in values]
        actual = rep_mtl_loss(mine, positions=mask[samples], group="world")
        exact = rep_mtl_loss(values, positions=mask)
        value = actual.tsr.detach().clone()
        dist.all_reduce(value)
        torch.testing.assert_close(value / 2, exact.tsr, rtol=1e-10, atol=1e-12)
        assert all(g.isfinite().all() for g in torch.autograd.grad(actual.total, mine))


def check_all_give_a_mask_or_none(rank: int) -> None:
    values, mask = whole_batch(4)
    with pytest.raises(ValueError, match="group: expected a mask of positions, or none, on every"):
        csa_loss(values, positions=mask if rank else None, group="world")
    match = "positions: expected shape" if rank else "ranks .1. of it have raised an error"
    with pytest.raises(ValueError, match=match):
        csa_loss(values, positions=mask[:, : N - rank], group="world")


CHECKS = ranks.checks_in(globals())


@ranks.needs_gloo
@pytest.mark.slow_cpu
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_on_two_ranks(name: str, outcomes: list[dict[str, str]]) -> None:
    ranks.assert_passed(name, outcomes)
