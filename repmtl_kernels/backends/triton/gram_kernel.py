"""The Gram kernel: a tile of the lower triangle of ``X^ X^^T``, and all that is made from it.

A program loads rows of ``X`` (see ``operand.py``), multiplies them, and ends with an epilogue
(``gram_epilogue.py``). Where there are too few tiles for the GPU, each has several programs, with a
part of the depth each; they leave their sums to ``_gram_join_kernel``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from repmtl_kernels.backends.triton.common import pick, stride_of, zero_unless
from repmtl_kernels.backends.triton.gram_epilogue import store_tile, tile_pair
from repmtl_kernels.backends.triton.operand import (
    gathered,
    load_spread,
    matmul,
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
    do_not_specialize=["tasks", "batch", "parts", "part_depth", "N_DIV"],
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
    sums,  # (T, B, PAIRS, PARTS, BLOCK, BLOCK): of a part of the depth each; or None, of all
    multiple,
    tasks,
    batch,
    tiles,
    strips,
    parts,
    part_depth,  # a multiple of DEPTH
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
    SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS_LAST: tl.constexpr,  # what TMA copies lies in memory row by row of X^T
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (sample, in it the row of tiles and strip of columns, in it the part; task)."""
    positions, channels = N_DIV * N_ALIGN, C_DIV * C_ALIGN
    rows, depth = (positions, channels) if N_SIDE else (channels, positions)
    place, first, last = tl.program_id(0), 0, depth
    part = 0
    if sums is not None:
        place, part = place // parts, place % parts
        first = part * part_depth
        last = tl.minimum(first + part_depth, depth)
    # Else ptxas (its note C7515) has each HGMMA wait for the one before, for a loop that might not
    # run.
    tl.assume(last > first)
    pairs = RATIO * (strips * (strips + 1) // 2)
    b, pair = (place // pairs).to(tl.int64), place % pairs
    i, j = tile_pair(pair, strips, RATIO)
    sample = pick(group, tl.program_id(1)) * batch + b
    x = pick(saliencies, tl.program_id(1)) + b * stride_of(layout, FORM, 0)
    if valid is not None:
        valid += b * positions
    anchors += b * channels
    anchor_stride = tl.cast(batch, tl.int64) * channels
    tall = None
    wide = None
    if tall_0 is not None:
        tall = chosen(tall_0, tall_1, tall_2, tall_3, tl.program_id(1))
        wide = tall
        if wide_0 is not None:
            wide = chosen(wide_0, wide_1, wide_2, wide_3, tl.program_id(1))

    if RATIO == 1:
        _tile(
            x, tall, wide, b, sample, i, j, first, last, part, parts, layout, valid, scale,
            anchors, anchor_stride, squares, positives, projection, matrix, sums, multiple,
            pairs, pair, rows, depth, tasks, tiles, FORM, N_SIDE, SPLIT, COLUMNS, SCALING,
            PRECISION, TOUCH, SPREAD, BLOCK, 1, False, ROWS_LAST, DEPTH, STAGES,
        )  # fmt: skip
    elif i == j * RATIO:  # the strip's other tiles are above the diagonal
        _tile(
            x, tall, tall, b, sample, i, i, first, last, part, parts, layout, valid, scale,
            anchors, anchor_stride, squares, positives, projection, matrix, sums, multiple,
            pairs, pair, rows, depth, tasks, tiles, FORM, N_SIDE, SPLIT, COLUMNS, SCALING,
            PRECISION, TOUCH, SPREAD, BLOCK, 1, True, ROWS_LAST, DEPTH, STAGES,
        )  # fmt: skip
    elif i < tiles:
        _tile(
            x, tall, wide, b, sample, i, j, first, last, part, parts, layout, valid, scale,
            anchors, anchor_stride, squares, positives, projection, matrix, sums, multiple,
            pairs, pair, rows, depth, tasks, tiles, FORM, N_SIDE, SPLIT, COLUMNS, SCALING,
            PRECISION, TOUCH, SPREAD, BLOCK, RATIO, False, ROWS_LAST, DEPTH, STAGES,
        )  # fmt: skip
    else:  # the last row of the last square may not exist
        tl.store(squares + sample * pairs + pair, 0.0)


@triton.jit
def _tile(
    x,  # of the sample; the others are the arguments of the kernel, or made from them
    tall,
    wide,
    b,
    sample,
    i,
    j,
    first,
    last,
    part,
    parts,
    layout,
    valid,
    scale,
    anchors,
    anchor_stride,
    squares,
    positives,
    projection,
    matrix,
    sums,
    multiple,
    pairs,
    pair,
    rows,
    depth,
    tasks,
    tiles,
    FORM: tl.constexpr,
    N_SIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALING: tl.constexpr,
    PRECISION: tl.constexpr,
    TOUCH: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
    RATIO: tl.constexpr,
    ON_DIAGONAL: tl.constexpr,  # whether it is known to be there
    ROWS_LAST: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply the rows of a tile of BLOCK x (BLOCK * RATIO), and store what is made from it."""
    channels = depth if N_SIDE else rows
    has_diagonal = i // RATIO == j
    WIDE: tl.constexpr = BLOCK * RATIO
    first_i, first_j = i * BLOCK, j * WIDE
    r_i, r_j = first_i + tl.arange(0, BLOCK), first_j + tl.arange(0, WIDE)
    inside_i, inside_j = r_i < rows, r_j < rows
    rows_i = (x + row_offsets(r_i, layout, FORM, N_SIDE))[:, None]
    rows_j = (x + row_offsets(r_j, layout, FORM, N_SIDE))[None, :]
    factor = tl.load(scale + sample)

    # One of these loops runs: on the diagonal, off it, or for saliencies that have to be scaled
    # before they are multiplied (NaN among them). Scaling takes operands through registers, so the
    # other two are without.
    wanted = tl.where(has_diagonal, 0, 1)
    if SCALING == "needed":
        safe = (factor <= SAFE_SCALE) & (factor >= 1 / SAFE_SCALE)
        wanted = tl.where(safe, wanted, 2)
    acc = tl.zeros((BLOCK, WIDE), tl.float32)
    v = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for loop in tl.static_range(0, 3 if SCALING == "needed" else 2, 2 if ON_DIAGONAL else 1):
        if wanted == loop:
            SCALED: tl.constexpr = loop == 2 or SCALING == "always"
            STEP: tl.constexpr = DEPTH if loop < 2 else 16
            TMA: tl.constexpr = tall is not None and not SCALED
            # Its own, not those of the branch before: the same note of ptxas.
            acc = tl.zeros((BLOCK, WIDE), tl.float32)
            v = tl.zeros((BLOCK, COLUMNS), tl.float32)
            for start in tl.range(first, last, STEP, num_stages=STAGES if loop < 2 else 1):
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
                if SPREAD:
                    x_j = load_spread(
                        rows_j, inside_j, None if N_SIDE else valid, start, depth, layout,
                        FORM, not N_SIDE, STEP,
                    )  # fmt: skip
                    x_j = _masked_and_scaled(x_j, None, factor, True, SCALED)
                elif loop == 0 and RATIO == 1:
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

    if SPREAD:
        acc = gathered(acc)
    if valid is not None and N_SIDE:
        # An element needs only its own row and column of X: here it is not in the way of loads.
        there_i = tl.load(valid + r_i, mask=inside_i, other=0)
        there_j = tl.load(valid + r_j, mask=inside_j, other=0)
        acc = zero_unless(there_i[:, None] & there_j[None, :], acc)
        v = zero_unless(there_i[:, None], v)
    rest = 1.0 if SCALING == "always" else tl.where(wanted == 2, 1.0, factor)
    acc = acc * rest * rest
    if sums is not None:
        at = ((sample * pairs + pair) * parts + part) * (BLOCK * BLOCK)
        place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(sums + at + place, acc)
    else:
        store_tile(
            acc, v * rest, squares, positives, projection, matrix, multiple, anchors, anchor_stride,
            sample, pairs, pair, i, j, rows, tiles, tasks,
            N_SIDE, SPLIT, COLUMNS, PRECISION, BLOCK, RATIO,
        )  # fmt: skip


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


@triton.jit(do_not_specialize=["tasks", "batch", "parts"], do_not_specialize_on_alignment=["tiles"])
def _gram_join_kernel(
    sums,  # as in the Gram kernel, like the others
    anchors,
    squares,
    positives,
    projection,
    matrix,
    multiple,
    tasks,
    batch,
    tiles,
    parts,
    rows,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,  # parts that are loaded at a time
):
    """Add up the parts of a tile, in a fixed order. Grid: (sample and in it the tile; task)."""
    pairs = tiles * (tiles + 1) // 2
    b, pair = (tl.program_id(0) // pairs).to(tl.int64), tl.program_id(0) % pairs
    i, j = tile_pair(pair, tiles, 1)
    sample = tl.program_id(1) * batch + b
    sums += (sample * pairs + pair) * parts * (BLOCK * BLOCK)
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, parts, AT_ONCE):
        for one in tl.static_range(AT_ONCE):
            at = (start + one) * (BLOCK * BLOCK) + place
            acc += tl.load(sums + at, mask=at < parts * (BLOCK * BLOCK), other=0.0)
    store_tile(
        acc, acc, squares, positives, projection, matrix, multiple,
        anchors + b * rows, tl.cast(batch, tl.int64) * rows,
        sample, pairs, pair, i, j, rows, tiles, tasks,
        False, SPLIT, COLUMNS, PRECISION, BLOCK, 1,
    )  # fmt: skip
