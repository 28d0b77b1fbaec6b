"""Arithmetic of two float32 numbers in one register, from sm_100 on (PTX ISA, section 9.7.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.instructions import Step, decodes, unknown
from ptx.instructions.arithmetic import fma32
from ptx.instructions.operands import source, target
from ptx.kernel import Instruction

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

_COMPUTE: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fma32(None),
}


@decodes(*(f"{op}{mode}.f32x2" for op in _COMPUTE for mode in ("", ".rn")))
def _pairs(instruction: Instruction) -> Step:
    if set(instruction.modifiers) - {"rn", "f32x2"}:
        raise unknown(instruction)
    compute = _COMPUTE[instruction.op]
    read = [source(operand, "b64") for operand in instruction.operands[1:]]
    write = target(instruction.operands[0])

    def step(machine: Machine, active: Active) -> None:
        bits = (np.ascontiguousarray(machine.spread(one(machine))) for one in read)
        write(machine, compute(*(b.view(np.float32) for b in bits)).view(np.uint64), active)

    return step
