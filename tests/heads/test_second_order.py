"""second_order(): the same outputs and derivatives as plain PyTorch, at fewer convolutions."""

import copy
import gc
import itertools
import pickle
import threading
import time
import weakref
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.part import Run
from benchmarks.parts import second_order as benchmark
from benchmarks.parts.second_order import Convolutions
from repmtl_kernels import RepMTL
from repmtl_kernels._heads.second_order import batch_norm as batch_norm_module
from repmtl_kernels._heads.second_order import convert_second_order, eager, second_order

F64 = torch.float64


def leaf(*shape, dtype=F64, device=DEVICE):
    return torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)


def ramp(start, end, like):
    values = torch.linspace(start, end, like.numel(), dtype=like.dtype, device=like.device)
    return values.view(like.shape)


def assert_same(found, expected, tolerance=1e-12):
    """Pairs of tensors or None; a gradient that is zero may be None on one side."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            assert all(t is None or not t.any() for t in (a, b))
            continue
        assert a.shape == b.shape and a.dtype == b.dtype
        # Where the exact value is 0, both are rounding errors of what has the size of 1.
        error = (a - b).norm() / b.norm().clamp_min(1e-3 * b.numel() ** 0.5)
        assert error < tolerance, error


def derivatives(function, inputs, needs):
    """Output, first derivatives and second derivatives, for the inputs that need them."""
    inputs = [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip(inputs, needs, strict=True)
    ]
    targets = [t for t in inputs if t is not None and t.requires_grad]
    y = function(*inputs)
    weights = ramp(-1, 2, y)
    first = torch.autograd.grad((weights * y + y**3).sum(), targets, create_graph=True)
    probe = sum((g**2 * ramp(1, 2, g)).sum() for g in first)
    second = torch.autograd.grad(probe, targets, allow_unused=True)
    return y.detach(), first, second


def subsets(*inputs):
    """All choices of what needs a gradient, but none at all."""
    choices = itertools.product(*[(True, False) if t is not None else (False,) for t in inputs])
    return [choice for choice in choices if any(choice)]


# Function, sizes of input and weight, and options.
GEOMETRIES = {
    "1x1": (F.conv2d, (2, 3, 4, 5), (4, 3, 1, 1), {}),
    "3x3": (F.conv2d, (2, 3, 5, 6), (4, 3, 3, 3), {"padding": 1}),
    "rectangular": (F.conv2d, (2, 3, 7, 6), (4, 3, 3, 2), {"padding": (1, 0)}),
    "strided": (F.conv2d, (2, 3, 8, 7), (4, 3, 3, 3), {"stride": (2, 3), "padding": 1}),
    "stride leaves a rest": (F.conv2d, (2, 3, 8, 8), (4, 3, 3, 3), {"stride": 2}),
    "dilated": (F.conv2d, (2, 3, 9, 8), (4, 3, 3, 3), {"padding": (6, 4), "dilation": (6, 4)}),
    "grouped": (F.conv2d, (2, 6, 5, 4), (4, 3, 3, 3), {"padding": 1, "groups": 2}),
    "depthwise": (F.conv2d, (2, 3, 5, 4), (6, 1, 3, 3), {"padding": 1, "groups": 3}),
    "same": (F.conv2d, (2, 3, 5, 4), (4, 3, 3, 3), {"padding": "same", "dilation": 2}),
    "same, odd": (F.conv2d, (2, 3, 5, 4), (4, 3, 2, 4), {"padding": "same", "dilation": (3, 1)}),
    "valid": (F.conv2d, (2, 3, 5, 4), (4, 3, 3, 2), {"padding": "valid"}),
    "one image": (F.conv2d, (3, 5, 4), (4, 3, 3, 3), {"padding": [1]}),
    "1d": (F.conv1d, (2, 3, 9), (4, 3, 3), {"stride": 2, "padding": 2, "dilation": 2}),
    "1d, one": (F.conv1d, (3, 9), (4, 3, 4), {"padding": "same"}),
    "3d": (F.conv3d, (2, 2, 4, 5, 3), (3, 2, 3, 3, 2), {"stride": (1, 2, 1), "padding": 1}),
    "transposed 1d": (F.conv_transpose1d, (2, 3, 5), (3, 4, 3), {"stride": 2, "dilation": 2}),
    "transposed": (
        F.conv_transpose2d, (2, 4, 4, 3), (4, 3, 3, 3),
        {"stride": (2, 3), "padding": 1, "output_padding": (1, 2), "groups": 2},
    ),
    "transposed, one image": (F.conv_transpose2d, (3, 4, 3), (3, 2, 2, 2), {"stride": 2}),
    "transposed 3d": (F.conv_transpose3d, (1, 2, 3, 2, 3), (2, 3, 2, 3, 2), {"stride": (2, 1, 1)}),
}  # fmt: skip


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
        found = derivatives(second_order()(call), inputs, needs)
        assert torch.equal(found[0], expected[0])
        assert_same(found[1], expected[1])
        assert_same(found[2], expected[2])


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
    found = derivatives(second_order()(call), inputs, (True,) * 3)
    assert torch.equal(found[0], expected[0])
    assert_same((*found[1], *found[2]), (*expected[1], *expected[2]))


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
        found = layer(x)
    assert torch.equal(found, expected) and found.stride() == expected.stride()
    expected, found = (torch.autograd.grad(y, (x, layer.weight), grad) for y in (expected, found))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


# Input, track_running_stats, affine, momentum.
NORMS = {
    "2d": ((4, 3, 3, 2), True, True, 0.1),
    "1d": ((4, 3, 5), True, True, 0.1),
    "no positions": ((5, 3), True, True, 0.3),
    "3d": ((2, 3, 2, 3, 2), True, True, 0.1),
    "not affine": ((4, 3, 3, 2), True, False, 0.1),
    "no running statistics": ((4, 3, 3, 2), False, True, 0.1),
    "cumulative average": ((4, 3, 3, 2), True, True, None),
}
RELUS = {
    "no ReLU": lambda y: y,
    "ReLU": lambda y: F.relu(y),
    "Tensor.relu": lambda y: y.relu(),
    "in place": nn.ReLU(inplace=True),
    "relu_": torch.relu_,
}


def norm(name, training):
    size, track, affine, momentum = NORMS[name]
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(size)]
    layer = kind(size[1], track_running_stats=track, affine=affine, momentum=momentum)
    layer.to(DEVICE, F64).train(training)
    with torch.no_grad():
        for value in (*layer.parameters(), *layer.buffers()):
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)
    return layer, leaf(*size)


def norm_and_relu(layer, activation):
    # Both in one expression, so that nobody keeps the output of the batch norm.
    if layer.weight is None:
        return lambda x: activation(layer(x))

    def call(x, w, b):
        tensors = {"weight": w, "bias": b, **dict(layer.named_buffers())}
        return activation(torch.func.functional_call(layer, tensors, (x,)))

    return call


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
        found = derivatives(second_order()(call), inputs, needs)
        assert torch.equal(found[0], expected[0])
        assert_same(found[1], expected[1])
        assert_same(found[2], expected[2])
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
    """Who keeps the output of a batch norm doesn't keep what it was computed from."""
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
    found = derivatives(second_order()(call), inputs, (True,) * 3)
    assert torch.equal(found[0], expected[0])
    assert_same((*found[1], *found[2]), (*expected[1], *expected[2]))


