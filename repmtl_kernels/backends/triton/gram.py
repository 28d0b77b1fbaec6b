"""Similarity of each task's affinity with its anchor (equations 7 to 9), from half a Gram matrix.

The anchor product is fused: on the N side ``V = S^^T u`` is a narrow product on the diagonal tiles
of ``S^^T S^``, on the C side the tiles of the affinity ``S^ S^^T`` are multiplied by ``u``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels._ground.saliency import in_factors
from repmtl_kernels.backends.contract import Gram
from repmtl_kernels.backends.triton import tma
from repmtl_kernels.backends.triton.common import (
    cdiv,
    launch,
    pick,
    stride_of,
    task_groups,
    zero_unless,
)
from repmtl_kernels.backends.triton.operand import (
    Operand,
    join_columns,
    matmul,
    matmul_in_parts,
    round_tf32,
    row_offsets,
    split_columns,
    task_columns,
    task_vectors,
    touched,
)
from repmtl_kernels.backends.triton.tma import chosen, load_block

# Saliencies with max |S| in [2^-40, 2^40] need no scaling before they are multiplied: a product
# that float32 flushes to zero is below 2^-44 of the largest.
SAFE_SCALE = tl.constexpr(2.0**40)
FINISH_BLOCK = 256


def gram(
    saliencies: list[Tensor],
    scale: Tensor,
    anchors: Tensor,
    *,
    eps: float,
    with_grad: bool,
    mask: Tensor | None = None,
) -> Gram:
    tasks, batch, _ = anchors.shape
    operand = Operand.of(saliencies[0])
    tile = operand.tile("gram", anchors.device).within(operand.rows, operand.rows)
    ratio = tile.columns // tile.rows if operand.n_side else 1
    tiles = cdiv(operand.rows, tile.rows)
    strips = cdiv(tiles, ratio)
    pairs = ratio * (strips * (strips + 1) // 2)
    squares = anchors.new_empty(tasks, batch, pairs)
    positives = anchors.new_empty(tasks, batch, tiles if operand.n_side else pairs)
    projection = matrix = None
    if with_grad:
        partial = () if operand.n_side else (tiles,)
        projection = anchors.new_empty(tasks, batch, *partial, tasks, operand.rows)
        matrix = saliencies[0].new_empty(tasks, batch, operand.rows, operand.rows)
    for group in task_groups(saliencies, tma.most_tasks(tile)):
        form = group.geometry.form
        x = tma.matrices(group.tensors, operand, tile)
        launch(
            _gram_kernel,
            # The pairs of tiles of a sample are neighbours: they share it in the L2 cache.
            (pairs * batch, len(group.tasks)),
            anchors.device,
            group.tensors,
            *tma.descriptors(x, tile.rows, tile.depth),
            *tma.descriptors(x if ratio > 1 else None, tile.rows * ratio, tile.depth),
            group.tasks,
            group.geometry.layout,
            mask,
            scale,
            anchors,
            squares,
            positives,
            projection,
            matrix,
            operand.storage_factor,
            tasks,
            batch,
            tiles,
            strips,
            *operand.sizes,
            FORM=form,
            N_SIDE=operand.n_side,
            SPLIT=operand.is_split,
            COLUMNS=task_columns(tasks, 2 if operand.is_split else 1),
            SCALING=_scaling(operand),
            PRECISION=operand.precision,
            TOUCH=operand.passes_registers(form, along_rows=False),
            BLOCK=tile.rows,
            RATIO=ratio,
            ROWS_LAST=x is not None and tma.rows_last(x[0]),
            DEPTH=tile.depth,
            STAGES=tile.stages,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
    similarity, inverse, slope = (anchors.new_empty(tasks, batch) for _ in range(3))
    launch(
        _gram_finish_kernel,
        (tasks * batch,),  # a sample of a task each
        anchors.device,
        squares,
        positives,
        scale,
        similarity,
        inverse,
        slope,
        *in_factors(eps),
        squares.shape[2],
        positives.shape[2],
        BLOCK=FINISH_BLOCK,
        num_warps=4,
    )
    if with_grad and not operand.n_side:
        projection = projection.sum(2)
    return Gram(similarity, inverse, slope, projection, matrix)


def _scaling(operand: Operand) -> str:
    """Whether saliencies are scaled before they are multiplied: always, never, or where needed."""
    if operand.precision == "ieee":  # operands come through registers anyway
        return "always"
    return "never" if operand.dtype == torch.float16 else "needed"


@triton.jit
def _tile_pair(pair, strips, RATIO: tl.constexpr):
    """``(i, j)``, ``j <= i // RATIO``: row of tiles and strip of columns, RATIO tiles wide.

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
    """``x @ u`` (TRANSPOSED: ``x^T @ u``) of float32 ``x``: ``(BLOCK, tasks and padding)``."""
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


