"""``Delta_p``, arXiv 2507.21049, eq. 11 and 12, and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.quality.tasks import LOWER_IS_BETTER

# Of one run: per task, the value of each metric.
Metrics = dict[str, dict[str, float]]


class Interval(NamedTuple):
    """Mean and half the width of its 95 % interval; NaN where one value says nothing of it."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} ± {self.half:.2f}"


def delta_per_metric(metrics: Metrics, base: Metrics) -> Metrics:
    """Per cent by which each metric is better than the base's: eq. 11 for a single metric."""
    if metrics.keys() != base.keys():
        raise ValueError(f"base: expected the tasks {list(metrics)}, got {list(base)}")
    found: Metrics = {}
    for task, values in metrics.items():
        found[task] = {}
        for name, value in values.items():
            change = 100 * (value - base[task][name]) / base[task][name]
            found[task][name] = -change if LOWER_IS_BETTER[name] else change
    return found


def delta_p(metrics: Metrics, base: Metrics) -> dict[str, float]:
    """``Delta_p`` of each task, its metrics' mean, and their ``mean`` over tasks, eq. 12."""
    deltas = delta_per_metric(metrics, base)
    per_task = {task: _mean(list(values.values())) for task, values in deltas.items()}
    return {**per_task, "mean": _mean(list(per_task.values()))}


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of paired differences."""
    from scipy.stats import t as student

    count = len(values)
    mean = _mean(values)
    if count < 2:
        return Interval(mean, math.nan, count)
    variance = sum((v - mean) ** 2 for v in values) / (count - 1)
    quantile = float(student.ppf((1 + confidence) / 2, count - 1))
    return Interval(mean, quantile * math.sqrt(variance / count), count)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
