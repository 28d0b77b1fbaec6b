"""What only a CUDA device can show: capture, streams, devices, no synchronisation, large sizes."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from cases import LOSSES, Case, value_and_grads

from repmtl_kernels import _native, csa_loss, rep_mtl_loss, tsr_loss

pytestmark = pytest.mark.gpu

GIB = 1 << 30
KERNELS = [
    "triton",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            _native.status("cuda") != "ok", reason=f"native: {_native.status('cuda')}"
        ),
    ),
]


def _step(tensors, backend):
    total = rep_mtl_loss(tensors, backend=backend).total
    return total, torch.autograd.grad(total, tensors)


@pytest.mark.parametrize("case", [Case(3, 8, 64, (12, 12)), Case(4, 16, 64)], ids=str)
@pytest.mark.parametrize("backend", [*KERNELS, "eager"])
def test_no_synchronisation(backend: str, case: Case):
    tensors = case.make(torch.float32)
    _step(tensors, backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(tensors, backend)
        csa_loss(tensors, backend=backend).backward()
        tsr_loss(tensors, backend=backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", [Case(3, 4, 64, (7, 7)), Case(2, 2, 96, (12, 12))], ids=str)
def test_capture_in_a_cuda_graph(backend: str, dtype: torch.dtype, case: Case):
    tensors = case.make(dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _step(tensors, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, grads = _step(tensors, backend)
    for seed in (1, 2):
        fresh = case.make(dtype, seed=seed)
        with torch.no_grad():
            for t, f in zip(tensors, fresh, strict=True):
                t.copy_(f)
        graph.replay()
        expected, expected_grads = _step(fresh, backend)
        assert torch.equal(total, expected)
        assert all(torch.equal(g, e) for g, e in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_runs_on_the_current_stream(backend: str):
    """Behind a long kernel of the same stream the losses see what it wrote."""
    case = Case(2, 8, 256, (16, 16))
    tensors = case.make(torch.float32)
    expected, _ = _step(tensors, backend)
    target = [torch.zeros_like(t).requires_grad_() for t in tensors]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(200_000_000)
        for t, s in zip(target, tensors, strict=True):
            t.copy_(s)
    with torch.cuda.stream(stream):
        found, grads = _step(target, backend)
    stream.synchronize()
    assert torch.equal(found, expected)
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("backend", KERNELS)
def test_another_device_than_the_current_one(backend: str, current: int):
    tensors = [
        t.detach().to("cuda:1").requires_grad_() for t in Case(2, 3, 20, (4, 5)).make(torch.float32)
    ]
    with torch.cuda.device(current):
        total, grads = _step(tensors, backend)
    expected, expected_grads = _step(tensors, backend="eager")
    assert total.device == grads[0].device == torch.device("cuda:1")
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_more_than_2_to_the_31_elements(backend: str):
    """Offsets are int64: samples beyond 2^31 elements are read and written as the first."""
    shape = (2, 64, 3 << 23)
    needed = 2 * 4 * 2 * (2 * 64 * (3 << 23)) + 8 * GIB  # two tasks, gradients, and both swapped
    if backend == "native":
        needed += 24 * GIB  # a scaled copy and a float32 product of one task
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / GIB:.0f} GiB of free device memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    tasks = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    assert tasks[0].numel() > 2**31
    for s in tasks:
        s.normal_().add_(torch.randn((*shape[:2], 1), device="cuda").to(s.dtype))
        s.requires_grad_()
    total, grads = _step(tasks, backend)
    swapped = [s.detach().flip(0).requires_grad_() for s in tasks]
    again, swapped_grads = _step(swapped, backend)
    torch.testing.assert_close(again, total, rtol=1e-5, atol=1e-6)
    for g, s in zip(grads, swapped_grads, strict=True):
        for b in range(2):
            assert g[b].abs().max() > 0
            difference = (g[b].float() - s[1 - b].float()).norm()
            assert difference <= 1e-2 * g[b].float().norm()


@pytest.mark.parametrize(
    ("backend", "check"),
    [
        ("triton", "memcheck"),
        pytest.param("native", "memcheck", marks=KERNELS[1].marks),
        pytest.param("native", "racecheck", marks=KERNELS[1].marks),
    ],
)
def test_compute_sanitizer(backend: str, check: str):
    """Small shapes, where the tool is installed and can attach."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    code = (
        "import torch\n"
        "from repmtl_kernels import rep_mtl_loss\n"
        "for shape in ((2, 33, 7, 7), (2, 9, 5, 6), (2, 40)):\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        s = [torch.randn(shape, device='cuda', dtype=dtype, requires_grad=True)\n"
        "             for _ in range(3)]\n"
        "        rep_mtl_loss(s, backend='BACKEND').total.backward()\n"
        "torch.cuda.synchronize()\n"
        "print('finished')\n"
    ).replace("BACKEND", backend)
    done = subprocess.run(
        [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", code],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0 and "finished" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", KERNELS)
def test_large_maps_agree_with_eager(backend: str, layout: str):
    """Sizes that fill the device: many tiles, many programs."""
    case = Case(2, 4, 512, (30, 33), layout)
    tensors = case.make(torch.bfloat16)
    value, grads = value_and_grads(LOSSES[2].public, case, tensors, backend=backend)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact, exact_grads = value_and_grads(LOSSES[2].public, case, doubles, backend="eager")
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=1e-3)
    for g, e in zip(grads, exact_grads, strict=True):
        assert (g.double() - e).norm() <= 1e-2 * e.norm()
