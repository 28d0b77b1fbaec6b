"""Messages for what a monitor does not take."""

from __future__ import annotations

import pytest
import torch

from repmtl_kernels import Levels, SaliencyMonitor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: expected an int of at least 1; got 0"),
        ({"every": 2.0}, "every: expected an int, got float"),
        ({"keep": 1}, "keep: expected an int of at least 2; got 1"),
        ({"decay": 1}, "decay: expected a number from 0 to below 1; got 1"),
        ({"decay": -0.5}, "decay: expected a finite number of at least 0; got -0.5"),
        ({"decay": "slow"}, "decay: expected a number, got str"),
        ({"names": "ab"}, "names: expected a sequence of str or None, got str"),
        ({"names": ["a", 3]}, r"names\[1\]: expected a str, got int"),
        ({"names": ["a", "b", "a"]}, "names: expected different names, got 'a' twice"),
        ({"channel_dim": 0}, "channel_dim: expected a dimension other than 0"),
        ({"backend": "fast"}, "backend: expected one of"),
        ({"group": "all"}, "group: expected None"),
    ],
    ids=str,
)
def test_options(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        SaliencyMonitor(**options)


def test_options_that_are_set_later() -> None:
    z = torch.randn(4, 3, requires_grad=True)
    losses = [z.sum(), z.sin().sum()]
    for name, value in (("every", 0), ("decay", 2.0), ("keep", 0)):
        monitor = SaliencyMonitor()
        setattr(monitor, name, value)
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            monitor(losses, z)


Z = torch.randn(4, 3, 5, requires_grad=True)
LOSSES = [Z.square().sum(), Z.sin().sum()]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"losses": LOSSES[0]}, "losses: expected a list or dict of T scalar losses, got one"),
        ({"losses": []}, "losses: expected at least one task"),
        ({"losses": [None, None]}, "losses: expected the loss of at least one task"),
        ({"losses": {1: LOSSES[0], "1": LOSSES[1]}}, "losses: expected keys with different texts"),
        ({"losses": [LOSSES[0], LOSSES[1].detach()]}, r"losses\[1\]: expected a loss with a graph"),
        ({"representation": Z * 1}, r"losses\[0\]: does not depend on representation"),
        ({"representation": Z.detach()}, "representation: expected a tensor with requires_grad"),
        ({"representation": None}, "representation: expected a Tensor"),
        ({"present": torch.ones(2, 3)}, "present: expected a bool Tensor"),
        ({"positions": torch.ones(4, 4, dtype=torch.bool)}, "positions: expected shape"),
        ({"step": -1}, "step: expected an int of at least 0"),
        ({"step": 1.5}, "step: expected an int, got float"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_calls(changed: dict, message: str) -> None:
    arguments = {"losses": LOSSES, "representation": Z} | changed
    monitor = SaliencyMonitor()
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        monitor(**arguments)
    monitor(LOSSES, Z)
    assert monitor.summary().observations == 1


def test_calls_that_differ_from_the_first() -> None:
    monitor = SaliencyMonitor(every=1)
    monitor({"a": LOSSES[0], "b": LOSSES[1]}, Z)
    with pytest.raises(ValueError, match=r"losses: expected tasks of the monitor's first call, \["):
        monitor({"a": LOSSES[0], "c": LOSSES[1]}, Z)
    z = torch.randn(4, 3, requires_grad=True)
    losses = {"a": z.square().sum(), "b": z.sin().sum()}
    with pytest.raises(ValueError, match="representation: expected 1 dimensions of positions"):
        monitor(losses, z)
    with pytest.raises(ValueError, match="levels of the monitor's first call, one Tensor; got"):
        monitor(losses, Levels(p3=z))
    named = SaliencyMonitor(names=["a"])
    with pytest.raises(ValueError, match=r"names: expected 2, one for each of the tasks \['0'"):
        named(LOSSES, Z)
    named.names = ("a", "b")
    named(LOSSES, Z)
    named.names = ("a", "b", "c")
    with pytest.raises(ValueError, match="names: expected 2"):
        named.summary()


def test_keys_of_the_losses_in_another_order_are_no_names() -> None:
    losses = {"a": LOSSES[0], "b": LOSSES[1]}
    with pytest.raises(ValueError, match=r"names: expected the order of the losses, \['a', 'b'\]"):
        SaliencyMonitor(names=["b", "a"])(losses, Z)
    for names in (["a", "b"], ["b", "c"]):
        monitor = SaliencyMonitor(names=names)
        monitor(losses, Z)
        assert monitor.summary().tasks == tuple(names)
