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
    products = csa.gram.projection
    if operand.n_side:
        products = _affinity_products(saliencies, csa, operand, mask)
    anchor_grad = csa.anchors.unit.new_empty(tasks, batch, channels)
    block = min(1024, next_power_of_2(channels))
    launch(
        _gradient_anchor_kernel,
        (cdiv(channels, block) * batch, tasks),
        anchor_grad.device,
        products,
        mask,
        *csa.of_loss,
        csa.weight,
        csa.gram.inverse,
        csa.gram.similarity,
        csa.contrast_grad,
        csa.anchors.radial,
        csa.anchors.factor,
        anchor_grad,
        tasks,
        batch,
        channels,
        operand.rows if operand.n_side else operand.depth,
        BLOCK=block,
        num_warps=4,
    )
    return anchor_grad


def _affinity_products(
    saliencies: list[Tensor], csa: CSAGradient, operand: Operand, mask: Tensor | None
) -> Tensor:
    """Return ``S^ S^^T u`` (T, B, T, C) from ``V = S^^T u``, the projection of the N side.

    On the C side it is the projection itself.
    """
    anchors = csa.anchors.unit
    tasks, batch, channels = anchors.shape
    products = anchors.new_empty(tasks, batch, tasks, channels)
    parts = 2 if operand.is_split else 1
    tile = operand.tile("pull", anchors.device)
    tile = tile.within(channels, tile.columns, depth=operand.rows)
    for group in task_groups(saliencies):
        form = group.geometry.form
        launch(
            _gradient_pull_kernel,
            (cdiv(channels, tile.rows) * batch, len(group.tasks)),
            anchors.device,
            group.tensors,
            group.tasks,
            group.geometry.layout,
            mask,
            csa.scale,
            csa.gram.projection,
            products,
            tasks,
            batch,
            *operand.sizes,
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
    return products


@triton.jit(do_not_specialize=["tasks", "batch", "N_DIV"])
def _gradient_pull_kernel(
    saliencies,  # of a group of tasks: (B, C, N) each
    group,  # numbers of the tasks
    layout,
    valid,  # (B, N) bool: which positions are there; or None, all are
    scale,  # (T, B)
    projection,  # (T, B, T, N)
    products,  # (T, B, T, C)
    tasks,
    batch,
    N_DIV,
    C_DIV,
    N_ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    FORM: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOUCH: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (sample and in it the tile of channels, task of the group)."""
    positions, channels = N_DIV * N_ALIGN, C_DIV * C_ALIGN
    tl.assume(positions > 0)  # as in the Gram kernel
    tiles = tl.cdiv(channels, BLOCK)
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    sample = pick(group, tl.program_id(1)) * batch + b
    c = tile * BLOCK + tl.arange(0, BLOCK)
    x = pick(saliencies, tl.program_id(1)) + b * stride_of(layout, FORM, 0)
    rows = (x + row_offsets(c, layout, FORM, False))[:, None]
    projection += sample * tasks * positions
    if valid is not None:
        valid += b * positions
    acc = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in tl.range(0, positions, DEPTH, num_stages=STAGES):
        n = start + tl.arange(0, DEPTH)
        s = tl.load(
            rows + row_offsets(n, layout, FORM, True)[None, :],
            mask=(c < channels)[:, None] & (n < positions)[None, :],
            other=0.0,
        )
        if TOUCH:
            s = touched(s)
        if valid is not None:
            there = tl.load(valid + n, mask=n < positions, other=0)
            s = zero_unless(there[None, :], s)
        v = task_vectors(projection, positions, n, positions, tasks, COLUMNS, PARTS)
        acc = matmul(s, split_columns(v, s.dtype) if PARTS == 2 else v, acc, PRECISION)
    # Products with V, which is of order 1, leave room to scale them afterwards.
    y = (join_columns(acc) if PARTS == 2 else acc) * tl.load(scale + sample)
    task = tl.arange(0, COLUMNS // PARTS)[None, :]
    to = products + (sample * tasks + task) * channels + c[:, None]
    tl.store(to, y, mask=(c < channels)[:, None] & (task < tasks))


@triton.jit
def anchor_weight_of(sample, of_loss, weight, inverse):
    """Return the anchor's weight of a task and sample, as in ``contract.Coefficients``."""
    return 2 * of_loss * tl.load(weight + sample) * tl.load(inverse + sample)


@triton.jit(do_not_specialize=["grad", "factor", "tasks", "batch"])
def _gradient_anchor_kernel(
    products,  # (T, B, T, C): S^ S^^T u
    valid,  # (B, N) bool; or None
    grad,  # (): with `grad_factor`, dL / d csa
    grad_factor,
    weight,  # (T, B)
    inverse,  # (T, B)
    similarity,  # (T, B)
    contrast_grad,  # (T, B, C)
    radial,  # (T, B, C)
    factor,  # (B,)
    anchor_grad,  # (T, B, C)
    tasks,
    batch,
    channels,
    positions,
    BLOCK: tl.constexpr,
):
    """Grid: (sample and in it the tile of channels, task)."""
    tiles = tl.cdiv(channels, BLOCK)
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    u = tl.program_id(1)
    c = tile * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    of_loss = tl.load(grad) * grad_factor
    positive = tl.zeros((BLOCK,), tl.float32)
    radial_weight = 0.0
    for t in range(tasks):
        sample = t * batch + b
        y = tl.load(products + (sample * tasks + u) * channels + c, mask=inside, other=0.0)
        positive += anchor_weight_of(sample, of_loss, weight, inverse) * y
        radial_weight += 2 * of_loss * tl.load(weight + sample) * tl.load(similarity + sample)
    at = (u * batch + b) * channels + c
    negative = of_loss * tl.load(contrast_grad + at, mask=inside, other=0.0)
    removed = radial_weight * tl.load(radial + at, mask=inside, other=0.0)
    da = negative + tl.load(factor + b) * (positive - removed)
    count = positions
    if valid is not None:
        count = count_valid(valid + b * positions, positions)
    tl.store(anchor_grad + at, da / count, mask=inside)
