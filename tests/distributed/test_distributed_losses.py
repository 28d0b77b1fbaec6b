"""The losses on two gloo processes against one that has the whole batch.

The functions called ``check_...`` run on both ranks, all in one pair of processes. The name of one
is the name of its test.
"""

import copy
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from rank_batches import C, T, assert_as_whole, average, cpu_backends, leaves, own, whole_batch
from torch import nn

from repmtl_kernels import (
    CSALoss,
    RepMTL,
    RepMTLLoss,
    csa_loss,
    reference,
    rep_mtl_loss,
    tsr_loss,
)
from repmtl_kernels.backends.eager import contrast as eager_contrast

pytestmark = [pytest.mark.slow_cpu, ranks.needs_gloo]


def check_csa_loss_is_that_of_the_whole_batch(rank: int) -> None:
    for sizes in ((3, 3), (5, 2), (1, 4), (1, 1)):
        for backend in cpu_backends():
            precise = backend != "triton"

            def loss(saliencies, samples, backend=backend):
                group = None if samples == slice(None) else "world"
                return csa_loss(saliencies, group=group, backend=backend)

            options = {} if precise else {"dtype": torch.float32, "tolerance": 1e-4}
            assert_as_whole(rank, sizes, loss, **options)
            if precise:
                assert_as_whole(rank, sizes, loss, lambda s, samples: reference.csa_loss(s))


def check_blocks_of_rows_and_eps(rank: int) -> None:
    for backend in ("eager", "native"):
        if backend not in cpu_backends():
            continue
        with mock.patch.object(eager_contrast, "products_at_a_time", lambda anchors: 2 * T * T * 9):

            def loss(saliencies, samples, backend=backend):
                group = None if samples == slice(None) else dist.group.WORLD
                return csa_loss(saliencies, group=group, backend=backend, eps=0.7, temperature=0.1)

            assert_as_whole(rank, (5, 4), loss)


def check_low_temperatures(rank: int) -> None:
    """In float32 as exact as the whole batch in float64, though each rank rounds its own sums."""
    for sizes in ((3, 3), (5, 2), (1, 4), (1, 1)):
        whole = whole_batch(sum(sizes))
        for temperature in (1e-2, 1e-4, 1e-7, 1e-30):
            everything = leaves(whole)
            exact = reference.csa_loss(everything, temperature=temperature)
            expected = torch.stack(torch.autograd.grad(exact, everything))[:, own(rank, sizes)]
            for backend in cpu_backends():
                mine = leaves([s[own(rank, sizes)].float() for s in whole])
                value = csa_loss(mine, group="world", temperature=temperature, backend=backend)
                actual = torch.stack(torch.autograd.grad(value, mine)) / dist.get_world_size()
                error = (actual - expected).norm() / expected.norm()
                assert error < 4e-6, (sizes, temperature, backend, error)


def check_a_rank_without_labels_of_a_task(rank: int) -> None:
    present = torch.ones(T, 7, dtype=torch.bool)
    present[0, :3] = False  # nothing of task 0 on rank 0
    present[:, 4] = False
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def loss(saliencies, samples):
        group = None if samples == slice(None) else mesh
        return CSALoss(group=group)(saliencies, present[:, samples])

    assert_as_whole(rank, (3, 4), loss)


def check_both_losses_of_unequal_batches(rank: int) -> None:
    for field in ("total", "tsr", "csa"):

        def loss(saliencies, samples, field=field):
            group = None if samples == slice(None) else "world"
            module = RepMTLLoss(lambda_tsr=0.7, lambda_csa=1.3, over="space", group=group)
            return getattr(module(saliencies), field)

        assert_as_whole(rank, (2, 5), loss)


def check_stacked_tokens_and_no_gradient(rank: int) -> None:
    whole = torch.stack(whole_batch(6)).mT  # (T, B, N, C)
    mine = whole[:, own(rank, (4, 2))].clone()
    actual = csa_loss(mine, channel_dim=-1, group="world")
    assert not actual.requires_grad
    torch.testing.assert_close(average(actual), csa_loss(whole, channel_dim=-1), rtol=1e-12, atol=0)


