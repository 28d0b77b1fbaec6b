"""Batch norm and its ReLU under second_order(): the derivatives of plain PyTorch."""

import copy
import gc
import itertools
import weakref
from contextlib import nullcontext

import pytest
import torch
from cases import DEVICE
from double_backward import (
    F64,
    NORMS,
    RELUS,
    assert_same,
    check_third,
    derivatives,
    leaf,
    norm,
    norm_and_relu,
    subsets,
)
from torch.nn import functional as F

from repmtl_kernels._heads.second_order import batch_norm as batch_norm_module
from repmtl_kernels._heads.second_order import eager, second_order


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("activation", RELUS)
def test_batch_norm(name, activation, training):
    layer, x = norm(name, training)
    inputs = (x,) if layer.weight is None else (x, layer.weight, layer.bias)
    for needs in subsets(*inputs):
        plain, fast = copy.deepcopy(layer), copy.deepcopy(layer)
        expected = derivatives(norm_and_relu(plain, RELUS[activation]), inputs, needs)
        call = norm_and_relu(fast, RELUS[activation])
        actual = derivatives(second_order()(call), inputs, needs)
        assert torch.equal(actual[0], expected[0])
        assert_same(actual[1], expected[1])
        assert_same(actual[2], expected[2])
        assert all(map(torch.equal, fast.buffers(), plain.buffers()))


def test_fused_relu_is_one_node():
    layer, x = norm("2d", True)
    with second_order():
        assert type(F.relu(layer(x)).grad_fn) is batch_norm_module.BatchNormReLU._backward_cls
        assert type(F.relu(layer(x) + 0).grad_fn).__name__ == "ReluBackward0"
    assert type(F.relu(layer(x)).grad_fn).__name__ == "ReluBackward0"


def test_nothing_is_kept():
    layer, x = norm("2d", True)
    with second_order():
        out = F.relu(layer(x))
    assert not batch_norm_module._made
    out.sum().backward()


@pytest.mark.parametrize("activation", ["no ReLU", "ReLU", "in place"])
def test_operands_go_with_the_graph(activation):
    """An output of a batch norm that is kept doesn't keep what it was computed from."""
    layer, start = norm("2d", True)
    x = 2 * start
    watched = weakref.ref(x)
    with second_order():
        y = layer(x)
        loss = RELUS[activation](y).sum()
        assert (y in batch_norm_module._made) == (activation != "in place")
    del x
    torch.autograd.grad(loss, start, retain_graph=True)
    assert watched() is not None
    loss.backward()
    del loss
    gc.collect()
    assert watched() is None and y not in batch_norm_module._made
    with second_order():
        again = F.relu(y)
    with pytest.raises(RuntimeError, match="second time"):
        again.sum().backward()


SHARED_OUTPUTS = {
    "kept": lambda y: (F.relu(y), y)[0],
    "both": lambda y: F.relu(y) + 2 * y,
    "two ReLUs": lambda y: F.relu(y) * F.relu(-y + 0.3) + F.relu(y),
    "before in place": lambda y: (3 * y) * F.relu(y, inplace=True),
    "view before in place": lambda y: (y.flatten(1), F.relu_(y))[0] + y.flatten(1) ** 2,
    "ReLU of a view": lambda y: F.relu(y.flatten(1)),
    "ReLU of a slice in place": lambda y: (y[:, :2].relu_(), y)[1],
    "changed in place": lambda y: F.relu(y.mul_(-1)),
    "changed without a graph": lambda y: (y.data.neg_(), F.relu(y))[1],
}


@pytest.mark.parametrize("name", SHARED_OUTPUTS)
def test_batch_norm_output_used_elsewhere(name):
    layer, x = norm("2d", True)
    inputs = x, layer.weight, layer.bias
    call = norm_and_relu(layer, SHARED_OUTPUTS[name])
    expected = derivatives(call, inputs, (True,) * 3)
    actual = derivatives(second_order()(call), inputs, (True,) * 3)
    assert torch.equal(actual[0], expected[0])
    assert_same((*actual[1], *actual[2]), (*expected[1], *expected[2]))


