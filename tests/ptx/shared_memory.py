"""Shared memory, with a record of who wrote and read what and when.

The record finds a race without luck: an access must be ordered after those before it by a barrier
of the CTA, or of the warp, or be the same thread's. Where the asynchronous proxy is involved
(wgmma, TMA), a proxy fence has to lie on the way (PTX ISA, section 9.7.13 and 9.7.15).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import Fault
from ptx.global_memory import UNSIGNED, put
from ptx.kernel import BYTES, Kernel

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

NOBODY, SEVERAL, TMA = -1, -2, -3
NEVER = -1
UNDER_WAY = np.iinfo(np.int32).max  # an asynchronous copy or product that was not waited for


class SharedMemory:
    """``size`` bytes for each CTA. Addresses count from the start of the CTA's."""

    def __init__(self, machine: Machine, size: int, kernel: Kernel, races: bool) -> None:
        self._machine = machine
        self.size = size
        self.room = -(-max(size, 1) // 1024) * 1024
        self.bytes = np.full(machine.ctas * self.room, 0xFF, np.uint8)
        self.first = machine.cta * self.room  # of each lane's CTA
        self.races = Races(machine, self, _grain(kernel)) if races else NoRaces()

    def places(self, address: np.ndarray, size: int, lanes: Active | np.ndarray) -> np.ndarray:
        """Return where the lanes' accesses of ``size`` bytes are in :attr:`bytes`, checked."""
        address = self._machine.spread(address).astype(np.int64)
        first = self.first
        if lanes is not None:
            address, first = address[lanes], first[lanes]
        self.check(address, size)
        return first + address

    def check(self, address: np.ndarray, size: int) -> None:
        """Raise Fault unless these addresses of a CTA are inside and aligned."""
        if not address.size:
            return
        if address.min() < 0 or address.max() + size > self.size:
            raise Fault(f"outside the {self.size} bytes of shared memory")
        if (address % size).any():
            raise Fault(f"an access of {size} bytes to shared memory: misaligned")

    def load(self, address: np.ndarray, size: int, count: int, where: Active) -> list[np.ndarray]:
        """Return ``count`` neighbours of ``size`` bytes for each lane; poison where inactive."""
        places = self.places(address, size * count, where)
        self.races.read(places, size * count, self._lanes(where))
        words = self.bytes.view(UNSIGNED[size])
        results = []
        for i in range(count):
            value = words[places // size + i]
            if where is not None:
                spread = np.full(self._machine.lanes, np.iinfo(value.dtype).max, value.dtype)
                spread[where] = value
                value = spread
            results.append(value)
        return results

    def store(self, address: np.ndarray, values: Sequence[np.ndarray], where: Active) -> None:
        """Store neighbours for each lane."""
        size = values[0].dtype.itemsize
        places = self.places(address, size * len(values), where)
        self.races.write(places, size * len(values), self._lanes(where))
        words = self.bytes.view(UNSIGNED[size])
        for i, value in enumerate(values):
            spread = self._machine.spread(value)
            wanted = spread if where is None else spread[where]
            put(words, places // size + i, wanted)

    def _lanes(self, where: Active) -> np.ndarray:
        return np.arange(self._machine.lanes) if where is None else np.flatnonzero(where)

    def barrier(self, lanes: np.ndarray) -> None:
        """All threads of these lanes' CTAs have met."""
        self.races.barrier(lanes)

    def end(self) -> None:
        """Raise Fault if the launch ends with a copy under way."""
        self.races.end()


def _grain(kernel: Kernel) -> int:
    """Return the largest unit of bytes, up to 4, that no access to shared memory divides."""
    grain = 4
    for instruction in kernel.instructions:
        if instruction.op in ("ld", "st", "atom", "red") and "global" not in instruction.modifiers:
            grain = min(grain, BYTES[instruction.type])
        elif instruction.op == "stmatrix" and "trans" in instruction.modifiers:
            grain = min(grain, 2)
    return grain


class NoRaces:
    """No record."""

    def read(self, places, size, lanes) -> None: ...
    def write(self, places, size, lanes, *, under_way=False) -> None: ...
    def deliver(self, places, size, lanes) -> None: ...
    def read_by_products(self, places, size, group) -> None: ...
    def products_done(self, read) -> None: ...
    def written_by_tma(self, places, size, lane, mbarrier) -> None: ...
    def tma_delivers(self, places, size) -> None: ...
    def barrier(self, lanes) -> None: ...
    def warp_barrier(self, lanes) -> None: ...
    def proxy_fence(self, lanes) -> None: ...
    def acquired(self, lanes, mbarriers) -> None: ...
    def end(self) -> None: ...


class Races:
    """Last write and last read of each grain of shared memory.

    Times are the machine's clock. ``places`` are those in :attr:`SharedMemory.bytes`.
    """

    def __init__(self, machine: Machine, memory: SharedMemory, grain: int) -> None:
        self._machine, self._grain = machine, grain
        grains = len(memory.bytes) // grain
        self._writer = np.full(grains, NOBODY, np.int32)  # lane
        self._written = np.full(grains, NEVER, np.int32)  # when
        self._reader = np.full(grains, NOBODY, np.int32)
        self._reading_warp = np.full(grains, NOBODY, np.int32)
        self._read = np.full(grains, NEVER, np.int32)
        self._products = np.zeros(grains, np.int16)  # under way, which read it
        lanes = machine.lanes
        self._last_barrier = np.full(lanes, NEVER)
        self._last_warp_barrier = np.full(lanes, NEVER)
        self._last_fence = np.full(lanes, NEVER)
        # The last fence before the last barrier, and the last barrier before the last fence.
        self._fence_at_barrier = np.full(lanes, NEVER)
        self._barrier_at_fence = np.full(lanes, NEVER)
        # When a lane last saw a phase complete, by the place of the mbarrier.
        self._acquired: dict[int, np.ndarray] = {}
        self._delivered_by = np.full(grains, NOBODY, np.int32)  # the place of TMA's mbarrier

    def read(self, places: np.ndarray, size: int, lanes: np.ndarray) -> None:
        grains, lanes = self._grains(places, size, lanes)
        self._check_read(grains, lanes)
        self._note_read(grains, lanes)

    def _check_read(self, grains: np.ndarray, lanes: np.ndarray) -> None:
        writer, written = self._writer[grains], self._written[grains]
        if (written == UNDER_WAY).any():
            raise Fault("reads shared memory that an asynchronous copy has not delivered")
        if (written == NEVER).any():
            raise Fault("reads shared memory that nobody wrote")
        if not (self._ordered(grains, lanes) | (writer == lanes)).all():
            raise Fault("race: reads shared memory that another thread wrote, without a barrier")

    def write(
        self, places: np.ndarray, size: int, lanes: np.ndarray, *, under_way: bool = False
    ) -> None:
        """``under_way``: the write is an asynchronous copy that is delivered later."""
        grains, lanes = self._grains(places, size, lanes)
        self._check_write(grains, lanes)
        self._writer[grains] = lanes
        self._written[grains] = UNDER_WAY if under_way else self._machine.clock

    def _check_write(self, grains: np.ndarray, lanes: np.ndarray) -> None:
        writer, written = self._writer[grains], self._written[grains]
        if (written == UNDER_WAY).any():
            raise Fault("writes to shared memory under an asynchronous copy")
        if not (self._ordered(grains, lanes) | (writer == lanes)).all():
            raise Fault("race: writes over what another thread wrote, without a barrier")
        self._check_after_reads(grains, lanes)

    def _check_after_reads(self, grains: np.ndarray, lanes: np.ndarray) -> None:
        read = self._read[grains]
        if self._products[grains].any():
            raise Fault("writes to shared memory that a product under way reads")
        same_warp = self._reading_warp[grains] == lanes // 32
        ordered = (
            (read <= self._last_barrier[lanes])
            | (self._reader[grains] == lanes)
            | (same_warp & (read <= self._last_warp_barrier[lanes]))
        )
        if not ordered.all():
            raise Fault("race: writes over what another thread read, without a barrier")

    def _ordered(self, grains: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Return where the last write is ordered before what these lanes do now."""
        writer, written = self._writer[grains], self._written[grains]
        same_warp = writer // 32 == lanes // 32
        by_warp = same_warp & (written <= self._last_warp_barrier[lanes])
        return (written <= self._last_barrier[lanes]) | by_warp | self._seen(grains, lanes)

    def _fenced(self, grains: np.ndarray, lanes: np.ndarray) -> bool:
        """Return whether a proxy fence lies between the last writes and what these lanes do now.

        It is the writer's before a barrier, or that of all these lanes after one.
        """
        writer, written = self._writer[grains], self._written[grains]
        by_writer = (writer < 0) | (written <= self._fence_at_barrier[writer])
        return bool((by_writer | (written <= self._barrier_at_fence[lanes].min())).all())

    def _seen(self, grains: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Return where TMA wrote last, and the lanes saw its mbarrier's phase complete."""
        seen = np.zeros(len(grains), bool)
        for place, when in self._acquired.items():
            seen |= (self._delivered_by[grains] == place) & (self._written[grains] <= when[lanes])
        return seen & (self._writer[grains] == TMA)

    def _note_read(self, grains: np.ndarray, lanes: np.ndarray) -> None:
        # Reads of the same epoch by others are kept as "several", so that none is lost.
        recent = self._read[grains] > self._last_barrier[lanes]
        reader = np.where(recent & (self._reader[grains] != lanes), SEVERAL, lanes)
        warp = lanes // 32
        of_warp = np.where(recent & (self._reading_warp[grains] != warp), SEVERAL, warp)
        self._reader[grains] = reader
        self._reading_warp[grains] = of_warp
        self._read[grains] = self._machine.clock
        # Lanes of this very access that share a grain.
        self._reader[grains[self._reader[grains] != reader]] = SEVERAL
        self._reading_warp[grains[self._reading_warp[grains] != of_warp]] = SEVERAL

    def deliver(self, places: np.ndarray, size: int, lanes: np.ndarray) -> None:
        """Asynchronous copies of these lanes have arrived."""
        grains, _ = self._grains(places, size, lanes)
        self._written[grains] = self._machine.clock

    def read_by_products(self, places: np.ndarray, size: int, group: np.ndarray) -> np.ndarray:
        """A warpgroup's product begins to read; ``group``: its lanes. Returns what it reads."""
        grains, _ = self._grains(places, size, places)
        written = self._written[grains]
        if (written == UNDER_WAY).any():
            raise Fault("a product reads what an asynchronous copy has not delivered")
        ordered = written <= self._last_barrier[group].min()
        for warp in group[::32]:  # the lanes of a warp wait together
            ordered |= self._seen(grains, np.full(len(grains), warp))
        if not ordered.all():
            raise Fault("race: a product reads what other threads wrote, without a barrier")
        if not self._fenced(grains, group):
            raise Fault("a product reads what was written before no fence.proxy.async")
        if (written == NEVER).any():
            raise Fault("a product reads shared memory that nobody wrote")
        np.add.at(self._products, grains, 1)
        return grains

    def products_done(self, read: np.ndarray) -> None:
        """Products that read these grains were waited for."""
        np.subtract.at(self._products, read, 1)
        self._read[read] = self._machine.clock
        self._reader[read] = self._reading_warp[read] = SEVERAL

    def written_by_tma(self, places: np.ndarray, size: int, lane: int, mbarrier: int) -> None:
        """A copy that a lane asked for begins to write; the mbarrier is at this place."""
        grains, _ = self._grains(places, size, places)
        writer, written = self._writer[grains], self._written[grains]
        lanes = np.full(len(grains), lane)
        if (written == UNDER_WAY).any():
            raise Fault("TMA writes under another asynchronous copy")
        if not (self._ordered(grains, lanes) | (writer == lane)).all():
            raise Fault("race: TMA writes over what a thread wrote, without a barrier")
        self._check_after_reads(grains, lanes)
        if not self._fenced(grains, lanes[:1]):
            raise Fault("TMA writes over what was written before no fence.proxy.async")
        self._writer[grains] = TMA
        self._written[grains] = UNDER_WAY
        self._delivered_by[grains] = mbarrier

    def tma_delivers(self, places: np.ndarray, size: int) -> None:
        self._written[self._grains(places, size, places)[0]] = self._machine.clock

    def barrier(self, lanes: np.ndarray) -> None:
        self._last_barrier[lanes] = self._last_warp_barrier[lanes] = self._machine.clock
        self._fence_at_barrier[lanes] = self._last_fence[lanes]

    def warp_barrier(self, lanes: np.ndarray) -> None:
        self._last_warp_barrier[lanes] = self._machine.clock

    def proxy_fence(self, lanes: np.ndarray) -> None:
        self._last_fence[lanes] = self._machine.clock
        self._barrier_at_fence[lanes] = self._last_barrier[lanes]

    def acquired(self, lanes: np.ndarray, mbarriers: np.ndarray) -> None:
        """These lanes have seen the phase of the mbarriers at these places complete."""
        for place in np.unique(mbarriers):
            when = self._acquired.setdefault(int(place), np.full(self._machine.lanes, NEVER))
            when[lanes[mbarriers == place]] = self._machine.clock

    def end(self) -> None:
        if (self._written == UNDER_WAY).any():
            raise Fault("ends with an asynchronous copy under way")

    def _grains(
        self, places: np.ndarray, size: int, lanes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the grains of accesses of ``size`` bytes, and the lane of each."""
        count = max(1, size // self._grain)
        if count == 1:
            return places // self._grain, lanes
        grains = (places // self._grain)[:, None] + np.arange(count)
        return grains.ravel(), np.repeat(lanes, count)
