"""How instructions read their operands and write their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import Fault
from ptx.global_memory import UNSIGNED
from ptx.kernel import (
    Address,
    Immediate,
    Instruction,
    Operand,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

# Numbers as they are computed. float16 is widened where it is used, bfloat16 by hand.
NUMPY: dict[str, type[np.generic]] = {
    **{f"{kind}8": np.uint8 for kind in "bu"},
    **{f"{kind}16": np.uint16 for kind in "bu"},
    **{f"{kind}32": np.uint32 for kind in "bu"},
    **{f"{kind}64": np.uint64 for kind in "bu"},
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f16": np.float16,
    "bf16": np.uint16,
    "f32": np.float32,
    "f64": np.float64,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "tf32": np.uint32,
    "pred": np.bool_,
}

Source = Callable[["Machine"], np.ndarray]
Target = Callable[["Machine", np.ndarray, "Active"], None]


def source(operand: Operand, kind: str) -> Source:
    """Return a reader of an operand as a number of a type: one for each lane, or one for all."""
    dtype = np.dtype(NUMPY[kind])
    if isinstance(operand, Register):
        return _register(operand, dtype)
    if isinstance(operand, Immediate):
        number = _immediate(operand, dtype)
        return lambda machine: number
    if isinstance(operand, Special):
        return _special(operand.name, dtype)
    if isinstance(operand, Symbol):
        name = operand.name
        return lambda machine: np.array(_address_of(machine, name), np.int64).astype(dtype)
    raise Fault(f"not a number: {operand}")


def _register(register: Register, dtype: np.dtype) -> Source:
    number = register.number
    if dtype == np.bool_:

        def predicate(machine: Machine) -> np.ndarray:
            value = machine.registers[number]
            if value is None:
                raise Fault("reads a predicate that nothing wrote")
            return value.view(dtype)

        return predicate
    unsigned = UNSIGNED[dtype.itemsize]
    # Compilers leave the half of a register that is not used as it is.
    poison = np.array(-1, f"i{dtype.itemsize}").view(dtype)
    if register.bytes == dtype.itemsize:

        def same_width(machine: Machine) -> np.ndarray:
            value = machine.registers[number]
            return poison if value is None else value.view(dtype)

        return same_width

    def other_width(machine: Machine) -> np.ndarray:
        value = machine.registers[number]
        return poison if value is None else value.astype(unsigned).view(dtype)

    return other_width


def _immediate(operand: Immediate, dtype: np.dtype) -> np.ndarray:
    if dtype == np.bool_:
        return np.array(bool(operand.value))
    if operand.float_bytes:
        bits = np.array(operand.value, UNSIGNED[operand.float_bytes])
        if operand.float_bytes == dtype.itemsize:
            return bits.view(dtype)
        as_float = bits.view(np.float32 if operand.float_bytes == 4 else np.float64)
        return as_float.astype(dtype)
    size = dtype.itemsize
    return np.array(operand.value & ((1 << 8 * size) - 1), UNSIGNED[size]).view(dtype)


def _address_of(machine: Machine, name: str) -> int:
    try:
        return machine.symbols[name]
    except KeyError:
        raise Fault(f"no such symbol: {name}") from None


def _special(name: str, dtype: np.dtype) -> Source:
    base, _, axis = name.partition(".")
    place = "xyz".find(axis) if axis else 0

    def read(machine: Machine) -> np.ndarray:
        if base == "tid":
            x, y = machine.block[0], machine.block[1]
            thread = machine.thread
            value = (thread % x, thread // x % y, thread // (x * y))[place]
        elif base == "ctaid":
            of_cta = machine.places[:, place]
            value = of_cta[0] if machine.ctas == 1 else of_cta[machine.cta]
        elif base == "ntid":
            value = machine.block[place]
        elif base == "nctaid":
            value = machine.grid[place]
        elif base == "laneid":
            value = machine.lane_in_warp
        elif base == "warpid":
            value = machine.thread // 32
        else:
            raise Fault(f"unknown register: %{name}")
        return np.asarray(value).astype(dtype)

    return read


def target(operand: Operand) -> Target:
    """Return a writer of bits into a register; a number is first viewed as its bits."""
    if isinstance(operand, Sink):
        return lambda machine, value, active: None
    if not isinstance(operand, Register):
        raise Fault(f"not a register: {operand}")
    number = operand.number
    if operand.bytes == 0:
        return lambda machine, value, active: machine.write(number, value, active)
    bits = np.dtype(UNSIGNED[operand.bytes])

    def write(machine: Machine, value: np.ndarray, active: Active) -> None:
        if value.dtype.itemsize != bits.itemsize:
            value = value.astype(_wider(value.dtype, bits))
        machine.write(number, np.asarray(value).view(bits), active)

    return write


def _wider(dtype: np.dtype, bits: np.dtype) -> np.dtype:
    """Return the type of a small result in a larger register: signed numbers keep their sign."""
    return np.dtype(f"i{bits.itemsize}") if dtype.kind == "i" else bits


def items(operand: Operand) -> tuple[Operand, ...]:
    """Return the elements of a vector; a single operand is a vector of one."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def address(operand: Operand) -> Source:
    """Return a reader of addresses: int64, one for each lane."""
    if not isinstance(operand, Address):
        raise Fault(f"not an address: {operand}")
    base, offset = operand.base, operand.offset
    wide = isinstance(base, Symbol) or (isinstance(base, Register) and base.bytes == 8)
    read = source(base, "u64" if wide else "u32")

    def lanes(machine: Machine) -> np.ndarray:
        return machine.spread(read(machine).astype(np.int64) + offset)

    return lanes


def number_of(operand: Operand) -> int:
    """Return the number in the text."""
    if not isinstance(operand, Immediate):
        raise Fault(f"not a number in the text: {operand}")
    return operand.value


def flushed(value: np.ndarray) -> np.ndarray:
    """Return float32 with subnormal numbers as zeros of their sign (``.ftz``)."""
    small = np.abs(value) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), value), value)


def sources(instruction: Instruction, kind: str, first: int = 1) -> list[Source]:
    """Return readers of the operands after the destination, with ``.ftz`` where it says so."""
    readers = [source(operand, kind) for operand in instruction.operands[first:]]
    if "ftz" in instruction.modifiers and kind == "f32":
        return [_flushing(read) for read in readers]
    return readers


def _flushing(read: Source) -> Source:
    return lambda machine: flushed(read(machine))
