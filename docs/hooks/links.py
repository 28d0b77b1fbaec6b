"""Links out of ``docs/``, pictures and captions: what the files have, in the form of the site.

A link to a file outside of ``docs/`` leads to the repository, where its address is known. Pictures
of the result files are copied into the site. A drawing in ``docs/images`` becomes part of the page,
so that it has the colours of the page.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>\.\./[^)\s#]+)(?P<anchor>#[^)]*)?\)"
)
DRAWING = re.compile(r'<p><img alt="(?P<text>[^"]*)" src="(?P<target>images/[\w-]+\.svg)" ?/?></p>')
# The last line of what is made from a result file says what was measured, and where.
CAPTION = re.compile(r"^(?P<caption>[^|<\n].*)\n(?=<!-- /bench -->)", re.M)
FENCED = re.compile(r"^( *)(`{3,}).*?^\1\2`*$", re.M | re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of the result files."""
    from mkdocs.structure.files import File

    for path in sorted(p for p in RESULTS.rglob("*") if p.suffix in (".svg", ".png")):
        address = posixpath.join("results", path.relative_to(RESULTS).as_posix())
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite what is not code. A page without sections needs no table of contents."""
    if "\n## " not in markdown:
        page.meta.setdefault("hide", []).append("toc")
    return outside_of_code(markdown, lambda text: rewritten(text, page.file.src_uri, config))


def outside_of_code(markdown: str, change: Callable[[str], str]) -> str:
    """Return the text, changed where it is not a fenced block."""
    parts, last = [], 0
    for block in FENCED.finditer(markdown):
        parts += [change(markdown[last : block.start()]), block[0]]
        last = block.end()
    return "".join([*parts, change(markdown[last:])])


def rewritten(text: str, source: str, config: MkDocsConfig) -> str:
    """Return the text of a page in the form of the site."""
    folder = posixpath.dirname(source)

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, match["target"]))
        if path.startswith("docs/"):
            return match[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{source}: link to {path}, which does not exist")
        if match["image"]:
            inside = posixpath.relpath(path.removeprefix("benchmarks/"), folder or ".")
            return f"![{match['text']}]({inside})"
        if not config.repo_url:
            return match["text"]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        address = f"{config.repo_url.rstrip('/')}/{kind}/main/{path}{match['anchor'] or ''}"
        return f"[{match['text']}]({address})"

    return CAPTION.sub(r"\g<caption>\n{ .caption }\n", LINK.sub(link, text))


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Put drawings in place of their images."""
    folder = ROOT / "docs" / posixpath.dirname(page.file.src_uri)

    def drawing(match: re.Match[str]) -> str:
        svg = (folder / match["target"]).read_text(encoding="utf-8")
        return f'<figure class="drawing" role="img" aria-label="{match["text"]}">{svg}</figure>'

    return DRAWING.sub(drawing, content)
