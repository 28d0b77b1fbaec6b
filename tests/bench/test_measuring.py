"""Times, memory, machine and CUDA graphs."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
from stand_ins import CPU

from benchmarks import rotation
from benchmarks.cases import Effort
from benchmarks.machine import busy_cores, slug, slug_of_gpu, versions
from benchmarks.memory import peak_extra_bytes
from benchmarks.timing import side_by_side, summary


def test_contestants_are_timed_in_turns():
    order = []
    times = side_by_side(
        {name: lambda name=name: order.append(name) or torch.ones(300, 300).exp() for name in "AB"},
        CPU,
        Effort(seconds=0, min_rounds=3, max_rounds=9),
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
