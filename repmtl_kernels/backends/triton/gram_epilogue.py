"""The epilogue of the Gram kernel: a tile of ``X^ X^^T`` is complete, and all else is made from it.

It is the square of the norm, the stored matrix, and the products with the anchors ``u``. On the N
side these are ``V = S^^T u``, which comes next to the tile; on the C side they are products of the
tile, which is one of the affinity ``S^ S^^T``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from repmtl_kernels.backends.triton.operand import (
    join_columns,
    matmul,
    matmul_in_parts,
    round_tf32,
    split_columns,
    task_vectors,
)


@triton.jit
def tile_pair(pair, strips, RATIO: tl.constexpr):
    """Return ``(i, j)``, ``j <= i // RATIO``: row of tiles, and strip of RATIO tiles of columns.

    The rows of the lower triangle of squares of RATIO tiles, folded in two, make a rectangle.
    """
    odd = strips % 2
    width = strips + 1 - odd
    square = pair // RATIO
    row, column = square // width, square % width
    in_long_row = column < strips - row
    i = tl.where(in_long_row, strips - 1 - row, row - odd)
    return i * RATIO + pair % RATIO, tl.where(in_long_row, column, column - strips + row)


@triton.jit
def store_tile(
    acc,
    v,  # of the tile's rows, where it is on the diagonal; on the C side not used
    squares,  # the arguments of the Gram kernel
    positives,
    projection,
    matrix,
    multiple,
    anchors,  # of the sample
    anchor_stride,
    sample,
    pairs,
    pair,
    i,
    j,
    rows,
    tiles,
    tasks,
    N_SIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    RATIO: tl.constexpr,
):
    """Store all that is made from the tile at ``(i, j)``, and from its image."""
    r_i, r_j = i * BLOCK + tl.arange(0, BLOCK), j * (BLOCK * RATIO) + tl.arange(0, BLOCK * RATIO)
    inside_i, inside_j = r_i < rows, r_j < rows
    task = tl.arange(0, COLUMNS // 2 if SPLIT else COLUMNS)[None, :]
    weight = _weight(i, j, BLOCK, RATIO)
    _store_square(squares + sample * pairs + pair, acc, weight, RATIO)
    if matrix is not None:
        _store_matrix(
            matrix, acc, multiple, sample, i, j, r_i, r_j, inside_i, inside_j, rows,
            BLOCK, RATIO, PRECISION,
        )  # fmt: skip
    if not N_SIDE:
        _store_affinity_products(
            positives, projection, acc, weight, anchors, anchor_stride,
            sample, pairs, pair, task, i, j, r_i, r_j, inside_i, inside_j,
            rows, tiles, tasks, SPLIT, COLUMNS, PRECISION,
        )  # fmt: skip
    elif i // RATIO == j:
        _store_projection(
            positives + sample * tiles + i, projection, join_columns(v) if SPLIT else v,
            sample, task, r_i, inside_i, rows, tasks,
        )  # fmt: skip


@triton.jit
def _weight(i, j, BLOCK: tl.constexpr, RATIO: tl.constexpr):
    """Return how often a tile counts, or each of its columns: the upper triangle is an image."""
    if RATIO == 1:
        return tl.where(i == j, 1.0, 2.0)
    else:
        tile_j = j * RATIO + tl.arange(0, BLOCK * RATIO) // BLOCK
        return tl.where(tile_j == i, 1.0, tl.where(tile_j < i, 2.0, 0.0))


@triton.jit
def _store_square(to, acc, weight, RATIO: tl.constexpr):
    """Store the part of a tile, and of its image, in the square of the norm."""
    if RATIO == 1:
        tl.store(to, weight * tl.sum(acc * acc))
    else:
        tl.store(to, tl.sum(tl.sum(acc * acc, 0) * weight))


@triton.jit
def _store_matrix(
    matrix,  # (T, B, R, R)
    acc,
    multiple,
    sample,
    i,
    j,
    r_i,
    r_j,
    inside_i,
    inside_j,
    rows,
    BLOCK: tl.constexpr,
    RATIO: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store a tile and its image in the upper triangle, so that the backward reads plain rows."""
    in_lower, in_upper = inside_j, inside_j
    if RATIO > 1:
        tile_j = j * RATIO + tl.arange(0, BLOCK * RATIO) // BLOCK
        in_lower, in_upper = inside_j & (tile_j <= i), inside_j & (tile_j < i)
    g = acc * multiple
    g = round_tf32(g) if PRECISION == "tf32" else g.to(matrix.dtype.element_ty)
    matrix += sample * rows * rows
    lower = matrix + r_i.to(tl.int64)[:, None] * rows + r_j[None, :]
    tl.store(lower, g, mask=inside_i[:, None] & in_lower[None, :])
    if j * RATIO < i:
        upper = matrix + r_j.to(tl.int64)[:, None] * rows + r_i[None, :]
        tl.store(upper, tl.trans(g), mask=in_upper[:, None] & inside_i[None, :])


