"""Stages one by one, the parts of a run, and what the kernels have to reach."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as parts
from benchmarks import floors, kernels, line_up, plots, report, results, stages, targets
from benchmarks.shapes import SHAPES, Shape
from repmtl_kernels import available_backends, rep_mtl_loss
from repmtl_kernels.backends import choice
from repmtl_kernels.backends.contract import CSAGradient

CPU = torch.device("cpu")
BUILT = {"native"} & set(available_backends())
SMALL = Shape("office49", 2, 3, 8, 4, 4, 3, "test")
CEILINGS = {"copy_gbs": 30.0, "matmul_tflops": {"float32": 0.1}}
EFFORT = line_up.Effort(seconds=0.01, min_rounds=2, max_rounds=2)
ALL = (*stages.MAIN, *stages.OTHER)
HEAD = {
    "machine": {"name": "h200", "gpu": "NVIDIA H200"},
    "versions": {"torch": "2.11.0"},
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
    "measured": {"copy_gbs": 4000.0, "matmul_tflops": {"bfloat16": 700.0}},
}


# --- floors ---


@pytest.mark.parametrize(
    ("stage", "options", "moved", "flops"),
    [
        # T2 B3 C8 N16, 2-byte saliencies: 768 numbers; 6 samples; sums of 4 bytes.
        ("statistics", {"positions": True, "channels": True}, 1536 + 4 * (96 + 48 + 6), 0),
        ("statistics", {"positions": True, "channels": False}, 1536 + 4 * 96, 0),
        ("statistics", {"positions": False, "channels": True}, 1536 + 4 * (48 + 6), 0),
        ("entropy", {"with_grad": True}, 4 * 2 * 96, 0),
        # Of a sample 2 x 2 products of 8 channels, 3 of them its own; 4 weighted for radial.
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


# --- measuring ---


@pytest.fixture(scope="module")
def stage_rows() -> list[dict]:
    shape = Shape("nyuv2", 2, 3, 8, 4, 4, 3, "test")
    case = stages.Case(ALL, shape, line_up.FLOAT32, "channels_last")
    return stages.measure_case(case, CPU, CEILINGS, EFFORT, math.inf)


def test_stage_rows_have_every_field(stage_rows):
    fields = {
        "function", "variant", "shape", "T", "B", "C", "N", "dtype", "precision", "layout",
        "direction", "backend", "graph", "ms", "spread", "peak_mb", "floor_ms", "fraction", "gbs",
        "tflops",
    }  # fmt: skip
    assert {(r["function"], r["variant"]) for r in stage_rows} == {
        (variant.stage, variant.name) for variant in ALL
    }
    for row in stage_rows:
        assert fields <= row.keys()
        assert row["error"] is None
        assert row["fraction"] == pytest.approx(row["floor_ms"] / row["ms"], rel=1e-3)
    for stage, rivals in (("statistics", {"torch"}), ("gram", {"bmm"}), ("contrast", set())):
        found = {r["backend"] for r in stage_rows if r["function"] == stage}
        assert found == {"eager", *BUILT, *rivals}


@pytest.mark.parametrize("backend", ["eager", *BUILT])
def test_stages_are_given_what_the_losses_give_them(backend):
    """The gradient that the last stage writes is that of the loss."""
    case = line_up.Case("csa_loss", SMALL, line_up.FLOAT32, "contiguous", False)
    (tensors,) = kernels.make_inputs(case, CPU)
    losses = rep_mtl_loss(
        tensors, lambda_tsr=1, lambda_csa=1, csa_temperature=stages.TEMPERATURE, backend=backend
    )
    expected = torch.autograd.grad(losses.total, tensors)
    work = stages.work_of(backend, [s.detach() for s in tensors])
    variant = next(v for v in stages.MAIN if v.stage == "saliency_grad")
    stages.run(choice.load(backend), variant, work)
    torch.testing.assert_close(work.outputs, list(expected))
    gram = stages.run(choice.load(backend), stages.GRAM, work)
    torch.testing.assert_close(gram.similarity, work.csa.gram.similarity)
    assert set(work.csa._fields) == set(CSAGradient._fields)


def test_a_backend_that_fails_is_a_row_and_the_others_are_measured(monkeypatch):
    right = stages.work_of

    def work_of(backend, saliencies):
        if backend == "eager":
            raise RuntimeError("no such kernel")
        return right(backend, saliencies)

    monkeypatch.setattr(stages, "work_of", work_of)
    case = stages.Case((stages.GRAM,), SMALL, line_up.FLOAT32, "contiguous")
    rows = stages.measure_case(case, CPU, CEILINGS, EFFORT, math.inf)
    assert {row["backend"] for row in rows if row["error"]} == {"eager"}
    assert {row["backend"] for row in rows if not row["error"]} == {"bmm", *BUILT}
    assert len(kernels.broken(rows)) == 1


def test_stages_left_out_for_time_are_noted():
    rows, notes = stages.measure(CPU, CEILINGS, quick=False, deadline=0.0)
    assert rows == []
    assert len(notes) == len(stages.cases("cpu", quick=False))
    assert notes[0] == "left out for time: 4 of 4 stages of nyuv2 float32 contiguous"
    found = {**HEAD, "notes": notes, "rows": []}
    caption = report.stages_table(found).splitlines()[-1]
    assert caption.endswith(f"; {len(notes) - 10} more are in the result file.")
    case = stages.Case(ALL, SMALL, line_up.FLOAT32, "contiguous")
    assert stages.measure_case(case, CPU, CEILINGS, EFFORT, deadline=0.0) == []


def test_a_case_that_does_not_fit_is_noted(monkeypatch):
    def measure_case(*_):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(stages, "measure_case", measure_case)
    rows, notes = stages.measure(CPU, CEILINGS, quick=True, deadline=math.inf)
    assert rows == [] and len(notes) == len(stages.cases("cpu", quick=True))
    assert notes[0].endswith("float32 contiguous: OutOfMemoryError: tried to allocate 1 TiB")


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_stage_is_measured_once(device_type):
    planned = stages.cases(device_type, quick=False)
    kinds = [
        (variant.stage, variant.name, case.shape, case.precision, case.layout)
        for case in planned
        for variant in case.variants
    ]
    assert len(set(kinds)) == len(kinds)
    shapes = [shape.scaled(device_type) for shape in SHAPES.values()]
    for variant in ALL:
        for shape in shapes:
            for precision in line_up.PRECISIONS[device_type]:
                for layout in stages.LAYOUTS:
                    kind = variant.stage, variant.name, shape, precision, layout
                    expected = variant.reads_saliencies or kind[3:] == (
                        line_up.PRECISIONS[device_type][0], "contiguous"
                    )  # fmt: skip
                    if expected and (layout == "contiguous" or shape.positions > 1):
                        assert kind in kinds
    quick = stages.cases(device_type, quick=True)
    assert planned[: len(quick)] == quick
    assert {case.shape.name for case in quick} == set(stages.TARGET_SHAPES)


# --- parts of a run ---


def test_parts_share_the_time_of_a_run():
    default = {"kernels": 0.45, "steps": 0.8, "quality": 1.0}
    assert parts.chosen(None, "cpu") == pytest.approx(default)
    # What comes on top of a default run has what others leave.
    assert parts.chosen(None, "cuda") == pytest.approx(default | {"stages": 1.0})
    for name in parts.PARTS:
        assert parts.chosen([name], "cpu") == {name: 1.0}
    both = parts.chosen(["stages", "kernels"], "cuda")
    assert list(both) == ["kernels", "stages"]
    assert both == pytest.approx({"kernels": 0.45 / 0.55, "stages": 1.0})


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("rates", [False, True])
def test_a_part_from_a_function(rates, asked, tmp_path):
    told = {}
    row = kernels.labels(
        line_up.Case("csa_loss", SMALL, line_up.FLOAT32, "contiguous", False), "eager", "forward"
    )
    row |= {"error": "no such kernel"}

    def measure(device, *ceilings, save=None, **options):
        told.update(device=device, ceilings=ceilings, saves=save is not None, **options)
        if save is not None:
            save([row], [])
            assert results.load(tmp_path, "scaling")["rows"] == [row]
        return [row], ["a note"]

    run = parts.Run(
        name="scaling", device=CPU, head=HEAD, folder=tmp_path, quick=False, asked=asked,
        deadline=3.0, unclean=["busy"],
    )  # fmt: skip
    broken = parts.rows_of(measure, rates=rates)(run)
    ceilings = (HEAD["measured"],) if rates else ()
    assert told == {
        "device": CPU, "ceilings": ceilings, "saves": rates, "quick": not asked, "deadline": 3.0,
    }  # fmt: skip
    assert len(broken) == rates
    found = results.load(tmp_path, "scaling")
    assert (found["rows"], found["notes"]) == ([row], ["busy", "a note"])
    assert found["commit"] == HEAD["commit"]


def run_main(monkeypatch, *arguments: str, least: float = 0.0, measure=None) -> list[parts.Run]:
    """``python -m benchmarks`` with parts that measure nothing."""
    runs = []

    def keep(run):
        runs.append(run)
        return []

    measure = measure or keep

    stand_ins = {
        "first": parts.Part(measure, "FIRST", 0.5, ("cpu",)),
        "second": parts.Part(measure, "SECOND", 0.5, ("cpu",), least=least),
        "third": parts.Part(measure, "THIRD", 0.5),
    }
    monkeypatch.setattr(parts, "PARTS", stand_ins)
    monkeypatch.setattr(parts, "describe", lambda _: HEAD | {"machine": {"busy_cores_before": 0}})
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", *arguments])
    parts.main()
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
    assert all(run.asked and run.folder == tmp_path for run in runs)
    assert runs[0].deadline < runs[1].deadline
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--only", "fourth")


def test_a_default_run_leaves_out_what_does_not_fit(monkeypatch, tmp_path, capsys):
    out = "--out", str(tmp_path)
    assert [run.name for run in run_main(monkeypatch, *out)] == ["first", "second"]
    runs = run_main(monkeypatch, "--seconds", "20", *out, least=40)
    assert [run.name for run in runs] == ["first"]
    assert "left out for time: second" in capsys.readouterr().out
    asked = run_main(monkeypatch, "--seconds", "20", "--only", "second", *out, least=40)
    assert [run.name for run in asked] == ["second"]


# --- targets ---


def gpu_rows(ms: float) -> dict[str, list[dict]]:
    """Rows of what a GPU's first cases would give, all of them ``ms`` for ours, 0.1 for rivals."""
    figures = {
        "ms": ms, "fraction": 0.95, "gbs": 3800.0, "peak_mb": 0.5, "gradient_error": 1e-6,
        "error": None,
    }  # fmt: skip
    rival = figures | {"ms": 0.1, "peak_mb": 10.0, "gradient_error": 1e-2}
    ours = ("eager", "native", "triton")
    found: dict[str, list[dict]] = {"kernels": [], "stages": []}
    for case in line_up.cases("cuda", quick=False)[: len(line_up.TELLING)]:
        names = ["reference", *ours]
        names += ["factored"] * (case.function in kernels.FACTORED_FORMS)
        names += ["reference_compiled", "factored_compiled"] * case.compiled
        for name in names:
            for graph in (False, True):
                row = kernels.labels(case, name, "forward_backward", graph)
                found["kernels"].append(row | (figures if name in ours else rival))
    for case in stages.cases("cuda", quick=True):
        for variant in case.variants:
            for name in (*ours, *(["bmm"] * (variant.stage == "gram"))):
                row = kernels.labels(case.of(variant), name, "forward", True)
                row |= {"variant": variant.name}
                found["stages"].append(row | (figures if name in ours else rival))
    return found


