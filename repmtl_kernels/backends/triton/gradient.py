"""The gradient of each saliency, written once: CSA's closed form with TSR's as a broadcast term."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels.backends.contract import CSAGradient, TSRGradient
from repmtl_kernels.backends.triton import tma
from repmtl_kernels.backends.triton.anchor_gradient import anchor_gradient, anchor_weight_of
from repmtl_kernels.backends.triton.common import (
    TRITON_3_6,
    Geometry,
    TaskGroup,
    cdiv,
    launch,
    pick,
    stride_of,
    task_groups,
    zero_unless,
)
from repmtl_kernels.backends.triton.operand import (
    Operand,
    gathered,
    join_columns,
    load_spread,
    matmul,
    matmul_in_parts,
    reads_shared_memory,
    repeat_columns,
    row_offsets,
    split_columns,
    spread,
    task_columns,
    task_vectors,
    touched,
)
from repmtl_kernels.backends.triton.tiles import capability_of
from repmtl_kernels.backends.triton.tma import chosen, load_block


def saliency_grad(
    saliencies: list[Tensor],
    outputs: list[Tensor | None],
    csa: CSAGradient,
    tsr: TSRGradient | None,
    mask: Tensor | None = None,
) -> None:
    """Write the gradient of each task into its output."""
    anchors, stored = csa.anchors.unit, csa.gram.matrix
    assert stored is not None
    tasks, batch, _ = anchors.shape
    operand = Operand.of(saliencies[0])
    anchor_grad = anchor_gradient(saliencies, csa, operand, mask)
    of_positions: tuple = None, None, 0.0
    if tsr is not None:
        position_grad, (grad, factor) = tsr
        of_positions = position_grad, grad, factor / anchors.shape[2]
    tile = operand.tile("gradient", anchors.device)
    tile = tile.within(operand.rows, operand.depth, depth=operand.rows)
    tiles = cdiv(operand.rows, tile.rows) * cdiv(operand.depth, tile.columns)
    parts = 2 if operand.is_split else 1
    # Triton 3.6 can't pipeline two products with one touched operand on Blackwell.
    untouched = TRITON_3_6 and not operand.n_side and capability_of(anchors.device) >= 100
    for group, target in _paired_groups(saliencies, outputs, tma.most_tasks(tile)):
        views = tuple(saliencies[t] for t in target.tasks)
        touch = operand.passes_registers(group.form, along_rows=True) and not untouched
        x, matrix = None if touch else tma.matrices(views, operand, tile), None
        if x is not None:
            matrix = [stored.flatten(0, 1)]
            if not tma.readable(matrix[0]):
                x = matrix = None
        launch(
            _gradient_kernel,
            (tiles * batch, len(target.tasks)),
            anchors.device,
            views,
            *tma.descriptors(x, tile.depth, tile.columns),
            tma.descriptors(matrix, tile.rows, tile.depth)[0],
            group.layout,
            mask,
            target.tensors,
            target.geometry.layout,
            target.tasks,
            csa.scale,
            *csa.of_loss,
            csa.weight,
            csa.gram.inverse,
            csa.gram.slope,
            stored,
            csa.gram.projection if operand.n_side else None,
            anchors,
            anchor_grad,
            *of_positions,
            1 / operand.storage_factor,
            tasks,
            batch,
            *operand.sizes,
            FORM=group.form,
            TARGET_FORM=target.geometry.form,
            N_SIDE=operand.n_side,
            PARTS=parts,
            COLUMNS=task_columns(tasks, parts),
            PRECISION=operand.precision,
            TOUCH=touch,
            SPREAD=touch and reads_shared_memory(anchors.device),
            BLOCK_R=tile.rows,
            BLOCK_K=tile.columns,
            ROWS_LAST=x is not None and tma.rows_last(x[0]),
            DEPTH=tile.depth,
            STAGES=tile.stages,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )


def _paired_groups(
    saliencies: list[Tensor], outputs: list[Tensor | None], most: int
) -> Iterator[tuple[Geometry, TaskGroup]]:
    """Yield groups of tasks with equal strides: the saliencies' strides, and their outputs."""
    wanted = [s if o is not None else None for s, o in zip(saliencies, outputs, strict=True)]
    for group in task_groups(wanted):
        inner = [o if t in group.tasks else None for t, o in enumerate(outputs)]
        for target in task_groups(inner, most):
            yield group.geometry, target


