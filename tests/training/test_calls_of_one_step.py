"""Several calls of one optimiser step count as one: closures, and batches in parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DEVICE
from small_network import LAMBDAS, losses_of, regularizer_weight, step_on_noise
from torch import Tensor, nn

from repmtl_kernels import RepMTL, second_order


@pytest.mark.parametrize("passes", (1, 2, 5))
@pytest.mark.parametrize(
    ("options", "expected"),
    (
        ({"every": 2}, [1, 0, 1, 0, 1, 0]),
        ({"every": 3}, [1, 0, 0, 1, 0, 0]),
        ({"start": 2}, [0, 0, 1, 1, 1, 1]),
        ({"start": 1, "every": 2}, [0, 1, 0, 1, 0, 1]),
    ),
    ids=str,
)
def test_calls_of_one_step_are_one(options: dict, expected: list, passes: int) -> None:
    criterion = RepMTL(**LAMBDAS, **options)
    for step, applied in enumerate(expected):
        for _ in range(passes):
            entered = criterion.second_order(step=step)
            step_on_noise(criterion, step=step)
            assert criterion.last.applied is bool(applied)
            assert isinstance(entered, type(second_order())) is bool(applied)
    assert criterion.get_extra_state()[0] == len(expected)


def test_ramp_goes_by_steps() -> None:
    criterion = RepMTL(**LAMBDAS, ramp=4)
    for step in range(5):
        weights = []
        for _ in range(3):
            step_on_noise(criterion, step=step)
            weights.append((criterion.last.regularizer / criterion.last.tsr).item())
        assert weights == weights[:1] * 3
        share = min(1.0, (step + 1) / 4)
        last = criterion.last
        expected = share * (0.9 * last.tsr + 0.7 * last.csa)
        torch.testing.assert_close(last.regularizer, expected)


def test_one_weight_and_one_measurement_a_step() -> None:
    criterion, weights = RepMTL(strength=0.3, every=1), []
    for step in range(3):
        for half in range(4):
            step_on_noise(criterion, seed=10 * step + half, step=step)
            weights.append(regularizer_weight(criterion))
    for step in range(3):
        assert weights[4 * step : 4 * step + 4] == pytest.approx([weights[4 * step]] * 4, rel=1e-6)
    assert max(weights[::4]) > 1.01 * min(weights[::4])
    alone = RepMTL(strength=0.3, every=1)
    for step in range(3):
        step_on_noise(alone, seed=10 * step)
        assert regularizer_weight(alone) == pytest.approx(weights[4 * step], rel=1e-6)


def test_step_numbers_are_the_users() -> None:
    """Calls in a row with the same number are one step. A call without a number is a step."""
    criterion, was_applied = RepMTL(every=2), []
    for step in (7, 7, 3, 3, None, None, 100, 100, 7):
        step_on_noise(criterion, step=step)
        was_applied.append(criterion.last.applied)
    assert was_applied == [True, True, False, False, True, False, True, True, False]
    step_on_noise(criterion, step=np.int64(7))
    assert criterion.get_extra_state()[0] == 6  # the same step as the call before
    for bad, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError)):
        with pytest.raises(error, match="step: expected"):
            step_on_noise(criterion, step=bad)


def test_lbfgs_closure() -> None:
    torch.manual_seed(0)
    encoder = nn.Linear(3, 4).to(DEVICE)
    x = torch.randn(5, 3, device=DEVICE)
    criterion = RepMTL(**LAMBDAS, every=2)
    optimizer = torch.optim.LBFGS(encoder.parameters(), max_iter=4)
    applied = []
    for step in range(4):

        def closure(step=step) -> Tensor:
            optimizer.zero_grad()
            z = encoder(x)
            total = criterion(losses_of(z), z, step=step)
            total.backward()
            applied.append((step, criterion.last.applied))
            return total

        optimizer.step(closure)
    assert len(applied) > 8
    assert all(on is (step % 2 == 0) for step, on in applied)
