"""Times of several contestants side by side, in one process, in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch

from benchmarks.cases import Effort

Name = TypeVar("Name", bound=Hashable)

# Calls are grouped until a block lasts this long: below, clocks and launches decide.
BLOCK_SECONDS = 2e-3
MAX_CALLS_PER_BLOCK = 200


class Timing(NamedTuple):
    """The median time of a call, and the interquartile range of the blocks, in milliseconds."""

    ms: float
    spread: float
    rounds: int


def block_ms(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Return the mean milliseconds of ``calls`` calls in a row; on CUDA between two events."""
    if device.type == "cuda":
        # An idle device at the start: a contestant must not hide its launches behind the last one.
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / calls
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) * 1e3 / calls


def side_by_side(
    contestants: Mapping[Name, Callable[[], object]], device: torch.device, effort: Effort
) -> dict[Name, Timing]:
    """Return the times of warm contestants that took turns: a drift hits all alike."""
    calls = {}
    for name, call in contestants.items():
        once = block_ms(call, 1, device) / 1e3
        calls[name] = min(MAX_CALLS_PER_BLOCK, max(1, math.ceil(BLOCK_SECONDS / max(once, 1e-9))))
    blocks: dict[Name, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    for done in range(effort.max_rounds):
        if done >= effort.min_rounds and time.perf_counter() - began > effort.seconds:
            break
        for name, call in contestants.items():
            blocks[name].append(block_ms(call, calls[name], device))
    return {name: summary(times) for name, times in blocks.items()}


def summary(times: list[float]) -> Timing:
    """Return median and interquartile range (0 for a single time)."""
    if len(times) == 1:
        return Timing(times[0], 0.0, 1)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(statistics.median(times), high - low, len(times))
