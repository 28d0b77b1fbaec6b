"""wgmma: products of four warps from shared memory (PTX ISA, section 9.7.15).

A product is computed when it is waited for, from what its operands are then. Until then its
accumulators hold poison.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import Fault
from ptx.instructions import Step, decodes, unknown
from ptx.instructions.numbers import number
from ptx.instructions.operands import Source, items, number_of, source
from ptx.kernel import Immediate, Instruction, Register, Vector

if TYPE_CHECKING:
    from ptx.machine import Active, Machine

GROUP = 128
_THREAD = np.arange(GROUP)
_ROW = 16 * (_THREAD // 32) + _THREAD % 32 // 4  # of a thread's first accumulator
_POISON = np.uint32(0xFFFFFFFF)
_SIZES = {"bf16": 2, "f16": 2, "tf32": 4}
# Bytes of a swizzled row in units of 16, and the bits that are exchanged, by the mode of a
# descriptor.
_WIDTHS, SWIZZLES = {0: 1, 1: 8, 2: 4, 3: 2}, {0: 0, 1: 7, 2: 3, 3: 1}


def swizzled(address: np.ndarray, mode: int) -> np.ndarray:
    """Return where a swizzle puts the byte of an address: bits 4 to 6 take in bits 7 to 9."""
    return address ^ (((address >> 7) & SWIZZLES[mode]) << 4)


@dataclass
class _Product:
    """One instruction, for some warpgroups."""

    accumulators: list[int]  # registers
    groups: np.ndarray  # numbers of the warpgroups
    order: np.ndarray  # which of its committed groups this is in, for each warpgroup
    scaled: np.ndarray  # whether the accumulators count, for each warpgroup
    left: _Operand
    right: _Operand

    def part(self, chosen: np.ndarray) -> _Product:
        return _Product(
            self.accumulators,
            self.groups[chosen],
            self.order[chosen],
            self.scaled[chosen],
            self.left.part(chosen),
            self.right.part(chosen),
        )


class _InMemory:
    """A matrix in shared memory: the places of its elements, (groups, rows, K)."""

    def __init__(self, machine: Machine, groups: np.ndarray, places: np.ndarray, kind: str) -> None:
        self._machine, self._places, self._kind = machine, places, kind
        self._groups = groups
        races, size = machine.shared.races, _SIZES[kind]
        self._read = [
            races.read_by_products(mine.ravel(), size, lanes_of(group))
            for group, mine in zip(groups, places, strict=True)
        ]

    def part(self, chosen: np.ndarray) -> _InMemory:
        other = object.__new__(_InMemory)
        other._machine, other._kind = self._machine, self._kind
        other._places, other._groups = self._places[chosen], self._groups[chosen]
        other._read = [read for read, one in zip(self._read, chosen, strict=True) if one]
        return other

    def matrix(self) -> np.ndarray:
        size = _SIZES[self._kind]
        words = self._machine.shared.bytes.view({2: np.uint16, 4: np.uint32}[size])
        for read in self._read:
            self._machine.shared.races.products_done(read)
        return number(words[self._places // size], self._kind)


class _InRegisters:
    """A matrix in registers, which must not change before the product is waited for."""

    def __init__(
        self, machine: Machine, groups: np.ndarray, read: list[Source], kind: str, depth: int
    ) -> None:
        self._machine, self._groups, self._read = machine, groups, read
        self._kind, self._depth = kind, depth
        self._bits = self._now()

    def _now(self) -> np.ndarray:
        spread = (self._machine.spread(one(self._machine)) for one in self._read)
        return np.stack([bits.reshape(-1, GROUP)[self._groups] for bits in spread])

    def part(self, chosen: np.ndarray) -> _InRegisters:
        other = object.__new__(_InRegisters)
        vars(other).update(vars(self))
        other._groups, other._bits = self._groups[chosen], self._bits[:, chosen]
        return other

    def matrix(self) -> np.ndarray:
        if not np.array_equal(self._bits, self._now()):
            raise Fault("a register changed while a product under way reads it")
        result = np.zeros((len(self._groups), 64, self._depth))
        per_register = 1 if self._kind == "tf32" else 2
        for register, bits in enumerate(self._bits):
            row = _ROW + 8 * (register % 2)
            column = _THREAD % 4 * per_register + 4 * per_register * (register // 2)
            for part in range(per_register):
                shifted = bits >> np.uint32(16 * part)
                values = number(
                    bits if per_register == 1 else shifted.astype(np.uint16), self._kind
                )
                result[:, row, column + part] = values
        return result


_Operand = _InMemory | _InRegisters


def lanes_of(group: int) -> np.ndarray:
    """Return the lanes of a warpgroup."""
    return np.arange(group * GROUP, (group + 1) * GROUP)


class Products:
    """The products of a launch that were not waited for."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._under_way: list[_Product] = []
        self._committed = np.zeros(-(-machine.lanes // GROUP), np.int64)
        self._fenced = np.zeros(len(self._committed), np.int64)
        # For each register that accumulates: its values, and the groups whose product is under way.
        self._values: dict[int, np.ndarray] = {}
        self._held: dict[int, np.ndarray] = {}

    def fence(self, groups: np.ndarray) -> None:
        self._fenced[groups] = self._machine.clock

    def end(self) -> None:
        """Raise Fault if the launch ends before its products."""
        if self._under_way:
            raise Fault("ends with a product under way")

    def begin(
        self,
        accumulators: list[int],
        groups: np.ndarray,
        scaled: np.ndarray,
        left: _Operand,
        right: _Operand,
    ) -> None:
        """Take the accumulators away, and keep the product."""
        for register in accumulators:
            self._hold(register, groups)
        order = self._committed[groups] + 1
        self._under_way.append(_Product(accumulators, groups, order, scaled, left, right))

    def check_fence(self, registers: list[int], groups: np.ndarray) -> None:
        """Raise Fault if a register was written after the last ``wgmma.fence``."""
        fenced = self._fenced[groups].min()
        if any(self._machine.written[register] > fenced for register in registers):
            raise Fault("a register of a product was written after the last wgmma.fence")

    def _hold(self, register: int, groups: np.ndarray) -> None:
        machine = self._machine
        if register not in self._values:
            self._values[register] = np.zeros((len(self._committed), GROUP), np.uint32)
            self._held[register] = np.zeros(len(self._committed), bool)
        fresh = groups[~self._held[register][groups]]
        if not fresh.size:
            return
        self.check_fence([register], fresh)
        current = machine.registers[register]
        bits = np.array(machine.spread(_POISON if current is None else current))
        by_group = bits.reshape(-1, GROUP)
        self._values[register][fresh] = by_group[fresh]
        by_group[fresh] = _POISON
        self._held[register][fresh] = True
        machine.registers[register] = bits

    def commit(self, groups: np.ndarray) -> None:
        self._committed[groups] += 1

    def wait(self, most: int, groups: np.ndarray) -> None:
        """Compute all but the newest ``most`` committed products of these warpgroups."""
        remaining = []
        for product in self._under_way:
            due = product.order <= self._committed[product.groups] - most
            due &= np.isin(product.groups, groups)
            if due.any():
                self._compute(product if due.all() else product.part(due))
            if not due.all():
                remaining.append(product.part(~due))
        self._under_way = remaining
        self._give_back()

    def _compute(self, product: _Product) -> None:
        result = product.left.matrix() @ product.right.matrix().swapaxes(1, 2)
        for place, register in enumerate(product.accumulators):
            row = _ROW + 8 * (place // 2 % 2)
            column = 8 * (place // 4) + _THREAD % 4 * 2 + place % 2
            values = self._values[register]
            old = values[product.groups].view(np.float32)
            old = np.where(product.scaled[:, None], old, np.float32(0))
            new = (result[:, row, column] + old).astype(np.float32)
            values[product.groups] = new.view(np.uint32)

    def _give_back(self) -> None:
        """Return accumulators to the warpgroups that have no product under way in them."""
        for register, held in self._held.items():
            if not held.any():
                continue
            busy = [p.groups for p in self._under_way if register in p.accumulators]
            done = held.copy()
            for groups in busy:
                done[groups] = False
            if not done.any():
                continue
            bits = np.array(self._machine.spread(self._machine.registers[register]))
            by_group = bits.reshape(-1, GROUP)
            if (by_group[done] != _POISON).any():
                raise Fault("an accumulator was written while its product was under way")
            by_group[done] = self._values[register][done]
            held[done] = False
            self._machine.registers[register] = bits


def _groups(machine: Machine, active: Active) -> np.ndarray:
    """Return the numbers of the warpgroups that take part."""
    if machine.threads % GROUP:
        raise Fault("wgmma in a CTA that is not of whole warpgroups")
    if active is None:
        return np.arange(machine.lanes // GROUP)
    by_group = active.reshape(-1, GROUP)
    if not np.array_equal(by_group.any(1), by_group.all(1)):
        raise Fault("wgmma of a part of a warpgroup")
    return np.flatnonzero(by_group.any(1))


@decodes("wgmma")
def _wgmma(instruction: Instruction) -> Step:
    action = instruction.modifiers[0]
    if action == "fence":
        return lambda machine, active: machine.products.fence(_groups(machine, active))
    if action == "commit_group":
        return lambda machine, active: machine.products.commit(_groups(machine, active))
    if action == "wait_group":
        most = number_of(instruction.operands[0])
        return lambda machine, active: machine.products.wait(most, _groups(machine, active))
    return _mma_async(instruction)


def _mma_async(instruction: Instruction) -> Step:
    kind = instruction.type
    shape = re.search(r"m64n(\d+)k(\d+)", instruction.text)
    to, a, b, scale, *flags = instruction.operands
    if shape is None or kind not in _SIZES or instruction.modifiers[-3] != "f32":
        raise unknown(instruction)
    if [number_of(flag) for flag in flags[:2]] != [1, 1]:
        raise unknown(instruction)
    n, k = int(shape[1]), int(shape[2])
    transposed = [bool(number_of(flag)) for flag in flags[2:]]
    transposed_a = transposed.pop(0) if len(transposed) == 2 else False
    transposed_b = transposed.pop(0) if transposed else False
    accumulators = [one.number for one in items(to) if isinstance(one, Register)]
    if len(accumulators) != n // 2:
        raise unknown(instruction)
    scaled = source(scale, "pred")
    in_registers = isinstance(a, Vector)
    registers_of_a = [one.number for one in items(a) if isinstance(one, Register)]
    read_a = [source(one, "b32" if in_registers else "b64") for one in items(a)]
    read_b = source(b, "b64")
    constant_scale = isinstance(scale, Immediate)
    read_bytes = (n + (0 if in_registers else 64)) * k * _SIZES[kind]

    def step(machine: Machine, active: Active) -> None:
        groups = _groups(machine, active)
        right = _memory(machine, groups, read_b, (n, k), transposed_b, kind)
        left: _Operand
        if in_registers:
            machine.products.check_fence(registers_of_a, groups)
            left = _InRegisters(machine, groups, read_a, kind, k)
        else:
            left = _memory(machine, groups, read_a[0], (64, k), transposed_a, kind)
        flag = scaled(machine)
        counted = (
            np.full(len(groups), bool(flag)) if constant_scale else _same(machine, flag, groups)
        )
        machine.products.begin(accumulators, groups, counted.astype(bool), left, right)
        if machine.observer:
            machine.observer.product(instruction, 64, n, k, len(groups), read_bytes)

    return step


def _same(machine: Machine, value: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return a value that all lanes of a warpgroup share."""
    by_group = machine.spread(value).reshape(-1, GROUP)[groups]
    if (by_group != by_group[:, :1]).any():
        raise Fault("an operand of wgmma differs within a warpgroup")
    return by_group[:, 0]


def _memory(
    machine: Machine,
    groups: np.ndarray,
    read: Source,
    shape: tuple[int, int],
    transposed: bool,
    kind: str,
) -> _InMemory:
    """Return the matrix that a descriptor of each warpgroup names (section 9.7.15.5.1)."""
    descriptors = _same(machine, read(machine), groups).astype(np.uint64)
    size = _SIZES[kind]
    places = np.empty((len(groups), *shape), np.int64)
    for one in np.unique(descriptors):
        address = _addresses(int(one), shape, size, transposed)
        machine.shared.check(address, size)
        mine = descriptors == one
        first = machine.shared.first[groups[mine] * GROUP]
        places[mine] = first[:, None, None] + address
    return _InMemory(machine, groups, places, kind)


def _addresses(descriptor: int, shape: tuple[int, int], size: int, transposed: bool) -> np.ndarray:
    """Return the addresses of a matrix (rows, K), of which ``transposed`` has rows as neighbours.

    In units of 16 bytes: core matrices of 8 rows, whose next ones along both axes are ``leading``
    and ``stride`` bytes away.
    """
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    mode = descriptor >> 62
    if descriptor >> 49 & 7:
        raise Fault("wgmma: a base offset")
    row, column = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
    per_unit, width = 16 // size, _WIDTHS[mode]
    # `near` runs along neighbours in memory, `far` across them.
    near, far = (row, column) if transposed else (column, row)
    unit = near // per_unit
    offset = far % 8 * width * 16 + near % per_unit * size
    if transposed and mode:
        offset = offset + unit % width * 16 + unit // width * leading + far // 8 * stride
    elif transposed:
        offset = offset + unit * stride + far // 8 * leading
    elif mode:
        offset = offset + unit * 16 + far // 8 * stride
    else:
        offset = offset + unit * leading + far // 8 * stride
    return swizzled(start + offset, mode)
