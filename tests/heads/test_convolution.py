"""Convolution under second_order(): the derivatives of plain PyTorch, by fewer convolutions."""

import numpy as np
import pytest
import torch
from cases import DEVICE
from double_backward import (
    F64,
    GEOMETRIES,
    assert_same,
    check_third,
    derivatives,
    is_fast,
    leaf,
    subsets,
)
from torch import nn
from torch.nn import functional as F

from benchmarks.parts.second_order import Convolutions
from repmtl_kernels._heads.second_order import second_order


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution(name, with_bias):
    function, input_size, weight_size, options = GEOMETRIES[name]
    transposed = "transpose" in function.__name__
    outputs = weight_size[1] * options.get("groups", 1) if transposed else weight_size[0]
    inputs = leaf(*input_size), leaf(*weight_size), leaf(outputs) if with_bias else None

    def call(x, w, b):
        return function(x, w, b, **options)

    for needs in subsets(*inputs):
        expected = derivatives(call, inputs, needs)
        actual = derivatives(second_order()(call), inputs, needs)
        assert torch.equal(actual[0], expected[0])
        assert_same(actual[1], expected[1])
        assert_same(actual[2], expected[2])


@pytest.mark.parametrize("stride", [np.int64(2), (np.int64(2), 1), torch.tensor(2)])
def test_integers_of_other_types(stride):
    x, w = leaf(1, 2, 7, 6), leaf(3, 2, 3, 3)
    with second_order():
        y = F.conv2d(x, w, stride=stride)
    assert is_fast(y) and torch.equal(y, F.conv2d(x, w, stride=stride))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes(mode):
    layer = nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode).double()
    x = leaf(2, 2, 5, 6, device="cpu")  # on CUDA the gradients of padding aren't deterministic

    def call(x, w, b):
        return torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,))

    inputs = x, layer.weight, layer.bias
    expected = derivatives(call, inputs, (True,) * 3)
    actual = derivatives(second_order()(call), inputs, (True,) * 3)
    assert torch.equal(actual[0], expected[0])
    assert_same((*actual[1], *actual[2]), (*expected[1], *expected[2]))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution_is_the_librarys(dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = leaf(4, 16, 12, 12, dtype=dtype).detach().contiguous(memory_format=layout)
    layer = nn.Conv2d(16, 8, 3, padding=1).to(DEVICE, dtype, memory_format=layout)
    grad = torch.randn(4, 8, 12, 12, dtype=dtype, device=DEVICE)
    x.requires_grad_()
    expected = layer(x)
    with second_order():
        actual = layer(x)
    assert torch.equal(actual, expected) and actual.stride() == expected.stride()
    expected, actual = (torch.autograd.grad(y, (x, layer.weight), grad) for y in (expected, actual))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_third_derivative_of_convolution():
    def call(x, w, b):
        return F.conv2d(x, w, b, (2, 1), (1, 0), (1, 2), groups=2)

    check_third(second_order()(call), (leaf(2, 4, 5, 4), leaf(2, 2, 3, 2), leaf(2)))


def count_head(*, frozen=False, encoder_frozen=False):
    """Convolutions of the passes of a Rep-MTL step through one convolution of a head."""
    layer = nn.Conv2d(3, 2, 3, padding=1).to(DEVICE, F64).requires_grad_(not frozen)
    z = leaf(2, 3, 5, 6)
    passes = []
    with Convolutions() as counter, second_order():
        loss = layer(z).pow(3).mean()
    passes.append(counter.counts)
    with Convolutions() as counter:
        (saliency,) = torch.autograd.grad(loss, z, create_graph=True)
    passes.append(counter.counts)
    total = loss + saliency.square().mean()
    with Convolutions() as counter:
        total.backward(inputs=list(layer.parameters()) if encoder_frozen else None)
    return [dict(c) for c in (*passes, counter.counts)]


def test_convolutions_of_a_step():
    forward, saliency, backward = count_head()
    assert forward == {"forward": 1, "input": 0, "weight": 0}
    assert saliency == {"forward": 0, "input": 1, "weight": 0}
    assert backward == {"forward": 1, "input": 1, "weight": 2}


def test_convolutions_where_less_is_asked_for():
    assert count_head(encoder_frozen=True)[2] == {"forward": 1, "input": 0, "weight": 2}
    assert count_head(frozen=True)[2] == {"forward": 1, "input": 1, "weight": 0}


def test_backward_called_by_hand():
    x, w = leaf(2, 3, 4), leaf(2, 3, 2)
    with second_order():
        y = F.conv1d(x, w)
    _, of_x, of_w, _ = y.grad_fn.apply(torch.ones_like(y))
    assert_same((of_x, of_w), torch.autograd.grad(F.conv1d(x, w).sum(), (x, w)))
