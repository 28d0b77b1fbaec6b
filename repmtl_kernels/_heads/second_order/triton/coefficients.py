"""Between the two passes: the sums, gradients of the parameters, and coefficients per channel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["chunks"])
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
    G: tl.constexpr,  # which sums were made: with g, with x
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


@triton.jit(do_not_specialize=["chunks"])
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
    G: tl.constexpr,  # which sums were made: with g, with u, with x
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
        a = sum_ug * inverse_count - mean_u * mean_g - mean_ux * mean_gx
        e = v - k * mean_ux
        along_x = e * mean_gx - k * mean_ux * mean_gx + k * a
        tl.store(coefficients + channels, scale * e, mask=inside)
        tl.store(coefficients + 2 * channels, s - k * mean_u, mask=inside)
        tl.store(coefficients + 3 * channels, scale * e, mask=inside)
        tl.store(coefficients + 4 * channels, -scale * k * mean_gx, mask=inside)
        tl.store(coefficients + 5 * channels, -scale * scale * along_x, mask=inside)
        shift = scale * (k * mean_gx * mean_u - e * mean_g)
        tl.store(coefficients + 6 * channels, shift, mask=inside)
        if grad_weight is not None:
            tl.store(grad_weight + channel, scale * (a / inverse_count), mask=inside)
    else:
        tl.store(coefficients + channels, scale * v, mask=inside)
        tl.store(coefficients + 2 * channels, s, mask=inside)
        tl.store(coefficients + 3 * channels, scale * v, mask=inside)
        if grad_weight is not None:
            tl.store(grad_weight + channel, scale * sum_ug, mask=inside)


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
    """Add the partial sums in a fixed order; 0 for a sum that was not needed."""
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
