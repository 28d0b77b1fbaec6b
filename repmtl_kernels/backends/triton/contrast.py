"""Unit anchors and the negatives' half of CSA with its gradient (equations 8 and 9)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels.backends import Contrast
from repmtl_kernels.backends.triton._common import INTERPRET, alignment, fp32_precision, launch
from repmtl_kernels.backends.triton.statistics import power_of_two

# Tiles of products that fill a large GPU: two for each multiprocessor.
TILES = 264
# Sides of a tile (anchors of all tasks of some samples). Large tiles reuse more; small ones are for
# batches that would not fill the GPU otherwise.
SIDES = (64, 32, 16)
# Channels of one step, and warps, by the side: what three products of tf32 parts leave registers
# for. Half the channels where C is odd, since each element then has an address of its own.
STEPS = {16: (64, 4), 32: (32, 4), 64: (16, 8), 128: (16, 8)}
# Anchors of one step of the gradient kernel, where one sample has no more, and their elements.
GRADIENT_SIDE, GRADIENT_ELEMENTS = 32, 2048
# Elements of the block of products kept for the gradient, unless the anchors have more.
BUFFER = 1 << 24


@triton.jit
def _contrast_anchor_kernel(
    a,  # (T, B, C)
    anchors,  # (T, B, C): unit anchors
    pull,  # (T, B, C) or None
    factor,  # (B,)
    batch,
    channels_div,
    eps,
    CHANNELS_ALIGN: tl.constexpr,
    TASKS: tl.constexpr,
    TASK_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: samples. Each pass reads the anchors of the sample again: they are in the cache."""
    channels = channels_div * CHANNELS_ALIGN
    b = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, TASK_BLOCK)[:, None]
    lane = tl.arange(0, WIDE)[None, :]
    offset = (t * batch + b) * channels + lane
    largest = tl.zeros((TASK_BLOCK, WIDE), tl.float32)
    for c in range(0, channels, WIDE):
        mask = (t < TASKS) & (c + lane < channels)
        largest = tl.maximum(largest, tl.abs(tl.load(a + offset + c, mask=mask, other=0.0)))
    scale = power_of_two(tl.max(largest))
    products = tl.zeros((TASK_BLOCK, TASK_BLOCK), tl.float32)
    for c in range(0, channels, WIDE):
        mask = (t < TASKS) & (c + lane < channels)
        x = tl.load(a + offset + c, mask=mask, other=0.0) * scale
        products = tl.dot(x, tl.trans(x), products, input_precision=PRECISION)
    norm = tl.sqrt_rn(tl.sum(products * products))
    floor = eps * scale * scale
    clamped = tl.where(norm < floor, floor, norm)  # unlike a maximum, keeps NaN
    inverse = tl.where(clamped != 0, 1 / clamped, 0.0)
    root = tl.sqrt_rn(inverse)
    tl.store(factor + b, scale * root)
    if pull is not None:
        products *= tl.where(norm < floor, 0.0, inverse)
    for c in range(0, channels, WIDE):
        mask = (t < TASKS) & (c + lane < channels)
        u = tl.load(a + offset + c, mask=mask, other=0.0) * scale * root
        tl.store(anchors + offset + c, u, mask=mask)
        if pull is not None:
            pulled = tl.dot(products, u, input_precision=PRECISION)
            tl.store(pull + offset + c, pulled, mask=mask)


