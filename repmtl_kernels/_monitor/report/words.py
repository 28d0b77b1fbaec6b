"""Findings in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from repmtl_kernels._monitor.numbers import count, listed, percent, plain
from repmtl_kernels._monitor.report.findings import (
    RECENT,
    Estimate,
    Findings,
    Loudness,
    Pair,
    Trend,
    Verdict,
)
from repmtl_kernels._monitor.report.markup import Markup, element, join

SHOWN = 3  # sentences of one kind; the tables have all pairs
ALONE = "There is one task, and no other to compare it with."


class Finding(NamedTuple):
    """Sentences of one kind, the label before them, and the class of the label's colour."""

    label: str
    kind: str
    sentences: list[Markup]


def lead(findings: Findings) -> Markup:
    """Return how many pairs have which verdict, and who drowns the others, in two sentences."""
    counts = [
        (len(findings.of(*verdicts)), one, many)
        for verdicts, one, many in (
            ((Verdict.CONFLICT, Verdict.CONFLICT_MUCH), "conflicts", "conflict"),
            ((Verdict.HELP, Verdict.HELP_MUCH), "helps", "help"),
            ((Verdict.UNRELATED,), "is unrelated", "are unrelated"),
            ((Verdict.UNCLEAR,), "has no clear direction", "have no clear direction"),
            ((Verdict.FEW,), "has too few observations", "have too few observations"),
            ((Verdict.UNSEEN,), "was never seen together", "were never seen together"),
        )
    ]
    said = [f"{number} {one if number == 1 else many}" for number, one, many in counts if number]
    if not said:
        return join(ALONE)
    pairs = f"Of {count(len(findings.pairs), 'pair')} of tasks, {listed(said)}."
    if len(said) == 1:
        number, _, does = said[0].partition(" ")
        pairs = f"All {number} pairs of tasks {does}."
        if number == "1":
            pairs = f"The pair of tasks {does}."
    loud = [name(one.task) for one in findings.loudness if one.loud]
    drowns = " drowns the other tasks." if len(loud) == 1 else " drown the other tasks."
    return join(pairs, " ", *_listed(loud), drowns) if loud else join(pairs)


def in_short(findings: Findings) -> Iterator[Finding]:
    """Yield what a reader should know first: conflicts, help, loud tasks, then noise."""
    seen = findings.summary.observations
    if findings.is_early:
        text = f"The numbers are from {count(seen, 'observation')}. They are hints, no more."
        yield Finding("Early", "noise", [join(text)])
    conflicts = findings.of(Verdict.CONFLICT, Verdict.CONFLICT_MUCH)
    helpers = findings.of(Verdict.HELP, Verdict.HELP_MUCH)[::-1]  # the strongest first
    turned = [pair for pair in findings.pairs if pair.trend is Trend.TURNED and pair.verdict.sign]
    yield from _some("Conflict", "conflict", conflicts, conflict)
    yield from _some("Help", "help", helpers, helps)
    yield from _some("Turned", "noise", turned, turn)
    yield from _some("Loud", "loud", [one for one in findings.loudness if one.loud], loud)
    quiet = [one for one in findings.loudness if one.quiet]
    if 0 < 2 * len(quiet) <= len(findings.loudness):  # else a loud task says it all
        yield Finding("Drowned", "loud", [drowned(quiet)])
    if unclear := findings.of(Verdict.UNCLEAR):
        yield Finding("Noise", "noise", [noise(unclear)])


def _some(label: str, kind: str, found: list, say: Callable[..., Markup]) -> Iterator[Finding]:
    if found:
        more = len(found) - SHOWN
        rest = [join(f"The tables have {more} more of this kind.")] if more > 0 else []
        yield Finding(label, kind, [say(one) for one in found[:SHOWN]] + rest)


