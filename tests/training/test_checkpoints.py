"""The state of a criterion in checkpoints and copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_network import LAMBDAS, Network, applied, batch, step_on_noise
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint

from repmtl_kernels import RepMTL


def test_start_is_counted_in_the_checkpoint(network: Network) -> None:
    criterion = RepMTL(start=3, every=1)
    assert applied(criterion, network, 2) == [False, False]
    resumed = RepMTL(start=3, every=1)
    resumed.load_state_dict(criterion.state_dict())
    assert applied(resumed, network, 3) == [False, True, True]


def test_state_dict_in_the_middle_of_a_cycle(network: Network, tmp_path) -> None:
    criterion = RepMTL(every=3)
    assert applied(criterion, network, 4) == [True, False, False, True]
    holder = nn.ModuleDict({"network": network, "criterion": criterion})
    torch.save(holder.state_dict(), tmp_path / "checkpoint.pt")
    assert applied(criterion, network, 1) == [False]  # does not change what was saved
    resumed = nn.ModuleDict({"network": Network(), "criterion": RepMTL(every=3)})
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert applied(resumed["criterion"], network, 4) == [False, False, True, False]


def test_checkpoint_of_the_model_without_a_criterion(network: Network) -> None:
    holder = nn.ModuleDict({"network": network, "criterion": RepMTL(every=3)})
    applied(holder["criterion"], network, 1)
    before = {k: v for k, v in holder.state_dict().items() if k.startswith("network")}
    holder.load_state_dict(before)
    assert applied(holder["criterion"], network, 3) == [False, False, True]
    before.popitem()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"network"):
        holder.load_state_dict(before)


def test_resumed_run_is_the_uninterrupted_one(network: Network, tmp_path) -> None:
    options = {**LAMBDAS, "strength": 0.3, "clip": 0.9, "every": 2}
    images, targets = network.images(), network.targets()
    data = [(images + 0.1 * i, [y * (1 + 0.2 * i) for y in targets]) for i in range(6)]

    def run(criterion, steps):
        results = []
        for images, targets in steps:
            z = network.encoder(images)
            total = criterion(network.losses(z, targets), z)
            results += [total.detach(), *torch.autograd.grad(total, network.encoder.parameters())]
        return results

    uninterrupted = RepMTL(**options)
    expected = run(uninterrupted, data[:3]) and run(uninterrupted, data[3:])
    first = RepMTL(**options)
    run(first, data[:3])
    torch.save(first.state_dict(), tmp_path / "criterion.pt")
    run(first, data[3:])  # does not change what was saved
    resumed = RepMTL(**options)
    resumed.load_state_dict(torch.load(tmp_path / "criterion.pt", weights_only=True))
    results = run(resumed, data[3:])
    assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))
    fresh = RepMTL(**options)
    fresh._progress.calls = 3
    assert not torch.equal(run(fresh, data[3:])[3], expected[3])


def test_resumed_in_the_middle_of_a_step() -> None:
    def run(criterion: RepMTL, first: int, last: int) -> list[tuple]:
        results = []
        for i in range(first, last):
            step_on_noise(criterion, seed=i, step=i // 3)
            results.append((criterion.last.applied, criterion.last.total.item()))
        return results

    uninterrupted = run(RepMTL(every=2, strength=0.3, clip=1.0), 0, 12)
    for cut in (1, 2, 3, 4, 8):
        first, resumed = (RepMTL(every=2, strength=0.3, clip=1.0) for _ in range(2))
        assert run(first, 0, cut) == uninterrupted[:cut]
        resumed.load_state_dict(first.state_dict())
        assert run(resumed, cut, 12) == uninterrupted[cut:]


def test_checkpoint_that_is_loaded_in_inference_mode(network: Network) -> None:
    options = {**LAMBDAS, "strength": 0.3, "clip": 2.0}
    first, resumed, fresh = (RepMTL(**options) for _ in range(3))
    z, losses = batch(network)
    first(losses, z).backward()
    with torch.inference_mode():
        resumed.load_state_dict(first.state_dict())
        fresh._progress.ratio.value(z.device, 1.0)
        assert fresh._progress.size.numbers() == [0, 0]
    z, losses = batch(network)
    for criterion in (first, resumed, fresh):
        criterion(losses, z).backward(retain_graph=True)
    assert torch.equal(first.get_extra_state(), resumed.get_extra_state())
    assert fresh.get_extra_state()[1] > 0


def test_checkpoint_of_the_first_version_has_a_count_alone() -> None:
    criterion = RepMTL(strength=0.1)
    criterion.load_state_dict({"_extra_state": torch.tensor(7)})
    assert criterion.get_extra_state().tolist() == [7, 0, 0, 0, 0, -1]


@pytest.mark.parametrize("step", [None, 4])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoint(step: int | None, tmp_path) -> None:
    """It loads into tensors of the sizes that a new criterion has."""
    first, resumed = (RepMTL(every=3, strength=0.3) for _ in range(2))
    step_on_noise(first, step=step)
    saved = first.state_dict()
    distributed_checkpoint.save(saved, checkpoint_id=tmp_path)
    loaded = resumed.state_dict()
    distributed_checkpoint.load(loaded, checkpoint_id=tmp_path)
    resumed.load_state_dict(loaded)
    assert torch.equal(resumed.get_extra_state(), first.get_extra_state())
    assert resumed._progress.step == step


@pytest.mark.parametrize(
    "duplicate",
    (copy.deepcopy, lambda criterion: pickle.loads(pickle.dumps(criterion))),
    ids=("deepcopy", "pickle"),
)
def test_copies_are_independent(network: Network, duplicate) -> None:
    criterion = RepMTL(0.9, 0.7, every=2, task_weights=[1.0, 2.0, 3.0])
    applied(criterion, network, 1)
    other = duplicate(criterion)
    torch.testing.assert_close(other.last.total, criterion.last.total)
    assert applied(other, network, 2) == [False, True]
    assert applied(criterion, network, 2) == [False, True]
    assert repr(other) == repr(criterion)


def test_a_copy_has_the_same_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu")
    holder = nn.ModuleDict({"criterion": RepMTL(scaler=scaler), "head": nn.Linear(2, 2)})
    assert copy.deepcopy(holder)["criterion"].scaler is scaler
    other, criterion = copy.deepcopy((scaler, holder["criterion"]))
    assert other is not scaler and criterion.scaler is other  # they are copied together


def test_copies_go_their_own_way() -> None:
    criterion = RepMTL(every=2, strength=0.3, clip=2.0)
    step_on_noise(criterion)
    state = criterion.get_extra_state()
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(copied.get_extra_state(), state)
        step_on_noise(copied)
        assert not copied.last.applied and criterion.last.applied
        assert torch.equal(criterion.get_extra_state(), state)
