"""One criterion on two ranks: the same options, errors and weights on both.

The functions called ``check_...`` run on both ranks, all in one pair of processes. The name of one
is the name of its test.
"""

import pytest
import ranks
import torch
import torch.distributed as dist
from rank_batches import C, average
from rank_network import (
    LAMBDAS,
    Network,
    batches,
    half,
    step,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repmtl_kernels import (
    Levels,
    RepMTL,
)

pytestmark = [pytest.mark.slow_cpu, ranks.needs_gloo]


def check_one_strength_for_all_ranks(rank: int) -> None:
    criterion = RepMTL(strength=0.1, every=1, group="world")
    network = Network()
    wrapped = DistributedDataParallel(network)
    actual = []
    for x, targets in batches(half(rank)):
        step(wrapped, criterion, x, targets, False)
        last = criterion.last
        factor = (last.regularizer / (0.5 * last.tsr + 0.5 * last.csa)).reshape(1)
        by_rank = [torch.empty_like(factor) for _ in range(2)]
        dist.all_gather(by_rank, factor)
        torch.testing.assert_close(*by_rank, rtol=1e-12, atol=0)
        actual.append(factor)
        ratios = [torch.empty_like(last.ratio[None]) for _ in range(2)]
        dist.all_gather(ratios, last.ratio[None])
        assert ratios[0] != ratios[1], "or the test can't fail"
    assert actual[-1] != actual[0]


def check_a_criterion_that_one_rank_cannot_call(rank: int) -> None:
    good = torch.randn(4, C, requires_grad=True)
    for options in ({}, {"strength": None, **LAMBDAS}):
        criterion = RepMTL(group="world", **options)
        z = good[:0] if rank else good * 1
        losses = [z.square().sum(), z.sin().sum()]
        expected = "representation: every dimension" if rank else r"group: ranks \[1\]"
        with pytest.raises(ValueError, match=expected):
            criterion(losses, z)
        z = good[rank : rank + 1] * 1
        criterion([z.square().sum(), z.sin().sum()], z).backward()


def call(criterion: RepMTL, z: Tensor, **changed) -> Tensor:
    arguments = {"losses": [z.square().sum(), z.sin().sum()], "representation": z}
    return criterion(**arguments | changed)


def check_a_criterion_that_one_rank_refuses(rank: int) -> None:
    """Whatever it is that this rank's arguments or options have wrong."""
    z = torch.randn(4, C, requires_grad=True) * 1
    wrong_calls = (
        ({"losses": [None, None]}, "skip it on every rank"),
        ({"losses": [z.square(), z.sum()]}, r"losses\[0\]: expected a scalar"),
        ({"losses": [z.sum().detach(), z.sum()]}, r"losses\[0\]: expected a loss with a graph"),
        ({"representation": [z]}, "representation: expected 2"),
        ({"present": torch.ones(3, 4, dtype=torch.bool)}, "present: expected shape"),
    )
    wrong_options = (
        ({"task_weights": [1]}, "task_weights: expected 2"),
        ({"start": -1}, "start: expected an int of at least 0"),
        ({"tsr_floor": -1}, "tsr_floor: expected a finite number"),
        ({"log_offset": 1.0}, "log_offset: "),
    )
    for options in ({}, LAMBDAS, {"lambda_tsr": 1.0, "lambda_csa": 0.0, "strength": 0.1}):
        criterion = RepMTL(group="world", **options)
        others = r"group: ranks \[1\] of it have raised an error"
        for changed, message in wrong_calls:
            with pytest.raises(ValueError, match=message if rank else others):
                call(criterion, z, **changed if rank else {})
        for changed, message in wrong_options:
            kept = {name: getattr(criterion, name) for name in changed}
            for name, value in (changed if rank else {}).items():
                setattr(criterion, name, value)
            with pytest.raises(ValueError, match=message if rank else others):
                call(criterion, z)
            for name, value in kept.items():
                setattr(criterion, name, value)
        call(criterion, z).backward(retain_graph=True)
        assert criterion._progress.calls == 1


def check_options_of_a_criterion_are_the_same(rank: int) -> None:
    z = torch.randn(4, C, requires_grad=True) * 1
    for options, message in (
        ({"lambda_csa": 0.5 + rank}, "the same lambda_csa on every rank; got 0.5, 1.5 by rank"),
        ({"lambda_csa": 0.5 * rank}, "the same lambda_csa on every rank; got 0, 0.5 by rank"),
        ({"strength": 0.1 if rank else None, **LAMBDAS}, "the same strength .* got None, 0.1 by"),
        ({"start": 2 * rank}, "the same start on every rank; got 0, 2 by rank"),
        ({"every": 2 + rank}, "the same every"),
        ({"clip": None if rank else 2.0}, "the same clip on every rank; got 2, None by rank"),
        ({"normalizer": ("abs", "softmax")[rank]}, "normalizer .* got abs, softmax by rank"),
    ):
        with pytest.raises(ValueError, match=message):
            call(RepMTL(group="world", **options), z)
    # One that is changed later, and the options that may differ.
    own = {"task_weights": [1, 2 + rank], "memory": ("save", "recompute")[rank]}
    criterion = RepMTL(group="world", every=1, **own)
    call(criterion, z)
    criterion.strength = 0.1 + rank
    with pytest.raises(ValueError, match=r"same strength on every rank; got 0.1, 1.1 by rank"):
        call(criterion, z)


def check_a_checkpoint_on_one_rank(rank: int) -> None:
    """DDP sends parameters and buffers to all ranks, but not what a criterion has counted."""
    z = torch.randn(4, C, requires_grad=True) * 1
    options_of_runs = (
        {"every": 4},
        {"start": 3},
        {"ramp": 2000, "every": 1},
        {"lambda_csa": 0.0, "every": 2},
    )
    for options in options_of_runs:
        criterion = RepMTL(group="world", **options)
        call(criterion, z)
        state = RepMTL(**options).state_dict()
        state["_extra_state"][0] = 1001
        if rank == 0:
            criterion.load_state_dict(state)
        if "ramp" in options:
            with pytest.raises(ValueError, match="training calls .* got 1001, 1 by rank. Load the"):
                call(criterion, z)
        criterion = RepMTL(group="world", **options)
        if rank == 0:
            criterion.load_state_dict(state)
        with pytest.raises(ValueError, match="training calls .* got 1001, 0 by rank. Load the"):
            call(criterion, z)
        criterion.load_state_dict(state)
        call(criterion, z)
        assert criterion._progress.calls == 1002


def check_levels_with_positions(rank: int) -> None:
    """Two levels, one of them padded: the average of the ranks is one process with all samples."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    there = torch.rand(6, 5, generator=generator) < 0.7

    def trained(samples: slice, **options) -> tuple[Tensor, nn.ModuleList]:
        torch.manual_seed(3)
        network = nn.ModuleList([nn.Linear(4, 15), nn.Linear(4, 6)]).double()
        padded = network[0](x[samples]).tanh().view(-1, 3, 5)
        pooled = network[1](x[samples]).tanh()
        mask = there[samples]
        # Sums over the batch, so that the average over two ranks is half of that of all.
        losses = [
            ((t + 2) * padded).sin().square().mul(mask[:, None]).sum() + (pooled**t).sum()
            for t in range(1, 4)
        ]
        criterion = RepMTL(**LAMBDAS, **options)
        total = criterion(losses, Levels(padded, pooled), positions=[mask, None])
        regularizer = total - sum(losses)
        regularizer.backward()
        return regularizer.detach(), network

    value, whole = trained(slice(None))
    actual, network = trained(half(rank), group="world")
    torch.testing.assert_close(average(actual), value, rtol=1e-9, atol=0)
    for ours, theirs in zip(network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(average(ours.grad), theirs.grad, rtol=1e-9, atol=1e-12)


def check_steps_of_several_calls(rank: int) -> None:
    criterion = RepMTL(strength=0.1, every=2, group="world")
    z = torch.randn(4, C, generator=torch.Generator().manual_seed(rank), requires_grad=True) * 1
    applied, weights = [], []
    for number in (0, 0, 1, 1, 2):
        call(criterion, z, step=number)
        last = criterion.last
        applied.append(last.applied)
        if last.applied:
            weights.append((last.regularizer / (0.5 * last.tsr + 0.5 * last.csa)).item())
    assert applied == [True, True, False, False, True]
    actual = [torch.empty(3) for _ in range(2)]
    dist.all_gather(actual, torch.tensor(weights))
    torch.testing.assert_close(*actual, rtol=1e-6, atol=0)
    assert weights[0] == weights[1]


CHECKS = ranks.checks_in(globals())


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_two_ranks(name: str, outcomes: list[dict[str, str]]) -> None:
    ranks.assert_passed(name, outcomes)