def test_gradient_at_the_batch_norm_output():
    layer, x = norm("2d", True)
    found = []
    for context in (nullcontext(), second_order()):
        with context:
            y = layer(x)
            out = F.relu(y)
        hooked = []
        y.register_hook(hooked.append)
        first = torch.autograd.grad((out**3).sum(), (y, x), create_graph=True)
        (second,) = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), x)
        found.append((*first, second, *hooked))
    assert_same(*found)


@pytest.mark.parametrize("inplace", [False, True])
def test_hook_before_relu(inplace):
    layer, x = norm("2d", True)
    found = []
    for context in (nullcontext(), second_order()):
        gradients = []
        with context:
            y = layer(x)
            y.register_hook(lambda grad, gradients=gradients: gradients.append(grad) or 2 * grad)
            y = F.relu(y, inplace=inplace)
        y.square().sum().backward()
        found.append((*gradients, x.grad))
        x.grad = None
    assert_same(*found)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["no ReLU", "ReLU", "in place"])
def test_third_derivative_of_batch_norm(activation, training):
    layer, x = norm("1d", training)
    inputs = x, layer.weight, layer.bias
    check_third(second_order()(norm_and_relu(layer, RELUS[activation])), inputs)


def test_third_derivative_of_convolution():
    def call(x, w, b):
        return F.conv2d(x, w, b, (2, 1), (1, 0), (1, 2), groups=2)

    check_third(second_order()(call), (leaf(2, 4, 5, 4), leaf(2, 2, 3, 2), leaf(2)))


