"""The code of docs/tutorial.md runs from the first block to the last."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import doom

TUTORIAL = (Path(__file__).resolve().parents[2] / "docs" / "tutorial.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TUTORIAL, re.M | re.S)
TRAINING, VALIDATION = 720, 2  # the picture shows views of these numbers


def views() -> dict[str, np.ndarray]:
    """Return what the loader returns, with random labels and next to no pixels."""
    random, count, size = np.random.default_rng(0), TRAINING + VALIDATION, (16, 24)
    normal = np.zeros((count, *size, 3), np.int8)
    normal[..., 1] = 127
    return {
        "image": random.integers(256, size=(count, *size, 3), dtype=np.uint8),
        "seg": random.integers(6, size=(count, *size), dtype=np.uint8),
        "depth": random.integers(200, size=(count, *size), dtype=np.uint8),
        "normal": normal,
        "split": np.repeat([0, 1], [TRAINING, VALIDATION]),
        "class_names": np.array(["wall", "floor"]),
    }


@pytest.mark.slow_cpu
def test_tutorial(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.setattr(doom, "load", views)
    monkeypatch.chdir(tmp_path)
    source, changes = re.subn(
        "^STEPS, BATCH = 300, 16$", "STEPS, BATCH = 8, 4", "\n".join(BLOCKS), flags=re.M
    )
    assert changes == 1
    exec(compile(source, "tutorial.md", "exec"), {"__name__": "tutorial"})
    printed = capsys.readouterr().out
    assert (tmp_path / "scenes.png").stat().st_size > 1000
    assert "720 views to train with, 2 for validation" in printed
    assert printed.count("mean IoU, %") == 3 and "nan" not in printed
    assert "2 calls of 8 had the regulariser" in printed
    assert printed.count("of the views") == 3
