"""Docstrings are written for ``help()``; here they become Markdown with links.

Roles such as ``:func:`tsr_loss``` become links to the name's place in the reference. Literal
blocks, tables and definition lists of reStructuredText become those of Markdown. A field without a
docstring has its comment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

from griffe import Alias, Attribute, Class, Docstring, Extension, Module, Object

ROLE = re.compile(r":\w+:`([\w.]+)`")
GUIDE = re.compile(r"(?<![\w/])docs/(\w+)\.md")
LITERAL = re.compile(
    r"^(?P<indent> *)(?P<text>\S.*)?::\n\n(?P<code>(?:(?P=indent) +\S.*\n|\n)+)", re.M
)
# "ValueError, TypeError: ..." would be a tuple.
ERRORS = re.compile(r"^( +)(\w+Error), (\w+Error):", re.M)
RULE = re.compile(r"^ *=+( +=+)+ *$")
TERM = re.compile(r"^(?P<term>[A-Z][\w ]*)\n(?=    \S)", re.M)
COMMENT = re.compile(r"  # (.*)$")
SPECIAL = re.compile(r"[*_\[\]<]")
STATIC = re.compile(r"staticmethod\(([\w.]+)\)")


class Docstrings(Extension):
    """Changes all docstrings of a package, once it is loaded."""

    def on_package(self, *, pkg: Module, **_: object) -> None:
        """Change them in place."""
        public = {name: f"{pkg.path}.{name}" for name in map(str, pkg.exports or ())}
        for obj in list(objects(pkg)):
            if isinstance(obj, Attribute) and (made := STATIC.fullmatch(str(obj.value or ""))):
                first, *rest = made[1].split(".")
                target = ".".join([obj.module.resolve(first), *rest])
                obj.parent.set_member(obj.name, Alias(obj.name, target=target))
                continue
            if isinstance(obj, Attribute) and isinstance(obj.parent, Class):
                obj.docstring = obj.docstring or comment_of(obj)
            if obj.docstring is not None:
                obj.docstring.value = markdown(obj.docstring.value, resolver(obj, public))


def objects(parent: Object) -> Iterator[Object]:
    """Yield the object and all objects in it, without imported ones."""
    yield parent
    for member in list(parent.members.values()):
        if not member.is_alias:
            yield from objects(member)


def comment_of(field: Attribute) -> Docstring | None:
    """Return the comment on the line of a field, or on those before it: its shape, most often."""
    lines = field.lines_collection[field.filepath]
    above: list[str] = []
    for line in reversed(lines[: field.lineno - 1]):
        if not line.lstrip().startswith("# "):
            break
        above.insert(0, line.strip()[2:])
    text = " ".join([*above, *COMMENT.findall(lines[field.lineno - 1])])
    return Docstring(SPECIAL.sub(r"\\\g<0>", text), parent=field) if text else None


def resolver(obj: Object, public: dict[str, str]) -> Callable[[str], str | None]:
    """Return what finds the full name of a name in the docstring of ``obj``."""

    def full(name: str) -> str | None:
        first, *rest = name.split(".")
        if first == obj.package.name:
            return name
        if first in public:
            return ".".join([public[first], *rest])
        scope: Object | None = obj
        while scope is not None:
            if isinstance(scope, Class | Module) and first in scope.members:
                owner = public.get(scope.name, scope.path)
                return f"{owner}.{name}"
            scope = scope.parent
        return None  # of another library

    return full


def markdown(text: str, full: Callable[[str], str | None]) -> str:
    """Return a docstring in Markdown; ``full`` returns the full name of a name."""
    text = ROLE.sub(lambda m: reference(m[1], full(m[1])), text)
    text = ERRORS.sub(r"\1\2 | \3:", text)
    text = GUIDE.sub(lambda m: guide(m[1]), text)
    text = LITERAL.sub(fenced, text + "\n").rstrip("\n")
    text = TERM.sub(lambda m: f"{m['term']}\n:", text)
    return "\n".join(with_tables(text.split("\n")))


def guide(name: str) -> str:
    """Return the link to a guide: to its title, which the plugin autorefs finds."""
    text = (Path(__file__).parents[1] / f"{name}.md").read_text(encoding="utf-8")
    title = text.partition("\n")[0].removeprefix("# ")
    place = re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-")
    return f"[{title}][{place}]"


def reference(name: str, target: str | None) -> str:
    """Return a name as code, with a link if it is one of the package."""
    shown = f"`{name.removeprefix('repmtl_kernels.')}`"
    return f"[{shown}][{target}]" if target else shown


def fenced(match: re.Match[str]) -> str:
    indent = match["indent"]
    code = dedent(match["code"]).strip("\n").split("\n")
    lines = [f"{indent}{line}".rstrip() for line in ("```python", *code, "```")]
    text = f"{indent}{match['text']}:\n\n" if match["text"] else ""
    return text + "\n".join(lines) + "\n\n"


def with_tables(lines: list[str]) -> Iterator[str]:
    """Yield the lines, with the tables between rules of ``=`` as tables of Markdown."""
    starts: list[int] = []
    in_table = rows = 0
    for line in lines:
        if RULE.match(line):
            starts = [m.start() for m in re.finditer("=+", line)]
            in_table, rows = (in_table + 1) % 3, 0
            continue
        if not in_table:
            yield line
            continue
        ends = [*starts[1:], None]
        cells = [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]
        yield f"| {' | '.join(cells)} |"
        if in_table == 1 and not rows:
            yield f"|{' --- |' * len(cells)}"
        rows += 1
