"""The tuner: what it tries, compiles and times, and the table it writes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cases import DEVICE

if find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)


from benchmarks.cases import FP32_PRECISION
from benchmarks.part import Run
from benchmarks.shapes import SHAPES
from benchmarks.static_report import MODES, products_of
from benchmarks.timing import Timing
from benchmarks.tune import __main__ as program
from benchmarks.tune import cases, compiling, measuring
from benchmarks.tune.cases import CANDIDATES, KERNELS, Case, shape_of_size, shown
from benchmarks.tune.compiling import Compiled, Job
from benchmarks.tune.measuring import Measured, WrongResultError, faster_rules
from repmtl_kernels.backends.triton import tiles
from repmtl_kernels.backends.triton.tiles import KINDS, Request, Rule, Sweep, Tile

WHERE = torch.device(DEVICE)
CUDA = WHERE.type == "cuda"
CAPABILITY = tiles.capability_of(WHERE) if CUDA else 90
SMALL = shape_of_size(2, 2, 48, 40)
TRIED = {
    "gram": (Tile(16, 32, 32, 4, 2), Tile(32, 32, 32, 4, 2)),
    "gradient": (Tile(16, 32, 16, 4, 2), Tile(32, 32, 32, 4, 1)),
    "statistics": (Sweep(2, 4, 64, 2), Sweep(4, 4, 16, 4)),
    "pull": (Tile(32, 16, 16, 4, 2), Tile(16, 16, 32, 4, 1)),
}
HEAD = {
    "machine": {"name": "test"},
    "versions": {},
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
    "measured": {
        "copy_gbs": 4300.0,
        "matmul_tflops": {"float32": 50.0, "tf32": 395.0, "bfloat16": 790.0},
    },
}


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    """None at first; a call makes REPMTL_TILES name the file."""

    def name(path: Path | None) -> None:
        if path is None:
            monkeypatch.delenv(tiles.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(tiles.VARIABLE, str(path))
        tiles.own_rules.cache_clear()
        tiles._find.cache_clear()

    name(None)
    yield name
    tiles.own_rules.cache_clear()
    tiles._find.cache_clear()


# --- what is tried ---


def test_candidates_can_be_rules_and_every_case_has_some():
    for group in CANDIDATES:
        for tile in group.tiles:
            Rule(group.kernel, group.kinds, tile, group.odd, group.rows)  # raises for a bad one
        assert len(set(group.tiles)) == len(group.tiles) <= 16
    shapes = [*SHAPES.values(), SMALL, shape_of_size(2, 2, 40, 49)]
    every = cases.cases(shapes, list(MODES), ["contiguous", "channels_last"])
    assert {case.kernel for case in every} == set(KERNELS)
    for case in every:
        assert 4 <= len(set(case.candidates)) <= 16, case
        assert all(isinstance(tile, tiles.KERNELS[case.kernel]) for tile in case.candidates)


def test_most_telling_first_and_nothing_twice():
    modes = ["bfloat16", "tf32", "ieee"]
    names = ["office1", "vit1024", "cityscapes", "nyuv2"]
    layouts = ["contiguous", "channels_last"]
    found = cases.cases(cases.shapes_named(names), modes, layouts)
    first = [(c.kernel, c.shape.name, c.mode) for c in found[:9]]
    assert first == [
        *((kernel, "nyuv2", "bfloat16") for kernel in KERNELS),
        *((kernel, "cityscapes", "bfloat16") for kernel in KERNELS),
        ("gram", "nyuv2", "tf32"),
    ]
    assert len(set(found)) == len(found)
    labels = {(c.kernel, c.shape.name, c.mode, c.layout) for c in found}
    assert ("gram", "vit1024", "tf32", "channels_last") in labels
    # C side: no such kernel. Float32 has one mode without products. One position: one layout.
    assert not any(c.kernel == "pull" and c.shape.name == "vit1024" for c in found)
    assert not any(c.kernel == "statistics" and c.mode == "ieee" for c in found)
    assert not any(c.shape.name == "office1" and c.layout == "channels_last" for c in found)


def test_kernels_can_be_chosen():
    options = program.arguments(["--shape", "nyuv2", "--mode", "tf32", "--kernel", "pull", "gram"])
    found = cases.cases(program.shapes(options), options.mode, options.layout, options.kernel)
    assert [case.kernel for case in found] == ["pull", "gram"]
    assert program.arguments([]).kernel == list(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["bfloat16", "float16", "ieee"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_stage_of_a_case_asks_for_its_tile(kernel: str, mode: str, layout: str):
    case = Case(kernel, SMALL, mode, layout)
    (stage,) = measuring._stages(case, 1, WHERE)
    with products_of(mode), tiles.trying({kernel: TRIED[kernel][0]}) as given:
        found = measuring._result(stage)
    of_kernel = {request: tile for request, tile in given.items() if request.kernel == kernel}
    assert list(of_kernel.values()) == [TRIED[kernel][0]]
    (request,) = of_kernel
    assert request.kind == ("ieee" if mode == "ieee" else "16-bit")
    sizes = (48, 40) if kernel == "statistics" and layout == "contiguous" else (40, 48)
    assert (request.odd, request.rows, request.depth) == (False, *sizes)
    for value in found:
        assert torch.isfinite(value).all() and value.abs().max() > 0
        assert value.device.type == WHERE.type
    assert tiles._trial is None


def test_the_precision_of_products_is_restored(monkeypatch):
    monkeypatch.setenv(FP32_PRECISION, "tf32x3")
    with products_of("bfloat16"):
        assert os.environ[FP32_PRECISION] == ""
    assert os.environ[FP32_PRECISION] == "tf32x3"


# --- compiling ---


class _Ends:
    """Ends the process that it comes to."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.fixture
