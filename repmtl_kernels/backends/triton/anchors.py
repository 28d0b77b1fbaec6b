"""Unit anchors (equation 8)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels._ground.saliency import in_factors
from repmtl_kernels.backends.contract import Anchors
from repmtl_kernels.backends.triton.common import (
    INTERPRET,
    alignment,
    fp32_precision,
    launch,
    next_power_of_2,
)
from repmtl_kernels.backends.triton.statistics import power_of_two

# Channels of one step of a product of anchors, and warps, by the side of its tile: what three
# products of tf32 parts leave registers for.
STEPS = {16: (64, 4), 32: (32, 4), 64: (16, 8), 128: (16, 8)}
# The same for anchors of few tasks, by their number: all their products have registers of their
# own, so that no step waits for another.
FEW_STEPS = {1: (1024, 4), 2: (1024, 4), 4: (512, 4)}


def anchors(a: Tensor, *, eps: float, with_grad: bool) -> Anchors:
    """Return the unit anchors of the channel means ``a``."""
    tasks, batch, channels = a.shape
    a = a.contiguous()
    align = alignment(channels)
    unit, factor = torch.empty_like(a), a.new_empty(batch)
    radial = torch.empty_like(a) if with_grad else None
    block = next_power_of_2(tasks)
    few = block in FEW_STEPS
    if not few:
        block = max(16, block)  # the least that a matrix product takes
    launch(
        _contrast_anchor_kernel,
        (batch,),
        a.device,
        a,
        unit,
        radial,
        factor,
        batch,
        channels // align,
        *in_factors(eps),
        CHANNELS_ALIGN=align,
        TASKS=tasks,
        TASK_BLOCK=block,
        FEW=few,
        PRECISION=product_precision(),
        **product_step(block, align, FEW_STEPS if few else STEPS),
    )
    return Anchors(unit, factor, radial)


def product_step(
    side: int, align: int, steps: Mapping[int, tuple[int, int]] = STEPS
) -> dict[str, int]:
    """Return the channels of one step and the warps, as arguments of a kernel.

    Half the channels where C is odd, since each element then has an address of its own.
    """
    wide, warps = steps[min(side, max(steps))]
    return {"WIDE": wide if align >= 4 else max(16, wide // 2), "num_warps": warps}


def product_precision() -> str:
    """Return ``input_precision`` of products of anchors: their rounding must not be TF32's."""
    return "ieee" if INTERPRET or fp32_precision() == "ieee" else "tf32x3"


@triton.jit(do_not_specialize=["batch"])
def _contrast_anchor_kernel(
    a,  # (T, B, C)
    anchors,  # (T, B, C): unit anchors
    radial,  # (T, B, C) or None
    factor,  # (B,)
    batch,
    channels_div,
    eps,
    root,  # the guard is eps (root scale)^2
    CHANNELS_ALIGN: tl.constexpr,
    TASKS: tl.constexpr,
    TASK_BLOCK: tl.constexpr,
    FEW: tl.constexpr,  # as many tasks as FEW_STEPS knows
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
    if FEW:
        products = _products_of_few(a, b, batch, channels, scale, TASKS, TASK_BLOCK, WIDE)
    else:
        products = tl.zeros((TASK_BLOCK, TASK_BLOCK), tl.float32)
        for c in range(0, channels, WIDE):
            mask = (t < TASKS) & (c + lane < channels)
            x = tl.load(a + offset + c, mask=mask, other=0.0) * scale
            products = tl.dot(x, tl.trans(x), products, input_precision=PRECISION)
    norm = tl.sqrt_rn(tl.sum(products * products))
    floor = eps * (root * scale) * (root * scale)
    clamped = tl.where(norm < floor, floor, norm)  # unlike a maximum, keeps NaN
    inverse = tl.where(norm != 0, 1 / tl.where(norm != 0, clamped, 1.0), 0.0)
    root = tl.sqrt_rn(inverse)
    tl.store(factor + b, scale * root)
    if radial is not None:
        products *= tl.where(norm < floor, 0.0, inverse)
    for c in range(0, channels, WIDE):
        mask = (t < TASKS) & (c + lane < channels)
        u = tl.load(a + offset + c, mask=mask, other=0.0) * scale * root
        tl.store(anchors + offset + c, u, mask=mask)
        if radial is not None:
            if FEW:
                along = tl.sum(products[:, :, None] * u[None, :, :], 1)
            else:
                along = tl.dot(products, u, input_precision=PRECISION)
            tl.store(radial + offset + c, along, mask=mask)


@triton.jit
def _products_of_few(
    a,
    b,
    batch,
    channels,
    scale,
    TASKS: tl.constexpr,
    TASK_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return the products (TASK_BLOCK, TASK_BLOCK) of a sample's scaled means."""
    t = tl.arange(0, TASK_BLOCK)
    rows = (t * batch + b) * channels
    lane = tl.arange(0, WIDE)[None, None, :]
    terms = tl.zeros((TASK_BLOCK, TASK_BLOCK, WIDE), tl.float32)
    for c in range(0, channels, WIDE):
        inside = c + lane < channels
        x = tl.load(
            a + rows[:, None, None] + c + lane, mask=inside & (t < TASKS)[:, None, None], other=0.0
        )
        y = tl.load(
            a + rows[None, :, None] + c + lane, mask=inside & (t < TASKS)[None, :, None], other=0.0
        )
        terms += (x * scale) * (y * scale)
    return tl.sum(terms, 2)
