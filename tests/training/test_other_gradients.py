"""Other uses of the total, the representation and its hooks do not change the weight."""

from __future__ import annotations

import math

import pytest
import torch
from small_network import LAMBDAS, Network, batch, regularizer_weight
from torch import Tensor

from repmtl_kernels import RepMTL, task_saliencies
from repmtl_kernels._training.strength import FIRST


def auxiliary(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    return total + 10 * z.square().mean()


def loss_not_given(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
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


def square_of_total(total: Tensor, z: Tensor, losses: list[Tensor]) -> Tensor:
    total *= -7
    return total + total.square()


USES = [
    auxiliary, loss_not_given, second_criterion, hook_that_clips, hook_of_nan, gradient_for_a_log,
    part_of_the_tasks, scaled, square_of_total,
]  # fmt: skip


def weights_of(network: Network, use=None, before: bool = False, **options) -> list[float]:
    """Train on the same data each time, and return the regulariser's weight on each step."""
    criterion, weights = RepMTL(**{"strength": 0.3, "every": 1, **options}), []
    torch.manual_seed(3)
    for _ in range(FIRST + 3):
        z = network.encoder(network.images())
        if before:
            use(torch.zeros(()), z, [])
        losses = network.losses(z, network.targets())
        total = criterion(losses, z)
        weights.append(regularizer_weight(criterion))
        if use is not None and not before:
            total = use(total, z, losses)
        total.backward()
    return weights


@pytest.mark.parametrize("options", [{}, {"clip": 1.0}], ids=("plain", "clip"))
@pytest.mark.parametrize("use", USES)
def test_other_uses_do_not_change_the_weight(network: Network, use, options: dict) -> None:
    alone = weights_of(network, **options)
    assert len(set(alone)) > FIRST - 1  # the weight follows the data
    assert weights_of(network, use, **options) == alone


@pytest.mark.parametrize("use", [hook_that_clips, hook_of_nan])
def test_hooks_from_before_the_call_do_not_change_the_weight(network: Network, use) -> None:
    assert weights_of(network, use, before=True) == weights_of(network)


def test_hooks_and_grad_of_the_user_see_only_the_backward_pass(network: Network) -> None:
    z, losses = batch(network)
    seen = []
    z.register_hook(lambda grad: seen.append(grad) or grad * 2)
    z.retain_grad()
    plain = [torch.autograd.grad(loss, z, retain_graph=True)[0] / 2 for loss in losses]
    seen.clear()
    z.grad = None
    for saliency, expected in zip(task_saliencies(losses, z), plain, strict=True):
        torch.testing.assert_close(saliency, expected)
    total = RepMTL(**LAMBDAS)(losses, z)
    assert seen == [] and z.grad is None
    total.backward()
    assert len(seen) == 1
    torch.testing.assert_close(z.grad, 2 * seen[0])


def test_ratio_is_observed_without_a_backward_pass(network: Network) -> None:
    criterion = RepMTL(strength=0.3, every=1)
    for _ in range(3):
        z, losses = batch(network)
        criterion(losses, z)
    assert criterion.get_extra_state()[1] > 0
