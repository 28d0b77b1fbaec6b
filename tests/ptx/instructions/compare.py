"""Comparisons and selections (PTX ISA, sections 9.7.6 and 9.7.7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.instructions import Step, decodes
from ptx.instructions.numbers import bfloat16, halves, pair_kind
from ptx.instructions.operands import Source, source, sources, target
from ptx.kernel import Instruction, Pair

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

_ORDERED: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, is_float: bool) -> Callable[..., np.ndarray]:
    """Return a comparison; the unordered ones (``ltu``) are true for NaN."""
    if name == "ne":
        if is_float:
            return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
        return np.not_equal
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name == "neu":
        return np.not_equal
    if is_float and name.endswith("u"):
        ordered = _ORDERED[name[:-1]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    return _ORDERED[name]


@decodes("setp")
def _setp(instruction: Instruction) -> Step:
    kind = instruction.type
    is_float = kind[0] == "f" or kind.startswith("bf")
    compare = _comparison(instruction.modifiers[0], is_float)
    operands = instruction.operands
    to = operands[0]
    writes = [target(to.first), target(to.second)] if isinstance(to, Pair) else [target(to)]
    if kind.endswith("x2"):
        return _setp_of_pairs(instruction, compare, writes)
    a, b = sources(instruction, kind)[:2]
    if kind == "bf16":
        a, b = _widened(a), _widened(b)
    combine = next((_COMBINE[m] for m in instruction.modifiers if m in _COMBINE), None)
    other = source(operands[3], "pred") if combine else None

    def step(machine: Machine, active: Active) -> None:
        result = np.asarray(compare(a(machine), b(machine)))
        both = [result, ~result]
        if combine is not None and other is not None:
            both = [np.asarray(combine(one, other(machine))) for one in both]
        for write, value in zip(writes, both, strict=False):
            write(machine, value, active)

    return step


def _widened(read: Source) -> Source:
    return lambda machine: bfloat16(read(machine))


def _setp_of_pairs(
    instruction: Instruction, compare: Callable[..., np.ndarray], writes: list
) -> Step:
    kind = pair_kind(instruction.type)
    a, b = (source(operand, "b32") for operand in instruction.operands[1:3])

    def step(machine: Machine, active: Active) -> None:
        pairs = zip(halves(a(machine), kind), halves(b(machine), kind), writes, strict=True)
        for left, right, write in pairs:
            write(machine, np.asarray(compare(left, right)), active)

    return step


@decodes("selp")
def _select(instruction: Instruction) -> Step:
    kind = instruction.type
    _, first, second, condition = instruction.operands
    a, b, p = source(first, kind), source(second, kind), source(condition, "pred")
    write = target(instruction.operands[0])

    def step(machine: Machine, active: Active) -> None:
        write(machine, np.where(p(machine), a(machine), b(machine)), active)

    return step
