"""The instructions, a module for each family.

A family decodes an instruction once, into a function of the machine and the active lanes. Lanes
outside of them keep their registers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from ptx.faults import Fault
from ptx.kernel import Instruction

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

Step = Callable[["Machine", "Active"], None]
Decoder = Callable[[Instruction], Step]

FAMILIES = (
    "arithmetic",
    "bits",
    "bulk_copies",
    "compare",
    "convert",
    "copies",
    "matrices",
    "memory",
    "pairs",
    "products",
    "warp",
    "warpgroup",
    "wmma",
)
_DECODERS: dict[str, Decoder] = {}
# No family knows the forms that have one of these.
REFUSED = frozenset(("cc", "xorsign", "relu", "satfinite", "L2::cache_hint"))


def decodes(*ops: str) -> Callable[[Decoder], Decoder]:
    """Register a decoder by the first words of instructions' names: the longest ones count."""

    def register(decoder: Decoder) -> Decoder:
        for op in ops:
            assert op not in _DECODERS, op
            _DECODERS[op] = decoder
        return decoder

    return register


def decode(instruction: Instruction) -> Step:
    """Return what an instruction does; one that nobody knows is a fault when it runs."""
    words = (instruction.op, *instruction.modifiers)
    names = (".".join(words[:count]) for count in (3, 2, 1))
    decoder = next((_DECODERS[name] for name in names if name in _DECODERS), None)
    if decoder is None:
        return _failing(f"unknown instruction: {instruction.op}")
    if REFUSED.intersection(instruction.modifiers):
        return _failing(str(unknown(instruction)))
    try:
        return decoder(instruction)
    except Fault as fault:
        return _failing(str(fault))


def unknown(instruction: Instruction) -> Fault:
    """Return the fault of a form of an instruction that the machine does not know."""
    return Fault(f"unknown form of {'.'.join((instruction.op, *instruction.modifiers))}")


def _failing(message: str) -> Step:
    def fail(machine: Machine, active: Active) -> None:
        raise Fault(message)

    return fail


@decodes("bra", "ret", "exit", "bar", "barrier")
def _control(instruction: Instruction) -> Step:
    """Know nothing of control flow, which the machine itself does, but ``bar.warp``."""
    raise unknown(instruction)


for _family in FAMILIES:
    importlib.import_module(f"ptx.instructions.{_family}")
