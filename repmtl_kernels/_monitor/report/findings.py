"""The meaning of a summary's numbers, and how sure it is. No words: ``words.py`` has those.

A value of the last observations has an interval: Student's, at 95 % for all pairs together
(Bonferroni). A drift over the run is no noise.
"""

from __future__ import annotations

import enum
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from repmtl_kernels._monitor.summary import SaliencySummary

RECENT = 20  # observations that an estimate is made of
FEWEST = 5  # below this number nothing is concluded
LEVELS = (0.05, 0.15, 0.3, 0.5)  # cosines at which a pair's colour gets stronger
WEAK, STRONG = LEVELS[0], LEVELS[2]
LOUD = 3.0  # times the average length of the other tasks' gradients
CONFIDENCE = 0.95


class Verdict(enum.Enum):
    """The knowledge of a pair of tasks."""

    UNSEEN = "not seen together"
    FEW = "too few observations"
    UNCLEAR = "no clear direction"
    UNRELATED = "unrelated"
    HELP = "help each other a little"
    HELP_MUCH = "help each other"
    CONFLICT = "conflict a little"
    CONFLICT_MUCH = "conflict"

    @property
    def sign(self) -> int:
        """1 where the pair helps, -1 where it conflicts, else 0."""
        return _SIGNS.get(self, 0)


_SIGNS = {
    Verdict.HELP: 1, Verdict.HELP_MUCH: 1, Verdict.CONFLICT: -1, Verdict.CONFLICT_MUCH: -1,
}  # fmt: skip


class Trend(enum.Enum):
    """How the last third of a pair's history differs from its first third."""

    SHORT = "too short to tell"
    STEADY = "steady"
    STRONGER = "growing"
    WEAKER = "fading"
    TURNED = "turned round"


@dataclass(frozen=True)
class Estimate:
    """A mean over observations, and half the width of its interval (NaN below 3 observations)."""

    mean: float
    half: float
    observations: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is known."""
        return abs(self.mean) > self.half  # False for NaN


@dataclass(frozen=True)
class Pair:
    """Two tasks. ``cosine``, ``samples`` and ``positions`` are the summary's numbers."""

    rows: tuple[int, int]
    tasks: tuple[str, str]
    cosine: float
    samples: float
    positions: float
    seen: int  # observations of the pair that the history keeps
    recent: Estimate
    verdict: Verdict
    trend: Trend
    since: int | None  # the step from which the sign is the present one, for a pair that turned


@dataclass(frozen=True)
class Loudness:
    """The share of a task, and how long its gradient is in averages of the other tasks'."""

    task: str
    share: float
    times: float
    recent: Estimate

    @property
    def known(self) -> bool:
        """Whether there are enough observations."""
        return self.recent.observations >= FEWEST

    @property
    def loud(self) -> bool:
        """Whether it drowns the others."""
        return self.known and self.times >= LOUD

    @property
    def quiet(self) -> bool:
        """Whether the others drown it."""
        return self.known and self.times <= 1 / LOUD


@dataclass(frozen=True)
class Findings:
    """All that the page says in words."""

    summary: SaliencySummary
    pairs: list[Pair]  # the strongest conflict first, pairs without a value last
    loudness: list[Loudness]  # in the order of the tasks

    def of(self, *verdicts: Verdict) -> list[Pair]:
        """Return the pairs with one of these verdicts."""
        return [pair for pair in self.pairs if pair.verdict in verdicts]

    @property
    def is_early(self) -> bool:
        """Whether nothing can be concluded yet."""
        return self.summary.observations < FEWEST


def find(summary: SaliencySummary) -> Findings:
    """Return what the numbers of this summary say."""
    together = list(itertools.combinations(range(len(summary.tasks)), 2))
    pairs = [_pair(summary, t, u, len(together)) for t, u in together]
    pairs.sort(key=lambda pair: (math.isnan(pair.cosine), pair.cosine))
    loudness = [_loudness(summary, t) for t in range(len(summary.tasks))]
    return Findings(summary, pairs, loudness)


def _pair(summary: SaliencySummary, t: int, u: int, comparisons: int) -> Pair:
    steps, values = observed(summary.history.steps, summary.history.cosine[:, t, u])
    recent = estimate(values[-RECENT:], comparisons)
    cosine = summary.cosine[t, u].item()
    trend, since = _trend(steps, values, comparisons)
    return Pair(
        (t, u),
        (summary.tasks[t], summary.tasks[u]),
        cosine,
        summary.conflicting_samples[t, u].item(),
        summary.conflicting_positions[t, u].item(),
        len(values),
        recent,
        _verdict(cosine, recent),
        trend,
        since,
    )


