"""Compiles the CUDA kernels of ``csrc/cuda`` for the CPU, with headers that emulate CUDA."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from repmtl_kernels.backends.native import library as native_library
from repmtl_kernels.backends.native.files import digest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
SOURCES = ROOT / "csrc" / "cuda"
HEADERS = TESTS / "emulation"
COMPILER = os.environ.get("CXX") or "c++"
LIBRARY = "librepmtl_emulated.so"


def build(folder: Path, *flags: str) -> Path:
    """Compile the library, whose operators take CPU tensors, and return its path."""
    torch_folder = Path(torch.__file__).parent
    common = ["-std=c++17", "-O2", "-fPIC", "-Wall", *flags]
    kernels = [*common, "-Wno-unknown-pragmas", "-x", "c++", "-I", str(HEADERS)]
    binding = [
        *common,
        "-Wno-psabi",
        "-fvisibility=hidden",
        "-isystem",
        str(torch_folder / "include"),
    ]
    allocations = list(binding)
    binding += ["-DREPMTL_DISPATCH_KEY=CPU", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    binding.append("-DREPMTL_ARENA=0")
    binding.append(f'-DREPMTL_SOURCES="{digest(ROOT / "csrc")}"')
    jobs = [(kernels, source) for source in sorted(SOURCES.glob("*.cu"))]
    jobs += [(binding, path) for path in sorted(SOURCES.glob("*.cpp"))]
    jobs.append((binding, HEADERS / "torch_cuda.cpp"))
    jobs.append((allocations, HEADERS / "allocations.cpp"))

    def compile_one(job: tuple[list[str], Path]) -> str:
        options, source = job
        target = folder / f"{source.stem}.o"
        command(COMPILER, *options, "-c", str(source), "-o", str(target))
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    library = folder / LIBRARY
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    command(COMPILER, *flags, "-shared", "-Wl,-Bsymbolic", *objects, *libraries, "-o", str(library))
    return library


def command(*words: str) -> str:
    """Run a command, and return what it prints."""
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run_tests(library: Path, *arguments: str, **environment: str) -> int:
    """Run tests with a library in a process of their own; return how many have passed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "native", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "REPMTL_EMULATED_CUDA": str(library),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    return int(passed)


def install(library: str) -> None:
    """Make the native backend take CPU tensors for CUDA tensors, from here on."""
    torch.ops.load_library(library)
    # PyTorch has this operator for CUDA only.
    implementations = torch.library.Library("aten", "IMPL")
    implementations.impl("bmm.dtype", _bmm, "CPU")
    install.implementations = implementations  # they last as long as this object
    native_library.library_of = lambda x: "cuda"
    native_library.status = lambda library: "ok"


def _bmm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # PyTorch accepts only these types on CUDA.
    assert a.dtype == b.dtype in (torch.float16, torch.bfloat16) and dtype == torch.float32
    return torch.bmm(a.to(dtype), b.to(dtype))
