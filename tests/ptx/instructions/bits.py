"""Bits of integers (PTX ISA, sections 9.7.1.14 and after, and 9.7.8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.instructions import Step, decodes, unknown
from ptx.instructions.operands import NUMPY, source, target
from ptx.kernel import BYTES, Instruction

if TYPE_CHECKING:
    from ptx.machine import Active, Machine


def _step(instruction: Instruction, compute: Callable[..., np.ndarray], *kinds: str) -> Step:
    """Return the step of an instruction with operands of these types."""
    operands = instruction.operands
    read = [source(operand, kind) for operand, kind in zip(operands[1:], kinds, strict=True)]
    write = target(operands[0])

    def step(machine: Machine, active: Active) -> None:
        write(machine, np.asarray(compute(*(one(machine) for one in read))), active)

    return step


@decodes("and", "or", "xor")
def _logic(instruction: Instruction) -> Step:
    compute = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[instruction.op]
    return _step(instruction, compute, instruction.type, instruction.type)


@decodes("not")
def _not(instruction: Instruction) -> Step:
    return _step(instruction, np.invert, instruction.type)


@decodes("cnot")
def _cnot(instruction: Instruction) -> Step:
    return _step(instruction, lambda x: (x == 0).astype(x.dtype), instruction.type)


@decodes("shl", "shr")
def _shift(instruction: Instruction) -> Step:
    """Shifts by more than the width leave nothing, or the sign."""
    kind, left = instruction.type, instruction.op == "shl"
    dtype, width = NUMPY[kind], 8 * BYTES[kind]

    def compute(x: np.ndarray, count: np.ndarray) -> np.ndarray:
        within = np.minimum(count, width - 1).astype(dtype)
        shifted = x << within if left else x >> within
        beyond = x >> dtype(width - 1) if kind[0] == "s" and not left else dtype(0)
        return np.where(count >= width, beyond, shifted)

    return _step(instruction, compute, kind, "u32")


@decodes("shf")
def _funnel_shift(instruction: Instruction) -> Step:
    left, wraps = instruction.modifiers[0] == "l", "wrap" in instruction.modifiers

    def compute(low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        by = (count & 31 if wraps else np.minimum(count, 32)).astype(np.uint64)
        shifted = (both << by) >> np.uint64(32) if left else both >> by
        return shifted.astype(np.uint32)

    return _step(instruction, compute, "b32", "b32", "u32")


@decodes("bfe")
def _extract(instruction: Instruction) -> Step:
    kind = instruction.type
    width = 8 * BYTES[kind]

    def compute(x: np.ndarray, place: np.ndarray, length: np.ndarray) -> np.ndarray:
        place, length = place & 255, length & 255
        if kind[0] == "u":
            shifted = np.where(place >= 64, np.uint64(0), x.astype(np.uint64) >> (place & 63))
            field = np.where(length >= 64, ~np.uint64(0), (np.uint64(1) << (length & 63)) - 1)
            return (shifted & field).astype(NUMPY[kind])
        wide = x.astype(np.int64)
        end = np.minimum(place + length.astype(np.int64), width)
        up = (64 - end).astype(np.int64)
        down = np.minimum(up + place, 63).astype(np.int64)
        return np.where(length == 0, 0, (wide << up) >> down).astype(NUMPY[kind])

    return _step(instruction, compute, kind, "u32", "u32")


@decodes("bfi")
def _insert(instruction: Instruction) -> Step:
    kind = instruction.type
    dtype, width = NUMPY[kind], 8 * BYTES[kind]

    def compute(
        inserted: np.ndarray, x: np.ndarray, place: np.ndarray, length: np.ndarray
    ) -> np.ndarray:
        place, length = place & 255, length & 255
        field = np.where(length >= 64, ~np.uint64(0), (np.uint64(1) << (length & 63)) - 1)
        mask = np.where(place >= width, np.uint64(0), field << (place & 63)).astype(dtype)
        moved = (inserted.astype(np.uint64) << (place & 63)).astype(dtype)
        return (x & ~mask) | (moved & mask)

    return _step(instruction, compute, kind, kind, "u32", "u32")


@decodes("brev")
def _reverse(instruction: Instruction) -> Step:
    kind = instruction.type
    dtype, width = NUMPY[kind], 8 * BYTES[kind]

    def compute(x: np.ndarray) -> np.ndarray:
        result = np.zeros_like(x)
        for bit in range(width):
            result |= ((x >> dtype(bit)) & dtype(1)) << dtype(width - 1 - bit)
        return result

    return _step(instruction, compute, kind)


@decodes("popc", "clz")
def _count(instruction: Instruction) -> Step:
    kind = instruction.type
    dtype, width = NUMPY[kind], 8 * BYTES[kind]

    def compute(x: np.ndarray) -> np.ndarray:
        bits = [(x >> dtype(bit)) & dtype(1) for bit in range(width - 1, -1, -1)]
        stacked = np.stack([np.asarray(bit) for bit in bits])
        if instruction.op == "popc":
            return stacked.sum(0).astype(np.uint32)
        return np.where(stacked.any(0), stacked.argmax(0), width).astype(np.uint32)

    return _step(instruction, compute, kind)


@decodes("prmt")
def _permute(instruction: Instruction) -> Step:
    if instruction.modifiers != ("b32",):
        raise unknown(instruction)

    def compute(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.uint32(0)
        for byte in range(4):
            selector = (selectors >> np.uint32(4 * byte)) & np.uint32(15)
            shift = (selector & np.uint32(7)).astype(np.uint64) * np.uint64(8)
            chosen = ((both >> shift) & np.uint64(255)).astype(np.uint32)
            sign = np.where(chosen & np.uint32(128), np.uint32(255), np.uint32(0))
            chosen = np.where(selector & np.uint32(8), sign, chosen)
            result = result | (chosen << np.uint32(8 * byte))
        return result

    return _step(instruction, compute, "b32", "b32", "b32")


@decodes("lop3")
def _three(instruction: Instruction) -> Step:
    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
        result = np.uint32(0)
        for case in range(8):
            if int(table) >> case & 1:
                parts = zip((a, b, c), (4, 2, 1), strict=True)
                match = [x if case & bit else ~x for x, bit in parts]
                result = result | (match[0] & match[1] & match[2])
        return result

    return _step(instruction, compute, "b32", "b32", "b32", "b32")