def observed(steps: torch.Tensor, values: torch.Tensor) -> tuple[list[int], list[float]]:
    """Return the steps ``(K,)`` with a value ``(K,)``, and these values."""
    there = ~values.isnan()
    return steps[there].tolist(), values[there].tolist()


def _verdict(cosine: float, recent: Estimate) -> Verdict:
    if math.isnan(cosine):
        return Verdict.UNSEEN
    if recent.observations < FEWEST:
        return Verdict.FEW
    size = abs(recent.mean)
    if not recent.excludes_zero:
        # An interval within the bounds of "unrelated" does say something.
        return Verdict.UNRELATED if size + recent.half < WEAK else Verdict.UNCLEAR
    if size < WEAK:
        return Verdict.UNRELATED
    if recent.mean > 0:
        return Verdict.HELP_MUCH if size >= STRONG else Verdict.HELP
    return Verdict.CONFLICT_MUCH if size >= STRONG else Verdict.CONFLICT


def estimate(values: Sequence[float], comparisons: int = 1) -> Estimate:
    """Return the mean with its interval, at 95 % for all comparisons together.

    The values may drift: their noise is taken from the differences of neighbours (von Neumann,
    1941), and has no memory from one value to the next.
    """
    number = len(values)
    if not number:
        return Estimate(math.nan, math.nan, 0)
    mean = statistics.fmean(values)
    if number < 3:
        return Estimate(mean, math.nan, number)
    squares = math.fsum((b - a) ** 2 for a, b in itertools.pairwise(values))
    deviation = math.sqrt(squares / (2 * (number - 1)))
    # Neighbouring differences share a value, so there are fewer degrees than differences.
    freedom = 2 * (number - 1) ** 2 / (3 * number - 4)
    tail = 1 - (1 - CONFIDENCE) / (2 * comparisons)
    half = student_quantile(tail, freedom) * deviation / math.sqrt(number)
    return Estimate(mean, half, number)


def student_quantile(probability: float, freedom: float) -> float:
    """Return a quantile of Student's t, from the normal one (Cornish-Fisher, four terms).

    It is within 2 % from 3 degrees of freedom at 97.5 %. Below 3 the exact forms for 1 and 2 serve.
    """
    if freedom < 2:
        return math.tan(math.pi * (probability - 0.5))
    if freedom < 3:
        alpha = 4 * probability * (1 - probability)
        return 2 * (probability - 0.5) * math.sqrt(2 / alpha)
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**k for k, term in enumerate(terms))


def _trend(
    steps: Sequence[int], values: Sequence[float], comparisons: int
) -> tuple[Trend, int | None]:
    third = len(values) // 3
    if third < FEWEST:
        return Trend.SHORT, None
    first = estimate(values[:third], comparisons)
    last = estimate(values[-third:], comparisons)
    if not abs(last.mean - first.mean) > max(math.hypot(first.half, last.half), WEAK):
        return Trend.STEADY, None
    if first.mean * last.mean < 0 and first.excludes_zero and last.excludes_zero:
        return Trend.TURNED, _last_turn(steps, values, last.mean)
    grows = abs(last.mean) > abs(first.mean)
    return Trend.STRONGER if grows else Trend.WEAKER, None


def _last_turn(steps: Sequence[int], values: Sequence[float], present: float) -> int:
    """Return the step from which the mean over five observations keeps the present sign."""
    smooth = [statistics.fmean(values[max(0, k - 2) : k + 3]) * present for k in range(len(values))]
    other = [k for k, value in enumerate(smooth) if value <= 0]
    return steps[min(max(other, default=-1) + 1, len(steps) - 1)]


def _loudness(summary: SaliencySummary, t: int) -> Loudness:
    share = summary.norm_share[t].item()
    others = sum(1 for u, s in enumerate(summary.norm_share.tolist()) if u != t and s == s)
    rest = 1 - share
    times = math.nan
    if others and share == share:
        times = share * others / rest if rest > 0 else math.inf
    _, values = observed(summary.history.steps, summary.history.norm_share[:, t])
    return Loudness(summary.tasks[t], share, times, estimate(values[-RECENT:]))
