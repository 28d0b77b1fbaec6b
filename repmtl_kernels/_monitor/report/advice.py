"""Advice on what to do next. Each rule of ``RULES`` yields what it advises on the findings."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from repmtl_kernels._monitor.grouping import group_tasks
from repmtl_kernels._monitor.numbers import listed, plain
from repmtl_kernels._monitor.partitions import EXACT
from repmtl_kernels._monitor.report import words
from repmtl_kernels._monitor.report.findings import FEWEST, Findings, Verdict
from repmtl_kernels._monitor.report.markup import Markup, element, join, table


def advice(findings: Findings) -> list[Markup]:
    """Return what each rule advises, or one sentence if none does."""
    given = [piece for rule in RULES for piece in rule(findings)]
    if not given:
        given = [join("Nothing here asks for a change.")]
    return given


def observe_longer(findings: Findings) -> Iterator[Markup]:
    """Advise to wait while nothing can be concluded."""
    if findings.is_early:
        text = (
            f"Observe longer before you change anything: below {FEWEST} observations all is noise. "
            "A smaller "
        )
        yield join(text, element("code", "every"), " gives more of them.")


def train_apart(findings: Findings) -> Iterator[Markup]:
    """Advise on pairs that clearly conflict."""
    if pairs := findings.of(Verdict.CONFLICT_MUCH)[: words.SHOWN]:
        yield join(
            element("strong", "Try them apart: "),
            words.apart(words.names(pair) for pair in pairs),
            ". Give them layers of their own earlier, or two networks, and compare with what you "
            "have on held-out data. A conflict here need not cost accuracy. If they have to share, "
            "try a method that resolves conflicting gradients, such as PCGrad or Nash-MTL.",
        )


def two_networks(findings: Findings) -> Iterator[Markup]:
    """Advise which tasks two networks would share, where a pair clearly conflicts.

    With more than EXACT tasks, or a pair that was never seen together, there is no certain answer.
    """
    summary = findings.summary
    together = not torch.isnan(summary.cosine).any()
    if not (findings.of(Verdict.CONFLICT_MUCH) and together and 2 < len(summary.tasks) <= EXACT):
        return
    found = group_tasks(summary, 2)
    if found.score <= group_tasks(summary, 1).score:
        return
    first, second = (listed(group) for group in found.groups)
    yield join(
        element("strong", "If there can be two networks: "),
        f"one for {first}, the other for {second}. By the cosines, no other two groups agree more: "
        f"their score is {plain(found.score)}, that of all tasks in one network "
        f"{plain(group_tasks(summary, 1).score)}. ",
        element("code", "group_tasks"),
        " says more. Whether it pays has to be measured.",
    )


def keep_together(findings: Findings) -> Iterator[Markup]:
    """Advise on pairs that clearly help each other."""
    if pairs := findings.of(Verdict.HELP_MUCH)[: -words.SHOWN - 1 : -1]:
        yield join(
            element("strong", "Keep them together: "),
            words.apart(words.names(pair) for pair in pairs),
            ". The labels of one are worth something to the other.",
        )


def balance(findings: Findings) -> Iterator[Markup]:
    """Advise weights where a task drowns the others."""
    if not any(one.loud or one.quiet for one in findings.loudness):
        return
    weights = equal_lengths([one.share for one in findings.loudness])
    rows = [
        (one.task, [plain(weight)])
        for one, weight in zip(findings.loudness, weights, strict=True)
        if weight == weight
    ]
    yield join(
        element("strong", "Balance the tasks. "),
        "With the weights below, all gradients would be equally long at the shared representation. "
        "They are a start and no optimum: a task that matters more may be louder. ",
        element("code", "RepMTL(log_losses=True)"),
        " takes the scale out of every loss instead.",
        table(
            "Task weights that make all gradients equally long",
            ["Task", "Weight"],
            rows,
        ),
    )


def equal_lengths(shares: list[float]) -> list[float]:
    """Return weights inversely proportional to the shares, 1 on average; NaN stays NaN."""
    inverse = [1 / share if share > 0 else float("nan") for share in shares]
    there = [value for value in inverse if value == value]
    return [value * len(there) / sum(there) for value in inverse]


RULES = (observe_longer, train_apart, two_networks, keep_together, balance)
