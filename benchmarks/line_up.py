"""Which calls are measured, and in which order: losses, shapes, precisions and layouts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from benchmarks.shapes import SHAPES, Shape

FUNCTIONS = ("csa_loss", "tsr_loss", "rep_mtl_loss")
FP32_PRECISION = "REPMTL_FP32_PRECISION"  # of the Triton kernels


@dataclass(frozen=True)
class Precision:
    """A dtype with a setting of ``torch.set_float32_matmul_precision``."""

    dtype: torch.dtype
    matmul: str
    name: str  # as in the results and in the measured ceilings


FLOAT32 = Precision(torch.float32, "highest", "float32")
BFLOAT16 = Precision(torch.bfloat16, "highest", "bfloat16")
FLOAT16 = Precision(torch.float16, "highest", "float16")
TF32 = Precision(torch.float32, "high", "tf32")
# Of the Triton kernels alone: rivals beside them have full float32.
TF32X3 = Precision(torch.float32, "highest", "tf32x3")
PRECISIONS = {"cpu": (FLOAT32,), "cuda": (BFLOAT16, TF32, FLOAT32, FLOAT16, TF32X3)}


@dataclass(frozen=True)
class Case:
    """One line-up: the same call on the same inputs for all contestants.

    layout: ``contiguous`` and ``channels_last`` ``(B, C, H, W)`` and ``tokens`` ``(B, N, C)`` come
    as a list of T tensors, ``stacked`` as one of ``(T, B, C, H, W)``.
    """

    function: str
    shape: Shape
    precision: Precision
    layout: str
    compiled: bool

    @property
    def channel_dim(self) -> int:
        return -1 if self.layout == "tokens" else 1

    def __str__(self) -> str:
        s = self.shape
        size = f"T{s.tasks} B{s.batch} C{s.channels} {s.height}x{s.width}"
        return f"{self.function} {s.name} ({size}) {self.precision.name} {self.layout}"


class Effort(NamedTuple):
    """How long to measure: seconds and rounds for each case."""

    seconds: float
    min_rounds: int
    max_rounds: int


FULL = {
    "cpu": Effort(seconds=3.0, min_rounds=3, max_rounds=30),
    "cuda": Effort(seconds=1.5, min_rounds=5, max_rounds=30),
}
QUICK = Effort(seconds=1.0, min_rounds=2, max_rounds=10)
QUICK_SHAPES = ("office49", "vit196", "cityscapes")
# Other memory layouts than contiguous (B, C, H, W), where networks produce them.
LAYOUTS = (("cityscapes", "channels_last"), ("vit196", "tokens"))
# What decides on a GPU, in this order; at the end of a line whether torch.compile takes part, which
# takes longer than all others together.
TELLING = (
    ("tsr_loss", "nyuv2", BFLOAT16, False),
    ("rep_mtl_loss", "nyuv2", BFLOAT16, True),
    ("rep_mtl_loss", "cityscapes", BFLOAT16, True),
    ("rep_mtl_loss", "office49", BFLOAT16, True),
    ("rep_mtl_loss", "office1", BFLOAT16, True),
    ("rep_mtl_loss", "nyuv2", TF32, True),
    ("rep_mtl_loss", "cityscapes", TF32, True),
    ("rep_mtl_loss", "nyuv2", FLOAT32, False),
    ("rep_mtl_loss", "cityscapes", FLOAT32, False),
    ("rep_mtl_loss", "office49", TF32, False),
    ("rep_mtl_loss", "office1", TF32, False),
    ("rep_mtl_loss", "vit196", BFLOAT16, True),
    ("rep_mtl_loss", "vit1024", BFLOAT16, True),
    ("rep_mtl_loss", "nyuv2", FLOAT16, False),
    ("rep_mtl_loss", "cityscapes", FLOAT16, False),
    ("rep_mtl_loss", "nyuv2", TF32X3, False),
    ("rep_mtl_loss", "cityscapes", TF32X3, False),
)
TELLING_LAYOUTS = (
    ("nyuv2", "channels_last"),
    ("cityscapes", "channels_last"),
    ("vit196", "tokens"),
    ("vit1024", "tokens"),
    ("nyuv2", "stacked"),
    ("cityscapes", "stacked"),
)


def cases(device_type: str, quick: bool) -> list[Case]:
    """Most telling first: when time runs out, what is left out is at the end."""
    found = _cuda_cases() if device_type == "cuda" else _cpu_cases()
    if quick:  # compiling takes longer than everything else
        found = [
            replace(case, compiled=False)
            for case in found
            if case.shape.name in QUICK_SHAPES and case.layout == "contiguous"
        ]
    return found


def _cpu_cases() -> list[Case]:
    # Compiled rep_mtl_loss adds nothing to the two losses that it sums.
    found = [
        Case(function, shape.scaled("cpu"), FLOAT32, "contiguous", function != "rep_mtl_loss")
        for function in FUNCTIONS
        for shape in SHAPES.values()
    ]
    for name, layout in LAYOUTS:
        found.append(Case("csa_loss", SHAPES[name].scaled("cpu"), FLOAT32, layout, False))
    return found


def _cuda_cases() -> list[Case]:
    first = [
        Case(function, SHAPES[name], precision, "contiguous", compiled)
        for function, name, precision, compiled in TELLING
    ]
    of_layouts = [
        Case("rep_mtl_loss", SHAPES[name], precision, layout, False)
        for precision in (BFLOAT16, TF32)
        for name, layout in TELLING_LAYOUTS
    ]
    large_first = sorted(SHAPES.values(), key=lambda shape: -shape.elements)
    rest = [
        Case(function, shape, precision, "contiguous", False)
        for precision in PRECISIONS["cuda"]
        for function in ("rep_mtl_loss", "csa_loss", "tsr_loss")
        for shape in large_first
        # TSR has no matrix products.
        if not (function == "tsr_loss" and precision in (TF32, TF32X3))
    ]
    of_bfloat16 = [case for case in rest if case.precision == BFLOAT16]
    known, ordered = set(), []
    for case in (*first, *of_bfloat16, *of_layouts, *rest):
        key = replace(case, compiled=False)
        if key not in known:
            known.add(key)
            ordered.append(case)
    return ordered


@contextlib.contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Float32 products of PyTorch and of the Triton kernels in this precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision.matmul)
    try:
        with triton_products_in(precision.name if precision == TF32X3 else None):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def triton_products_in(precision: str | None) -> Iterator[None]:
    """Float32 products of the Triton kernels alone; None or nothing: as PyTorch's."""
    asked = os.environ.pop(FP32_PRECISION, None)
    if precision is not None:
        os.environ[FP32_PRECISION] = precision
    try:
        yield
    finally:
        os.environ.pop(FP32_PRECISION, None)
        if asked is not None:
            os.environ[FP32_PRECISION] = asked