def check_third(function, inputs):
    def first(*inputs):
        return torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)

    # Fused nodes depend on who holds the output: nothing in here may.
    assert gradcheck(function, inputs) and gradgradcheck(function, inputs)
    assert gradgradcheck(first, inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_relu", [False, True])
@pytest.mark.parametrize("given", [g for g in itertools.product([True, False], repeat=3) if any(g)])
def test_eager_double_backward(given, with_relu, training):
    """Each combination of vectors, with expanded ones, against autograd of PyTorch's own."""
    x, grad = leaf(4, 3, 5, 2), leaf(4, 3, 1, 2).expand(4, 3, 5, 2)
    weight = leaf(3)
    mean = x.detach().mean((0, 2, 3)) + (0 if training else 0.3)
    invstd = torch.rsqrt(x.detach().var((0, 2, 3), correction=0) + 1e-5)
    output = torch.randn(4, 3, 5, 2, dtype=F64, device=DEVICE).relu() if with_relu else None
    vectors = [leaf(4, 1, 5, 2).expand(4, 3, 5, 2), leaf(3), leaf(3)]
    vectors = [v.detach() if g else None for v, g in zip(vectors, given, strict=True)]

    statistics = (None, None) if training else (mean, invstd.pow(-2) - 1e-5)
    bias = leaf(3)
    y = F.batch_norm(x, *statistics, weight, bias, training)
    masked = grad if output is None else grad * (output > 0)
    first = torch.autograd.grad(y, (x, weight, bias), masked, create_graph=True)
    outputs = [f for f, g in zip(first, given, strict=True) if g]
    expected = torch.autograd.grad(
        outputs, (grad, x, weight), [v for v in vectors if v is not None], allow_unused=True
    )
    operands = [t if t is None else t.detach() for t in (grad, x, weight, mean, invstd, output)]
    for needs in itertools.product([True, False], repeat=3):
        found = eager.batch_norm_double_backward(*vectors, *operands, training, needs)
        assert [f is not None for f in found] == list(needs)
        wanted = [e if n else None for e, n in zip(expected, needs, strict=True)]
        assert_same(found, wanted)
        found = eager.batch_norm_backward(*operands, training, needs)
        assert_same(found, [f if n else None for f, n in zip(first, needs, strict=True)])


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
    found = eager.batch_norm_double_backward(
        v, None, None, grad, x, weight, mean, invstd, None, *everything
    )
    expected = eager.batch_norm_double_backward(exact[0], None, None, *exact[1:], None, *everything)
    for a, b, dtype in zip(found, expected, (x.dtype, x.dtype, parameters), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= 2**-8 * b.abs().max()
        if a.ndim == 4:
            assert a.is_contiguous(memory_format=torch.channels_last)


class ASPP(nn.Module):
    def __init__(self, inplace, dilations=(6, 12, 18)):
        super().__init__()

        def layer(inputs, kernel, d=1):
            conv = nn.Conv2d(inputs, 4, kernel, padding=d * (kernel // 2), dilation=d, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(inplace))

        self.branches = nn.ModuleList([layer(6, 1), *(layer(6, 3, d) for d in dilations)])
        self.pooled = layer(6, 1)
        self.classify = nn.Sequential(layer(20, 1), nn.Dropout(0.2), nn.Conv2d(4, 2, 1))

    def forward(self, z):
        found = [branch(z) for branch in self.branches]
        found.append(self.pooled(z.mean((2, 3), keepdim=True)).expand_as(found[0]))
        return self.classify(torch.cat(found, 1))


class Convolutional(nn.Sequential):
    """What a head may also have: transposed, depthwise and strided convolutions, pooling."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False),
            nn.BatchNorm2d(6, affine=False),
            nn.Conv2d(6, 4, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.GELU(),
            nn.ConvTranspose2d(4, 2, 2, stride=2),
        )


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.out = nn.Linear(6, 2)

    def forward(self, z):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return self.out(self.layer(z.flatten(2).mT)).mT.unflatten(2, z.shape[2:])


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Sequential(
            nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
        )

    def forward(self, z):
        return self.out(z.mean((2, 3)))[:, :, None, None].expand(-1, -1, *z.shape[2:])


HEADS = {
    "ASPP": lambda: ASPP(False),
    "ASPP in place": lambda: ASPP(True),
    "convolutional": Convolutional,
    "transformer": Transformer,
    "linear": Linear,
}


def network(make_head, dtype=F64):
    encoder = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Softplus()
    )
    heads = nn.ModuleList([make_head() for _ in range(3)])
    return nn.ModuleList([encoder, heads]).to(DEVICE, dtype)


def images(dtype=F64):
    make = {"dtype": dtype, "device": DEVICE}
    targets = [torch.randn(4, 2, 12, 14, **make) for _ in range(3)]
    return torch.randn(4, 3, 12, 14, **make), targets


def rep_mtl_step(model, x, targets, context=None):
    encoder, heads = model
    torch.manual_seed(1)
    z = encoder(x)
    with context or nullcontext():
        losses = [F.mse_loss(head(z), y) for head, y in zip(heads, targets, strict=True)]
    total = RepMTL(0.9, 0.7)(losses, z)
    with Convolutions() as counter:
        total.backward()
    return total.detach(), [p.grad for p in model.parameters()], counter


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ["context", "converted"])
@pytest.mark.parametrize("name", HEADS)
def test_whole_step(name, way, training):
    plain = network(HEADS[name]).train(training)
    fast = copy.deepcopy(plain)
    x, targets = images()
    expected = rep_mtl_step(plain, x, targets)
    if way == "converted":
        found = rep_mtl_step(convert_second_order(fast), x, targets)
    else:
        found = rep_mtl_step(fast, x, targets, second_order())
    assert torch.equal(found[0], expected[0])
    assert all(map(torch.equal, fast.buffers(), plain.buffers()))
    for a, b in zip(found[1], expected[1], strict=True):
        # In training an exact 0 is left of biases that batch norm takes out: rounding errors.
        assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_step_in_lower_precision(dtype):
    """As near to float64 as plain PyTorch of that dtype; on CUDA this runs the Triton form."""
    exact = network(HEADS["ASPP"])
    x, targets = images()
    plain, fast = (copy.deepcopy(exact).float() for _ in range(2))
    judge = rep_mtl_step(exact, x, targets)[1]

    def error(model, context):
        enabled = dtype == torch.bfloat16
        with torch.autocast(DEVICE, dtype if enabled else None, enabled=enabled):
            found = rep_mtl_step(model, x.float(), [y.float() for y in targets], context)[1]
        return torch.stack([(a - b).norm() for a, b in zip(found, judge, strict=True)]).norm()

    size = torch.stack([b.norm() for b in judge]).norm()
    bound = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype] * size
    assert error(fast, second_order()) < max(bound, 1.5 * error(plain, nullcontext()))


def test_backward_under_autocast():
    """Autocast chooses the precision of the forward; the derivatives keep it."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    layers.to(DEVICE)
    x = leaf(2, 3, 6, 5, dtype=torch.float32)
    found = []
    for enabled in (False, True):
        with second_order():
            loss = layers(x).square().mean()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
        probe = first.square().sum()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            found.append((first, *torch.autograd.grad(probe, tuple(layers.parameters()))))
    assert all(map(torch.equal, *found))


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


def is_fast(y):
    return type(y.grad_fn).__name__ in ("OutputBackward", "BatchNormBackward")


def test_only_inside():
    x, w = leaf(2, 3, 5), leaf(4, 3, 3)
    with second_order():
        assert is_fast(F.conv1d(x, w))
        with second_order():
            assert is_fast(F.conv1d(x, w))
        assert is_fast(F.conv1d(x, w))
    assert not is_fast(F.conv1d(x, w))
    with pytest.raises(ZeroDivisionError), second_order():
        raise ZeroDivisionError
    assert not is_fast(F.conv1d(x, w))
    context = second_order()
    with context, context:
        assert is_fast(F.conv1d(x, w))
    assert not is_fast(F.conv1d(x, w))

    @second_order()
    def again(depth):
        return is_fast(F.conv1d(x, w)) and (depth == 0 or again(depth - 1))

    assert again(2) and not is_fast(F.conv1d(x, w))


def test_threads():
    x, w = leaf(2, 3, 5), leaf(4, 3, 3)
    found = {}

    def work(name, context):
        with context:
            found[name] = is_fast(F.conv1d(x, w))

    with second_order():
        threads = [
            threading.Thread(target=work, args=("without", nullcontext())),
            threading.Thread(target=work, args=("with", second_order())),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {"without": False, "with": True}


def test_nothing_where_no_gradient_is_needed():
    x, w = leaf(2, 3, 5), leaf(4, 3, 3)
    layer, image = norm("2d", True)
    layer.requires_grad_(False)
    with second_order():
        assert F.conv1d(x.detach(), w.detach()).grad_fn is None
        assert layer(image.detach()).grad_fn is None
        with torch.no_grad():
            assert not F.conv1d(x, w).requires_grad
        with torch.inference_mode():
            assert F.conv1d(x, w).is_inference()


BAD = {
    "rank": lambda: F.conv2d(leaf(3, 4), leaf(2, 3, 3, 3)),
    "channels": lambda: F.conv2d(leaf(1, 3, 4, 4), leaf(2, 4, 3, 3)),
    "dtype": lambda: F.conv2d(leaf(1, 3, 4, 4), leaf(2, 3, 3, 3, dtype=torch.float32)),
    "same with a stride": lambda: F.conv1d(leaf(1, 3, 4), leaf(2, 3, 3), None, 2, "same"),
    "padding's name": lambda: F.conv1d(leaf(1, 3, 4), leaf(2, 3, 3), padding="full"),
    "kernel": lambda: F.conv1d(leaf(1, 3, 4), leaf(2, 3, 5)),
    "keyword": lambda: F.conv1d(leaf(1, 3, 4), leaf(2, 3, 3), strides=1),
    "no tensor": lambda: F.conv1d([1.0], leaf(2, 3, 3)),
    "one value per channel": lambda: nn.BatchNorm1d(3)(leaf(1, 3, dtype=torch.float32)),
    "no statistics": lambda: F.batch_norm(leaf(2, 3), None, None),
    "eps": lambda: F.batch_norm(leaf(2, 3), None, None, training=True, eps=0.0),
    "leaf in place": lambda: F.relu_(leaf(2, 3)),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_pytorchs(name):
    with pytest.raises(Exception) as expected:
        BAD[name]()
    with pytest.raises(Exception) as found, second_order():
        BAD[name]()
    assert (found.type, str(found.value)) == (expected.type, str(expected.value))


def test_empty_batch():
    layers = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).to(DEVICE, F64)
    x = leaf(0, 3, 5, 5)
    with second_order():
        y = layers(x)
    y.sum().backward()
    assert y.shape == (0, 2, 3, 3) and x.grad.shape == x.shape


def test_saved_tensors_are_guarded():
    x, w = leaf(2, 3, 5), leaf(4, 3, 3)
    with second_order():
        y = F.conv1d(x, w)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice():
    layer, x = norm("2d", True)
    with second_order():
        loss = F.relu(layer(x)).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, *torch.autograd.grad(loss, x))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_last(layout):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    layers.to(DEVICE, F64, memory_format=layout)
    x = leaf(2, 3, 6, 5).detach().contiguous(memory_format=layout).requires_grad_()
    found = []
    for context in (nullcontext(), second_order()):
        with context:
            y = layers(x)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), (x, *layers.parameters()))
        found.append((y, first, *second))
        assert all(t.is_contiguous(memory_format=layout) for t in (y, first, second[0]))
    assert_same(*found)


def small_head():
    head = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return head.to(DEVICE, F64).eval()  # function transforms take no running statistics


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # by torch.func.jvp
@pytest.mark.parametrize("way", ["context", "converted"])
def test_function_transforms(way):
    head, x, v = small_head(), leaf(2, 3, 4, 5).detach(), leaf(2, 3, 4, 5).detach()

    def loss(x):
        return head(x).pow(3).mean()

    def results(loss):
        return (
            torch.func.grad(loss)(x),
            torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x),
            torch.func.jvp(loss, (x,), (v,))[1],
            torch.func.vmap(loss)(torch.stack([x, v])),
        )

    expected = results(loss)
    if way == "converted":
        convert_second_order(head)
    found = results(loss if way == "converted" else second_order()(loss))
    assert all(map(torch.equal, found, expected))
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(x, v))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected[2])


