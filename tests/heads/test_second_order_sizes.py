"""Which layers keep PyTorch's own double backward under second_order(), by their size on a CPU."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from double_backward import is_fast
from torch import nn
from torch.nn import functional as F

from repmtl_kernels._heads.second_order import choice, second_order

SHIPPED = choice.SMALLEST  # at import, before the fixture of all tests sets it to 0


@pytest.fixture(autouse=True)
def shipped_sizes(monkeypatch, second_order_of_any_size):
    monkeypatch.setattr(choice, "SMALLEST", SHIPPED)


# Function, channels of the weight and its kernel, options, and the smallest size that gains.
CONVOLUTIONS = {
    "1x1": (F.conv2d, (3, 2, 1, 1), {}, SHIPPED.convolution),
    "dilated": (F.conv2d, (3, 2, 3, 3), {"dilation": (1, 6), "padding": 6}, SHIPPED.convolution),
    "strided": (F.conv2d, (3, 2, 3, 3), {"stride": 2}, SHIPPED.convolution),
    "3x3": (F.conv2d, (3, 2, 3, 3), {"padding": 1}, SHIPPED.dense),
    "1x3": (F.conv2d, (3, 2, 1, 3), {}, SHIPPED.dense),
    "1d": (F.conv1d, (3, 2, 3), {}, SHIPPED.dense),
    "3d": (F.conv3d, (3, 2, 3, 3, 3), {"padding": 1}, SHIPPED.dense),
    "transposed": (F.conv_transpose2d, (2, 3, 2, 2), {"stride": 2}, SHIPPED.dense),
    "grouped": (F.conv2d, (4, 1, 3, 3), {"groups": 2, "padding": 1}, 8),
}


@pytest.mark.parametrize("one", [False, True], ids=["batch", "one image"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, one):
    """The positions of the input count, those of all images of a batch."""
    function, weight_size, options, smallest = CONVOLUTIONS[name]
    dims = len(weight_size) - 2
    weight = torch.randn(weight_size, requires_grad=True)
    channels = 2

    def fast(positions):
        batch = () if one else (2,)
        space = (*[2] * (dims - 1), positions // (2 ** (dims - 1) * math.prod(batch)))
        x = torch.randn(*batch, channels, *space)
        with second_order():
            y = function(x, weight, **{"padding": 1, **options})
        node = y.grad_fn.next_functions[0][0] if one else y.grad_fn  # one image's is a view
        return type(node).__name__ == "OutputBackward"

    assert fast(smallest)
    if name != "grouped":
        assert not fast(smallest - 8)


@pytest.mark.parametrize("batch", [2, 16])
def test_batch_norm(batch):
    layer = nn.BatchNorm2d(8)
    rest = SHIPPED.batch_norm // (8 * batch)
    with second_order():
        assert is_fast(layer(torch.randn(batch, 8, rest, 1)))
        small = layer(torch.randn(batch, 8, rest - 1, 1))
        assert not is_fast(small)
        assert type(F.relu(small).grad_fn).__name__ == "ReluBackward0"


def test_other_devices_have_no_smallest_size():
    x, weight = torch.empty(1, 2, 3, 3, device="meta"), torch.empty(3, 2, 3, 3, device="meta")
    geometry = choice.Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    assert choice.convolution_gains(2, geometry, x, weight) and choice.batch_norm_gains(x)


def test_small_heads_are_pytorchs_to_the_last_bit():
    head = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, dilation=2)
    )
    x = torch.randn(2, 3, 9, 12, requires_grad=True)
    results = []
    for context in (nullcontext(), second_order()):
        layers = copy.deepcopy(head)
        with context:
            loss = layers(x).square().mean()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + first.abs().sum()).backward(inputs=list(layers.parameters()))
        results.append([first, *(p.grad for p in layers.parameters())])
    assert all(map(torch.equal, *results))
