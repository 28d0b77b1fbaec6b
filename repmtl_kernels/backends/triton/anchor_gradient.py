"""The gradient of the anchors, which every position of a saliency has a share of."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels.backends.contract import CSAGradient
from repmtl_kernels.backends.triton.common import (
    cdiv,
    count_valid,
    launch,
    next_power_of_2,
    pick,
    stride_of,
    task_groups,
    zero_unless,
)
from repmtl_kernels.backends.triton.operand import (
    Operand,
    join_columns,
    matmul,
    row_offsets,
    split_columns,
    task_columns,
    task_vectors,
    touched,
)


def anchor_gradient(
    saliencies: list[Tensor], csa: CSAGradient, operand: Operand, mask: Tensor | None
) -> Tensor:
    """Return ``da / N`` (T, B, C); with a mask, the sample's number of positions replaces ``N``."""
    tasks, batch, channels = csa.anchors.unit.shape
    anchor_grad = csa.anchors.unit.new_empty(tasks, batch, channels)
    terms = (
        mask,
        *csa.of_loss,
        csa.weight,
        csa.gram.inverse,
        csa.gram.similarity,
        csa.contrast_grad,
        csa.anchors.radial,
        csa.anchors.factor,
        csa.gram.projection,
        anchor_grad,
        tasks,
        batch,
    )
    if operand.n_side:
        _launch_pull(saliencies, csa.scale, operand, terms, anchor_grad)
        return anchor_grad
    block = min(1024, next_power_of_2(channels))
    launch(
        _gradient_anchor_kernel,
        (cdiv(channels, block) * batch, tasks),
        anchor_grad.device,
        *terms,
        channels,
        operand.depth,
        TASK_BLOCK=next_power_of_2(tasks),
        BLOCK=block,
        num_warps=4,
    )
    return anchor_grad


def _launch_pull(
    saliencies: list[Tensor], scale: Tensor, operand: Operand, terms: tuple, anchor_grad: Tensor
) -> None:
    """Launch the kernel of the N side, for one group of tasks after the other."""
    tasks, batch, channels = anchor_grad.shape
    parts = 2 if operand.is_split else 1
    tile = operand.tile("pull", anchor_grad.device)
    tile = tile.within(channels, tile.columns, depth=operand.rows)
    groups = list(task_groups(saliencies))
    for group in groups:
        form = group.geometry.form
        launch(
            _gradient_pull_kernel,
            (cdiv(channels, tile.rows) * batch,),
            anchor_grad.device,
            group.tensors,
            group.tasks,
            group.geometry.layout,
            scale,
            *terms,
            *operand.sizes,
            FIRST=group is groups[0],
            LAST=group is groups[-1],
            FORM=form,
            PARTS=parts,
            COLUMNS=task_columns(tasks, parts),
            PRECISION=operand.precision,
            TOUCH=operand.passes_registers(form, along_rows=True),
            BLOCK=tile.rows,
            DEPTH=tile.depth,
            STAGES=tile.stages,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )


@triton.jit
def anchor_weight_of(sample, of_loss, weight, inverse):
    """Return the anchor's weight (:class:`Coefficients`) of a sample and task."""
    return 2 * of_loss * tl.load(weight + sample) * tl.load(inverse + sample)


@triton.jit
def _anchor_gradient(
    positive,  # sum_t anchor_weight_t S^_t S^_t^T u of anchors u
    at,  # (T, B, C) offset of its elements
    there,
    b,
    of_loss,
    weight,
    similarity,
    contrast_grad,
    radial,
    factor,
    tasks,
    batch,
    count,  # of positions
    TASK_BLOCK: tl.constexpr,
):
    """Return elements of ``da / N``."""
    t = tl.arange(0, TASK_BLOCK)
    pair = t.to(tl.int64) * batch + b
    s = tl.load(similarity + pair, mask=t < tasks, other=0.0)
    ds = 2 * of_loss * tl.load(weight + pair, mask=t < tasks, other=0.0)
    removed = tl.sum(ds * s) * tl.load(radial + at, mask=there, other=0.0)
    negative = of_loss * tl.load(contrast_grad + at, mask=there, other=0.0)
    return (negative + tl.load(factor + b) * (positive - removed)) / count