def compiling_processes(monkeypatch):
    """Workers that compile, from a process that interprets."""
    whole = compiling.compile_all

    def compile_all(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            return whole(*args, **kwargs)

    monkeypatch.setattr(program, "compile_all", compile_all)
    return compile_all


def test_a_crash_of_the_compiler_ends_its_job_alone(compiling_processes):
    case = Case("statistics", SMALL, "bfloat16", "contiguous")
    bad = Job(replace(case, layout=_Ends()), Sweep(2, 4, 64, 2))
    broken, good = compiling_processes([bad, Job(case, None)], CAPABILITY, 1)
    assert "process ended" in broken.error and broken.request is None
    assert good.error is None and good.is_baseline
    assert good.request == Request("statistics", "16-bit", False, 48, 40, CAPABILITY)
    assert good.tile == tiles._find(*good.request)


@pytest.mark.parametrize("tasks", [5, 9])
def test_tasks_of_several_launches_compile(compiling_processes, tasks: int):
    case = Case("gram", shape_of_size(tasks, 2, 64, 64), "bfloat16", "contiguous")
    tile = Tile(64, 64, 32, 4, 2, tma=True)
    one, two = compiling_processes([Job(case, None), Job(case, tile)], CAPABILITY, 1)
    assert one.error is None and two.error is None and one.hash != two.hash
    assert len(two.hash.split()) == -(-tasks // 4)


def test_nothing_is_begun_after_the_deadline():
    jobs = [Job(Case("gram", SMALL, "ieee", "contiguous"), None)] * 3
    assert compiling.compile_all(jobs, CAPABILITY, 2, until=0) == [None] * 3


# --- measuring ---


def _compiled(case: Case, tile: Tile | Sweep, *, first: bool = False, **more) -> Compiled:
    request = Request(case.kernel, "16-bit", False, 40, 48, CAPABILITY)
    return Compiled(case, tile, first, request=request, hash=str(tile), **more)


def _untimed(calls, device, effort):
    """Every call runs once and takes as long as the others."""
    for call in calls.values():
        call()
    return dict.fromkeys(calls, Timing(1.0, 0.0, 5))


def test_memory_that_a_stage_does_not_write_is_nan():
    torch.use_deterministic_algorithms(False)
    (found,) = measuring._result(lambda: [None, torch.empty(64, device=WHERE)])
    assert found.isnan().all() and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("wrong", [1.05, float("nan")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_wrong_candidate_is_told_by_name(monkeypatch, kernel: str, wrong: float):
    case = Case(kernel, SMALL, "bfloat16", "contiguous")
    good, bad = TRIED[kernel]
    whole = measuring.stage_of

    def stage_of(case, make):
        stage = whole(case, make)

        def broken():
            results = [value for value in stage() if value is not None]
            if tiles._trial.tiles[kernel] == bad:  # one number of one result
                last = (
                    results[-1].view(-1) if results[-1].is_contiguous() else results[-1].flatten()
                )
                last[last.abs().argmax()] *= wrong
            return results

        return broken

    monkeypatch.setattr(measuring, "stage_of", stage_of)
    monkeypatch.setattr(measuring, "side_by_side", _untimed)
    line_up = [_compiled(case, good, first=True), _compiled(case, TRIED[kernel][0]._replace())]
    assert len(measuring.measure(case, line_up, WHERE)) == 2
    with pytest.raises(WrongResultError, match=r"computes something else .* differs by") as error:
        measuring.measure(case, [*line_up, _compiled(case, bad)], WHERE)
    assert str(error.value).startswith(f"{case}: {shown(bad)} ")


@pytest.mark.parametrize(
    "error",
    [
        measuring.OutOfResources(300000, 232448, "shared memory"),
        RuntimeError("Failed to create tensor map descriptor: invalid argument"),
    ],
    ids=["shared memory", "tensor map"],
)
def test_a_candidate_that_can_not_run_is_left_out(monkeypatch, error: Exception):
    case = Case("gram", SMALL, "bfloat16", "contiguous")
    good, large = TRIED["gram"]
    whole = measuring.stage_of

    def stage_of(case, make):
        stage = whole(case, make)

        def limited():
            if tiles._trial.tiles["gram"] == large:
                raise error
            return stage()

        return limited

    monkeypatch.setattr(measuring, "stage_of", stage_of)
    monkeypatch.setattr(measuring, "side_by_side", _untimed)
    spilled = _compiled(case, Tile(64, 64, 64, 4, 3), error="spills 8 bytes of registers")
    first, second = _compiled(case, good, first=True), _compiled(case, large)
    found = measuring.measure(case, [first, second, spilled], WHERE)
    assert [m.candidate for m in found] == [first, second, spilled]
    assert [m.timing is None for m in found] == [False, True, True]
    assert found[1].error == str(error) and found[2].error == spilled.error
    rows = measuring.rows_of(found)
    assert [row["error"] for row in rows] == [None, found[1].error, spilled.error]


def test_without_the_tables_tile_nothing_is_measured(monkeypatch):
    case = Case("gram", SMALL, "bfloat16", "contiguous")
    good, large = TRIED["gram"]

    def too_large():
        raise measuring.OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(measuring, "stage_of", lambda case, make: too_large)
    line_up = [_compiled(case, large, first=True), _compiled(case, good)]
    (only,) = measuring.measure(case, line_up, WHERE)
    assert only.timing is None and "shared memory" in only.error


# --- rules ---

NOW, WIDE, LONG = Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4)


def _line(layout: str, times: dict[Tile, float], spread: float = 0.0) -> list[Measured]:
    case = Case("gram", SMALL, "bfloat16", layout)
    return [
        Measured(_compiled(case, tile, first=tile == NOW), Timing(ms, spread, 9))
        for tile, ms in times.items()
    ]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([{NOW: 1.0, WIDE: 0.98, LONG: 1.2}], None),  # less than 3 %
        ([{NOW: 1.0, WIDE: 0.96, LONG: 0.9}], LONG),
        ([{NOW: 1.0, WIDE: 0.96, LONG: 0.9}, {NOW: 1.0, WIDE: 1.0, LONG: 1.01}], WIDE),
        ([{NOW: 1.0, WIDE: 0.96, LONG: 0.9}, {NOW: 1.0, WIDE: 0.95}], WIDE),  # LONG did not fit
        ([{NOW: 1.0, WIDE: 0.9, LONG: 0.96}, {NOW: 2.0, WIDE: 1.98, LONG: 1.7}], LONG),
    ],
)
def test_a_rule_is_of_the_fastest_that_is_slower_nowhere(lines, expected):
    measured = [_line(str(n), times) for n, times in enumerate(lines)]
    rules = faster_rules(measured)
    if expected is None:
        assert rules == []
        return
    size, depth = (40, 40), (48, 48)
    capability = (CAPABILITY, CAPABILITY)
    assert rules == [Rule("gram", ("16-bit",), expected, False, size, depth, capability)]


def test_a_gain_within_the_spread_is_none():
    times = {NOW: 1.0, WIDE: 0.95}
    assert faster_rules([_line("contiguous", times, spread=0.06)]) == []
    assert len(faster_rules([_line("contiguous", times, spread=0.04)])) == 1


# --- the whole ---


@pytest.mark.slow
def test_tuned_tiles_are_those_that_the_kernels_take(
    tmp_path, monkeypatch, capsys, own_table, compiling_processes
):
    """Compiled by workers for a GPU, run here, timed by a stub that likes the last of each."""
    monkeypatch.setattr(Case, "candidates", property(lambda case: TRIED[case.kernel]))

    def timed(calls, device, effort):
        times = _untimed(calls, device, effort)
        *_, last = calls
        return times | {last: Timing(0.9, 0.01, 5)}

    monkeypatch.setattr(measuring, "side_by_side", timed)
    kept = Rule("gram", KINDS, Tile(16, 16, 16, 4, 1), rows=(1, 8))
    earlier, table = tmp_path / "earlier.json", tmp_path / "own.json"
    earlier.write_text(tiles.as_json([kept]))
    own_table(earlier)
    planned = cases.cases([SMALL], ["bfloat16", "ieee"], ["contiguous"])
    program.tune(planned, Run("tiles", WHERE, HEAD, tmp_path / "out"), CAPABILITY, table, 2)

    said = capsys.readouterr().out
    assert f"REPMTL_TILES={table}" in said and "8 rules" in said
    written = json.loads((tmp_path / "out" / "tiles.json").read_text())
    assert {"machine", "versions", "commit", "date", "measured", "notes"} <= written.keys()
    assert len(written["rows"]) == 3 * len(planned) == 24
    for number, row in enumerate(written["rows"]):
        assert row["baseline"] == (number % 3 == 0) and row["error"] is None
        assert row["ratio"] == (0.9 if number % 3 == 2 else 1.0)

    own_table(table)
    rules = tiles.own_rules()
    assert rules[-1] == kept and len(rules) == 9
    for kernel, kind in ((k, kind) for k in KERNELS for kind in ("16-bit", "ieee")):
        sizes = (48, 40) if kernel == "statistics" else (40, 48)
        best = TRIED[kernel][-1]
        assert tiles._find(kernel, kind, False, *sizes, CAPABILITY) == best
        for other in ((sizes[0] + 8, sizes[1]), (sizes[0], sizes[1] + 8)):
            assert tiles._find(kernel, kind, False, *other, CAPABILITY) != best
        assert tiles._find(kernel, kind, False, *sizes, CAPABILITY + 10) != best


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, WrongResultError])
def test_a_case_that_fails_or_has_no_time_is_noted(tmp_path, monkeypatch, capsys, error):
    large, good, late = planned = [
        Case("statistics", shape_of_size(2, 2, 48, n), "bfloat16", "contiguous") for n in (9, 8, 7)
    ]
    now = [0.0]
    monkeypatch.setattr(program.time, "monotonic", lambda: now[0])

    def compile_all(jobs, *_):
        return [_compiled(job.case, NOW, first=True) if job.tile is None else None for job in jobs]

    def measure(case, compiled, device):
        now[0] += 6.0
        if case == large:
            raise error("What happened.")
        return [Measured(c, Timing(1.0, 0.0, 5)) for c in compiled]

    monkeypatch.setattr(program, "compile_all", compile_all)
    monkeypatch.setattr(program, "measure", measure)
    program.tune(planned, Run("tiles", WHERE, HEAD, tmp_path, deadline=10.0), CAPABILITY, None, 1)
    written = json.loads((tmp_path / "tiles.json").read_text())
    assert [row["shape"] for row in written["rows"]] == [good.shape.name]
    what = (
        f"{error.__name__}: What happened." if error is torch.OutOfMemoryError else "What happened."
    )
    assert written["notes"][-2:] == [
        f"left out: {large}: {what}",
        f"left out for time: {late}",
    ]
    assert all(note in capsys.readouterr().out for note in written["notes"][-1:])


