"""Entropy of the saliency distributions with its gradient (equations 5 and 6): TSR."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels.backends.contract import Entropy
from repmtl_kernels.backends.triton.common import cdiv, launch, next_power_of_2

WARPS = 4
# Elements of a block: 8 for each thread.
BLOCK = 1024
# Up to so many elements over tasks, one program with more warps takes all blocks: no sum of the
# programs' values is needed then, which would take as long.
ALONE, WARPS_ALONE = 1 << 14, 16

SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def _log_share(u, p, total):
    """Return ``log(u / total)``; 0 where u is 0, since 0 log 0 = 0.

    From ``p = u / total`` unless that underflows: the logarithms of tiny saliencies nearly cancel.
    """
    difference = tl.log(tl.where(u != 0, u, total)) - tl.log(total)
    return tl.where(p >= SMALLEST_NORMAL, tl.log(p), difference)


@triton.jit
def _abs_gradient(x, share, h, log_p, total):
    """Return ``d h / d x``. ``share = sum p`` is below 1 with eps, 0 for the zero distribution."""
    sign = (x > 0).to(tl.float32) - (x < 0).to(tl.float32)
    return (share - 1 - h - log_p) * sign / total


# Softmax with z = x / temperature - max: h = log sum exp z - mean z and d h / d x =
# p (mean z - z) / temperature, where means are over p. No logarithms are left to cancel. Where p is
# 0, z may be -inf, and the terms are 0.


@triton.jit(do_not_specialize=["length", "blocks"])
def _entropy_over_tasks_kernel(
    x,  # (T, length)
    grad,  # (T, length)
    value_parts,  # (programs,): sums of entropies / length
    length,
    blocks,  # of one program
    temperature,
    eps,
    TASKS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    TASK_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid: so many blocks of positions of all samples."""
    value = tl.zeros((WIDE,), tl.float32)
    for block in range(blocks):
        i = (tl.program_id(0) * blocks + block).to(tl.int64) * WIDE + tl.arange(0, WIDE)
        h = _entropy_over_tasks(
            x, grad, i, length, temperature, eps, TASKS, SOFTMAX, WITH_GRAD, TASK_BLOCK
        )
        value += tl.where(i < length, h, 0.0)
    tl.store(value_parts + tl.program_id(0), tl.sum(value, 0) / length)


@triton.jit
def _entropy_over_tasks(
    x,
    grad,
    i,
    length,
    temperature,
    eps,
    TASKS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    TASK_BLOCK: tl.constexpr,
):
    """Return the entropies at positions ``i``, and store their gradient."""
    t = tl.arange(0, TASK_BLOCK)[:, None]
    mask = (t < TASKS) & (i < length)[None, :]
    offset = t.to(tl.int64) * length + i[None, :]
    if SOFTMAX:
        z = tl.load(x + offset, mask=mask, other=float("-inf")) / temperature
        # Blocks end with positions that do not exist: 0 there, since -inf - -inf is NaN.
        z = tl.where((i < length)[None, :], z, 0.0)
        z -= tl.max(z, 0)[None, :]
        u = tl.exp(z)
        total = tl.sum(u, 0)
        p = tl.div_rn(u, total[None, :])
        z = tl.where(z != float("-inf"), z, 0.0)  # where p is 0, and for tasks that do not exist
        mean = tl.sum(p * z, 0)
        h = tl.log(total) - mean
    else:
        s = tl.load(x + offset, mask=mask, other=0.0)
        u = tl.abs(s)
        total = tl.sum(u, 0) + eps
        total = tl.where(total != 0, total, 1.0)
        p = tl.div_rn(u, total[None, :])
        log_p = _log_share(u, p, total[None, :])
        h = -tl.sum(p * log_p, 0)
    if WITH_GRAD:
        if SOFTMAX:
            g = p * (mean[None, :] - z) / temperature
        else:
            share = tl.sum(p, 0)
            g = _abs_gradient(s, share[None, :], h[None, :], log_p, total[None, :])
        tl.store(grad + offset, g / length, mask=mask)
    return h


