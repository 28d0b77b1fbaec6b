"""No tensor outlives its step: a criterion keeps no graph, and no hook on a representation."""

from __future__ import annotations

import gc

import pytest
import torch
from small_network import LAMBDAS, Network, batch, parts, ratio_of
from torch import Tensor, nn

from repmtl_kernels import RepMTL, second_order


def tensors_of(shape: torch.Size) -> int:
    tensors = (o for o in gc.get_objects() if type(o) is Tensor and not o.is_nested)
    return sum(tensor.shape == shape for tensor in tensors)


@pytest.mark.parametrize("backward", [None, "backward", "heads only", "create_graph"])
@pytest.mark.parametrize("options", [{}, {"clip": 2.0, "strength": 0.1}], ids=("plain", "all"))
def test_nothing_is_kept_alive(network: Network, backward, options: dict) -> None:
    """Without the cyclic collector: nothing refers to itself through the graph."""
    criterion = RepMTL(**LAMBDAS, **options)
    gc.collect()
    gc.disable()
    try:
        z, losses = batch(network)
        shape = z.shape
        before = tensors_of(shape)
        total = criterion(losses, z)
        if backward == "backward":
            total.backward()
            assert tensors_of(shape) == before  # with z and its hooks alive
        elif backward == "heads only":
            torch.autograd.grad(total, list(network.heads.parameters()))
        elif backward:
            torch.autograd.grad(total.square(), network.encoder[0].weight, create_graph=True)
        del z, losses, total
        assert tensors_of(shape) == 0
    finally:
        gc.enable()


def graph_ends_on_leaf(network: Network, criterion: RepMTL, z: Tensor, how: str) -> None:
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
    """Features that are cached; no backward pass may ever reach them."""
    z = network.encoder(network.images()).detach().requires_grad_()
    criterion = RepMTL(**LAMBDAS, clip=2.0, strength=0.1)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            graph_ends_on_leaf(network, criterion, z, how)
            z.grad = None
            assert not z._backward_hooks
            assert tensors_of(z.shape) == 1
    finally:
        gc.enable()


def dropped(criterion: RepMTL, encoder: nn.Module, heads: nn.ModuleList, x: Tensor) -> Tensor:
    """The heads' fused ReLU goes around ``z`` where nobody has it."""
    with second_order():
        z = encoder(x)
        losses = [head(z).square().mean() for head in heads]
    return criterion(losses, z)


@pytest.mark.parametrize("all_heads", [True, False])
def test_ratio_where_only_the_total_is_left(all_heads: bool) -> None:
    """The representation is a batch norm's output, whose ReLU in the heads is fused with it."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)).double()
    heads = nn.ModuleList(
        nn.Sequential(nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Softplus(), nn.Conv2d(4, 2, 1))
        for _ in range(2)
    ).double()
    if not all_heads:
        heads[1] = heads[1][1:]  # its gradient comes by in any case
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
        before = tensors_of(z.shape)
        total = dropped(criterion, encoder, heads, x)
        # Where the graph is retained, what a convolution has saved keeps z alive too.
        got = torch.autograd.grad(total, parameters, retain_graph=all_heads)
        assert criterion.last.ratio.item() == pytest.approx(expected, rel=1e-6)
        if all_heads:
            again = torch.autograd.grad(total, parameters)  # nobody has z any more
            torch.testing.assert_close(again, want, rtol=1e-9, atol=1e-12)
        assert tensors_of(z.shape) == before  # with the total alive
    finally:
        gc.enable()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
