"""Which calls are observed, and what a call leaves as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from cases import DEVICE
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from repmtl_kernels import RepMTL, SaliencyMonitor


def call(monitor: nn.Module, seed: int = 0, **options) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4, 3, 5, generator=generator).to(DEVICE).requires_grad_()
    monitor([(z**3).mean(), z.sin().mean()], z, **options)


def steps(monitor: SaliencyMonitor) -> list[int]:
    return monitor.summary().history.steps.tolist()


@pytest.mark.parametrize(("every", "expected"), [(1, [*range(7)]), (3, [0, 3, 6]), (50, [0])])
@pytest.mark.parametrize("inside", [False, True])
def test_every(every: int, expected: list[int], inside: bool) -> None:
    """The turns are the monitor's own, whether the criterion applies its regulariser or not."""
    monitor = SaliencyMonitor(every=every)
    caller = RepMTL(every=2, monitor=monitor) if inside else monitor
    for i in range(7):
        call(caller, i)
    assert steps(monitor) == expected
    summary = monitor.summary()
    assert summary.observations == len(expected) and summary.step == expected[-1]


@pytest.mark.parametrize("inside", [False, True])
def test_calls_of_one_step_are_one(inside: bool) -> None:
    monitor = SaliencyMonitor(every=2)
    caller = RepMTL(0.5, 0.5, monitor=monitor) if inside else monitor
    once = SaliencyMonitor(every=2)
    for step in range(5):
        for part in range(3):
            call(caller, 10 * step + part, step=step)
        call(once, 10 * step)
    assert steps(monitor) == [0, 2, 4]
    assert torch.equal(monitor.summary().cosine, once.summary().cosine)  # the first of each
    call(caller, 50, step=7)  # a step more, whatever its number
    assert monitor._count.calls == 6
    monitor.forget_step()
    call(caller, 51, step=7)
    assert steps(monitor) == [0, 2, 4, 6]


@pytest.mark.parametrize("inside", [False, True])
def test_calls_that_are_not_watched(inside: bool) -> None:
    """In eval mode, without gradients, on meta and on fake tensors: not counted, not observed."""
    monitor = SaliencyMonitor(every=1)
    caller = RepMTL(0, 0, monitor=monitor) if inside else monitor
    with torch.no_grad():
        call(caller)
    monitor.eval()
    call(caller)
    monitor.train()
    caller.eval()
    call(caller)
    caller.train()
    z = torch.randn(4, 3, 5, device="meta", requires_grad=True)
    caller([z.sum(), z.sin().sum()], z)
    with FakeTensorMode():
        z = torch.randn(4, 3, 5, requires_grad=True)
        caller([z.sum(), z.sin().sum()], z)
    assert monitor.summary().observations == 0 and monitor._count.calls == 0
    call(caller)
    assert steps(monitor) == [0]


@pytest.mark.parametrize("inside", [False, True])
def test_transforms_and_compilers_are_refused(inside: bool) -> None:
    monitor = SaliencyMonitor(every=2)
    caller = RepMTL(0.5, 0.5, monitor=monitor) if inside else monitor

    def step(z: Tensor) -> Tensor:
        result = caller([(z**3).mean(), z.sin().mean()], z)
        return z.sum() if result is None else result

    z = torch.randn(4, 3, 5, device=DEVICE)
    with pytest.raises(ValueError, match="monitor: it keeps running means"):
        torch.func.grad(step)(z)
    torch.compiler.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="monitor: it keeps running means"):
        compiled(z.requires_grad_())
    assert monitor.summary().observations == 0
    monitor.eval()
    torch.func.grad(step)(z.detach())


def test_a_call_that_fails_is_none() -> None:
    monitor = SaliencyMonitor(every=2)
    z = torch.randn(4, 3, 5)
    with pytest.raises(ValueError, match="representation: expected a tensor with requires_grad"):
        monitor([z.sum(), z.sin().sum()], z)
    call(monitor)
    assert steps(monitor) == [0]


def test_replicas_are_one_call() -> None:
    """The first replica observes, whatever the threads of ``nn.DataParallel`` do."""

    def run(order: list[int]) -> list:
        criterion = RepMTL(0.5, 0.5, monitor=SaliencyMonitor(every=2))
        for step in range(5):
            replicas = nn.parallel.replicate(criterion, [0] * 3) if DEVICE == "cuda" else None
            replicas = replicas or [_replica(criterion) for _ in range(3)]
            threads = [
                threading.Thread(target=call, args=(replicas[i], 3 * step + i)) for i in order
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        summary = criterion.monitor.summary()
        assert summary.history.steps.tolist() == [0, 2, 4]
        return [summary.cosine.tolist(), summary.ratio]

    expected = run([0, 1, 2])
    for order in ([2, 1, 0], [1, 0, 2]):
        assert run(order) == expected


def _replica(criterion: RepMTL) -> RepMTL:
    replica = criterion._replicate_for_data_parallel()
    replica.monitor = criterion.monitor._replicate_for_data_parallel()
    return replica


class Watched:
    """A small network with everything that a call might disturb."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(2, 4, 3)
        self.heads = [
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 1, 1))
            for _ in range(2)
        ]
        self.hooks: list[Tensor] = []

    def step(self, watch: Callable | None) -> list[Tensor]:
        torch.manual_seed(1)
        z = self.encoder(torch.randn(3, 2, 6, 6))
        z.retain_grad()
        z.register_hook(self.hooks.append)
        first, second = self.heads
        outputs = [first(z), checkpoint(second[2:], second[:2](z), use_reentrant=False)]
        losses = [output.square().mean() for output in outputs]
        noise = torch.get_rng_state()
        if watch is not None:
            watch(losses, z)
        assert torch.equal(torch.get_rng_state(), noise)
        assert z.grad is None and not self.hooks
        assert all(p.grad is None for p in self.encoder.parameters())
        sum(losses).backward()
        results = [z.grad, *self.hooks]
        for module in (self.encoder, *self.heads):
            results += [p.grad for p in module.parameters()]
            results += [b.clone() for b in module.buffers()]
        return results


def test_graph_gradients_and_random_numbers_stay_as_they_were() -> None:
    monitor = SaliencyMonitor(every=1)
    expected, actual = Watched().step(None), Watched().step(monitor)
    assert len(actual) > 10 and monitor.summary().observations == 1
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_saliencies_have_no_graph_and_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = SaliencyMonitor.observe

    def spy(self, tasks, *arguments):
        seen.extend(tasks.saliencies())
        original(self, tasks, *arguments)

    monkeypatch.setattr(SaliencyMonitor, "observe", spy)
    for caller in (SaliencyMonitor(), RepMTL(start=1, monitor=SaliencyMonitor())):
        call(caller)
    assert len(seen) == 4 and not any(s.requires_grad for s in seen)
    call(RepMTL(monitor=SaliencyMonitor()))
    assert all(s.requires_grad for s in seen[4:])


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **kwargs or {})


def test_other_calls_cost_a_counter() -> None:
    """No operation runs, and the arguments are not looked at."""
    monitor = SaliencyMonitor(every=3)
    z = torch.randn(4, 3, requires_grad=True)
    losses = [z.square().sum(), z.sin().sum()]
    with Counting() as mode:
        monitor(losses, z)
        assert mode.calls > 0
        mode.calls = 0
        monitor(losses, z)
        monitor(losses, None)
        assert mode.calls == 0
        monitor(losses, z)
        assert mode.calls > 0
