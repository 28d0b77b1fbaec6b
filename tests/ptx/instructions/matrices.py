"""ldmatrix and stmatrix: 8 x 8 matrices of 16 bits between shared memory and a warp.

PTX ISA, sections 9.7.14.5.15 and after. Eight lanes give the rows of each matrix.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from ptx.global_memory import put
from ptx.instructions import Step, decodes, unknown
from ptx.instructions.operands import address, items, source, target
from ptx.kernel import Instruction

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

_LANES = np.arange(32)
_ROW = 16  # bytes


def _count(instruction: Instruction) -> int:
    """Return how many matrices there are."""
    if "m8n8" not in instruction.modifiers or instruction.type != "b16":
        raise unknown(instruction)
    return next(int(m[1]) for m in instruction.modifiers if re.fullmatch(r"x[124]", m))


def _rows(machine: Machine, where: np.ndarray, warps: np.ndarray, matrix: int) -> np.ndarray:
    """Return the places (warps, 8) of the rows of a matrix of each warp."""
    lanes = np.flatnonzero(warps)[:, None] * 32 + 8 * matrix + np.arange(8)
    addresses = where[lanes]
    machine.shared.check(addresses, _ROW)
    return machine.shared.first[lanes] + addresses


def _elements(rows: np.ndarray, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the places (warps, 32) of the lower and of the upper half of each lane's register."""
    if transposed:
        low = rows[:, _LANES % 4 * 2] + _LANES // 4 * 2
        return low, rows[:, _LANES % 4 * 2 + 1] + _LANES // 4 * 2
    low = rows[:, _LANES // 4] + _LANES % 4 * 4
    return low, low + 2


def _observe(machine: Machine, instruction: Instruction, rows: list[np.ndarray]) -> None:
    if machine.observer:
        all_rows = np.concatenate(rows) % machine.shared.room
        everywhere = np.ones(all_rows.shape, bool)
        machine.observer.shared_access(instruction, "matrix", all_rows, everywhere, _ROW)


def _spread(machine: Machine, warps: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return values (warps that take part, 32) for each lane."""
    if warps.all():
        return value.ravel()
    full = np.full((len(warps), 32), np.iinfo(value.dtype).max, value.dtype)
    full[warps] = value
    return full.ravel()


@decodes("ldmatrix")
def _load(instruction: Instruction) -> Step:
    count, transposed = _count(instruction), "trans" in instruction.modifiers
    writes = [target(register) for register in items(instruction.operands[0])]
    where = address(instruction.operands[1])

    def step(machine: Machine, active: Active) -> None:
        warps = machine.whole_warps(active, "ldmatrix")
        addresses, seen = where(machine), []
        lanes = (np.flatnonzero(warps)[:, None] * 32 + _LANES).ravel()
        words = machine.shared.bytes.view(np.uint16)
        for matrix in range(count):
            rows = _rows(machine, addresses, warps, matrix)
            low, high = _elements(rows, transposed)
            for half in (low, high):
                machine.shared.races.read(half.ravel(), 2, lanes)
            value = words[low // 2].astype(np.uint32)
            value |= words[high // 2].astype(np.uint32) << np.uint32(16)
            writes[matrix](machine, _spread(machine, warps, value), active)
            seen.append(rows)
        _observe(machine, instruction, seen)

    return step


@decodes("stmatrix")
def _store(instruction: Instruction) -> Step:
    count, transposed = _count(instruction), "trans" in instruction.modifiers
    where = address(instruction.operands[0])
    read = [source(register, "b32") for register in items(instruction.operands[1])]

    def step(machine: Machine, active: Active) -> None:
        warps = machine.whole_warps(active, "stmatrix")
        addresses, seen = where(machine), []
        lanes = (np.flatnonzero(warps)[:, None] * 32 + _LANES).ravel()
        words = machine.shared.bytes.view(np.uint16)
        places, bits = [], []
        for matrix in range(count):
            rows = _rows(machine, addresses, warps, matrix)
            value = machine.spread(read[matrix](machine)).reshape(-1, 32)[warps]
            places += _elements(rows, transposed)
            bits += [value.astype(np.uint16), (value >> np.uint32(16)).astype(np.uint16)]
            seen.append(rows)
        all_places, all_bits = np.stack(places, 1), np.stack(bits, 1)
        # Warps that hold the same matrix all store it: to the record that is one access.
        lanes = np.broadcast_to(lanes.reshape(-1, 1, 32), all_places.shape)
        machine.shared.races.write(all_places.ravel(), 2, lanes.ravel())
        put(words, all_places // 2, all_bits)
        _observe(machine, instruction, seen)

    return step
