"""Runs the kernels of ``csrc/cuda`` as nvcc's PTX: launches of the emulated library go here."""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulated_cuda
import numpy as np
import torch

from ptx import machine, program
from ptx.faults import Fault
from ptx.kernel import Kernel
from repmtl_kernels.backends.native import files

sys.path.append(str(emulated_cuda.ROOT / "csrc"))
from native_build import libraries, tools
from native_build.ninja_file import NVCC_FLAGS

# nvcc names the anonymous namespace of a file after the file.
_ANONYMOUS = re.compile(r"(\d+)(_GLOBAL__N__)")
_ENTRY = re.compile(r"^\.entry (\w+)\(", re.M)


def why_not() -> str | None:
    """Return why the kernels can't be compiled or run here, or None."""
    if torch.cuda.is_available():
        return "a GPU runs the kernels"
    if reason := tools.why_not(libraries.CPU):
        return reason
    missing = [name for name in (tools.nvcc() or "nvcc", "nm") if shutil.which(name) is None]
    return f"there is no {missing[0]}" if missing else None


def cached_kernels(cache: Path, architecture: int) -> Path:
    """Return the folder with the PTX of all kernels, compiled unless the cache has it."""
    flags = [*NVCC_FLAGS, "-ptx", f"-arch=compute_{architecture}"]

    def compile_all(folder: Path) -> None:
        def compile_one(source: Path) -> None:
            target = folder / f"{source.stem}.ptx"
            emulated_cuda.command(str(tools.nvcc()), *flags, str(source), "-o", str(target))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, sorted(emulated_cuda.SOURCES.glob("*.cu"))))

    version = emulated_cuda.command(str(tools.nvcc()), "--version")
    return _cached(cache, compile_all, *flags, version)


def cached_library(cache: Path) -> Path:
    """Return the emulated library, of which only the host code runs here."""
    compiler = emulated_cuda.command(emulated_cuda.COMPILER, "--version")
    of_emulation = files.digest(emulated_cuda.HEADERS)
    folder = _cached(
        cache,
        lambda folder: emulated_cuda.build(folder, "-O0"),
        *(compiler, of_emulation, Path(emulated_cuda.__file__).read_text(), torch.__version__),
    )
    return folder / emulated_cuda.LIBRARY


def _cached(cache: Path, make: Callable[[Path], object], *key: str) -> Path:
    """Return the folder that ``make`` fills, once for the sources of csrc and a key."""
    text = "\0".join([files.digest(emulated_cuda.ROOT / "csrc"), *key])
    folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of pytest-xdist want the same
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as partial:
                make(Path(partial))
                shutil.copytree(partial, folder)
    return folder


class Kernels:
    """The kernels of a folder of PTX, by the names that the host's compiler gives them."""

    def __init__(self, folder: Path) -> None:
        self.texts: dict[str, str] = {}
        self.parsed: dict[str, Kernel] = {}
        for path in sorted(folder.glob("*.ptx")):
            text = path.read_text()
            starts = [entry.start() for entry in _ENTRY.finditer(text)]
            head = text[: starts[0]]
            for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
                self.texts[host_name(_ENTRY.match(text, start)[1])] = head + text[start:end]

    def __getitem__(self, name: str) -> Kernel:
        if name not in self.parsed:
            (self.parsed[name],) = program.parse(self.texts[name]).values()
        return self.parsed[name]


def host_name(name: str) -> str:
    """Return the name that g++ and clang give to a kernel of nvcc's PTX."""
    anonymous = _ANONYMOUS.search(name)
    assert anonymous is not None, name
    rest = name[anonymous.end(1) + int(anonymous[1]) :]
    return f"{name[: anonymous.start()]}12_GLOBAL__N_1{rest}"


_RUNNER = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_void_p),
)


class Launches:
    """Runs each launch of the library in the machine."""

    def __init__(self, library: str, kernels: Kernels) -> None:
        self.kernels = kernels
        self.names: dict[str, None] = {}  # of the kernels that ran, in order
        self._library = ctypes.CDLL(library)
        self._runner = _RUNNER(self._run)
        variable = ctypes.c_void_p.in_dll(self._library, "cuda_emulation_runner")
        variable.value = ctypes.cast(self._runner, ctypes.c_void_p).value
        places = _symbols(library)
        base = ctypes.addressof(variable) - places["cuda_emulation_runner"]
        self._name_of = {base + places[name]: name for name in kernels.texts}
        assert len(self._name_of) == len(kernels.texts)
        self._memory_around = self._library.cuda_emulation_memory_around
        self._memory_around.restype = ctypes.c_bool
        self._failure = ctypes.create_string_buffer(0)

    def _run(self, function, grid, block, arguments) -> int | None:
        """Return the address of a text that says what failed, or None."""
        try:
            self._launch(self._name_of[function], tuple(grid[:3]), tuple(block[:3]), arguments)
        except Fault as fault:
            message = str(fault)
        except BaseException:  # noqa: BLE001  (nothing may pass through C: the launch fails with it)
            message = traceback.format_exc()
        else:
            return None
        self._failure = ctypes.create_string_buffer(message.encode())
        return ctypes.addressof(self._failure)

    def _launch(self, name: str, grid, block, arguments) -> None:
        self.names[name] = None
        kernel = self.kernels[name]
        values = [
            ctypes.string_at(arguments[i], param.bytes) for i, param in enumerate(kernel.params)
        ]
        machine.run(kernel, grid, block, values, shared=0, allowed=self._pointed_to(values))

    def _pointed_to(self, values: list[bytes]) -> list[tuple[int, int]]:
        """Return the allocations of PyTorch that pointers in arguments and their structs name."""
        allocations = set()
        first, end = ctypes.c_size_t(), ctypes.c_size_t()
        for value in values:
            for word in np.frombuffer(value[: len(value) // 8 * 8], np.uint64).tolist():
                if self._memory_around(
                    ctypes.c_size_t(word), ctypes.byref(first), ctypes.byref(end)
                ):
                    allocations.add((first.value, end.value))
        return sorted(allocations)


def _symbols(library: str) -> dict[str, int]:
    """Return the places of functions and variables, those of one file's too."""
    lines = emulated_cuda.command("nm", "--defined-only", library).splitlines()
    return {name: int(place, 16) for place, _, name in map(str.split, lines)}


def install(library: str, folder: str) -> Launches:
    """Make the launches of the emulated library run PTX, from here on."""
    install.launches = Launches(library, Kernels(Path(folder)))  # lasts as long as the process
    if ran := os.environ.get("REPMTL_EMULATED_PTX_RAN"):
        atexit.register(lambda: Path(ran).write_text("\n".join(install.launches.names)))
    return install.launches
