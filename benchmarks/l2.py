"""A kernel that reads as fast as the L2 cache gives."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Numbers that a program has in flight: four loads of 16 bytes for each thread.
BLOCK = 4096
WARPS = 8


def read_by_all(source: Tensor, sums: Tensor) -> None:
    """Have each program read all of ``source``, whole blocks, and write the sum it has seen."""
    _read_kernel[(len(sums),)](source, sums, BLOCK, source.numel() // BLOCK, num_warps=WARPS)


@triton.jit
def _read_kernel(source, sums, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(BLOCKS):
        # Neighbours begin elsewhere: the L1 cache, which the loads pass by too, is no help.
        start = (program + step) % BLOCKS * BLOCK
        total += tl.load(source + start + lanes, cache_modifier=".cg")
    tl.store(sums + program, tl.sum(total))