def check_what_is_wrong_is_sent_to_every_rank(rank: int) -> None:
    good = whole_batch(3)
    before = csa_loss(good, group="world")

    def refused(saliencies, message: str, error=ValueError, **options) -> None:
        with pytest.raises(error, match=message):
            csa_loss(saliencies, group="world", **options)

    refused(good[: T - rank], r"group: .* number of tasks T on every rank; got 3, 2 by rank")
    refused([s[:, : C - rank] for s in good], "same number of channels C")
    refused(
        [s.float() if rank else s for s in good],
        "saliencies of the same dtype .* got torch.float64, torch.float32 by",
    )
    refused(good, "the same temperature", temperature=0.5 + rank)
    refused(good, "the same eps", eps=float(rank))
    refused(leaves(good) if rank else good, "require a gradient, or none")
    empty = [s[:0] for s in good]
    other = r"group: ranks \[1\] of it have raised an error"
    refused(empty if rank else good, "every dimension must be at least 1" if rank else other)
    refused("abc" if rank else good, "saliencies: " if rank else other, (TypeError, ValueError))
    refused(good, "the reference contrasts the samples of one process", backend="reference")
    with pytest.raises(ValueError, match="the samples of one process"):
        reference.csa_loss(good, group="world")
    with pytest.raises(ValueError, match="the same tsr_floor on every rank; got 0, 0.5 by rank"):
        rep_mtl_loss(good, group="world", tsr_floor=0.5 * rank)
    for name in ("lambda_tsr", "lambda_csa"):
        with pytest.raises(ValueError, match=f"the same {name} on every rank; got 1, 2 by rank"):
            rep_mtl_loss(good, group="world", **{name: 1 + rank})
    with pytest.raises(ValueError, match="the same over on every rank; got tasks, space by rank"):
        rep_mtl_loss(good, group="world", over="space" if rank else "tasks")
    with pytest.raises(ValueError, match="the same loss, csa_loss or rep_mtl_loss,"):
        (rep_mtl_loss if rank else csa_loss)(good, group="world")
    options = {} if rank else {"lambda_tsr": -1}
    with pytest.raises(ValueError, match=r"group: ranks \[0\]" if rank else "lambda_tsr: "):
        rep_mtl_loss(good, group="world", **options)
    # And after all that the group still works.
    assert csa_loss(good, group="world") == before


def check_groups(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    good = whole_batch(3)
    alone = [dist.new_group([r]) for r in range(2)]
    assert csa_loss(good, group=alone[rank]) == csa_loss(good)
    assert reference.csa_loss(good, group=alone[rank]) == reference.csa_loss(good)
    with pytest.raises(ValueError, match="at least 2; got B = 1"):
        csa_loss([s[:1] for s in good], group=alone[rank])
    with pytest.raises(ValueError, match="group: expected one that this process is a member of"):
        csa_loss(good, group=alone[1 - rank])
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    with pytest.raises(ValueError, match=r"group: .* of 2 dimensions.*mesh\['dp'\]"):
        csa_loss(good, group=mesh)
    assert csa_loss(good, group=mesh["a"]) == csa_loss(good)
    assert csa_loss(good, group=mesh["b"]) != csa_loss(good)
    for group in ("world", dist.group.WORLD, mesh["b"]):
        module = nn.ModuleDict({"loss": CSALoss(group=group), "heads": nn.Linear(2, 2)})
        copied = copy.deepcopy(module)
        assert copied["loss"].group is group
        assert copied["heads"].weight is not module["heads"].weight
        assert copied["loss"](good) == csa_loss(good, group="world")

    spread = [distribute_tensor(s, mesh["b"], [Shard(0)]) for s in whole_batch(4)]
    for loss in (csa_loss, tsr_loss, rep_mtl_loss):
        with pytest.raises(TypeError, match=r"saliencies\[0\]: .* got a DTensor.*to_local"):
            loss(spread)
    z = spread[0].requires_grad_()
    with pytest.raises(TypeError, match="representation: .* got a DTensor"):
        RepMTL()([good[0].requires_grad_().sum()], z)
    with pytest.raises(TypeError, match=r"losses\[0\]: .* got a DTensor"):
        RepMTL()([z.sum()], good[0])


def check_compiled(rank: int) -> None:
    compiled = torch.compile(csa_loss, backend="aot_eager", fullgraph=True)
    mine = leaves([s[own(rank, (4, 4))] for s in whole_batch(8)])
    expected = csa_loss(mine, group="world")
    actual = compiled(mine, group="world")
    assert actual == expected
    grads = torch.autograd.grad(actual, mine)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, mine), strict=True):
        assert torch.equal(ours, theirs)


CHECKS = ranks.checks_in(globals())


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_two_ranks(name: str, outcomes: list[dict[str, str]]) -> None:
    ranks.assert_passed(name, outcomes)