def rows_of_derivatives(function, inputs, way):
    """First derivatives for two vectors, what follows from these, and second ones for two."""

    def pull(outputs, create_graph=False):
        options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True}

        def of_one(vectors, **more):
            found = torch.autograd.grad(outputs, inputs, vectors, **options, **more)
            return [t for t in found if t is not None]

        vectors = [torch.stack([ramp(-1, 2, y), ramp(2, 1, y)]) for y in outputs]
        if way == "vmap":
            return torch.vmap(of_one)(vectors)
        if way == "is_grads_batched":
            return of_one(vectors, is_grads_batched=True)
        rows = [of_one(row) for row in zip(*vectors, strict=True)]
        return [torch.stack(row) for row in zip(*rows, strict=True)]

    y = function(*inputs)
    first = torch.autograd.grad((y**3).sum(), inputs, create_graph=True)
    through = pull([y], create_graph=True)
    probe = y.sum() + sum(g.square().sum() for g in through)
    of_rows = torch.autograd.grad(probe, inputs, retain_graph=True, allow_unused=True)
    return [*(t.detach() for t in through), *of_rows, *pull(first)]


WAYS_OF_ROWS = pytest.mark.parametrize("way", ["vmap", "is_grads_batched"])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet")
@pytest.mark.parametrize("name", GEOMETRIES)
@WAYS_OF_ROWS
def test_rows_of_a_jacobian_through_convolution(name, way):
    function, input_size, weight_size, options = GEOMETRIES[name]
    inputs = leaf(*input_size), leaf(*weight_size)

    def call(x, w):
        return function(x, w, **options)

    expected = rows_of_derivatives(call, inputs, "one by one")
    assert_same(rows_of_derivatives(second_order()(call), inputs, way), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["2d", "no positions", "not affine"])
