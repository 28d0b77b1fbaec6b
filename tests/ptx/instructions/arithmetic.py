"""Sums, products, quotients and functions (PTX ISA, sections 9.7.1 and 9.7.3)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.instructions import Step, decodes, unknown
from ptx.instructions.numbers import bfloat16
from ptx.instructions.operands import NUMPY, flushed, source, sources, target
from ptx.kernel import Instruction

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
# Rounding modes that float64 intermediates and numpy's rounding to nearest can't give.
_TOWARDS = {"rz": 0.0, "rm": -np.inf, "rp": np.inf}


def _step(
    instruction: Instruction, compute: Callable[..., np.ndarray], kind: str, result: str = ""
) -> Step:
    """Return the step of an instruction whose operands all have one type."""
    if kind in ("bf16", "bf16x2", "f16x2", "f32x2"):  # numpy would compute with their bits
        raise unknown(instruction)
    read = sources(instruction, kind)
    write = target(instruction.operands[0])
    dtype = NUMPY[result or kind]
    flushes = "ftz" in instruction.modifiers and kind == "f32"
    saturates = "sat" in instruction.modifiers and kind[0] == "f"

    def step(machine: Machine, active: Active) -> None:
        value = np.asarray(compute(*(one(machine) for one in read))).astype(dtype, copy=False)
        if saturates:
            value = np.where(np.isnan(value), dtype(0), np.clip(value, dtype(0), dtype(1)))
        write(machine, flushed(value) if flushes else value, active)

    return step


def rounding(instruction: Instruction) -> float | None:
    """Return what to round towards; None: to nearest even."""
    for mode, towards in _TOWARDS.items():
        if mode in instruction.modifiers:
            return towards
    return None


def rounded(exact: np.ndarray, dtype: type[np.floating], towards: float | None) -> np.ndarray:
    """Return a float64 number as another float."""
    nearest = exact.astype(dtype)
    if towards is None:
        return nearest
    if towards == 0:
        return np.where(np.abs(nearest) > np.abs(exact), np.nextafter(nearest, dtype(0)), nearest)
    wrong = nearest < exact if towards > 0 else nearest > exact
    return np.where(wrong, np.nextafter(nearest, dtype(towards)), nearest)


@decodes("add", "sub")
def _add(instruction: Instruction) -> Step:
    kind = instruction.type
    if "cc" in instruction.modifiers:
        raise unknown(instruction)
    towards = rounding(instruction)
    compute = np.add if instruction.op == "add" else np.subtract
    if kind == "bf16" and instruction.modifiers == ("rn", "f32", "bf16"):
        return _add_bfloat16(instruction, compute)
    if towards is None or kind == "f64":
        return _step(instruction, compute, kind)
    return _step(
        instruction, lambda a, b: rounded(_exactly(compute, a, b), np.float32, towards), kind
    )


def _add_bfloat16(instruction: Instruction, compute: np.ufunc) -> Step:
    """A bfloat16 and a float32, from sm_100 on."""
    a, b = source(instruction.operands[1], "b16"), source(instruction.operands[2], "f32")
    write = target(instruction.operands[0])

    def step(machine: Machine, active: Active) -> None:
        write(machine, np.asarray(compute(bfloat16(a(machine)), b(machine))), active)

    return step


def _exactly(compute: np.ufunc, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return compute(a.astype(np.float64), b.astype(np.float64))


@decodes("mul")
def _mul(instruction: Instruction) -> Step:
    kind = instruction.type
    if "wide" in instruction.modifiers:
        wide = NUMPY[_WIDER[kind]]
        return _step(instruction, lambda a, b: a.astype(wide) * b.astype(wide), kind, _WIDER[kind])
    if "hi" in instruction.modifiers:
        return _step(instruction, _high_half, kind)
    towards = rounding(instruction)
    if towards is not None and kind == "f32":
        return _step(
            instruction,
            lambda a, b: rounded(_exactly(np.multiply, a, b), np.float32, towards),
            kind,
        )
    return _step(instruction, np.multiply, kind)


def _high_half(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the upper half of the product of integers."""
    if a.dtype.itemsize < 8:
        bits = 8 * a.dtype.itemsize
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)
    exact = np.asarray(a).astype(object) * np.asarray(b).astype(object)
    return np.asarray(exact >> 64).astype(a.dtype)


