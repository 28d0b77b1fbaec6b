"""Stages one by one: their counted work, and the rows of the part."""

from __future__ import annotations

import pytest
import torch
from stand_ins import BUILT, CPU, EFFORT, SMALL, new_run

from benchmarks import cases, floors, line_up
from benchmarks.cases import FLOAT32
from benchmarks.parts import stages
from benchmarks.shapes import SHAPES, Shape
from repmtl_kernels import rep_mtl_loss
from repmtl_kernels.backends import choice
from repmtl_kernels.backends.contract import CSAGradient

ALL = (*stages.MAIN, *stages.OTHER)


@pytest.mark.parametrize(
    ("stage", "options", "moved", "flops"),
    [
        # T2 B3 C8 N16, 2-byte saliencies: 768 numbers; 6 samples; sums of 4 bytes.
        ("statistics", {"positions": True, "channels": True}, 1536 + 4 * (96 + 48 + 6), 0),
        ("statistics", {"positions": True, "channels": False}, 1536 + 4 * 96, 0),
        ("statistics", {"positions": False, "channels": True}, 1536 + 4 * (48 + 6), 0),
        # 3 products of 2 tasks, 128 terms each; 4 numbers of 8 bytes for each of 3 samples.
        ("affinity", {}, 1536 + 8 * 12, 3 * 3 * 2 * 128),
        ("entropy", {"with_grad": True}, 4 * 2 * 96, 0),
        # A sample has 2 x 2 products of 8 channels, 3 of them its own; 4 weighted for radial.
        ("anchors", {"with_grad": True}, 4 * (3 * 48 + 3), 3 * (3 * 16 + 4 * 16)),
        # 36 entries of an 8 x 8 matrix, 16 terms each; 2 anchors times 8 x 16.
        ("gram", {"with_grad": False}, 1536 + 4 * (48 + 24), 6 * (2 * 36 * 16 + 2 * 2 * 128)),
        (
            "gram",
            {"with_grad": True},
            1536 + 4 * (48 + 24) + 6 * 64 * 2 + 4 * 6 * 2 * 8,
            6 * (2 * 36 * 16 + 2 * 2 * 128),
        ),
        # 3 pairs of samples with 2 x 2 products of 8 channels. Both ways for the gradient, in a
        # pass that reads all anchors again, with their sums, radial and factor.
        ("contrast", {"with_grad": False}, 4 * (48 + 3), 3 * 4 * 16),
        (
            "contrast",
            {"with_grad": True},
            4 * (48 + 3) + 4 * (48 + 3 + 2 * 48 + 3),
            3 * 4 * 16 + 6 * 4 * 16,
        ),
        ("saliency_grad", {}, 3 * 1536 + 6 * 64 * 2, 6 * 2 * 8 * 8 * 16),
    ],
)
def test_exact_work_of_a_stage(stage, options, moved, flops):
    work = getattr(floors, stage)(SMALL, 2, floors.EXACT, **options)
    assert sum(p.bytes for p in work) == moved
    assert sum(p.flops for p in work) == flops


def test_stages_of_the_losses_have_at_least_their_work():
    """The forward passes of CSA are those of its stages, which also write their results."""
    for shape in SHAPES.values():
        for tiling in (floors.EXACT, floors.TENSOR_CORES):
            statistics, gram = floors.forward_passes("csa_loss", shape, 2, tiling)
            (of_stage,) = floors.statistics(shape, 2, tiling, positions=False, channels=True)
            assert of_stage.bytes > statistics.bytes
            (of_stage,) = floors.gram(shape, 2, tiling, with_grad=False)
            assert of_stage.flops == gram.flops
            assert of_stage.bytes > gram.bytes


@pytest.fixture(scope="module")
def stage_rows() -> list[dict]:
    shape = Shape("office49", 2, 3, 8, 4, 4, 3, "test")
    case = stages.Case(ALL, shape, FLOAT32)
    return stages.measure_case(new_run(), EFFORT, case)


