"""The stand-in for the CUDA driver: what it counts, refuses and hands on."""

from __future__ import annotations

import ctypes

import pytest
import torch

from ptx.tier import MARKS  # isort: skip  (it skips where nothing can be compiled)
import triton
import triton.language as tl

from ptx.driver import Launch, driver, library
from ptx.machine import Fault
from ptx.observer import Observer

pytestmark = MARKS
SIZE = 128


@triton.jit
def _scale_kernel(x, y, factor, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * factor, mask=i < n)


def scale(n: int, factor: float = 3.0, size: int = SIZE) -> torch.Tensor:
    x, y = torch.arange(float(size)), torch.zeros(size)
    _scale_kernel[(triton.cdiv(n, 64),)](x, y, factor, n, BLOCK=64)
    return y


def expected(factor: float = 3.0) -> torch.Tensor:
    return torch.arange(float(SIZE)) * factor


def test_a_launch_runs_and_is_counted():
    before = triton.runtime.driver._active
    with driver(90) as launches:
        assert torch.equal(scale(SIZE), expected())
        assert torch.equal(scale(SIZE, -1.5), expected(-1.5))
    assert launches.all == 2 * [Launch("_scale_kernel", (2, 1, 1), (128, 1, 1), 0)]
    assert launches.loaded == ["_scale_kernel"] and launches.tensor_maps == 0
    assert launches.by_kernel() == {"_scale_kernel": 2}
    assert triton.runtime.driver._active is before
    with driver(80) as launches:  # another device: nothing is loaded yet
        assert torch.equal(scale(SIZE), expected())
    assert launches.capability == 80 and launches.loaded == ["_scale_kernel"]


def test_a_fault_is_the_exception_of_the_launch():
    with driver(90):
        with pytest.raises(Fault):
            scale(SIZE + 64)
        assert torch.equal(scale(SIZE), expected())


def test_ptx_can_be_changed_before_it_runs():
    seen = []

    def twice(name: str, ptx: str) -> str:
        seen.append(name)
        assert ptx.count("mul.f32") > 0
        return ptx.replace("mul.f32", "add.f32")

    with driver(90, edit=twice):
        assert torch.equal(scale(SIZE), torch.arange(float(SIZE)) + 3)
        assert torch.equal(scale(SIZE, 4.0), torch.arange(float(SIZE)) + 4)
    assert seen == ["_scale_kernel"]
    with driver(90):  # the changed kernel is gone
        assert torch.equal(scale(SIZE), expected())


def test_some_ctas_or_none_are_carried_out():
    with driver(90, only=lambda x, y, z: x == 1):
        assert torch.equal(scale(SIZE), expected() * (torch.arange(SIZE) >= 64))
    with driver(90, execute=False) as launches:
        assert not scale(SIZE).any()
    assert len(launches.all) == 1


class Starts(Observer):
    """Keeps what launches start."""

    def __init__(self) -> None:
        self.started: list[tuple] = []

    def start(self, kernel, grid, block, shared, ctas) -> None:
        self.started.append((kernel.name, grid, block, ctas))


def test_an_observer_sees_launches():
    observer = Starts()
    with driver(90, observer=observer):
        scale(SIZE)
    assert observer.started == [("_scale_kernel", (2, 1, 1), (128, 1, 1), 2)]


def test_more_shared_memory_than_a_block_has_is_refused():
    from triton.runtime.errors import OutOfResources

    from repmtl_kernels import csa_loss
    from repmtl_kernels.backends.triton.tiles import Tile, trying

    tile = Tile(128, 128, 128, 8, 4)
    saliencies = torch.zeros(2, 2, 328, 328, dtype=torch.bfloat16)
    with driver(90, execute=False), trying({"gram": tile}), pytest.raises(OutOfResources):
        csa_loss(saliencies, backend="triton")


BFLOAT16, TFLOAT32 = 9, 11  # CUtensorMapDataType
SWIZZLE_64, SWIZZLE_128 = 2, 3
GOOD = {
    "address": 0,
    "swizzle": SWIZZLE_128,
    "bytes": 2,
    "type": BFLOAT16,
    "box": [1, 64, 64],
    "shape": [2, 100, 136],
    "strides": [13600, 136, 1],
    "padding": 0,
}


def tensor_map(memory: torch.Tensor, **change):
    values = GOOD | change
    address, *others = values.values()
    return triton.runtime.driver.active.utils.fill_tma_descriptor_tiled(
        memory.data_ptr() + address, *others
    )


def test_tensor_maps_are_checked_as_the_driver_does():
    memory = torch.zeros(2 * 100 * 136, dtype=torch.bfloat16)
    with driver(90) as launches:
        tensor_map(memory)
        for change, reason in (
            ({"address": 8}, "multiple of 16 bytes"),
            ({"box": [1, 512, 64]}, "expected 1 to 256"),
            ({"box": [1, 64, 128]}, "rows of a box have 256 bytes; the swizzle has 128"),
            ({"swizzle": SWIZZLE_64}, "rows of a box have 128 bytes; the swizzle has 64"),
            ({"box": [1, 64, 12]}, "rows of a box have 24 bytes, no multiple of 16"),
            ({"strides": [13600, 132, 1]}, "stride 1 is 264 bytes"),
            ({"shape": [2, 0, 136]}, "dimension 1 has 0 elements"),
            ({"type": TFLOAT32, "bytes": 4}, "no maps of type 11"),
            ({"padding": 1}, "fill 1"),
            ({"box": 4 * [1], "shape": 4 * [1], "strides": [8, 8, 8, 1]}, "rank 4"),
        ):
            with pytest.raises(RuntimeError, match=reason):
                tensor_map(memory, **change)
    assert launches.all == []


def test_tensor_maps_hold_what_the_machine_reads():
    driver_calls = ctypes.CDLL(str(library.folder() / library.NAME))
    memory, map_of = (torch.zeros(16, dtype=torch.int64) for _ in range(2))
    sizes, strides = (ctypes.c_uint64 * 3)(136, 100, 2), (ctypes.c_uint64 * 2)(272, 27200)
    box, steps = (ctypes.c_uint32 * 3)(64, 32, 1), (ctypes.c_uint32 * 3)(1, 1, 1)
    address = ctypes.c_void_p(memory.data_ptr())
    status = driver_calls.cuTensorMapEncodeTiled(
        ctypes.c_void_p(map_of.data_ptr()),
        *(BFLOAT16, 3, address, sizes, strides, box, steps, 0, SWIZZLE_128, 0, 0),
    )
    assert status == 0
    assert map_of[:4].tolist() == [memory.data_ptr(), 2, 3, 3]
    assert map_of[4:12].tolist() == [136, 100, 2, 272, 27200, 64, 32, 1]