@triton.jit
def _store_affinity_products(
    positives,  # (T, B, PAIRS): partial sums of p
    projection,  # (T, B, TILES, T, C): a part of S^ S^^T u for each tile; or None
    acc,
    weight,
    anchors,  # of the sample
    anchor_stride,
    sample,
    pairs,
    pair,
    task,
    i,
    j,
    r_i,
    r_j,
    inside_i,
    inside_j,
    rows,
    tiles,
    tasks,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the products of a tile of the affinity (C side), and of its image, with ``u``."""
    y = _times_anchors(
        acc, anchors, anchor_stride, r_j, rows, tasks, SPLIT, COLUMNS, PRECISION, False
    )
    u = task_vectors(anchors, anchor_stride, r_i, rows, tasks, task.shape[1], 1)
    tl.store(positives + sample * pairs + pair, weight * tl.sum(u * y))
    if projection is not None:
        parts = projection + (sample * tiles * tasks + task) * rows
        part_j = parts + (j * tasks * rows + r_i)[:, None]
        tl.store(part_j, y, mask=inside_i[:, None] & (task < tasks))
        if i != j:
            y = _times_anchors(
                acc, anchors, anchor_stride, r_i, rows, tasks, SPLIT, COLUMNS, PRECISION, True
            )
            part_i = parts + (i * tasks * rows + r_j)[:, None]
            tl.store(part_i, y, mask=inside_j[:, None] & (task < tasks))


@triton.jit
def _store_projection(
    positive,  # where the sum of squares of v goes
    projection,  # (T, B, T, N); or None
    v,
    sample,
    task,
    r,
    inside,
    rows,
    tasks,
):
    """Store ``V = S^^T u`` of a tile's positions (N side), and the sum of its squares."""
    tl.store(positive, tl.sum(v * v))
    if projection is not None:
        to = projection + (sample * tasks + task) * rows + r[:, None]
        tl.store(to, v, mask=inside[:, None] & (task < tasks))


@triton.jit
def _times_anchors(
    x,
    anchors,
    stride,
    index,
    size,
    tasks,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Return ``x @ u`` (TRANSPOSED: ``x^T @ u``) of float32 ``x``: a column for each task."""
    y = tl.zeros((x.shape[0], COLUMNS), tl.float32)
    u = task_vectors(anchors, stride, index, size, tasks, COLUMNS, 2 if SPLIT else 1)
    if SPLIT:  # two bfloat16 parts of x need fewer registers than float32 products
        return join_columns(matmul_in_parts(x, split_columns(u, tl.bfloat16), y, TRANSPOSED))
    elif PRECISION == "ieee":  # without matrix units a product would hold all of x once more
        column = tl.arange(0, COLUMNS)[None, :]
        for task in range(tasks):
            one = tl.load(anchors + task * stride + index, mask=index < size, other=0.0)
            terms = x * (one[:, None] if TRANSPOSED else one[None, :])
            y = tl.where(column == task, tl.sum(terms, 0 if TRANSPOSED else 1)[:, None], y)
        return y
    else:
        return matmul(tl.trans(x) if TRANSPOSED else x, u, y, PRECISION)
