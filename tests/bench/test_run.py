"""``python -m benchmarks``: the parts of a run, their time and their failures."""

from __future__ import annotations

import sys

import pytest
import torch
from stand_ins import CEILINGS, HEAD, new_run

from benchmarks import __main__ as program
from benchmarks import ceilings, results
from benchmarks.part import Part, Run


def test_parts_share_the_time_of_a_run():
    default = {"kernels": 0.45, "steps": 0.8, "quality": 1.0}
    assert program.chosen(None, "cpu") == pytest.approx(default)
    # Additions to a default run have the time that the others leave.
    assert program.chosen(None, "cuda") == pytest.approx(default | {"stages": 1.0})
    for name in program.PARTS:
        assert program.chosen([name], "cpu") == {name: 1.0}
    both = program.chosen(["stages", "kernels"], "cuda")
    assert list(both) == ["kernels", "stages"]
    assert both == pytest.approx({"kernels": 0.45 / 0.55, "stages": 1.0})


def run_main(monkeypatch, *arguments: str, measure=None) -> list[Run]:
    """``python -m benchmarks`` with parts that measure nothing."""
    runs = []
    measure = measure or runs.append
    made = (
        Part("first", "FIRST", measure, share=0.5, on=("cpu",)),
        Part("second", "SECOND", measure, share=0.5, on=("cpu",)),
        Part("third", "THIRD", measure, share=0.5),
    )
    monkeypatch.setattr(program, "PARTS", {part.name: part for part in made})
    monkeypatch.setattr(ceilings, "of", lambda *_: CEILINGS)
    monkeypatch.setattr(program, "describe", lambda *_: HEAD)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", *arguments])
    program.main()
    return runs


def test_a_part_that_fails_costs_no_other(monkeypatch, tmp_path, capsys):
    ran = []

    def measure(run):
        ran.append(run.name)
        return 1 / 0 if run.name == "first" else []

    with pytest.raises(SystemExit, match="first: ZeroDivisionError: division by zero"):
        run_main(monkeypatch, "--out", str(tmp_path), measure=measure)
    assert ran == ["first", "second"]
    assert "in measure" in capsys.readouterr().err


def test_only_takes_several_parts(monkeypatch, tmp_path):
    runs = run_main(monkeypatch, "--only", "third", "first", "--out", str(tmp_path))
    assert [run.name for run in runs] == ["first", "third"]
    assert all(not run.quick and run.folder == tmp_path for run in runs)
    assert runs[0].deadline < runs[1].deadline
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--only", "fourth")


def test_rows_are_saved_as_they_come_and_what_is_left_out_is_noted(tmp_path):
    run = new_run("name", folder=tmp_path, notes=["busy"], more={"default_backend": "eager"})

    def measure(case: str) -> list[dict]:
        if case == "large":
            raise torch.OutOfMemoryError("tried to allocate 1 TiB\nMore")
        if case == "last":
            run.deadline = 0.0
        return [{"case": case}]

    run.each(["first", "large", "last", "late"], measure)
    found = results.load(tmp_path, "name")
    assert found["rows"] == run.rows == [{"case": "first"}, {"case": "last"}]
    run.save()
    found = results.load(tmp_path, "name")
    assert found["notes"] == [
        "busy",
        "left out: large: OutOfMemoryError: tried to allocate 1 TiB",
        "left out for time: late",
    ]
    assert (found["commit"], found["default_backend"]) == (HEAD["commit"], "eager")


def test_what_is_broken_ends_the_run_with_an_error(monkeypatch, tmp_path):
    part = Part("first", measure=lambda run: None, broken=lambda rows: ["first: wrong"])
    monkeypatch.setattr(program, "PARTS", {"first": part})
    monkeypatch.setattr(ceilings, "of", lambda *_: CEILINGS)
    monkeypatch.setattr(program, "describe", lambda *_: HEAD)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    command = ["benchmarks", "--device", "cpu", "--only", "first", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="first: wrong"):
        program.main()