def _listed(items: list[Markup]) -> list[Markup]:
    """Return the items with commas and an "and" between them."""
    between = [", "] * (len(items) - 2) + [" and "] * (len(items) > 1) + [""]
    return [join(item, then) for item, then in zip(items, between, strict=True)]


def apart(items: Iterable[Markup]) -> Markup:
    """Return the items with semicolons between them, for items with an "and" of their own."""
    return join(*(join("; " if k else "", item) for k, item in enumerate(items)))


def names(pair: Pair) -> Markup:
    """Return "a and b"."""
    first, second = (name(task) for task in pair.tasks)
    return join(first, " and ", second)


def name(task: str) -> Markup:
    """Return the name of a task, marked as one."""
    return element("b", task)


def conflict(pair: Pair) -> Markup:
    """Say that a pair conflicts."""
    little = "" if pair.verdict is Verdict.CONFLICT_MUCH else " a little"
    text = (
        f" conflict{little}. A step that improves one of them tends to worsen the other: the "
        f"cosine of their gradients is {interval(pair.recent)}, and they conflict in "
        f"{percent(pair.samples)} of the samples."
    )
    return join(names(pair), text)


def helps(pair: Pair) -> Markup:
    """Say that a pair helps each other."""
    little = "" if pair.verdict is Verdict.HELP_MUCH else " a little"
    text = (
        f" help each other{little}. A step that improves one of them tends to improve the other: "
        f"the cosine of their gradients is {interval(pair.recent)}, and they agree in "
        f"{percent(1 - pair.samples)} of the samples."
    )
    return join(names(pair), text)


def interval(estimate: Estimate) -> str:
    """Return "0.12 ± 0.03"; without the interval where there is none."""
    if math.isnan(estimate.half):
        return plain(estimate.mean)
    return f"{plain(estimate.mean)} ± {plain(estimate.half)}"


def interval_percent(estimate: Estimate) -> str:
    """Return "12 ± 3 %" of a share of 1; without the interval where there is none."""
    if math.isnan(estimate.half):
        return percent(estimate.mean)
    return f"{100 * estimate.mean:.0f} ± {percent(estimate.half)}"


def turn(pair: Pair) -> Markup:
    """Say that the sign of a pair changed."""
    now, before = ("help each other", "conflicted")
    if pair.verdict.sign < 0:
        now, before = "conflict", "helped each other"
    return join(names(pair), f" {now} since about step {pair.since:,}. They {before} before that.")


def trend(pair: Pair) -> str:
    """Return the trend of a pair in a few words."""
    if pair.trend is Trend.TURNED:
        return f"{pair.trend.value} at about step {pair.since:,}"
    return pair.trend.value


def noise(pairs: list[Pair]) -> Markup:
    """Say that these pairs have no clear direction."""
    who = apart(names(pair) for pair in pairs[:SHOWN])
    if (more := len(pairs) - SHOWN) > 0:
        who = join(who, f" and {count(more, 'more pair')}")
    text = (
        f": no clear direction. Over the last {RECENT} observations the cosine varies about 0, and "
        "chance explains it."
    )
    return join(who, text)


def loud(one: Loudness) -> Markup:
    """Say that a task drowns the others."""
    if math.isinf(one.times):
        return join(name(one.task), " is alone: the other tasks have no gradient at all.")
    text = (
        f" is loud. Its gradient is {plain(one.times, 1)} times as long as the average of the "
        "other tasks', so the shared layers follow it first."
    )
    return join(name(one.task), text)


def drowned(tasks: list[Loudness]) -> Markup:
    """Say that the others drown these tasks."""
    names_of = _listed([name(one.task) for one in tasks])
    most = percent(max(one.times for one in tasks))
    text = (
        f" are hardly heard. Their gradients have at most {most} of the average length of the "
        "others', so the shared layers learn little from them."
    )
    if len(tasks) == 1:
        text = (
            f" is hardly heard. Its gradient has {most} of the average length of the others', so "
            "the shared layers learn little from it."
        )
    return join(*names_of, text)
