"""Instructions that the lanes of a warp do together (PTX ISA, sections 9.7.9.6 and 9.7.13)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import Fault
from ptx.instructions import Step, decodes, unknown
from ptx.instructions.operands import NUMPY, number_of, source, target
from ptx.kernel import Immediate, Instruction, Operand, Pair, Sink

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

_LANES = np.arange(32, dtype=np.int64)


def by_warp(machine: Machine, active: Active) -> np.ndarray:
    """Return the active lanes as (warps, 32)."""
    if active is None:
        return np.ones((machine.lanes // 32, 32), bool)
    return active.reshape(-1, 32)


def _check_members(members: np.ndarray, lanes: np.ndarray, machine: Machine) -> None:
    """Raise Fault unless the lanes that the mask names are those that are here."""
    some = lanes.any(1)
    masks = machine.spread(members).reshape(-1, 32)
    first = masks[np.arange(len(masks)), lanes.argmax(1)]
    if ((masks != first[:, None]) & lanes).any():
        raise Fault("lanes of a warp name different masks")
    named = (first[:, None] >> _LANES.astype(np.uint32)) & np.uint32(1) == 1
    if (named != lanes)[some].any():
        raise Fault("the mask of a warp's instruction names other lanes than are there")


@decodes("bar.warp")
def _warp_barrier(instruction: Instruction) -> Step:
    members = source(instruction.operands[0], "b32")

    def step(machine: Machine, active: Active) -> None:
        lanes = by_warp(machine, active)
        _check_members(members(machine), lanes, machine)
        whole = lanes.all(1)  # a part of a warp orders only its own lanes: not in the record
        machine.shared.races.warp_barrier(np.repeat(whole, 32))

    return step


@decodes("shfl")
def _shuffle(instruction: Instruction) -> Step:
    mode = instruction.modifiers[1]
    to, *rest = instruction.operands
    write, write_valid = _destinations(to)
    value, by, clamp, members = (source(operand, "b32") for operand in rest)

    def step(machine: Machine, active: Active) -> None:
        lanes = by_warp(machine, active)
        _check_members(members(machine), lanes, machine)
        shift = machine.spread(by(machine)).reshape(-1, 32).astype(np.int64)
        packed = machine.spread(clamp(machine)).reshape(-1, 32).astype(np.int64)
        segment, limit = (packed >> 8) & 31, packed & 31
        lane = np.broadcast_to(_LANES, lanes.shape)
        most = (lane & segment) | (limit & ~segment)
        if mode == "bfly":
            other = lane ^ (shift & 31)
        elif mode == "idx":
            other = (lane & segment) | (shift & 31 & ~segment)
        else:
            other = lane - (shift & 31) if mode == "up" else lane + (shift & 31)
        valid = other >= most if mode == "up" else other <= most
        other = np.where(valid, other, lane)
        values = machine.spread(value(machine)).reshape(-1, 32)
        if not np.take_along_axis(lanes, other, 1)[lanes].all():
            raise Fault("a shuffle reads a lane that is not there")
        write(machine, np.take_along_axis(values, other, 1).ravel(), active)
        write_valid(machine, valid.ravel(), active)

    return step


def _destinations(to: Operand) -> tuple:
    if isinstance(to, Pair):
        return target(to.first), target(to.second)
    return target(to), target(Sink())


@decodes("vote")
def _vote(instruction: Instruction) -> Step:
    mode = instruction.modifiers[1]
    to, predicate, members = instruction.operands
    read, mask, write = source(predicate, "pred"), source(members, "b32"), target(to)

    def step(machine: Machine, active: Active) -> None:
        lanes = by_warp(machine, active)
        _check_members(mask(machine), lanes, machine)
        yes = machine.spread(read(machine)).reshape(-1, 32)
        if mode == "ballot":
            bits = ((yes & lanes).astype(np.uint32) << _LANES.astype(np.uint32)).sum(1)
            result = bits.astype(np.uint32)
        elif mode == "all":
            result = (yes | ~lanes).all(1)
        elif mode == "any":
            result = (yes & lanes).any(1)
        else:
            result = (yes | ~lanes).all(1) | (~yes | ~lanes).all(1)
        write(machine, np.repeat(result, 32), active)

    return step


@decodes("activemask")
def _active_mask(instruction: Instruction) -> Step:
    write = target(instruction.operands[0])

    def step(machine: Machine, active: Active) -> None:
        lanes = by_warp(machine, active).astype(np.uint32)
        bits = (lanes << _LANES.astype(np.uint32)).sum(1).astype(np.uint32)
        write(machine, np.repeat(bits, 32), active)

    return step


@decodes("redux")
def _reduce(instruction: Instruction) -> Step:
    _, operation, kind = instruction.modifiers
    reductions = {"add": np.add, "min": np.minimum, "max": np.maximum}
    reductions |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    to, operand, members = instruction.operands
    read, mask, write = source(operand, kind), source(members, "b32"), target(to)
    if kind == "f32":  # NaN is left out
        reductions |= {"min": np.fmin, "max": np.fmax}
    reduce, dtype = reductions[operation], NUMPY[kind]

    def step(machine: Machine, active: Active) -> None:
        machine.whole_warps(active, "redux")
        _check_members(mask(machine), by_warp(machine, active), machine)
        values = machine.spread(read(machine)).reshape(-1, 32)
        write(machine, np.repeat(reduce.reduce(values, axis=1, dtype=dtype), 32), active)

    return step


@decodes("elect")
def _elect(instruction: Instruction) -> Step:
    """The least active lane is elected."""
    to, members = instruction.operands
    if not isinstance(to, Pair) or (members != Immediate(-1) and number_of(members) != 0xFFFFFFFF):
        raise unknown(instruction)
    write_lane, write = target(to.first), target(to.second)

    def step(machine: Machine, active: Active) -> None:
        machine.whole_warps(active, "elect")
        lanes = by_warp(machine, active)
        first = np.where(lanes.any(1), lanes.argmax(1), -1)
        write_lane(machine, np.repeat(first.astype(np.uint32), 32), active)
        write(machine, (first[:, None] == _LANES).ravel(), active)

    return step
