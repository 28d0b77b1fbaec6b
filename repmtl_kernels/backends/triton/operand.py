"""The matrix ``X`` of one task and sample, and products with it, for both CSA stages.

``X`` (``R x K``) is ``S_bt^T`` where positions are the smaller side (N side), else ``S_bt``
(C side): its Gram matrix ``X X^T`` is ``R x R``. ``^`` marks scaled operands.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels._ground.saliency import float16_gram_factor
from repmtl_kernels.backends.triton import common
from repmtl_kernels.backends.triton.common import (
    alignment,
    fp32_precision,
    next_power_of_2,
    position_offsets,
    stride_of,
    zero_unless,
)
from repmtl_kernels.backends.triton.tiles import ProductKernel, Tile, capability_of, tile_of

# The interpreter multiplies bfloat16 wrongly and has no inline assembly.
INTERPRET = tl.constexpr(common.INTERPRET)


class Operand(NamedTuple):
    """The sides of ``X``, and how its products are computed."""

    n_side: bool
    rows: int  # R = min(C, N)
    depth: int  # K = max(C, N)
    dtype: torch.dtype
    precision: str  # input_precision of its products; means nothing for 16-bit dtypes

    @classmethod
    def of(cls, saliency: Tensor) -> Operand:
        """Return the operand that the samples of ``(B, C, *spatial)`` are."""
        channels, positions = saliency.shape[1], saliency.shape[2:].numel()
        n_side = positions <= channels
        rows, depth = (positions, channels) if n_side else (channels, positions)
        precision = fp32_precision() if saliency.dtype == torch.float32 else "16-bit"
        return cls(n_side, rows, depth, saliency.dtype, precision)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """``N // N_ALIGN, C // C_ALIGN, N_ALIGN, C_ALIGN``: masks then keep wide loads.

        C stays as it is in training, so kernels may be compiled for more of it.
        """
        sizes = (self.rows, self.depth) if self.n_side else (self.depth, self.rows)
        n_align, c_align = map(alignment, sizes)
        return sizes[0] // n_align, sizes[1] // c_align, n_align, c_align

    @property
    def is_odd(self) -> bool:
        """Whether rows of the Gram matrix, and of a dense ``X``, start at any address."""
        return alignment(self.rows, self.depth) == 1

    def tile(self, kernel: ProductKernel, device: torch.device) -> Tile:
        """Return the tile that a kernel takes for this operand."""
        return tile_of(kernel, self.precision, self.is_odd, self.rows, self.depth, device)

    @property
    def is_split(self) -> bool:
        """Whether float32 factors of ``X`` come in two parts (:func:`split_columns`)."""
        return self.precision in ("16-bit", "tf32")

    @property
    def storage_factor(self) -> float:
        """The power of two that the stored Gram matrix is multiplied by.

        Without it, elements are at most ``4 K``. With it they are at most 8 in float32 and
        bfloat16, so that products with unscaled saliencies stay in range, and at most 2^15 in
        float16, as far from the smallest numbers as possible.
        """
        if self.dtype == torch.float16:
            return float16_gram_factor(self.depth)
        return 2.0 ** -math.floor(math.log2(self.depth))

    def passes_registers(self, form: tuple[int, int, int, int], *, along_rows: bool) -> bool:
        """Whether products that sum along the rows (or columns) of ``X`` use :func:`touched`."""
        dims, _, unit, _ = form
        axis = 1 + dims if self.n_side == along_rows else 1
        return self.precision == "tf32" and not unit >> axis & 1


def reads_shared_memory(device: torch.device) -> bool:
    """Return whether right factors have to be in shared memory; True under the interpreter.

    Hopper's matrix units and those of large Blackwell GPUs want them there. Others take factors
    from registers, where transposing them is cheap.
    """
    return common.INTERPRET or 90 <= capability_of(device) < 120


def task_columns(tasks: int, parts: int) -> int:
    """Return the columns for ``parts`` values of each task: at least the 16 of matrix units."""
    return max(16, parts * next_power_of_2(tasks))


@triton.jit
def row_offsets(index, layout, FORM: tl.constexpr, N_SIDE: tl.constexpr):
    """Return the offsets of rows of ``X``; called with ``not N_SIDE``, of its columns."""
    if N_SIDE:
        return position_offsets(index, layout, FORM)
    else:
        return index.to(tl.int64) * stride_of(layout, FORM, 1)


@triton.jit
def matmul(a, b, acc, PRECISION: tl.constexpr):
    """Return ``acc + a @ b`` in float32.

    In tf32, the matrix units cut off ``X`` in every product. They do so alike in all of them, as if
    the saliencies were other ones. All other factors have to be more exact than TF32, for the
    gradient is a small difference of large terms.
    """
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if PRECISION == "tf32":
            a = _cut_off(a)
            b = _cut_off(b)
    return tl.dot(a, b, acc, input_precision="ieee" if PRECISION == "16-bit" else PRECISION)


@triton.jit
def matmul_in_parts(a, b, acc, TRANSPOSED: tl.constexpr):
    """Return ``acc + a @ b`` (TRANSPOSED: ``a^T @ b``) of float32 ``a`` as two bfloat16 parts."""
    high = a.to(tl.bfloat16)
    acc = matmul(tl.trans(high) if TRANSPOSED else high, b, acc, "16-bit")
    low = (a - high.to(tl.float32)).to(tl.bfloat16)  # here: before, it takes more registers
    return matmul(tl.trans(low) if TRANSPOSED else low, b, acc, "16-bit")


@triton.jit
def _cut_off(x):
    """Return float32 without its lower 13 bits: what the matrix units make of it in TF32."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def round_tf32(x):
    """Round float32 to the nearest number in TF32."""
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True) + 4096
        return tl.where(x - x == 0, _cut_off(bits.to(tl.float32, bitcast=True)), x)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def touched(x):
    """Return ``x``; for float32 operands that are not contiguous along the sum.

    They have to be transposed for the matrix units. By itself, the compiler copies 4 bytes at a
    time to do so; if an instruction touches them on the way, it copies 16 bytes at a time.
    """
    if INTERPRET:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def load_spread(
    columns,  # where those of the block begin
    inside,  # which of them are there
    valid,  # of each row: whether it is there; or None, all are
    start,
    size,
    layout,
    FORM: tl.constexpr,
    N_SIDE: tl.constexpr,  # as :func:`row_offsets` takes it for the rows of the block
    ROWS: tl.constexpr,
):
    """Load a block whose rows are contiguous, with its columns as :func:`spread` orders them.

    It is for a right factor in tf32, which the matrix units want column by column. A thread loads
    four rows of four columns, so that it stores four rows of a column at once. In this order, the
    stores of eight threads are free of bank conflicts; those of single elements have 16 of them.
    """
    x_0 = _fourth(0, columns, inside, valid, start, size, layout, FORM, N_SIDE, ROWS)
    x_1 = _fourth(1, columns, inside, valid, start, size, layout, FORM, N_SIDE, ROWS)
    x_2 = _fourth(2, columns, inside, valid, start, size, layout, FORM, N_SIDE, ROWS)
    x_3 = _fourth(3, columns, inside, valid, start, size, layout, FORM, N_SIDE, ROWS)
    WIDE: tl.constexpr = x_0.shape[1]
    x = tl.join(tl.join(x_0, x_2), tl.join(x_1, x_3))
    x = tl.permute(tl.reshape(x, (ROWS // 4, WIDE // 4, 4, 4)), (0, 3, 2, 1))
    return tl.reshape(x, (ROWS, WIDE))


@triton.jit
def _fourth(
    which: tl.constexpr,
    columns,
    inside,
    valid,
    start,
    size,
    layout,
    FORM: tl.constexpr,
    N_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Load every fourth row of a block."""
    k = start + which + 4 * tl.arange(0, ROWS // 4)
    x = tl.load(
        columns + row_offsets(k, layout, FORM, N_SIDE)[:, None],
        mask=(k < size)[:, None] & inside[None, :],
        other=0.0,
    )
    if valid is not None:
        x = zero_unless(tl.load(valid + k, mask=k < size, other=0)[:, None], x)
    return x


@triton.jit
def spread(SIZE: tl.constexpr):
    """Return the columns in an order in which every fourth one is next to the one before."""
    place = tl.arange(0, SIZE)
    return place % (SIZE // 4) * 4 + place // (SIZE // 4)


@triton.jit
def gathered(x):
    """Return columns that came as :func:`spread` orders them in their own order."""
    apart = tl.reshape(x, (x.shape[0], 4, x.shape[1] // 4))
    return tl.reshape(tl.permute(apart, (0, 2, 1)), x.shape)


@triton.jit
def task_vectors(
    values,  # of one sample: a vector of `size` float32 per task, `stride` apart
    stride,
    index,
    size,
    tasks,
    COLUMNS: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """Return elements ``index`` of each task's vector, ``(len(index), COLUMNS)`` in float32.

    A task has REPEAT equal columns.
    """
    task = tl.arange(0, COLUMNS) // REPEAT
    return tl.load(
        values + task.to(tl.int64)[None, :] * stride + index[:, None],
        mask=(task < tasks)[None, :] & (index < size)[:, None],
        other=0.0,
    )


@triton.jit
def split_columns(v, DTYPE: tl.constexpr):
    """Turn pairs of equal columns into a value in DTYPE (float32: in TF32) and what that lost.

    Rounding anchors to 16 bits alone changes the similarity by up to 1.8e-2.
    """
    high = round_tf32(v) if DTYPE == tl.float32 else v.to(DTYPE)
    low = (v - high.to(tl.float32)).to(DTYPE)
    return tl.where((tl.arange(0, v.shape[1]) % 2 == 0)[None, :], high, low)


@triton.jit
def join_columns(v):
    """Sum pairs of columns: undoes :func:`split_columns` in a product with its result."""
    return tl.sum(tl.reshape(v, (v.shape[0], v.shape[1] // 2, 2)), 2)


@triton.jit
def repeat_columns(v):
    """Return each column twice."""
    twice = tl.broadcast_to(v[:, :, None], (v.shape[0], v.shape[1], 2))
    return tl.reshape(twice, (v.shape[0], 2 * v.shape[1]))
