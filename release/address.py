"""``python -m release.address URL REVISION``: tells README.md and the metadata the repository.

A package index shows README.md without the files that its links lead to. So the workflow that
builds a release, which knows the repository's address, changes its checkout before it builds.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from release.versions import ROOT

# Code, which stays as it is, or a link to a file.
CODE_OR_LINK = re.compile(
    r"(?P<code>^```.*?^```|`[^`]+`)|(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<target>[^)\s#]+)",
    re.M | re.S,
)
URLS = "[project.urls]\n"


def absolute(markdown: str, address: str, root: Path = ROOT) -> str:
    """Return a text of the root folder with links to a revision of the repository.

    Args:
        markdown: The text.
        address: The repository's address and the revision, with ``{}`` for the kind of page.
        root: The folder that the links start from.
    """

    def link(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        path = root / match["target"]
        if not path.exists():
            raise FileNotFoundError(f"README.md: link to {match['target']}, which does not exist")
        kind = "raw" if match["image"] else "tree" if path.is_dir() else "blob"
        return f"{match['image']}[{match['text']}]({address.format(kind)}/{match['target']}"

    return CODE_OR_LINK.sub(link, markdown)


def main(url: str, revision: str, root: Path = ROOT) -> None:
    """Change README.md and pyproject.toml in place."""
    readme, metadata = root / "README.md", root / "pyproject.toml"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(absolute(text, f"{url}/{{}}/{revision}", root), encoding="utf-8")
    before, found, after = metadata.read_text(encoding="utf-8").partition(URLS)
    if not found:
        raise ValueError(f"pyproject.toml: expected {URLS.strip()}, got none")
    metadata.write_text(f'{before}{URLS}Repository = "{url}"\n{after}', encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
