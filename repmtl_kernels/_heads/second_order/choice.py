"""Which layers get the efficient double backward, and which form computes batch norm's."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from repmtl_kernels._heads.second_order import eager
from repmtl_kernels._heads.second_order.contract import Form
from repmtl_kernels._heads.second_order.convolution import Geometry
from repmtl_kernels.backends.availability import refusal


class Smallest(NamedTuple):
    """The smallest sizes that gain on a CPU: positions of a whole batch, or elements.

    Below them PyTorch's own double backward is as fast or faster. The numbers are its time as a
    multiple of the efficient one's, in float32 on an AMD EPYC (AVX2), on 1 thread and on 2.

    convolution: 1 x 1, dilated and strided ones; the gradient of the weight alone. From 1024 to 128
        channels, 3 x 3 with dilation, 2 threads have to add up two gradients of a large weight:
        0.5 to 0.8 at 216 and 256 positions, 0.9 to 1.1 at 1536. 64 to 256 channels: 0.5 to 1.8 at
        1536, 1.5 to 3.3 at 3456.
    dense: all others, transposed ones too; the same. PyTorch computes the gradient of the weight as
        a convolution whose kernel is the output's gradient. It does that well unless the kernel is
        large: 0.6 to 1.0 at 256 to 3456 positions, 0.8 to 1.7 at 6144 to 8192, 1.1 to 2.3 at 13824.
    batch_norm: forward and all derivatives, ReLU included. 0.8 at 32768 elements, 1.0 to 1.3 at
        65536, 1.1 to 1.5 at 131072. Below, the time of Python decides.
    """

    convolution: int
    dense: int
    batch_norm: int


# Tests set all to 0.
SMALLEST = Smallest(convolution=2**11, dense=2**13, batch_norm=2**17)


def convolution_gains(dims: int, geometry: Geometry, x: Tensor, weight: Tensor) -> bool:
    """Return whether a convolution of ``x``, a batch or one image, is faster with its own maps.

    Grouped ones count as faster at any size: PyTorch's double backward is a loop over the groups,
    20 to 40 times slower for 64 and 128 of them. On other devices than a CPU nothing was measured,
    and no convolution is left to PyTorch.
    """
    if x.device.type != "cpu" or geometry.groups > 1:
        return True
    positions = math.prod((*x.shape[: -dims - 1], *x.shape[-dims:]))
    spread = any(n > 1 for n in (*geometry.stride, *geometry.dilation))
    dense = geometry.transposed or (not spread and any(n > 1 for n in weight.shape[2:]))
    return positions >= (SMALLEST.dense if dense else SMALLEST.convolution)


def batch_norm_gains(x: Tensor) -> bool:
    """Return whether the closed form is faster; on other devices than a CPU it is always used."""
    return x.device.type != "cpu" or x.numel() >= SMALLEST.batch_norm


def load(x: Tensor) -> Form:
    """Return the form for tensors like ``x``: Triton on CUDA devices that it supports, or eager."""
    if x.is_cuda and refusal("triton", x.dtype, x.device) is None:
        from repmtl_kernels._heads.second_order import triton  # an optional package

        return triton
    return eager