@triton.jit
def _anchor_rows(tile, batch, SIDE: tl.constexpr, TASKS: tl.constexpr, TASK_BLOCK: tl.constexpr):
    """Rows (int64) of the ``(T B, C)`` anchors that make up a tile, and which of them exist."""
    i = tl.arange(0, SIDE)
    task, sample = i % TASK_BLOCK, tile * (SIDE // TASK_BLOCK) + i // TASK_BLOCK
    return task.to(tl.int64) * batch + sample, (task < TASKS) & (sample < batch)


@triton.jit
def _contrast_products_kernel(
    anchors,  # (T, B, C)
    dots,  # (tiles of this launch * SIDE, all tiles * SIDE) or None: products, 0 where padded
    similarity,  # (tiles of this launch * samples, all tiles * samples): r, 0 where padded
    first_tile,
    tiles,
    batch,
    channels_div,
    CHANNELS_ALIGN: tl.constexpr,
    TASKS: tl.constexpr,
    TASK_BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (tile of samples b, tile of samples k), the last running fastest."""
    channels = channels_div * CHANNELS_ALIGN
    local, k_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    lane = tl.arange(0, WIDE)[None, :]
    b_row, b_exists = _anchor_rows(first_tile + local, batch, SIDE, TASKS, TASK_BLOCK)
    k_row, k_exists = _anchor_rows(k_tile, batch, SIDE, TASKS, TASK_BLOCK)
    x_row, y_row = anchors + b_row[:, None] * channels, anchors + k_row[:, None] * channels
    acc = tl.zeros((SIDE, SIDE), tl.float32)
    for c in range(0, channels, WIDE):
        in_range = c + lane < channels
        x = tl.load(x_row + c + lane, mask=b_exists[:, None] & in_range, other=0.0)
        y = tl.load(y_row + c + lane, mask=k_exists[:, None] & in_range, other=0.0)
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
    if dots is not None:
        tl.store(_tile_of(dots, local, k_tile, tiles * SIDE, SIDE, SIDE), acc)
    samples: tl.constexpr = SIDE // TASK_BLOCK
    squares = tl.reshape(acc * acc, (samples, TASK_BLOCK, samples, TASK_BLOCK))
    r = tl.sum(tl.sum(squares, 3), 1)
    tl.store(_tile_of(similarity, local, k_tile, tiles * samples, samples, samples), r)


@triton.jit
def _tile_of(matrix, row, column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to one of the tiles that make up a matrix of ``columns`` columns."""
    i = row.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = column * COLUMNS + tl.arange(0, COLUMNS)
    return matrix + i[:, None] * columns + j[None, :]


@triton.jit
def _contrast_logsumexp_kernel(
    similarity,  # (samples of this launch, columns): r
    logsumexp,  # (B,)
    first,
    columns,
    batch,
    temperature,
    WIDE: tl.constexpr,
):
    """Grid: samples."""
    b = first + tl.program_id(0)
    row = similarity + tl.program_id(0).to(tl.int64) * columns
    lane = tl.arange(0, WIDE)
    # Online, per lane: the sum so far is relative to the largest value so far. Similarities are not
    # negative, so 0 is a lower bound of their maximum, and finite.
    largest = tl.zeros((WIDE,), tl.float32)
    sums = tl.zeros((WIDE,), tl.float32)
    for k in range(0, batch, WIDE):
        negative = (k + lane < batch) & (k + lane != b)
        z = tl.load(row + k + lane, mask=negative, other=0.0) / temperature
        raised = tl.maximum(largest, z)
        sums = sums * tl.exp(largest - raised) + tl.where(negative, tl.exp(z - raised), 0.0)
        largest = raised
    center = tl.max(largest, 0)
    sums *= tl.exp(largest - center)
    tl.store(logsumexp + b, center + tl.log(tl.sum(sums, 0)))


@triton.jit
def _contrast_gradient_kernel(
    dots,  # (tiles of this launch * SIDE, all tiles * SIDE)
    similarity,  # (tiles of this launch * samples, all tiles * samples): r
    anchors,  # (T, B, C)
    pull,  # (T, B, C)
    factor,  # (B,)
    logsumexp,  # (B,)
    grad,  # (T, B, C)
    first_tile,
    tiles,
    blocks,
    batch,
    channels_div,
    temperature,
    coefficient,  # 2 / (temperature B)
    CHANNELS_ALIGN: tl.constexpr,
    TASKS: tl.constexpr,
    TASK_BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
    K_SIDE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (tile of samples b, block of channels), the last running fastest."""
    channels = channels_div * CHANNELS_ALIGN
    local, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    tile = first_tile + local
    samples: tl.constexpr = SIDE // TASK_BLOCK
    b = tile * samples + tl.arange(0, samples)
    b_lse = tl.load(logsumexp + b, mask=b < batch, other=0.0)
    c = block * WIDE + tl.arange(0, WIDE)[None, :]
    du = tl.zeros((SIDE, WIDE), tl.float32)
    tug = tl.zeros((samples,), tl.float32)  # sum_t du_t . u_t, from r alone
    k_samples: tl.constexpr = K_SIDE // TASK_BLOCK
    for k_tile in range(tiles * (SIDE // K_SIDE)):
        k = k_tile * k_samples + tl.arange(0, k_samples)
        k_lse = tl.load(logsumexp + k, mask=k < batch, other=0.0)
        r = tl.load(_tile_of(similarity, local, k_tile, tiles * samples, samples, k_samples))
        # r_bk is a negative of sample b and of sample k.
        z = r / temperature
        weight = tl.exp(z - b_lse[:, None]) + tl.exp(z - k_lse[None, :])
        weight = tl.where((b[:, None] != k[None, :]) & (k < batch)[None, :], weight, 0.0)
        tug += tl.sum(weight * r, 1)
        shape: tl.constexpr = (samples, TASK_BLOCK, k_samples, TASK_BLOCK)
        weight = tl.reshape(tl.broadcast_to(weight[:, None, :, None], shape), (SIDE, K_SIDE))
        weight *= tl.load(_tile_of(dots, local, k_tile, tiles * SIDE, SIDE, K_SIDE))
        k_row, k_exists = _anchor_rows(k_tile, batch, K_SIDE, TASKS, TASK_BLOCK)
        mask = k_exists[:, None] & (c < channels)
        u = tl.load(anchors + k_row[:, None] * channels + c, mask=mask, other=0.0)
        du = tl.dot(weight, u, du, input_precision=PRECISION)
    row, exists = _anchor_rows(tile, batch, SIDE, TASKS, TASK_BLOCK)
    offset = row[:, None] * channels + c
    mask = exists[:, None] & (c < channels)
    pulled = tl.load(pull + offset, mask=mask, other=0.0)
    tug = tl.reshape(tl.broadcast_to(tug[:, None], (samples, TASK_BLOCK)), (SIDE,))
    scale = coefficient * tl.load(factor + row % batch, mask=exists, other=0.0)
    tl.store(grad + offset, scale[:, None] * (du - tug[:, None] * pulled), mask=mask)


class _Plan(NamedTuple):
    """How the samples are cut into square tiles of products."""

    task_block: int  # T rounded up to a power of two
    side: int  # anchors of a tile, those of all tasks of `samples` samples
    samples: int
    tiles: int
    at_once: int  # tiles of samples b whose products are in memory at a time


def _plan(tasks: int, batch: int, channels: int) -> _Plan:
    task_block = triton.next_power_of_2(tasks)
    for side in SIDES:
        side = max(side, task_block)
        samples = side // task_block
        tiles = triton.cdiv(batch, samples)
        if tiles * tiles >= TILES:
            break
    room = max(BUFFER, tasks * batch * channels)
    at_once = min(tiles, max(1, room // (side * side * tiles)))
    return _Plan(task_block, side, samples, tiles, at_once)


def _step(side: int, align: int) -> dict[str, int]:
    wide, warps = STEPS[min(side, max(STEPS))]
    return {"WIDE": wide if align >= 4 else max(16, wide // 2), "num_warps": warps}


def contrast(a: Tensor, *, temperature: float, eps: float, with_grad: bool) -> Contrast:
    tasks, batch, channels = a.shape
    a = a.contiguous()
    temperature = float(temperature)
    precision = "ieee" if INTERPRET or fp32_precision() == "ieee" else "tf32x3"
    align = alignment(channels)
    sizes = batch, channels // align
    constants = {"CHANNELS_ALIGN": align, "TASKS": tasks, "PRECISION": precision}
    plan = _plan(tasks, batch, channels)
    tiling = {"TASK_BLOCK": plan.task_block, "SIDE": plan.side, **constants}
    step = _step(plan.side, align)

    anchors, factor, logsumexp = torch.empty_like(a), a.new_empty(batch), a.new_empty(batch)
    pull = torch.empty_like(a) if with_grad else None
    anchor_block = max(16, plan.task_block)  # the least that a matrix product takes
    launch(
        _contrast_anchor_kernel,
        (batch,),
        a.device,
        a,
        anchors,
        pull,
        factor,
        *sizes,
        float(eps),
        TASK_BLOCK=anchor_block,
        **_step(anchor_block, align),
        **constants,
    )

    dots = None
    if with_grad:
        dots = a.new_empty(plan.at_once * plan.side, plan.tiles * plan.side)
    similarity = a.new_empty(plan.at_once * plan.samples, plan.tiles * plan.samples)

    def write_products(first: int, count: int, dots: Tensor | None) -> None:
        launch(
            _contrast_products_kernel,
            (count * plan.tiles,),
            a.device,
            anchors,
            dots,
            similarity,
            first,
            plan.tiles,
            *sizes,
            **step,
            **tiling,
        )

    whole = plan.at_once == plan.tiles
    starts = range(0, plan.tiles, plan.at_once)
    for first in starts:
        count = min(plan.at_once, plan.tiles - first)
        write_products(first, count, dots if whole else None)
        launch(
            _contrast_logsumexp_kernel,
            (min(count * plan.samples, batch - first * plan.samples),),
            a.device,
            similarity,
            logsumexp,
            first * plan.samples,
            similarity.shape[1],
            batch,
            temperature,
            WIDE=min(1024, triton.next_power_of_2(batch)),
        )
    if not with_grad:
        return Contrast(anchors, factor, logsumexp, None, None)

    grad = torch.empty_like(a)
    k_side = max(plan.task_block, min(plan.side, GRADIENT_SIDE))
    gradient_wide = GRADIENT_ELEMENTS // max(k_side, GRADIENT_SIDE)
    blocks = triton.cdiv(channels, gradient_wide)
    for first in starts:
        count = min(plan.at_once, plan.tiles - first)
        if not whole:  # the weights of the gradient need every sample's logsumexp first
            write_products(first, count, dots)
        launch(
            _contrast_gradient_kernel,
            (count * blocks,),
            a.device,
            dots,
            similarity,
            anchors,
            pull,
            factor,
            logsumexp,
            grad,
            first,
            plan.tiles,
            blocks,
            *sizes,
            temperature,
            2 / (temperature * batch),
            K_SIDE=k_side,
            WIDE=gradient_wide,
            num_warps=step["num_warps"],
            **tiling,
        )
    return Contrast(anchors, factor, logsumexp, pull, grad)
