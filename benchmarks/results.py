"""Result files: one JSON file for each part of the benchmark, in one folder for each machine."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def save(folder: Path, what: str, head: dict, rows: list[dict], **more: object) -> Path:
    """Write ``folder/what.json``: the head of the run, what else belongs to it, and its rows."""
    path = folder / f"{what}.json"
    # One row on each line: a new measurement is a readable difference.
    text = json.dumps({**head, **more}, indent=1)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return write(path, f'{text[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


def write(path: Path, text: str) -> Path:
    """Write a file, also in place of another; nobody sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(text)
    return fresh.replace(path)


def load(folder: Path, what: str) -> dict | None:
    """Return the content of ``folder/what.json``, None where there is no such file."""
    path = folder / f"{what}.json"
    return json.loads(path.read_text()) if path.exists() else None


def rounded(figures: dict) -> dict:
    """Return the figures with five digits."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items()}