@triton.jit
def _gram_kernel(
    saliencies,  # of a group of tasks: (B, C, N) each
    near_0,  # TMA descriptors of BLOCK x DEPTH of X, one a task; or None
    near_1,
    near_2,
    near_3,
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
    R_DIV,
    K_DIV,
    R_ALIGN: tl.constexpr,
    K_ALIGN: tl.constexpr,
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
    rows, depth = R_DIV * R_ALIGN, K_DIV * K_ALIGN
    channels = depth if N_SIDE else rows
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
        valid += b * (rows if N_SIDE else depth)
    anchors += b * channels
    anchor_stride = tl.cast(batch, tl.int64) * channels
    factor = tl.load(scale + sample)
    TASKS: tl.constexpr = COLUMNS // 2 if SPLIT else COLUMNS
    task = tl.arange(0, TASKS)[None, :]

    # One of these loops runs: on the diagonal, off it, or for saliencies that have to be scaled
    # before they are multiplied (NaN among them). Scaling takes operands through registers, so the
    # other two are without.
    wanted = tl.where(has_diagonal, 0, 1)
    if SCALING == "needed":
        safe = (factor <= SAFE_SCALE) & (factor >= 1 / SAFE_SCALE)
        wanted = tl.where(safe, wanted, 2)
    if near_0 is not None:
        near = chosen(near_0, near_1, near_2, near_3, tl.program_id(1))
        wide = near
        if wide_0 is not None:
            wide = chosen(wide_0, wide_1, wide_2, wide_3, tl.program_id(1))
    acc = tl.zeros((BLOCK, WIDE), tl.float32)
    v = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for loop in tl.static_range(3 if SCALING == "needed" else 2):
        if wanted == loop:
            SCALED: tl.constexpr = loop == 2 or SCALING == "always"
            STEP: tl.constexpr = DEPTH if loop < 2 else 16
            TMA: tl.constexpr = near_0 is not None and not SCALED
            # Its own, not those of the branch before: the same note of ptxas.
            acc = tl.zeros((BLOCK, WIDE), tl.float32)
            v = tl.zeros((BLOCK, COLUMNS), tl.float32)
            for start in tl.range(0, depth, STEP, num_stages=STAGES if loop < 2 else 1):
                k = start + tl.arange(0, STEP)
                inside_k = k < depth
                offsets = row_offsets(k, layout, FORM, not N_SIDE)
                if TMA:
                    x_i = load_block(near, b, first_i, start, BLOCK, STEP, ROWS_LAST)
                else:
                    x_i = tl.load(
                        rows_i + offsets[None, :],
                        mask=inside_i[:, None] & inside_k[None, :],
                        other=0.0,
                    )
                if TOUCH:
                    x_i = touched(x_i)
                if valid is not None and not N_SIDE:
                    there = tl.load(valid + k, mask=inside_k, other=0)
                    x_i = zero_unless(there[None, :], x_i)
                if SCALED:
                    x_i = (x_i.to(tl.float32) * factor).to(x_i.dtype)
                if loop == 0 and RATIO == 1:
                    x_j = tl.trans(x_i)
                else:
                    if TMA:
                        x_j = tl.trans(load_block(wide, b, first_j, start, WIDE, STEP, ROWS_LAST))
                    else:
                        x_j = tl.load(
                            rows_j + offsets[:, None],
                            mask=inside_k[:, None] & inside_j[None, :],
                            other=0.0,
                        )
                    if TOUCH:
                        x_j = touched(x_j)
                    if valid is not None and not N_SIDE:
                        x_j = zero_unless(there[:, None], x_j)
                    if SCALED:
                        x_j = (x_j.to(tl.float32) * factor).to(x_j.dtype)
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
    # The upper triangle is the lower one's image.
    if RATIO == 1:
        weight = tl.where(i == j, 1.0, 2.0)
        tl.store(squares + sample * pairs + pair, weight * tl.sum(acc * acc))
        in_lower, in_upper = inside_j, inside_j
    else:
        tile_j = j * RATIO + tl.arange(0, WIDE) // BLOCK
        weight = tl.where(tile_j == i, 1.0, tl.where(tile_j < i, 2.0, 0.0))
        tl.store(squares + sample * pairs + pair, tl.sum(tl.sum(acc * acc, 0) * weight))
        in_lower, in_upper = inside_j & (tile_j <= i), inside_j & (tile_j < i)
    if matrix is not None:
        g = acc * multiple
        g = round_tf32(g) if PRECISION == "tf32" else g.to(matrix.dtype.element_ty)
        matrix += sample * rows * rows
        lower = matrix + r_i.to(tl.int64)[:, None] * rows + r_j[None, :]
        tl.store(lower, g, mask=inside_i[:, None] & in_lower[None, :])
        if j * RATIO < i:  # stored too, so that the backward reads plain rows
            upper = matrix + r_j.to(tl.int64)[:, None] * rows + r_i[None, :]
            tl.store(upper, tl.trans(g), mask=in_upper[:, None] & inside_i[None, :])
    if not N_SIDE:
        y = _times_anchors(
            acc, anchors, anchor_stride, r_j, rows, tasks, SPLIT, COLUMNS, PRECISION, False
        )
        u = task_vectors(anchors, anchor_stride, r_i, rows, tasks, TASKS, 1)
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
    elif has_diagonal:
        v_sum = (join_columns(v) if SPLIT else v) * rest
        tl.store(positives + sample * tiles + i, tl.sum(v_sum * v_sum))
        if projection is not None:
            to_v = projection + (sample * tasks + task) * rows + r_i[:, None]
            tl.store(to_v, v_sum, mask=inside_i[:, None] & (task < tasks))


@triton.jit
def _sum(parts, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        part = start + tl.arange(0, BLOCK)
        total += tl.load(parts + part, mask=part < count, other=0.0)
    return tl.sum(total)


@triton.jit
def _gram_finish_kernel(
    squares,  # (T, B, PARTS)
    positives,  # (T, B, PARTS)
    scale,  # (T, B), as the outputs
    similarity,
    inverse,
    slope,
    eps,
    root,  # the guard is eps (root scale)^2
    square_parts,
    positive_parts,
    BLOCK: tl.constexpr,
):
    """Grid: (task and sample,)."""
    sample = tl.program_id(0).to(tl.int64)
    square = _sum(squares + sample * square_parts, square_parts, BLOCK)
    positive = _sum(positives + sample * positive_parts, positive_parts, BLOCK)
    norm = tl.sqrt_rn(square)
    factor = tl.load(scale + sample)
    floor = eps * (root * factor) * (root * factor)  # in this order: the square may overflow
    clamped = tl.maximum(norm, floor, propagate_nan=tl.PropagateNan.ALL)
    zero = norm == 0
    inverse_norm = tl.where(zero, 0.0, tl.div_rn(1.0, tl.where(zero, 1.0, clamped)))
    s = positive * inverse_norm
    tl.store(similarity + sample, s)
    tl.store(inverse + sample, inverse_norm)
    tl.store(slope + sample, tl.where(norm < floor, 0.0, -s * inverse_norm))
