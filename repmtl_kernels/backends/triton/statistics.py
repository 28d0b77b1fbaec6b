"""Means and scales of the saliencies from one read of them (equations 4 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels.backends.contract import Statistics
from repmtl_kernels.backends.triton.common import (
    Geometry,
    TaskGroup,
    alignment,
    cdiv,
    count_valid,
    launch,
    next_power_of_2,
    pick,
    position_offsets,
    stride_of,
    task_groups,
    zero_unless,
)
from repmtl_kernels.backends.triton.tiles import Sweep, tile_of

FINISH_PARTS, FINISH_COLUMNS, FINISH_WARPS = 16, 128, 4


@triton.jit
def power_of_two(largest):
    """Return the power of two that brings ``largest`` (float32) into [0.5, 1), exactly; 1 for 0."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    bits = tl.minimum(tl.maximum(253 - exponent, 1), 253) << 23
    return tl.where(largest == 0, 1.0, bits.to(tl.float32, bitcast=True))


@triton.jit(
    do_not_specialize=["batch", "columns_div", "chunks", "chunk_steps"],
    do_not_specialize_on_alignment=["tiles"],
)
def _statistics_kernel(
    saliencies,  # of a group of tasks: (B, C, *spatial) each
    group,  # numbers of the tasks
    layout,
    valid,  # (B, N) bool: which positions are there; or None, all are
    column_parts,  # (group, B, chunks, columns) float32: sums over a chunk of rows
    row_parts,  # (group, B, tiles, rows) float32: sums over a tile of columns
    max_parts,  # (group, B, chunks, tiles) float32: max |S|
    batch,
    rows,
    columns_div,
    chunks,
    tiles,
    chunk_steps,
    COLUMNS_ALIGN: tl.constexpr,
    FORM: tl.constexpr,
    CHANNEL_COLUMNS: tl.constexpr,  # columns are channels and rows are positions, or the reverse
    COLUMN_SUMS: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    MAX: tl.constexpr,
    WHOLE: tl.constexpr,  # a chunk and a tile hold all of a sample: parts are (T, B, ...) results
    DEEP: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid: (task of the group, sample, chunk of rows, tile of columns), the last fastest."""
    part = tl.program_id(0)
    tile, chunk = part % tiles, (part // tiles) % chunks
    sample = (part // (tiles * chunks)).to(tl.int64)
    b = sample % batch
    columns = columns_div * COLUMNS_ALIGN
    column = tile * WIDE + tl.arange(0, WIDE)
    first = chunk * (chunk_steps * (DEEP * HIGH)) + tl.arange(0, DEEP * HIGH)
    saliency = pick(saliencies, sample // batch) + b * stride_of(layout, FORM, 0)
    if CHANNEL_COLUMNS:
        saliency += column.to(tl.int64)[None, :] * stride_of(layout, FORM, 1)
    else:
        saliency += position_offsets(column, layout, FORM)[None, :]
    if valid is not None:
        valid += b * (rows if CHANNEL_COLUMNS else columns)
        if not CHANNEL_COLUMNS:
            there = tl.load(valid + column, mask=column < columns, other=0)
    row_divisor = 1
    column_divisor = 1
    if WHOLE:
        sample = pick(group, sample // batch) * batch + b
        row_divisor = columns
        column_divisor = rows
        if valid is not None:
            if CHANNEL_COLUMNS:
                column_divisor = count_valid(valid, rows)
            else:
                row_divisor = count_valid(valid, columns)

    total = tl.zeros((HIGH, WIDE), tl.float32)
    largest = tl.zeros((HIGH, WIDE), tl.float32)
    for step in range(chunk_steps):
        row = first + step * (DEEP * HIGH)
        if CHANNEL_COLUMNS:
            offset = position_offsets(row, layout, FORM)
        else:
            offset = row.to(tl.int64) * stride_of(layout, FORM, 1)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        if valid is not None and CHANNEL_COLUMNS:  # rows are left out, so loads stay wide
            mask &= tl.load(valid + row, mask=row < rows, other=0)[:, None]
        s = tl.load(saliency + offset[:, None], mask=mask, other=0.0).to(tl.float32)
        if valid is not None and not CHANNEL_COLUMNS:
            s = zero_unless(there[None, :], s)
        # All warps hold HIGH rows at a time: along DEEP, sums stay within a thread.
        deep = tl.reshape(s, (DEEP, HIGH, WIDE))
        if COLUMN_SUMS:
            total += tl.sum(deep, 0)
        if MAX:
            largest = tl.maximum(largest, tl.max(tl.abs(deep), 0))
        if ROW_SUMS:
            target = row_parts + (sample * tiles + tile) * rows + row
            tl.store(target, tl.sum(s, 1) / row_divisor, mask=row < rows)
    if COLUMN_SUMS:
        target = column_parts + (sample * chunks + chunk) * columns + column
        tl.store(target, tl.sum(total, 0) / column_divisor, mask=column < columns)
    if MAX:
        if WHOLE:
            tl.store(max_parts + sample, power_of_two(tl.max(largest)))
        else:
            tl.store(max_parts + part, tl.max(largest))


@triton.jit(do_not_specialize=["batch", "chunks", "tiles", "column_blocks", "blocks"])
def _statistics_finish_kernel(
    group,  # numbers of the tasks
    column_parts,  # (group, B, chunks, columns)
    row_parts,  # (group, B, tiles, rows)
    max_parts,  # (group, B, chunks, tiles)
    valid,  # (B, N) bool; or None
    column_means,  # (T, B, columns)
    row_means,  # (T, B, rows)
    scale,  # (T, B)
    batch,
    rows,
    columns,
    chunks,
    tiles,
    column_blocks,
    blocks,
    CHANNEL_COLUMNS: tl.constexpr,  # with `valid`
    COLUMN_SUMS: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    MAX: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid: (task of the group, sample, block of columns or rows); a fixed order of the sums."""
    block = tl.program_id(0) % blocks
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    b = sample % batch
    result = pick(group, sample // batch) * batch + b
    if COLUMN_SUMS:
        if block < column_blocks:
            parts = column_parts + sample * chunks * columns
            means = column_means + result * columns
            count = rows
            if valid is not None and CHANNEL_COLUMNS:
                count = count_valid(valid + b * rows, rows)
            _mean(parts, means, block, chunks, columns, count, PARTS, WIDE)
    if ROW_SUMS:
        if block >= column_blocks:
            parts = row_parts + sample * tiles * rows
            means = row_means + result * rows
            count = columns
            if valid is not None and not CHANNEL_COLUMNS:
                count = count_valid(valid + b * columns, columns)
            _mean(parts, means, block - column_blocks, tiles, rows, count, PARTS, WIDE)
    if MAX:
        if block == 0:
            largest = tl.zeros((PARTS * WIDE,), tl.float32)
            for start in range(0, chunks * tiles, PARTS * WIDE):
                part = start + tl.arange(0, PARTS * WIDE)
                source = max_parts + sample * chunks * tiles + part
                m = tl.load(source, mask=part < chunks * tiles, other=0.0)
                largest = tl.maximum(largest, m)
            tl.store(scale + result, power_of_two(tl.max(largest, 0)))


@triton.jit
def _mean(
    parts,  # (count, length)
    means,  # (length,)
    block,
    count,
    length,
    divisor,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store the sums of a block of columns of ``parts``, divided."""
    i = block * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((WIDE,), tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < count)[:, None] & (i < length)[None, :]
        source = parts + part.to(tl.int64)[:, None] * length + i[None, :]
        total += tl.sum(tl.load(source, mask=mask, other=0.0), 0)
    tl.store(means + i, total / divisor, mask=i < length)


def statistics(
    saliencies: Sequence[Tensor], *, positions: bool, channels: bool, mask: Tensor | None = None
) -> Statistics:
    """Return the means and scales that are asked for."""
    first = saliencies[0]
    tasks, batch = len(saliencies), first.shape[0]
    empty = partial(torch.empty, dtype=torch.float32, device=first.device)
    x = empty(tasks, batch, first.shape[2:].numel()) if positions else None
    a = empty(tasks, batch, first.shape[1]) if channels else None
    scale = empty(tasks, batch) if channels else None
    for group in task_groups(saliencies):
        _write_group(group, mask, x, a, scale)
    return Statistics(x, a, scale)


def _write_group(
    group: TaskGroup,
    mask: Tensor | None,
    x: Tensor | None,
    a: Tensor | None,
    scale: Tensor | None,
) -> None:
    """Write the statistics of a group of tasks into ``x``, ``a`` and ``scale``."""
    first = group.tensors[0]
    positions, channels = first.shape[2:].numel(), first.shape[1]
    channel_columns = channels_are_contiguous(group.geometry, positions)
    rows, columns = (positions, channels) if channel_columns else (channels, positions)
    row_means, column_means = (x, a) if channel_columns else (a, x)

    samples = len(group.tasks) * first.shape[0]
    align = alignment(columns)
    size = first.element_size()
    odd = min(align, group.geometry.form[1]) == 1
    kind = "16-bit" if size == 2 else "ieee"
    sweep = tile_of("statistics", kind, odd, rows, columns, first.device)
    tile = _whole(sweep, rows, columns, size)
    whole = tile is not None
    deep, high, wide, chunk, warps = tile or _part(sweep, samples, rows, columns, size)
    chunks, tiles = cdiv(rows, chunk), cdiv(columns, wide)
    column_parts, row_parts, max_parts = column_means, row_means, scale
    if not whole:
        empty = partial(torch.empty, dtype=torch.float32, device=first.device)
        column_parts = None if column_means is None else empty(samples, chunks, columns)
        row_parts = None if row_means is None else empty(samples, tiles, rows)
        max_parts = None if scale is None else empty(samples, chunks, tiles)
    launch(
        _statistics_kernel,
        (samples * chunks * tiles,),
        first.device,
        group.tensors,
        group.tasks,
        group.geometry.layout,
        mask,
        column_parts,
        row_parts,
        max_parts,
        first.shape[0],
        rows,
        columns // align,
        chunks,
        tiles,
        chunk // (deep * high),
        COLUMNS_ALIGN=align,
        FORM=group.geometry.form,
        CHANNEL_COLUMNS=channel_columns,
        COLUMN_SUMS=column_means is not None,
        ROW_SUMS=row_means is not None,
        MAX=scale is not None,
        WHOLE=whole,
        DEEP=deep,
        HIGH=high,
        WIDE=wide,
        num_warps=warps,
        maxnreg=sweep.registers,
    )
    if whole:
        return
    column_blocks = 0 if column_means is None else cdiv(columns, FINISH_COLUMNS)
    blocks = column_blocks + (0 if row_means is None else cdiv(rows, FINISH_COLUMNS))
    launch(
        _statistics_finish_kernel,
        (samples * blocks,),
        first.device,
        group.tasks,
        column_parts,
        row_parts,
        max_parts,
        mask,
        column_means,
        row_means,
        scale,
        first.shape[0],
        rows,
        columns,
        chunks,
        tiles,
        column_blocks,
        blocks,
        CHANNEL_COLUMNS=mask is not None and channel_columns,
        COLUMN_SUMS=column_means is not None,
        ROW_SUMS=row_means is not None,
        MAX=scale is not None,
        PARTS=FINISH_PARTS,
        WIDE=FINISH_COLUMNS,
        num_warps=FINISH_WARPS,
    )


def channels_are_contiguous(geometry: Geometry, positions: int) -> bool:
    """Return whether neighbours in memory are channels (channels_last, tokens, one position)."""
    dims, _, unit, _ = geometry.form
    return positions == 1 or (bool(unit >> 1 & 1) and not unit >> (1 + dims) & 1)


class _Tile(NamedTuple):
    """The part of a matrix that one program takes, and how: ``deep * high`` rows at a time."""

    deep: int  # rows that a thread adds up in registers
    high: int
    wide: int
    chunk: int  # rows of one program
    warps: int


def _whole(sweep: Sweep, rows: int, columns: int, element_size: int) -> _Tile | None:
    """Return the tile of a program that takes a whole sample; None if that is too large."""
    wide, warps = next_power_of_2(columns), 2 * sweep.warps
    at_once = warps * _widest(element_size)  # elements
    if wide > at_once * sweep.deep:
        return None
    high = min(max(1, at_once // wide), next_power_of_2(rows))
    deep = min(sweep.deep, next_power_of_2(cdiv(rows, high)))
    chunk = max(deep * high, next_power_of_2(rows))
    return _Tile(deep, high, wide, chunk, warps) if chunk * wide <= sweep.whole else None


def _part(sweep: Sweep, samples: int, rows: int, columns: int, element_size: int) -> _Tile:
    """Return the tile of a program that takes a part of a sample."""
    # One warp of 16-byte loads; less where that would leave more than a quarter of the lanes idle.
    widest = _widest(element_size)
    widths = [w for w in (widest, widest // 2, widest // 4) if w < 2 * columns]
    wide = min(
        widths or [next_power_of_2(columns)],
        key=lambda w: (max(3 * cdiv(columns, w) * w, 4 * columns), -w),
    )
    high = min(sweep.warps * widest // wide, next_power_of_2(rows))
    deep = min(sweep.deep, next_power_of_2(cdiv(rows, high)))
    chunk = deep * high
    per_row = samples * cdiv(columns, wide)
    most_rows = min(rows, sweep.most_rows)
    while 2 * chunk <= most_rows and per_row * cdiv(rows, 2 * chunk) >= sweep.programs:
        chunk *= 2
    return _Tile(deep, high, wide, chunk, sweep.warps)


def _widest(element_size: int) -> int:
    """Return the elements of one warp of 16-byte loads."""
    return 512 // element_size
