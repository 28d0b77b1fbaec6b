"""Options and masks that are refused, and the messages."""

from __future__ import annotations

import math

import pytest
import torch
from small_network import PRESENT, Network, applied

from repmtl_kernels import RepMTL


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"lambda_tsr": -1}, ValueError, "lambda_tsr: expected a finite number of at least 0"),
        ({"lambda_csa": math.nan}, ValueError, "lambda_csa: expected a finite number"),
        ({"lambda_csa": "1"}, TypeError, "lambda_csa: expected a number, got str"),
        ({"over": "channels"}, ValueError, "over: expected one of 'tasks', 'space'"),
        ({"normalizer": "l2"}, ValueError, "normalizer: expected one of"),
        ({"tsr_temperature": 0}, ValueError, "tsr_temperature: expected .* above 0"),
        ({"csa_temperature": 0}, ValueError, "csa_temperature: expected .* above 0"),
        ({"eps": -1.0}, ValueError, "eps: expected"),
        ({"log_losses": 1}, TypeError, "log_losses: expected a bool, got int"),
        ({"every": 0}, ValueError, "every: expected an int of at least 1; got 0"),
        ({"every": 2.0}, TypeError, "every: expected an int, got float"),
        ({"every": True}, TypeError, "every: expected an int, got bool"),
        ({"start": -1}, ValueError, "start: expected an int of at least 0; got -1"),
        ({"ramp": 0.5}, TypeError, "ramp: expected an int, got float"),
        ({"strength": -0.1}, ValueError, "strength: expected a finite number of at least 0"),
        ({"strength": "high"}, TypeError, "strength: expected a number, got str"),
        ({"clip": 0}, ValueError, "clip: expected a finite number above 0"),
        ({"clip": math.inf}, ValueError, "clip: expected a finite number above 0"),
        ({"log_offset": 0.1}, ValueError, "log_offset: .* expected 0 without log_losses=True"),
        ({"log_losses": True, "log_offset": -1}, ValueError, "log_offset: expected"),
        ({"tsr_floor": -1}, ValueError, "tsr_floor: expected a finite number of at least 0"),
        (
            {"tsr_floor": 0.1, "normalizer": "softmax"},
            ValueError,
            "tsr_floor: .* expected 0 with normalizer='softmax', got 0.1",
        ),
        ({"group": "all"}, ValueError, "group: expected None .* got 'all'"),
        ({"group": 1}, TypeError, "group: expected None .* got int"),
        ({"memory": "none"}, ValueError, "memory: expected one of 'auto', 'save', 'recompute'"),
        ({"task_weights": [1, -1]}, ValueError, r"task_weights\[1\]: expected .* at least 0"),
        ({"task_weights": {"a": None}}, TypeError, r"task_weights\['a'\]: expected a number"),
        ({"task_weights": torch.ones(2)}, TypeError, "task_weights: expected .* got Tensor"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_message_for_bad_options(options: dict, error, message: str) -> None:
    with pytest.raises(error, match=message):
        RepMTL(**options)


@pytest.mark.parametrize(
    "name, value",
    [
        ("every", 0),
        ("start", -1),
        ("ramp", -1),
        ("strength", -1.0),
        ("clip", 0.0),
        ("memory", "little"),
        ("log_offset", 0.1),
        ("tsr_floor", math.nan),
        ("task_weights", [1.0, -1.0, 1.0]),
    ],
)
def test_message_for_bad_options_set_later(network: Network, name: str, value) -> None:
    criterion = RepMTL()
    setattr(criterion, name, value)
    z = network.encoder(network.images())
    with pytest.raises(ValueError, match=f"^{name}.*: .*expected"):
        criterion(network.losses(z, network.targets()), z)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize(
    "weights, keyed, error, message",
    [
        ([1.0, 2.0], False, ValueError, "task_weights: expected 3, one for each loss; got 2"),
        ([1.0] * 3, True, TypeError, "task_weights: losses is a dict, .* got tuple"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, False, TypeError, "task_weights: losses is a list, .* got dict"),
        ({"a": 1.0, "b": 1.0}, True, ValueError, r"task_weights: expected the keys .*\['a', 'b'\]"),
    ],
)
def test_message_for_weights_of_other_tasks(
    network: Network, weights, keyed: bool, error, message: str, training: bool
) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    task_losses = dict(zip("abc", losses, strict=True)) if keyed else losses
    with pytest.raises(error, match=message):
        RepMTL(task_weights=weights).train(training)(task_losses, z)


@pytest.mark.parametrize("lambda_csa", (0, 0.01))
def test_message_for_a_mask_of_another_shape(network: Network, lambda_csa: float) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    with pytest.raises(ValueError, match=r"present: expected shape \(T, B\) = \(3, 4\)"):
        RepMTL(lambda_csa=lambda_csa)(losses, z, PRESENT.T)


@pytest.mark.parametrize("lambda_csa", (0, 0.01))
def test_a_bad_batch_is_refused_on_every_step(network: Network, lambda_csa: float) -> None:
    criterion = RepMTL(lambda_csa=lambda_csa, every=4)
    assert applied(criterion, network, 1) == [True]
    z = network.encoder(network.images())
    with pytest.raises(ValueError, match="present: expected shape"):
        criterion(network.losses(z, network.targets()), z, PRESENT.T)
    z = network.encoder(network.images()[:1])
    losses = [head(z).square().mean() for head in network.heads]
    if lambda_csa:
        with pytest.raises(ValueError, match="got B = 1.*lambda_csa=0"):
            criterion(losses, z)
    else:
        criterion(losses, z)


def test_repr_shows_the_options() -> None:
    shown = repr(RepMTL(0.9, every=4))
    assert "lambda_tsr=0.9" in shown and "every=4" in shown
