"""Every kernel compiles for each GPU generation without a GPU, and none spills registers."""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow_cpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.timeout(600),
]

# N side in large tiles, N side with unaligned rows, C side.
SHAPES = ["nyuv2", "office49", "vit1024"]
MODES = ["bfloat16", "float16", "ieee", "tf32x3", "tf32"]
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTC"}


@cache
def compiled(capability: int, mode: str) -> list[dict]:
    """Rows of benchmarks.static_report; a process of its own, since this one may interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static_report", "--json"]
    command += ["--capability", str(capability), "--mode", mode, "--layout", "contiguous"]
    done = subprocess.run(
        [*command, "--shape", *SHAPES],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_spills(capability: int, mode: str):
    rows = compiled(capability, mode)
    kernels = {row["kernel"] for row in rows}
    assert len(kernels) >= 8, kernels  # every stage is there
    spilled = [(r["kernel"], r["shape"], r["spill_bytes"]) for r in rows if r["spill_bytes"]]
    assert not spilled
    limit = {80: 163, 90: 227, 100: 227}[capability] * 1024
    assert max(row["shared_bytes"] for row in rows) <= limit
    heavy = [r for r in rows if r["kernel"] in ("_gram_kernel", "_gradient_kernel")]
    assert heavy
    for row in heavy:
        names = "".join(row["matrix_instructions"])
        assert (TENSOR_CORES[capability] in names) == (mode != "ieee"), row


@pytest.mark.parametrize("mode", ["bfloat16", "ieee"])
def test_rows_are_read_16_bytes_at_a_time(mode: str):
    rows = [r for r in compiled(90, mode) if r["kernel"] == "_statistics_kernel"]
    assert {row["shape"] for row in rows} == set(SHAPES)
    for row in rows:
        if row["shape"] != "office49":  # 49 positions: rows that are not aligned
            assert set(row["global_loads"]) <= {"128", "32"} and row["global_loads"]["128"] > 0, row
