"""Conversions between types (PTX ISA, section 9.7.9.21)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.instructions import Step, decodes, unknown
from ptx.instructions.arithmetic import rounded, rounding
from ptx.instructions.numbers import bfloat16, to_bfloat16, to_float16
from ptx.instructions.operands import NUMPY, flushed, source, target
from ptx.kernel import Instruction

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_TO_PACKED = {"bf16x2": to_bfloat16, "f16x2": to_float16}


@decodes("cvt")
def _cvt(instruction: Instruction) -> Step:
    to, of = instruction.modifiers[-2:]
    if to in _TO_PACKED and of == "f32":
        return _pack(instruction, _TO_PACKED[to])
    read, write = source(instruction.operands[1], of), target(instruction.operands[0])
    convert = _conversion(instruction, to, of)

    def step(machine: Machine, active: Active) -> None:
        write(machine, np.asarray(convert(read(machine))), active)

    return step


def _pack(instruction: Instruction, convert: Callable[[np.ndarray], np.ndarray]) -> Step:
    """The first operand becomes the upper half."""
    high, low = (source(operand, "f32") for operand in instruction.operands[1:])
    write = target(instruction.operands[0])

    def step(machine: Machine, active: Active) -> None:
        upper = convert(high(machine)).astype(np.uint32) << np.uint32(16)
        write(machine, np.asarray(upper | convert(low(machine)).astype(np.uint32)), active)

    return step


def _conversion(instruction: Instruction, to: str, of: str) -> Callable[[np.ndarray], np.ndarray]:
    if to == "tf32":
        return _to_tf32
    if to in ("bf16", "f16") and of == "f32" and "rn" in instruction.modifiers:
        return to_bfloat16 if to == "bf16" else to_float16
    if of == "bf16":
        of, convert = "f32", _conversion_of_numbers(instruction, to, "f32")
        return lambda x: convert(bfloat16(x))
    if "bf16" in (to, of) or to.endswith("x2") or of.endswith("x2"):
        raise unknown(instruction)
    return _conversion_of_numbers(instruction, to, of)


def _to_tf32(value: np.ndarray) -> np.ndarray:
    """Round to nearest, ties away from zero (``rna``); inf and NaN stay."""
    bits, finite = value.view(np.uint32), np.isfinite(value)
    rounded_bits = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(finite, rounded_bits, bits)


def _conversion_of_numbers(
    instruction: Instruction, to: str, of: str
) -> Callable[[np.ndarray], np.ndarray]:
    dtype = NUMPY[to]
    if to[0] != "f":
        if of[0] != "f":
            return _integers(instruction, dtype)
        return _float_to_integer(instruction, dtype)
    towards = rounding(instruction)
    integral = next((_TO_INTEGER[m] for m in instruction.modifiers if m in _TO_INTEGER), None)
    saturates, flushes = "sat" in instruction.modifiers, "ftz" in instruction.modifiers

    def convert(x: np.ndarray) -> np.ndarray:
        if integral is not None:
            x = integral(x)
        if dtype is np.float32 and of == "f64":
            value = rounded(x, np.float32, towards)
        else:
            value = x.astype(dtype)
        if saturates:
            value = np.where(np.isnan(value), dtype(0), np.clip(value, dtype(0), dtype(1)))
        return flushed(value) if flushes and to == "f32" else value

    return convert


def _integers(instruction: Instruction, dtype: type[np.generic]) -> Callable:
    if "sat" in instruction.modifiers:
        raise unknown(instruction)
    return lambda x: x.astype(dtype)


def _float_to_integer(instruction: Instruction, dtype: type[np.generic]) -> Callable:
    """Numbers outside become the nearest integer, NaN becomes 0."""
    integral = next(_TO_INTEGER[m] for m in instruction.modifiers if m in _TO_INTEGER)
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max

    def convert(x: np.ndarray) -> np.ndarray:
        whole = np.nan_to_num(integral(x.astype(np.float64)), nan=0.0)
        # float64 can't hold the largest 64-bit integers: those are set apart.
        inside = np.clip(whole, float(least), np.nextafter(float(most), 0))
        return np.where(whole >= float(most), dtype(most), inside.astype(dtype))

    return convert
