"""Result files, and the tables and pictures that are made from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from stand_ins import CEILINGS, CPU, EFFORT, HEAD, SMALL

from benchmarks import headlines, report, results
from benchmarks.cases import FLOAT32, Case
from benchmarks.parts import kernels, quality, second_order


@pytest.fixture(scope="module")
def kernel_rows() -> list[dict]:
    case = Case("csa_loss", SMALL, FLOAT32)
    return kernels.measure_case(case, CPU, CEILINGS, EFFORT)


def two_steps() -> list[dict]:
    before = {"encoder_forward": 1.0, "heads_forward": 1.0}
    after = {"encoder_backward": 2.0, "optimizer": 0.5}
    middle = (
        {"heads_backward": 0.5},
        {"saliencies": 1.0, "regularizer": 1.0, "heads_backward": 3.5},
    )
    common = {
        "network": "nyuv2",
        "dtype": "float32",
        "architecture": "a network",
        "weights": None,
        "error": None,
    }
    return [
        common
        | {
            "method": method,
            "steps_per_s": rate,
            "ratio_to_ew": ratio,
            "peak_mb": 10.0 * ratio,
            "phases": before | own | after,
        }
        for method, rate, ratio, own in zip(
            ("equal_weighting", "rep_mtl", "nash_mtl"), (20.0, 10.0, 5.0), (1.0, 2.0, 4.0),
            (*middle, {"heads_backward": 0.5, "weighting": 2.0}), strict=True,
        )
    ]  # fmt: skip


def saved(folder: Path, kernel_rows: list[dict]) -> Path:
    machine = folder / "cpu-2core"
    results.save(machine, "kernels", HEAD, kernel_rows, default_backend="eager", notes=[])
    results.save(machine, "steps", HEAD, two_steps(), notes=["something"])
    return machine


def test_result_files_come_back_as_written(tmp_path, kernel_rows):
    found = results.load(saved(tmp_path, kernel_rows), "kernels")
    keys = ["machine", "versions", "commit", "dirty", "date", "measured"]
    assert list(found) == [*keys, "default_backend", "notes", "rows"]
    assert found["rows"] == kernel_rows
    assert results.load(tmp_path, "kernels") is None


def test_tables_go_between_their_markers_only(tmp_path, kernel_rows):
    saved(tmp_path, kernel_rows)
    readme = tmp_path / "README.md"
    other = "<!-- bench:kernels:h200 -->\nkept\n<!-- /bench -->"
    readme.write_text(
        f"# Title\n<!-- bench:losses:cpu-2core -->\nold\n<!-- /bench -->\nmiddle\n{other}\n"
        "<!-- bench:steps:cpu-2core -->\n<!-- /bench -->\nend\n"
        "<!-- bench:phases:cpu-2core -->\n<!-- /bench -->\n"
    )
    report.refresh(readme, tmp_path)
    text = readme.read_text()
    assert "old" not in text
    assert other in text
    assert text.startswith("# Title\n<!-- bench:losses:cpu-2core -->\n| shape |")
    assert "<!-- /bench -->\nmiddle\n" in text
    assert "| Rep-MTL, fused losses | 2.00x, 2.00x |" in text
    assert "| nyuv2 | Rep-MTL, fused losses | 0.20 | 0.20 | 0.20 | 0.20 | 0.70 |  | 0.40 |" in text
    assert "something" not in text, "notes are for the result file"
    assert " ms" not in text, "times of a CPU are for its result file"
    report.refresh(readme, tmp_path)
    assert readme.read_text() == text


def test_headlines_of_two_result_files(tmp_path):
    assert headlines.table(tmp_path) is None, "there are no results"
    rows = [
        {
            "function": "csa_loss",
            "shape": shape,
            "direction": "forward_backward",
            "layout": "contiguous",
            "graph": False,
            "backend": backend,
            "ms": ms,
            "peak_mb": 10 * ms,
            "error": None,
        }
        for shape, times in (("cityscapes", (20.0, 2.0)), ("nyuv2", (9.0, 3.0)))
        for backend, ms in zip(("reference", "eager"), times, strict=True)
    ]
    steps = [
        {"network": "cityscapes", "dtype": "float32", "method": method, "ratio_to_ew": ratio}
        for method, ratio in (("rep_mtl_default", 1.25), ("nash_mtl", 1.5))
    ]
    results.save(tmp_path, "kernels", HEAD, rows, default_backend="eager", notes=[])
    assert headlines.table(tmp_path) is None, "there are no steps"
    results.save(tmp_path, "steps", HEAD, steps, notes=[])
    table = headlines.table(tmp_path)
    assert "**10x** as fast" in table and "3x to 10x over 2 shapes" in table
    assert "**20 MB** of" in table and "take 200 MB" in table
    assert "**1.25x** the time" in table and "Nash-MTL takes 1.5x" in table
    results.save(tmp_path, "kernels", HEAD, rows[2:], default_backend="eager", notes=[])
    assert headlines.table(tmp_path) is None, "the shape is missing"


def test_a_readme_without_markers_stays_as_it_is(tmp_path, kernel_rows):
    saved(tmp_path, kernel_rows)
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    report.refresh(readme, tmp_path)
    assert readme.read_text() == "# Title\n"
    readme.write_text("<!-- bench:nothing:cpu-2core -->\n<!-- /bench -->\n")
    with pytest.raises(ValueError, match="losses, kernels, errors, steps"):
        report.refresh(readme, tmp_path)


def test_tables_of_a_gpu_show_milliseconds_and_failures(kernel_rows):
    machine = {"name": "h200", "gpu": "NVIDIA H200"}
    rows = [dict(row) for row in kernel_rows]
    for row in rows:
        if row["backend"] == "reference":
            row |= {"ms": None, "error": "OutOfMemoryError: no"}
        else:
            row["ms"] = 1.25
    found = {**HEAD, "machine": machine, "default_backend": "eager", "notes": [], "rows": rows}
    table = kernels.kernels_table(found)
    assert "| out of memory | 1.25 |" in table
    assert "NVIDIA H200" in table


def test_table_of_second_order():
    common = {"network": "aspp", "architecture": "a network", "dtype": "float32", "peak_mb": 12.0}
    ratios = ("ratio_to_ew", "ratio_to_plain", "heads_ratio_to_plain", "ratio_to_floor")
    ratios += ("measurement", "measurement_on_average")
    values = {
        "equal_weighting": (3, (1.0, 0.4, 0.4, None, None, None)),
        "rep_mtl": (6, (2.5, 1.0, 1.0, 1.3, 0.32, 0.02)),
        "rep_mtl_second_order": (6, (2.0, 0.8, 0.5, 1.04, 0.16, 0.01)),
    }
    rows = [
        common
        | {"method": method, "convolutions_per_head_layer": count}
        | dict(zip(ratios, found, strict=True))
        for method, (count, found) in values.items()
    ]
    table = second_order.table({**HEAD, "notes": [], "rows": rows})
    line = "| Rep-MTL, `second_order()` | 6 | 2.00x | 1.25x faster | 2.00x faster | 1.04x | "
    assert line + "16%, 1.0% on average | 12 MB |" in table
    assert "| equal weighting | 3 | 1.00x |  |  |  |  | 12 MB |" in table


def test_tables_of_training_quality(tmp_path):
    rows = [
        {
            "dataset": "multimnist",
            "method": method,
            "family": method,
            "seed": seed,
            "metrics": {"left": {"accuracy": accuracy + seed}, "right": {"accuracy": 50.0}},
            "delta_p": {"left": gain, "right": gain, "mean": gain},
            "delta_p_to_equal": {"left": gain, "right": gain, "mean": gain},
        }
        for method, accuracy, gain in (("equal weighting", 80.0, 0.0), ("Rep-MTL", 90.0, 2.0))
        for seed in (0, 1)
    ]
    settings = {"datasets": {"multimnist": {"training": {"steps": 200, "batch": 64}}}}
    results.save(tmp_path / "m", "quality_bench", HEAD, rows, notes=[], seeds=[0, 1], **settings)
    found = results.load(tmp_path / "m", "quality_bench")
    table = quality.accuracy_table(found)
    assert "| Rep-MTL | 90.5 % ± 0.7 | 50.0 % ± 0.0 |" in table
    assert "200 steps of 64 images, 2 seeds" in table
    table = quality.study_table(found)
    assert "| Δp to equal weighting, % | multimnist |" in table
    assert "| Rep-MTL | +2.00 ± 0.00 |" in table
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:summary_bench:m -->\n<!-- /bench -->\n")
    report.refresh(readme, tmp_path)
    assert readme.read_text().count("Δp to") == 1 and "to equal weighting" in readme.read_text()


def test_plots_are_made_from_the_files_and_the_same_again(tmp_path, kernel_rows):
    pytest.importorskip("matplotlib")
    folder = saved(tmp_path, kernel_rows)
    written = report.draw_results(folder)
    assert [p.name for p in written] == ["speed.svg"]
    before = [p.read_bytes() for p in written]
    assert [p.read_bytes() for p in report.draw_results(folder)] == before
