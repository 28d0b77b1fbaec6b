"""The features of each backend, by the outcomes of ``pytest -m cell --cells FOLDER``."""

from __future__ import annotations

from benchmarks.output import by, captioned, groups, markdown, on_gpu
from benchmarks.part import Part
from repmtl_kernels.backends.choice import BACKENDS


def table(result: dict) -> str:
    lines = []
    for (feature,), rows in groups(result["rows"], "feature").items():
        of = by(rows, "backend")
        lines.append([feature, *(_cell(of.get(name)) for name in BACKENDS)])
    lines.sort(key=lambda line: set(line[1:]) == {"not run"})  # these last
    tests = {test for row in result["rows"] for test in row["tests"]}
    text = (
        f"The outcome of {len(tests)} tests. yes: all of a cell's tests passed; no: refused with "
        "that error, as tested; not run: the backend is not on this machine, or the test needs a "
        "GPU."
    )
    if not on_gpu(result):
        text += " Triton's kernels ran under its interpreter."
    return captioned(markdown(["", *BACKENDS], lines), result, text)


def _cell(row: dict | None) -> str:
    if row is None or row["outcome"] == "skipped":
        return "not run"
    if row["outcome"] == "passed":
        return "yes"
    return f"{'no' if row['outcome'] == 'refused' else 'failed'}: `{row['why']}`"


PART = Part("compatibility", tables={"compatibility": table})
