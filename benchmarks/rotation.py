"""Calls that take the next of several sets of inputs each time, and the same as CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

Inputs = TypeVar("Inputs")


class Rotating(Generic[Inputs]):
    """``run`` with the next of the sets of inputs at each call: the cache does not hold it."""

    def __init__(self, run: Callable[[Inputs], object], sets: Sequence[Inputs]) -> None:
        self.run = run
        self.sets = sets
        self._turn = itertools.cycle(sets)

    def __call__(self) -> object:
        return self.run(next(self._turn))


def graphed(call: Rotating, device: torch.device, pool: tuple[int, int] | None = None) -> Rotating:
    """Return the same as CUDA graphs, one for each set of inputs: replays rotate as calls do.

    Everything has to have run once: what compiles can't be captured. Raises what the capture
    raises, and before it a RuntimeError for a call that waits for the device.

    pool: memory that graphs share whose results nobody reads; default: memory of its own.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    captured = []
    # torch.cuda.graph leaves its stream current where a capture fails; this one restores ours.
    with torch.cuda.stream(stream):
        with synchronisation_refused():
            for inputs in call.sets:  # a library takes workspaces for a new stream
                call.run(inputs)
        for inputs in call.sets:
            captured.append(_captured(call.run, inputs, pool, stream))
    torch.cuda.current_stream(device).wait_stream(stream)
    return Rotating(_replay, captured)


@contextlib.contextmanager
def synchronisation_refused() -> Iterator[None]:
    """Raise a RuntimeError where a call waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captured(
    run: Callable[[Inputs], object], inputs: Inputs, pool: tuple, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, object]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = run(inputs)
    except Exception:
        _forget_capture(graph, pool, stream)
        raise
    return graph, result


def _forget_capture(graph: torch.cuda.CUDAGraph, pool: tuple, stream: torch.cuda.Stream) -> None:
    """Clean up after a capture that failed, which PyTorch does not.

    Each later capture and empty_cache would fail, and random numbers of the default generator.
    """
    # The failure of the capture is the one to report.
    with contextlib.suppress(RuntimeError):
        graph.reset()
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)
    with contextlib.suppress(RuntimeError):  # the generator leaves it with a capture that ends well
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            torch.zeros(1, device=stream.device)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all captures: libraries keep workspaces for every stream."""
    return torch.cuda.Stream(device)


def _replay(captured: tuple[torch.cuda.CUDAGraph, object]) -> object:
    graph, result = captured
    graph.replay()
    return result
