"""Global memory: the memory of this process, where a launch may touch it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import Fault

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

_BASE = 1 << 16


class _AllMemory:
    """All addresses of the process as one array."""

    def __init__(self, dtype: type[np.generic]) -> None:
        size = np.dtype(dtype).itemsize
        self.__array_interface__ = {
            "shape": (((1 << 47) - 2 * _BASE) // size,),
            "typestr": np.dtype(dtype).str,
            "data": (_BASE, False),
            "version": 3,
        }


UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_WORDS = {size: np.asarray(_AllMemory(dtype)) for size, dtype in UNSIGNED.items()}


def put(words: np.ndarray, places: np.ndarray, values: np.ndarray) -> None:
    """Store what lanes store at once; those with one place have to hold one value."""
    words[places] = values
    if not _same_but_for_rounding(words[places], values):
        raise Fault("race: lanes store different values in one place at once")


def _same_but_for_rounding(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether what lanes store together may be copies of one number.

    Triton has all lanes that hold a sum store it. Where one of its products is fused with a sum,
    lanes that added in another order differ in the last bits.
    """
    if a.dtype.itemsize != 4:
        return np.array_equal(a, b)
    near = np.abs(a.astype(np.int64) - b.astype(np.int64)) <= 16
    size = np.abs(a.view(np.float32))
    is_number = np.isfinite(size) & (size >= np.finfo(np.float32).tiny)
    return bool(((a == b) | (near & is_number)).all())


class GlobalMemory:
    """Loads and stores with a check of each address."""

    def __init__(self, machine: Machine, allowed: Sequence[tuple[int, int]]) -> None:
        self._machine = machine
        ranges = sorted({(first, end) for first, end in allowed if end > first})
        self._first = np.array([first for first, _ in ranges], np.int64)
        # The furthest end of all that begin before: tensors may share memory.
        self._end = np.maximum.accumulate(np.array([end for _, end in ranges], np.int64))

    def check(self, address: np.ndarray, size: int, what: str) -> None:
        """Raise Fault unless all these addresses are aligned and inside."""
        if not address.size:
            return
        if (address % size).any():
            raise Fault(f"{what} of {size} bytes: misaligned")
        place = np.searchsorted(self._first, address, side="right") - 1
        inside = (place >= 0) & (address + size <= self._end[place])
        if not inside.all():
            raise Fault(f"{what} of {size} bytes outside all tensors")

    def load(
        self, address: np.ndarray, size: int, count: int, where: Active, what: str = "load"
    ) -> list[np.ndarray]:
        """Return ``count`` neighbours of ``size`` bytes for each lane; poison where inactive."""
        if where is None:
            self.check(address, size * count, what)
            first = (address - _BASE) // size
            return [_WORDS[size][first + i] for i in range(count)]
        part = address[where]
        self.check(part, size * count, what)
        first = (part - _BASE) // size
        results = []
        for i in range(count):
            value = np.full(len(address), np.iinfo(UNSIGNED[size]).max, UNSIGNED[size])
            value[where] = _WORDS[size][first + i]
            results.append(value)
        return results

    def store(
        self, address: np.ndarray, values: Sequence[np.ndarray], where: Active, what: str = "store"
    ) -> None:
        """Store neighbours for each lane. Other races of global memory are not looked for."""
        size = values[0].dtype.itemsize
        part = address if where is None else address[where]
        self.check(part, size * len(values), what)
        first = (part - _BASE) // size
        for i, value in enumerate(values):
            spread = self._machine.spread(value)
            wanted = spread if where is None else spread[where]
            put(_WORDS[size], first + i, wanted)

    @staticmethod
    def read(address: np.ndarray, size: int) -> np.ndarray:
        """Return what lies at addresses that were checked before."""
        return _WORDS[size][(address - _BASE) // size]
