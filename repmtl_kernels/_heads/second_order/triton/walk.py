"""How the kernels walk through the tensors: sizes of tiles and grids, and the launches."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from repmtl_kernels.backends.triton.common import (
    TRITON_3_6,
    alignment,
    cdiv,
    launch,
    next_power_of_2,
)

WARPS = 4
# With no limit, the compiler spills a few registers for more occupancy on sm_100.
MAX_REGISTERS = 128
# How many tiles a program of the first pass loads at once. Triton 3.6 would not keep sums over
# them within a thread.
DEEP = 1 if TRITON_3_6 else 2
# Eight programs for each multiprocessor of a large GPU. Where there would be more, each one takes
# more steps instead, for fewer partial sums. With fewer than MIN_POSITIONS of a channel in a
# program, the partial sums would be a tenth of the bytes.
PROGRAMS = 1056
MIN_POSITIONS, MAX_POSITIONS = 64, 4096
FINISH_PARTS, FINISH_CHANNELS = 64, 16


def memory_of(x: Tensor) -> tuple[int, int, int] | None:
    """Return ``(outer, channels, inner)`` of a dense tensor; None where it has gaps or overlaps.

    The order of the positions in memory does not matter, as long as all tensors share it.
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


class Walk:
    """How the kernels walk through tensors of ``memory = (outer, channels, inner)``."""

    def __init__(self, memory: tuple[int, int, int], itemsize: int, device: torch.device) -> None:
        self.device = device
        outer, self.channels, inner = memory
        self.inverse_count = 1 / (outer * inner)
        channel_columns = inner == 1
        columns = self.channels if channel_columns else inner
        align = alignment(columns)
        # The elements of odd rows are loaded one by one, with a pointer for each.
        rows = WARPS if align > 1 else WARPS // 2
        widest = 512 // itemsize  # one warp of 16-byte loads
        if channel_columns:
            # One cache line for each row: with many blocks of channels, each has many positions.
            wide = min(widest // 4, next_power_of_2(columns))
            high = rows * widest // wide
            row_tiles, steps = 1, cdiv(outer, high)
            positions, self.blocks = high, cdiv(self.channels, wide)
        else:
            # Narrower than a warp where a warp would leave more than a quarter of its lanes idle.
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
        self._sizes = (outer, self.channels, columns // align, row_tiles, self.blocks, chunk)
        self._constants = {
            "LENGTH_ALIGN": align,
            "CHANNEL_COLUMNS": channel_columns,
            "HIGH": high,
            "WIDE": wide,
        }

    def empty(self, *shape: int) -> Tensor:
        """Allocate float32 numbers for each channel."""
        return torch.empty(*shape, self.channels, dtype=torch.float32, device=self.device)

    def parts(self) -> Tensor:
        """Allocate the partial sums."""
        return self.empty(self.chunks, 5)

    def launch(self, kernel: triton.JITFunction, *tensors: Tensor | None, **constants: int) -> None:
        """Launch a kernel over the tensors."""
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

    def finish(
        self, kernel: triton.JITFunction, *tensors: Tensor | None, **constants: bool
    ) -> None:
        """Launch a kernel over the channels."""
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


walk_of = functools.lru_cache(maxsize=1024)(Walk)  # saves host time in every call
