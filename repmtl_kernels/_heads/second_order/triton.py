"""The arithmetic of batch norm's derivatives as Triton kernels. Contract: ``stages.py``.

With ``g = m grad``, ``k = weight invstd``, ``u, v, s`` the three incoming gradients of the double
backward and ``mean(.)`` over a channel, ``stages.py`` written out is, in training::

    e = v - k mean(u ^x)
    a = mean(u g) - mean(u) mean(g) - mean(u ^x) mean(g ^x)
    grad_of_grad = m (k u + e ^x + s - k mean(u))
    grad_weight  = M invstd a
    grad_x       = invstd (e g - k mean(g ^x) u + k mean(g ^x) mean(u) - e mean(g)
                           - ^x (e mean(g ^x) - k mean(u ^x) mean(g ^x) + k a))

So each function reads the big tensors twice: once for at most five sums per channel (in two stages
and a fixed order), once to write results that are linear in ``g``, ``u`` and ``x - mean``, with
coefficients per channel. All take the tensors as memory ``(outer, channels, inner)``.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels.backends.triton.common import (
    TRITON_3_6,
    alignment,
    cdiv,
    launch,
    next_power_of_2,
)

WARPS = 4
# Left to itself, the compiler spills a few registers for more occupancy on sm_100.
MAX_REGISTERS = 128
# Tiles whose loads a program of the first pass has under way at once. Triton 3.6 would not keep
# sums over them within a thread.
DEEP = 1 if TRITON_3_6 else 2
# Eight programs for each multiprocessor of a large GPU; where there are more, longer ones make
# fewer partial sums. Below MIN_POSITIONS of a channel these would be a tenth of the bytes.
PROGRAMS = 1056
MIN_POSITIONS, MAX_POSITIONS = 64, 4096
FINISH_PARTS, FINISH_CHANNELS = 64, 16


@triton.jit
def _masked(values, output):
    """``values`` where the ReLU passed; as in PyTorch, it does at NaN."""
    return tl.where(output <= 0, 0.0, values)


@triton.jit
def _per_channel(values, channel, channels, CHANNEL_COLUMNS: tl.constexpr):
    """One float32 of each channel, to be broadcast over a tile (step, HIGH, WIDE)."""
    found = tl.load(values + channel, mask=channel < channels, other=0.0).to(tl.float32)
    if CHANNEL_COLUMNS:
        return found[None, None, :]
    else:
        return found[None, :, None]


@triton.jit
def _tile(
    step,  # (steps,)
    channel,  # HIGH channels, or WIDE with CHANNEL_COLUMNS
    outer,
    channels,
    length,
    row_tiles,
    CHANNEL_COLUMNS: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Offsets and mask (steps, HIGH, WIDE) of some steps of one block of channels.

    A step is WIDE neighbours of HIGH channels in memory (outer, channels, length); or, with
    CHANNEL_COLUMNS, HIGH rows in memory (outer, length), where columns are the channels.
    """
    if CHANNEL_COLUMNS:
        row = step.to(tl.int64)[:, None] * HIGH + tl.arange(0, HIGH)[None, :]
        offset = row[:, :, None] * length + channel[None, None, :]
        mask = (row < outer)[:, :, None] & (channel < length)[None, None, :]
    else:
        # 32 bits wide, as divisions of 64 bits are slow.
        sample = (step // row_tiles).to(tl.int64)[:, None]
        tile = (step % row_tiles).to(tl.int64)[:, None, None]
        column = tile * WIDE + tl.arange(0, WIDE)[None, None, :]
        row = sample * channels + channel[None, :]
        offset = row[:, :, None] * length + column
        inside = (sample < outer) & (channel < channels)[None, :]
        mask = inside[:, :, None] & (column < length)
    return offset, mask


@triton.jit
def _store_sum(parts, total, channel, channels, CHANNEL_COLUMNS: tl.constexpr):
    # Columns are channels, and the sum runs over the rows; or the reverse.
    tl.store(parts + channel, tl.sum(total, 0 if CHANNEL_COLUMNS else 1), mask=channel < channels)


@triton.jit
def _batch_norm_sums_kernel(
    grad,  # this and the next three lie in memory alike; None where they are not needed
    output,
    x,
    ggx,
    mean,  # (C,) float32
    parts,  # (chunks, 5, C) float32: sums of g, g (x - mean), u, u (x - mean), u g
    outer,
    channels,
    length_div,
    row_tiles,
    blocks,
    LENGTH_ALIGN: tl.constexpr,
    CHANNEL_COLUMNS: tl.constexpr,
    DEEP: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: (chunk of steps, block of channels), the last running fastest."""
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    length = length_div * LENGTH_ALIGN
    SPAN: tl.constexpr = WIDE if CHANNEL_COLUMNS else HIGH
    channel = block * SPAN + tl.arange(0, SPAN)
    if x is not None:
        centre = _per_channel(mean, channel, channels, CHANNEL_COLUMNS)
    sum_g = tl.zeros((HIGH, WIDE), tl.float32)
    sum_gx = tl.zeros((HIGH, WIDE), tl.float32)
    sum_u = tl.zeros((HIGH, WIDE), tl.float32)
    sum_ux = tl.zeros((HIGH, WIDE), tl.float32)
    sum_ug = tl.zeros((HIGH, WIDE), tl.float32)
    for start in range(0, CHUNK, DEEP):
        step = chunk * CHUNK + start + tl.arange(0, DEEP)
        offset, mask = _tile(
            step, channel, outer, channels, length, row_tiles, CHANNEL_COLUMNS, HIGH, WIDE
        )
        # All loads come first, to be under way together.
        if grad is not None:
            g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
            if output is not None:
                g = _masked(g, tl.load(output + offset, mask=mask, other=0.0))
        if ggx is not None:
            u = tl.load(ggx + offset, mask=mask, other=0.0).to(tl.float32)
        if x is not None:
            centred = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) - centre
        # Along the steps, sums stay within a thread.
        if grad is not None:
            sum_g += tl.sum(g, 0)
            if x is not None:
                sum_gx += tl.sum(g * centred, 0)
        if ggx is not None:
            sum_u += tl.sum(u, 0)
            if x is not None:
                sum_ux += tl.sum(u * centred, 0)
            if grad is not None:
                sum_ug += tl.sum(u * g, 0)
    parts += chunk.to(tl.int64) * (5 * channels)
    if grad is not None:
        _store_sum(parts, sum_g, channel, channels, CHANNEL_COLUMNS)
        if x is not None:
            _store_sum(parts + channels, sum_gx, channel, channels, CHANNEL_COLUMNS)
    if ggx is not None:
        _store_sum(parts + 2 * channels, sum_u, channel, channels, CHANNEL_COLUMNS)
        if x is not None:
            _store_sum(parts + 3 * channels, sum_ux, channel, channels, CHANNEL_COLUMNS)
        if grad is not None:
            _store_sum(parts + 4 * channels, sum_ug, channel, channels, CHANNEL_COLUMNS)


@triton.jit
def _total(
    parts,
    i,  # which of the five sums
    channel,
    channels,
    chunks,
    PRESENT: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Adds the partial sums in a fixed order; 0 for a sum that was not needed."""
    total = tl.zeros((PARTS, WIDE), tl.float32)
    if PRESENT:
        for start in range(0, chunks, PARTS):
            part = start + tl.arange(0, PARTS)
            mask = (part < chunks)[:, None] & (channel < channels)[None, :]
            row = part.to(tl.int64) * 5 + i
            total += tl.load(
                parts + row[:, None] * channels + channel[None, :], mask=mask, other=0.0
            )
    return tl.sum(total, 0)


@triton.jit
def _optional(values, channel, channels, default: tl.constexpr):
    if values is not None:
        return tl.load(values + channel, mask=channel < channels, other=0.0).to(tl.float32)
    else:
        return tl.full(channel.shape, default, tl.float32)


@triton.jit
def _batch_norm_backward_finish_kernel(
    parts,  # (chunks, 5, C)
    weight,  # (C,), or None
    invstd,  # (C,)
    coefficients,  # (7, C), see `_batch_norm_apply_kernel`
    grad_weight,  # (C,), or None
    grad_bias,  # (C,), or None
    channels,
    chunks,
    inverse_count,
    TRAINING: tl.constexpr,
    G: tl.constexpr,  # which sums there are: with g, with x
    X: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    channel = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    inside = channel < channels
    scale = _optional(invstd, channel, channels, 1.0)
    k = _optional(weight, channel, channels, 1.0) * scale
    sum_g = _total(parts, 0, channel, channels, chunks, G, PARTS, WIDE)
    sum_gx = _total(parts, 1, channel, channels, chunks, G and X, PARTS, WIDE) * scale
    if grad_weight is not None:
        tl.store(grad_weight + channel, sum_gx, mask=inside)
    if grad_bias is not None:
        tl.store(grad_bias + channel, sum_g, mask=inside)
    coefficients += channel
    tl.store(coefficients + 3 * channels, k, mask=inside)
    if TRAINING:
        tl.store(coefficients + 5 * channels, -k * scale * sum_gx * inverse_count, mask=inside)
        tl.store(coefficients + 6 * channels, -k * sum_g * inverse_count, mask=inside)


@triton.jit
def _batch_norm_double_backward_finish_kernel(
    parts,  # (chunks, 5, C)
    weight,  # (C,), or None
    invstd,  # (C,)
    ggw,  # (C,), or None
    ggb,  # (C,), or None
    coefficients,  # (7, C), see `_batch_norm_apply_kernel`
    grad_weight,  # (C,), or None
    channels,
    chunks,
    inverse_count,
    TRAINING: tl.constexpr,
    G: tl.constexpr,  # which sums there are: with g, with u, with x
    U: tl.constexpr,
    X: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    channel = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    inside = channel < channels
    scale = _optional(invstd, channel, channels, 1.0)
    k = _optional(weight, channel, channels, 1.0) * scale
    v = _optional(ggw, channel, channels, 0.0)
    s = _optional(ggb, channel, channels, 0.0)
    sum_ug = _total(parts, 4, channel, channels, chunks, U and G, PARTS, WIDE)
    coefficients += channel
    tl.store(coefficients, k, mask=inside)
    if TRAINING:
        scaled = scale * inverse_count
        mean_g = _total(parts, 0, channel, channels, chunks, G, PARTS, WIDE) * inverse_count
        mean_gx = _total(parts, 1, channel, channels, chunks, G and X, PARTS, WIDE) * scaled
        mean_u = _total(parts, 2, channel, channels, chunks, U, PARTS, WIDE) * inverse_count
        mean_ux = _total(parts, 3, channel, channels, chunks, U and X, PARTS, WIDE) * scaled
        q = sum_ug * inverse_count - mean_u * mean_g - mean_ux * mean_gx
        e = v - k * mean_ux
        pull = e * mean_gx - k * mean_ux * mean_gx + k * q
        tl.store(coefficients + channels, scale * e, mask=inside)
        tl.store(coefficients + 2 * channels, s - k * mean_u, mask=inside)
        tl.store(coefficients + 3 * channels, scale * e, mask=inside)
        tl.store(coefficients + 4 * channels, -scale * k * mean_gx, mask=inside)
        tl.store(coefficients + 5 * channels, -scale * scale * pull, mask=inside)
        shift = scale * (k * mean_gx * mean_u - e * mean_g)
        tl.store(coefficients + 6 * channels, shift, mask=inside)
        if grad_weight is not None:
            tl.store(grad_weight + channel, scale * (q / inverse_count), mask=inside)
    else:
        tl.store(coefficients + channels, scale * v, mask=inside)
        tl.store(coefficients + 2 * channels, s, mask=inside)
        tl.store(coefficients + 3 * channels, scale * v, mask=inside)
        if grad_weight is not None:
            tl.store(grad_weight + channel, scale * sum_ug, mask=inside)


@triton.jit
def _batch_norm_apply_kernel(
    grad,  # these lie in memory alike; None where they are not needed
    output,
    x,
    ggx,
    mean,  # (C,) float32
    coefficients,  # (7, C) float32: grad_of_grad of u, x - mean, 1; grad_x of g, u, x - mean, 1
    grad_of_grad,  # mask * (its linear form), or None
    grad_x,  # its linear form, or None; with running statistics only its first term
    outer,
    channels,
    length_div,
    row_tiles,
    blocks,
    TRAINING: tl.constexpr,
    LENGTH_ALIGN: tl.constexpr,
    CHANNEL_COLUMNS: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: (chunk of steps, block of channels), backwards: the sums read the last ones last."""
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk, block = part // blocks, part % blocks
    length = length_div * LENGTH_ALIGN
    SPAN: tl.constexpr = WIDE if CHANNEL_COLUMNS else HIGH
    channel = block * SPAN + tl.arange(0, SPAN)
    if x is not None:
        centre = _per_channel(mean, channel, channels, CHANNEL_COLUMNS)
    if grad_of_grad is not None:
        d_1 = _per_channel(coefficients + 2 * channels, channel, channels, CHANNEL_COLUMNS)
        if ggx is not None:
            d_u = _per_channel(coefficients, channel, channels, CHANNEL_COLUMNS)
        if x is not None:
            d_x = _per_channel(coefficients + channels, channel, channels, CHANNEL_COLUMNS)
    if grad_x is not None:
        x_g = _per_channel(coefficients + 3 * channels, channel, channels, CHANNEL_COLUMNS)
        if TRAINING:
            x_1 = _per_channel(coefficients + 6 * channels, channel, channels, CHANNEL_COLUMNS)
            x_x = _per_channel(coefficients + 5 * channels, channel, channels, CHANNEL_COLUMNS)
            if ggx is not None:
                x_u = _per_channel(coefficients + 4 * channels, channel, channels, CHANNEL_COLUMNS)
    for start in range(CHUNK):
        step = chunk * CHUNK + start + tl.arange(0, 1)
        offset, mask = _tile(
            step, channel, outer, channels, length, row_tiles, CHANNEL_COLUMNS, HIGH, WIDE
        )
        if output is not None:
            out = tl.load(output + offset, mask=mask, other=0.0)
        if grad is not None:
            g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
            if output is not None:
                g = _masked(g, out)
        if ggx is not None:
            u = tl.load(ggx + offset, mask=mask, other=0.0).to(tl.float32)
        if x is not None:
            centred = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) - centre
        if grad_of_grad is not None:
            value = tl.zeros((1, HIGH, WIDE), tl.float32) + d_1
            if x is not None:
                value += d_x * centred
            if ggx is not None:
                value += d_u * u
            if output is not None:
                value = _masked(value, out)
            tl.store(grad_of_grad + offset, value, mask=mask)
        if grad_x is not None:
            value = x_g * g
            if TRAINING:
                value += x_x * centred + x_1
                if ggx is not None:
                    value += x_u * u
            tl.store(grad_x + offset, value, mask=mask)


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    output: Tensor | None,
    training: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_weight, need_bias = needs
    x, grad, output = _alike(x, grad, output)
    weight, mean, invstd = _vectors(weight, mean, invstd)
    walk = _walk(_memory(x), x.element_size(), x.device)
    sum_x = need_weight or (training and need_x)
    sum_g = need_bias or sum_x
    parts = walk.parts() if sum_g else None
    if sum_g:
        walk.launch(
            _batch_norm_sums_kernel,
            grad,
            output,
            x if sum_x else None,
            None,
            mean,
            parts,
            DEEP=DEEP,
        )
    coefficients = walk.empty(7)
    parameters = mean if weight is None else weight
    grad_weight = torch.empty_like(parameters) if need_weight else None
    grad_bias = torch.empty_like(parameters) if need_bias else None
    walk.finish(
        _batch_norm_backward_finish_kernel,
        parts,
        weight,
        invstd,
        coefficients,
        grad_weight,
        grad_bias,
        TRAINING=training,
        G=sum_g,
        X=sum_x,
    )
    grad_x = None
    if need_x:
        grad_x = torch.empty_like(x)
        walk.launch(
            _batch_norm_apply_kernel,
            grad,
            output,
            x if training else None,
            None,
            mean,
            coefficients,
            None,
            grad_x,
            TRAINING=training,
        )
    return grad_x, grad_weight, grad_bias


def batch_norm_double_backward(
    grad_grad_x: Tensor | None,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    output: Tensor | None,
    training: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_grad, need_x, need_weight = needs
    x, grad, output, ggx = _alike(x, grad, output, grad_grad_x)
    weight, mean, invstd, ggw, ggb = _vectors(
        weight, mean, invstd, grad_grad_weight, grad_grad_bias
    )
    walk = _walk(_memory(x), x.element_size(), x.device)
    # Where what was differentiated does not depend on x, grad_x is 0.
    x_matters = ggw is not None or (training and ggx is not None)
    write_x = need_x and x_matters
    sum_g = need_weight and ggx is not None
    sum_u, sum_x = sum_g, False
    if training:
        sum_g = sum_g or write_x
        sum_u = ggx is not None and (need_grad or sum_g)
        sum_x = sum_g or sum_u
    parts = walk.parts() if sum_g or sum_u else None
    if parts is not None:
        walk.launch(
            _batch_norm_sums_kernel,
            grad if sum_g else None,
            output if sum_g else None,
            x if sum_x else None,
            ggx if sum_u else None,
            mean,
            parts,
            DEEP=DEEP,
        )
    coefficients = walk.empty(7)
    parameters = mean if weight is None else weight
    grad_weight = torch.empty_like(parameters) if need_weight else None
    walk.finish(
        _batch_norm_double_backward_finish_kernel,
        parts,
        weight,
        invstd,
        ggw,
        ggb,
        coefficients,
        grad_weight,
        TRAINING=training,
        G=sum_g,
        U=sum_u,
        X=sum_x,
    )
    grad_of_grad = torch.empty_like(grad) if need_grad else None
    grad_x = torch.empty_like(x) if write_x else None
    if need_grad or write_x:
        walk.launch(
            _batch_norm_apply_kernel,
            grad if write_x else None,
            output,
            x if x_matters and (need_grad or training) else None,
            ggx if need_grad or training else None,
            mean,
            coefficients,
            grad_of_grad,
            grad_x,
            TRAINING=training,
        )
    if need_x and not x_matters:
        grad_x = torch.zeros_like(x)
    return grad_of_grad, grad_x, grad_weight


def _alike(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """The tensors in one dense memory layout, that of ``x``.

    Kernels read them by the same offsets, 16 bytes at a time. Copied is only an expanded gradient,
    or one that a layer sends back in another layout than it got; and an ``x`` with gaps.
    """
    x = x.resolve_neg()
    if _memory(x) is None:
        x = x.clone()
    result: list[Tensor | None] = [x]
    for other in others:
        if other is not None:
            other = other.resolve_neg()
            if not _same_strides(x, other):
                other = torch.empty_like(x, dtype=other.dtype).copy_(other)
        result.append(other)
    return result


def _vectors(*values: Tensor | None) -> list[Tensor | None]:
    """Contiguous: the gradient of a parameter may be expanded."""
    return [None if v is None else v.resolve_neg().contiguous() for v in values]


def _same_strides(x: Tensor, other: Tensor) -> bool:
    strides = zip(x.shape, x.stride(), other.stride(), strict=True)
    return all(mine == others for size, mine, others in strides if size > 1)


def _memory(x: Tensor) -> tuple[int, int, int] | None:
    """``(outer, channels, inner)`` of a dense tensor; None where it has gaps or overlaps.

    Of any strides: the order of the positions does not matter as long as all tensors share it.
    """
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return None
            expected *= size
    channels = x.shape[1]
    inner = x.stride(1) if channels > 1 else expected
    return expected // (channels * inner), channels, inner


class _Walk:
    """How the kernels walk through tensors of ``memory = (outer, channels, inner)``."""

    def __init__(self, memory: tuple[int, int, int], itemsize: int, device: torch.device) -> None:
        self.device = device
        outer, self.channels, inner = memory
        self.inverse_count = 1 / (outer * inner)
        channel_columns = inner == 1
        columns = self.channels if channel_columns else inner
        align = alignment(columns)
        # Elements of odd rows are loaded one by one, with a pointer each.
        rows = WARPS if align > 1 else WARPS // 2
        widest = 512 // itemsize  # one warp of 16-byte loads
        if channel_columns:
            # One cache line: of many blocks of channels, each can have many positions.
            wide = min(widest // 4, next_power_of_2(columns))
            high = min(rows * widest // wide, next_power_of_2(outer))
            row_tiles, steps = 1, cdiv(outer, high)
            positions, self.blocks = high, cdiv(self.channels, wide)
        else:
            # Less than a warp where that would leave more than a quarter of the lanes idle.
            widths = [w for w in (widest, widest // 2, widest // 4) if w < 2 * columns]
            wide = min(
                widths or [next_power_of_2(columns)],
                key=lambda w: (max(3 * cdiv(columns, w) * w, 4 * columns), -w),
            )
            high = min(rows * widest // wide, next_power_of_2(self.channels))
            row_tiles = cdiv(columns, wide)
            steps = outer * row_tiles
            positions, self.blocks = wide, cdiv(self.channels, high)
        chunk = max(DEEP, MIN_POSITIONS // positions)
        while (
            2 * chunk * positions <= MAX_POSITIONS
            and self.blocks * cdiv(steps, 2 * chunk) >= PROGRAMS
        ):
            chunk *= 2
        self.chunks = cdiv(steps, chunk)
        self._sizes = (outer, self.channels, columns // align, row_tiles, self.blocks)
        self._constants = {
            "LENGTH_ALIGN": align,
            "CHANNEL_COLUMNS": channel_columns,
            "HIGH": high,
            "WIDE": wide,
            "CHUNK": chunk,
        }

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, self.channels, dtype=torch.float32, device=self.device)

    def parts(self) -> Tensor:
        return self.empty(self.chunks, 5)

    def launch(self, kernel, *tensors: Tensor | None, **constants: int) -> None:
        launch(
            kernel,
            (self.chunks * self.blocks,),
            self.device,
            *tensors,
            *self._sizes,
            **constants,
            **self._constants,
            num_warps=WARPS,
            maxnreg=MAX_REGISTERS,
        )

    def finish(self, kernel, *tensors: Tensor | None, **constants: bool) -> None:
        launch(
            kernel,
            (cdiv(self.channels, FINISH_CHANNELS),),
            self.device,
            *tensors,
            self.channels,
            self.chunks,
            self.inverse_count,
            **constants,
            PARTS=FINISH_PARTS,
            WIDE=FINISH_CHANNELS,
            num_warps=WARPS,
            maxnreg=MAX_REGISTERS,
        )


_walk = functools.lru_cache(maxsize=1024)(_Walk)  # host time of every call
