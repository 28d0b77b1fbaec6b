"""The first pass over the tensors: partial sums of each channel."""

from __future__ import annotations

import triton
import triton.language as tl

from repmtl_kernels._heads.second_order.triton.tiles import masked, per_channel, tile_of


@triton.jit(
    do_not_specialize=["outer", "length_div", "blocks", "chunk_steps"],
    do_not_specialize_on_alignment=["row_tiles"],
)
def _batch_norm_sums_kernel(
    grad,  # these four have one memory layout; None where not needed
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
    chunk_steps,
    LENGTH_ALIGN: tl.constexpr,
    CHANNEL_COLUMNS: tl.constexpr,
    DEEP: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the partial sums of one chunk.

    Grid: (chunk of steps, block of channels), the blocks running fastest.
    """
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    length = length_div * LENGTH_ALIGN
    SPAN: tl.constexpr = WIDE if CHANNEL_COLUMNS else HIGH
    channel = block * SPAN + tl.arange(0, SPAN)
    if x is not None:
        centre = per_channel(mean, channel, channels, CHANNEL_COLUMNS)
    sum_g = tl.zeros((HIGH, WIDE), tl.float32)
    sum_gx = tl.zeros((HIGH, WIDE), tl.float32)
    sum_u = tl.zeros((HIGH, WIDE), tl.float32)
    sum_ux = tl.zeros((HIGH, WIDE), tl.float32)
    sum_ug = tl.zeros((HIGH, WIDE), tl.float32)
    for start in range(0, chunk_steps, DEEP):
        step = chunk * chunk_steps + start + tl.arange(0, DEEP)
        offset, mask = tile_of(
            step, channel, outer, channels, length, row_tiles, CHANNEL_COLUMNS, HIGH, WIDE
        )
        # All loads come first, to be under way together.
        if grad is not None:
            g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
            if output is not None:
                g = masked(g, tl.load(output + offset, mask=mask, other=0.0))
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
def _store_sum(parts, total, channel, channels, CHANNEL_COLUMNS: tl.constexpr):
    # Either columns are the channels and the sum runs over rows, or the reverse.
    tl.store(parts + channel, tl.sum(total, 0 if CHANNEL_COLUMNS else 1), mask=channel < channels)
