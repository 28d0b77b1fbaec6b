"""The parts of the benchmark, one file each: what is measured, its tables and its pictures."""

from benchmarks.parts import (
    compatibility,
    kept,
    kernels,
    libmtl,
    predicted,
    quality,
    scaling,
    second_order,
    stages,
    static,
    steps,
)

# In the order of a run.
PARTS = (
    kernels.PART,
    steps.PART,
    libmtl.PART,
    quality.PART,
    stages.PART,
    second_order.PART,
    kept.PART,
    scaling.PART,
    quality.BENCH,
    quality.GROUPING,
    quality.RECOMMENDATION,
    static.PART,
    predicted.PART,
    compatibility.PART,
)
