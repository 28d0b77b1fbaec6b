"""The targets of the kernels on a GPU, and the tables of a GPU's results."""

from __future__ import annotations

import math
from pathlib import Path

from stand_ins import CPU, EFFORT, GPU_HEAD, HEAD, SMALL, new_run

from benchmarks import report, results, rivals, targets
from benchmarks.cases import FLOAT32
from benchmarks.line_up import Way
from benchmarks.part import Run
from benchmarks.parts import kernels, stages


def gpu_rows(ms: float) -> dict[str, list[dict]]:
    """Rows of what a GPU's first cases would give, all of them ``ms`` for ours, 0.1 for rivals."""
    figures = {
        "ms": ms, "fraction": 0.95, "gbs": 3800.0, "peak_mb": 0.5, "gradient_error": 1e-6,
        "error": None,
    }  # fmt: skip
    rival = figures | {"ms": 0.1, "peak_mb": 10.0, "gradient_error": 1e-2}
    ours = ("eager", "native", "triton")
    found: dict[str, list[dict]] = {"kernels": [], "stages": []}
    for case in kernels.decisive():
        names = ["reference", *ours]
        names += ["factored"] * (case.function in rivals.FACTORED)
        names += ["reference_compiled", "factored_compiled"] * case.compiled
        for name in names:
            for graph in (False, True):
                row = case.labels() | Way(name, "forward_backward", graph)._asdict()
                found["kernels"].append(row | (figures if name in ours else rival))
    for case in stages.planned("cuda", quick=True):
        for variant in case.variants:
            for name in (*ours, *(["bmm"] * (variant.stage == "gram"))):
                row = case.of(variant).labels() | Way(name, "forward", True)._asdict()
                row |= {"variant": variant.name}
                found["stages"].append(row | (figures if name in ours else rival))
    return found


def saved(folder: Path, rows: dict[str, list[dict]], head: dict = GPU_HEAD) -> Path:
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
    assert targets.table(saved(tmp_path / "cpu", rows, HEAD)) is None


def test_the_table_follows_every_case(tmp_path):
    """A run that is killed leaves all that it had on the disk, whole."""
    run = Run("kernels", CPU, GPU_HEAD, tmp_path / "out")
    counts = []

    def measure(rows: list[dict]) -> list[dict]:
        if (tmp_path / "out").exists():
            counts.append((tmp_path / "out" / "targets.md").read_text().count("not measured |"))
        return rows

    rows = gpu_rows(ms=1e-3)["kernels"]
    run.each([rows[:30], rows[30:], []], measure)
    assert counts[0] > counts[1] > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"kernels.json", "targets.md"}
    new_run("part", folder=tmp_path / "cpu").save()
    assert not (tmp_path / "cpu" / "targets.md").exists()


def test_documents_show_targets_and_stages_of_machines_with_results(tmp_path):
    saved(tmp_path / "h200", gpu_rows(ms=1e-3))
    readme = tmp_path / "README.md"
    names = ("targets", "stages", "errors", "kernels")
    markers = {
        name: "".join(f"<!-- bench:{name}:{m} -->\n<!-- /bench -->\n" for m in ("h200", "b200"))
        for name in names
    }
    readme.write_text("".join(markers.values()))
    report.refresh(readme, tmp_path)
    text = readme.read_text()
    assert text.count("<!-- bench:stages:b200 -->\n<!-- /bench -->") == 1
    assert "| target | bound | Triton | native | met by |" in text
    assert "| `gram`, with gradient | nyuv2 | bfloat16 | 100 (95%) | 1 (95%) |" in text
    assert "| `rep_mtl_loss` | office49, CUDA graph | bfloat16 |" in text
    assert "| `tsr_loss` | nyuv2 | bfloat16 | 1.0e-02 |" in text
    case = stages.Case(stages.MAIN, SMALL, FLOAT32)
    rows = stages.measure_case(new_run(), EFFORT, case)
    table = stages.table({**HEAD, "rows": rows})
    assert "| `gram`, with gradient | office49 | float32 |" in table
    assert " ms" not in table and "Microseconds" not in table
