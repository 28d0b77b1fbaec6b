"""wmma: tiles of 16 x 16 that a warp loads, multiplies and stores (PTX ISA, section 9.7.14.4).

Which lane has which element is the implementation's choice. Here lane ``l`` has half ``l % 2`` of
line ``l // 2``. A line of an operand lies along memory: a product that names another layout than
the load did multiplies other elements. A line of an accumulator is a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import Fault
from ptx.instructions import Step, decodes, unknown
from ptx.instructions.memory import load, space_of, store
from ptx.instructions.numbers import halves
from ptx.instructions.operands import Source, address, items, source, target
from ptx.kernel import BYTES, Instruction

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

# CUDA C++ Programming Guide, "Warp Matrix Functions": bytes.
_ALIGNMENT, _UNIT_OF_STRIDE = 32, 16
_OPERANDS, _ACCUMULATORS = ("f16", "bf16"), ("f32",)
_HALF = 8  # elements of a line

Tile = Callable[["Machine", "Active"], tuple[np.ndarray, np.ndarray]]


def _tile(instruction: Instruction, kinds: tuple[str, ...], of_memory: int) -> Tile:
    """Return a reader of a tile's address and of the bytes between its lines, for each lane."""
    operands, kind = instruction.operands, instruction.type
    if "m16n16k16" not in instruction.modifiers or kind not in kinds or len(operands) < 3:
        raise unknown(instruction)
    where, stride = address(operands[of_memory]), source(operands[2], "u32")

    def read(machine: Machine, active: Active) -> tuple[np.ndarray, np.ndarray]:
        first, step = where(machine), stride(machine).astype(np.int64) * BYTES[kind]
        step = machine.spread(step)
        warps = machine.whole_warps(active, "wmma")
        for value, unit in ((first, _ALIGNMENT), (step, _UNIT_OF_STRIDE)):
            of_lanes = value.reshape(-1, 32)[warps]
            if (of_lanes != of_lanes[:, :1]).any():
                raise Fault("the lanes of a warp name different tiles")
            if (of_lanes % unit).any():
                raise Fault(f"a tile's address or stride is not a multiple of {unit} bytes")
        return first, step

    return read


def _line(machine: Machine) -> tuple[np.ndarray, np.ndarray]:
    """Return the line of each lane, and the first of its elements there."""
    lane = machine.lane_in_warp.astype(np.int64)
    return lane // 2, lane % 2 * _HALF


@decodes("wmma.load")
def _load(instruction: Instruction) -> Step:
    if instruction.modifiers[1] == "c":
        return _load_accumulator(instruction)
    tile, space = _tile(instruction, _OPERANDS, 1), space_of(instruction)
    writes = [target(register) for register in items(instruction.operands[0])]

    def step(machine: Machine, active: Active) -> None:
        first, stride = tile(machine, active)
        line, place = _line(machine)
        where = first + line * stride + place * BYTES[instruction.type]
        values = load(machine, instruction, space, where, 4, 4, active)
        # Two lanes have each element of f16, as in the first matrix units: eight registers.
        for register, write in enumerate(writes):
            write(machine, values[register % 4], active)

    return step


def _accumulator(instruction: Instruction, of_memory: int) -> Callable[..., list[np.ndarray]]:
    """Return a reader of the addresses of each lane's elements."""
    tile, by_rows = _tile(instruction, _ACCUMULATORS, of_memory), "row" in instruction.modifiers

    def read(machine: Machine, active: Active) -> list[np.ndarray]:
        first, stride = tile(machine, active)
        row, place = _line(machine)
        columns = [place + i for i in range(_HALF)]
        if by_rows:
            return [first + row * stride + column * 4 for column in columns]
        return [first + column * stride + row * 4 for column in columns]

    return read


def _load_accumulator(instruction: Instruction) -> Step:
    places, space = _accumulator(instruction, 1), space_of(instruction)
    writes = [target(register) for register in items(instruction.operands[0])]

    def step(machine: Machine, active: Active) -> None:
        for where, write in zip(places(machine, active), writes, strict=True):
            (value,) = load(machine, instruction, space, where, 4, 1, active)
            write(machine, value, active)

    return step


@decodes("wmma.store")
def _store(instruction: Instruction) -> Step:
    places, space = _accumulator(instruction, 0), space_of(instruction)
    reads = [source(register, "b32") for register in items(instruction.operands[1])]

    def step(machine: Machine, active: Active) -> None:
        for where, read in zip(places(machine, active), reads, strict=True):
            store(machine, instruction, space, where, [machine.spread(read(machine))], active)

    return step


def _operand(machine: Machine, reads: list[Source], kind: str) -> np.ndarray:
    """Return the tile (warps, line, element) in registers, as float64."""
    tile = np.empty((machine.lanes // 32, 32, 4, 2))
    for register, read in enumerate(reads[:4]):
        bits = machine.spread(read(machine))
        for half, values in enumerate(halves(bits, kind)):
            tile[:, :, register, half] = values.reshape(-1, 32)
    return tile.reshape(-1, 16, 16)


@decodes("wmma.mma")
def _multiply(instruction: Instruction) -> Step:
    """As ``mma.sync``: sums in float64, rounded once."""
    _, _, _, layout_of_a, layout_of_b, shape, *kinds = instruction.modifiers
    kind = {("f32", "f32"): "f16", ("f32", "bf16", "bf16", "f32"): "bf16"}.get(tuple(kinds))
    if shape != "m16n16k16" or kind is None:
        raise unknown(instruction)
    to, a, b, c = map(items, instruction.operands)
    writes = [target(register) for register in to]
    left, right = ([source(register, "b32") for register in operand] for operand in (a, b))
    sums = [source(register, "f32") for register in c]

    def step(machine: Machine, active: Active) -> None:
        warps = machine.whole_warps(active, "wmma")
        m, n = _operand(machine, left, kind), _operand(machine, right, kind)
        m = m if layout_of_a == "row" else m.swapaxes(1, 2)
        n = n if layout_of_b == "row" else n.swapaxes(1, 2)
        if machine.observer:
            machine.observer.product(instruction, 16, 16, 16, int(warps.sum()), 0)
        product = (m @ n).reshape(-1, _HALF)
        results = [product[:, i] + machine.spread(read(machine)) for i, read in enumerate(sums)]
        for write, value in zip(writes, results, strict=True):
            write(machine, value.astype(np.float32), active)

    return step
