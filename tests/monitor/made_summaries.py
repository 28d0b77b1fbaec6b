"""Summaries of runs that never were, with known relations between the tasks."""

from __future__ import annotations

import itertools
import math

import torch

from repmtl_kernels._monitor.summary import SaliencyHistory, SaliencySummary

TASKS = ("segmentation", "depth", "normals", "edges")
DECAY = 0.9


def made(
    tasks: tuple[str, ...] = TASKS,
    *,
    count: int = 60,
    unseen: tuple[int, int] | None = None,
    grid: tuple[int, ...] | None = (12, 16),
    ratio: float = 0.03,
) -> SaliencySummary:
    """Return a summary of ``count`` observations, one in 50 calls.

    Tasks 0 and 1 help each other (cosine 0.4), 1 and 3 conflict (-0.35), 0 and 3 turn from 0.2 to
    -0.2 in the middle; 0 and 2 are noise about 0, and all others are close to 0 without a doubt.
    Task 1 has 70 % of the norms. ``unseen``: a pair that was never observed.
    """
    generator = torch.Generator().manual_seed(0)
    number = len(tasks)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    cosine = torch.ones(count, number, number, dtype=torch.float64)
    half = torch.arange(count) < count // 2
    for t, u in itertools.combinations(range(number), 2):
        values = 0.004 * noise(count)
        if (t, u) == (0, 1):
            values = 0.4 + 0.05 * noise(count)
        elif (t, u) == (1, 3):
            values = -0.35 + 0.05 * noise(count)
        elif (t, u) == (0, 3):
            values = torch.where(half, 0.2, -0.2) + 0.05 * noise(count)
        elif (t, u) == (0, 2):
            values = 0.3 * noise(count)
        if (t, u) == unseen:
            values = torch.full_like(values, math.nan)
        cosine[:, t, u] = cosine[:, u, t] = values.clamp(-1, 1)
    conflicts = (0.5 - cosine / 2).where(~cosine.isnan(), math.nan)
    share = torch.full((count, number), 0.3 / max(number - 1, 1), dtype=torch.float64)
    share[:, min(1, number - 1)] = 0.7 if number > 1 else 1.0
    history = SaliencyHistory(
        steps=torch.arange(count) * 50,
        cosine=cosine,
        conflicting_samples=conflicts,
        conflicting_positions=(conflicts + 0.5) / 2,
        norm_share=share,
        tsr=0.2 + 0.01 * noise(count, number).abs(),
        csa=0.6 + 0.05 * noise(count, number).clamp(-2, 2),
        ratio=torch.full((count,), ratio, dtype=torch.float64),
    )
    maps = {} if grid is None else {"": _maps(number, grid)}
    means = {
        field: _running_mean(getattr(history, field))
        for field in (
            "cosine", "conflicting_samples", "conflicting_positions", "norm_share", "tsr", "csa",
        )
    }  # fmt: skip
    step = int(history.steps[-1]) if count else -1
    return SaliencySummary(
        tasks=tasks, observations=count, step=step, ratio=ratio, maps=maps, history=history, **means
    )


def _running_mean(values: torch.Tensor) -> torch.Tensor:
    """Return the exponential mean over the first dimension, free of the bias of its start."""
    if not len(values):
        return torch.full(values.shape[1:], math.nan, dtype=torch.float64)
    weights = DECAY ** torch.arange(len(values) - 1, -1, -1, dtype=torch.float64)
    return torch.tensordot(weights / weights.sum(), values, 1)


def _maps(number: int, grid: tuple[int, ...]) -> torch.Tensor:
    """Return maps with one warm spot each, at another place for each task."""
    axes = torch.meshgrid(*(torch.linspace(0, 1, n) for n in grid), indexing="ij")
    maps = []
    for t in range(number):
        centre = (t + 0.5) / number
        distance = sum((axis - centre) ** 2 for axis in axes)
        spot = 0.2 + torch.exp(-12 * distance).double()
        maps.append(spot / spot.mean())
    return torch.stack(maps)
