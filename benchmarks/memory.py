"""Peak extra memory of one call: what PyTorch's allocator held at most, over what it held before.

Both devices are measured at the allocator, so they compare; scratch that a library takes for itself
(workspaces of a BLAS on the CPU) is not in it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

# The profiler's C++ logger on stderr: every start and stop; and that a block from before the call
# was released during it, which is right not to count.
CHATTER = ("USDT:", "Memory block of unknown size was allocated before the profiling started")


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
    with _without_chatter(), profile(activities=cpu, profile_memory=True) as profiled:
        call()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":  # one per allocation (> 0) and release (< 0), in order
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Drop the lines of CHATTER from stderr; pass everything else on afterwards."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            for line in caught.read().decode(errors="replace").splitlines():
                if not any(known in line for known in CHATTER):
                    print(line, file=sys.stderr)
