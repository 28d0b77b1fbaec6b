"""No tensor outlives its step: a criterion keeps no graph, and no hook on a representation."""

from __future__ import annotations

import gc

import pytest
import torch
from small_network import LAMBDAS, Network, batch, parts, ratio_of
from torch import Tensor, nn

from repmtl_kernels import RepMTL, second_order


def count_tensors(shape: torch.Size) -> int:
    tensors = (o for o in gc.get_objects() if type(o) is Tensor and not o.is_nested)
    return sum(tensor.shape == shape for tensor in tensors)


@pytest.mark.parametrize("backward", [None, "backward", "heads only", "create_graph"])
@pytest.mark.parametrize("options", [{}, {"clip": 2.0, "strength": 0.1}], ids=("plain", "all"))
def test_nothing_is_kept_alive(network: Network, backward, options: dict) -> None:
    """The cyclic collector is off, so this fails if an object refers to itself."""
    criterion = RepMTL(**LAMBDAS, **options)
    gc.collect()
    gc.disable()
    try:
        z, losses = batch(network)
        shape = z.shape
        before = count_tensors(shape)
        total = criterion(losses, z)
        if backward == "backward":
            total.backward()
            assert count_tensors(shape) == before  # z and its hooks are alive
        elif backward == "heads only":
            torch.autograd.grad(total, list(network.heads.parameters()))
        elif backward:
            torch.autograd.grad(total.square(), network.encoder[0].weight, create_graph=True)
        del z, losses, total
        assert count_tensors(shape) == 0
    finally:
        gc.enable()


def use_of_leaf(network: Network, criterion: RepMTL, z: Tensor, how: str) -> None:
    total = criterion(network.losses(z, network.targets()), z)
    if how == "heads only":
        torch.autograd.grad(total, list(network.heads.parameters()))
    elif how == "backward":
        total.backward()
    elif how == "of a part":  # the variable dies before the graph does
        total = total / 2
        total.backward()


@pytest.mark.parametrize("how", ["heads only", "never", "backward", "of a part"])
def test_no_hook_stays_on_a_representation_that_outlives_its_totals(network, how: str) -> None:
    """Features may be cached, and a backward pass may never reach them."""
    z = network.encoder(network.images()).detach().requires_grad_()
    criterion = RepMTL(**LAMBDAS, clip=2.0, strength=0.1)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            use_of_leaf(network, criterion, z, how)
            z.grad = None
            assert not z._backward_hooks
            assert count_tensors(z.shape) == 1
    finally:
        gc.enable()


def total_alone(criterion: RepMTL, encoder: nn.Module, heads: nn.ModuleList, x: Tensor) -> Tensor:
    """Return the total and keep no reference to ``z``, which a fused ReLU in a head goes around."""
    with second_order():
        z = encoder(x)
        losses = [head(z).square().mean() for head in heads]
    return criterion(losses, z)


@pytest.mark.parametrize("all_heads", [True, False])
def test_ratio_where_only_the_total_is_left(all_heads: bool) -> None:
    """The representation is the output of a batch norm; heads fuse their ReLU with it."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)).double()
    heads = nn.ModuleList(
        nn.Sequential(nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Softplus(), nn.Conv2d(4, 2, 1))
        for _ in range(2)
    ).double()
    if not all_heads:
        heads[1] = heads[1][1:]  # this head's gradient reaches z
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    parameters = [*encoder.parameters(), *heads.parameters()]
    z = encoder(x)
    losses = [head(z).square().mean() for head in heads]
    tasks, regularizer = parts(losses, [z] * 2)
    expected = ratio_of(tasks, regularizer, [z])
    want = torch.autograd.grad(tasks + regularizer, parameters)
    criterion = RepMTL(**LAMBDAS)
    gc.collect()
    gc.disable()
    try:
        before = count_tensors(z.shape)
        total = total_alone(criterion, encoder, heads, x)
        # A retained graph keeps z alive too, as a saved tensor of a convolution.
        got = torch.autograd.grad(total, parameters, retain_graph=all_heads)
        assert criterion.last.ratio.item() == pytest.approx(expected, rel=1e-6)
        if all_heads:
            again = torch.autograd.grad(total, parameters)  # z is gone
            torch.testing.assert_close(again, want, rtol=1e-9, atol=1e-12)
        assert count_tensors(z.shape) == before  # the total is alive
    finally:
        gc.enable()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
