"""Advice on what to do next. Each rule of ``RULES`` yields what it advises on the findings."""

from __future__ import annotations

from collections.abc import Iterator

from repmtl_kernels._monitor.numbers import plain
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
            _listed([words.names(pair) for pair in pairs]),
            ". Give them layers of their own earlier, or two networks, and compare with what you "
            "have on held-out data. A conflict here need not cost accuracy. If they have to share, "
            "try a method that resolves conflicting gradients, such as PCGrad or Nash-MTL.",
        )


def keep_together(findings: Findings) -> Iterator[Markup]:
    """Advise on pairs that clearly help each other."""
    if pairs := findings.of(Verdict.HELP_MUCH)[: -words.SHOWN - 1 : -1]:
        yield join(
            element("strong", "Keep them together: "),
            _listed([words.names(pair) for pair in pairs]),
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


def _listed(items: list[Markup]) -> Markup:
    return join(*(join("; " if k else "", item) for k, item in enumerate(items)))


RULES = (observe_longer, train_apart, keep_together, balance)
