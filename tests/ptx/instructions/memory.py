"""Moves, loads, stores and address spaces (PTX ISA, section 9.7.9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import Fault
from ptx.global_memory import UNSIGNED
from ptx.instructions import Step, decodes
from ptx.instructions.operands import address, items, source, target
from ptx.kernel import BYTES, Address, Instruction, Symbol, Vector

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

# A generic address of shared or of local memory: a window that no process has.
SHARED_WINDOW, LOCAL_WINDOW = 1 << 56, 1 << 57
_SPACES = ("global", "shared", "local", "param")


def space_of(instruction: Instruction) -> str:
    """Return the state space of a load or store; generic if it names none."""
    for modifier in instruction.modifiers:
        if (name := modifier.split("::")[0]) in _SPACES:
            return name
    return "generic"


@decodes("mov")
def _mov(instruction: Instruction) -> Step:
    to, of = instruction.operands
    kind = instruction.type
    if isinstance(of, Vector):
        return _pack(instruction)
    if isinstance(to, Vector):
        return _unpack(instruction)
    read, write = source(of, kind), target(to)

    def step(machine: Machine, active: Active) -> None:
        write(machine, read(machine), active)

    return step


def _part_type(instruction: Instruction, parts: int) -> str:
    return f"b{8 * BYTES[instruction.type] // parts}"


def _pack(instruction: Instruction) -> Step:
    parts = items(instruction.operands[1])
    small = _part_type(instruction, len(parts))
    read, write = [source(part, small) for part in parts], target(instruction.operands[0])
    dtype, width = UNSIGNED[BYTES[instruction.type]], 8 * BYTES[small]

    def step(machine: Machine, active: Active) -> None:
        value = dtype(0)
        for place, one in enumerate(read):
            value = value | (one(machine).astype(dtype) << dtype(width * place))
        write(machine, np.asarray(value), active)

    return step


def _unpack(instruction: Instruction) -> Step:
    parts = items(instruction.operands[0])
    small = _part_type(instruction, len(parts))
    read, writes = source(instruction.operands[1], instruction.type), [target(p) for p in parts]
    dtype, width, part = UNSIGNED[BYTES[instruction.type]], 8 * BYTES[small], UNSIGNED[BYTES[small]]

    def step(machine: Machine, active: Active) -> None:
        value = read(machine)
        for place, write in enumerate(writes):
            write(machine, np.asarray((value >> dtype(width * place)).astype(part)), active)

    return step


@decodes("cvta")
def _cvta(instruction: Instruction) -> Step:
    space = space_of(instruction)
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0)
    sign = -1 if "to" in instruction.modifiers else 1
    of = instruction.operands[1]
    read = source(of, instruction.type)
    write = target(instruction.operands[0])

    def step(machine: Machine, active: Active) -> None:
        shift = machine.first_param if space == "param" else window
        write(machine, np.asarray(read(machine).astype(np.int64) + sign * shift), active)

    return step


@decodes("ld", "ldu")
def _load(instruction: Instruction) -> Step:
    space, kind = space_of(instruction), instruction.type
    size, count = BYTES[kind], instruction.vector()
    place = instruction.operands[1]
    writes = [target(register) for register in items(instruction.operands[0])]
    if space == "param" and isinstance(place, Address) and isinstance(place.base, Symbol):
        return _load_param(place.base.name, place.offset, size, kind, writes)
    where = address(place)

    def step(machine: Machine, active: Active) -> None:
        if space == "param":
            places = where(machine) + machine.first_param
            values = machine.memory.load(places, size, count, active)
        else:
            values = load(machine, instruction, space, where(machine), size, count, active)
        for write, value in zip(writes, values, strict=True):
            write(machine, _signed(value, kind), active)

    return step


def _signed(value: np.ndarray, kind: str) -> np.ndarray:
    """Return loaded bits such that a wider register extends the sign of a signed type."""
    return value.view(f"i{BYTES[kind]}") if kind[0] == "s" else value


def _load_param(name: str, offset: int, size: int, kind: str, writes: list) -> Step:
    """Parameters are the same in all lanes."""

    def step(machine: Machine, active: Active) -> None:
        first = np.asarray(machine.first_param + machine.symbols[name] + offset)
        for place, write in enumerate(writes):
            value = machine.memory.read(first + place * size, size)
            write(machine, _signed(np.asarray(value), kind), active)

    return step


@decodes("st")
def _store(instruction: Instruction) -> Step:
    space, kind = space_of(instruction), instruction.type
    size = BYTES[kind]
    where = address(instruction.operands[0])
    read = [source(one, f"b{8 * size}") for one in items(instruction.operands[1])]

    def step(machine: Machine, active: Active) -> None:
        values = [np.asarray(one(machine)) for one in read]
        store(machine, instruction, space, where(machine), values, active)

    return step


def load(
    machine: Machine,
    instruction: Instruction,
    space: str,
    where: np.ndarray,
    size: int,
    count: int,
    active: Active,
) -> list[np.ndarray]:
    """Return ``count`` neighbours of ``size`` bytes for each lane."""
    space, where = _resolved(space, where, active)
    if space == "local":
        return machine.local.load(where, size, count, active)
    if space == "shared":
        values = machine.shared.load(where, size, count, active)
    else:
        values = machine.memory.load(where, size, count, active)
    observe(machine, instruction, space, "load", where, size * count, active)
    return values


def store(
    machine: Machine,
    instruction: Instruction,
    space: str,
    where: np.ndarray,
    values: list[np.ndarray],
    active: Active,
) -> None:
    """Store neighbours for each lane."""
    space, where = _resolved(space, where, active)
    if space == "local":
        machine.local.store(where, values, active)
        return
    if space == "shared":
        machine.shared.store(where, values, active)
    else:
        machine.memory.store(where, values, active)
    size = values[0].dtype.itemsize * len(values)
    observe(machine, instruction, space, "store", where, size, active)


def _resolved(space: str, where: np.ndarray, active: Active) -> tuple[str, np.ndarray]:
    """Return the space of generic addresses, and the addresses in it."""
    if space != "generic":
        return space, where
    window = where & (SHARED_WINDOW | LOCAL_WINDOW)
    used = window if active is None else window[active]
    if used.size and (used != used[0]).any():
        raise Fault("lanes use different address spaces")
    names = {0: "global", SHARED_WINDOW: "shared", LOCAL_WINDOW: "local"}
    return names[int(used[0]) if used.size else 0], where - window


def observe(
    machine: Machine,
    instruction: Instruction,
    space: str,
    kind: str,
    where: np.ndarray,
    size: int,
    active: Active,
) -> None:
    """Tell the observer of an access."""
    if machine.observer is None:
        return
    lanes = np.ones(machine.lanes, bool) if active is None else active
    tell = machine.observer.shared_access if space == "shared" else machine.observer.global_access
    tell(instruction, kind, where.reshape(-1, 32), lanes.reshape(-1, 32), size)


@decodes("fence", "membar")
def _fence(instruction: Instruction) -> Step:
    """Fences of the asynchronous proxy count; all memory is in order in this machine."""
    is_proxy = instruction.op == "fence" and instruction.modifiers[:2] == ("proxy", "async")
    is_proxy = is_proxy and "global" not in instruction.modifiers

    def step(machine: Machine, active: Active) -> None:
        if is_proxy:
            lanes = np.ones(machine.lanes, bool) if active is None else active
            machine.shared.races.proxy_fence(lanes)

    return step


@decodes("prefetch", "prefetchu", "applypriority", "discard", "griddepcontrol", "nanosleep")
def _hint(instruction: Instruction) -> Step:
    return lambda machine, active: None
