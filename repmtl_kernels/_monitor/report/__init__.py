"""A summary as one HTML page that anyone can open: no network, no script, no other file."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from string import Template

from repmtl_kernels._monitor.report.findings import find
from repmtl_kernels._monitor.report.markup import element, join
from repmtl_kernels._monitor.report.sections import SECTIONS, facts
from repmtl_kernels._monitor.summary import SaliencySummary, check_observed

TITLE = "What the tasks do to each other"


def write_report(
    summary: SaliencySummary, path: str | os.PathLike[str], *, title: str = TITLE
) -> None:
    """Write a summary as one HTML page, for readers who don't know the method.

    The page says in plain words which tasks help each other and which conflict, how sure that is,
    where and since when, which task drowns the others, and what to try next. Every figure has its
    numbers in a table. The page needs no network and no script, has a light and a dark form, and
    prints. The same summary gives the same bytes.

    Args:
        summary: what :meth:`SaliencyMonitor.summary` returns.
        path: the file, which is overwritten.
        title: heading of the page.

    Raises:
        TypeError: the summary is not a :class:`SaliencySummary`, or the title not a str.
        ValueError: nothing has been observed.
        OSError: the file cannot be written.
    """
    check_observed(summary)
    if not isinstance(title, str):
        raise TypeError(f"title: expected a str, got {type(title).__name__}")
    Path(path).write_text(page(summary, title), encoding="utf-8", newline="\n")


def page(summary: SaliencySummary, title: str) -> str:
    """Return the whole page as text."""
    findings = find(summary)
    links = [
        element("li", element("a", section.short, href=f"#{section.key}")) for section in SECTIONS
    ]
    content = [
        element(
            "section",
            element("h2", section.title, id=f"{section.key}-title"),
            *section.content(findings),
            id=section.key,
            aria_labelledby=f"{section.key}-title",
        )
        for section in SECTIONS
    ]
    return Template(_file("page.html")).substitute(
        title=join(title),
        style=_file("page.css"),
        facts=join(facts(findings)),
        links=join(links),
        content=join(content),
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
