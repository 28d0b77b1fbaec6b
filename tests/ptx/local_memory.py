"""Local memory: each thread's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import Fault
from ptx.global_memory import UNSIGNED

if TYPE_CHECKING:
    from ptx.machine import Active, Machine


class LocalMemory:
    """``size`` bytes for each lane."""

    def __init__(self, machine: Machine, size: int) -> None:
        self._machine = machine
        self._size = -(-size // 8) * 8
        self._bytes = np.full(machine.lanes * self._size, 0xFF, np.uint8)

    def load(self, address: np.ndarray, size: int, count: int, where: Active) -> list[np.ndarray]:
        first = self._places(address, size, count, where)
        words = self._bytes.view(UNSIGNED[size])
        return [words[first + i] for i in range(count)]

    def store(self, address: np.ndarray, values: Sequence[np.ndarray], where: Active) -> None:
        size = values[0].dtype.itemsize
        first = self._places(address, size, len(values), where)
        words = self._bytes.view(UNSIGNED[size])
        for i, value in enumerate(values):
            spread = self._machine.spread(value)
            lanes = slice(None) if where is None else where
            words[(first + i)[lanes]] = spread[lanes]

    def _places(self, address: np.ndarray, size: int, count: int, where: Active) -> np.ndarray:
        used = address if where is None else address[where]
        if used.size and (used.min() < 0 or used.max() + size * count > self._size):
            raise Fault("outside local memory")
        if (used % (size * count)).any():
            raise Fault("misaligned in local memory")
        inside = address if where is None else np.where(where, address, 0)
        return (np.arange(self._machine.lanes) * self._size + inside) // size