@triton.jit
def _gradient_pull_kernel(
    saliencies,  # of a group of tasks: (B, C, N) each
    group,  # numbers of the tasks
    layout,
    scale,  # (T, B)
    valid,  # (B, N) bool: which positions are there; or None, all are
    grad,  # (): with `grad_factor`, dL / d csa
    grad_factor,
    weight,  # (T, B)
    inverse,  # (T, B)
    similarity,  # (T, B)
    contrast_grad,  # (T, B, C)
    radial,  # (T, B, C)
    factor,  # (B,)
    projection,  # (T, B, T, N): S^^T u
    anchor_grad,  # (T, B, C); until the last group, the sum over the tasks so far
    tasks,
    batch,
    N_DIV,
    C_DIV,
    N_ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    FORM: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOUCH: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (sample and in it the tile of channels,); all tasks one after the other (N side)."""
    positions, channels = N_DIV * N_ALIGN, C_DIV * C_ALIGN
    tl.assume(positions > 0)  # as in the Gram kernel
    tiles = tl.cdiv(channels, BLOCK)
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    c = tile * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    of_rows = row_offsets(c, layout, FORM, False)[:, None]
    count = positions
    if valid is not None:
        valid += b * positions
        if LAST:
            count = count_valid(valid, positions)
    of_loss = tl.load(grad) * grad_factor
    u = tl.arange(0, COLUMNS // PARTS)[None, :]
    at = (u.to(tl.int64) * batch + b) * channels + c[:, None]
    there = inside[:, None] & (u < tasks)
    if FIRST:
        positive = tl.zeros((BLOCK, COLUMNS // PARTS), tl.float32)
    else:
        positive = tl.load(anchor_grad + at, mask=there, other=0.0)
    for i in range(len(saliencies)):
        sample = pick(group, i) * batch + b
        rows = pick(saliencies, i) + b * stride_of(layout, FORM, 0) + of_rows
        vectors = projection + sample * tasks * positions
        acc = tl.zeros((BLOCK, COLUMNS), tl.float32)
        for start in tl.range(0, positions, DEPTH, num_stages=STAGES):
            n = start + tl.arange(0, DEPTH)
            s = tl.load(
                rows + row_offsets(n, layout, FORM, True)[None, :],
                mask=inside[:, None] & (n < positions)[None, :],
                other=0.0,
            )
            if TOUCH:
                s = touched(s)
            if valid is not None:
                is_there = tl.load(valid + n, mask=n < positions, other=0)
                s = zero_unless(is_there[None, :], s)
            v = task_vectors(vectors, positions, n, positions, tasks, COLUMNS, PARTS)
            acc = matmul(s, split_columns(v, s.dtype) if PARTS == 2 else v, acc, PRECISION)
        # Products with V, which is of order 1, leave room to scale them afterwards.
        y = (join_columns(acc) if PARTS == 2 else acc) * tl.load(scale + sample)
        positive += anchor_weight_of(sample, of_loss, weight, inverse) * y
    if LAST:
        positive = _anchor_gradient(
            positive, at, there, b, of_loss, weight, similarity, contrast_grad, radial, factor,
            tasks, batch, count, COLUMNS // PARTS,
        )  # fmt: skip
    tl.store(anchor_grad + at, positive, mask=there)


@triton.jit
def _gradient_anchor_kernel(
    valid,  # (B, N) bool; or None
    grad,  # (): with `grad_factor`, dL / d csa
    grad_factor,
    weight,  # (T, B)
    inverse,  # (T, B)
    similarity,  # (T, B)
    contrast_grad,  # (T, B, C)
    radial,  # (T, B, C)
    factor,  # (B,)
    projection,  # (T, B, T, C): S^ S^^T u
    anchor_grad,  # (T, B, C)
    tasks,
    batch,
    channels,
    positions,
    TASK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (sample and in it the tile of channels, task) (C side)."""
    tiles = tl.cdiv(channels, BLOCK)
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    u = tl.program_id(1)
    c = tile * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    of_loss = tl.load(grad) * grad_factor
    positive = tl.zeros((BLOCK,), tl.float32)
    for t in range(tasks):
        sample = t * batch + b
        y = tl.load(projection + (sample * tasks + u) * channels + c, mask=inside, other=0.0)
        positive += anchor_weight_of(sample, of_loss, weight, inverse) * y
    count = positions
    if valid is not None:
        count = count_valid(valid + b * positions, positions)
    at = (u * batch + b) * channels + c
    da = _anchor_gradient(
        positive, at, inside, b, of_loss, weight, similarity, contrast_grad, radial, factor,
        tasks, batch, count, TASK_BLOCK,
    )  # fmt: skip
    tl.store(anchor_grad + at, da, mask=inside)
