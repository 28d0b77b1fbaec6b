"""The messages of two ranks: their contents, their times, and the memory that they take.

The functions called ``check_...`` run on both ranks, all in one pair of processes. The name of one
is the name of its test.
"""

import time
import weakref
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from rank_batches import C, N, T, assert_as_whole, cpu_backends, leaves, own, whole_batch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import memory
from benchmarks.parts import distributed as cost
from repmtl_kernels import (
    RepMTL,
    SaliencyMonitor,
    _distributed,
    csa_loss,
)
from repmtl_kernels._losses import backward
from repmtl_kernels.backends import choice, contract

pytestmark = [pytest.mark.slow_cpu, ranks.needs_gloo]


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


def check_calls_that_a_monitor_observes(rank: int) -> None:
    """They cost one message and one sum, the others nothing."""
    monitor = SaliencyMonitor(every=2)
    criterion = RepMTL(0.5, 0.5, every=4, group="world", monitor=monitor)
    sums_alone = {"_allgather_base_": 1, "allreduce_": 1}
    for expected in (None, {}, sums_alone, {}):
        z = torch.randn(4, C, requires_grad=True) * 1
        with Sent() as sent:
            criterion([z.square().sum(), z.sin().sum()], z)
        assert expected is None or sent.calls == expected
    assert monitor.summary().observations == 2


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
    """The gathered tensor of unequal batches is padded, and as large as the anchors."""
    stages = choice.load("eager")
    gather, contrast, received, alive = _distributed._all_gather, stages.contrast, [], []

    def spy_gather(gathered, *args, **options):
        received.append(weakref.ref(gathered))
        return gather(gathered, *args, **options)

    def spy_contrast(*args, **options):
        until = time.monotonic() + 5  # gloo's thread lets go of it a little later
        while any(actual() is not None for actual in received) and time.monotonic() < until:
            time.sleep(0.01)
        alive.extend(actual() is not None for actual in received)
        return contrast(*args, **options)

    with (
        mock.patch.object(_distributed, "_all_gather", spy_gather),
        mock.patch.object(stages, "contrast", spy_contrast),
    ):
        csa_loss([s[rank:] for s in whole_batch(4)], group="world", backend="eager")
    assert alive == [False, False]


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


CHECKS = ranks.checks_in(globals())


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_two_ranks(name: str, outcomes: list[dict[str, str]]) -> None:
    ranks.assert_passed(name, outcomes)


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
        with mock.patch.object(dist, "get_backend_config", lambda group, actual=backend: actual):
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
    all_samples = contract.AllSamples(unit.transpose(0, 1), first, torch.ones_like)
    actual = None

    def call():
        nonlocal actual
        actual = stages.contrast(anchors, temperature=0.5, with_grad=True, all_samples=all_samples)

    peak = memory.peak_extra_bytes(call, torch.device("cpu"))
    ranks_of_64 = cost.Setting(tasks, local, channels)
    assert unit.nbytes == cost.anchors(ranks_of_64, total // local)
    products = cost.block(ranks_of_64, total // local)
    assert products < unit.nbytes  # as long as they are less than the anchors, they are held
    gradient = actual.grad.nbytes
    assert torch.isfinite(actual.grad).all() and actual.logsumexp.shape == (local,)
    squares = {"eager": products, "native": 0}[backend]
    similarities = 3 * products // tasks**2
    assert products < peak - gradient < products + squares + similarities, f"{peak / 1e6:.0f} MB"


def test_cost_formulas_by_hand() -> None:
    setting = cost.Setting(tasks=2, batch=3, channels=5, positions=7)
    assert cost.gathered(setting) == 18 * 8 + 4 * 3 * 10
    assert cost.reduced(setting, 4) == 4 * 2 * 12
    assert cost.received(setting, 4) == 3 * (18 * 8 + 4 * 3 * 10) + 4 * 3 * 4 * 3
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