@pytest.mark.parametrize("activation", ["no ReLU", "ReLU", "in place"])
@WAYS_OF_ROWS
def test_rows_of_a_jacobian_through_batch_norm(name, activation, training, way):
    layer, x = norm(name, training)
    inputs = (x,) if layer.weight is None else (x, layer.weight, layer.bias)
    call = norm_and_relu(layer, RELUS[activation])
    expected = rows_of_derivatives(call, inputs, "one by one")
    assert_same(rows_of_derivatives(second_order()(call), inputs, way), expected)


def test_encoder_under_torchjd():
    pytest.importorskip("torchjd")
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    plain = network(HEADS["convolutional"])
    plain[0].append(nn.ConvTranspose2d(6, 6, 3, padding=1))
    plain[0].extend([nn.BatchNorm2d(6), nn.ReLU()])
    plain.to(DEVICE, F64)
    x, targets = images()
    found = []
    for model in (plain, convert_second_order(copy.deepcopy(plain))):
        encoder, heads = model
        z = encoder(x)
        losses = [F.mse_loss(head(z), y) for head, y in zip(heads, targets, strict=True)]
        mtl_backward(losses, features=z)
        jac_to_grad(encoder.parameters(), UPGrad())
        found.append([p.grad for p in model.parameters()])
    assert_same(found[1], found[0], 1e-9)


