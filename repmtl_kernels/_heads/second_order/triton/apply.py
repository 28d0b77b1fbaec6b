"""The second pass over the tensors: results that are linear in them."""

from __future__ import annotations

import triton
import triton.language as tl

from repmtl_kernels._heads.second_order.triton.tiles import masked, per_channel, tile_of


@triton.jit(
    do_not_specialize=["outer", "length_div", "blocks", "chunk_steps"],
    do_not_specialize_on_alignment=["row_tiles"],
)
def _batch_norm_apply_kernel(
    grad,  # these four have one memory layout; None where not needed
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
    chunk_steps,
    TRAINING: tl.constexpr,
    LENGTH_ALIGN: tl.constexpr,
    CHANNEL_COLUMNS: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the results.

    Grid: (chunk of steps, block of channels), backwards: the last chunks that the first pass read
    are the ones that a cache still holds.
    """
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk, block = part // blocks, part % blocks
    length = length_div * LENGTH_ALIGN
    SPAN: tl.constexpr = WIDE if CHANNEL_COLUMNS else HIGH
    channel = block * SPAN + tl.arange(0, SPAN)
    if x is not None:
        centre = per_channel(mean, channel, channels, CHANNEL_COLUMNS)
    if grad_of_grad is not None:
        d_1 = per_channel(coefficients + 2 * channels, channel, channels, CHANNEL_COLUMNS)
        if ggx is not None:
            d_u = per_channel(coefficients, channel, channels, CHANNEL_COLUMNS)
        if x is not None:
            d_x = per_channel(coefficients + channels, channel, channels, CHANNEL_COLUMNS)
    if grad_x is not None:
        x_g = per_channel(coefficients + 3 * channels, channel, channels, CHANNEL_COLUMNS)
        if TRAINING:
            x_1 = per_channel(coefficients + 6 * channels, channel, channels, CHANNEL_COLUMNS)
            x_x = per_channel(coefficients + 5 * channels, channel, channels, CHANNEL_COLUMNS)
            if ggx is not None:
                x_u = per_channel(coefficients + 4 * channels, channel, channels, CHANNEL_COLUMNS)
    for start in range(chunk_steps):
        step = chunk * chunk_steps + start + tl.arange(0, 1)
        offset, mask = tile_of(
            step, channel, outer, channels, length, row_tiles, CHANNEL_COLUMNS, HIGH, WIDE
        )
        if output is not None:
            out = tl.load(output + offset, mask=mask, other=0.0)
        if grad is not None:
            g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
            if output is not None:
                g = masked(g, out)
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
                value = masked(value, out)
            tl.store(grad_of_grad + offset, value, mask=mask)
        if grad_x is not None:
            value = x_g * g
            if TRAINING:
                value += x_x * centred + x_1
                if ggx is not None:
                    value += x_u * u
            tl.store(grad_x + offset, value, mask=mask)
