"""HTML and SVG as text, in which everything that is not made here is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is HTML already. Any other text is escaped before it becomes part of a page."""

    __slots__ = ()


Node = str | Iterable["Node"]


def join(*nodes: Node) -> Markup:
    """Return the nodes one after the other."""
    return Markup("".join(_texts(nodes)))


def _texts(nodes: Iterable[Node]) -> Iterable[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node if isinstance(node, Markup) else html.escape(node)
        else:
            yield from _texts(node)


def element(name: str, *nodes: Node, **attributes: str | float | None) -> Markup:
    """Return an element. ``aria_label`` becomes ``aria-label``, ``class_`` ``class``.

    An attribute that is None is left out. Numbers have at most two decimals: they are lengths.
    """
    given = "".join(
        f' {key.strip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{join(*nodes)}</{name}>")


def void(name: str, **attributes: str | float | None) -> Markup:
    """Return an element that has no end tag, e.g. ``img``."""
    return Markup(element(name, **attributes).removesuffix(f"</{name}>"))


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return html.escape(value)
    return f"{value:.2f}".rstrip("0").rstrip(".")


def table(
    caption: str,
    columns: Iterable[Node],
    rows: Iterable[tuple[Node, Iterable[Node]]],
    *,
    class_: str | None = None,
) -> Markup:
    """Return a table whose first column has the names of the rows.

    It lies in a region of its own that scrolls sideways, so that it never widens the page.

    Args:
        caption: its heading.
        columns: the heads of all columns, that of the names included.
        rows: a name and the cells after it. A cell that is a ``td`` element stays as it is.
        class_: class of the table.
    """
    head = element("tr", [element("th", column, scope="col") for column in columns])
    body = [
        element("tr", element("th", name, scope="row"), [_cell(cell) for cell in cells])
        for name, cells in rows
    ]
    whole = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", body),
        class_=class_,
    )
    return element("div", whole, class_="scroll", role="region", tabindex="0", aria_label=caption)


def _cell(cell: Node) -> Markup:
    if isinstance(cell, Markup) and cell.startswith("<td"):
        return cell
    return element("td", cell)
