"""mma.sync: products of small matrices in a warp's registers (PTX ISA, section 9.7.14.5).

Products are exact in float64, summed there, and rounded once: at least as exact as the hardware.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx.instructions import Step, decodes, unknown
from ptx.instructions.numbers import number
from ptx.instructions.operands import Source, items, source, target
from ptx.kernel import Instruction

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

_LANE = np.arange(32)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4
_SHAPES = {"m16n8k16": (16, 8, 16), "m16n8k8": (16, 8, 8), "m8n8k4": (8, 8, 4)}


def _fragment(
    machine: Machine, read: list[Source], kind: str, shape: tuple[int, int], of_a: bool
) -> np.ndarray:
    """Return the matrix ``shape`` of each warp that its lanes hold, as float64.

    A register holds as many elements as fit, neighbours along the sum. For B, rows and columns are
    exchanged.
    """
    per_register = 2 if kind in ("bf16", "f16") else 1
    matrix = np.zeros((machine.lanes // 32, *shape))
    for register, one in enumerate(read):
        bits = machine.spread(one(machine)).reshape(-1, 32)
        row = _GROUP + 8 * (register % 2) if of_a else _GROUP
        block = register // 2 if of_a else register
        along = _IN_GROUP * per_register + 4 * per_register * block
        for part in range(per_register):
            values = number(_part(bits, part, kind), kind)
            place = (row, along + part) if of_a else (along + part, row)
            matrix[:, place[0], place[1]] = values
    return matrix


def _part(bits: np.ndarray, part: int, kind: str) -> np.ndarray:
    if kind in ("bf16", "f16"):
        return (bits >> np.uint32(16 * part)).astype(np.uint16)
    return bits


@decodes("mma")
def _mma(instruction: Instruction) -> Step:
    shape = next((m for m in instruction.modifiers if m in _SHAPES), None)
    to_kind, kind, kind_of_b, of_kind = instruction.modifiers[-4:]
    supported = {
        "m16n8k16": ("bf16", "f16"),
        "m16n8k8": ("tf32", "bf16", "f16"),
        "m8n8k4": ("f64",),
    }
    if shape is None or kind not in supported[shape] or kind != kind_of_b or to_kind != of_kind:
        raise unknown(instruction)
    if (to_kind == "f64") != (kind == "f64") or to_kind not in ("f32", "f64"):
        raise unknown(instruction)
    m, n, k = _SHAPES[shape]
    to, a, b, c = instruction.operands
    bits = "b64" if kind == "f64" else "b32"
    read_a, read_b = ([source(one, bits) for one in items(operand)] for operand in (a, b))
    read_c = [source(one, to_kind) for one in items(c)]
    writes = [target(one) for one in items(to)]
    dtype = np.float64 if to_kind == "f64" else np.float32

    def step(machine: Machine, active: Active) -> None:
        warps = machine.whole_warps(active, "mma")
        left = _fragment(machine, read_a, kind, (m, k), True)
        product = left @ _fragment(machine, read_b, kind, (k, n), False)
        if machine.observer:
            machine.observer.product(instruction, m, n, k, int(warps.sum()), 0)
        results = []
        for register, one in enumerate(read_c):
            row, column = _GROUP + 8 * (register // 2), _IN_GROUP * 2 + register % 2
            old = machine.spread(one(machine)).reshape(-1, 32)
            results.append((product[:, row, column] + old).astype(dtype).ravel())
        for write, value in zip(writes, results, strict=True):
            write(machine, value, active)

    return step
