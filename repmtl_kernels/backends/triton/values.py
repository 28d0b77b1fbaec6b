"""CSA and the total of both losses from their parts (equations 9 and 10)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from repmtl_kernels.backends.contract import Values
from repmtl_kernels.backends.triton.common import launch, next_power_of_2

BLOCK = 1024  # similarities of one step, whatever the batch


def values(
    similarity: Tensor,
    logsumexp: Tensor,
    present: Tensor | None,
    *,
    temperature: float,
    tsr: Tensor | None = None,
    lambdas: tuple[float, float] | None = None,
) -> Values:
    """Return CSA, its derivative with respect to the similarities, and the total."""
    tasks, batch = similarity.shape
    weight, csa = torch.empty_like(similarity), similarity.new_empty(())
    total = None if lambdas is None else similarity.new_empty(())
    task_block = next_power_of_2(tasks)
    launch(
        _values_kernel,
        (1,),
        similarity.device,
        similarity,
        logsumexp,
        None if present is None else present.contiguous(),
        tsr,
        weight,
        csa,
        total,
        batch,
        -1 / (batch * temperature),
        *(lambdas or (0.0, 0.0)),
        TASKS=tasks,
        TASK_BLOCK=task_block,
        WIDE=max(1, BLOCK // task_block),
        num_warps=4,
    )
    return Values(csa, weight, total)


@triton.jit(do_not_specialize=["tsr", "batch"])
def _values_kernel(
    similarity,  # (T, B)
    logsumexp,  # (B,)
    present,  # (T, B) bool: which tasks count for a sample; or None, all do
    tsr,  # (); or None
    weight,  # (T, B)
    csa,  # ()
    total,  # (); or None
    batch,
    of_sample,  # -1 / (B temperature)
    lambda_tsr,
    lambda_csa,
    TASKS: tl.constexpr,
    TASK_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid: one program, so that the order of the sums is fixed."""
    t = tl.arange(0, TASK_BLOCK)[:, None]
    lane = tl.arange(0, WIDE)
    negatives = tl.zeros((WIDE,), tl.float32)
    positives = tl.zeros((TASK_BLOCK, WIDE), tl.float32)
    for start in range(0, batch, WIDE):
        b = start + lane
        negatives += tl.load(logsumexp + b, mask=b < batch, other=0.0) / batch
        mask = (t < TASKS) & (b < batch)[None, :]
        pair = t.to(tl.int64) * batch + b[None, :]
        if present is None:
            w = tl.full((TASK_BLOCK, WIDE), 1.0, tl.float32) * (of_sample / TASKS)
        else:
            counts = tl.load(present + pair, mask=mask, other=0).to(tl.int32)
            count = tl.maximum(tl.sum(counts, 0), 1)
            w = counts.to(tl.float32) * (of_sample / count)[None, :]
        tl.store(weight + pair, w, mask=mask)
        positives += w * tl.load(similarity + pair, mask=mask, other=0.0)
    value = tl.sum(negatives) + tl.sum(positives)
    tl.store(csa, value)
    if total is not None:
        tl.store(total, lambda_tsr * tl.load(tsr) + lambda_csa * value)
