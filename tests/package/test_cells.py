"""Outcomes of tests become the cells of the table in docs/compatibility.md."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.parts import compatibility
from benchmarks.results import load

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import pytest

@pytest.mark.cell("both pass")
@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("case", [1, 2])
def test_pass(backend, case): pass

@pytest.mark.cell("one fails")
@pytest.mark.parametrize("backend", ["eager"])
@pytest.mark.parametrize("case", [1, 2, 3])
def test_fail(backend, case):
    if case == 2: raise OSError("broken")
    if case == 3: pytest.skip("not here")

@pytest.mark.cell("refused")
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_refused(backend, refused):
    if backend == "eager":
        with refused(ValueError, "no"): raise ValueError("no")

@pytest.mark.cell("not refused")
@pytest.mark.parametrize("backend", ["eager"])
def test_not_refused(backend, refused):
    with refused(ValueError, "no"): pass

@pytest.mark.cell("skipped")
@pytest.mark.parametrize("backend", ["eager"])
def test_skipped(backend): pytest.skip("needs a CUDA device")

@pytest.mark.cell("error before", backend="triton")
def test_error_before(a_fixture_that_is_missing): pass

def test_without_a_cell(): pass
"""


@pytest.mark.slow
def test_cells_are_the_outcomes(tmp_path):
    parallel = importlib.util.find_spec("xdist") is not None
    for name in ("conftest.py", "pairs.py", "cells.py", "cases.py"):
        (tmp_path / name).write_text((ROOT / "tests" / name).read_text())
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", "."]
    command += ["-n", "2"] if parallel else []
    done = subprocess.run(
        [*command, "--cells", "out", "test_some.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # there are failures
    rows = load(tmp_path / "out", "compatibility")
    table = [line for line in compatibility.table(rows).split("\n") if line[:1] == "|"]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]] == [
        ["both pass", "not run", "yes", "yes", "not run"],
        ["one fails", "not run", "failed: `OSError`", "not run", "not run"],
        ["refused", "yes", "no: `ValueError`", "not run", "not run"],
        ["not refused", "not run", "failed: `Failed`", "not run", "not run"],
        ["error before", "not run", "not run", "not run", "failed: `setup`"],
        ["skipped", "not run", "not run", "not run", "not run"],
    ]


def test_table_of_the_documentation_is_generated():
    text = (ROOT / "docs" / "compatibility.md").read_text()
    for match in report.MARKED.finditer(text):
        rows = load(report.RESULTS / match["machine"], match["name"])
        assert rows and compatibility.table(rows) in match[0]
