"""The launches of a loss, counted on the PTX machine: a few CTAs of each stand for all of them.

The values mean nothing: the saliencies are zeros, and what CTAs that did not run would have written
is ones. No kernel but Gram's chooses its way by values, and it takes the usual way for those.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from benchmarks.machine import ROOT
from benchmarks.shapes import Shape
from benchmarks.static_report import MODES, products_of, resources
from repmtl_kernels import rep_mtl_loss
from repmtl_kernels.backends import choice

if (TESTS := str(ROOT / "tests")) not in sys.path:
    sys.path.append(TESTS)

from ptx.count_step import Operators
from ptx.counters import Counters
from ptx.driver import driver
from ptx.instructions.warpgroup import Products
from ptx.latency import CriticalPath

# Above this many bytes, memory is left as the system gives it: zeros that take no place.
LARGE = 64 << 20
MOST_CTAS = 256
# The CTAs whose latency is looked at, as parts of a sample: some CTAs end early.
PLACES = (0.3, 0.5)

Grid = tuple[int, int, int]


class Launched(NamedTuple):
    """A launch of a Triton kernel, with what was counted of its sampled CTAs."""

    kernel: str
    grid: Grid
    threads: int
    shared: int  # bytes
    ptx: str
    backward: bool
    counters: Counters
    latency_clocks: float


class Operation(NamedTuple):
    """An operation of PyTorch: one launch that reads and writes these bytes."""

    name: str
    bytes: int
    backward: bool


class Sample(NamedTuple):
    """The CTAs with ``x < width`` and ``y < height``, every ``step``-th of them."""

    width: int
    height: int
    step: int
    first: int

    def __call__(self, x: int, y: int, z: int) -> bool:
        if x >= self.width or y >= self.height:
            return False
        return (y * self.width + x) % self.step == self.first


def sample_of(grid: Grid, shape: Shape) -> Sample:
    """Return one task's CTAs of one sample where a grid is by tasks and samples, else all."""
    width, height, _ = grid
    if height == shape.tasks and width % shape.batch == 0:
        width, height = width // shape.batch, 1
    elif height == 1 and width % (shape.tasks * shape.batch) == 0:
        width //= shape.tasks * shape.batch
    step = -(-width * height // MOST_CTAS)
    return Sample(width, height, step, step // 2)


def one_of(grid: Grid, shape: Shape, place: float) -> Sample:
    """Return the CTA at this part of the sample."""
    whole = sample_of(grid, shape)
    count = whole.width * whole.height
    return whole._replace(step=count, first=int(place * count))


class _Observed:
    """An observer of each launch by itself; ``started`` has them with their kernels."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._edited = ""
        self._ptx: dict[int, str] = {}
        self.current: Any = None
        self.started: list[tuple[str, Any]] = []

    def edit(self, name: str, ptx: str) -> str:
        self._edited = ptx
        return ptx

    def start(self, kernel: Any, grid: Any, block: Any, shared: int, ctas: int) -> None:
        # A kernel is edited right before its first launch.
        ptx = self._ptx.setdefault(id(kernel), self._edited)
        self.current = self._make()
        self.started.append((ptx, self.current))
        self.current.start(kernel, grid, block, shared, ctas)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.current, name)


class _Operations(Operators):
    """Notes PyTorch's operators that launch a kernel, and fills new memory with ones."""

    def __init__(self, note: Callable[[str, int], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.launched.total()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        if self.launched.total() > before:
            tensors = (t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
            self.note(name, sum(t.nbytes for t in tensors))
        elif "empty" in name and out.is_floating_point() and out.nbytes < LARGE:
            out.fill_(1)
        return out


def saliencies_of(shape: Shape, mode: str) -> list[Tensor]:
    """Return zeros: memory that takes no place until it is written."""
    dtype, _ = MODES[mode]
    size = (shape.batch, shape.channels, shape.height, shape.width)
    return [torch.zeros(size, dtype=dtype).requires_grad_() for _ in range(shape.tasks)]


def run(saliencies: list[Tensor], between: Callable[[], None] = lambda: None) -> None:
    """Run ``rep_mtl_loss`` forward and backward, and ``between`` in between."""
    total = rep_mtl_loss(saliencies, backend="triton").total
    between()
    torch.autograd.grad(total, saliencies)


@contextmanager
def _machine(capability: int, observed: _Observed, choose: Callable) -> Iterator[Any]:
    def only(x: int, y: int, z: int) -> bool:
        return choose(launches.all[-1].grid)(x, y, z)

    options = {"observer": observed, "edit": observed.edit, "only": only, "races": False}
    # Nobody reads the products, which take as long as all else.
    without_values = mock.patch.object(Products, "_compute", lambda products, product: None)
    # A first call compiles ahead: its operations are not those of a step.
    unprepared = mock.patch.object(choice.load("triton"), "prepare", None)
    with driver(capability, **options) as launches, without_values, unprepared:
        yield launches


def counted(shape: Shape, mode: str, capability: int, *, latency: bool = True) -> list:
    """Return every launch of a forward and backward in its order, operations of PyTorch too."""
    saliencies = saliencies_of(shape, mode)
    order: list[Operation | int] = []  # of a Triton launch its number
    forward: list[int] = []  # how many launches it has

    def catch_up() -> None:
        """Note the launches since the last operation."""
        before = sum(isinstance(entry, int) for entry in order)
        order.extend(range(before, len(launches.all)))

    def note(name: str, size: int) -> None:
        catch_up()
        order.append(Operation(name, size, bool(forward)))

    def between() -> None:
        catch_up()
        forward.append(len(launches.all))

    counters = _Observed(Counters)
    choose = functools.cache(functools.partial(sample_of, shape=shape))
    with products_of(mode), _machine(capability, counters, choose) as launches:
        with _Operations(note):
            run(saliencies, between)
        catch_up()
    clocks = [0.0] * len(counters.started)
    for place in PLACES if latency else ():
        paths = _Observed(CriticalPath)
        choose = functools.cache(functools.partial(one_of, shape=shape, place=place))
        with products_of(mode), _machine(capability, paths, choose):
            with _Operations(lambda name, size: None):
                run(saliencies)
        found = [path.clocks for _, path in paths.started]
        clocks = [max(pair) for pair in zip(clocks, found, strict=True)]
    return [
        _launched(launches.all[at], *counters.started[at], at >= forward[0], clocks[at])
        if isinstance(at, int)
        else at
        for at in order
    ]


def _launched(launch: Any, ptx: str, counters: Counters, backward: bool, clocks: float) -> Launched:
    x, y, z = launch.block
    return Launched(
        launch.kernel, launch.grid, x * y * z, launch.shared, ptx, backward, counters, clocks
    )


@functools.cache
def registers(ptx: str, capability: int) -> int:
    """Return the registers of a thread, as Triton has the kernel assembled."""
    backend = CUDABackend(GPUTarget("cuda", capability, 32))
    options = backend.parse_options({"enable_fp_fusion": True})
    cubin = backend.make_cubin(ptx, {}, options, capability)
    return resources(cubin)["REG"]
