"""Shared by both passes over the tensors: tiles, numbers per channel, the mask of the ReLU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def masked(values, output):
    """Return ``values`` where the ReLU passed, else 0; as in PyTorch, it passes NaN."""
    return tl.where(output <= 0, 0.0, values)


@triton.jit
def per_channel(values, channel, channels, CHANNEL_COLUMNS: tl.constexpr):
    """Load one float32 for each channel, in the form that broadcasts over (step, HIGH, WIDE)."""
    loaded = tl.load(values + channel, mask=channel < channels, other=0.0).to(tl.float32)
    if CHANNEL_COLUMNS:
        return loaded[None, None, :]
    else:
        return loaded[None, :, None]


@triton.jit
def tile_of(
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
    """Return offsets and mask (steps, HIGH, WIDE) of these steps of one block of channels.

    A step is WIDE neighbours of HIGH channels in memory (outer, channels, length); or, with
    CHANNEL_COLUMNS, HIGH rows in memory (outer, length), where columns are the channels.
    """
    if CHANNEL_COLUMNS:
        row = step.to(tl.int64)[:, None] * HIGH + tl.arange(0, HIGH)[None, :]
        offset = row[:, :, None] * length + channel[None, None, :]
        mask = (row < outer)[:, :, None] & (channel < length)[None, None, :]
    else:
        # Divisions of 64 bits would be slow.
        sample = (step // row_tiles).to(tl.int64)[:, None]
        tile = (step % row_tiles).to(tl.int64)[:, None, None]
        column = tile * WIDE + tl.arange(0, WIDE)[None, None, :]
        row = sample * channels + channel[None, :]
        offset = row[:, :, None] * length + column
        inside = (sample < outer) & (channel < channels)[None, :]
        mask = inside[:, :, None] & (column < length)
    return offset, mask