def aot_eager_into(graphs):
    def backend(module, inputs):
        graphs.append(module.print_readable(print_output=False))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    return backend


@pytest.mark.parametrize("way", ["inside", "outside", "converted"])
def test_compiled(way):
    """Compilers get plain PyTorch: they have no use for derivatives that they can't look into."""
    head, x = small_head(), leaf(2, 3, 4, 5)
    plain = copy.deepcopy(head)

    def loss(x):
        with second_order() if way == "inside" else nullcontext():
            return head(x).pow(3).mean()

    def saliency(x):
        return torch.func.grad(loss)(x).square().sum()

    if way == "converted":
        convert_second_order(head)
    for function in (loss, saliency):
        torch._dynamo.reset()
        graphs = []
        compiled = torch.compile(function, fullgraph=True, backend=aot_eager_into(graphs))
        with second_order() if way == "outside" else nullcontext():
            result = compiled(x)
        assert "autograd_function" not in str(graphs)
        found = result.detach(), *torch.autograd.grad(result, (x, *head.parameters()))
        result = plain(x).pow(3).mean()
        if function is saliency:
            (result,) = torch.autograd.grad(result, x, create_graph=True)
            result = result.square().sum()
        targets = x, *plain.parameters()
        assert_same(
            found, (result.detach(), *torch.autograd.grad(result, targets, allow_unused=True))
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_traced():
    head, x = small_head(), leaf(2, 3, 4, 5)
    with second_order():
        traced = torch.jit.trace(head, x)
    assert "PythonOp" not in str(traced.inlined_graph)
    assert torch.equal(traced(x), head(x))


class Subclass(torch.Tensor):
    pass


def test_subclasses_are_left_to_pytorch():
    x, w = leaf(2, 3, 5).as_subclass(Subclass), leaf(4, 3, 3)
    with second_order():
        y = F.conv1d(x, w)
    assert type(y) is Subclass and not is_fast(y)


def test_complex_numbers_are_left_to_pytorch():
    x, w = leaf(2, 3, 5, dtype=torch.complex128), leaf(4, 3, 3, dtype=torch.complex128)
    with second_order():
        assert not is_fast(F.conv1d(x, w))


def test_checkpoint():
    head, x = small_head().train(), leaf(2, 3, 4, 5)
    plain = copy.deepcopy(head)

    def gradients(head, run):
        (first,) = torch.autograd.grad(run(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), list(head.parameters()))

    expected = gradients(plain, plain)
    inside = second_order()(head)
    assert_same(gradients(head, lambda x: checkpoint(inside, x, use_reentrant=False)), expected)
    convert_second_order(head)
    assert_same(gradients(head, lambda x: checkpoint(head, x, use_reentrant=False)), expected)


class FunctionalReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("converted", [False, True])
def test_checkpoint_inside_a_context(converted):
    """With a context inside the checkpointed function it doesn't matter what is around it."""
    plain, x = FunctionalReLU().to(DEVICE, F64), leaf(2, 3, 4, 5)
    found = []
    for fast in (False, True):
        head = copy.deepcopy(plain)
        if fast and converted:
            convert_second_order(head)
        with second_order() if fast else nullcontext():
            inside = second_order()(head) if fast else head
            y = checkpoint(inside, x, use_reentrant=False) if fast else head(x)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        first.square().sum().backward(inputs=list(head.parameters()))
        found.append([first.detach(), *(p.grad for p in head.parameters())])
    assert_same(*found)


ALL_LAYERS = [
    nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.ConvTranspose1d(2, 2, 1),
    nn.ConvTranspose2d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1), nn.BatchNorm1d(2),
    nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.ReLU(),
]  # fmt: skip


