"""The total that a call returns and the values that it reports, also for log(0) and NaN."""

from __future__ import annotations

import math

import pytest
import torch
from small_network import LAMBDAS, PRESENT, Network

from repmtl_kernels import RepMTL


@pytest.mark.parametrize("log_losses", (False, True))
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode, torch.enable_grad))
def test_evaluation_mode(network: Network, mode, log_losses: bool) -> None:
    criterion = RepMTL(**LAMBDAS, log_losses=log_losses, task_weights=[1.0, 2.0, 3.0]).eval()
    with mode():
        z = network.encoder(network.images())
        losses = network.losses(z, network.targets())
        total = criterion(losses, z)
        terms = [loss.log() for loss in losses] if log_losses else losses
        expected = terms[0] + 2 * terms[1] + 3 * terms[2]
    assert torch.equal(total, expected)
    last = criterion.last
    assert (last.tsr, last.csa, last.regularizer, last.applied) == (None, None, None, False)
    assert torch.equal(last.total, expected)


def test_log_of_zero_with_an_offset(network: Network) -> None:
    criterion = RepMTL(log_losses=True, log_offset=0.01)
    for training in (True, False):
        z = network.encoder(network.images())
        losses = [*network.losses(z, network.targets())[:2], (0 * z).sum()]
        total = criterion.train(training)(losses, z)
        network.zero_grad()
        total.backward()
        assert total.isfinite() and network.encoder[0].weight.grad.isfinite().all()
        assert criterion.last.losses[2] == 0


def test_nan_is_not_hidden(network: Network) -> None:
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    losses[1] = losses[1] * math.nan
    criterion = RepMTL(task_weights=[1, 0, 1])
    assert criterion(losses, z).isnan()
    assert criterion.last.csa.isnan()


def test_last_has_no_graph_and_does_not_follow_the_total(network: Network) -> None:
    criterion = RepMTL(**LAMBDAS)
    assert criterion.last is None
    z = network.encoder(network.images())
    total = criterion(network.losses(z, network.targets()), z)
    last = criterion.last
    scalars = [last.tsr, last.csa, last.regularizer, last.total, *last.losses.values()]
    assert all(s.shape == () and s.grad_fn is None and not s.requires_grad for s in scalars)
    before = last.total.item()
    total /= 8
    assert last.total.item() == before


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"log_losses": True, "log_offset": 0.1},
        {"every": 2},
        {"lambda_csa": 0, "tsr_floor": 0.1},
        {"lambda_tsr": 0},
        {"strength": 0.1, "clip": 2.0, "ramp": 4},
    ),
    ids=("plain", "log", "every", "tsr", "csa", "strength"),
)
def test_no_value_is_read_on_the_host(network: Network, options: dict) -> None:
    """Tensors on the meta device have no values, so that reading one raises.

    On a CUDA device, reading one waits for all work in flight.
    """
    targets = [y.to("meta") for y in network.targets()]
    images, network = network.images().to("meta"), network.to("meta")
    criterion = RepMTL(**options, task_weights=[1, 2, 3], backend="eager")
    for training in (True, True, False):
        for absent in (None, 1):
            z = network.encoder(images)
            losses = [None if t == absent else x for t, x in enumerate(network.losses(z, targets))]
            total = criterion.train(training)(losses, z, PRESENT.to("meta"))
            total.backward()
            last = criterion.last
            reported = [loss for loss in last.losses.values() if loss is not None]
            assert total.is_meta and all(loss.is_meta for loss in reported)
            assert last.ratio.is_meta if last.applied else last.ratio is None
    with pytest.raises(RuntimeError, match="meta"):
        bool(criterion.last.total > 0)
