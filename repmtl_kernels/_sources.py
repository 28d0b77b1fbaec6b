"""What the compiled library was made from. Imports nothing: setup.py runs it too."""

import hashlib
from pathlib import Path


def digest(csrc: Path) -> str:
    """Of the names and contents of all sources."""
    found = hashlib.sha256()
    for path in sorted(csrc.iterdir()):
        if path.suffix in (".h", ".cpp"):
            found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
