"""Kernels as the machine takes them: parameters, memory, instructions with their operands."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

# Bytes of the fundamental types; `pred` has none.
BYTES = {
    **{kind + bits: int(bits) // 8 for kind in "bsu" for bits in ("8", "16", "32", "64")},
    "f16": 2,
    "bf16": 2,
    "f32": 4,
    "f64": 8,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
}


class Register(NamedTuple):
    """A register by its number in the kernel; ``bytes`` is 0 for a predicate."""

    number: int
    bytes: int


class Immediate(NamedTuple):
    """A number in the text. ``float_bytes`` is 4 or 8 where it is written as a float's bits."""

    value: int
    float_bytes: int = 0


class Special(NamedTuple):
    """A read-only register such as ``%tid.x``."""

    name: str


class Symbol(NamedTuple):
    """The name of a parameter or of a variable: its address."""

    name: str


class Address(NamedTuple):
    """``[base + offset]``; a tensor's address has coordinates too."""

    base: Operand
    offset: int
    coordinates: tuple[Operand, ...] = ()


class Vector(NamedTuple):
    """``{a, b, ...}``."""

    items: tuple[Operand, ...]


class Pair(NamedTuple):
    """``a|b``: two destinations."""

    first: Operand
    second: Operand


class Sink(NamedTuple):
    """``_``: a destination that nobody reads."""


Operand = Register | Immediate | Special | Symbol | Address | Vector | Pair | Sink


@dataclass(eq=False)
class Instruction:
    """One instruction. ``guard`` is its predicate, which ``negated`` turns around."""

    op: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    index: int
    text: str
    target: int = -1  # of a branch

    @property
    def type(self) -> str:
        """The last modifier, which is the type of most instructions."""
        return self.modifiers[-1]

    def vector(self) -> int:
        """Return the number of elements of a load or store."""
        return next((int(m[1]) for m in self.modifiers if re.fullmatch(r"v[248]", m)), 1)


class Param(NamedTuple):
    name: str
    type: str
    bytes: int
    align: int


class Variable(NamedTuple):
    """A variable in shared or local memory."""

    name: str
    space: str
    bytes: int
    align: int


@dataclass(eq=False)
class Kernel:
    """A kernel. ``block``: the number of threads that it requires, or None."""

    name: str
    params: list[Param]
    block: int | None
    instructions: list[Instruction] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    registers: int = 0
    steps: list[Callable] = field(default_factory=list)  # the instructions, once decoded

    def shared_layout(self) -> tuple[dict[str, int], int]:
        """Return the places of the shared variables, and where dynamic shared memory begins."""
        places, end = {}, 0
        for variable in self.variables:
            if variable.space == "shared" and variable.bytes:
                end = -(-end // variable.align) * variable.align
                places[variable.name] = end
                end += variable.bytes
        end = -(-end // 16) * 16
        places |= {v.name: end for v in self.variables if v.space == "shared" and not v.bytes}
        return places, end

    def local_layout(self) -> tuple[dict[str, int], int]:
        """Return the places of a thread's local variables, and the bytes of all."""
        places, end = {}, 0
        for variable in self.variables:
            if variable.space == "local":
                end = -(-end // variable.align) * variable.align
                places[variable.name] = end
                end += variable.bytes
        return places, end
