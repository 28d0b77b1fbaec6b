"""The documentation site: a place for every public name, and what the hooks make of the sources."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import repmtl_kernels

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {p: p.read_text(encoding="utf-8") for p in sorted((DOCS / "reference").glob("*.md"))}
PLACES = re.findall(r"^::: ([\w.]+)$", "\n".join(PAGES.values()), re.M)


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hook_{name}", DOCS / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public_names(path: Path) -> list[str]:
    """Return the functions and classes that a module defines, without importing its library."""
    kinds = ast.FunctionDef | ast.ClassDef
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return [node.name for node in nodes if isinstance(node, kinds) and node.name[0] != "_"]


INTEGRATIONS = [
    f"repmtl_kernels.integrations.{path.stem}.{name}"
    for path in sorted((ROOT / "repmtl_kernels" / "integrations").glob("[a-z]*.py"))
    for name in public_names(path)
]


@pytest.mark.parametrize("name", [f"repmtl_kernels.{n}" for n in repmtl_kernels.__all__])
def test_public_name_has_a_place_in_the_reference(name: str):
    assert PLACES.count(name) == 1
    assert f"[{name}]" in PAGES[DOCS / "reference" / "index.md"], "the table of all names"


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_integration_has_a_place_in_the_reference(name: str):
    assert PLACES.count(name) == 1


def test_readme_takes_two_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_links_out_of_the_documentation():
    links = hook("links")

    class Config:
        repo_url = "https://example.org/repository/"

    text = (
        "[a](../examples/scenes.py) [b](../examples) [c](heads.md#x)\n"
        "![d](../benchmarks/results/cpu-2core/speed.svg)\n```python\n[e](../examples)\n```\n"
    )
    made = links.outside_of_code(text, lambda part: links.rewritten(part, "page.md", Config))
    assert made == (
        "[a](https://example.org/repository/blob/main/examples/scenes.py) "
        "[b](https://example.org/repository/tree/main/examples) [c](heads.md#x)\n"
        "![d](results/cpu-2core/speed.svg)\n```python\n[e](../examples)\n```\n"
    )
    table = "<!-- bench:a:b -->\n| a |\n| - |\n\nOne machine.\n<!-- /bench -->\n"
    captioned = table.replace("machine.\n", "machine.\n{ .caption }\n")
    assert links.rewritten(table, "page.md", Config) == captioned
    empty = "<!-- bench:a:b -->\n<!-- /bench -->\n"
    assert links.rewritten(empty, "page.md", Config) == empty
    Config.repo_url = ""
    assert links.rewritten("[`a`](../setup.py)", "page.md", Config) == "`a`"
    assert links.rewritten("[a](../../setup.py#x)", "reference/page.md", Config) == "a"
    with pytest.raises(FileNotFoundError, match=r"page.md: link to nothing.py"):
        links.rewritten("[a](../nothing.py)", "page.md", Config)


def test_a_drawing_becomes_part_of_the_page():
    class Page:
        class file:
            src_uri = "index.md"

    image = '<p><img alt="A" src="images/flow.svg" /></p>'
    made = hook("links").on_page_content(f"<h1>B</h1>{image}", page=Page)
    assert made.startswith('<h1>B</h1><figure class="drawing" role="img" aria-label="A"><svg ')


def test_formulas_become_mathml(monkeypatch):
    converter = ModuleType("latex2mathml.converter")
    converter.convert = lambda latex, display: f"<math {display}>{latex}</math>"
    monkeypatch.setitem(sys.modules, "latex2mathml", ModuleType("latex2mathml"))
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", converter)
    page = (
        r'<p><span class="arithmatex">\(a &lt; b\)</span> <code>\(c\)</code></p>'
        '\n<div class="arithmatex">\\[\nd\n\\]</div>'
    )
    assert hook("mathematics").on_page_content(page) == (
        r'<p><span class="formula"><math inline>a < b</math></span> <code>\(c\)</code></p>'
        '\n<div class="formula"><math block>d</math></div>'
    )


@pytest.fixture
def docstrings(monkeypatch) -> ModuleType:
    """The hook, with stand-ins for the classes of griffe, which the tests do not install."""
    griffe = ModuleType("griffe")
    for name in ("Alias", "Attribute", "Class", "Docstring", "Extension", "Module", "Object"):
        setattr(griffe, name, type(name, (), {}))
    monkeypatch.setitem(sys.modules, "griffe", griffe)
    return hook("docstrings")


def test_docstrings_become_markdown(docstrings):
    text = """Do what :func:`f` and :meth:`repmtl_kernels.RepMTL.check` do::

    x = f(1)

    y = f(2)

See docs/memory.md. A table:

===== ======
``a`` second
===== ======
1     ``|x|``
===== ======

Sizes
    ``T`` tasks.

Args:
    x: the :class:`C`. Usage::

        x = 1

    y: another.
"""
    made = docstrings.markdown(text, lambda name: f"full.{name}")
    assert (
        made
        == """Do what [`f`][full.f] and [`RepMTL.check`][full.repmtl_kernels.RepMTL.check] do:

```python
x = f(1)

y = f(2)
```

See [Memory][memory]. A table:

| ``a`` | second |
| --- | --- |
| 1 | ``|x|`` |

Sizes
:    ``T`` tasks.

Args:
    x: the [`C`][full.C]. Usage:

    ```python
    x = 1
    ```

    y: another."""
    )


def test_no_role_is_left(docstrings):
    role = re.compile(r":\w+:`")
    for path in (ROOT / "repmtl_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                assert not role.search(docstrings.markdown(text, str)), f"{path.name}: {text}"
