"""The table of the cases of compiled kernels."""

from __future__ import annotations

import json
from types import SimpleNamespace

from ptx.report import Report, kernels_of_the_package, table


def outcome(test: str, mode: str, launches: list, failed: bool = False) -> SimpleNamespace:
    properties = [("mode", mode), ("compiled", launches)]
    return SimpleNamespace(when="call", nodeid=test, user_properties=properties, failed=failed)


def report_of(folder, *outcomes: SimpleNamespace) -> Report:
    report = Report(folder)
    for one in outcomes:
        report.pytest_runtest_logreport(one)
    return report


def test_kernels_are_found_in_the_source():
    kernels = kernels_of_the_package()
    assert len(kernels) == len(set(kernels)) >= 15
    assert {"_gram_kernel", "_statistics_kernel", "_batch_norm_sums_kernel"} <= set(kernels)


def test_a_case_counts_for_each_kernel_that_it_launched(tmp_path):
    first, second, *_ = kernels_of_the_package()
    report = report_of(
        tmp_path,
        outcome("a", "bfloat16", [(90, {first: 2, second: 1})]),
        outcome("b", "bfloat16", [(90, {first: 1}), (90, {first: 3})], failed=True),
        outcome("c", "tf32", [(80, {second: 1})]),
        SimpleNamespace(when="call", nodeid="d", user_properties=[], failed=True),
    )
    rows = [row for row in report.rows() if row["cases"]]
    assert [tuple(row.values()) for row in rows] == [
        (first, 90, "bfloat16", 2, 1),
        (second, 80, "tf32", 1, 0),
        (second, 90, "bfloat16", 1, 0),
    ]
    assert report.missing() == set(kernels_of_the_package()) - {first, second}
    head, *lines = table(rows)
    assert head.split() == ["sm_80", "tf32", "sm_90", "bfloat16"]
    assert [line.split() for line in lines] == [[first, "-", "1/2"], [second, "0/1", "0/1"]]


def test_a_kernel_that_no_case_launched_fails_the_run(tmp_path):
    *others, last = kernels_of_the_package()
    session = SimpleNamespace(exitstatus=0)
    report = report_of(tmp_path, outcome("a", "ieee", [(80, dict.fromkeys(others, 1))]))
    report.pytest_sessionfinish(session)
    assert session.exitstatus == 1
    saved = json.loads((tmp_path / "compiled.json").read_text())
    assert (saved["cases"], saved["wrong"], saved["failed"]) == (1, 0, [])
    assert [row["kernel"] for row in saved["rows"] if not row["cases"]] == [last]

    session.exitstatus = 0
    report.pytest_runtest_logreport(outcome("b", "ieee", [(80, {last: 1})]))
    report.pytest_sessionfinish(session)
    assert session.exitstatus == 0
