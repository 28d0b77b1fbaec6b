"""A device for Triton whose kernels the PTX machine runs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.backends.nvidia import driver as nvidia

from ptx import machine, program
from ptx.driver import library
from repmtl_kernels.backends import choice

_records: list[list[Launches]] = []
# Triton keeps what it compiled for a device by its number: each stand-in starts with nothing.
_numbers = itertools.count(1000)


class Launch(NamedTuple):
    """A launch of a kernel."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes of dynamic shared memory


@dataclass
class Launches:
    """A record of all that ran on a stand-in so far."""

    capability: int
    all: list[Launch] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)  # names of kernels, once for each variant
    tensor_maps: int = 0

    def by_kernel(self) -> Counter[str]:
        """Return how often each kernel was launched."""
        return Counter(launch.kernel for launch in self.all)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launches]]:
    """Yield a list that takes the launches of each stand-in from here on."""
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()


@contextlib.contextmanager
def driver(
    capability: int = 90,
    *,
    observer: Any = None,
    edit: Callable[[str, str], str] | None = None,
    only: Callable[[int, int, int], bool] | None = None,
    races: bool = True,
    execute: bool = True,
) -> Iterator[Launches]:
    """Have Triton compile for this compute capability, and run its kernels on the PTX machine.

    The Triton backend takes tensors of the CPU meanwhile. A launch raises what the machine raises.
    ``edit(name, ptx)`` returns the PTX to run in place of a kernel's. ``observer``, ``only`` and
    ``races`` are for :func:`ptx.machine.run`. Without ``execute``, launches are counted only, and
    results have no meaning.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels of this process cannot be compiled")
    run = functools.partial(machine.run, observer=observer, only=only, races=races)
    stand_in = StandIn(capability, run if execute else None, edit)
    before = triton.runtime.driver._active
    assert not isinstance(before, StandIn), "one stand-in at a time"
    with (
        triton.knobs.cache.scope(),
        # The driver loads PTX, as the real one can; to assemble it takes as long as to compile it.
        mock.patch.object(nvidia_compiler.CUDABackend, "make_cubin", _not_assembled),
        mock.patch.object(choice, "refusal", lambda *_: None),
    ):
        triton.knobs.cache.dir = str(library.folder() / "kernels")
        triton.runtime.driver.set_active(stand_in)
        for record in _records:
            record.append(stand_in.launches)
        try:
            yield stand_in.launches
        finally:
            stand_in.forget()
            triton.runtime.driver._active = before


def _not_assembled(self, ptx: str, *_) -> bytes:
    return ptx.encode()


class StandIn(nvidia.CudaDriver):
    """The driver that Triton asks for the device, and that launches for it."""

    def __init__(
        self, capability: int, run: Callable | None, edit: Callable[[str, str], str] | None
    ) -> None:
        # Not the one of CudaDriver, which asks PyTorch for a GPU.
        self.launches = Launches(capability)
        self.launcher_cls = functools.partial(_Launcher, self)
        self.touched: list[tuple[int, int]] = []  # addresses that the launch under way may use
        self.error: BaseException | None = None
        self._run = run
        self._edit = edit or (lambda name, ptx: ptx)
        self._device = next(_numbers)
        self._modules: list[str] = []  # PTX
        self._functions: list[tuple[str, str]] = []  # the kernel's name, its PTX
        self._kernels: dict[int, program.Kernel] = {}
        self._jitted: set = set()
        self._library = library.load()
        device = library.DEVICES[capability]
        self._library.start(device, self._loaded, self._found, self._launched)
        self._tensor_maps = self._library.tensor_maps()
        self.utils = nvidia.CudaUtils()

    def get_current_device(self) -> int:
        return self._device

    def set_current_device(self, device: int) -> None:
        assert device == self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.launches.capability, 10)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.launches.capability, 32)

    def remember(self, jitted) -> None:
        """Note a function that has kernels for this device."""
        self._jitted.add(jitted)

    def forget(self) -> None:
        """Have Triton drop what it compiled for this device."""
        for jitted in self._jitted:
            for kernel in jitted.device_caches.pop(self._device)[0].values():
                kernel.module = None  # else it unloads itself when this driver may be gone

    def finish_launch(self) -> None:
        """Raise what the last launch raised, which C could not pass on."""
        self.launches.tensor_maps = self._library.tensor_maps() - self._tensor_maps
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _loaded(self, ptx: str) -> int:
        self._modules.append(ptx)
        return len(self._modules)

    def _found(self, module: int, name: str) -> int:
        self._functions.append((name, self._modules[module - 1]))
        self.launches.loaded.append(name)
        return len(self._functions)

    def _launched(self, number: int, grid, block, shared: int, addresses) -> bool:
        name, _ = self._functions[number - 1]
        self.launches.all.append(Launch(name, grid, block, shared))
        if self._run is None:
            return True
        try:
            kernel = self._kernel(number)
            arguments = [
                ctypes.string_at(addresses[i], parameter.bytes)
                for i, parameter in enumerate(kernel.params)
            ]
            self._run(kernel, grid, block, arguments, shared=shared, allowed=self.touched)
        except BaseException as error:  # noqa: BLE001  (the launching call raises it)
            self.error = error
        return self.error is None

    def _kernel(self, number: int) -> program.Kernel:
        if number not in self._kernels:
            name, ptx = self._functions[number - 1]
            self._kernels[number] = _parse(self._edit(name, ptx))[name]
        return self._kernels[number]


@functools.lru_cache(maxsize=64)
def _parse(ptx: str) -> dict[str, program.Kernel]:
    return program.parse(ptx)


class _Launcher(nvidia.CudaLauncher):
    """Triton's launcher of one kernel, which tells the stand-in about each launch."""

    def __init__(self, stand_in: StandIn, source, metadata) -> None:
        super().__init__(source, metadata)
        self._stand_in = stand_in
        stand_in.remember(source.fn)

    def __call__(self, *arguments) -> None:
        self._stand_in.touched = sorted(set(_storages(arguments)))
        try:
            super().__call__(*arguments)
        except RuntimeError:
            if self._stand_in.error is None:
                raise
        self._stand_in.finish_launch()


def _storages(argument) -> Iterator[tuple[int, int]]:
    """Yield the memory of the tensors of an argument, tuples and tensor descriptors included."""
    if isinstance(argument, torch.Tensor):
        storage = argument.untyped_storage()
        yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _storages(part)
    elif isinstance(base := getattr(argument, "base", None), torch.Tensor):
        yield from _storages(base)
