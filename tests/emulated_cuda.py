"""Compiles the CUDA kernels of ``csrc/cuda`` for the CPU, with headers that emulate CUDA."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from repmtl_kernels.backends.native import library as native_library
from repmtl_kernels.backends.native.files import digest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
HEADERS = ROOT / "tests" / "emulation"


def build(folder: Path, *flags: str) -> Path:
    """Compile the library, whose operators take CPU tensors, and return its path."""
    torch_folder = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "c++")
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
        _run(compiler, *options, "-c", str(source), "-o", str(target))
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    library = folder / "librepmtl_emulated.so"
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    _run(compiler, *flags, "-shared", "-Wl,-Bsymbolic", *objects, *libraries, "-o", str(library))
    return library


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


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