@decodes("mad")
def _mad(instruction: Instruction) -> Step:
    kind = instruction.type
    if kind[0] == "f":
        return _fma(instruction)
    if "wide" not in instruction.modifiers:
        if "hi" in instruction.modifiers:
            return _step(instruction, lambda a, b, c: _high_half(a, b) + c, kind)
        return _step(instruction, lambda a, b, c: a * b + c, kind)
    wide = NUMPY[_WIDER[kind]]
    a, b = (source(operand, kind) for operand in instruction.operands[1:3])
    c = source(instruction.operands[3], _WIDER[kind])
    write = target(instruction.operands[0])

    def step(machine: Machine, active: Active) -> None:
        product = a(machine).astype(wide) * b(machine).astype(wide)
        write(machine, np.asarray(product + c(machine)), active)

    return step


@decodes("fma")
def _fma(instruction: Instruction) -> Step:
    kind = instruction.type
    if kind == "f32":
        return _step(instruction, fma32(rounding(instruction)), kind)
    if kind == "f64":
        return _step(instruction, _fma64, kind)
    raise unknown(instruction)


def fma32(towards: float | None) -> Callable[..., np.ndarray]:
    """Return the function. Products are exact in float64; the sum is rounded there, once more."""

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
        return rounded(exact, np.float32, towards)

    return compute


def _fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Add what product and sum lose to rounding (Dekker's product, Knuth's sum)."""
    product, total = a * b, a * b + c
    high_a, high_b = _upper_half(a), _upper_half(b)
    low_a, low_b = a - high_a, b - high_b
    lost = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    back = total - product
    lost = lost + ((product - (total - back)) + (c - back))
    return np.where(np.isfinite(lost), total + lost, total)


def _upper_half(x: np.ndarray) -> np.ndarray:
    """Return the upper 26 bits of a float64's 53."""
    large = x * np.float64(2**27 + 1)
    return large - (large - x)


@decodes("div")
def _div(instruction: Instruction) -> Step:
    kind = instruction.type
    if kind[0] == "f":
        return _step(instruction, np.divide, kind)
    return _step(instruction, _quotient, kind)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the quotient, rounded to zero; all ones where the divisor is 0."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // divisor
    if a.dtype.kind == "i":
        inexact = (a % divisor != 0) & ((a < 0) != (divisor < 0))
        quotient = quotient + inexact.astype(a.dtype)
    return np.where(b == 0, ~a.dtype.type(0), quotient)


@decodes("rem")
def _rem(instruction: Instruction) -> Step:
    def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))

    return _step(instruction, remainder, instruction.type)


@decodes("min", "max")
def _extreme(instruction: Instruction) -> Step:
    kind, largest = instruction.type, instruction.op == "max"
    if kind in ("bf16", "f16x2", "bf16x2"):
        raise unknown(instruction)
    compute = np.maximum if largest else np.minimum
    if kind[0] == "f" and "NaN" not in instruction.modifiers:
        compute = np.fmax if largest else np.fmin
    # Two numbers, or three from sm_100 on.
    return _step(instruction, lambda *numbers: functools.reduce(compute, numbers), kind)


@decodes("abs", "neg")
def _sign(instruction: Instruction) -> Step:
    kind = instruction.type
    return _step(instruction, np.abs if instruction.op == "abs" else np.negative, kind)


_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x.astype(np.float64)),
    "rcp": np.reciprocal,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@decodes(*_FUNCTIONS)
def _function(instruction: Instruction) -> Step:
    """The approximations are computed as exactly as numpy can."""
    compute = _FUNCTIONS[instruction.op]
    if instruction.type == "f64" and "approx" in instruction.modifiers:
        return _step(instruction, lambda x: _upper_bits(compute(x)), "f64")
    return _step(instruction, compute, instruction.type)


def _upper_bits(x: np.ndarray) -> np.ndarray:
    """Return float64 with its lower 32 bits cut off, as ``rcp.approx.ftz.f64`` does."""
    return (np.asarray(x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
