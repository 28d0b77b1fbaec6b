"""Every kernel compiles for each GPU generation without a GPU; what it is compiled to."""

import itertools
import json
import os
import subprocess
import sys
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


HEAVY = ("_gram_kernel", "_gradient_kernel")
SHARED_KILOBYTES = {80: 163, 90: 227, 100: 227}


def compiled(capability: int) -> list[dict]:
    """Rows of benchmarks.static_report; a process of its own, since this one may interpret.

    One for all modes and shapes: most kernels are the same for several of them.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static_report", "--json"]
    command += ["--capability", str(capability), "--layout", "contiguous"]
    command += ["--disassemble", *HEAVY, "_statistics_kernel"]
    done = subprocess.run(
        [*command, "--mode", *MODES, "--shape", *SHAPES],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_kernels_compile_without_spills_and_with_wide_loads(capability: int):
    rows = compiled(capability)
    for mode in MODES:
        kernels = {row["kernel"] for row in rows if row["mode"] == mode}
        assert len(kernels) >= 8, (mode, kernels)  # every stage is there
    spilled = [
        (r["kernel"], r["mode"], r["shape"], r["spill_bytes"]) for r in rows if r["spill_bytes"]
    ]
    assert not spilled
    assert max(row["shared_bytes"] for row in rows) <= SHARED_KILOBYTES[capability] * 1024
    every = set(itertools.product(HEAVY, MODES, SHAPES))
    heavy = [row for row in rows if row["kernel"] in HEAVY]
    assert {(row["kernel"], row["mode"], row["shape"]) for row in heavy} == every
    for row in heavy:
        names = "".join(row["matrix_instructions"])
        assert (TENSOR_CORES[capability] in names) == (row["mode"] != "ieee"), row
    reading = [row for row in rows if row["kernel"] == "_statistics_kernel"]
    assert {(row["mode"], row["shape"]) for row in reading} == set(itertools.product(MODES, SHAPES))
    for row in reading:
        if row["shape"] != "office49":  # 49 positions: rows that are not aligned
            assert set(row["global_loads"]) <= {"128", "32"} and row["global_loads"]["128"] > 0, row
