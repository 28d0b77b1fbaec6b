"""Cases: a loss or a stage at a shape, in a precision and a layout, and its inputs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from repmtl_kernels.backends.availability import refusal

FP32_PRECISION = "REPMTL_FP32_PRECISION"  # of the Triton kernels
# Different inputs in turn, together larger than this many times the cache of the device.
CACHE_FACTOR = 2
MAX_INPUT_SETS = 16


@dataclass(frozen=True)
class Precision:
    """A dtype with a setting of ``torch.set_float32_matmul_precision``."""

    dtype: torch.dtype
    matmul: str
    name: str  # as in the results and in the measured rates


FLOAT32 = Precision(torch.float32, "highest", "float32")
BFLOAT16 = Precision(torch.bfloat16, "highest", "bfloat16")
FLOAT16 = Precision(torch.float16, "highest", "float16")
TF32 = Precision(torch.float32, "high", "tf32")
# Only the Triton kernels have it: rivals beside them have full float32.
TF32X3 = Precision(torch.float32, "highest", "tf32x3")
PRECISIONS = {"cpu": (FLOAT32,), "cuda": (BFLOAT16, TF32, FLOAT32, FLOAT16, TF32X3)}


class Effort(NamedTuple):
    """How long to measure a case: seconds and rounds."""

    seconds: float
    min_rounds: int
    max_rounds: int


@dataclass(frozen=True)
class Case:
    """The same call on the same inputs for all contestants.

    layout: ``contiguous`` or ``channels_last`` ``(B, C, H, W)``, or ``tokens`` ``(B, N, C)``.
    """

    function: str
    shape: Shape
    precision: Precision
    layout: str = "contiguous"
    compiled: bool = False  # whether torch.compile takes part

    @property
    def channel_dim(self) -> int:
        return -1 if self.layout == "tokens" else 1

    @property
    def itemsize(self) -> int:
        return self.precision.dtype.itemsize

    def labels(self) -> dict:
        """Return the first fields of a row."""
        s = self.shape
        return {
            "function": self.function,
            "shape": s.name,
            "T": s.tasks,
            "B": s.batch,
            "C": s.channels,
            "N": s.positions,
            "dtype": str(self.precision.dtype).removeprefix("torch."),
            "precision": self.precision.name,
            "layout": self.layout,
        }

    def __str__(self) -> str:
        s = self.shape
        size = f"T{s.tasks} B{s.batch} C{s.channels} {s.height}x{s.width}"
        text = f"{self.function} {s.name} ({size}) {self.precision.name} {self.layout}"
        return f"{text}, torch.compile too" if self.compiled else text


def make_inputs(case: Case, device: torch.device) -> list[list[Tensor]]:
    """Return sets of T saliencies."""
    s, layout = case.shape, case.layout
    size = (s.batch, s.channels, s.height, s.width)
    if layout == "tokens":
        size = (s.batch, s.positions, s.channels)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)
    return [
        [
            torch.randn(size, generator=generator, device=device, dtype=case.precision.dtype)
            .contiguous(memory_format=memory_format)
            .requires_grad_()
            for _ in range(s.tasks)
        ]
        for _ in range(input_sets(s.elements * case.itemsize, device))
    ]


def input_sets(set_bytes: int, device: torch.device) -> int:
    """Return how many sets of inputs it takes until the cache holds none of the next call."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(MAX_INPUT_SETS, 1 + CACHE_FACTOR * cache // set_bytes)


def backends(precision: Precision, device: torch.device) -> list[str]:
    """Return the backends that run here and have this precision."""
    if precision == TF32X3:
        return ["triton"]
    names = ["eager", "triton"] if device.type == "cuda" else ["eager"]
    if refusal("native", precision.dtype, device) is None:
        names.append("native")
    return names


@contextlib.contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Set the precision of float32 products, in PyTorch and in the Triton kernels."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision.matmul)
    try:
        with triton_products_in(precision.name if precision == TF32X3 else None):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def triton_products_in(precision: str | None) -> Iterator[None]:
    """Set the precision of the Triton kernels' float32 products; None or empty: as PyTorch's."""
    asked = os.environ.pop(FP32_PRECISION, None)
    if precision is not None:
        os.environ[FP32_PRECISION] = precision
    try:
        yield
    finally:
        os.environ.pop(FP32_PRECISION, None)
        if asked is not None:
            os.environ[FP32_PRECISION] = asked
