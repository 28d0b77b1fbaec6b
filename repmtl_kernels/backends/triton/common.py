"""Parts that the kernels share: launches, tasks of one launch, strides, masks."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels.backends.availability import interpreting

INTERPRET = interpreting()
# The version that comes with PyTorch 2.11. It does a few things less well.
TRITON_3_6 = triton.__version__.startswith("3.6.")

# Positions of a mask that are read at a time when they are counted.
COUNT_BLOCK = tl.constexpr(1024)

# Tasks of one launch: bounds how many variants of a kernel are compiled.
MAX_TASKS = 8

# It is true while launches are only compiled (first_use.py).
compiling: ContextVar[bool] = ContextVar("compiling", default=False)

FP32_PRECISIONS = ("ieee", "tf32x3", "tf32")


def launch(kernel, grid: tuple[int, ...], device: torch.device, *args, **kwargs) -> None:
    """Run ``kernel`` on the current stream of ``device``, whatever the current device is."""
    run = functools.partial(kernel.warmup, grid=grid) if compiling.get() else kernel[grid]
    if device.type == "cuda":
        with torch.cuda.device(device):
            run(*args, enable_fp_fusion=True, **kwargs)
    else:
        run(*args, enable_fp_fusion=True, **kwargs)


def fp32_precision() -> str:
    """Return ``input_precision`` of float32 matrix products.

    It is REPMTL_FP32_PRECISION if that is set, else what PyTorch's own CUDA products have: tf32 if
    the user allows it (``torch.backends.cuda.matmul``, ``torch.set_float32_matmul_precision``),
    else ieee.
    """
    precision = os.environ.get("REPMTL_FP32_PRECISION")
    if not precision:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    if precision not in FP32_PRECISIONS:
        raise ValueError(
            f"REPMTL_FP32_PRECISION: expected one of {', '.join(FP32_PRECISIONS)}; "
            f"got {precision!r}"
        )
    return precision


# Triton has these two functions too, but there they cost the host as much as a small launch.
def cdiv(a: int, b: int) -> int:
    """Return ``a / b``, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


class Geometry(NamedTuple):
    """Strides of a ``(B, C, *spatial)`` view as kernels take them.

    ``layout = (stride_b, stride_c, stride_0, stride_1, stride_2, size_1, size_2)``: the positions
    as a row-major grid of ``dims`` dimensions. Strides other than 1 are in units of ``align``
    elements and the last size in units of ``width_align``, so that the compiler knows how rows are
    aligned without one variant per size. All of them are :func:`unspecialized`.
    ``form = (dims, align, unit, width_align)`` is for compile time; bit i of ``unit`` says that
    stride i is 1.
    """

    layout: tuple[int, ...]
    form: tuple[int, int, int, int]


def geometry(view: Tensor) -> Geometry:
    """Return the strides of a ``(B, C, *spatial)`` view."""
    return geometry_of(view.shape, view.stride())


@functools.lru_cache(maxsize=1024)  # host time of every launch
def geometry_of(shape: tuple[int, ...], all_strides: tuple[int, ...]) -> Geometry:
    """Return the strides of a ``(B, C, *spatial)`` view of this shape."""
    batch, channel, *spatial = all_strides
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(shape[2:], spatial, strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:  # row-major neighbours are one dimension
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    dims = max(1, len(sizes))
    width_align = 1
    if dims > 1:
        width_align = alignment(sizes[-1])
        sizes[-1] //= width_align
    sizes += [1] * (3 - len(sizes))
    strides = [batch, channel, *strides, *[0] * (3 - len(strides))]
    unit = sum(1 << i for i, stride in enumerate(strides) if stride == 1)
    align = alignment(*(stride for stride in strides if stride != 1))
    scaled = [1 if stride == 1 else stride // align for stride in strides]
    layout = tuple(map(unspecialized, (*scaled, *sizes[1:])))
    return Geometry(layout, (dims, align, unit, width_align))


def unspecialized(size: int) -> int:
    """Return what a tuple has in place of ``size``, for :func:`tuple_item` to read.

    Triton compiles a variant for 1 and another for multiples of 16, and ``do_not_specialize`` does
    not reach into tuples. An odd number above 1 is neither.
    """
    return 2 * size + 3


def alignment(*values: int) -> int:
    """Return the largest power of two up to 16 that divides every value."""
    return min(16, *(value & -value for value in values if value), 16)


class TaskGroup(NamedTuple):
    """Tasks of equal strides, which one launch takes together."""

    tasks: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    geometry: Geometry


def task_groups(views: Sequence[Tensor | None], most: int = MAX_TASKS) -> Iterator[TaskGroup]:
    """Yield the tasks, without those of None, in groups of equal strides and at most ``most``."""
    by_stride: dict[tuple[Geometry, bool], list[tuple[int, Tensor]]] = {}
    for t, view in enumerate(views):
        if view is not None:
            key = geometry(view), view.data_ptr() % 16 == 0
            by_stride.setdefault(key, []).append((t, view))
    for (strides, _), members in by_stride.items():
        for i in range(0, len(members), most):
            tasks, tensors = zip(*members[i : i + most], strict=True)
            yield TaskGroup(tasks, tensors, strides)


@triton.jit
def pick(values, index):
    """Return ``values[index]`` of a tuple of pointers or integers, by a runtime index."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        if index == i:
            value = values[i]
    return value


@triton.jit
def zero_unless(there, x):
    """Return ``x`` where it is there and 0 elsewhere, whatever ``x`` is."""
    return tl.where(there, x, tl.zeros_like(x))


@triton.jit
def count_valid(valid, positions):
    """Return how many of a sample's positions are there; 1 for none, since it divides a sum."""
    total = tl.zeros((COUNT_BLOCK,), tl.int32)
    for start in range(0, positions, COUNT_BLOCK):
        n = start + tl.arange(0, COUNT_BLOCK)
        total += tl.load(valid + n, mask=n < positions, other=0).to(tl.int32)
    return tl.maximum(tl.sum(total, 0), 1)


@triton.jit
def tuple_item(values, i: tl.constexpr):
    """Return the integer that :func:`unspecialized` wrote."""
    return (values[i] - 3) >> 1


@triton.jit
def stride_of(layout, FORM: tl.constexpr, i: tl.constexpr):
    """Return stride ``i`` of a :class:`Geometry` in elements: int64, or the constant 1."""
    if (FORM[2] >> i) & 1:
        return 1
    else:
        return tl.cast(tuple_item(layout, i), tl.int64) * FORM[1]


@triton.jit
def position_offsets(n, layout, FORM: tl.constexpr):
    """Return the offsets in elements (int64) of positions ``n``, which count row by row."""
    n = n.to(tl.int64)
    if FORM[0] == 1:
        return n * stride_of(layout, FORM, 2)
    elif FORM[0] == 2:
        width = tuple_item(layout, 5) * FORM[3]
        row, column = n // width, n % width
        return row * stride_of(layout, FORM, 2) + column * stride_of(layout, FORM, 3)
    else:
        height, width = tuple_item(layout, 5), tuple_item(layout, 6) * FORM[3]
        plane, rest = n // (height * width), n % (height * width)
        row, column = rest // width, rest % width
        return (
            plane * stride_of(layout, FORM, 2)
            + row * stride_of(layout, FORM, 3)
            + column * stride_of(layout, FORM, 4)
        )