def test_gradient_at_the_batch_norm_output():
    layer, x = norm("2d", True)
    results = []
    for context in (nullcontext(), second_order()):
        with context:
            y = layer(x)
            out = F.relu(y)
        hooked = []
        y.register_hook(hooked.append)
        first = torch.autograd.grad((out**3).sum(), (y, x), create_graph=True)
        (second,) = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), x)
        results.append((*first, second, *hooked))
    assert_same(*results)


@pytest.mark.parametrize("inplace", [False, True])
def test_hook_before_relu(inplace):
    layer, x = norm("2d", True)
    results = []
    for context in (nullcontext(), second_order()):
        gradients = []
        with context:
            y = layer(x)
            y.register_hook(lambda grad, gradients=gradients: gradients.append(grad) or 2 * grad)
            y = F.relu(y, inplace=inplace)
        y.square().sum().backward()
        results.append((*gradients, x.grad))
        x.grad = None
    assert_same(*results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["no ReLU", "ReLU", "in place"])
def test_third_derivative_of_batch_norm(activation, training):
    layer, x = norm("1d", training)
    inputs = x, layer.weight, layer.bias
    check_third(second_order()(norm_and_relu(layer, RELUS[activation])), inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_relu", [False, True])
@pytest.mark.parametrize(
    "present", [g for g in itertools.product([True, False], repeat=3) if any(g)]
)
def test_eager_double_backward(present, with_relu, training):
    """Each combination of vectors, with expanded ones, against autograd of PyTorch's own."""
    x, grad = leaf(4, 3, 5, 2), leaf(4, 3, 1, 2).expand(4, 3, 5, 2)
    weight = leaf(3)
    mean = x.detach().mean((0, 2, 3)) + (0 if training else 0.3)
    invstd = torch.rsqrt(x.detach().var((0, 2, 3), correction=0) + 1e-5)
    output = torch.randn(4, 3, 5, 2, dtype=F64, device=DEVICE).relu() if with_relu else None
    vectors = [leaf(4, 1, 5, 2).expand(4, 3, 5, 2), leaf(3), leaf(3)]
    vectors = [v.detach() if g else None for v, g in zip(vectors, present, strict=True)]

    statistics = (None, None) if training else (mean, invstd.pow(-2) - 1e-5)
    bias = leaf(3)
    y = F.batch_norm(x, *statistics, weight, bias, training)
    masked = grad if output is None else grad * (output > 0)
    first = torch.autograd.grad(y, (x, weight, bias), masked, create_graph=True)
    outputs = [f for f, g in zip(first, present, strict=True) if g]
    expected = torch.autograd.grad(
        outputs, (grad, x, weight), [v for v in vectors if v is not None], allow_unused=True
    )
    operands = [t if t is None else t.detach() for t in (grad, x, weight, mean, invstd, output)]
    for needs in itertools.product([True, False], repeat=3):
        actual = eager.batch_norm_double_backward(*vectors, *operands, training, needs)
        assert [f is not None for f in actual] == list(needs)
        wanted = [e if n else None for e, n in zip(expected, needs, strict=True)]
        assert_same(actual, wanted)
        actual = eager.batch_norm_backward(*operands, training, needs)
        assert_same(actual, [f if n else None for f, n in zip(first, needs, strict=True)])


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_eager_16_bit(parameters):
    """Each result is rounded once: half a unit in the last place of bfloat16."""
    size = (8, 3, 7, 5)
    low = [torch.randn(size, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
    v, grad, x = (t.contiguous(memory_format=torch.channels_last) for t in low)
    weight = (torch.rand(3, device=DEVICE) + 0.5).to(parameters)
    mean, invstd = x.float().mean((0, 2, 3)), torch.rsqrt(x.float().var((0, 2, 3)) + 1e-5)
    exact = [t.double() for t in (v, grad, x, weight, mean, invstd)]
    everything = True, (True,) * 3
    actual = eager.batch_norm_double_backward(
        v, None, None, grad, x, weight, mean, invstd, None, *everything
    )
    expected = eager.batch_norm_double_backward(exact[0], None, None, *exact[1:], None, *everything)
    for a, b, dtype in zip(actual, expected, (x.dtype, x.dtype, parameters), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= 2**-8 * b.abs().max()
        if a.ndim == 4:
            assert a.is_contiguous(memory_format=torch.channels_last)
