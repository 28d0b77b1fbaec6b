"""Similarity of each task's affinity with its anchor (equation 7), from half a Gram matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels._ground.saliency import in_factors
from repmtl_kernels.backends.contract import Gram
from repmtl_kernels.backends.triton import tma
from repmtl_kernels.backends.triton.common import cdiv, launch, task_groups
from repmtl_kernels.backends.triton.gram_kernel import _gram_join_kernel, _gram_kernel
from repmtl_kernels.backends.triton.operand import Operand, reads_shared_memory, task_columns
from repmtl_kernels.backends.triton.tiles import Tile

FINISH_BLOCK = 256
# On the C side, each tile of a long sum is cut into parts of at least so many terms, up to so many
# programs: two for each multiprocessor of a large GPU. A sum is long from so many terms for each
# row on: each part of the Gram matrix is then at most a sixteenth of the bytes of X.
PROGRAMS = 264
LEAST_TERMS = 1024
LONG, LONG_FOR_ROW = 4096, 32
# Parts that are loaded at a time, and their elements: more would not fit into registers.
JOIN_PARTS, JOIN_ELEMENTS = 8, 16384


def gram(
    saliencies: list[Tensor],
    scale: Tensor,
    anchors: Tensor,
    *,
    eps: float,
    with_grad: bool,
    mask: Tensor | None = None,
) -> Gram:
    """Return the similarities, and with a gradient the projections and Gram matrices."""
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
    columns = task_columns(tasks, 2 if operand.is_split else 1)
    sums, parts, part_depth = None, 1, 0
    if _is_long(operand):
        part_depth = _part_depth(operand, tile, pairs * batch * tasks)
        parts = cdiv(operand.depth, part_depth)
        sums = anchors.new_empty(tasks, batch, pairs, parts, tile.rows, tile.rows)
    for group in task_groups(saliencies, tma.most_tasks(tile)):
        form = group.geometry.form
        touch = operand.passes_registers(form, along_rows=False)
        x = None if touch else tma.matrices(group.tensors, operand, tile)
        launch(
            _gram_kernel,
            # The pairs of tiles of a sample are neighbours: they share it in the L2 cache.
            (parts * pairs * batch, len(group.tasks)),
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
            sums,
            operand.storage_factor,
            tasks,
            batch,
            tiles,
            strips,
            parts,
            part_depth,
            *operand.sizes,
            FORM=form,
            N_SIDE=operand.n_side,
            SPLIT=operand.is_split,
            COLUMNS=columns,
            SCALING=_scaling(operand),
            PRECISION=operand.precision,
            TOUCH=touch,
            SPREAD=touch and reads_shared_memory(anchors.device),
            BLOCK=tile.rows,
            RATIO=ratio,
            ROWS_LAST=x is not None and tma.rows_last(x[0]),
            DEPTH=tile.depth,
            STAGES=tile.stages,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
    if sums is not None:
        launch(
            _gram_join_kernel,
            (pairs * batch, tasks),
            anchors.device,
            sums,
            anchors,
            squares,
            positives,
            projection,
            matrix,
            operand.storage_factor,
            tasks,
            batch,
            tiles,
            parts,
            operand.rows,
            SPLIT=operand.is_split,
            COLUMNS=columns,
            PRECISION=operand.precision,
            BLOCK=tile.rows,
            AT_ONCE=max(1, min(JOIN_PARTS, JOIN_ELEMENTS // tile.rows**2)),
            num_warps=8,
            maxnreg=255,
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
    if projection is not None and not operand.n_side:
        projection = projection.sum(2)  # over the tiles
    return Gram(similarity, inverse, slope, projection, matrix)


def _is_long(operand: Operand) -> bool:
    """Return whether the sums of a tile come in parts. The batch has no say: it may change."""
    return not operand.n_side and operand.depth >= max(LONG, LONG_FOR_ROW * operand.rows)


def _part_depth(operand: Operand, tile: Tile, tiles: int) -> int:
    """Return the terms of a part, a multiple of the tile's depth."""
    most = min(PROGRAMS // tiles, operand.depth // LEAST_TERMS)
    return cdiv(operand.depth, max(1, most) * tile.depth) * tile.depth


def _scaling(operand: Operand) -> str:
    """Return when saliencies are scaled before they are multiplied: always, never, or if needed."""
    if operand.precision == "ieee":  # operands come through registers anyway
        return "always"
    return "never" if operand.dtype == torch.float16 else "needed"


@triton.jit
def _sum(parts, count, BLOCK: tl.constexpr):
    """Return the sum of ``count`` numbers, in a fixed order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        part = start + tl.arange(0, BLOCK)
        total += tl.load(parts + part, mask=part < count, other=0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize_on_alignment=["square_parts", "positive_parts"])
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
