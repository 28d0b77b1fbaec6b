"""Runs the CUDA kernels of the native backend without a GPU: same sources, emulated CUDA.

Between barriers the emulation runs the threads of a block one after the other, in a chosen order.
A result that depends on the order shows a race.
"""

import os
import shutil
import subprocess
from pathlib import Path

import emulated_cuda
import pytest
import torch
from emulated_cuda import COMPILER, TESTS, run_tests

from repmtl_kernels.backends.native import library as native_library

CUDA = "backends/test_native_cuda"
BLOCKS = "27x25 or 26x26"  # the shapes of its cases whose Gram matrix has several blocks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slow_cpu,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them"),
    pytest.mark.skipif(
        not emulated_cuda.SOURCES.exists() or native_library.status("cpu") != "ok",
        reason="needs the source tree and what compiles it",
    ),
]

if shutil.which(COMPILER) is None:
    pytest.skip(f"there is no {COMPILER}", allow_module_level=True)


def sources(*names: str) -> list[str]:
    return [str(TESTS / f"{name}.py") for name in names]


@pytest.mark.timeout(1200)
def test_the_tests_of_the_native_backend_in_any_order_of_threads(tmp_path: Path):
    library = emulated_cuda.build(tmp_path)
    names = (
        "losses",
        "affinity",
        "positions*",
        "softmax_infinity",
        "gradients",
        "numerics",
        "memory",
    )
    of_losses = [str(path) for name in names for path in TESTS.glob(f"losses/test_{name}.py")]
    # Gradients in float64 are those of the reference, which has the finite differences.
    selection = ["-k", "native and not gradcheck"]
    run_tests(library, *sources(CUDA, "backends/test_stages"), *of_losses, *selection)
    # Matrices in several blocks take most of the time: their kernels run once in another order.
    reverse, mixed = f"not (with_a_mask and ({BLOCKS}))", f"not ({BLOCKS})"
    for order, others in (("reverse", reverse), ("7", mixed)):
        run_tests(library, *sources(CUDA), "-k", f"native and {others}", CUDA_EMULATION_ORDER=order)


def test_no_address_or_undefined_behaviour_is_found_by_the_sanitizers(tmp_path: Path):
    """The sanitizers watch the kernels' shared and global memory."""
    libraries = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"{COMPILER} has no sanitizers here")
    flags = ["-g1", "-O1", "-fsanitize=address,undefined", "-fno-sanitize=vptr"]
    library = emulated_cuda.build(tmp_path, *flags, "-fno-sanitize-recover=all")
    preload = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    selection = "every_way and (dtype1 or dtype2) or anywhere or some_tasks"
    selection = f"({selection}) and not (with_a_mask and dtype1 and ({BLOCKS}))"
    run_tests(library, *sources(CUDA), "-k", selection, **preload)


def test_the_emulation_itself(tmp_path: Path):
    program = tmp_path / "self_test"
    files = map(str, emulated_cuda.HEADERS.glob("self_test*.cpp"))
    command = [COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", "-pthread"]
    command += ["-I", str(emulated_cuda.HEADERS), *files, "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]
    for order in ("forward", "reverse", "1"):
        done = subprocess.run(
            [str(program)],
            env={**os.environ, "CUDA_EMULATION_ORDER": order},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
