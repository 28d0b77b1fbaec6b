"""The files of the studies: where data lie, and results that are complete once they are there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

FOLDER_VARIABLE = "REPMTL_DATA"


def located(folder: Path | None, file: str, name: str, source: str) -> Path:
    """Return the path of a data set's file; raise FileNotFoundError where it is missing."""
    path = folder and folder / file
    if path is None or not path.exists():
        where = f"{path} does not exist" if path else f"no folder was given ({FOLDER_VARIABLE})"
        raise FileNotFoundError(
            f"{name}: {where}. It is {file}, {source}. Name its folder with --data"
        )
    return path


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write all or nothing: a file that is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    save(partial)
    partial.replace(path)