@triton.jit(do_not_specialize=["rows"])
def _entropy_over_space_kernel(
    x,  # (rows, length): a row for each task and sample
    grad,  # (rows, length)
    value_parts,  # (rows,): entropy / rows
    rows,
    length,
    temperature,
    eps,
    SOFTMAX: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid: rows. Each pass reads the row again: it is in the cache."""
    row = x + tl.program_id(0).to(tl.int64) * length
    lane = tl.arange(0, WIDE)
    sums = tl.zeros((WIDE,), tl.float32)
    moments = tl.zeros((WIDE,), tl.float32)
    if SOFTMAX:
        largest = tl.full((WIDE,), float("-inf"), tl.float32)
        for n in range(0, length, WIDE):
            s = tl.load(row + n + lane, mask=n + lane < length, other=float("-inf"))
            largest = tl.maximum(largest, s / temperature)
        center = tl.max(largest, 0)
        for n in range(0, length, WIDE):
            mask = n + lane < length
            z = tl.load(row + n + lane, mask=mask, other=0.0) / temperature - center
            u = tl.where(mask, tl.exp(z), 0.0)
            sums += u
            moments += tl.where(u != 0, u * z, 0.0)  # z may be -inf
        total = tl.sum(sums, 0)
        mean = tl.sum(moments, 0) / total
        h = tl.log(total) - mean
    else:
        for n in range(0, length, WIDE):
            sums += tl.abs(tl.load(row + n + lane, mask=n + lane < length, other=0.0))
        mass = tl.sum(sums, 0)
        total = tl.where(mass + eps != 0, mass + eps, 1.0)
        share = tl.div_rn(mass, total)
        for n in range(0, length, WIDE):
            u = tl.abs(tl.load(row + n + lane, mask=n + lane < length, other=0.0))
            p = tl.div_rn(u, total)
            moments += p * _log_share(u, p, total)
        h = -tl.sum(moments, 0)
    tl.store(value_parts + tl.program_id(0), h / rows)
    if WITH_GRAD:
        target = grad + tl.program_id(0).to(tl.int64) * length
        for n in range(0, length, WIDE):
            mask = n + lane < length
            s = tl.load(row + n + lane, mask=mask, other=0.0)
            if SOFTMAX:
                z = s / temperature - center
                p = tl.div_rn(tl.exp(z), total)
                g = tl.where(p != 0, p * (mean - z), 0.0) / temperature
            else:
                u = tl.abs(s)
                log_p = _log_share(u, tl.div_rn(u, total), total)
                g = _abs_gradient(s, share, h, log_p, total)
            tl.store(target + n + lane, g / rows, mask=mask)


def batches_of_all_programs(tasks: int, positions: int) -> list[int]:
    """Return a batch that one program takes alone, if there is one, and one that it does not."""
    return [1, ALONE // (next_power_of_2(tasks) * positions) + 1]


def entropy(
    x: Tensor, *, over: str, normalizer: str, temperature: float, eps: float, with_grad: bool
) -> Entropy:
    """Return the mean entropy of the position means ``x`` and its gradient."""
    tasks, batch, positions = x.shape
    x = x.contiguous()
    grad = torch.empty_like(x) if with_grad else None
    numbers = float(temperature), float(eps)
    sizes: tuple[int, ...]
    constants = {"SOFTMAX": normalizer == "softmax", "WITH_GRAD": with_grad, "num_warps": WARPS}
    if over == "tasks":
        length = batch * positions
        task_block = next_power_of_2(tasks)
        wide, blocks = max(1, BLOCK // task_block), 1
        programs = cdiv(length, wide)
        if length * task_block <= ALONE:
            wide *= WARPS_ALONE // WARPS
            programs, blocks = 1, cdiv(length, wide)
            constants["num_warps"] = WARPS_ALONE
        sizes = length, blocks
        constants.update(TASKS=tasks, TASK_BLOCK=task_block, WIDE=wide)
        kernel = _entropy_over_tasks_kernel
    else:
        programs = tasks * batch
        sizes = programs, positions
        constants.update(WIDE=min(BLOCK, next_power_of_2(positions)))
        kernel = _entropy_over_space_kernel
    parts = torch.empty(() if programs == 1 else programs, dtype=torch.float32, device=x.device)
    launch(kernel, (programs,), x.device, x, grad, parts, *sizes, *numbers, **constants)
    return Entropy(parts if programs == 1 else parts.sum(), grad)
