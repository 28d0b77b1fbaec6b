"""Rates of an H200, and the time that the counts of a launch take at each of them.

Nothing here was measured by this project. The copy and matrix rates are those of the floors
(``benchmarks/floors.py``), as measured on such a card. All else is an assumption, near to what
NVIDIA's documentation and public measurements of Hopper say, until a card has been measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

COPY_GBS = 4300.0
# The L2 cache, slow and fast: it is somewhere between them.
L2_GBS = (6000.0, 8000.0)
MATMUL_TFLOPS = {"bfloat16": 790.0, "tf32": 395.0}
# Part of the rate that products of a warp (mma) reach, instead of a warpgroup (wgmma).
OF_WARP = 0.62
MULTIPROCESSORS = 132
CLOCK_GHZ = 1.755  # under load; the card's limit is 1.98
# A multiprocessor's share in one clock.
SHARED_BYTES = 128
L2_PORT_BYTES = 64
WARPS_PER_CLOCK = {
    "issue": 4.0,
    "fp32": 4.0,
    "int": 2.0,
    "conversion": 2.0,
    "special": 0.5,
    "shuffle": 1.0,
    "memory": 1.0,
}
# From the end of one kernel to the end of an empty one after it, in one stream or graph.
LAUNCH_US = 2.0

REGISTERS, WARPS, CTAS = 65536, 64, 32
SHARED_LIMIT, SHARED_RESERVED = 228 * 1024, 1024  # of a multiprocessor; for each CTA


class Launch(NamedTuple):
    """Counts of a whole launch: the CTAs that were sampled, times how many they stand for.

    flop: by instruction and type, as ``wgmma tf32``; issued: instructions of a warp by class; the
    bytes of shared memory: of wavefronts, conflicts among them, and of the operands of products.
    """

    ctas: int
    resident: int  # CTAs of a multiprocessor at a time
    dram_bytes: float
    l2_bytes: float
    shared_bytes: float
    flop: dict[str, float]
    issued: dict[str, float]
    latency_clocks: float = 0  # of one CTA alone


def resident(threads: int, registers: int, shared: int) -> int:
    """Return how many CTAs one multiprocessor has at a time."""
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    limits = [CTAS, WARPS // warps, SHARED_LIMIT // (shared + SHARED_RESERVED)]
    if registers:
        # Warps take registers of one of four partitions.
        limits.append(4 * (REGISTERS // 4 // of_warp) // warps)
    return max(1, min(limits))


def waves(launch: Launch) -> float:
    """Return how often the CTAs fill all multiprocessors."""
    return launch.ctas / (MULTIPROCESSORS * launch.resident)


def times_us(launch: Launch, l2_gbs: float) -> dict[str, float]:
    """Return the microseconds that a launch needs of each resource, if it has the others free.

    The busiest multiprocessor counts: it has ``ceil(CTAs / multiprocessors)`` of them.
    """
    share = math.ceil(launch.ctas / MULTIPROCESSORS) / launch.ctas  # of the busiest
    clocks = {
        name: sum(launch.issued.values()) if name == "issue" else launch.issued.get(name, 0)
        for name in WARPS_PER_CLOCK
    }
    of_multiprocessor = {name: n / WARPS_PER_CLOCK[name] for name, n in clocks.items()}
    of_multiprocessor["shared"] = launch.shared_bytes / SHARED_BYTES
    of_multiprocessor["l2 port"] = launch.l2_bytes / L2_PORT_BYTES
    matrix = sum(flop / _matrix_rate(name) for name, flop in launch.flop.items())
    return {
        "dram": launch.dram_bytes / COPY_GBS / 1e3,
        "l2": launch.l2_bytes / l2_gbs / 1e3,
        "matrix": matrix * MULTIPROCESSORS * share,
        **{name: n * share / CLOCK_GHZ / 1e3 for name, n in of_multiprocessor.items()},
        "latency": math.ceil(waves(launch)) * launch.latency_clocks / CLOCK_GHZ / 1e3,
    }


def _matrix_rate(name: str) -> float:
    """Return FLOP in a microsecond of the whole card."""
    instruction, kind = name.split()
    rate = MATMUL_TFLOPS["tf32" if kind == "tf32" else "bfloat16"] * 1e6
    return rate * (OF_WARP if instruction == "mma" else 1)
