"""The scaling benchmark: what it varies, when a rival stops, and what its rows say."""

from __future__ import annotations

import math
import types
from pathlib import Path

import pytest
import torch
from cases import DEVICE
from stand_ins import CEILINGS, CPU, HEAD, new_run

from benchmarks import cases, floors, line_up, report, results, rivals
from benchmarks.cases import FLOAT32
from benchmarks.parts import kernels, scaling
from benchmarks.shapes import Shape
from repmtl_kernels import available_backends
from repmtl_kernels.backends import choice, contract

BACKENDS = ["eager", *sorted({"native"} & set(available_backends()))]
EFFORT = cases.Effort(0.0, 1, 1)
TINY = scaling.Plan(
    Shape("base", tasks=2, batch=3, channels=8, height=3, width=3, cpu_batch=3, network=""),
    Shape("anchors", tasks=2, batch=4, channels=8, height=1, width=1, cpu_batch=4, network=""),
    {
        "batch": (2, 4),
        "anchors": (4, 12, 36),
        "positions": (7, 8, 15),
        "channels": (4, 16),
        "all_anchors": (2, 8),
        "tasks": (1, 3),
    },
    rival_ms=math.inf,
)
VARIED = {"batch": "B", "channels": "C", "positions": "N", "tasks": "T"}
VARIED |= dict.fromkeys(scaling.OF_ANCHORS, "G")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setitem(scaling.PLANS, "cpu", TINY)
    monkeypatch.setitem(scaling.EFFORTS, "cpu", EFFORT)
    return monkeypatch


def measured() -> tuple[list[dict], list[str]]:
    run = new_run("scaling")
    scaling.measure(run)
    return run.rows, run.notes


def contestants(sweep: str) -> list[str]:
    if sweep in scaling.OF_ANCHORS:
        return ["materialized", *BACKENDS]
    return ["reference", "factored", *BACKENDS]


def of_rivals(rows: list[dict]) -> list[dict]:
    return [r for r in rows if r["backend"] == scaling.SWEEPS[r["sweep"]].rival]


