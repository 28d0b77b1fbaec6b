"""Inner products of the tasks' saliencies, from one read of them."""

# Tuples grow by sums: Triton has no lists and no starred expressions.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels.backends.triton.common import (
    Geometry,
    TaskGroup,
    alignment,
    cdiv,
    geometry_of,
    launch,
    next_power_of_2,
    position_offsets,
    stride_of,
    task_groups,
    tuple_item,
    unspecialized,
    zero_unless,
)
from repmtl_kernels.backends.triton.statistics import channels_are_contiguous, power_of_two

# Tasks of a group where there are several: the products of two groups share the registers.
SEVERAL = 4
# Elements of all tasks that a thread holds at a time, and of one task at most.
HELD, HELD_OF_TASK = 96, 32
# Eight programs for each multiprocessor of a large GPU.
PROGRAMS = 1056
# Elements of a sample that one program takes whole, with twice the warps: there are no partial
# sums then, and no second kernel.
WHOLE = 1 << 15
WARPS = 4
# Left to itself, the compiler spills two registers of some variants to get to 128.
MOST_REGISTERS = 168
# Columns of a sample that is one long row.
MOST_COLUMNS = 1024
FINISH_PARTS, FINISH_COLUMNS, FINISH_WARPS = 16, 64, 4


@triton.jit(do_not_specialize=["parts", "chunk"])
def _affinity_kernel(
    left,  # saliencies of a group of tasks: (B, C, *spatial) each
    right,  # those of another group; or None: the products are those of one group
    left_tasks,  # numbers of the tasks, unspecialized
    right_tasks,
    left_layout,
    right_layout,
    valid,  # (B, N) bool: which positions are there; or None, all are
    products,  # (B, parts, tasks, tasks) float64: sums over a part of a sample
    tasks,
    rows,
    columns_div,
    tiles,  # of a row of tiles
    steps,  # all tiles of a sample
    parts,
    chunk,  # tiles of a part
    COLUMNS_ALIGN: tl.constexpr,
    LEFT_FORM: tl.constexpr,
    RIGHT_FORM: tl.constexpr,
    CHANNEL_COLUMNS: tl.constexpr,  # columns are channels and rows are positions, or the reverse
    DEEP: tl.constexpr,  # rows of a thread
    LANES: tl.constexpr,  # threads
    ACROSS: tl.constexpr,  # threads that share a row
    VECTOR: tl.constexpr,  # neighbours in a row that one thread has
):
    """Grid: (sample, part of its tiles), the last fastest."""
    b, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    columns = columns_div * COLUMNS_ALIGN
    HIGH: tl.constexpr = LANES // ACROSS
    lane = tl.arange(0, LANES)
    lane_row = tl.arange(0, DEEP)[:, None] * HIGH + (lane // ACROSS)[None, :]
    lane_column = (lane % ACROSS * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    if valid is not None:
        valid += b * (rows if CHANNEL_COLUMNS else columns)

    sums = ()
    others = left if right is None else right
    for t in tl.static_range(len(left)):
        for _ in tl.static_range(t if right is None else 0, len(others)):
            sums = sums + (tl.zeros((LANES,), tl.float64),)
    for step in range(part * chunk, tl.minimum((part + 1) * chunk, steps)):
        row = step // tiles * (DEEP * HIGH) + lane_row
        column = step % tiles * (ACROSS * VECTOR) + lane_column
        inside = (row < rows)[:, :, None] & (column < columns)[None, :, :]
        there = None
        if valid is not None:
            if CHANNEL_COLUMNS:  # rows are left out, so loads stay wide
                inside &= tl.load(valid + row, mask=row < rows, other=0)[:, :, None]
            else:
                there = tl.load(valid + column, mask=column < columns, other=0)[None, :, :]
        x = _load(left, left_layout, b, row, column, inside, there, LEFT_FORM, CHANNEL_COLUMNS)
        y = None
        y_factors = None
        if right is not None:
            y = _load(
                right, right_layout, b, row, column, inside, there, RIGHT_FORM, CHANNEL_COLUMNS
            )
            y, y_factors = _scaled(y)
        x, x_factors = _scaled(x)
        sums = _add_products(sums, x, x_factors, y, y_factors)

    products += tl.program_id(0).to(tl.int64) * tasks * tasks
    _store(products, sums, left_tasks, right_tasks, tasks)


@triton.jit
def _load(
    saliencies,
    layout,
    b,
    row,  # (DEEP, LANES)
    column,  # (LANES, VECTOR)
    inside,
    there,  # which elements are there, beside `inside`; or None, all are
    FORM: tl.constexpr,
    CHANNEL_COLUMNS: tl.constexpr,
):
    """Return a tile (DEEP, LANES, VECTOR) of each task, in float32."""
    offset = b * stride_of(layout, FORM, 0)
    if CHANNEL_COLUMNS:
        offset += position_offsets(row, layout, FORM)[:, :, None]
        offset += (column.to(tl.int64) * stride_of(layout, FORM, 1))[None, :, :]
    else:
        offset += (row.to(tl.int64) * stride_of(layout, FORM, 1))[:, :, None]
        offset += position_offsets(column, layout, FORM)[None, :, :]
    tiles = ()
    for t in tl.static_range(len(saliencies)):
        x = tl.load(saliencies[t] + offset, mask=inside, other=0.0)
        tiles = tiles + (x if there is None else zero_unless(there, x),)
    return tiles


@triton.jit
def _scaled(tiles):
    """Return the tiles in float32, each thread's part at a scale of its own, and what undoes it.

    Their products are then in the range of float32. The factors (LANES,) are float64.
    """
    scaled = ()
    factors = ()
    for t in tl.static_range(len(tiles)):
        x = tiles[t].to(tl.float32)
        scale = power_of_two(tl.max(tl.max(tl.abs(x), 0), 1))
        inverse = ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        scaled = scaled + (x * scale[None, :, None],)
        factors = factors + (inverse.to(tl.float64),)
    return scaled, factors


@triton.jit
def _add_products(sums, x, x_factors, y, y_factors):
    """Return the sums (LANES,) with the products of ``x`` and ``y``; None: of ``x`` with itself."""
    total = ()
    others = x if y is None else y
    factors = x_factors if y is None else y_factors
    for t in tl.static_range(len(x)):
        for u in tl.static_range(t if y is None else 0, len(others)):
            # Within a thread, in float32; from there on in float64.
            product = tl.sum(tl.sum(x[t] * others[u], 0), 1).to(tl.float64)
            total = total + (sums[len(total)] + product * x_factors[t] * factors[u],)
    return total


@triton.jit
def _store(products, sums, left_tasks, right_tasks, tasks):
    """Write the products of two groups, or of one group, on both sides of the diagonal."""
    others = left_tasks if right_tasks is None else right_tasks
    done = ()
    for t in tl.static_range(len(left_tasks)):
        for u in tl.static_range(t if right_tasks is None else 0, len(others)):
            i, j = tuple_item(left_tasks, t), tuple_item(others, u)
            product = tl.sum(sums[len(done)], 0)
            tl.store(products + i * tasks + j, product)
            tl.store(products + j * tasks + i, product)
            done = done + (t,)


@triton.jit(do_not_specialize=["parts"])
def _affinity_finish_kernel(
    sums,  # (B, parts, size) float64
    products,  # (B, size) float64
    parts,
    size,
    blocks,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add the parts in a fixed order. Grid: (sample, block of products), the last fastest."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * WIDE + tl.arange(0, WIDE)
    sums += b * parts * size
    total = tl.zeros((WIDE,), tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (i < size)[None, :]
        source = sums + part.to(tl.int64)[:, None] * size + i[None, :]
        total += tl.sum(tl.load(source, mask=inside, other=0.0), 0)
    tl.store(products + b * size + i, total, mask=i < size)


class _Plan(NamedTuple):
    """How a sample is cut up, as a matrix with ``rows`` of channels or of positions."""

    rows: int
    columns: int
    channel_columns: bool
    warps: int
    across: int  # threads that share a row
    vector: int  # neighbours in a row that one thread has

    @property
    def high(self) -> int:
        """The rows that all threads have at a time."""
        return 32 * self.warps // self.across

    def deep(self, held: int) -> int:
        """Return the rows of a thread that holds elements of so many tasks."""
        most = min(HELD_OF_TASK, HELD // held) // self.vector
        return max(
            1, min(1 << (most.bit_length() - 1), next_power_of_2(cdiv(self.rows, self.high)))
        )

    def tiles(self, held: int) -> tuple[int, int]:
        """Return the number of tiles side by side, and of all tiles of a sample."""
        beside = cdiv(self.columns, self.across * self.vector)
        return beside, beside * cdiv(self.rows, self.deep(held) * self.high)


def affinity(saliencies: list[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """Return the inner products (B, T, T)."""
    first = saliencies[0]
    tasks, batch = len(saliencies), first.shape[0]
    groups = list(task_groups(saliencies))
    if len(groups) > 1:
        groups = list(task_groups(saliencies, SEVERAL))
    elements = first.shape[1:].numel()
    whole = elements <= WHOLE
    groups, plan = _planned(groups, mask is not None, 2 * WARPS if whole else WARPS)
    _, steps = plan.tiles(len(groups[0].tasks))
    parts = 1 if whole else min(steps, max(1, PROGRAMS // batch))
    empty = partial(torch.empty, dtype=torch.float64, device=first.device)
    products = empty(batch, tasks, tasks)
    sums = products if whole else empty(batch, parts, tasks, tasks)
    for i, group in enumerate(groups):
        for other in (None, *groups[i + 1 :]):
            _write_products(plan, group, other, mask, sums, parts)
    if whole:
        return products
    blocks = cdiv(tasks * tasks, FINISH_COLUMNS)
    launch(
        _affinity_finish_kernel,
        (batch * blocks,),
        first.device,
        sums,
        products,
        parts,
        tasks * tasks,
        blocks,
        PARTS=FINISH_PARTS,
        WIDE=FINISH_COLUMNS,
        num_warps=FINISH_WARPS,
    )
    return products


def _planned(groups: list[TaskGroup], masked: bool, warps: int) -> tuple[list[TaskGroup], _Plan]:
    """Return the groups with the strides that the kernel takes, and the plan for all of them."""
    first = groups[0].tensors[0]
    channels, positions = first.shape[1], first.shape[2:].numel()
    channel_columns = channels_are_contiguous(groups[0].geometry, positions)
    rows, columns = (positions, channels) if channel_columns else (channels, positions)
    if not masked and all(_is_dense(group, channel_columns) for group in groups):
        # A sample is one row, whatever its elements are: all tasks have the same order.
        columns = min(MOST_COLUMNS, channels * positions & -(channels * positions))
        rows, channel_columns = channels * positions // columns, False
        groups = [group._replace(geometry=_in_rows(group, rows, columns)) for group in groups]
    widest = 16 // first.element_size()
    vector = min(alignment(columns), widest, *(group.geometry.form[1] for group in groups))
    across = 32 * warps
    # A quarter of a row's threads may be idle.
    while across > 1 and 3 * cdiv(columns, across * vector) * across * vector > 4 * columns:
        across //= 2
    return groups, _Plan(rows, columns, channel_columns, warps, across, vector)


def _is_dense(group: TaskGroup, channel_columns: bool) -> bool:
    """Return whether samples lie without gaps in memory, with positions or channels as rows."""
    sample = group.tensors[0][0]
    return (sample.movedim(0, -1) if channel_columns else sample).is_contiguous()


def _in_rows(group: TaskGroup, rows: int, columns: int) -> Geometry:
    """Return the strides of dense samples as matrices."""
    return geometry_of((1, rows, columns), (group.tensors[0].stride(0), columns, 1))


def _write_products(
    plan: _Plan,
    group: TaskGroup,
    other: TaskGroup | None,
    mask: Tensor | None,
    sums: Tensor,  # (B, parts, T, T)
    parts: int,
) -> None:
    """Write the products of two groups of tasks, or of one group."""
    held = len(group.tasks) + (0 if other is None else len(other.tasks))
    tiles, steps = plan.tiles(held)
    align = alignment(plan.columns)
    launch(
        _affinity_kernel,
        (sums.shape[0] * parts,),
        sums.device,
        group.tensors,
        None if other is None else other.tensors,
        tuple(map(unspecialized, group.tasks)),
        None if other is None else tuple(map(unspecialized, other.tasks)),
        group.geometry.layout,
        None if other is None else other.geometry.layout,
        mask,
        sums,
        sums.shape[-1],
        plan.rows,
        plan.columns // align,
        tiles,
        steps,
        parts,
        cdiv(steps, parts),
        COLUMNS_ALIGN=align,
        LEFT_FORM=group.geometry.form,
        RIGHT_FORM=None if other is None else other.geometry.form,
        CHANNEL_COLUMNS=plan.channel_columns,
        DEEP=plan.deep(held),
        LANES=32 * plan.warps,
        ACROSS=plan.across,
        VECTOR=plan.vector,
        num_warps=plan.warps,
        maxnreg=MOST_REGISTERS,
    )
