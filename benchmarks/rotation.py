"""Calls that take the next of several sets of inputs each time, and the same as CUDA graphs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
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


def graphed(call: Rotating, device: torch.device) -> Rotating:
    """The same as CUDA graphs, one for each set of inputs, so that replays rotate as calls do.

    A replay returns what its capture returned, with the replay's values. Everything has to have run
    once: what compiles can't be captured. Raises what the capture raises.
    """
    pool = torch.cuda.graph_pool_handle()
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    captured = []
    # torch.cuda.graph leaves its stream current where a capture fails; this one restores ours.
    with torch.cuda.stream(stream):
        for inputs in call.sets:  # a library takes workspaces for a new stream
            call.run(inputs)
        for inputs in call.sets:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                result = call.run(inputs)
            captured.append((graph, result))
    torch.cuda.current_stream(device).wait_stream(stream)
    return Rotating(_replay, captured)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: libraries keep workspaces for every stream that they have seen."""
    return torch.cuda.Stream(device)


def _replay(captured: tuple[torch.cuda.CUDAGraph, object]) -> object:
    graph, result = captured
    graph.replay()
    return result
