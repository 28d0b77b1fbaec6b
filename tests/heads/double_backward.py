"""Layers, heads and their derivatives: shared by the tests of second_order()."""

import itertools

import torch
from cases import DEVICE
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

F64 = torch.float64


def leaf(*shape, dtype=F64, device=DEVICE):
    return torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)


def ramp(start, end, like):
    values = torch.linspace(start, end, like.numel(), dtype=like.dtype, device=like.device)
    return values.view(like.shape)


def assert_same(actual, expected, tolerance=1e-12):
    """Compare tensors pair by pair; a gradient that is zero may be None on one side."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        if a is None or b is None:
            assert all(t is None or not t.any() for t in (a, b))
            continue
        assert a.shape == b.shape and a.dtype == b.dtype
        # Where the exact value is 0, both are rounding errors of values of size 1.
        error = (a - b).norm() / b.norm().clamp_min(1e-3 * b.numel() ** 0.5)
        assert error < tolerance, error


def derivatives(function, inputs, needs):
    """Return output, first and second derivatives, for the inputs that need them."""
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
    """Return all choices of the inputs that need a gradient, without the empty one."""
    choices = itertools.product(*[(True, False) if t is not None else (False,) for t in inputs])
    return [choice for choice in choices if any(choice)]


def check_third(function, inputs):
    def first(*inputs):
        return torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)

    # Whether nodes are fused depends on references to the output: nothing here may keep one.
    assert gradcheck(function, inputs) and gradgradcheck(function, inputs)
    assert gradgradcheck(first, inputs)


def is_fast(y):
    return type(y.grad_fn).__name__ in ("OutputBackward", "BatchNormBackward")


def small_head():
    head = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return head.to(DEVICE, F64).eval()  # function transforms take no running statistics


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
    # Both in one expression, so that nothing keeps the output of the batch norm.
    if layer.weight is None:
        return lambda x: activation(layer(x))

    def call(x, w, b):
        tensors = {"weight": w, "bias": b, **dict(layer.named_buffers())}
        return activation(torch.func.functional_call(layer, tensors, (x,)))

    return call


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
        maps = [branch(z) for branch in self.branches]
        maps.append(self.pooled(z.mean((2, 3), keepdim=True)).expand_as(maps[0]))
        return self.classify(torch.cat(maps, 1))


class Convolutional(nn.Sequential):
    """Other layers of heads: transposed, depthwise and strided convolutions."""

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
