"""The kernels that are compiled before anything is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from benchmarks import prewarm
from benchmarks.parts import kernels


def test_one_job_for_each_shape_and_precision():
    planned = prewarm.planned()
    of_case = [(case.shape, case.precision) for case in planned]
    assert len(set(of_case)) == len(of_case)
    assert set(of_case) == {(case.shape, case.precision) for case in kernels.decisive()}


@pytest.mark.slow
@pytest.mark.slow_cpu
def test_the_decisive_losses_launch_only_what_is_compiled():
    path = Path(__file__)
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(path.with_name("prewarmed.py"))],
        env=variables | {"PYTHONPATH": str(path.parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["missing"] == [] and found["compiled"] > 30
