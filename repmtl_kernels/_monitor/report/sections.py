"""The sections of the page, each from the findings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from repmtl_kernels._monitor.numbers import count, plain
from repmtl_kernels._monitor.report import lengths, pairs, places, words
from repmtl_kernels._monitor.report.advice import advice
from repmtl_kernels._monitor.report.findings import (
    FEWEST,
    LOUD,
    RECENT,
    STRONG,
    WEAK,
    Findings,
)
from repmtl_kernels._monitor.report.markup import Markup, element, join, table


class Section(NamedTuple):
    """A heading, its short form for the navigation, and what follows it."""

    key: str
    title: str
    short: str
    content: Callable[[Findings], Iterator[Markup]]


def in_short(findings: Findings) -> Iterator[Markup]:
    """Yield one sentence on all, and the main findings by kind."""
    yield element("p", words.lead(findings), class_="lead")
    items = [
        element(
            "li",
            element("span", found.label, class_=f"label {found.kind}"),
            element("div", [element("p", sentence) for sentence in found.sentences]),
        )
        for found in words.in_short(findings)
    ]
    if items:
        yield element("ul", items, class_="findings")


def terms(findings: Findings) -> Iterator[Markup]:
    """Yield the terms of Rep-MTL's two losses, task by task, and the regulariser's ratio."""
    summary = findings.summary
    yield element(
        "p",
        "Rep-MTL has two losses on these gradients. TSR is an entropy: it is small where each "
        "position belongs to one task. CSA compares which channels go together in a task and in "
        "all tasks: 1 is the same. These are the tasks' parts in both, for those who tune them.",
    )
    yield table(
        "Each task's part in the regulariser",
        ["Task", "Term of TSR, in nats", "Similarity in CSA, 0 to 1"],
        [
            (task, [plain(tsr, 3), plain(csa, 3)])
            for task, tsr, csa in zip(
                summary.tasks, summary.tsr.tolist(), summary.csa.tolist(), strict=True
            )
        ],
    )
    if math.isnan(summary.ratio):
        text = "No regulariser was measured in this run."
    else:
        text = (
            "On the calls that apply it, the regulariser's gradient at the representation is "
            f"{plain(summary.ratio, 3)} times as long as that of the tasks. On average over all "
            "calls it is a part of that: a quarter with every=4, the default."
        )
    yield element("p", text)


def next_steps(findings: Findings) -> Iterator[Markup]:
    """Yield what to try."""
    yield element("ul", [element("li", piece) for piece in advice(findings)], class_="advice")


def reading(findings: Findings) -> Iterator[Markup]:
    """Yield what the words mean, and where the bounds of the verdicts are."""
    entries = {
        "Saliency": "The gradient of one task's loss with respect to the representation that all "
        "tasks share. A training step moves the shared layers against it.",
        "Cosine": "How much two tasks' saliencies point the same way, taken for each sample and "
        "averaged. It says what one small step does at the representation. It does not say which "
        "accuracy the tasks reach in the end.",
        "In conflict": "The share of samples, or of positions, where two saliencies point away "
        "from each other. Unrelated tasks are at about 50 %.",
        "Numbers and intervals": "A number alone is the running mean, which follows the run. "
        f"A number with ± is the mean of the last {RECENT} observations that the history keeps. "
        "Its interval holds the true mean in 95 % of the cases, for all pairs together. It is wide "
        "where neighbouring observations differ much, or are few.",
        "Verdicts": f"A direction is clear where the interval does not hold 0. Closer to 0 than "
        f"{WEAK} a pair is unrelated; from {STRONG} on it helps or conflicts without “a little”. "
        f"Below {FEWEST} observations there is no verdict. A task is loud from {LOUD:g} times the "
        "average of the others on, and drowned from a third of it down. These bounds are "
        "conventions of this page.",
        "Trends": "The last third of the history against the first. It is steady unless the two "
        f"differ by more than their intervals and by more than {WEAK}.",
    }
    yield element(
        "dl",
        [join(element("dt", term), element("dd", meaning)) for term, meaning in entries.items()],
    )


SECTIONS = (
    Section("short", "In short", "In short", in_short),
    Section("next", "What to do next", "What to do", next_steps),
    Section("pairs", "Who helps whom, and who conflicts", "Help and conflict", pairs.section),
    Section("when", "Since when", "Since when", pairs.history),
    Section("where", "Where each task looks", "Where", places.section),
    Section("loud", "Who drowns the others", "Loudness", lengths.section),
    Section("terms", "The regulariser", "Regulariser", terms),
    Section("reading", "How to read this page", "How to read", reading),
)


def facts(findings: Findings) -> str:
    """Return the line below the title."""
    summary = findings.summary
    seen = count(summary.observations, "observed training call")
    parts = [count(len(summary.tasks), "task"), seen]
    if summary.step >= 0:
        parts.append(f"the last is call {summary.step:,}")
    return ", ".join(parts)
