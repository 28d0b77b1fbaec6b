"""The negatives' half of CSA with its gradient (equation 9)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels.backends.contract import AllSamples, Anchors, Contrast
from repmtl_kernels.backends.triton.anchors import product_precision, product_step
from repmtl_kernels.backends.triton.common import alignment, cdiv, launch, next_power_of_2

# Tiles of products that fill a large GPU: two for each multiprocessor.
TILES = 264
# Sides of a tile: anchors of a few samples, of all tasks. Large tiles reuse more; small ones are
# for batches that would not fill the GPU otherwise.
SIDES = (64, 32, 16)
# Anchors of one step of the gradient kernel (more if one sample has more), and their elements.
GRADIENT_SIDE, GRADIENT_ELEMENTS = 32, 2048
# The gradient kernel's registers: in tf32x3 the compiler would spill two for occupancy on sm_90.
GRADIENT_REGISTERS = {"tf32x3": 112}
# Similarities of one step of a log-sum-exp, whatever the batch: four for each thread.
LOGSUMEXP_WIDE = 512
# Elements of the block of products kept for the gradient; more if the anchors have more.
BUFFER = 1 << 24


@triton.jit
def _anchor_rows(
    tile,
    samples,
    task_rows,
    sample_rows,
    SIDE: tl.constexpr,
    TASKS: tl.constexpr,
    TASK_BLOCK: tl.constexpr,
):
    """Return the rows (int64) of C anchor elements that make up a tile, and which of them exist.

    From one task to the next there are ``task_rows`` rows, between samples ``sample_rows``.
    """
    i = tl.arange(0, SIDE)
    task, sample = i % TASK_BLOCK, tile * (SIDE // TASK_BLOCK) + i // TASK_BLOCK
    row = task.to(tl.int64) * task_rows + sample.to(tl.int64) * sample_rows
    return row, (task < TASKS) & (sample < samples)


@triton.jit(do_not_specialize=["first_tile", "tiles", "batch", "total", "task_rows", "sample_rows"])
def _contrast_products_kernel(
    anchors,  # (T, B, C)
    others,  # (T, G, C), of rows of C
    dots,  # (tiles of this launch * SIDE, all tiles * SIDE) or None: products, 0 where padded
    similarity,  # (tiles of this launch * samples, all tiles * samples): r, 0 where padded
    first_tile,
    tiles,
    batch,
    total,
    task_rows,  # of `others`
    sample_rows,
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
    tile = first_tile + local
    b_row, b_exists = _anchor_rows(tile, batch, batch, 1, SIDE, TASKS, TASK_BLOCK)
    k_row, k_exists = _anchor_rows(k_tile, total, task_rows, sample_rows, SIDE, TASKS, TASK_BLOCK)
    x_row, y_row = anchors + b_row[:, None] * channels, others + k_row[:, None] * channels
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
    """Return pointers to one of the tiles that make up a matrix of ``columns`` columns."""
    i = row.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = column * COLUMNS + tl.arange(0, COLUMNS)
    return matrix + i[:, None] * columns + j[None, :]


@triton.jit(do_not_specialize=["first", "own", "rows", "columns", "batch", "total"])
def _contrast_logsumexp_kernel(
    similarity,  # (samples of this launch, columns): r
    logsumexp,  # (B,)
    peaks,  # (2, B + G): of rows, then of columns over the samples so far; see backends/peaks.py
    first,
    own,  # number of the first of the B samples among the G
    rows,  # samples of this launch
    columns,
    batch,
    total,
    temperature,
    WIDE: tl.constexpr,
):
    """Grid: samples of this launch, then, with a gradient, all samples: columns."""
    i = tl.program_id(0)
    of_row = i < rows
    vector = tl.where(of_row, i, i - rows).to(tl.int64)
    count = tl.where(of_row, total, rows)
    start = tl.where(of_row, vector * columns, vector)
    stride = tl.where(of_row, 1, columns).to(tl.int64)
    same = tl.where(of_row, own + first + vector, vector - own - first)
    result = peaks + tl.where(of_row, first + vector, batch + vector)
    lane = tl.arange(0, WIDE)
    # Online, per lane: the sum so far is relative to the largest value so far. Similarities are not
    # negative, so 0 is a lower bound of their maximum, and finite.
    resumed = (first > 0) & (i >= rows)
    largest = tl.zeros((WIDE,), tl.float32) + tl.load(result, mask=resumed, other=0.0)
    before = tl.load(result + batch + total, mask=resumed, other=0.0)
    sums = tl.where(lane == 0, before, 0.0)
    for k in range(0, count, WIDE):
        negative = (k + lane < count) & (k + lane != same)
        r = tl.load(similarity + start + (k + lane) * stride, mask=negative, other=0.0)
        raised = tl.maximum(largest, r)
        added = tl.where(negative, tl.exp((r - raised) / temperature), 0.0)
        sums = sums * tl.exp((largest - raised) / temperature) + added
        largest = raised
    center = tl.max(largest, 0)
    total_sum = tl.sum(sums * tl.exp((largest - center) / temperature), 0)
    tl.store(result, center)
    tl.store(result + batch + total, total_sum)
    # A column may have no sample but its own so far.
    value = center / temperature + tl.log(tl.where(of_row, total_sum, 1.0))
    tl.store(logsumexp + first + vector, value, mask=of_row)


@triton.jit(
    do_not_specialize=[
        "first_tile",
        "own",
        "tiles",
        "blocks",
        "batch",
        "total",
        "task_rows",
        "sample_rows",
    ]
)
def _contrast_gradient_kernel(
    dots,  # (tiles of this launch * SIDE, all tiles * SIDE)
    similarity,  # (tiles of this launch * samples, all tiles * samples): r
    others,  # (T, G, C), of rows of C
    radial,  # (T, B, C)
    factor,  # (B,)
    peaks,  # (2, B + G)
    grad,  # (T, B, C)
    first_tile,
    own,  # number of the first of the B samples among the G
    tiles,
    blocks,
    batch,
    total,
    task_rows,  # of `others`
    sample_rows,
    channels_div,
    temperature,
    coefficient,  # 2 / (temperature G)
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
    sums = peaks + batch + total
    b_top = tl.load(peaks + b, mask=b < batch, other=0.0)[:, None]
    b_sum = tl.load(sums + b, mask=b < batch, other=1.0)[:, None]
    c = block * WIDE + tl.arange(0, WIDE)[None, :]
    du = tl.zeros((SIDE, WIDE), tl.float32)
    radial_weight = tl.zeros((samples,), tl.float32)  # sum_t du_t . u_t, from r alone
    k_samples: tl.constexpr = K_SIDE // TASK_BLOCK
    for k_tile in range(tiles * (SIDE // K_SIDE)):
        k = k_tile * k_samples + tl.arange(0, k_samples)
        k_top = tl.load(peaks + batch + k, mask=k < total, other=0.0)[None, :]
        k_sum = tl.load(sums + batch + k, mask=k < total, other=1.0)[None, :]
        negative = (own + b[:, None] != k[None, :]) & (k < total)[None, :]
        r = tl.load(_tile_of(similarity, local, k_tile, tiles * samples, samples, k_samples))
        r = tl.where(negative, r, 0.0)
        # r_bk is a negative of sample b and of sample k. Both weights are taken from r_bk: r_kb is
        # another sum, and at low temperatures its rounding would be all that is seen.
        weight = tl.exp((r - b_top) / temperature) / b_sum
        weight += tl.exp((r - k_top) / temperature) / k_sum
        weight = tl.where(negative, weight, 0.0)
        radial_weight += tl.sum(weight * r, 1)
        shape: tl.constexpr = (samples, TASK_BLOCK, k_samples, TASK_BLOCK)
        weight = tl.reshape(tl.broadcast_to(weight[:, None, :, None], shape), (SIDE, K_SIDE))
        weight *= tl.load(_tile_of(dots, local, k_tile, tiles * SIDE, SIDE, K_SIDE))
        k_row, k_exists = _anchor_rows(
            k_tile, total, task_rows, sample_rows, K_SIDE, TASKS, TASK_BLOCK
        )
        mask = k_exists[:, None] & (c < channels)
        u = tl.load(others + k_row[:, None] * channels + c, mask=mask, other=0.0)
        du = tl.dot(weight, u, du, input_precision=PRECISION)
    row, exists = _anchor_rows(tile, batch, batch, 1, SIDE, TASKS, TASK_BLOCK)
    offset = row[:, None] * channels + c
    mask = exists[:, None] & (c < channels)
    along = tl.load(radial + offset, mask=mask, other=0.0)
    radial_weight = tl.reshape(
        tl.broadcast_to(radial_weight[:, None], (samples, TASK_BLOCK)), (SIDE,)
    )
    scale = coefficient * tl.load(factor + row % batch, mask=exists, other=0.0)
    tl.store(grad + offset, scale[:, None] * (du - radial_weight[:, None] * along), mask=mask)


class _Plan(NamedTuple):
    """How products of B samples with G are cut into square tiles."""

    task_block: int  # T rounded up to a power of two
    side: int  # anchors of a tile, those of all tasks of `samples` samples
    samples: int
    rows: int  # tiles of samples b
    tiles: int  # tiles of samples k
    at_once: int  # tiles of samples b whose products are in memory at a time


def _plan(tasks: int, batch: int, total: int, channels: int) -> _Plan:
    """Return the plan with the largest tiles that fill the GPU."""
    task_block = next_power_of_2(tasks)
    for side in SIDES:
        side = max(side, task_block)
        samples = side // task_block
        rows, tiles = cdiv(batch, samples), cdiv(total, samples)
        if rows * tiles >= TILES:
            break
    room = max(BUFFER, tasks * total * channels)
    at_once = min(rows, max(1, room // (side * side * tiles)))
    return _Plan(task_block, side, samples, rows, tiles, at_once)


def batches_of_all_tiles(tasks: int) -> list[int]:
    """Return a batch for each side of tiles that some batch has."""
    task_block = next_power_of_2(tasks)
    sides = dict.fromkeys(max(side, task_block) for side in SIDES)
    enough = math.isqrt(TILES - 1)  # tiles of samples, of which one more fill the GPU
    return [1, *(enough * (side // task_block) + 1 for side in [*sides][:-1])]


def contrast(
    anchors: Anchors,
    *,
    temperature: float,
    with_grad: bool,
    all_samples: AllSamples | None = None,
) -> Contrast:
    """Return the log-sum-exp of each sample's negatives, and the gradient of their mean."""
    unit, factor, radial = anchors
    others, own = (unit, 0) if all_samples is None else all_samples[:2]
    tasks, batch, channels = unit.shape
    total = others.shape[1]
    temperature = float(temperature)
    align = alignment(channels)
    task_rows, sample_rows = (stride // channels for stride in others.stride()[:2])
    sizes = batch, total, task_rows, sample_rows, channels // align
    plan = _plan(tasks, batch, total, channels)
    tiling = {
        "CHANNELS_ALIGN": align,
        "TASKS": tasks,
        "TASK_BLOCK": plan.task_block,
        "SIDE": plan.side,
        "PRECISION": product_precision(),
    }
    step = product_step(plan.side, align)

    dots = None
    if with_grad:
        dots = unit.new_empty(plan.at_once * plan.side, plan.tiles * plan.side)
    similarity = unit.new_empty(plan.at_once * plan.samples, plan.tiles * plan.samples)

    def write_products(first: int, count: int, dots: Tensor | None) -> None:
        launch(
            _contrast_products_kernel,
            (count * plan.tiles,),
            unit.device,
            unit,
            others,
            dots,
            similarity,
            first,
            plan.tiles,
            *sizes,
            **step,
            **tiling,
        )

    logsumexp, peaks = unit.new_empty(batch), unit.new_empty(2, batch + total)
    all_at_once = plan.at_once == plan.rows
    starts = range(0, plan.rows, plan.at_once)
    for first in starts:
        count = min(plan.at_once, plan.rows - first)
        write_products(first, count, dots if all_at_once else None)
        samples = min(count * plan.samples, batch - first * plan.samples)
        launch(
            _contrast_logsumexp_kernel,
            (samples + total if with_grad else samples,),
            unit.device,
            similarity,
            logsumexp,
            peaks,
            first * plan.samples,
            own,
            samples,
            similarity.shape[1],
            batch,
            total,
            temperature,
            WIDE=LOGSUMEXP_WIDE,
        )
    if not with_grad:
        return Contrast(logsumexp, None)

    if all_samples is not None:
        peaks[:, batch:] = all_samples.join(peaks[:, batch:])
    grad = torch.empty_like(unit)
    k_side = max(plan.task_block, min(plan.side, GRADIENT_SIDE))
    gradient_wide = GRADIENT_ELEMENTS // max(k_side, GRADIENT_SIDE)
    blocks = cdiv(channels, gradient_wide)
    for first in starts:
        count = min(plan.at_once, plan.rows - first)
        if not all_at_once:  # the weights of the gradient need the peaks of every column first
            write_products(first, count, dots)
        launch(
            _contrast_gradient_kernel,
            (count * blocks,),
            unit.device,
            dots,
            similarity,
            others,
            radial,
            factor,
            peaks,
            grad,
            first,
            own,
            plan.tiles,
            blocks,
            *sizes,
            temperature,
            2 / (temperature * total),
            K_SIDE=k_side,
            WIDE=gradient_wide,
            num_warps=step["num_warps"],
            maxnreg=GRADIENT_REGISTERS.get(product_precision()),
            **tiling,
        )
    return Contrast(logsumexp, grad)
