"""The part of the losses: its cases, contestants, checks and rows."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch
from stand_ins import BUILT, CEILINGS, CPU, EFFORT, SMALL, new_run

from benchmarks import cases, floors, line_up, results, rivals, rotation
from benchmarks.cases import BFLOAT16, FLOAT32, TF32, TF32X3, Case
from benchmarks.parts import kernels
from benchmarks.shapes import SHAPES, Shape

DIRECTIONS = ("forward", "forward_backward")


@pytest.fixture(scope="module")
def kernel_rows() -> list[dict]:
    case = Case("csa_loss", SMALL, FLOAT32)
    return kernels.measure_case(case, CPU, CEILINGS, EFFORT)


def test_kernel_rows_have_every_field(kernel_rows):
    fields = {
        "function", "shape", "T", "B", "C", "N", "dtype", "precision", "layout", "direction",
        "backend", "graph", "ms", "spread", "peak_mb", "floor_ms", "fraction", "gradient_error",
    }  # fmt: skip
    assert {(r["backend"], r["direction"], r["graph"]) for r in kernel_rows} == {
        (b, d, False) for b in ("reference", "factored", "eager", *BUILT) for d in DIRECTIONS
    }
    for row in kernel_rows:
        assert fields <= row.keys()
        assert (row["T"], row["B"], row["C"], row["N"]) == (2, 3, 8, 16)
        assert row["error"] is None
        assert row["fraction"] == pytest.approx(row["floor_ms"] / row["ms"], rel=1e-3)
        assert 1e-9 < row["gradient_error"] < 1e-5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
@pytest.mark.parametrize("function", kernels.FUNCTIONS)
def test_every_function_and_layout_can_be_measured(function, layout):
    case = Case(function, SMALL, FLOAT32, layout)
    (saliencies,) = cases.make_inputs(case, CPU)
    shapes = {"tokens": (3, 16, 8)}
    assert saliencies[0].shape == shapes.get(layout, (3, 8, 4, 4))
    channels_last = saliencies[0].dim() == 4 and saliencies[0].stride(1) == 1
    assert channels_last == (layout == "channels_last")
    rows = kernels.measure_case(case, CPU, CEILINGS, EFFORT)
    assert all(row["ms"] > 0 for row in rows)
    errors = [row["gradient_error"] for row in rows]
    assert max(errors) < 1e-5


@pytest.mark.parametrize("size", [(3, 5, 12, 2, 3), (2, 4, 6, 3, 5), (3, 4, 7, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
@pytest.mark.parametrize("function", ["csa_loss", "rep_mtl_loss"])
def test_the_factored_rival_is_the_reference(function, layout, size):
    shape = Shape("office49", *size, 4, "test")
    exact = cases.Precision(torch.float64, "highest", "float64")
    case = Case(function, shape, exact, layout)
    (tensors,) = cases.make_inputs(case, CPU)
    values, grads = [], []
    for form in (rivals.LITERAL, rivals.FACTORED):
        loss = kernels.loss_of(case, form[function])
        values.append(loss(tensors))
        grads.append(torch.autograd.grad(values[-1], tensors))
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)


def test_the_error_of_a_gradient_is_that_of_the_worst_task(monkeypatch):
    case = Case("csa_loss", SMALL, FLOAT32)
    losses = kernels.contestants(case, CPU)

    def half_of_a_gradient(saliencies):
        first, second = saliencies
        detached = losses["eager"]([first.detach(), second])
        return losses["eager"](saliencies) / 2 + detached / 2

    monkeypatch.setattr(
        kernels,
        "contestants",
        lambda *_: {"reference": losses["reference"], "eager": half_of_a_gradient},
    )
    rows = kernels.measure_case(case, CPU, CEILINGS, EFFORT)
    errors = {row["backend"]: row["gradient_error"] for row in rows}
    assert errors["reference"] < 1e-5
    assert errors["eager"] == pytest.approx(0.5, rel=1e-4)


def test_a_case_too_large_to_be_judged_on_a_cpu_has_no_error(monkeypatch):
    shape = SHAPES["cityscapes"].scaled("cpu")
    assert floors.literal_flops("csa_loss", shape) > kernels.JUDGE_FLOPS
    assert floors.literal_flops("csa_loss", SHAPES["vit1024"].scaled("cpu")) < kernels.JUDGE_FLOPS
    # T2 B3 C8 N16: S S^T and the two products of its gradient, 2 FLOPs for a multiply-add.
    assert floors.literal_flops("csa_loss", SMALL) == 3 * 2 * (2 * 3 * 8 * 8 * 16)
    assert floors.literal_flops("tsr_loss", shape) == 0
    monkeypatch.setattr(kernels, "JUDGE_FLOPS", 0)
    case = Case("csa_loss", SMALL, FLOAT32)
    monkeypatch.setattr(kernels, "planned", lambda *_: [case])
    monkeypatch.setattr(kernels, "QUICK", EFFORT)
    run = new_run(quick=True)
    kernels.measure(run)
    assert run.rows and all(row["gradient_error"] is None for row in run.rows)


def test_products_are_in_the_precision_of_the_case(monkeypatch):
    monkeypatch.setenv("REPMTL_FP32_PRECISION", "ieee")
    for precision, matmul, asked in (
        (TF32, "high", None),
        (TF32X3, "highest", "tf32x3"),
        (BFLOAT16, "highest", None),
    ):
        with cases.products_in(precision):
            assert torch.get_float32_matmul_precision() == matmul
            assert os.environ.get("REPMTL_FP32_PRECISION") == asked
        assert torch.get_float32_matmul_precision() == "highest"
        assert os.environ["REPMTL_FP32_PRECISION"] == "ieee"


def test_a_precision_of_the_triton_kernels_alone_is_theirs_alone(monkeypatch):
    monkeypatch.setattr(cases, "refusal", lambda *_: None)
    cuda = torch.device("cuda")
    assert cases.backends(TF32X3, cuda) == ["triton"]
    assert cases.backends(BFLOAT16, cuda) == ["eager", "triton", "native"]
    assert floors.matmul_rate({"tf32": 300.0, "float32": 50.0}, "tf32x3") == 100
    assert floors.matmul_rate({"tf32": 300.0, "float32": 50.0}, "float32") == 50


def test_every_case_of_a_gpu_is_measured_once():
    planned = kernels.planned("cuda", quick=False)
    plain = [case for case in planned if not case.compiled]
    kinds = [(c.function, c.shape, c.precision, c.layout) for c in plain]
    assert len(set(kinds)) == len(kinds)
    expected = {
        (function, shape, precision, "contiguous")
        for function in kernels.FUNCTIONS
        for shape in SHAPES.values()
        for precision in cases.PRECISIONS["cuda"]
        if function != "tsr_loss" or precision not in (TF32, TF32X3)
    }
    assert expected <= set(kinds)
    layouts = {kind[3] for kind in set(kinds) - expected}
    assert layouts == {"channels_last", "tokens"}
    # torch.compile is slow: what decides is measured without it, then with it, then the rest.
    quick = kernels.planned("cuda", quick=True)
    assert quick == [replace(case, compiled=False) for case in kernels.decisive()]
    compiled = [case for case in kernels.decisive() if case.compiled]
    first = len(quick) + len(compiled)
    assert planned[:first] == [*quick, *compiled]
    assert not any(case.compiled for case in planned[first:])
    everywhere = {
        case.shape.name
        for case in planned
        if case.compiled and (case.function, case.precision) == ("rep_mtl_loss", BFLOAT16)
    }
    assert everywhere == set(SHAPES)
    quick = kernels.planned("cpu", quick=True)
    assert quick and not any(case.compiled for case in quick)
    assert {case.shape.name for case in quick} == set(kernels.QUICK_SHAPES)


def test_a_run_goes_on_with_what_is_missing(monkeypatch, tmp_path):
    """Cases with rows are not measured again, unless torch.compile comes to them."""
    other = replace(SMALL, name="other")
    plain, late = (Case("rep_mtl_loss", shape, FLOAT32) for shape in (SMALL, other))
    compiled, tried = replace(plain, compiled=True), []

    def measure_case(case, *_):
        tried.append(case)
        names = ["eager", *(["reference_compiled"] if case.compiled else [])]
        figures = {"direction": "forward", "graph": False, "ms": len(tried), "error": "none"}
        return [case.labels() | figures | {"backend": name} for name in names]

    def run(plan: list[Case], **options) -> list[tuple]:
        monkeypatch.setattr(kernels, "planned", lambda *_: plan)
        run = new_run("kernels", folder=tmp_path, **options)
        kernels.measure(run)
        rows = results.load(tmp_path, "kernels")["rows"]
        return [(row["shape"], row["backend"], row["ms"]) for row in rows]

    monkeypatch.setattr(kernels, "measure_case", measure_case)
    assert run([plain]) == [(SMALL.name, "eager", 1)]
    expected = [(SMALL.name, "eager", 2), (SMALL.name, "reference_compiled", 2)]
    assert run([plain, compiled], go_on=True) == expected
    assert run([plain, compiled, late], go_on=True) == [*expected, ("other", "eager", 3)]
    assert tried == [plain, compiled, late]
    # Without time for the compiler, the rows of the plain case stay.
    monkeypatch.setitem(kernels.COMPILE_SECONDS, "cpu", 45)
    found = run([plain, compiled], deadline=time.monotonic() + 40)
    assert found == [(SMALL.name, "eager", 4)] and tried[3:] == [plain]


def test_contestants_are_captured_ours_first(monkeypatch):
    """A failed capture has a row, and the others are measured."""
    case = Case("csa_loss", SMALL, FLOAT32)
    inputs = cases.make_inputs(case, CPU)
    losses = kernels.contestants(case, CPU)
    losses[kernels.COMPILED] = lambda s, right=losses["reference"]: right(s)
    monkeypatch.setattr(kernels, "contestants", lambda *_: losses)
    order = []

    def captured(call, device):
        loss, with_backward = call.run.args
        name = next(name for name, one in losses.items() if one is loss)
        order.append(name)
        if name == "factored":
            raise RuntimeError("operation not permitted when stream is capturing")
        if name == "eager" and not with_backward:
            return rotation.Rotating(lambda _: torch.tensor(17.0), inputs)
        return call

    monkeypatch.setattr(line_up, "graphed", captured)
    cuda = torch.device("cuda")
    monkeypatch.setattr(line_up, "free", lambda _: None)
    calls, errors = kernels.line_up_of(case, inputs, cuda).prepared(cuda)
    ours = sum(name in line_up.BACKENDS for name in order)
    assert all(name in line_up.BACKENDS for name in order[:ours])
    assert set(order) == set(losses)
    graphs = {(way.backend, way.direction) for way in calls if way.graph}
    assert ("eager", "forward_backward") in graphs
    assert ("reference_compiled", "forward") not in {way[:2] for way in calls}
    assert ("reference_compiled", "forward_backward") in graphs
    assert {way[:2] for way in errors} == {
        ("factored", "forward"), ("factored", "forward_backward"), ("eager", "forward")
    }  # fmt: skip
    assert all(way.graph for way in errors)
    assert "instead of" in errors["eager", "forward", True]
    assert {way[:2] for way in calls if not way.graph} >= {("factored", "forward")}
    rows = [case.labels() | way._asdict() | {"error": error} for way, error in errors.items()]
    assert len(line_up.broken(rows)) == 1
    assert "eager in a CUDA graph: computes something else" in line_up.broken(rows)[0]


def test_a_contestant_that_computes_something_else_is_called_out(monkeypatch):
    case = Case("csa_loss", SMALL, FLOAT32)
    losses = kernels.contestants(case, CPU)
    losses["eager"] = lambda s, right=losses["eager"]: 1.1 * right(s)
    monkeypatch.setattr(kernels, "contestants", lambda *_: losses)
    rows = kernels.measure_case(case, CPU, CEILINGS, EFFORT)
    assert {r["backend"] for r in rows if r["ms"] is None} == {"eager"}
    assert len(line_up.broken(rows)) == len(DIRECTIONS)
    assert "eager: computes something else" in line_up.broken(rows)[0]


def test_a_case_that_does_not_fit_or_has_no_time_to_compile_is_noted(monkeypatch):
    case = Case("csa_loss", SMALL, FLOAT32, compiled=True)
    measured = []

    def measure_case(case, *_):
        measured.append(case)
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(kernels, "planned", lambda *_: [case])
    monkeypatch.setattr(kernels, "measure_case", measure_case)
    monkeypatch.setitem(kernels.COMPILE_SECONDS, "cpu", 1000)
    run = new_run(quick=True, deadline=time.monotonic() + 2000)
    kernels.measure(run)
    assert run.rows == []
    assert run.notes == [f"left out: {case}: OutOfMemoryError: tried to allocate 1 TiB"]
    run = new_run(quick=True, deadline=time.monotonic() + 500)
    kernels.measure(run)
    assert run.notes == [f"left out for time: {case}"]
    assert measured == [case]


def test_running_out_of_memory_is_a_row(monkeypatch):
    case = Case("csa_loss", SMALL, FLOAT32)
    losses = kernels.contestants(case, CPU)

    def too_large(saliencies):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(
        kernels, "contestants", lambda *_: {"reference": too_large, "eager": losses["eager"]}
    )
    rows = kernels.measure_case(case, CPU, CEILINGS, EFFORT)
    failed = [r for r in rows if r["backend"] == "reference"]
    assert len(failed) == 2
    assert all(r["ms"] is None and "1 TiB" in r["error"] for r in failed)
    assert all(r["ms"] > 0 for r in rows if r["backend"] == "eager")
    assert line_up.broken(rows) == []


def test_cases_left_out_for_time_are_noted():
    run = new_run(quick=True, deadline=0.0)
    kernels.measure(run)
    assert run.rows == []
    assert len(run.notes) == len(kernels.planned("cpu", quick=True))