def test_without_time_nothing_is_measured(tmp_path):
    planned = [Case("gram", SMALL, "bfloat16", "contiguous")]
    run = Run("tiles", WHERE, HEAD, tmp_path, deadline=0.0)
    with pytest.raises(SystemExit, match="nothing was measured: .* not compiled in time"):
        program.tune(planned, run, CAPABILITY, None, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--size", "2", "0", "8", "8"], "expected numbers of at least 1"),
        (["--workers", "0"], "expected numbers of at least 1"),
    ],
)
def test_bad_arguments_are_refused(capsys, given: list[str], message: str):
    with pytest.raises(SystemExit):
        program.arguments(given)
    assert message in capsys.readouterr().err


def test_sizes_of_ones_own_replace_the_shapes():
    own = program.shapes(program.arguments(["--size", "2", "4", "8", "9"]))
    assert [(s.tasks, s.batch, s.channels, s.positions) for s in own] == [(2, 4, 8, 9)]
    both = program.shapes(
        program.arguments(["--size", "2", "4", "8", "9", "--shape", "office1", "nyuv2"])
    )
    assert [s.name for s in both] == [own[0].name, "nyuv2", "office1"]
    assert [s.name for s in program.shapes(program.arguments([]))][:2] == ["nyuv2", "cityscapes"]
