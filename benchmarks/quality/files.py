"""Files that are complete as soon as they are there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write all or nothing: a file that is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    save(partial)
    partial.replace(path)
