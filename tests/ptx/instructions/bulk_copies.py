"""TMA and mbarriers: bulk copies to shared memory (PTX ISA, sections 9.7.9.27 and 9.7.13.15).

The descriptor of a tensor (128 bytes) is the one that the driver of these tests makes, 16 numbers
of 64 bits: address, bytes of an element, rank, swizzle (0 to 3: none, 32, 64, 128 bytes), sizes of
three axes, strides in bytes of the second and third axis, sizes of the box.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ptx.faults import Fault
from ptx.global_memory import UNSIGNED
from ptx.instructions import Step, decodes, unknown
from ptx.instructions.operands import address, source, target
from ptx.instructions.warpgroup import swizzled
from ptx.kernel import Address, Immediate, Instruction

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

MOST_SPINS = 1000
# A tensor's swizzle of 0, 32, 64 and 128 bytes, as wgmma numbers them.
_MODES = (0, 3, 2, 1)


class _Copy(NamedTuple):
    places: np.ndarray  # in shared memory
    inside: np.ndarray  # which elements are inside the tensor
    origin: np.ndarray  # addresses of those
    size: int  # of an element

    @property
    def bytes(self) -> int:
        return len(self.places) * self.size


@dataclass
class _Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    copies: list[_Copy] = field(default_factory=list)
    asked: bool = False  # whether somebody has waited for these copies


class BulkCopies:
    """The mbarriers of a launch by (CTA, address), and the copies that they wait for."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._barriers: dict[tuple[int, int], _Barrier] = {}
        self._spins = 0

    def init(self, cta: int, place: int, count: int, lane: int) -> None:
        self._touch(self._machine.shared.races.write, place, np.array([lane]))
        self._barriers[cta, place] = _Barrier(count, count)

    def _touch(self, record: Callable, place: int, lanes: np.ndarray) -> None:
        """Note that lanes use the 8 bytes of an mbarrier."""
        shared = self._machine.shared
        shared.check(np.array([place]), 8)
        record(shared.first[lanes] + place, 8, lanes)

    def used(self, place: int, lanes: np.ndarray) -> None:
        """Raise Fault unless the mbarrier's initialisation is ordered before."""
        self._touch(self._machine.shared.races.read, place, lanes)

    def invalidate(self, cta: int, place: int) -> None:
        if self.barrier(cta, place).copies:
            raise Fault("an mbarrier ends while it waits for copies")
        del self._barriers[cta, place]

    def barrier(self, cta: int, place: int) -> _Barrier:
        try:
            return self._barriers[cta, place]
        except KeyError:
            raise Fault("an mbarrier that was not initialised") from None

    def arrive(self, cta: int, place: int, expected: int) -> None:
        barrier = self.barrier(cta, place)
        barrier.bytes += expected
        barrier.pending -= 1
        if barrier.pending < 0:
            raise Fault("an mbarrier: more arrivals than it counts")

    def waited(self, cta: int, place: int, parity: int) -> bool:
        """Return whether the phase of that parity is over.

        Copies arrive when they are waited for a second time: nobody may rely on the first.
        """
        barrier = self.barrier(cta, place)
        if barrier.copies and not barrier.asked:
            barrier.asked = True
            return False
        for copy in barrier.copies:
            self._deliver(copy)
            barrier.bytes -= copy.bytes
        barrier.copies, barrier.asked = [], False
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.pending = barrier.count
        complete = barrier.phase & 1 != parity
        self._spins = 0 if complete else self._spins + 1
        if self._spins > MOST_SPINS:
            raise Fault("waits for an mbarrier for ever")
        return complete

    def _deliver(self, copy: _Copy) -> None:
        words = self._machine.shared.bytes.view(UNSIGNED[copy.size])
        values = np.zeros(len(copy.places), words.dtype)
        values[copy.inside] = self._machine.memory.read(copy.origin, copy.size)
        words[copy.places // copy.size] = values
        self._machine.shared.races.tma_delivers(copy.places, copy.size)

    def begin(self, copy: _Copy, cta: int, place: int, lane: int) -> None:
        shared = self._machine.shared
        self.used(place, np.array([lane]))
        shared.races.written_by_tma(copy.places, copy.size, lane, place)
        words = shared.bytes.view(UNSIGNED[copy.size])
        words[copy.places // copy.size] = np.iinfo(words.dtype).max
        self.barrier(cta, place).copies.append(copy)


def _lanes(machine: Machine, active: Active) -> list[int]:
    return list(range(machine.lanes)) if active is None else np.flatnonzero(active).tolist()


@decodes("mbarrier")
def _mbarrier(instruction: Instruction) -> Step:
    action = instruction.modifiers[0]
    if action in ("try_wait", "test_wait"):
        return _wait(instruction)
    if action == "arrive":
        return _arrive(instruction)
    place = address(instruction.operands[0])
    if action == "init":
        count = source(instruction.operands[1], "u32")
    elif action == "inval":
        count = source(Immediate(0), "u32")
    else:
        raise unknown(instruction)

    def step(machine: Machine, active: Active) -> None:
        where, counts = place(machine), machine.spread(count(machine))
        for lane in _lanes(machine, active):
            cta = int(machine.cta[lane])
            if action == "init":
                machine.bulk_copies.init(cta, int(where[lane]), int(counts[lane]), lane)
            else:
                machine.bulk_copies.invalidate(cta, int(where[lane]))

    return step


def _arrive(instruction: Instruction) -> Step:
    if "expect_tx" not in instruction.modifiers:
        raise unknown(instruction)
    place, expected = address(instruction.operands[1]), source(instruction.operands[2], "u32")

    def step(machine: Machine, active: Active) -> None:
        where, tx = place(machine), machine.spread(expected(machine))
        for lane in _lanes(machine, active):
            machine.bulk_copies.used(int(where[lane]), np.array([lane]))
            machine.bulk_copies.arrive(int(machine.cta[lane]), int(where[lane]), int(tx[lane]))

    return step


def _wait(instruction: Instruction) -> Step:
    write = target(instruction.operands[0])
    place, parity = address(instruction.operands[1]), source(instruction.operands[2], "u32")

    def step(machine: Machine, active: Active) -> None:
        where, parities = place(machine), machine.spread(parity(machine))
        answers = np.zeros(machine.lanes, bool)
        waiting = np.array(_lanes(machine, active))
        for one in np.unique(where[waiting]):
            machine.bulk_copies.used(int(one), waiting[where[waiting] == one])
        known: dict[tuple[int, int, int], bool] = {}
        for lane in _lanes(machine, active):
            key = int(machine.cta[lane]), int(where[lane]), int(parities[lane])
            if key not in known:
                known[key] = machine.bulk_copies.waited(*key)
            answers[lane] = known[key]
        lanes = np.flatnonzero(answers)
        machine.shared.races.acquired(lanes, where[lanes])
        write(machine, answers, active)

    return step


@decodes("cp.async.bulk")
def _bulk(instruction: Instruction) -> Step:
    kinds = set(instruction.modifiers)
    from_global = "global" in kinds and kinds & {"shared::cluster", "shared::cta"}
    if "tensor" not in kinds or not from_global:
        raise unknown(instruction)
    rank = next(int(m[0]) for m in instruction.modifiers if re.fullmatch(r"[1-5]d", m))
    to, tensor, barrier = instruction.operands[:3]
    if not isinstance(tensor, Address) or len(tensor.coordinates) != rank:
        raise unknown(instruction)
    place, barrier_place = address(to), address(barrier)
    descriptor = address(Address(tensor.base, tensor.offset))
    coordinates = [source(one, "s32") for one in tensor.coordinates]

    def step(machine: Machine, active: Active) -> None:
        where, bars, maps = place(machine), barrier_place(machine), descriptor(machine)
        start = [machine.spread(one(machine)) for one in coordinates]
        origins, count, size = [], 0, 0
        for lane in _lanes(machine, active):
            first = [int(axis[lane]) for axis in start]
            tensor = int(maps[lane])
            if tensor < machine.param_bytes:  # a place among the parameters
                tensor += machine.first_param
            copy = _copy(machine, tensor, first, int(where[lane]), lane)
            machine.bulk_copies.begin(copy, int(machine.cta[lane]), int(bars[lane]), lane)
            origins.append(copy.origin)
            count, size = count + 1, copy.size
        if machine.observer and count:
            machine.observer.bulk_copy(instruction, np.concatenate(origins), size, count)

    return step


def _copy(machine: Machine, tensor: int, first: list[int], place: int, lane: int) -> _Copy:
    """Return a copy of the box at ``first``; elements outside the tensor are 0."""
    words = [int(w) for w in machine.memory.read(tensor + 8 * np.arange(16), 8)]
    start, size, rank, mode = words[:4]
    sizes, strides, box = words[4:7], [size, *words[7:9]], words[9:12]
    if rank != len(first):
        raise Fault(f"TMA: {len(first)} coordinates for a tensor of {rank} axes")
    if place % 128:
        raise Fault("TMA: a misaligned place in shared memory")
    element = np.indices(box[:rank][::-1]).reshape(rank, -1)[::-1]
    inside = np.ones(element.shape[1], bool)
    origin = np.full(element.shape[1], start, np.int64)
    for axis in range(rank):
        index = element[axis] + first[axis]
        inside &= (index >= 0) & (index < sizes[axis])
        origin += index * strides[axis]
    machine.memory.check(origin[inside], size, "TMA")
    to = swizzled(place + np.arange(element.shape[1]) * size, _MODES[mode])
    machine.shared.check(to, size)
    return _Copy(int(machine.shared.first[lane]) + to, inside, origin[inside], size)
