"""Two gloo processes against one that has the whole batch.

The functions called ``check_...`` run on both ranks, all in one pair of processes; the tests look
at what became of them.
"""

import copy
import os
import signal
import time
import weakref
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import repmtl_kernels
from benchmarks import memory
from benchmarks.parts import distributed as cost
from repmtl_kernels import (
    CSALoss,
    Levels,
    RepMTL,
    RepMTLLoss,
    SecondDerivativeError,
    _distributed,
    csa_loss,
    reference,
    rep_mtl_loss,
    tsr_loss,
)
from repmtl_kernels._losses import backward
from repmtl_kernels.backends import choice, contract

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs gloo", allow_module_level=True)
pytestmark = pytest.mark.slow_cpu

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
    """``loss(saliencies, samples)`` averaged over the ranks is ``loss`` of the whole batch, as a
    value and in its gradient."""
    whole = whole_batch(sum(sizes), **dtype)
    mine, everything = leaves([s[own(rank, sizes)] for s in whole]), leaves(whole)
    value, exact = loss(mine, own(rank, sizes)), (whole_loss or loss)(everything, slice(None))
    torch.testing.assert_close(average(value), exact.detach(), rtol=tolerance, atol=0)
    # The average over ranks of the gradient at this rank's saliencies: other ranks have none there.
    grads = [g / dist.get_world_size() for g in torch.autograd.grad(value, mine)]
    expected = [g[own(rank, sizes)] for g in torch.autograd.grad(exact, everything)]
    for found, wanted in zip(grads, expected, strict=True):
        atol = tolerance * wanted.abs().max().item()
        torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


# --- checks: both ranks run them, and the name of one is the name of its test ---


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
        with mock.patch.object(choice.load("eager"), "CONTRAST_BLOCK", 2 * T * T * 9):

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
                found = torch.stack(torch.autograd.grad(value, mine)) / dist.get_world_size()
                error = (found - expected).norm() / expected.norm()
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
    found = csa_loss(mine, channel_dim=-1, group="world")
    assert not found.requires_grad
    torch.testing.assert_close(average(found), csa_loss(whole, channel_dim=-1), rtol=1e-12, atol=0)


def check_gram_matrices_made_again(rank: int) -> None:
    """On one rank or all, a sample at a time; its backward sends nothing either."""
    for several in (False, True):

        def loss(saliencies, samples, several=several):
            if samples == slice(None):
                return csa_loss(saliencies)
            memory = "recompute" if several or rank == 0 else "save"
            return csa_loss(saliencies, group="world", memory=memory)

        with mock.patch.object(backward, "RECOMPUTE_BLOCK", 1):
            assert_as_whole(rank, (1, 4), loss)
            value = loss(leaves([s[own(rank, (3, 3))] for s in whole_batch(6)]), None)
            with Sent() as sent:
                value.backward()
            assert sent.calls.total() == 0


