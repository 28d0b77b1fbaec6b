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

# Programs of the products kernel: two for each multiprocessor of a large GPU.
PROGRAMS = 264
# Sides of a tile of products (anchors of all tasks of some samples). Large tiles reuse more; small
# ones are for batches that would not fill the GPU otherwise.
SIDES = (64, 32, 16)
# Channels of one step, and warps, by the side: three float32 products of tf32 parts must fit into
# registers, with one address for each element where C is odd.
STEPS = {16: (64, 4), 32: (32, 4), 64: (32, 8), 128: (16, 8)}
# Channels of one program of the gradient kernel.
GRADIENT_WIDE = 64
# Elements of the block of products kept for the gradient, unless the anchors have more.
BUFFER = 1 << 24


@triton.jit
def _anchor_kernel(
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
def _similarity(dots, batch, b, k, SIDE: tl.constexpr, TASK_BLOCK: tl.constexpr):
    """``r_bk`` of a tile of products, and whether sample k is a negative of sample b."""
    samples: tl.constexpr = SIDE // TASK_BLOCK
    squares = tl.reshape(dots * dots, (samples, TASK_BLOCK, samples, TASK_BLOCK))
    r = tl.sum(tl.sum(squares, 3), 1)
    return r, (b[:, None] != k[None, :]) & (k < batch)[None, :]


@triton.jit
def _products_kernel(
    anchors,  # (T, B, C)
    dots,  # (tiles of this launch * SIDE, all tiles * SIDE) or None: products, 0 where padded
    maxima,  # (splits, B) or None
    sums,  # (splits, B): sums of exp(r / temperature - maximum); or None
    first_tile,
    tiles,
    splits,
    tiles_per_split,
    batch,
    channels_div,
    temperature,
    CHANNELS_ALIGN: tl.constexpr,
    TASKS: tl.constexpr,
    TASK_BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (tile of samples b, split of the tiles of samples k), the last running fastest."""
    channels = channels_div * CHANNELS_ALIGN
    local, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    tile = first_tile + local
    samples: tl.constexpr = SIDE // TASK_BLOCK
    b = tile * samples + tl.arange(0, samples)
    lane = tl.arange(0, WIDE)[None, :]
    b_row, b_exists = _anchor_rows(tile, batch, SIDE, TASKS, TASK_BLOCK)
    # Similarities are not negative: 0 is a lower bound of their maximum, and finite.
    largest = tl.zeros((samples,), tl.float32)
    total = tl.zeros((samples,), tl.float32)
    start = split * tiles_per_split
    for k_tile in range(start, tl.minimum(start + tiles_per_split, tiles)):
        k_row, k_exists = _anchor_rows(k_tile, batch, SIDE, TASKS, TASK_BLOCK)
        acc = tl.zeros((SIDE, SIDE), tl.float32)
        for c in range(0, channels, WIDE):
            in_range = c + lane < channels
            x = anchors + b_row[:, None] * channels + c + lane
            y = anchors + k_row[:, None] * channels + c + lane
            x = tl.load(x, mask=b_exists[:, None] & in_range, other=0.0)
            y = tl.load(y, mask=k_exists[:, None] & in_range, other=0.0)
            acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
        if dots is not None:
            i = tl.arange(0, SIDE)
            target = dots + (local.to(tl.int64) * SIDE + i)[:, None] * (tiles * SIDE)
            tl.store(target + k_tile * SIDE + i[None, :], acc)
        if sums is not None:
            k = k_tile * samples + tl.arange(0, samples)
            r, negative = _similarity(acc, batch, b, k, SIDE, TASK_BLOCK)
            r = tl.where(negative, r / temperature, float("-inf"))
            previous = largest
            largest = tl.maximum(largest, tl.max(r, 1))
            total = total * tl.exp(previous - largest) + tl.sum(tl.exp(r - largest[:, None]), 1)
    if sums is not None:
        target = split.to(tl.int64) * batch + b
        tl.store(maxima + target, largest, mask=b < batch)
        tl.store(sums + target, total, mask=b < batch)


@triton.jit
def _logsumexp_kernel(
    maxima,  # (splits, B)
    sums,  # (splits, B)
    logsumexp,  # (B,)
    splits,
    batch,
    WIDE: tl.constexpr,
):
    """Grid: blocks of samples. Joins the splits in their order."""
    b = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    largest = tl.zeros((WIDE,), tl.float32)
    total = tl.zeros((WIDE,), tl.float32)
    for split in range(splits):
        offset = tl.cast(split, tl.int64) * batch + b
        m = tl.load(maxima + offset, mask=b < batch, other=0.0)
        s = tl.load(sums + offset, mask=b < batch, other=1.0)
        previous = largest
        largest = tl.maximum(largest, m)
        total = total * tl.exp(previous - largest) + s * tl.exp(m - largest)
    tl.store(logsumexp + b, largest + tl.log(total), mask=b < batch)


@triton.jit
def _gradient_kernel(
    dots,  # (tiles of this launch * SIDE, all tiles * SIDE)
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
    i = tl.arange(0, SIDE)
    source = dots + (local.to(tl.int64) * SIDE + i)[:, None] * (tiles * SIDE) + i[None, :]
    du = tl.zeros((SIDE, WIDE), tl.float32)
    tug = tl.zeros((samples,), tl.float32)  # sum_t du_t . u_t, from r alone
    for k_tile in range(tiles):
        k = k_tile * samples + tl.arange(0, samples)
        k_lse = tl.load(logsumexp + k, mask=k < batch, other=0.0)
        dot = tl.load(source + k_tile * SIDE)
        r, negative = _similarity(dot, batch, b, k, SIDE, TASK_BLOCK)
        # r_bk is a negative of sample b and of sample k.
        z = r / temperature
        weight = tl.exp(z - b_lse[:, None]) + tl.exp(z - k_lse[None, :])
        weight = tl.where(negative, weight, 0.0)
        tug += tl.sum(weight * r, 1)
        shape: tl.constexpr = (samples, TASK_BLOCK, samples, TASK_BLOCK)
        weight = tl.reshape(tl.broadcast_to(weight[:, None, :, None], shape), (SIDE, SIDE))
        k_row, k_exists = _anchor_rows(k_tile, batch, SIDE, TASKS, TASK_BLOCK)
        mask = k_exists[:, None] & (c < channels)
        u = tl.load(anchors + k_row[:, None] * channels + c, mask=mask, other=0.0)
        du = tl.dot(weight * dot, u, du, input_precision=PRECISION)
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
    side: int  # anchors of a tile, those of all tasks of side // task_block samples
    tiles: int
    splits: int
    tiles_per_split: int


def _plan(tasks: int, batch: int) -> _Plan:
    task_block = triton.next_power_of_2(tasks)
    for side in SIDES:
        side = max(side, task_block)
        tiles = triton.cdiv(batch, side // task_block)
        if tiles * tiles >= PROGRAMS:
            break
    per_split = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, tiles)))
    return _Plan(task_block, side, tiles, triton.cdiv(tiles, per_split), per_split)


def contrast(a: Tensor, *, temperature: float, eps: float, with_grad: bool) -> Contrast:
    tasks, batch, channels = a.shape
    a = a.contiguous()
    temperature = float(temperature)
    precision = "ieee" if INTERPRET or fp32_precision() == "ieee" else "tf32x3"
    align = alignment(channels)
    sizes = batch, channels // align
    constants = {
        "CHANNELS_ALIGN": align,
        "TASKS": tasks,
        "PRECISION": precision,
    }
    plan = _plan(tasks, batch)
    wide, warps = STEPS[min(plan.side, max(STEPS))]
    tiling = {
        "TASK_BLOCK": plan.task_block,
        "SIDE": plan.side,
        "num_warps": warps,
        **constants,
    }

    anchors, factor, lse = torch.empty_like(a), a.new_empty(batch), a.new_empty(batch)
    pull = torch.empty_like(a) if with_grad else None
    anchor_block = max(16, plan.task_block)  # the least that a matrix product takes
    anchor_wide, anchor_warps = STEPS[min(anchor_block, max(STEPS))]
    launch(
        _anchor_kernel,
        (batch,),
        a.device,
        a,
        anchors,
        pull,
        factor,
        *sizes,
        float(eps),
        TASK_BLOCK=anchor_block,
        WIDE=anchor_wide,
        num_warps=anchor_warps,
        **constants,
    )

    def products(first: int, count: int, dots: Tensor | None, parts: Tensor | None) -> None:
        maxima, sums = (None, None) if parts is None else parts
        launch(
            _products_kernel,
            (count * plan.splits,),
            a.device,
            anchors,
            dots,
            maxima,
            sums,
            first,
            plan.tiles,
            plan.splits,
            plan.tiles_per_split,
            *sizes,
            temperature,
            WIDE=wide,
            **tiling,
        )

    width = plan.tiles * plan.side
    at_once = min(plan.tiles, max(1, max(BUFFER, a.numel()) // (plan.side * width)))
    dots = a.new_empty(at_once * plan.side, width) if with_grad else None
    whole = with_grad and at_once == plan.tiles
    parts = a.new_empty(2, plan.splits, batch)
    products(0, plan.tiles, dots if whole else None, parts)
    grid = (triton.cdiv(batch, 128),)
    launch(
        _logsumexp_kernel,
        grid,
        a.device,
        *parts,
        lse,
        plan.splits,
        batch,
        WIDE=128,
    )
    if not with_grad:
        return Contrast(anchors, factor, lse, None, None)

    grad = torch.empty_like(a)
    blocks = triton.cdiv(channels, GRADIENT_WIDE)
    for first in range(0, plan.tiles, at_once):
        count = min(at_once, plan.tiles - first)
        if not whole:
            products(first, count, dots, None)
        launch(
            _gradient_kernel,
            (count * blocks,),
            a.device,
            dots,
            anchors,
            pull,
            factor,
            lse,
            grad,
            first,
            plan.tiles,
            blocks,
            *sizes,
            temperature,
            2 / (temperature * batch),
            WIDE=GRADIENT_WIDE,
            **tiling,
        )
    return Contrast(anchors, factor, lse, pull, grad)