def test_conversion():
    model = nn.ModuleList(copy.deepcopy(ALL_LAYERS))
    kinds, text = [type(m) for m in model], repr(model)
    state = copy.deepcopy(model.state_dict())
    assert convert_second_order(model) is model
    assert all(type(m) is not k and isinstance(m, k) for m, k in zip(model, kinds, strict=True))
    converted = [type(m) for m in model]
    assert repr(model) == text and list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    assert [type(m) for m in convert_second_order(model)] == converted
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in again] == converted
        assert all(map(torch.equal, again.state_dict().values(), state.values()))
    assert [type(m) for m in convert_second_order(model, undo=True)] == kinds


def test_converted_layers_are_fast():
    head, x = convert_second_order(small_head()), leaf(2, 3, 4, 5)
    conv, bn, _ = head
    assert is_fast(conv(x)) and is_fast(bn(conv(x)))
    assert type(head(x).grad_fn) is batch_norm_module.BatchNormReLU._backward_cls
    assert type(convert_second_order(nn.ReLU())).__module__.startswith("repmtl_kernels")


class OwnConv(nn.Conv2d):
    pass


def test_conversion_leaves_other_layers_alone():
    for layer in (OwnConv(2, 2, 1), nn.SyncBatchNorm(2), nn.Linear(2, 2), nn.ReLU6()):
        kind = type(layer)
        assert type(convert_second_order(layer)) is kind