class Sent(TorchDispatchMode):
    """Bytes that this rank gives to collectives, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()
        self.bytes: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            self.calls[name] += 1
            given = {"_allgather_base_": args[1:2], "allreduce_": args[0]}[name]
            self.bytes[name] += sum(t.nbytes for t in given)
        return func(*args, **(kwargs or {}))


def check_bytes_of_a_step(rank: int) -> None:
    # Facts of the arguments, the anchors and the log-sum-exps' peaks: all in the forward pass.
    facts = 8 * _distributed.WIDTH
    for dtype, size in ((torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 4)):
        saliencies = leaves([s[own(rank, (4, 4))] for s in whole_batch(8, dtype)])
        with Sent() as sent:
            value = csa_loss(saliencies, group="world")
        assert sent.calls == {"_allgather_base_": 2, "allreduce_": 2}
        setting = cost.Setting(T, 4, C, N, size)
        assert sent.bytes["_allgather_base_"] == facts + size * 4 * T * C == cost.gathered(setting)
        assert sent.bytes["allreduce_"] == 2 * size * 8 == cost.reduced(setting, 2)
        with Sent() as sent:
            value.backward()
        assert sent.calls.total() == 0
    with Sent() as sent, torch.no_grad():
        csa_loss(saliencies, group="world")
    assert sent.bytes.total() == facts + size * 4 * T * C
    with Sent() as sent:
        csa_loss(saliencies).backward()
    assert sent.calls.total() == 0


def check_anchors_travel_during_the_gram_stage(rank: int) -> None:
    stages = choice.load("eager")
    gather, gram, seen = _distributed._all_gather, stages.gram, []

    def spy_gather(*args, async_op=False):
        work = gather(*args, async_op)
        seen.append("asynchronous" if async_op else "waits")
        if work is not None:
            wait = work.wait
            work = mock.Mock(wait=lambda: (seen.append("arrived"), wait()))
        return work

    def spy_gram(*args, **options):
        seen.append("gram")
        return gram(*args, **options)

    with (
        mock.patch.object(_distributed, "_all_gather", spy_gather),
        mock.patch.object(stages, "gram", spy_gram),
    ):
        csa_loss(leaves(whole_batch(3)), group="world", backend="eager")
    assert seen[:4] == ["waits", "asynchronous", "gram", "arrived"]


def check_what_was_received_is_freed(rank: int) -> None:
    """Of unequal batches: padded, it is as large as the anchors that are kept."""
    stages = choice.load("eager")
    gather, contrast, received, alive = _distributed._all_gather, stages.contrast, [], []

    def spy_gather(found, *args, **options):
        received.append(weakref.ref(found))
        return gather(found, *args, **options)

    def spy_contrast(*args, **options):
        until = time.monotonic() + 5  # gloo's thread lets go of it a little later
        while any(found() is not None for found in received) and time.monotonic() < until:
            time.sleep(0.01)
        alive.extend(found() is not None for found in received)
        return contrast(*args, **options)

    with (
        mock.patch.object(_distributed, "_all_gather", spy_gather),
        mock.patch.object(stages, "contrast", spy_contrast),
    ):
        csa_loss([s[rank:] for s in whole_batch(4)], group="world", backend="eager")
    assert alive == [False, False]


def check_what_is_wrong_is_told_to_every_rank(rank: int) -> None:
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


# --- training: one network, one batch, wrapped in every way ---


class Network(nn.Module):
    """Two dense tasks. The objective is computed inside or, without a criterion, by the caller."""

    def __init__(self, criterion: RepMTL | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 10, 3, padding=1), nn.Tanh()
        )
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Conv2d(10, 5, 3), nn.Tanh(), nn.Conv2d(5, 1, 1))
                for task in ("depth", "normal")
            }
        )
        self.criterion = [criterion]  # not a submodule: its state is not the network's
        self.double()

    def forward(self, x: Tensor, targets: dict[str, Tensor] | None = None):
        z = self.encoder(x)
        outputs = {task: head(z) for task, head in self.heads.items()}
        if targets is None:
            return z, outputs
        return self.criterion[0](losses_of(outputs, targets), z)


def losses_of(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: (outputs[task] - y).square().mean() for task, y in targets.items()}


STEPS, BATCH = 5, 6


def batches(samples: slice):
    generator = torch.Generator().manual_seed(11)
    for _ in range(STEPS):
        x = torch.randn(BATCH, 1, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(2, BATCH, 1, 4, 4, generator=generator, dtype=torch.float64)
        yield x[samples], {"depth": y[0, samples], "normal": 3 * y[1, samples]}


def step(network: nn.Module, criterion: RepMTL, x: Tensor, targets: dict[str, Tensor], inside):
    if inside:
        total = network(x, targets)
    else:
        z, outputs = network(x)
        total = criterion(losses_of(outputs, targets), z)
    total.backward()


def train(network, criterion, samples, *, inside=False) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for x, targets in batches(samples):
        optimizer.zero_grad()
        step(network, criterion, x, targets, inside)
        optimizer.step()


LAMBDAS = {"lambda_tsr": 0.5, "lambda_csa": 1.5}


def trained_alone(**options) -> list[Tensor]:
    network = Network()
    train(network, RepMTL(**LAMBDAS, **options), slice(None))
    return [p.detach() for p in network.parameters()]


def assert_same_parameters(found, expected: list[Tensor]) -> None:
    found = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in found]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-9)


def half(rank: int) -> slice:
    return own(rank, (BATCH // 2, BATCH // 2))


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


def check_one_strength_for_all_ranks(rank: int) -> None:
    criterion = RepMTL(strength=0.1, group="world")
    network = Network()
    wrapped = DistributedDataParallel(network)
    found = []
    for x, targets in batches(half(rank)):
        step(wrapped, criterion, x, targets, False)
        last = criterion.last
        factor = (last.regularizer / (0.5 * last.tsr + 0.5 * last.csa)).reshape(1)
        by_rank = [torch.empty_like(factor) for _ in range(2)]
        dist.all_gather(by_rank, factor)
        torch.testing.assert_close(*by_rank, rtol=1e-12, atol=0)
        found.append(factor)
        ratios = [torch.empty_like(last.ratio[None]) for _ in range(2)]
        dist.all_gather(ratios, last.ratio[None])
        assert ratios[0] != ratios[1], "or the test can't fail"
    assert found[-1] != found[0]


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
    criterion = RepMTL(
        group="world", task_weights=[1, 2 + rank], memory=("save", "recompute")[rank]
    )
    call(criterion, z)
    criterion.strength = 0.1 + rank
    with pytest.raises(ValueError, match=r"same strength on every rank; got 0.1, 1.1 by rank"):
        call(criterion, z)


def check_a_checkpoint_on_one_rank(rank: int) -> None:
    """DDP sends parameters and buffers to all ranks, but not what a criterion has counted."""
    z = torch.randn(4, C, requires_grad=True) * 1
    for options in ({"every": 4}, {"start": 3}, {"ramp": 2000}, {"lambda_csa": 0.0, "every": 2}):
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
        found = trained(half(rank), sharded=[0], view=view, group="world")
        for ours, theirs in zip(found.parameters(), whole.parameters(), strict=True):
            grad = ours.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else average(grad)
            torch.testing.assert_close(grad, theirs.grad, rtol=0, atol=1e-12)
    with pytest.raises(SecondDerivativeError, match="fully_shard"):
        trained(half(rank), sharded=[0, 1])


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
    found, network = trained(half(rank), group="world")
    torch.testing.assert_close(average(found), value, rtol=1e-9, atol=0)
    for ours, theirs in zip(network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(average(ours.grad), theirs.grad, rtol=1e-9, atol=1e-12)


def check_steps_of_several_calls(rank: int) -> None:
    criterion = RepMTL(strength=0.1, every=2, group="world")
    z = torch.randn(4, C, generator=torch.Generator().manual_seed(rank), requires_grad=True) * 1
    applied, weights = [], []
    for step in (0, 0, 1, 1, 2):
        call(criterion, z, step=step)
        last = criterion.last
        applied.append(last.applied)
        if last.applied:
            weights.append((last.regularizer / (0.5 * last.tsr + 0.5 * last.csa)).item())
    assert applied == [True, True, False, False, True]
    found = [torch.empty(3) for _ in range(2)]
    dist.all_gather(found, torch.tensor(weights))
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    assert weights[0] == weights[1]


def check_compiled(rank: int) -> None:
    compiled = torch.compile(csa_loss, backend="aot_eager", fullgraph=True)
    mine = leaves([s[own(rank, (4, 4))] for s in whole_batch(8)])
    expected = csa_loss(mine, group="world")
    found = compiled(mine, group="world")
    assert found == expected
    grads = torch.autograd.grad(found, mine)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, mine), strict=True):
        assert torch.equal(ours, theirs)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, str]]:
    return ranks.run(CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_two_ranks(name: str, outcomes: list[dict[str, str]]) -> None:
    for rank, failed in enumerate(outcomes):
        assert "end" not in failed, f"rank {rank}: {failed['end']}"
        assert name not in failed, f"rank {rank}: {failed[name]}"


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


# --- without processes ---


def test_device_of_an_exchange() -> None:
    """Not the current GPU, which is that of rank 0 where nobody has set it."""
    here = torch.empty(1, device="meta")
    group = mock.Mock(bound_device_id=None)
    for backend, near, expected in (
        ("cpu:gloo,cuda:nccl", here, "cpu"),
        ("meta:fake", [torch.empty(1), {"a": here}], "meta"),
        ("cuda:nccl", "not a tensor", "cuda"),
    ):
        with mock.patch.object(dist, "get_backend_config", lambda group, found=backend: found):
            assert _distributed._device(group, near) == torch.device(expected)
    group.bound_device_id = torch.device("cuda", 3)
    with mock.patch.object(dist, "get_backend_config", lambda group: "cuda:nccl"):
        assert _distributed._device(group, None) == torch.device("cuda", 3)


def test_a_group_before_there_are_processes() -> None:
    saliencies = whole_batch(3)
    with pytest.raises(ValueError, match=r"^group: expected an initialised .*init_process_group"):
        csa_loss(saliencies, group="world")
    criterion = RepMTL(group="world")
    assert "group='world'" in repr(criterion)
    z = saliencies[0].requires_grad_()
    with pytest.raises(ValueError, match="^group: expected an initialised"):
        criterion([z.square().sum()], z)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_memory_of_the_contrast_of_32768_samples(backend: str) -> None:
    """One rank of 512: 64 samples against everyone's."""
    if backend not in cpu_backends():
        pytest.skip(f"no {backend} here")
    stages = choice.load(backend)
    tasks, channels, total, local, first = 4, 512, 32768, 64, 4096
    a = torch.randn(tasks, local, channels)
    anchors = stages.anchors(a, eps=0.0, with_grad=True)
    unit = torch.randn(total, tasks, channels)
    unit /= unit.norm(dim=2, keepdim=True) * tasks**0.5
    unit[first : first + local] = anchors.unit.transpose(0, 1)
    everyone = contract.Everyone(unit.transpose(0, 1), first, torch.ones_like)
    found = None

    def call():
        nonlocal found
        found = stages.contrast(anchors, temperature=0.5, with_grad=True, everyone=everyone)

    peak = memory.peak_extra_bytes(call, torch.device("cpu"))
    ranks_of_64 = cost.Setting(tasks, local, channels)
    assert unit.nbytes == cost.anchors(ranks_of_64, total // local)
    assert peak > cost.block(ranks_of_64, total // local)
    gradient = found.grad.nbytes
    assert torch.isfinite(found.grad).all() and found.logsumexp.shape == (local,)
    assert 0 < peak - gradient < 64e6, f"{peak / 1e6:.0f} MB"


def test_cost_formulas_by_hand() -> None:
    setting = cost.Setting(tasks=2, batch=3, channels=5, positions=7)
    assert cost.gathered(setting) == 17 * 8 + 4 * 3 * 10
    assert cost.reduced(setting, 4) == 4 * 2 * 12
    assert cost.received(setting, 4) == 3 * (17 * 8 + 4 * 3 * 10) + 4 * 3 * 4 * 3
    assert cost.anchors(setting, 4) == 4 * 12 * 10
    assert cost.block(setting, 4) == 4 * 3 * 2 * 2 * 12
    assert cost.all_products(setting, 4) == 4 * 24**2
    assert cost.work(setting, 4) == 2 * 6 * 24 * 5


def test_table_in_the_documentation_is_up_to_date() -> None:
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    written = text.partition("<!-- bench:ranks:simulated -->\n")[2].partition("\n<!-- /bench -->")[
        0
    ]
    assert written == cost.table()
    assert "| 4,096 |" in written and "Simulated" in written
