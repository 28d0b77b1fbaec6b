"""Builds libcuda.c, the stand-in for the CUDA driver, and calls it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends import nvidia

SOURCE = Path(__file__).with_name("libcuda.c")
HEADERS = Path(nvidia.__file__).with_name("include")
NAME = "libcuda.so.1"


class Device(NamedTuple):
    """Facts of a GPU that kernels and their launcher may ask for."""

    major: int
    minor: int
    multiprocessors: int
    shared_of_block: int  # bytes
    shared_of_multiprocessor: int


# A100, H100 and H200, B200.
DEVICES = {
    80: Device(8, 0, 108, 163 * 1024, 164 * 1024),
    90: Device(9, 0, 132, 227 * 1024, 228 * 1024),
    100: Device(10, 0, 148, 227 * 1024, 228 * 1024),
}


class _Device(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in Device._fields]


_LOADED = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_char_p)
_FOUND = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_char_p)
_LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_long,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)


def compiler() -> str | None:
    """Return the C compiler that Triton itself needs too, None where there is none."""
    return shutil.which(os.environ.get("CC") or "gcc") or shutil.which("cc")


def folder() -> Path:
    """Return the folder of the library, which is built where it is missing or not this source's."""
    command = [compiler() or "cc", "-std=gnu11", "-O1", "-Wall", "-shared", "-fPIC"]
    # By this name the launcher finds the library that is loaded already.
    command += [f"-Wl,-soname,{NAME}", "-I", str(HEADERS), str(SOURCE)]
    key = hashlib.sha256(SOURCE.read_bytes() + repr(command).encode()).hexdigest()[:16]
    place = Path(triton.knobs.cache.dir) / f"stand_in_for_cuda_{key}"
    if not (place / NAME).exists():
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as own:  # other processes may build it too
            subprocess.run([*command, "-o", f"{own}/{NAME}"], check=True)
            os.replace(f"{own}/{NAME}", place / NAME)
    return place


class Library:
    """The stand-in, loaded into this process in place of the driver."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path / NAME), mode=ctypes.RTLD_GLOBAL)
        self._library.stand_in_tensor_maps.restype = ctypes.c_long
        self._callbacks: tuple = ()

    def start(
        self,
        device: Device,
        loaded: Callable[[str], int],
        found: Callable[[int, str], int],
        launched: Callable[[int, tuple, tuple, int, list[int]], bool],
    ) -> None:
        """Be this device from here on, and call these functions.

        ``loaded(ptx)`` returns a number for the module, ``found(module, name)`` one for its
        function. ``launched(function, grid, block, shared bytes, addresses of the arguments)``
        returns whether the launch succeeded. They must not raise: C does not pass exceptions on.
        """
        self._callbacks = (  # they last as long as C may call them
            _LOADED(lambda ptx: loaded(ptx.decode())),
            _FOUND(lambda module, name: found(module, name.decode())),
            _LAUNCHED(
                lambda function, grid, block, shared, arguments: launched(
                    function, tuple(grid[0]), tuple(block[0]), shared, arguments
                )
            ),
        )
        self._library.stand_in_device(ctypes.byref(_Device(*device)))
        self._library.stand_in_callbacks(*self._callbacks)

    def tensor_maps(self) -> int:
        """Return how many tensor maps were made so far."""
        return self._library.stand_in_tensor_maps()


@functools.cache
def load() -> Library:
    """Load the stand-in, and have Triton build its launcher against it."""
    place = folder()
    triton.knobs.nvidia.libcuda_path = str(place)
    return Library(place)