def test_conversion_of_what_is_no_module():
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got list"):
        convert_second_order([nn.ReLU()])
    with pytest.raises(TypeError, match=r"undo: expected a bool, got int"):
        convert_second_order(nn.ReLU(), undo=1)


def test_benchmark(monkeypatch, capsys):
    tiny = replace(benchmark.NETWORK, height=32, width=32, batch=2, base=4, on_cpu={})
    monkeypatch.setattr(benchmark, "NETWORK", tiny)
    monkeypatch.setattr(benchmark, "QUICK", {})
    device = torch.device("cpu")
    run = Run("second_order", device, {}, None, quick=True, deadline=time.monotonic() + 1)
    benchmark.measure(run)
    base, plain, fast = rows = run.rows
    assert [row["method"] for row in rows] == list(benchmark.TITLES) and not run.notes
    assert [row["convolutions_per_head_layer"] for row in rows] == [3, 6, 6]
    assert fast["ratio_to_plain"] == pytest.approx(
        plain["steps_per_s"] / fast["steps_per_s"], rel=1e-3
    )
    heads = base["phases"]["heads_forward"] + base["phases"]["heads_backward"]
    floor = 1e3 / base["steps_per_s"] + heads
    own = 1e3 / fast["steps_per_s"] - fast["phases"]["regularizer"]
    assert fast["ratio_to_floor"] == pytest.approx(own / floor, rel=1e-3)
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("backward_within", [False, True])
@pytest.mark.parametrize(
    "layers",
    [(nn.Conv2d, nn.BatchNorm2d), (nn.Conv2d, nn.BatchNorm2d, nn.ReLU), (nn.Conv2d,)],
    ids=lambda layers: "-".join(layer.__name__ for layer in layers),
)
def test_context_around_a_checkpoint_leaves_it_alone(layers, backward_within):
    """Its function runs again in the backward, perhaps without the context."""
    arguments = {nn.Conv2d: (6, 4, 3), nn.BatchNorm2d: (4,), nn.ReLU: ()}

    def gradients(around):
        torch.manual_seed(0)
        encoder = nn.Conv2d(3, 6, 3).double()
        heads = [nn.Sequential(*(f(*arguments[f]) for f in layers)).double() for _ in range(2)]
        criterion, x = RepMTL(0.1, 0.2), torch.randn(3, 3, 9, 9).double()
        weight = torch.rand(4, 5, 5).double()
        with second_order() if around else nullcontext():
            z = encoder(x)
            outputs = [checkpoint(head, z, use_reentrant=False) for head in heads]
            total = criterion([(y.sin() * weight).mean() for y in outputs], z)
            if backward_within:
                total.backward()
        if not backward_within:
            total.backward()
        return [p.grad for module in (encoder, *heads) for p in module.parameters()]

    with pytest.warns(UserWarning, match="enter the context inside the function"):
        found = gradients(around=True)
    torch.testing.assert_close(found, gradients(around=False), rtol=1e-10, atol=1e-14)