# --- what is varied ---


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plans_vary_one_size(device: str):
    plan = scaling.PLANS[device]
    assert list(plan.values) == list(scaling.SWEEPS)
    points = scaling.points(device, quick=False)
    assert len(points) == len(scaling.PRECISIONS[device]) * sum(map(len, plan.values.values()))
    for sweep, values in plan.values.items():
        assert sorted(set(values)) == list(values)
        mine = [p for p in points if p.sweep == sweep]
        assert [p.value for p in mine[: len(values)]] == list(values)
        if sweep not in scaling.OF_ANCHORS:
            shapes = [p.case.shape for p in mine]
            for name in ("tasks", "batch", "channels", "positions"):
                assert len({getattr(s, name) for s in shapes}) == (
                    len(values) * (name == sweep) or 1
                )
    # Both sides of N = C, with odd numbers; the fit is of sizes where N is the larger side.
    positions, channels = plan.values["positions"], plan.base.channels
    assert {49, 196, 1728, channels - 1, channels} <= set(positions)
    assert any(n > channels and n % 2 for n in positions)
    assert min(positions[-(len(positions) // 2) :]) > channels
    several = plan.values["channels"]
    assert min(several[-(len(several) // 2) :]) >= plan.base.positions > several[0]
    assert plan.values["anchors"][-1] == 32768
    assert (min(plan.values["tasks"]), max(plan.values["tasks"])) == (1, 16)


def test_two_precisions_on_cuda_the_second_after_the_first():
    points = scaling.points("cuda", quick=False)
    half = len(points) // 2
    assert {(p.sweep in scaling.OF_ANCHORS, p.case.precision.name) for p in points[:half]} == {
        (False, "bfloat16"),
        (True, "float32"),
    }
    assert {p.case.precision.name for p in points[half:]} == {"tf32"}
    assert [p.value for p in points[half:]] == [p.value for p in points[:half]]
    assert len(scaling.points("cuda", quick=True)) < half


def test_grids_are_nearly_square():
    sizes = (1, 49, 196, 257, 1023, 1728)
    assert [scaling.grid(n) for n in sizes] == [
        (1, 1), (7, 7), (14, 14), (1, 257), (31, 33), (36, 48),
    ]  # fmt: skip


def test_work_of_the_contrast_with_anchors_of_other_ranks_by_hand():
    """T2 C7, 3 samples of 5: 3 pairs among them and 6 with the others, 12 numbers of weights."""
    shape = Shape("", tasks=2, batch=3, channels=7, height=1, width=1, cpu_batch=3, network="")
    products, sums = floors.contrast(shape, 4, floors.EXACT, with_grad=True, total=5)
    assert products == (4 * (5 * 14 + 3), 9 * 4 * 2 * 7)
    assert sums == (4 * (5 * 14 + 5 + 2 * 3 * 14 + 3), 12 * 4 * 2 * 7)
    assert floors.contrast(shape, 4, floors.EXACT, with_grad=False, total=5) == [products]
    alone = floors.contrast(shape, 4, floors.EXACT, with_grad=True)
    assert floors.contrast(shape, 4, floors.EXACT, with_grad=True, total=3) == alone
    assert [p.flops for p in alone] == [3 * 4 * 2 * 7, 6 * 4 * 2 * 7]


# --- the rows ---


def test_every_sweep_has_rows_of_every_contestant(tiny):
    rows, notes = measured()
    assert notes == []
    expected = {
        (sweep, value, backend)
        for sweep, values in TINY.values.items()
        for value in values
        for backend in contestants(sweep)
    }
    assert {(r["sweep"], r["value"], r["backend"]) for r in rows} == expected
    fields = {
        "function", "shape", "T", "B", "C", "N", "dtype", "precision", "layout", "direction",
        "backend", "graph", "ms", "spread", "peak_mb", "floor_ms", "fraction", "gbs",
        "error",
    }  # fmt: skip
    for row in rows:
        assert fields <= row.keys()
        assert row["error"] is None
        assert row[VARIED[row["sweep"]]] == row["value"]
        assert row["peak_mb"] > 0
        assert row["fraction"] == pytest.approx(row["floor_ms"] / row["ms"], rel=1e-3)
    assert {r["B"] for r in rows if r["sweep"] == "anchors"} == {TINY.anchors.batch}
    assert all(r["B"] == r["G"] for r in rows if r["sweep"] == "all_anchors")
    # Nobody's fraction is taken from another size's work.
    for sweep, values in TINY.values.items():
        work = {(r["value"], r["floor_ms"]) for r in rows if r["sweep"] == sweep}
        assert len(work) == len({floor for _, floor in work}) == len(values)
    assert line_up.broken(rows) == []


def test_the_points_of_cuda_can_be_measured(tiny):
    """In their dtypes and precisions; on the CPU, without Triton."""
    tiny.setitem(scaling.PLANS, "cuda", TINY)
    rates = {"matmul_tflops": {"bfloat16": 0.4, "tf32": 0.2, "float32": 0.1}}
    points = scaling.points("cuda", quick=False)
    for point in points:
        rows = scaling.measure_point(point, CPU, CEILINGS | rates, EFFORT, True)
        assert [(row["backend"], row["error"]) for row in rows] == [
            (name, None) for name in contestants(point.sweep)
        ]
        assert {(row["precision"], row["value"]) for row in rows} == {
            (point.case.precision.name, point.value)
        }
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("sweep", scaling.OF_ANCHORS)
def test_triton_can_be_measured(sweep: str, tiny):
    if "triton" not in available_backends():
        pytest.skip("no Triton here")
    tiny.setattr(cases, "backends", lambda *_: ["eager", "triton"])
    point = scaling.point(TINY, sweep, 4, FLOAT32)
    makers, exact = point.calls(torch.device(DEVICE))
    assert list(makers) == ["materialized", "eager", "triton"]
    values = [make()().mean().item() for make in makers.values()]
    assert values == pytest.approx([exact] * 3, rel=1e-5)


@pytest.mark.parametrize("sweep", ["batch", *scaling.OF_ANCHORS])
def test_contestants_rotate_through_the_same_inputs(sweep: str, tiny):
    """As on a GPU, whose cache would hold one set."""
    cache = types.SimpleNamespace(L2_cache_size=1000)
    tiny.setattr(torch.cuda, "get_device_properties", lambda _: cache)
    assert cases.input_sets(1000, torch.device("cuda")) == 3
    assert cases.input_sets(1, torch.device("cuda")) == cases.MAX_INPUT_SETS
    tiny.setattr(cases, "input_sets", lambda *_: 3)
    makers, exact = scaling.point(TINY, sweep, 4, FLOAT32).calls(CPU)
    for make in makers.values():
        call = make()
        values = [call().mean().item() for _ in range(4)]
        assert values[0] == pytest.approx(exact, rel=1e-4)
        assert values[3] == values[0]
        assert len(set(values)) == 3


@pytest.mark.parametrize("gathered", [False, True])
def test_the_rival_of_the_contrast_computes_the_same(gathered: bool):
    eager = choice.load("eager")
    a = torch.randn(3, 5, 20, dtype=torch.float64) + torch.randn(3, 1, 20)
    anchors, all_samples = eager.anchors(a, eps=0.0, with_grad=True), None
    if gathered:
        others = torch.randn(3, 9, 20, dtype=torch.float64)
        unit = eager.anchors(others, eps=0.0, with_grad=False).unit
        unit[:, 2:7] = anchors.unit
        told = torch.linspace(1, 3, 18, dtype=torch.float64).view(2, 9)
        all_samples = contract.AllSamples(unit, 2, lambda _: told)
    exact = eager.contrast(
        anchors, temperature=scaling.TEMPERATURE, with_grad=True, all_samples=all_samples
    )
    logsumexp, grad = rivals.contrast(a, all_samples, temperature=scaling.TEMPERATURE)
    torch.testing.assert_close(logsumexp, exact.logsumexp)
    torch.testing.assert_close(grad, exact.grad)


def test_what_there_is_no_time_for_is_noted():
    run = new_run(quick=True, deadline=0.0)
    scaling.measure(run)
    assert run.rows == []
    assert len(run.notes) == len(scaling.points("cpu", quick=True))
    assert all(note.startswith("left out for time: ") for note in run.notes)


def test_who_computes_something_else_is_out_whoever_comes_before(tiny):
    """The judge is in float64: it is not the first contestant."""
    right = kernels.contestants

    def one_is_wrong(case, device):
        found = right(case, device)
        return found | {"factored": lambda saliencies: 1.5 * found["factored"](saliencies)}

    tiny.setattr(kernels, "contestants", one_is_wrong)
    point = scaling.point(TINY, "batch", 4, FLOAT32)
    rows = scaling.measure_point(point, CPU, CEILINGS, EFFORT, False)
    errors = {row["backend"]: row["error"] for row in rows}
    assert set(errors) == {"factored", *BACKENDS}
    assert not any(errors[name] for name in BACKENDS)
    assert errors["factored"].startswith(line_up.DISAGREES)


def test_inputs_that_do_not_fit_are_noted(tiny):
    right = cases.make_inputs

    def make_inputs(case, device):
        if case.shape.name == "channels":
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return right(case, device)

    tiny.setattr(cases, "make_inputs", make_inputs)
    rows, notes = measured()
    assert {row["sweep"] for row in rows} == set(TINY.values) - {"channels"}
    assert len(notes) == len(TINY.values["channels"])
    assert all(n.startswith("left out: rep_mtl_loss channels") for n in notes)
    assert all(n.endswith("1 TiB") for n in notes)


# --- a rival that stops ---


def test_a_rival_that_takes_too_long_is_left_out_with_a_note(tiny):
    tiny.setitem(scaling.PLANS, "cpu", TINY._replace(rival_ms=0.0))
    rows, notes = measured()
    assert [r["value"] for r in of_rivals(rows)] == [v[0] for v in TINY.values.values()]
    others = sum(len(v) * (len(contestants(sweep)) - 1) for sweep, v in TINY.values.items())
    assert len(rows) - len(of_rivals(rows)) == others
    assert len(notes) == len(TINY.values)
    assert notes[1].startswith("materialized left out of anchors (float32) after 4: ")
    assert notes[1].endswith(" ms, over the limit of 0 ms")


def test_a_rival_that_fails_is_a_row_and_stops(tiny):
    def too_large(saliencies):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    right = kernels.contestants
    tiny.setattr(kernels, "contestants", lambda *a: right(*a) | {"reference": too_large})
    rows, notes = measured()
    failed = [r for r in of_rivals(rows) if r["backend"] == "reference"]
    assert {(r["sweep"], r["value"], r["ms"]) for r in failed} == {
        (sweep, values[0], None)
        for sweep, values in TINY.values.items()
        if sweep not in scaling.OF_ANCHORS
    }
    assert all("1 TiB" in r["error"] for r in failed)
    assert line_up.broken(rows) == []
    assert any(n.startswith("reference left out of tasks") and n.endswith("1 TiB") for n in notes)
    assert all(line.rows for line in scaling.lines(rows))


# --- slopes, table, figures ---


def made_up(sweep: str, backend: str, time: float, memory: float) -> list[dict]:
    """Constant in the first half of the sizes, then powers of the size."""
    sizes = [1, 2, 4, 8, 16, 32]
    return [
        {
            "sweep": sweep, "value": size, "function": "f", "C": 8, "N": 16,
            "precision": "float32", "backend": backend, "ms": 2 * max(size, 8) ** time,
            "peak_mb": 3 * max(size, 8) ** memory, "floor_ms": 0.5 * size,
            "fraction": 0.25, "error": None,
        }
        for size in sizes
    ]  # fmt: skip


def test_slopes_are_those_of_the_last_half():
    assert scaling.slope([1, 2, 4, 8], [7, 7, 3, 24]) == pytest.approx(3)
    assert scaling.slope([2, 6], [5, 5]) == pytest.approx(0)
    assert scaling.slope([10, 1, 2, 4], [9, 1, 3, 9]) == pytest.approx(math.log2(3))
    assert scaling.slope([4], [1]) is None
    rows = made_up("batch", "eager", 1.5, 1) + made_up("channels", "reference", 2, 2)
    failed = rows[0] | {"backend": "native", "ms": None, "error": "RuntimeError: no"}
    reference, eager = scaling.lines([*rows[::-1], failed])
    assert (eager.sweep, eager.backend) == ("batch", "eager")
    assert (eager.time, eager.floor, eager.memory) == pytest.approx((1.5, 1, 1))
    assert eager.expected == (1, 1)
    assert [row["value"] for row in eager.rows] == [1, 2, 4, 8, 16, 32]
    assert reference.time == pytest.approx(2)
    assert reference.expected == (2, 2)


def test_faster_growth_than_expected_is_bold():
    rows = made_up("batch", "eager", 1.5, 1) + made_up("channels", "reference", 2, 2)
    table = scaling.table({**HEAD, "notes": [], "rows": rows})
    assert "| batch B | 1, 32 | eager | **1.50** | 1 | 1.00 | 1.00 | 1 | 25% |" in table
    assert "| channels C | 1, 32 | reference | 2.00 | 2 | 1.00 | 2.00 | 2 | 25% |" in table
    assert "![Time](../benchmarks/results/cpu-2core/scaling.svg)" in table
    single = [row for row in rows if row["value"] == 1]
    table = scaling.table({**HEAD, "rows": single})
    assert "| batch B | 1, 1 | eager |  | 1 |  |  | 1 | 25% |" in table
    gpu = HEAD | {"machine": {"name": "h200", "gpu": "NVIDIA H200"}}
    table = scaling.table({**gpu, "notes": [], "rows": rows})
    assert "| batch B | float32 | 1, 32 | eager |" in table


def test_the_section_is_of_machines_with_results_only(tmp_path: Path):
    results.save(tmp_path / "cpu-2core", "scaling", HEAD, made_up("batch", "eager", 1, 1), notes=[])
    readme = tmp_path / "README.md"
    other = "<!-- bench:scaling:h200 -->\n<!-- /bench -->\n"
    readme.write_text(f"{other}<!-- bench:scaling:cpu-2core -->\n<!-- /bench -->\n")
    report.refresh(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith(f"{other}<!-- bench:scaling:cpu-2core -->\n| varied |")


def test_a_panel_for_each_sweep_with_its_floor(tiny):
    pytest.importorskip("matplotlib")
    rows, _ = measured()
    second = [row | {"precision": "tf32"} for row in rows]
    makers = scaling.PART.figures
    assert list(makers) == ["scaling", "scaling_memory"]
    figures = {name: make({**HEAD, "rows": rows + second}) for name, make in makers.items()}
    for name, figure in figures.items():
        assert [axes.get_xlabel() for axes in figure.axes if axes.get_visible()] == [
            scaling.SWEEPS[sweep].axis for sweep in TINY.values
        ]
        for axes, sweep in zip(figure.axes, TINY.values, strict=True):
            assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
            curves = [
                line for line in axes.lines if len(line.get_xdata()) == len(TINY.values[sweep])
            ]
            crossing = sweep in ("positions", "channels")
            curves = [line for line in curves if line.get_linestyle() != ":"]
            assert len(axes.lines) == len(curves) + crossing
            dashed = [line for line in curves if line.get_linestyle() == "--"]
            assert len(dashed) == (name == "scaling")
            assert len(curves) == len(dashed) + len(contestants(sweep))


def test_figures_are_the_same_again(tmp_path: Path):
    pytest.importorskip("matplotlib")
    rows = made_up("batch", "eager", 1.5, 1) + made_up("channels", "reference", 2, 2)
    results.save(tmp_path, "scaling", HEAD, rows, notes=[])
    written = report.draw_results(tmp_path)
    assert [p.name for p in written] == ["scaling.svg", "scaling_memory.svg"]
    before = [p.read_bytes() for p in written]
    assert [p.read_bytes() for p in report.draw_results(tmp_path)] == before
