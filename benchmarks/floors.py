"""Counted bytes and FLOPs of the factored algorithm, and the least time they can take.

The floor of a call is the sum over its passes of ``max(bytes / copy rate, FLOPs / matmul rate)``,
with both rates measured on the same machine in the same run. It is a floor for every contestant:
the literal equations move and compute far more.

The losses are counted as the passes that no implementation can do without; a stage is counted with
everything that its contract has it read and write (``repmtl_kernels/backends/contract.py``).
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
    """How the hardware computes matrix products.

    gram: side of the output tiles (the Gram matrix is computed in full tiles on and below its
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
# Bytes of a number that is computed from the saliencies.
SUM = 4
# Bytes of an inner product of two tasks' saliencies.
PRODUCT = 8


def forward_passes(function: str, shape: Shape, itemsize: int, tiling: Tiling) -> list[Pass]:
    """Return the statistics pass and, with CSA, the Gram pass with the anchor product fused."""
    read = shape.elements * itemsize
    statistics = Pass(read * (1 + tiling.partials), 0)
    if function == "tsr_loss":
        return [statistics]
    return [statistics, Pass(read, _gram_flops(shape, tiling))]


def _gram_flops(shape: Shape, tiling: Tiling) -> float:
    """Count half of the Gram matrices, the smaller ones, and the products with the anchors."""
    small, large = sorted((shape.channels, shape.positions))
    tile = tiling.tile(small)
    tiles = math.ceil(small / tile)
    samples = shape.tasks * shape.batch
    gram = samples * tiles * (tiles + 1) * tile**2 * large  # 2 FLOPs each
    return gram + 2 * shape.elements * max(shape.tasks, tiling.anchors)


def backward_passes(function: str, shape: Shape, itemsize: int, tiling: Tiling) -> list[Pass]:
    """Return the passes of the anchors' gradient and of dS; TSR's is an expanded view."""
    if function == "tsr_loss":
        return []
    read = shape.elements * itemsize
    small, large = sorted((shape.channels, shape.positions))
    tile = tiling.tile(small)
    padded = math.ceil(small / tile) * tile
    samples = shape.tasks * shape.batch
    work = 2 * samples * padded * small * large
    return [Pass(read, 0), Pass(2 * read + _matrix_bytes(shape, itemsize), work)]


def _matrix_bytes(shape: Shape, itemsize: int) -> int:
    """Count the bytes of the Gram matrices that the backward reads."""
    return shape.tasks * shape.batch * min(shape.channels, shape.positions) ** 2 * itemsize


def passes(function: str, shape: Shape, itemsize: int, direction: str, t: Tiling) -> list[Pass]:
    forward = forward_passes(function, shape, itemsize, t)
    both = direction != "forward"
    return forward + (backward_passes(function, shape, itemsize, t) if both else [])


def statistics(
    shape: Shape, itemsize: int, tiling: Tiling, *, positions: bool, channels: bool
) -> list[Pass]:
    samples = shape.tasks * shape.batch
    written = positions * shape.positions + channels * (shape.channels + 1)
    read = shape.elements * itemsize * (1 + tiling.partials)
    return [Pass(read + SUM * samples * written, 0)]


def affinity(shape: Shape, itemsize: int, tiling: Tiling) -> list[Pass]:
    """Read the saliencies once; multiply each task's with its own and with those after it."""
    written = PRODUCT * shape.batch * shape.tasks**2
    return [Pass(shape.elements * itemsize + written, shape.elements * (shape.tasks + 1))]


def entropy(shape: Shape, itemsize: int, tiling: Tiling, *, with_grad: bool) -> list[Pass]:
    """Logarithms are not counted."""
    numbers = shape.tasks * shape.batch * shape.positions
    return [Pass(SUM * numbers * (1 + with_grad), 0)]


def anchors(shape: Shape, itemsize: int, tiling: Tiling, *, with_grad: bool) -> list[Pass]:
    """Count half of the products of a sample's anchors, and the sums that they weigh."""
    numbers = shape.tasks * shape.batch * shape.channels
    flops = numbers * (shape.tasks + 1) + with_grad * 2 * numbers * shape.tasks
    return [Pass(SUM * (numbers * (2 + with_grad) + shape.batch), flops)]


def gram(shape: Shape, itemsize: int, tiling: Tiling, *, with_grad: bool) -> list[Pass]:
    """Read saliencies and anchors; write the Gram matrices and the projections where wanted."""
    small = min(shape.channels, shape.positions)
    samples = shape.tasks * shape.batch
    moved = shape.elements * itemsize + SUM * samples * (shape.channels + 4)
    if with_grad:
        moved += _matrix_bytes(shape, itemsize) + SUM * samples * shape.tasks * small
    return [Pass(moved, _gram_flops(shape, tiling))]


def contrast(
    shape: Shape, itemsize: int, tiling: Tiling, *, with_grad: bool, total: int | None = None
) -> list[Pass]:
    """Compare the batch with all of ``total`` samples, itself among them; None: against each other.

    Products of any two samples, once for both. Then a pass of its own for the gradient's sums of
    all anchors, since each weight needs a finished sum of exponentials.
    """
    batch, numbers = shape.batch, shape.tasks * shape.channels  # of a sample
    total = batch if total is None else total
    of_two = 2 * shape.tasks * numbers
    pairs = batch * (total - batch) + batch * (batch - 1) // 2
    work = [Pass(SUM * (total * numbers + batch), of_two * pairs)]
    if with_grad:  # also reads radial, factor and all log-sum-exps
        moved = total * (numbers + 1) + batch * (2 * numbers + 1)
        work.append(Pass(SUM * moved, of_two * batch * (total - 1)))
    return work


def saliency_grad(shape: Shape, itemsize: int, tiling: Tiling) -> list[Pass]:
    return backward_passes("csa_loss", shape, itemsize, tiling)


def literal_flops(function: str, shape: Shape) -> float:
    """Count the literal equations, forward and backward: three products with C x C affinities."""
    if function == "tsr_loss":
        return 0
    return 6 * shape.elements * shape.channels


def matmul_rate(rates: dict[str, float], precision: str) -> float:
    """Return the TFLOP/s of a precision; tf32x3 makes three products of tf32."""
    return rates["tf32"] / 3 if precision == "tf32x3" else rates[precision]


def floor_ms(work: list[Pass], copy_gbs: float, matmul_tflops: float) -> float:
    """Return the least milliseconds of the passes at GB/s (1e9 bytes) and TFLOP/s (1e12)."""
    return sum(max(p.bytes / (copy_gbs * 1e6), p.flops / (matmul_tflops * 1e9)) for p in work)
