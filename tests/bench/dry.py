"""A GPU's stand-in for the commands of ``benchmarks.gpu_run``: ``python dry.py -m MODULE WORDS``.

Tensors are on the CPU, the PTX machine runs the kernels as compiled for sm_90, shapes are tiny, and
each contestant is timed once.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

# Channels, height and width, of two tasks and two samples.
TINY = {"nyuv2": (24, 4, 4), "cityscapes": (32, 2, 4)}
CASES = (("tsr_loss", False), ("rep_mtl_loss", True))
HELD = contextlib.ExitStack()  # until the process ends
CACHE = "TRITON_CACHE_DIR"
TEST = "tests/backends/test_cuda.py"


def main(words: list[str]) -> None:
    if words[0] == "setup.py":  # without the build, which others of this checkout may use
        words.append("--help")
    elif words[:2] == ["-m", "pytest"]:  # without the others
        words[words.index("tests")] = TEST
        words += ["-p", "no:cacheprovider", *(["-n", "0"] if "-n" in words else [])]
    elif words[0] == "-m":
        pretend()
    sys.argv = words[words[0] == "-m" :]
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def pretend() -> None:
    sys.path.append(str(Path(__file__).parents[1]))
    os.environ.pop("TRITON_INTERPRET", None)
    from ptx import driver

    from benchmarks import cases, ceilings, l2, machine, shapes
    from benchmarks.parts import kernels, stages
    from benchmarks.tune import cases as tuned
    from benchmarks.tune import measuring
    from repmtl_kernels.backends.triton.tiles import Tile

    kept = os.environ.get(CACHE)
    HELD.enter_context(driver.driver(90, races=False))
    # Processes that compile make machine code, which the PTX machine can't run: not into its cache.
    os.environ.pop(CACHE, None)
    if kept is not None:
        os.environ[CACHE] = kept
    once = cases.Effort(0.0, 1, 1)
    whole = dict(shapes.SHAPES)
    shapes.SHAPES.clear()
    for name, (c, h, w) in TINY.items():
        tiny = replace(whole[name], tasks=2, batch=2, channels=c, height=h, width=w)
        shapes.SHAPES[name] = tiny
    stages.EFFORTS["cuda"] = kernels.EFFORTS["cuda"] = measuring.EFFORT = once
    stages.TARGET_SHAPES, stages.OTHER = ("nyuv2",), stages.OTHER[-1:]
    kernels.DECISIVE = tuple((f, cases.BFLOAT16, ("nyuv2",), also) for f, also in CASES)
    kernels.PRECISIONS, kernels.LAYOUTS = {"cuda": ()}, ()
    tuned.candidates = lambda *_: (Tile(64, 64, 32, 4, 2, tma=True),)
    ceilings.NUMBERS["cuda"], ceilings.SIDE["cuda"] = 1 << 12, 16
    cases.MAX_INPUT_SETS = 1
    cases.backends = lambda precision, device: ["eager", "triton"]
    machine.busy_cores = lambda: 0.0
    torch.compile = lambda function, **_: function
    torch._dynamo = SimpleNamespace(reset=lambda: None)  # its import takes seconds
    torch.use_deterministic_algorithms = _nothing  # the same
    torch.Generator = lambda device, real=torch.Generator: real()
    for name, stand_in in DEVICE.items():
        setattr(torch.cuda, name, stand_in)
    cache = 4 * l2.BLOCK * ceilings.L2_SHARE
    properties = SimpleNamespace(L2_cache_size=cache, multi_processor_count=1)
    torch.cuda.get_device_properties = lambda device: properties
    HELD.enter_context(OnTheCPU())


class OnTheCPU(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class Event:
    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Stream:
    device_index = 0

    def __init__(self, device: torch.device) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...


class Graph:
    """Replays leave the results of the capture."""

    def replay(self) -> None: ...


def _nothing(*_, **__) -> None: ...


@contextlib.contextmanager
def _within(*_, **__):
    yield


DEVICE = {
    "is_available": lambda: True,
    "get_device_name": lambda device=None: "dry",
    "get_device_capability": lambda device=None: (9, 0),
    "Event": Event,
    "Stream": Stream,
    "CUDAGraph": Graph,
    "stream": _within,
    "graph": _within,
    "current_stream": Stream,
    "graph_pool_handle": _nothing,
    "synchronize": _nothing,
    "empty_cache": _nothing,
    "set_sync_debug_mode": _nothing,
    "memory_allocated": lambda device: 0,
    "max_memory_allocated": lambda device: 1 << 20,
    "reset_peak_memory_stats": _nothing,
}


if __name__ == "__main__":
    main(sys.argv[1:])
