"""What else a user does with the total, the representation or its hooks changes no weight."""

from __future__ import annotations

import math

import pytest
import torch
from small_network import LAMBDAS, Network, batch
from torch import Tensor

from repmtl_kernels import RepMTL, task_saliencies
from repmtl_kernels._training.strength import FIRST


def auxiliary(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    return total + 10 * z.square().mean()


def left_out(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    return total + 30 * (z**3).mean()


def second_criterion(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    return total + RepMTL(100.0, 100.0)(losses, z)


def hook_that_clips(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    z.register_hook(lambda grad: grad.clamp(-1e-6, 1e-6))
    return total


def hook_of_nan(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    z.register_hook(lambda grad: grad * math.nan)
    return total


def gradient_for_a_log(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    torch.autograd.grad(total, z, retain_graph=True)
    return total


def part_of_the_tasks(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    return total - 0.9 * sum(losses)


def scaled(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    return total * 65536


def of_another_total(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    total *= -7
    return total + total.square()


OUTSIDE = [
    auxiliary, left_out, second_criterion, hook_that_clips, hook_of_nan, gradient_for_a_log,
    part_of_the_tasks, scaled, of_another_total,
]  # fmt: skip


def weights_of(network: Network, outside=None, before: bool = False, **options) -> list[float]:
    """The weight of the regulariser over some steps with the same data."""
    criterion, found = RepMTL(**{"strength": 0.3, **options}), []
    torch.manual_seed(3)
    for _ in range(FIRST + 3):
        z = network.encoder(network.images())
        if before:
            outside(torch.zeros(()), z, [])
        losses = network.losses(z, network.targets())
        total = criterion(losses, z)
        last = criterion.last
        found.append((last.regularizer / (0.5 * (last.tsr + last.csa))).item())
        if outside is not None and not before:
            total = outside(total, z, losses)
        total.backward()
    return found


@pytest.mark.parametrize("options", [{}, {"clip": 1.0}], ids=("plain", "clip"))
@pytest.mark.parametrize("outside", OUTSIDE)
def test_nothing_outside_changes_the_weight(network: Network, outside, options: dict) -> None:
    alone = weights_of(network, **options)
    assert len(set(alone)) > FIRST - 1  # it follows
    assert weights_of(network, outside, **options) == alone


@pytest.mark.parametrize("outside", [hook_that_clips, hook_of_nan])
def test_hooks_from_before_the_call_are_passed_by(network: Network, outside) -> None:
    assert weights_of(network, outside, before=True) == weights_of(network)


def test_the_user_s_hooks_and_grad_see_the_backward_pass_alone(network: Network) -> None:
    z, losses = batch(network)
    seen = []
    z.register_hook(lambda grad: seen.append(grad) or grad * 2)
    z.retain_grad()
    plain = [torch.autograd.grad(loss, z, retain_graph=True)[0] / 2 for loss in losses]
    seen.clear()
    z.grad = None
    for found, expected in zip(task_saliencies(losses, z), plain, strict=True):
        torch.testing.assert_close(found, expected)
    total = RepMTL(**LAMBDAS)(losses, z)
    assert seen == [] and z.grad is None
    total.backward()
    assert len(seen) == 1
    torch.testing.assert_close(z.grad, 2 * seen[0])


def test_weight_where_no_backward_pass_ever_comes(network: Network) -> None:
    criterion = RepMTL(strength=0.3)
    for _ in range(3):
        z, losses = batch(network)
        criterion(losses, z)
    assert criterion.get_extra_state()[1] > 0
