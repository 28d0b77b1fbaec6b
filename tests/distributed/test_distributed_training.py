"""Training on two ranks, in every wrapper, against training in one process.

The functions called ``check_...`` run on both ranks, all in one pair of processes. The name of one
is the name of its test.
"""

import os
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import ranks
import torch
from rank_batches import average, own
from rank_network import (
    BATCH,
    LAMBDAS,
    Network,
    assert_same_parameters,
    batches,
    half,
    losses_of,
    step,
    train,
    trained_alone,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repmtl_kernels import (
    RepMTL,
    SecondDerivativeError,
)
from repmtl_kernels.backends import choice

pytestmark = [pytest.mark.slow_cpu, ranks.needs_gloo]


def check_data_parallel_training(rank: int) -> None:
    expected = trained_alone()
    start = [p.detach() for p in Network().parameters()]
    moved = max((a - b).abs().max() for a, b in zip(start, expected, strict=True))
    assert moved > 1e-2
    for options, inside in (
        ({}, False),
        ({}, True),
        ({"find_unused_parameters": True}, True),
        ({"static_graph": True}, True),
    ):
        criterion = RepMTL(**LAMBDAS, group="world")
        network = Network(criterion)
        wrapped = DistributedDataParallel(network, **options)
        train(wrapped, criterion, half(rank), inside=inside)
        assert_same_parameters(network.parameters(), expected)
    # Negatives of its own process only are another loss.
    network = Network()
    train(DistributedDataParallel(network), RepMTL(**LAMBDAS), half(rank))
    with pytest.raises(AssertionError):
        assert_same_parameters(network.parameters(), expected)


def check_training_with_unequal_batches(rank: int) -> None:
    """Means of a rank's samples, by the rank's share, average to the mean of all."""
    sizes = (1, BATCH - 1)
    share = 2 * sizes[rank] / BATCH
    criterion = RepMTL(**LAMBDAS, every=2, task_weights=[share, share], group="world")
    network = Network()
    wrapped = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for x, targets in batches(own(rank, sizes)):
        optimizer.zero_grad()
        z, outputs = wrapped(x)
        criterion(list(losses_of(outputs, targets).values()), z).backward()
        optimizer.step()
    assert_same_parameters(network.parameters(), trained_alone(every=2))


def sharding():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return partial(fully_shard, mesh=init_device_mesh("cpu", (2,)))  # not the GPU of a machine


def check_sharded_encoder_training(rank: int) -> None:
    fully_shard = sharding()
    expected = trained_alone(every=2)
    for by_layer in (False, True):
        criterion = RepMTL(**LAMBDAS, every=2, group="world")
        network = Network()
        if by_layer:
            for layer in network.encoder:
                if list(layer.parameters()):
                    fully_shard(layer)
        fully_shard(network.encoder)
        network.heads = nn.ModuleDict(
            {task: DistributedDataParallel(head) for task, head in network.heads.items()}
        )
        train(network, criterion, half(rank))
        assert_same_parameters(network.parameters(), expected)
    # One group of parameters, and the criterion inside its forward.
    for options in ({}, {"reshard_after_forward": True}):
        criterion = RepMTL(**LAMBDAS, every=2, group="world")
        network = fully_shard(Network(criterion), **options)
        train(network, criterion, half(rank), inside=True)
        assert_same_parameters(network.parameters(), expected)


def check_what_wrappers_cannot_do_is_refused(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    fully_shard = sharding()

    def sharded_heads(network):
        for head in network.heads.values():
            fully_shard(head)

    def kept_heads(network):
        for head in network.heads.values():
            fully_shard(head, reshard_after_forward=False)

    def sharded_whole(network):
        fully_shard(network)

    def sharded_twice(network):
        fully_shard(network.encoder)
        fully_shard(network)

    def one(module):
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"))

    def first_version_of_encoder(network):
        network.encoder = one(network.encoder)

    def first_version_of_heads(network):
        network.heads = nn.ModuleDict({t: one(h) for t, h in network.heads.items()})

    refused = (
        (sharded_heads, "fully_shard .* Shard the encoder alone"),
        (kept_heads, "fully_shard .* Shard the encoder alone"),
        (sharded_whole, "fully_shard .* Shard the encoder alone"),
        (sharded_twice, "fully_shard .* Shard the encoder alone"),
        (first_version_of_encoder, "FSDP1"),
        (first_version_of_heads, "FSDP1"),
        (lambda network: DistributedDataParallel(network, static_graph=True), "static_graph"),
        (
            lambda network: DistributedDataParallel(network, find_unused_parameters=True),
            "find_unused_parameters",
        ),
    )
    x, targets = next(batches(half(rank)))
    for wrap, message in refused:
        for inside in (False, True) if "heads" in wrap.__name__ else (False,):
            criterion = RepMTL(**LAMBDAS)
            network = Network(criterion)
            network = wrap(network) or network
            with pytest.raises(SecondDerivativeError, match=message):
                step(network, criterion, x, targets, inside)
    z = torch.randn(2, 10, 6, 6, dtype=torch.float64)
    for wrap, message in refused[:6]:
        if "encoder" not in wrap.__name__:
            network = Network()
            wrap(network)
            with pytest.raises(SecondDerivativeError, match=message):
                RepMTL.check(network.heads, z)
    network = Network()
    fully_shard(network.encoder)
    RepMTL.check(network.heads, z)


def check_replicated_heads(rank: int) -> None:
    """Heads in DDP of their own: a static graph is learned from the first backward pass."""
    expected = trained_alone(start=1)
    x, targets = next(batches(half(rank)))
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        network = Network()
        network.encoder = DistributedDataParallel(network.encoder)
        network.heads = nn.ModuleDict(
            {t: DistributedDataParallel(h, **options) for t, h in network.heads.items()}
        )
        if "static_graph" in options:
            message = r"'depth'\]: .*static_graph=True.* Leave static_graph out"
            with pytest.raises(SecondDerivativeError, match=message):
                step(network, RepMTL(**LAMBDAS), x, targets, False)
            with pytest.raises(
                SecondDerivativeError, match=r"heads\['depth'\].*pass what it wraps"
            ):
                RepMTL.check(dict(network.heads), torch.randn(2, 10, 6, 6, dtype=torch.float64))
        train(network, RepMTL(**LAMBDAS, start=1, group="world"), half(rank))
        assert_same_parameters(network.parameters(), expected)


class Skipping(nn.Module):
    """Its result has what was before ``z`` too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skipped = self.first(x).tanh()
        return self.second(skipped).tanh(), skipped


def check_sharded_encoder_with_skip_connections(rank: int) -> None:
    fully_shard = sharding()
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def trained(samples, *, sharded=(), view=False, **options) -> nn.ModuleList:
        torch.manual_seed(5)
        network = nn.ModuleList([Skipping(), nn.Linear(12, 1), nn.Linear(12, 1)]).double()
        for i in sharded:
            fully_shard(network[i])
        z, skipped = network[0](x[samples])
        z = z.view_as(z) if view else z
        both = torch.cat([z, skipped], 1)
        losses = [head(both).tanh().square().mean() for head in network[1:]]
        RepMTL(**LAMBDAS, **options)(losses, z).backward()
        return network

    whole = trained(slice(None))
    for view in (False, True):
        actual = trained(half(rank), sharded=[0], view=view, group="world")
        for ours, theirs in zip(actual.parameters(), whole.parameters(), strict=True):
            grad = ours.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else average(grad)
            torch.testing.assert_close(grad, theirs.grad, rtol=0, atol=1e-12)
    with pytest.raises(SecondDerivativeError, match="fully_shard"):
        trained(half(rank), sharded=[0, 1])


CHECKS = ranks.checks_in(globals())


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_two_ranks(name: str, outcomes: list[dict[str, str]]) -> None:
    ranks.assert_passed(name, outcomes)


# --- a rank that dies ---


def die_in_mid_step(rank: int) -> None:
    """Rank 1 is gone while rank 0 is waiting for its anchors."""
    network = Network()
    wrapped = DistributedDataParallel(network)
    criterion = RepMTL(**LAMBDAS, group="world", backend="eager")
    x, targets = next(batches(half(rank)))
    step(wrapped, criterion, x, targets, False)
    if rank == 1:
        stages = choice.load("eager")
        stages.anchors = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        step(wrapped, criterion, x, targets, False)
    assert time.monotonic() - began < 10


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_rank_that_is_killed_ends_the_other(tmp_path: Path) -> None:
    survivor, killed = ranks.run([die_in_mid_step], tmp_path, timedelta(seconds=10), wait=60)
    assert survivor == {}, survivor
    assert killed["end"].startswith(f"exit code {-signal.SIGKILL}")
