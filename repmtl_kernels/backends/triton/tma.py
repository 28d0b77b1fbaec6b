"""Operands that Hopper's tensor memory accelerator (TMA) copies, a block of a tile at a time.

TMA reads a descriptor of the tensor, which the host makes for a launch. A launch has a descriptor
for each of up to :data:`TASKS` tasks, and a program takes its task's.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from repmtl_kernels.backends.triton.common import INTERPRET, MAX_TASKS
from repmtl_kernels.backends.triton.operand import Operand
from repmtl_kernels.backends.triton.tiles import Tile, capability_of

TASKS = 4  # descriptors are arguments by themselves: Triton takes no tuples of them
LARGEST = 2**31 - 1  # of sizes and coordinates


def most_tasks(tile: Tile) -> int:
    """Return the largest number of tasks of one launch."""
    return TASKS if tile.tma else MAX_TASKS


def matrices(views: Sequence[Tensor], operand: Operand, tile: Tile) -> list[Tensor] | None:
    """Return ``X`` of every sample, ``(B, R, K)``, for each ``(B, C, *spatial)`` view.

    None where the tile doesn't want TMA, the GPU has none, or TMA can't read a view.
    """
    if not tile.tma or not (INTERPRET or capability_of(views[0].device) >= 90):
        return None
    try:
        flat = [view.view(*view.shape[:2], -1) for view in views]
    except RuntimeError:  # positions of no single stride
        return None
    operands = [x.mT if operand.n_side else x for x in flat]
    return operands if all(map(readable, operands)) else None


def readable(x: Tensor) -> bool:
    """Return whether TMA can read ``x``.

    One of the last two strides has to be 1; the others and the address are multiples of 16 bytes.
    """
    batch, rows, columns = x.stride()
    others = (batch, rows if columns == 1 else columns)
    unit = 16 // x.element_size()
    return (
        1 in (rows, columns)
        and all(stride > 0 and stride % unit == 0 for stride in others)
        and x.data_ptr() % 16 == 0
        and max(x.shape) <= LARGEST
    )


def rows_last(x: Tensor) -> bool:
    """Return whether the elements of a column are neighbours in memory, and not those of a row."""
    return x.stride(2) != 1


def descriptors(
    matrices: Sequence[Tensor] | None, rows: int, columns: int
) -> tuple[TensorDescriptor | None, ...]:
    """Return :data:`TASKS` descriptors of blocks of rows x columns; None for a missing task."""
    made = []
    for x in matrices or ():
        block = [1, rows, columns]
        if rows_last(x):
            x, block = x.mT, [1, columns, rows]
        made.append(TensorDescriptor(x, list(x.shape), list(x.stride()), block))
    return (*made, *(None,) * (TASKS - len(made)))


@triton.jit
def chosen(d_0, d_1, d_2, d_3, task):
    """Return the descriptor of a task."""
    descriptor = d_0
    if d_1 is not None:
        if task == 1:
            descriptor = d_1
    if d_2 is not None:
        if task == 2:
            descriptor = d_2
    if d_3 is not None:
        if task == 3:
            descriptor = d_3
    return descriptor


@triton.jit
def load_block(
    descriptor,
    sample,
    row,
    column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_LAST: tl.constexpr,
):
    """Load ``(ROWS, COLUMNS)`` of a sample's matrix; 0 beyond its end."""
    sample = tl.cast(sample, tl.int32)
    if ROWS_LAST:
        return tl.trans(tl.reshape(descriptor.load([sample, column, row]), (COLUMNS, ROWS)))
    else:
        return tl.reshape(descriptor.load([sample, row, column]), (ROWS, COLUMNS))
