"""Tests that need a CUDA device: capture, streams, devices, no synchronisation, large sizes."""

import fcntl
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from cases import LOSSES, Case, value_and_grads
from torch import nn

from benchmarks.rotation import Rotating, graphed, synchronisation_refused
from repmtl_kernels import RepMTL, csa_loss, rep_mtl_loss, tsr_loss
from repmtl_kernels.backends.native import library as native_library

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
GIB = 1 << 30
KERNELS = [
    "triton",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            native_library.status("cuda") != "ok", reason=f"native: {native_library.status('cuda')}"
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
    with synchronisation_refused():
        _step(tensors, backend)
        csa_loss(tensors, backend=backend).backward()
        tsr_loss(tensors, backend=backend).backward()


@pytest.mark.cell("CUDA graph of the losses, forward and backward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [*KERNELS, "eager", "reference"])
@pytest.mark.parametrize("case", [Case(3, 4, 64, (7, 7)), Case(2, 2, 96, (12, 12))], ids=str)
def test_capture_in_a_cuda_graph(backend: str, dtype: torch.dtype, case: Case):
    tensors = case.make(dtype)
    _step(tensors, backend)  # compiles
    replay = graphed(Rotating(partial(_step, backend=backend), [tensors]), DEVICE)
    for seed in (1, 2):
        fresh = case.make(dtype, seed=seed)
        with torch.no_grad():
            for t, f in zip(tensors, fresh, strict=True):
                t.copy_(f)
        total, grads = replay()
        expected, expected_grads = _step(fresh, backend)
        if backend in ("eager", "reference"):  # cuBLAS may choose another algorithm
            torch.testing.assert_close((total, grads), (expected, expected_grads))
            continue
        assert torch.equal(total, expected)
        assert all(torch.equal(g, e) for g, e in zip(grads, expected_grads, strict=True))


@pytest.mark.cell("CUDA graph of a whole training step, optimiser included")
@pytest.mark.parametrize("backend", [*KERNELS, "eager", "reference"])
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["float32", "float16 autocast"])
def test_capture_of_a_training_step(backend: str, dtype: torch.dtype | None):
    """Replays give the parameters of eager steps, and the criterion shows the same values."""
    batches = torch.randn(5, 4, 3, 9, 9, device="cuda")
    labels = torch.randn(5, 2, 4, 2, 7, 7, device="cuda")
    x, y = batches[0].clone(), labels[0].clone()
    runs = {}
    for how in ("eager", "captured"):
        torch.manual_seed(0)
        encoder = nn.Conv2d(3, 8, 3).cuda()
        heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 6, 1), nn.Softplus(), nn.Conv2d(6, 2, 1)) for _ in range(2)
        ).cuda()
        parameters = [*encoder.parameters(), *heads.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8) if dtype else None
        criterion = RepMTL(strength=0.3, every=1, clip=2.0, backend=backend, scaler=scaler)
        runs[how] = (
            parameters,
            criterion,
            partial(_train, encoder, heads, criterion, scaler, optimizer, x, y, dtype),
        )
    for how, steps in (("eager", 3), ("captured", 2)):  # before a capture comes one more step
        for _ in range(steps):
            runs[how][2]()
    replay = graphed(Rotating(lambda _: runs["captured"][2](), [None]), DEVICE)
    for new_x, new_y in zip(batches, labels, strict=True):
        x.copy_(new_x)
        y.copy_(new_y)
        replay()
        runs["eager"][2]()
        captured, eager = (runs[how][1].last for how in ("captured", "eager"))
        for name in ("total", "tsr", "csa", "regularizer", "ratio"):
            value, exact = getattr(captured, name), getattr(eager, name)
            torch.testing.assert_close(value, exact, rtol=1e-3, atol=1e-6, msg=name)
        if dtype:
            torch.testing.assert_close(captured.underflow, eager.underflow)
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(runs["captured"][0], runs["eager"][0], **tolerance)


def _train(encoder, heads, criterion, scaler, optimizer, x, y, dtype) -> None:
    # Inside the graph's memory: a gradient is a new tensor in each capture.
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
        z = encoder(x)
        losses = [(h(z) - t).float().square().mean() for h, t in zip(heads, y, strict=True)]
        total = criterion(losses, z)
    if scaler is None:
        total.backward()
    else:  # its step asks the host whether a gradient is infinite, so it stays out of graphs
        scaler.scale(total).backward()
        scale = scaler.scale(torch.ones((), device="cuda"))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(scale)
    optimizer.step()


@pytest.mark.parametrize("backend", KERNELS)
def test_runs_on_the_current_stream(backend: str):
    """The losses see what a long kernel wrote before them on the same stream."""
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
        total, grads = _step(target, backend)
    stream.synchronize()
    assert torch.equal(total, expected)
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


@pytest.fixture
def most_of_the_memory(tmp_path_factory):
    """Serve one test at a time, since all processes of pytest-xdist share the device."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / "memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.mark.slow
@pytest.mark.usefixtures("most_of_the_memory")
@pytest.mark.parametrize("backend", KERNELS)
def test_more_than_2_to_the_31_elements(backend: str):
    """Samples beyond 2^31 elements are read and written like the first: offsets are int64."""
    shape = (2, 64, 3 << 23)
    # Two tasks, gradients, and both swapped; three float32 samples of one task.
    needed = 2 * 4 * 2 * (2 * 64 * (3 << 23)) + 20 * GIB
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "check"),
    [
        ("triton", "memcheck"),
        pytest.param("native", "memcheck", marks=KERNELS[1].marks),
        pytest.param("native", "racecheck", marks=KERNELS[1].marks),
    ],
)
def test_compute_sanitizer(backend: str, check: str):
    """Small shapes give no error, where the tool is installed and can attach."""
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
    """The sizes fill the device: many tiles, many programs."""
    case = Case(2, 4, 512, (30, 33), layout)
    tensors = case.make(torch.bfloat16)
    value, grads = value_and_grads(LOSSES[2].public, case, tensors, backend=backend)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact, exact_grads = value_and_grads(LOSSES[2].public, case, doubles, backend="eager")
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=1e-3)
    for g, e in zip(grads, exact_grads, strict=True):
        assert (g.double() - e).norm() <= 1e-2 * e.norm()
