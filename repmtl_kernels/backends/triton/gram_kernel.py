"""The Gram kernel: a tile of the lower triangle of ``X^ X^^T``, and all that is made from it.

A program loads rows of ``X`` (see ``operand.py``), multiplies them, and ends with an epilogue: the
square of the norm, the stored matrix, and the products with the anchors ``u``. On the N side these
are ``V = S^^T u``, a narrow product on the diagonal tiles next to the tile itself; on the C side
they are products of the tile, which is one of the affinity ``S^ S^^T``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from repmtl_kernels.backends.triton.common import pick, stride_of, zero_unless
from repmtl_kernels.backends.triton.operand import (
    join_columns,
    matmul,
    matmul_in_parts,
    round_tf32,
    row_offsets,
    split_columns,
    task_vectors,
    touched,
)
from repmtl_kernels.backends.triton.tma import chosen, load_block

# Saliencies with max |S| in [2^-40, 2^40] need no scaling before they are multiplied: a product
# that float32 flushes to zero is below 2^-44 of the largest.
SAFE_SCALE = tl.constexpr(2.0**40)


@triton.jit(
    do_not_specialize=["tasks", "batch", "N_DIV"],
    do_not_specialize_on_alignment=[
        "tiles",
        "strips",
    ],  # a single tile has no loop off the diagonal
)
def _gram_kernel(
    saliencies,  # of a group of tasks: (B, C, N) each
    tall_0,  # TMA descriptors of BLOCK x DEPTH of X, one for each task; or None
    tall_1,
    tall_2,
    tall_3,
    wide_0,  # of (BLOCK * RATIO) x DEPTH; or None
    wide_1,
    wide_2,
    wide_3,
    group,  # numbers of the tasks
    layout,
    valid,  # (B, N) bool: which positions are there; or None, all are
    scale,  # (T, B)
    anchors,  # (T, B, C)
    squares,  # (T, B, PAIRS): partial sums of |X^ X^^T|^2
    positives,  # partial sums of p: (T, B, TILES), on the C side (T, B, PAIRS)
    projection,  # (T, B, T, N), or parts to be summed over the tiles: (T, B, TILES, T, C); or None
    matrix,  # (T, B, R, R): multiple of X^ X^^T; or None
    multiple,
    tasks,
    batch,
    tiles,
    strips,
    N_DIV,
    C_DIV,
    N_ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    FORM: tl.constexpr,
    N_SIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALING: tl.constexpr,
    PRECISION: tl.constexpr,
    TOUCH: tl.constexpr,
    BLOCK: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS_LAST: tl.constexpr,  # what TMA copies lies in memory row by row of X^T
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (sample and in it the row of tiles and strip of columns, task of the group)."""
    positions, channels = N_DIV * N_ALIGN, C_DIV * C_ALIGN
    rows, depth = (positions, channels) if N_SIDE else (channels, positions)
    # Else ptxas (its note C7515) has each HGMMA wait for the one before, for a loop that might not
    # run.
    tl.assume(depth > 0)
    pairs = RATIO * (strips * (strips + 1) // 2)
    b, pair = (tl.program_id(0) // pairs).to(tl.int64), tl.program_id(0) % pairs
    i, j = _tile_pair(pair, strips, RATIO)
    has_diagonal = i // RATIO == j
    sample = pick(group, tl.program_id(1)) * batch + b
    if RATIO > 1:
        if i >= tiles:  # the last row of the last square may not exist
            tl.store(squares + sample * pairs + pair, 0.0)
            return

    x = pick(saliencies, tl.program_id(1)) + b * stride_of(layout, FORM, 0)
    WIDE: tl.constexpr = BLOCK * RATIO
    first_i, first_j = i * BLOCK, j * WIDE
    r_i, r_j = first_i + tl.arange(0, BLOCK), first_j + tl.arange(0, WIDE)
    inside_i, inside_j = r_i < rows, r_j < rows
    rows_i = (x + row_offsets(r_i, layout, FORM, N_SIDE))[:, None]
    rows_j = (x + row_offsets(r_j, layout, FORM, N_SIDE))[None, :]
    if valid is not None:
        valid += b * positions
    anchors += b * channels
    anchor_stride = tl.cast(batch, tl.int64) * channels
    factor = tl.load(scale + sample)
    task = tl.arange(0, COLUMNS // 2 if SPLIT else COLUMNS)[None, :]

    # One of these loops runs: on the diagonal, off it, or for saliencies that have to be scaled
    # before they are multiplied (NaN among them). Scaling takes operands through registers, so the
    # other two are without.
    wanted = tl.where(has_diagonal, 0, 1)
    if SCALING == "needed":
        safe = (factor <= SAFE_SCALE) & (factor >= 1 / SAFE_SCALE)
        wanted = tl.where(safe, wanted, 2)
    if tall_0 is not None:
        tall = chosen(tall_0, tall_1, tall_2, tall_3, tl.program_id(1))
        wide = tall
        if wide_0 is not None:
            wide = chosen(wide_0, wide_1, wide_2, wide_3, tl.program_id(1))
    acc = tl.zeros((BLOCK, WIDE), tl.float32)
    v = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for loop in tl.static_range(3 if SCALING == "needed" else 2):
        if wanted == loop:
            SCALED: tl.constexpr = loop == 2 or SCALING == "always"
            STEP: tl.constexpr = DEPTH if loop < 2 else 16
            TMA: tl.constexpr = tall_0 is not None and not SCALED
            # Its own, not those of the branch before: the same note of ptxas.
            acc = tl.zeros((BLOCK, WIDE), tl.float32)
            v = tl.zeros((BLOCK, COLUMNS), tl.float32)
            for start in tl.range(0, depth, STEP, num_stages=STAGES if loop < 2 else 1):
                k = start + tl.arange(0, STEP)
                inside_k = k < depth
                offsets = row_offsets(k, layout, FORM, not N_SIDE)
                if TMA:
                    x_i = load_block(tall, b, first_i, start, BLOCK, STEP, ROWS_LAST)
                else:
                    inside = inside_i[:, None] & inside_k[None, :]
                    x_i = tl.load(rows_i + offsets[None, :], mask=inside, other=0.0)
                if TOUCH:
                    x_i = touched(x_i)
                there = None
                if valid is not None and not N_SIDE:
                    there = tl.load(valid + k, mask=inside_k, other=0)
                x_i = _masked_and_scaled(x_i, there, factor, False, SCALED)
                if loop == 0 and RATIO == 1:
                    x_j = tl.trans(x_i)
                else:
                    if TMA:
                        x_j = tl.trans(load_block(wide, b, first_j, start, WIDE, STEP, ROWS_LAST))
                    else:
                        inside = inside_k[:, None] & inside_j[None, :]
                        x_j = tl.load(rows_j + offsets[:, None], mask=inside, other=0.0)
                    if TOUCH:
                        x_j = touched(x_j)
                    x_j = _masked_and_scaled(x_j, there, factor, True, SCALED)
                acc = matmul(x_i, x_j, acc, PRECISION)
                if N_SIDE and loop != 1:
                    u = task_vectors(
                        anchors, anchor_stride, k, channels, tasks, COLUMNS, 2 if SPLIT else 1
                    )
                    v = matmul(x_i, split_columns(u, x_i.dtype) if SPLIT else u, v, PRECISION)

    if valid is not None and N_SIDE:
        # An element needs only its own row and column of X: here it is not in the way of loads.
        there_i = tl.load(valid + r_i, mask=inside_i, other=0)
        there_j = tl.load(valid + r_j, mask=inside_j, other=0)
        acc = zero_unless(there_i[:, None] & there_j[None, :], acc)
        v = zero_unless(there_i[:, None], v)
    rest = 1.0 if SCALING == "always" else tl.where(wanted == 2, 1.0, factor)
    acc = acc * rest * rest
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
    elif has_diagonal:
        v_sum = (join_columns(v) if SPLIT else v) * rest
        _store_projection(
            positives + sample * tiles + i, projection, v_sum,
            sample, task, r_i, inside_i, rows, tasks,
        )  # fmt: skip


@triton.jit
def _tile_pair(pair, strips, RATIO: tl.constexpr):
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
def _masked_and_scaled(
    x,
    there,  # which positions are there; or None
    factor,
    TRANSPOSED: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Return loaded elements of ``X`` (TRANSPOSED: of ``X^T``) as they are multiplied."""
    if there is not None:
        x = zero_unless(there[:, None] if TRANSPOSED else there[None, :], x)
    if SCALED:
        x = (x.to(tl.float32) * factor).to(x.dtype)
    return x


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