@triton.jit
def _add_outer(left, right, acc, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """Return ``acc + left @ right^T`` of float32.

    With PARTS 2, columns are pairs of equal ones, and the factors are multiplied as bfloat16 parts:
    full float32 products would need a second accumulator. The sum with the much larger ``acc`` is
    a small difference, so no factor may be rounded to 16 bits, or to TF32.
    """
    if PARTS == 2:
        right = tl.trans(split_columns(right, tl.bfloat16))
        return matmul_in_parts(left, right, acc, False)
    else:
        return matmul(left, tl.trans(right), acc, PRECISION)


@triton.jit(do_not_specialize=["grad_csa", "grad_tsr", "tasks", "batch", "N_DIV"])
def _gradient_kernel(
    saliencies,  # of a group of tasks: (B, C, N) each
    x_0,  # TMA descriptors of DEPTH x BLOCK_K of X, one a task; or None
    x_1,
    x_2,
    x_3,
    matrix_blocks,  # the same of BLOCK_R x DEPTH of the matrix; or None
    layout,
    valid,  # (B, N) bool: which positions are there; or None, all are
    outputs,  # as the saliencies
    target_layout,
    group,  # numbers of the tasks
    scale,  # (T, B)
    grad_csa,  # (): with `csa_factor`, dL / d csa
    csa_factor,
    weight,  # (T, B)
    inverse,  # (T, B)
    slope,  # (T, B)
    matrix,  # (T, B, R, R): X^ X^^T / unit
    projection,  # (T, B, T, N), or None on the C side
    anchors,  # (T, B, C)
    anchor_grad,  # (T, B, C)
    position_grad,  # (T, B, N) or None
    grad_tsr,  # () or None: with `tsr_factor`, dL / d tsr / C
    tsr_factor,
    unit,
    tasks,
    batch,
    N_DIV,
    C_DIV,
    N_ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    FORM: tl.constexpr,
    TARGET_FORM: tl.constexpr,
    N_SIDE: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOUCH: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS_LAST: tl.constexpr,  # what TMA copies lies in memory row by row of X^T
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (sample and in it the tile of ``X``, task of the group)."""
    positions, channels = N_DIV * N_ALIGN, C_DIV * C_ALIGN
    rows, depth = (positions, channels) if N_SIDE else (channels, positions)
    tl.assume(rows > 0)  # as in the Gram kernel
    row_tiles = tl.cdiv(rows, BLOCK_R)
    tiles = row_tiles * tl.cdiv(depth, BLOCK_K)
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    sample = pick(group, tl.program_id(1)) * batch + b
    first_r, first_k = (tile % row_tiles) * BLOCK_R, (tile // row_tiles) * BLOCK_K
    r, k = first_r + tl.arange(0, BLOCK_R), first_k + tl.arange(0, BLOCK_K)
    inside_r, inside_k = r < rows, k < depth
    x = pick(saliencies, tl.program_id(1)) + b * stride_of(layout, FORM, 0)
    x_columns = (x + row_offsets(k, layout, FORM, not N_SIDE))[None, :]
    matrix_rows = (matrix + (sample * rows + r) * rows)[:, None]
    if valid is not None:
        valid += b * positions
    anchors += b * channels
    anchor_stride = tl.cast(batch, tl.int64) * channels

    if x_0 is not None:
        x_blocks = chosen(x_0, x_1, x_2, x_3, tl.program_id(1))
    factor = tl.load(scale + sample)
    # Unscaled saliencies: elements of the matrix and of anchors are of order 1.
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    w = tl.zeros((BLOCK_K, COLUMNS), tl.float32)  # C side: S^T u
    # On the C side each position has columns of its own. Loads that leave out positions are of
    # single elements, which those of odd rows are anyway.
    MASKED: tl.constexpr = valid is not None and N_SIDE
    LEFT_OUT: tl.constexpr = N_ALIGN == 1 and x_0 is None
    for start in tl.range(0, rows, DEPTH, num_stages=STAGES):
        q = start + tl.arange(0, DEPTH)
        inside_q = q < rows
        wanted_q = inside_q
        if MASKED:
            there_q = tl.load(valid + q, mask=inside_q, other=0)
            if LEFT_OUT:
                wanted_q = there_q
        if x_0 is not None:
            g = load_block(matrix_blocks, sample, first_r, start, BLOCK_R, DEPTH, False)
            x_q = load_block(x_blocks, b, start, first_k, DEPTH, BLOCK_K, ROWS_LAST)
        else:
            g = tl.load(
                matrix_rows + q[None, :],
                mask=inside_r[:, None] & inside_q[None, :],
                other=0.0,
            )
            if SPREAD:
                x_q = load_spread(
                    x_columns, inside_k, valid if MASKED else None, start, rows, layout,
                    FORM, N_SIDE, DEPTH,
                )  # fmt: skip
            else:
                x_q = tl.load(
                    x_columns + row_offsets(q, layout, FORM, N_SIDE)[:, None],
                    mask=wanted_q[:, None] & inside_k[None, :],
                    other=0.0,
                )
        if TOUCH and not SPREAD:
            x_q = touched(x_q)
        if MASKED and not LEFT_OUT and not SPREAD:
            x_q = zero_unless(there_q[:, None], x_q)
        acc = matmul(g, x_q, acc, PRECISION)
        if not N_SIDE:
            u = task_vectors(anchors, anchor_stride, q, rows, tasks, COLUMNS, PARTS)
            u = split_columns(u, x_q.dtype) if PARTS == 2 else u
            w = matmul(tl.trans(x_q), u, w, PRECISION)

    if N_SIDE:
        left = task_vectors(
            projection + sample * tasks * rows, rows, r, rows, tasks, COLUMNS, PARTS
        )
        at = first_k + spread(BLOCK_K) if SPREAD else k
        right = task_vectors(anchors, anchor_stride, at, depth, tasks, COLUMNS, PARTS)
    else:
        left = task_vectors(anchors, anchor_stride, r, rows, tasks, COLUMNS, PARTS)
        right = (repeat_columns(join_columns(w)) if PARTS == 2 else w) * factor
    anchor_weight = anchor_weight_of(sample, tl.load(grad_csa) * csa_factor, weight, inverse)
    # Scaled in an order in which 2^100 does not overflow.
    grad = acc * factor * (anchor_weight * tl.load(slope + sample) * unit)
    grad = _add_outer(left * anchor_weight, right, grad, PARTS, PRECISION)
    if SPREAD:
        grad = gathered(grad)
    of_channel = anchor_grad + sample * channels
    if N_SIDE:
        grad = grad * factor + tl.load(of_channel + k, mask=inside_k, other=0.0)[None, :]
    else:
        grad = grad * factor + tl.load(of_channel + r, mask=inside_r, other=0.0)[:, None]
    if position_grad is not None:
        of_position = position_grad + sample * positions
        of_tsr = tl.load(grad_tsr) * tsr_factor
        if N_SIDE:
            grad += of_tsr * tl.load(of_position + r, mask=inside_r, other=0.0)[:, None]
        else:
            grad += of_tsr * tl.load(of_position + k, mask=inside_k, other=0.0)[None, :]
    if valid is not None:
        if N_SIDE:
            there = tl.load(valid + r, mask=inside_r, other=0)[:, None]
        else:
            there = tl.load(valid + k, mask=inside_k, other=0)[None, :]
        grad = zero_unless(there, grad)
    to = pick(outputs, tl.program_id(1)) + b * stride_of(target_layout, TARGET_FORM, 0)
    to += row_offsets(r, target_layout, TARGET_FORM, N_SIDE)[:, None]
    to += row_offsets(k, target_layout, TARGET_FORM, not N_SIDE)[None, :]
    tl.store(to, grad.to(to.dtype.element_ty), mask=inside_r[:, None] & inside_k[None, :])
