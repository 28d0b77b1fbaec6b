"""The calls on which the regulariser is applied, and its weight on each of them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from small_network import LAMBDAS, TASKS, Network, applied, assert_same_step, literal

from repmtl_kernels import RepMTL


@pytest.mark.parametrize("every", (1, 2, 3))
def test_every(network: Network, every: int) -> None:
    criterion = RepMTL(**LAMBDAS, every=every)
    for step in range(2 * every):
        z = network.encoder(network.images())
        losses = network.losses(z, network.targets())
        total = criterion(losses, z)
        if step % every == 0:
            expected, *_ = literal(
                losses, [z] * TASKS, lambda_tsr=0.9 * every, lambda_csa=0.7 * every
            )
        else:
            expected = sum(losses)
        assert_same_step(network, total, expected)
        assert criterion.last.applied is (step % every == 0)
        regularizer = criterion.last.regularizer
        torch.testing.assert_close(
            criterion.last.total, sum(losses).detach() + (0 if regularizer is None else regularizer)
        )


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"strength": 0.5}], ids=str)
def test_start_and_ramp(network: Network, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = RepMTL(**LAMBDAS, start=2, ramp=4, **options)
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(a) or grad(*a, **k))
    images, targets = network.images(), network.targets()
    weights = [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    for call, weight in enumerate(weights):
        z = network.encoder(images)
        losses = network.losses(z, targets)
        calls.clear()
        total = criterion(losses, z)
        weight = criterion.every * weight if (call - 2) % criterion.every == 0 else 0
        assert len(calls) == (TASKS if weight else 0)
        assert criterion.last.applied is bool(weight)
        if not weight:
            assert torch.equal(total, sum(losses))
        elif criterion.strength is None:
            lambdas = {name: weight * value for name, value in LAMBDAS.items()}
            expected, *_ = literal(losses, [z] * TASKS, **lambdas)
            assert_same_step(network, total, expected)
        else:
            total.backward()
            if call > 2:  # the estimate is exact for a network that does not change
                assert criterion.last.ratio.item() == pytest.approx(0.5 * weight, rel=1e-6)


def test_evaluation_and_failed_calls_are_not_counted(network: Network) -> None:
    criterion = RepMTL(every=3)
    assert applied(criterion, network, 2) == [True, False]
    criterion.eval()
    assert applied(criterion, network, 2) == [False, False]
    criterion.train()
    with pytest.raises(TypeError):
        criterion(None, None)
    assert applied(criterion, network, 3) == [False, True, False]


def test_schedule_of_the_weights(network: Network) -> None:
    criterion = RepMTL(0, 0)
    z = network.encoder(network.images())
    losses = network.losses(z, network.targets())
    assert torch.equal(criterion(losses, z), sum(losses))
    criterion.lambda_tsr, criterion.lambda_csa = 0.9, 0.7
    expected, *_ = literal(losses, [z] * TASKS, **LAMBDAS)
    torch.testing.assert_close(criterion(losses, z), expected)
    criterion.lambda_csa = -1
    with pytest.raises(ValueError, match="lambda_csa: expected a finite number of at least 0"):
        criterion(losses, z)


def test_second_order_where_the_next_call_applies(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []

    @contextlib.contextmanager
    def second_order():
        entered.append(True)
        yield

    monkeypatch.setattr("repmtl_kernels.criterion.second_order", second_order)

    def uses_second_order(criterion, steps):
        uses = []
        for _ in range(steps):
            entered.clear()
            z = network.encoder(network.images())
            with criterion.second_order():
                losses = network.losses(z, network.targets())
            criterion(losses, z)
            assert bool(entered) is criterion.last.applied
            uses.append(bool(entered))
        return uses

    assert uses_second_order(RepMTL(every=1), 2) == [True, True]
    assert uses_second_order(RepMTL(start=1, every=2), 4) == [False, True, False, True]
    assert uses_second_order(RepMTL(strength=0.1), 1) == [True]
    for off in (RepMTL(0, 0), RepMTL().eval(), RepMTL(strength=0.0)):
        assert uses_second_order(off, 1) == [False]
    criterion = RepMTL()
    criterion.every = 0
    with pytest.raises(ValueError, match="every: expected"):
        criterion.second_order()
