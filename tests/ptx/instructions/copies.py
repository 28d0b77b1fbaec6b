"""cp.async: copies from global to shared memory, 4 to 16 bytes a lane (section 9.7.9.25.3).

A copy arrives when its group is waited for; until then its place holds poison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import Fault
from ptx.instructions import Step, decodes, unknown
from ptx.instructions.memory import observe
from ptx.instructions.operands import address, number_of, source
from ptx.kernel import Instruction

if TYPE_CHECKING:
    from ptx.machine import Active, Machine


@dataclass
class _Copy:
    """The copies of one instruction: a row of bytes for each of ``lanes``, in its group."""

    lanes: np.ndarray
    places: np.ndarray
    rows: np.ndarray
    group: np.ndarray

    def part(self, chosen: np.ndarray) -> _Copy:
        return _Copy(self.lanes[chosen], self.places[chosen], self.rows[chosen], self.group[chosen])


class Copies:
    """The copies of a launch that were not waited for."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._under_way: list[_Copy] = []
        self._committed = np.zeros(machine.lanes, np.int64)  # groups of each lane

    def begin(self, lanes: np.ndarray, places: np.ndarray, rows: np.ndarray) -> None:
        """Put poison where the copies go, and keep what they bring."""
        shared, size = self._machine.shared, rows.shape[1]
        shared.races.write(places, size, lanes, under_way=True)
        shared.bytes[places[:, None] + np.arange(size)] = 0xFF
        self._under_way.append(_Copy(lanes, places, rows, self._committed[lanes] + 1))

    def commit(self, active: Active) -> None:
        self._committed[slice(None) if active is None else active] += 1

    def wait(self, most: int | None, active: Active) -> None:
        """Deliver all but the newest ``most`` groups of the active lanes; None: also open ones."""
        remaining = []
        for copy in self._under_way:
            if most is None:
                arrived = np.ones(len(copy.lanes), bool)
            else:
                arrived = copy.group <= self._committed[copy.lanes] - most
            if active is not None:
                arrived &= active[copy.lanes]
            if arrived.any():
                self._deliver(copy.part(arrived))
            if not arrived.all():
                remaining.append(copy.part(~arrived))
        self._under_way = remaining

    def end(self) -> None:
        """Raise Fault if the launch ends before its copies."""
        if self._under_way:
            raise Fault("ends with an asynchronous copy under way")

    def _deliver(self, copy: _Copy) -> None:
        size = copy.rows.shape[1]
        self._machine.shared.bytes[copy.places[:, None] + np.arange(size)] = copy.rows
        self._machine.shared.races.deliver(copy.places, size, copy.lanes)


@decodes("cp.async")
def _cp_async(instruction: Instruction) -> Step:
    if "commit_group" in instruction.modifiers:
        return lambda machine, active: machine.copies.commit(active)
    if "wait_group" in instruction.modifiers:
        most = number_of(instruction.operands[0])
        return lambda machine, active: machine.copies.wait(most, active)
    if "wait_all" in instruction.modifiers:
        return lambda machine, active: machine.copies.wait(None, active)
    if "shared" not in instruction.modifiers and "shared::cta" not in instruction.modifiers:
        raise unknown(instruction)
    to, of = (address(operand) for operand in instruction.operands[:2])
    size = number_of(instruction.operands[2])
    given = instruction.operands[3:]
    filled = source(given[0], "u32") if given else None

    def step(machine: Machine, active: Active) -> None:
        bytes_read = np.asarray(size) if filled is None else filled(machine)
        bytes_read = machine.spread(bytes_read.astype(np.int64))
        lanes = np.arange(machine.lanes) if active is None else np.flatnonzero(active)
        places = machine.shared.places(to(machine), size, active)
        where, counts = of(machine)[lanes], bytes_read[lanes]
        machine.memory.check(where[counts > 0], size, "cp.async")
        rows = np.zeros((len(lanes), size), np.uint8)
        inside = np.arange(size) < counts[:, None]
        rows[inside] = machine.memory.read((where[:, None] + np.arange(size))[inside], 1)
        machine.copies.begin(lanes, places, rows)
        if machine.observer:
            reading = np.zeros(machine.lanes, bool)
            reading[lanes] = counts > 0
            observe(machine, instruction, "global", "copy", of(machine), size, reading)
            observe(machine, instruction, "shared", "copy", to(machine), size, active)

    return step