def test_stage_rows_have_every_field(stage_rows):
    fields = {
        "function", "variant", "shape", "T", "B", "C", "N", "dtype", "precision", "layout",
        "direction", "backend", "graph", "ms", "spread", "peak_mb", "floor_ms", "fraction", "gbs",
    }  # fmt: skip
    assert {(r["function"], r["variant"]) for r in stage_rows} == {
        (variant.stage, variant.name) for variant in ALL
    }
    for row in stage_rows:
        assert fields <= row.keys()
        assert row["error"] is None
        assert row["fraction"] == pytest.approx(row["floor_ms"] / row["ms"], rel=1e-3)
    rivals_of = {"statistics": {"torch"}, "affinity": {"torch"}, "gram": {"bmm"}, "contrast": set()}
    for stage, rivals in rivals_of.items():
        found = {r["backend"] for r in stage_rows if r["function"] == stage}
        assert found == {"eager", *BUILT, *rivals}


@pytest.mark.parametrize("backend", ["eager", *BUILT])
def test_stages_are_given_what_the_losses_give_them(backend):
    """The gradient that the last stage writes is that of the loss."""
    case = cases.Case("csa_loss", SMALL, FLOAT32)
    (tensors,) = cases.make_inputs(case, CPU)
    losses = rep_mtl_loss(
        tensors, lambda_tsr=1, lambda_csa=1, csa_temperature=stages.TEMPERATURE, backend=backend
    )
    expected = torch.autograd.grad(losses.total, tensors)
    work = stages.work_of(backend, [s.detach() for s in tensors])
    variant = next(v for v in stages.MAIN if v.stage == "saliency_grad")
    stages.call(choice.load(backend), variant, work)
    torch.testing.assert_close(work.outputs, list(expected))
    gram = stages.call(choice.load(backend), stages.GRAM, work)
    torch.testing.assert_close(gram.similarity, work.csa.gram.similarity)
    assert set(work.csa._fields) == set(CSAGradient._fields)


def test_a_backend_that_fails_is_a_row_and_the_others_are_measured(monkeypatch):
    right = stages.work_of

    def work_of(backend, saliencies):
        if backend == "eager":
            raise RuntimeError("no such kernel")
        return right(backend, saliencies)

    monkeypatch.setattr(stages, "work_of", work_of)
    case = stages.Case((stages.GRAM,), SMALL, FLOAT32)
    rows = stages.measure_case(new_run(), EFFORT, case)
    assert {row["backend"] for row in rows if row["error"]} == {"eager"}
    assert {row["backend"] for row in rows if not row["error"]} == {"bmm", *BUILT}
    assert len(line_up.broken(rows)) == 1


def test_stages_left_out_for_time_are_noted():
    run = new_run(deadline=0.0)
    stages.measure(run)
    assert run.rows == []
    assert len(run.notes) == len(stages.planned("cpu", quick=False))
    assert run.notes[0] == "left out for time: 4 stages of nyuv2 float32"
    run = new_run(deadline=0.0)
    assert stages.measure_case(run, EFFORT, stages.Case(ALL, SMALL, FLOAT32)) == []
    everything = f"{len(ALL)} of {len(ALL)} stages of office49 float32"
    assert run.notes == [f"left out for time: {everything}"]


def test_a_case_that_does_not_fit_is_noted(monkeypatch):
    def measure_case(*_):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(stages, "measure_case", measure_case)
    run = new_run(quick=True)
    stages.measure(run)
    assert run.rows == [] and len(run.notes) == len(stages.planned("cpu", quick=True))
    assert run.notes[0].endswith("float32: OutOfMemoryError: tried to allocate 1 TiB")


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_stage_is_measured_once(device_type):
    planned = stages.planned(device_type, quick=False)
    kinds = [(variant, case.shape, case.precision) for case in planned for variant in case.variants]
    assert len(set(kinds)) == len(kinds)
    first = cases.PRECISIONS[device_type][0]
    for shape in SHAPES.values():
        assert {(variant, shape.scaled(device_type), first) for variant in ALL} <= set(kinds)
    quick = stages.planned(device_type, quick=True)
    assert planned[: len(quick)] == quick
    assert {case.shape.name for case in quick} == set(stages.TARGET_SHAPES)
