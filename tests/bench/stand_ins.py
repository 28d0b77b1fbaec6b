"""Small cases and made-up heads of result files, for the tests of the benchmark."""

from __future__ import annotations

import torch

from benchmarks.cases import Effort
from benchmarks.part import Run
from benchmarks.shapes import Shape
from repmtl_kernels import available_backends

CPU = torch.device("cpu")
BUILT = {"native"} & set(available_backends())
SMALL = Shape("office49", 2, 3, 8, 4, 4, 3, "test")
CEILINGS = {"copy_gbs": 30.0, "matmul_tflops": {"float32": 0.1}}
EFFORT = Effort(seconds=0.01, min_rounds=2, max_rounds=2)
HEAD = {
    "machine": {
        "name": "cpu-2core", "cpu": "A CPU", "cores": 2, "threads": 2, "memory_gb": 8.0,
        "busy_cores_before": 0,
    },
    "versions": {"torch": "2.13.0"},
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
    "measured": CEILINGS,
}  # fmt: skip
GPU_HEAD = {
    **HEAD,
    "machine": {"name": "h200", "gpu": "NVIDIA H200"},
    "measured": {"copy_gbs": 4000.0, "matmul_tflops": {"bfloat16": 700.0}},
}


def new_run(name: str = "part", **options) -> Run:
    """Return a run of a part on the CPU that saves nothing unless it has a folder."""
    return Run(name, CPU, HEAD, **{"folder": None, **options})
