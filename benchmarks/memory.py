"""Peak extra memory of one call: what PyTorch's allocator held at most, over what it held before.

Both devices are measured at the allocator, so they compare; scratch that a library takes for itself
(workspaces of a BLAS on the CPU) is not in it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak of one call, with its results as long as the call holds them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [ProfilerActivity.CPU]
    with _silent_stderr(), profile(activities=cpu, profile_memory=True) as profiled:
        call()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":  # one per allocation (> 0) and release (< 0), in order
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop stderr, where the profiler's C++ logger reports each start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