def saved(folder: Path, rows: dict[str, list[dict]], head: dict = HEAD) -> Path:
    for name, some in rows.items():
        results.save(folder, name, head, some, default_backend="triton", notes=[])
    return folder


def outcomes(table: str) -> dict[str, str]:
    """The last cell of each target's line."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {cells[0]: cells[-1] for cells in lines[2:]}


def test_the_first_cases_of_a_gpu_measure_every_target(tmp_path):
    table = targets.table(saved(tmp_path, gpu_rows(ms=1e-3)))
    found = outcomes(table)
    assert len(found) == len(targets.TARGETS) == len({target.name for target in targets.TARGETS})
    assert set(found.values()) == {"Triton, native"}
    count = len(targets.TARGETS)
    assert f"{count} of {count} targets are met, 0 are not, 0 were not measured" in table
    assert "kernels of commit 0123456789, 2026-01-02" in table


def test_targets_that_are_missed(tmp_path):
    rows = gpu_rows(ms=1e-3)
    for row in rows["kernels"]:
        if row["backend"] == "triton" and row["shape"] == "vit196":
            row |= {"ms": 0.2, "gradient_error": 0.5}
        if row["backend"] == "native" and row["precision"] == "bfloat16":
            row |= {"gradient_error": math.nan}
    for row in rows["stages"]:
        row["gbs"] = 3500.0
    table = targets.table(saved(tmp_path, rows))
    found = outcomes(table)
    compiled = "rep_mtl_loss, forward and backward, everywhere, bfloat16: against torch.compile"
    assert found[f"{compiled} of the reference"] == "native"
    assert "| 0.5x (vit196, of 6) | 100x (" in table
    assert found["gradients against float64, everywhere, bfloat16"] == "no"
    assert "| at most 1.0e-02 | 5.0e-01 (vit196, of 7) | nan (nyuv2, of 7) | no |" in table
    assert found["statistics at nyuv2, tf32: bandwidth"] == "no"
    assert "| at least 90% of a copy | 88% of a copy | 88% of a copy | no |" in table
    assert found["gradients against float64, everywhere, tf32"] == "Triton, native"


def test_targets_that_were_not_measured(tmp_path):
    rows = gpu_rows(ms=1e-3)
    for row in rows["kernels"]:
        if row["backend"] == "reference" and row["shape"] == "cityscapes":
            row |= {"ms": None, "error": "OutOfMemoryError: no"}
        if row["backend"] == "triton" and row["function"] == "tsr_loss":
            row |= {"ms": None, "error": "RuntimeError: no"}
    rows["kernels"] = [r for r in rows["kernels"] if r["backend"] != "native"]
    del rows["stages"]
    table = targets.table(saved(tmp_path, rows))
    found = outcomes(table)
    assert found["statistics at nyuv2, bfloat16: bandwidth"] == "not measured"
    name = "rep_mtl_loss, forward and backward, cityscapes, bfloat16"
    assert found[f"{name}: against the reference"] == "not measured"
    assert found[f"{name}: floor"] == "Triton"
    assert found["tsr_loss, forward and backward, nyuv2, bfloat16: floor"] == "no"
    assert "| at least 80% of the floor | failed |  | no |" in table
    assert targets.table(tmp_path / "nothing") is None
    on_a_cpu = HEAD | {"machine": {"name": "cpu-2core", "cpu": "A CPU", "threads": 2}}
    assert targets.table(saved(tmp_path / "cpu", rows, on_a_cpu)) is None


def test_documents_show_targets_and_stages_of_machines_with_results(tmp_path, stage_rows):
    saved(tmp_path / "h200", gpu_rows(ms=1e-3))
    readme = tmp_path / "README.md"
    names = ("targets", "stages", "errors", "kernels")
    markers = {
        name: "".join(f"<!-- bench:{name}:{m} -->\n<!-- /bench -->\n" for m in ("h200", "b200"))
        for name in names
    }
    readme.write_text("".join(markers.values()))
    report.refresh_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.count("<!-- bench:stages:b200 -->\n<!-- /bench -->") == 1
    assert "| target | bound | Triton | native | met by |" in text
    assert "| `gram`, with gradient | nyuv2 | bfloat16 | 100 (95%) | 1 (95%) |" in text
    assert "| `rep_mtl_loss` | office49, CUDA graph | bfloat16 |" in text
    assert "| `tsr_loss` | nyuv2 | bfloat16 | 1.0e-02 |" in text
    machine = {"name": "cpu-2core", "cpu": "A CPU", "threads": 2}
    found = {**HEAD, "machine": machine, "notes": [], "rows": stage_rows}
    table = report.stages_table(found)
    assert "| `gram`, with gradient | nyuv2, channels_last | float32 |" in table
    assert " ms" not in table and "Microseconds" not in table


def test_the_plot_of_stages(tmp_path):
    pytest.importorskip("matplotlib")
    saved(tmp_path, {"stages": gpu_rows(ms=1e-3)["stages"]})
    (written,) = plots.draw(tmp_path)
    assert written.name == "stages.svg"
    before = written.read_bytes()
    assert [p.read_bytes() for p in plots.draw(tmp_path)] == [before]
