"""Prose that people read: lines of at most 100 columns, sentences that begin with their subject."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 100
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/*.md")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
MODULES = sorted(
    path
    for folder in ("repmtl_kernels", "benchmarks", "release", "tests")
    for path in (ROOT / folder).rglob("*.py")
)

# Python's code, a generated table, a comment.
NOT_PROSE = re.compile(r"^ *```.*?^ *```$|<!-- bench:.*?<!-- /bench -->|<!--.*?-->", re.S | re.M)
END = re.compile(r"(?<=[.!?])[)*_\"]*\s+")
BARE = re.compile(r"[-*\s(\"#]*(?:Of|That|What|Whose|Those)\b")


def lines_of_prose(markdown: str) -> Iterator[str]:
    """Yield the lines of a document that are neither code nor part of a table.

    Code is fenced, or indented by four columns after an empty line outside of a list.
    """
    code = in_list = False
    previous = ""
    for line in NOT_PROSE.sub(lambda m: "\n" * m[0].count("\n"), markdown).splitlines():
        indented = line.startswith("    ")
        code = indented and (code or (not previous.strip() and not in_list))
        in_list = bool(re.match(r" *([-*]|\d+\.) ", line)) or (
            in_list and (not line.strip() or line.startswith(" "))
        )
        previous = line
        yield "" if code or line.startswith("|") else line


def paragraphs(lines: Iterator[str]) -> Iterator[str]:
    """Yield headings, items of lists and other paragraphs, each as one line."""
    words: list[str] = []
    for line in [*lines, ""]:
        starts = re.match(r"\s*(#|[-*] |\d+\. )", line)
        if words and (starts or not line.strip() or words[0].startswith("#")):
            yield " ".join(words)
            words = []
        if line.strip():
            words.append(line.strip())


def bare_starts(text: str) -> list[str]:
    """Return the sentences that begin with a bare "Of", "That", "What", "Whose" or "Those".

    A question may begin with any of them.
    """
    sentences = [
        s for paragraph in paragraphs(iter(text.splitlines())) for s in END.split(paragraph)
    ]
    return [s for s in sentences if BARE.match(s) and not s.rstrip('*_") ').endswith("?")]


def docstrings(source: str) -> Iterator[str]:
    """Yield all docstrings. An argument's description stands without the argument's name."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield re.sub(r"^ +[\w*, ]+: ", "\n", text, flags=re.M)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_lines_fit(path: Path) -> None:
    lines = [
        re.sub(r"\]\([^)]*\)", "]", line)  # an address cannot be broken
        for line in lines_of_prose(path.read_text(encoding="utf-8"))
    ]
    assert not [line for line in lines if len(line) > COLUMNS]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_sentences_of_documents_begin_with_their_subject(path: Path) -> None:
    lines = lines_of_prose(path.read_text(encoding="utf-8"))
    assert not bare_starts("\n".join(lines))


def test_sentences_of_docstrings_begin_with_their_subject() -> None:
    faults = {
        str(path.relative_to(ROOT)): bare
        for path in MODULES
        if (bare := [s for d in docstrings(path.read_text("utf-8")) for s in bare_starts(d)])
    }
    assert not faults


def test_the_checks_themselves() -> None:
    text = (
        "Of a node. It runs. That it runs is new.\nWhat is it? (What it is.)\n\n- Whose it is\n"
        "    in a list\n\n| Of a table |\n\n```\nOf code\n```\n\n    Those of code\n\n"
        "## What it costs\n"
    )
    assert bare_starts("\n".join(lines_of_prose(text))) == [
        "Of a node.",
        "That it runs is new.",
        "(What it is.)",
        "- Whose it is in a list",
        "## What it costs",
    ]
    assert list(docstrings('def f(x):\n    """F.\n\n    Args:\n        x: Of y.\n    """\n')) == [
        "F.\n\nArgs:\n\nOf y."
    ]
