"""Counted bytes and FLOPs of the factored algorithm, and the least time they can take.

The floor of a call is the sum over its passes of ``max(bytes / copy rate, FLOPs / matmul rate)``,
with both rates measured on the same machine in the same run. It is a floor for every contestant:
the literal equations move and compute far more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.shapes import Shape


class Pass(NamedTuple):
    """One pass over the saliencies, where reading and computing can overlap."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Tiling:
    """What the hardware makes of the matrix products.

    gram: side of the output tiles (the Gram matrix is computed in whole tiles on and below its
        diagonal); anchors: least width of a product with the T anchors; partials: extra share of
        bytes that the two-stage statistics write.
    """

    gram: int
    anchors: int
    partials: float

    def tile(self, side: int) -> int:
        return min(self.gram, max(self.anchors, 1 << (side - 1).bit_length()))


TENSOR_CORES = Tiling(gram=128, anchors=16, partials=0.025)
EXACT = Tiling(gram=1, anchors=1, partials=0.0)


def forward_passes(function: str, shape: Shape, itemsize: int, tiling: Tiling) -> list[Pass]:
    """The statistics pass and, with CSA, the Gram pass with the anchor product fused."""
    read = shape.elements * itemsize
    statistics = Pass(read * (1 + tiling.partials), 0)
    if function == "tsr_loss":
        return [statistics]
    small, large = sorted((shape.channels, shape.positions))
    tile = tiling.tile(small)
    tiles = math.ceil(small / tile)
    samples = shape.tasks * shape.batch
    gram = samples * tiles * (tiles + 1) * tile**2 * large  # half of the matrix, 2 FLOPs each
    anchors = 2 * shape.elements * max(shape.tasks, tiling.anchors)
    return [statistics, Pass(read, gram + anchors)]


def backward_passes(function: str, shape: Shape, itemsize: int, tiling: Tiling) -> list[Pass]:
    """The pass for the anchors' gradient, and the one that reads S and the Gram and writes dS.

    TSR's gradient is constant along the channels: an expanded view with nothing to write.
    """
    if function == "tsr_loss":
        return []
    read = shape.elements * itemsize
    small, large = sorted((shape.channels, shape.positions))
    tile = tiling.tile(small)
    padded = math.ceil(small / tile) * tile
    samples = shape.tasks * shape.batch
    gram_bytes = samples * small**2 * itemsize
    return [Pass(read, 0), Pass(2 * read + gram_bytes, 2 * samples * padded * small * large)]


def passes(
    function: str, shape: Shape, itemsize: int, direction: str, tiling: Tiling
) -> list[Pass]:
    forward = forward_passes(function, shape, itemsize, tiling)
    if direction == "forward":
        return forward
    return forward + backward_passes(function, shape, itemsize, tiling)


def floor_ms(work: list[Pass], copy_gbs: float, matmul_tflops: float) -> float:
    """Least time of the passes in milliseconds at GB/s (1e9 bytes) and TFLOP/s (1e12)."""
    return sum(max(p.bytes / (copy_gbs * 1e6), p.flops / (matmul_tflops * 1e9)) for p in work)
