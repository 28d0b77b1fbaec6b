"""The logarithm of the losses: its values, and the losses that have none."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle

import pytest
import torch
from cases import DEVICE
from small_network import LAMBDAS, Network, batch

from repmtl_kernels import LogLosses, RepMTL
from repmtl_kernels._training.running_mean import DeferredValue

LOSSES = (0.5, 2.0, 3.0)


def leaves(values=LOSSES, dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.tensor(v, dtype=dtype, requires_grad=True) for v in values]


@pytest.mark.parametrize("offset", (0.0, 0.01))
@pytest.mark.parametrize("weights", (None, (1.0, 0.5, 0.0)))
def test_value_and_gradient(offset: float, weights) -> None:
    losses = leaves()
    total = LogLosses(log_offset=offset, task_weights=weights)(losses)
    total.backward()
    ones = weights or (1.0, 1.0, 1.0)
    expected = sum(w * math.log(v + offset) for w, v in zip(ones, LOSSES, strict=True))
    assert total.item() == pytest.approx(expected, abs=1e-14)
    for loss, w, v in zip(losses, ones, LOSSES, strict=True):
        assert loss.grad.item() == pytest.approx(w / (v + offset), abs=1e-14)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda *x: LogLosses(log_offset=0.1)(list(x)), leaves())


@pytest.mark.parametrize("mode", (torch.no_grad, torch.enable_grad))
def test_it_is_rep_mtl_without_the_regulariser(network: Network, mode) -> None:
    z, losses = batch(network)
    with mode():
        expected = RepMTL(0, 0, log_losses=True, task_weights=[1, 2, 3])(losses, z)
        assert torch.equal(LogLosses(task_weights=[1, 2, 3])(losses), expected)
        assert torch.equal(RepMTL(log_losses=True).eval()(losses, z), LogLosses()(losses))


def test_absent_tasks_and_names() -> None:
    losses = dict(zip("abc", leaves(), strict=True))
    criterion = LogLosses(task_weights={"a": 1.0, "b": 2.0, "c": 1.0})
    assert criterion({**losses, "a": None}).item() == pytest.approx(2 * math.log(2) + math.log(3))
    with pytest.raises(ValueError, match="task_weights: expected the keys"):
        criterion({"a": losses["a"]})


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_it_is_float32_at_least(dtype: torch.dtype) -> None:
    total = LogLosses()(leaves(dtype=dtype))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize(("value", "offset"), ((0.0, 0.0), (-0.25, 0.0), (-0.25, 0.5)))
@pytest.mark.parametrize("options", ({}, LAMBDAS, {"strength": 0.0}), ids=("default", "set", "off"))
def test_a_loss_without_a_logarithm_is_refused(
    network: Network, value: float, offset: float, training: bool, options: dict
) -> None:
    z, losses = batch(network)
    losses[1] = (0 * z).sum() + value
    least = "of at least 0" if offset else "above 0"
    message = rf"losses\[1\]: expected a loss {least}, .*; got {value:g}\. Pass None"
    criterion = RepMTL(**options, log_losses=True, log_offset=offset).train(training)
    with pytest.raises(ValueError, match=message):
        criterion(losses, z)
    with pytest.raises(ValueError, match=message):
        LogLosses(log_offset=offset)(losses)


def test_a_loss_of_0_has_a_logarithm_with_an_offset(network: Network) -> None:
    z, losses = batch(network)
    losses[1] = (0 * z).sum()
    assert LogLosses(log_offset=0.01)(losses).isfinite()
    assert RepMTL(log_losses=True, log_offset=0.01)(losses, z).isfinite()


def test_nan_is_not_hidden(network: Network) -> None:
    z, losses = batch(network)
    losses[1] = losses[1] * math.nan
    assert LogLosses()(losses).isnan()
    assert RepMTL(log_losses=True)(losses, z).isnan()


def test_a_device_is_not_waited_for(monkeypatch) -> None:
    """The answer of a call is then that of the call before, under its own names."""
    sent: list = []

    def read(self, value, label=None):
        sent.append((value.clone(), label))
        return sent[-2:-1]

    monkeypatch.setattr(DeferredValue, "read", read)
    criterion = LogLosses()
    assert criterion({"a": leaves()[0], "b": leaves((0.0,))[0]}).item() == -math.inf
    with pytest.raises(ValueError, match=r"losses\['b'\]: .* got one that is not, in an earlier"):
        criterion({"a": leaves()[0], "c": leaves()[1]})


def test_no_value_is_read_in_dry_runs_and_transforms() -> None:
    assert LogLosses()([torch.ones((), device="meta")]).is_meta
    gradient = torch.func.grad(lambda x: LogLosses()([x, 2 * x]))(torch.tensor(4.0))
    assert gradient.item() == pytest.approx(0.5)


def test_copies_and_pickles() -> None:
    criterion = LogLosses(log_offset=0.1, task_weights=[1, 2, 3])
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other(leaves()), criterion(leaves()))
    assert repr(criterion) == "LogLosses(log_offset=0.1, task_weights=(1.0, 2.0, 3.0))"
    assert not criterion.state_dict()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"log_offset": -0.1}, ValueError, "log_offset: "),
        ({"log_offset": "0.1"}, TypeError, "log_offset: "),
        ({"task_weights": [-1.0]}, ValueError, r"task_weights\[0\]: "),
        ({"task_weights": 1.0}, TypeError, "task_weights: "),
    ),
)
def test_bad_options(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LogLosses(**options)


def test_bad_losses() -> None:
    with pytest.raises(TypeError, match="losses: expected a list or dict of T scalar losses"):
        LogLosses()(torch.ones(3))
    with pytest.raises(ValueError, match="losses: expected at least one task"):
        LogLosses()([])


class OnCuda:
    """Stands for a flag on CUDA; its copy arrives when the event of its call is done."""

    is_cpu, is_cuda, device = False, True, torch.device("cpu")

    def __init__(self, flag: bool) -> None:
        self.flag = flag

    def to(self, device: str, non_blocking: bool) -> torch.Tensor:
        assert device == "cpu" and non_blocking
        return torch.tensor(self.flag)


def test_no_value_is_lost_while_the_device_is_behind(monkeypatch) -> None:
    done: list[bool] = []

    class Event:
        def record(self) -> None:
            self.number = len(done)
            done.append(False)

        def query(self) -> bool:
            return done[self.number]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    reader = DeferredValue()
    for call, flag in enumerate((False, True, False)):
        assert reader.read(OnCuda(flag), call) == []
    done[:] = [True, True, False]
    assert [(bool(v), call) for v, call in reader.read(OnCuda(False), 3)] == [(False, 0), (True, 1)]
    done[2:] = [True, True]
    assert [call for _, call in copy.deepcopy(reader).read(OnCuda(False), 4)] == []
    assert [call for _, call in reader.read(OnCuda(False), 5)] == [2, 3]
    assert not reader.is_true(OnCuda(True))
    done[-1] = True
    assert reader.is_true(OnCuda(False))


def test_compiled_regions_refuse_nothing() -> None:
    compiled = torch.compile(LogLosses(), backend="eager", fullgraph=True)
    assert compiled(leaves()).item() == pytest.approx(math.log(3))
    assert compiled([*leaves((1.0,)), *leaves((0.0,))]).item() == -math.inf


@pytest.mark.gpu
def test_on_cuda_a_later_call_refuses() -> None:
    criterion = LogLosses()
    criterion([torch.zeros((), device=DEVICE)])
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="in an earlier call"):
        criterion([torch.ones((), device=DEVICE)])
