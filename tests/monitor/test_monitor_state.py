"""The state of a monitor in checkpoints and copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import DEVICE
from summaries import assert_same
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from repmtl_kernels import Levels, RepMTL, SaliencyMonitor
from repmtl_kernels._monitor.state import as_text, from_text


def run(caller: nn.Module, numbers: range, levels: bool = False) -> None:
    """Make training calls; a task is absent from some."""
    for i in numbers:
        generator = torch.Generator().manual_seed(i)
        z = torch.randn(4, 3, 5, 2, generator=generator).to(DEVICE).requires_grad_()
        shared = Levels(fine=z, coarse=z.mean(2)) if levels else z
        losses = {"a": (z**3).mean(), "b": z.sin().mean(), "c": (z + i).cos().mean()}
        if levels:
            losses = {k: v + shared["coarse"].square().mean() for k, v in losses.items()}
        if i % 3 == 1:
            losses["b"] = None
        caller(losses, shared)


OPTIONS = {"every": 2, "keep": 3, "decay": 0.7}


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
@pytest.mark.parametrize("levels", [False, True])
def test_resumed_run_is_the_uninterrupted_one(levels: bool, cut: int, tmp_path) -> None:
    uninterrupted, first, resumed = (SaliencyMonitor(**OPTIONS) for _ in range(3))
    run(uninterrupted, range(12), levels)
    run(first, range(cut), levels)
    torch.save(first.state_dict(), tmp_path / "monitor.pt")
    saved = first.summary()
    run(first, range(cut, 12), levels)  # does not change what was saved
    if cut == 9:
        run(resumed, range(3), not levels)  # whatever it has seen before, of another form too
    resumed.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
    assert_same(resumed.summary(), saved)
    run(resumed, range(cut, 12), levels)
    for monitor in (first, resumed):
        assert_same(monitor.summary(), uninterrupted.summary())


def test_resumed_in_the_middle_of_a_step() -> None:
    first, resumed = SaliencyMonitor(every=1), SaliencyMonitor(every=1)
    z = torch.randn(4, 3, requires_grad=True)
    losses = [z.square().sum(), z.sin().sum()]
    first(losses, z, step=8)
    resumed.load_state_dict(first.state_dict())
    resumed(losses, z, step=8)
    assert resumed.summary().observations == 1
    resumed(losses, z, step=9)
    assert resumed.summary().observations == 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoint(tmp_path) -> None:
    """The way that docs/monitor.md shows, and the refusal without it."""
    first, resumed = (RepMTL(every=2, monitor=SaliencyMonitor(every=1)) for _ in range(2))
    run(first, range(3))
    place = {"checkpoint_id": tmp_path / "all"}
    distributed_checkpoint.save(first.state_dict(), **place)
    with pytest.raises((CheckpointException, ValueError), match="Size mismatch"):
        distributed_checkpoint.load(resumed.state_dict(), **place)
    place["checkpoint_id"] = tmp_path / "without"
    states = [criterion.state_dict() for criterion in (first, resumed)]
    for state in states:
        del state["monitor._extra_state"]
    distributed_checkpoint.save(states[0], **place)
    torch.save(first.monitor.state_dict(), tmp_path / "monitor.pt")
    distributed_checkpoint.load(states[1], **place)
    resumed.load_state_dict(states[1])
    resumed.monitor.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
    assert_same(resumed.monitor.summary(), first.monitor.summary())
    assert torch.equal(resumed.get_extra_state(), first.get_extra_state())


def test_state_as_text() -> None:
    """To the bit, and NaN too."""
    monitor = SaliencyMonitor(every=1)
    run(monitor, range(3))
    state = monitor.get_extra_state()
    assert state.isnan().any()
    assert torch.equal(from_text(as_text(state)).view(torch.int64), state.view(torch.int64))


def test_state_of_a_criterion_with_a_monitor() -> None:
    """The keys of a criterion without one are as before, and every checkpoint loads."""
    without, watched = RepMTL(every=2), RepMTL(every=2, monitor=SaliencyMonitor(every=1))
    for criterion in (without, watched):
        run(criterion, range(5))
    assert list(without.state_dict()) == ["_extra_state"]
    assert list(watched.state_dict()) == ["_extra_state", "monitor._extra_state"]
    assert all(isinstance(v, Tensor) for v in watched.state_dict().values())
    assert torch.equal(*(c.state_dict()["_extra_state"] for c in (without, watched)))
    summary = watched.monitor.summary()
    watched.load_state_dict(without.state_dict())
    watched.load_state_dict({"_extra_state": torch.tensor(3)})
    assert_same(watched.monitor.summary(), summary)
    fresh = RepMTL(every=2, monitor=SaliencyMonitor(every=1))
    fresh.load_state_dict(watched.state_dict())
    assert_same(fresh.monitor.summary(), summary)
    holder = nn.ModuleDict({"criterion": RepMTL(every=2)})
    held = {f"criterion.{key}": value for key, value in watched.state_dict().items()}
    holder.load_state_dict(held)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        holder.load_state_dict({**held, "criterion.other": torch.zeros(1)})


def test_model_from_before_the_monitor() -> None:
    holder = nn.ModuleDict({"head": nn.Linear(2, 2), "monitor": SaliencyMonitor(every=1)})
    run(holder["monitor"], range(2))
    before = {k: v for k, v in holder.state_dict().items() if k.startswith("head")}
    holder.load_state_dict(before)
    assert holder["monitor"].summary().observations == 2
    before.popitem()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"head"):
        holder.load_state_dict(before)


@pytest.mark.parametrize(
    "duplicate",
    (copy.deepcopy, lambda criterion: pickle.loads(pickle.dumps(criterion))),
    ids=("deepcopy", "pickle"),
)
@pytest.mark.parametrize("inside", [False, True])
def test_copies_go_their_own_way(inside: bool, duplicate) -> None:
    monitor = SaliencyMonitor(every=2, names=["x", "y", "z"])
    caller = RepMTL(monitor=monitor) if inside else monitor
    run(caller, range(3))
    other = duplicate(caller)
    of_other = other.monitor if inside else other
    assert of_other is not monitor and repr(other) == repr(caller)
    assert_same(of_other.summary(), monitor.summary())
    kept = monitor.summary()
    run(other, range(3, 6))
    assert_same(monitor.summary(), kept)
    run(caller, range(3, 6))
    assert_same(of_other.summary(), monitor.summary())


def test_casts_and_moves_leave_the_numbers() -> None:
    """A model in 16 bits has a monitor in float64."""
    monitor = SaliencyMonitor(every=1)
    run(monitor, range(3))
    kept = monitor.summary()
    assert_same(monitor.half().to(torch.bfloat16).to(DEVICE).summary(), kept)
    run(monitor, range(3, 5))
    assert monitor.summary().observations == 5


@pytest.mark.gpu
def test_a_checkpoint_goes_on_on_the_device() -> None:
    monitor, resumed = SaliencyMonitor(every=1), SaliencyMonitor(every=1)
    run(monitor, range(4))
    run(resumed, range(2))
    state = resumed.state_dict()
    assert state["_extra_state"].device.type == "cpu"
    resumed = SaliencyMonitor(every=1)
    resumed.load_state_dict(state)
    run(resumed, range(2, 4))
    assert_same(resumed.summary(), monitor.summary())


def test_checkpoint_that_is_loaded_in_inference_mode() -> None:
    first, resumed = SaliencyMonitor(every=1), SaliencyMonitor(every=1)
    run(first, range(2))
    with torch.inference_mode():
        resumed.load_state_dict(first.state_dict())
        assert_same(resumed.summary(), first.summary())
    for monitor in (first, resumed):
        run(monitor, range(2, 4))
    assert_same(resumed.summary(), first.summary())


def test_repr_and_options() -> None:
    monitor = SaliencyMonitor(every=7, keep=9)
    assert repr(monitor) == (
        "SaliencyMonitor(every=7, decay=0.9, names=None, channel_dim=1, group=None, keep=9, "
        "backend='auto')"
    )
    criterion = RepMTL(monitor=monitor)
    assert repr(criterion).count("SaliencyMonitor(every=7") == 1
    assert criterion.options()["monitor"] is monitor
    assert list(criterion.children()) == [monitor]
    assert "monitor=None" in repr(RepMTL())
    criterion.eval()
    assert not monitor.training
    criterion.train().monitor = None
    run(criterion, range(1))
    assert monitor.summary().observations == 0
    criterion.monitor = monitor
    run(criterion, range(1))
    assert monitor.summary().observations == 1
