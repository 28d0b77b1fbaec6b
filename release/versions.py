"""``python -m release.versions v1.2.3``: checks that a tag may be released, and prints its changes.

The version's one place is pyproject.toml. CHANGELOG.md and CITATION.cff repeat it, and a tag does.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
UNRELEASED = "unreleased"


class Entry(NamedTuple):
    """The newest entry of the changelog; its date is a word as long as it is not released."""

    version: str
    date: str
    changes: str


def declared(root: Path = ROOT) -> str:
    """Return the version of pyproject.toml."""
    # Python 3.10 has no tomllib.
    return _only(r'^version = "([^"]+)"$', root / "pyproject.toml")


def newest_entry(root: Path = ROOT) -> Entry:
    """Return the first entry of the changelog."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    entry = re.search(r"^## \[(.+?)\] - (\S+)\n(.*?)(?=^## \[|\Z)", text, re.M | re.S)
    if entry is None:
        raise ValueError('CHANGELOG.md: expected a heading "## [1.2.3] - 2026-12-31", got none')
    version, date, changes = entry.groups()
    return Entry(version, date, changes.strip())


def faults(root: Path = ROOT) -> list[str]:
    """Return where the files disagree about the version or its date."""
    version, entry = declared(root), newest_entry(root)
    citation = root / "CITATION.cff"
    cited = _only(r'^version: "?([^"\n]+)"?$', citation)
    date = re.search(r'^date-released: "?([^"\n]+)"?$', citation.read_text("utf-8"), re.M)
    found = []
    if entry.version != version:
        found.append(f"CHANGELOG.md: expected {version} as its newest entry, got {entry.version}")
    if cited != version:
        found.append(f"CITATION.cff: expected version {version}, got {cited}")
    dated = date[1] if date else UNRELEASED
    if dated != entry.date:
        found.append(f"CITATION.cff: expected date-released {entry.date}, got {dated}")
    return found


def faults_of_tag(tag: str, root: Path = ROOT) -> list[str]:
    """Return why the files may not be released under a tag."""
    version, date = declared(root), newest_entry(root).date
    found = faults(root)
    if tag != f"v{version}":
        found.append(f"tag: expected v{version}, the version of pyproject.toml, got {tag}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        found.append(f"CHANGELOG.md: expected the day of the release, got {date}")
    return found


def _only(pattern: str, path: Path) -> str:
    values = re.findall(pattern, path.read_text(encoding="utf-8"), re.M)
    if len(values) != 1:
        raise ValueError(f"{path.name}: expected one line {pattern}, got {len(values)}")
    return values[0]


def main(tag: str) -> None:
    """Print the changes of a release; exit if the tag is not that of the files."""
    if found := faults_of_tag(tag):
        raise SystemExit("\n".join(found))
    print(newest_entry().changes)


if __name__ == "__main__":
    main(*sys.argv[1:])
