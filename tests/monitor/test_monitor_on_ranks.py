"""A monitor on two ranks sees what one process with the joined batch sees.

The functions called ``check_...`` run on both ranks, all in one pair of processes. The name of one
is the name of its test.
"""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.distributed as dist
from literal_monitor import FIELDS, observe
from torch import Tensor

from repmtl_kernels import RepMTL, SaliencyMonitor, SaliencySummary

pytestmark = [pytest.mark.slow_cpu, ranks.needs_gloo]

TASKS, SIZES = 3, (2, 4)


def whole(*shape: int, seed: int = 0) -> list[Tensor]:
    """Return the saliencies of the joined batch."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(TASKS, sum(SIZES), *shape, generator=generator, dtype=torch.float64)
    return list(values + values[:1] + 0.3)


def own(rank: int) -> slice:
    return slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], None)


def assert_alike(actual: SaliencySummary, expected: SaliencySummary) -> None:
    assert (
        actual.observations == expected.observations and actual.maps.keys() == expected.maps.keys()
    )
    pairs = [(getattr(actual, name), getattr(expected, name)) for name in FIELDS]
    pairs += [(getattr(actual.history, n), getattr(expected.history, n)) for n in FIELDS]
    pairs += [(actual.maps[level], expected.maps[level]) for level in actual.maps]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, equal_nan=True)
    bits = torch.cat([ours.flatten() for ours, _ in pairs]).nan_to_num(7.0)
    of_ranks = [torch.empty_like(bits) for _ in range(2)]
    dist.all_gather(of_ranks, bits)
    assert torch.equal(*of_ranks)


def check_the_joined_batch(rank: int) -> None:
    """With levels, masks, samples without labels, and another absent task on each rank."""
    fine, coarse = whole(4, 3, 5), whole(6, 2, seed=1)
    present = torch.rand(TASKS, 6, generator=torch.Generator().manual_seed(2)) < 0.7
    masks = [torch.rand(6, 3, 5) < 0.7, torch.rand(6, 2) < 0.7]
    for mask in masks:
        dist.broadcast(mask, 0)
    joined, spread = SaliencyMonitor(every=1), SaliencyMonitor(every=1, group="world")
    for given in ({}, {"present": present}, {"positions": masks}):
        expected = observe(joined, [fine, coarse], **given)
        part = dict(given)
        if given.get("present") is not None:
            part["present"] = present[:, own(rank)]
        if given.get("positions") is not None:
            part["positions"] = [mask[own(rank)] for mask in masks]
        levels = [[s[own(rank)] for s in level] for level in (fine, coarse)]
        assert_alike(observe(spread, levels, **part), expected)


def check_tasks_that_are_absent_on_one_rank(rank: int) -> None:
    saliencies = whole(4, 5)
    monitor = SaliencyMonitor(group="world")
    level = [s[own(rank)] for s in saliencies]
    level[1 + rank] = None
    summary = observe(monitor, [level])
    # The joined batch has no label of task 1 on the first samples, and of task 2 on the others.
    present = torch.ones(TASKS, 6, dtype=torch.bool)
    present[1, : SIZES[0]] = present[2, SIZES[0] :] = False
    expected = observe(SaliencyMonitor(), [saliencies], present=present)
    for name in ("cosine", "conflicting_samples", "conflicting_positions", "norm_share"):
        torch.testing.assert_close(
            getattr(summary, name), getattr(expected, name), rtol=1e-11, atol=0, equal_nan=True
        )
    assert summary.cosine[1, 2].isnan() and summary.cosine[0, 1].isfinite()


def check_maps_of_another_size_on_each_rank(rank: int) -> None:
    torch.manual_seed(rank)
    monitor = SaliencyMonitor(group="world")
    summary = observe(monitor, [[torch.randn(2, 3, 5 + rank, 40 - 20 * rank) for _ in range(2)]])
    assert summary.maps[""].shape == (2, 6, 32)
    assert_alike(summary, monitor.summary())


def check_a_monitor_in_a_criterion(rank: int) -> None:
    """The group is that of the criterion, and both count alike."""
    monitors = [SaliencyMonitor(every=3), SaliencyMonitor(every=3)]
    for monitor, group, samples in (
        (monitors[0], None, slice(None)),
        (monitors[1], "world", own(rank)),
    ):
        criterion = RepMTL(0.5, 0.5, every=2, group=group, monitor=monitor)
        for seed in range(4):
            parts = [s[samples] for s in whole(4, 5, seed=seed)]
            z = torch.zeros_like(parts[0]).requires_grad_()
            criterion([(s * z).sum() for s in parts], z)
    assert monitors[1].summary().history.steps.tolist() == [0, 3]
    assert_alike(monitors[1].summary(), monitors[0].summary())


def check_monitors_that_differ(rank: int) -> None:
    parts = [s[own(rank)] for s in whole(4, 5)]

    def call(caller, **changed) -> None:
        z = torch.zeros_like(parts[0]).requires_grad_()
        arguments = {"losses": [(s * z).sum() for s in parts], "representation": z}
        caller(**arguments | changed)

    with pytest.raises(ValueError, match="the same every of the monitor .* got 2, 3 by rank"):
        call(SaliencyMonitor(every=2 + rank, group="world"))
    for monitors in ((2, 3), (None, 4)):
        every = monitors[rank]
        monitor = None if every is None else SaliencyMonitor(every=every)
        with pytest.raises(ValueError, match="a monitor with the same every, or none, on every"):
            call(RepMTL(group="world", monitor=monitor))
    wrong = {"representation": None} if rank else {}
    message = "representation: expected" if rank else r"group: ranks \[1\]"
    monitor = SaliencyMonitor(group="world")
    with pytest.raises((ValueError, TypeError), match=message):
        call(monitor, **wrong)
    call(monitor)
    assert monitor.summary().observations == 1
    loaded = SaliencyMonitor(every=1, group="world")
    call(loaded)
    state = loaded.state_dict()
    fresh = SaliencyMonitor(every=1, group="world")
    if rank:
        fresh.load_state_dict(state)
    with pytest.raises(ValueError, match="monitored training calls .* got 0, 1 by rank. Load the"):
        call(fresh)


def check_an_error_after_the_ranks_have_agreed(rank: int) -> None:
    """Calls without the regulariser and with it, and a monitor whose group is its own."""
    parts = [s[own(rank)] for s in whole(4, 5)]

    def call(caller, **changed) -> None:
        z = torch.zeros_like(parts[0]).requires_grad_()
        losses = [(s * z).sum() for s in parts]
        if changed.pop("detached", False):
            losses[1] = losses[1].detach()
        caller(**{"losses": losses, "representation": z} | changed)

    def watched(group: str | None) -> SaliencyMonitor:
        return SaliencyMonitor(every=1, group=group)

    others = r"group: ranks \[1\] of it have raised an error"
    for caller in (
        watched("world"),
        RepMTL(0.5, 0.5, every=2, group="world", monitor=watched(None)),
        RepMTL(0.5, 0.5, every=2, group="world", monitor=watched("world")),
        RepMTL(0.5, 0.0, every=2, group="world", monitor=watched(None)),
        RepMTL(0.5, 0.5, every=2, monitor=watched("world")),
    ):
        monitor = caller if isinstance(caller, SaliencyMonitor) else caller.monitor
        call(caller)
        for calls in (1, 2):
            for changed, message in (
                ({"representation": None}, "representation: expected"),
                ({"detached": True}, r"losses\[1\]: expected a loss with a graph"),
                ({"losses": "three"}, "losses: expected"),
            ):
                with pytest.raises((ValueError, TypeError), match=message if rank else others):
                    call(caller, **changed if rank else {})
            monitor.names = ("one", "name") if rank else None
            with pytest.raises(ValueError, match="names: expected 3" if rank else others):
                call(caller)
            monitor.names = None
            assert monitor._count.calls == calls
            call(caller)
        assert monitor.summary().history.steps.tolist() == [0, 1, 2]


CHECKS = ranks.checks_in(globals())


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_two_ranks(name: str, outcomes: list[dict[str, str]]) -> None:
    ranks.assert_passed(name, outcomes)
