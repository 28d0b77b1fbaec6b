"""How long one CTA takes by itself: the longest chain of instructions that wait for each other.

The model has no conflicts with other CTAs. The instructions of all warps are issued four a clock,
in order from one branch, barrier or wait to the next; between them, each starts when its operands
are there. Copies and products of warpgroups end some time after they were issued, in their order.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any, NamedTuple

from ptx.instruction_classes import FREE, class_of
from ptx.observer import Observer

REGISTER = re.compile(r"%[\w$]+")
SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")
WARPS_PER_CLOCK = 4
LONGEST_SPIN = 3  # instructions of a loop that waits for an mbarrier


class Latencies(NamedTuple):
    """Clocks from an instruction to the first that can use its result, and bytes in a clock."""

    arithmetic: int = 4
    special: int = 20
    exact_division: int = 40  # a sequence of instructions, as an exact square root
    shuffle: int = 24
    shared: int = 30
    memory: int = 600
    barrier: int = 20
    product_of_warp: int = 34
    product_of_warpgroup: int = 60  # until the first result, on top of the work
    port_bytes: int = 64  # from the L2 cache
    flop_16_bit: int = 4096  # of a multiprocessor in a clock


class _Decoded(NamedTuple):
    kind: str
    targets: tuple[str, ...]
    sources: tuple[str, ...]


class CriticalPath(Observer):
    """The clocks of one CTA: run the machine with a single one."""

    def __init__(self, latencies: Latencies | None = None) -> None:
        self.latencies = latencies or Latencies()
        self.clock = 0.0  # when the next instruction is issued
        self._started = 0.0  # when the last of those before has its operands
        self._ready: dict[str, float] = {}
        self._port = self._matrix = 0.0  # when they are free
        self._copies: deque[float] = deque()  # ends of the groups of copies
        self._open_copy = 0.0
        self._products: deque[float] = deque()
        self._bulk: deque[float] = deque()
        self._issued = 0
        self._tried = (-1, 0)  # the last look at an mbarrier: its place in the kernel, and when
        self._decoded: dict[int, _Decoded] = {}

    @property
    def clocks(self) -> float:
        """Clocks until all is issued and all results are there."""
        return max(self.clock, self._started, self._matrix, *self._ready.values(), 0.0)

    def start(self, kernel: Any, grid: Any, block: Any, shared: int, ctas: int) -> None:
        if ctas != 1:
            raise ValueError(f"expected a launch of one CTA, got {ctas}")

    def issued(self, instruction: Any, warps: int) -> None:
        decoded = self._decoded.get(instruction.index)
        if decoded is None:
            decoded = self._decoded[instruction.index] = _decode(instruction)
        self._issued += 1
        begin = max([self.clock, *(self._ready.get(r, 0.0) for r in decoded.sources)])
        if decoded.kind != FREE:
            self.clock += max(1.0, warps / WARPS_PER_CLOCK)
        if decoded.kind == "control":
            end = self._control(instruction, begin, warps)
        elif decoded.kind == "matrix":
            end = self._product(instruction, begin, warps)
        elif decoded.kind == "memory":
            end = self._memory(instruction, begin, warps)
        else:
            end = begin + self._arithmetic(instruction, decoded.kind)
        self._started = max(self._started, begin)
        for register in decoded.targets:
            self._ready[register] = end

    def _arithmetic(self, instruction: Any, kind: str) -> int:
        if kind == "special":
            exact = instruction.op in ("div", "sqrt", "rcp") and "rn" in instruction.modifiers
            return self.latencies.exact_division if exact else self.latencies.special
        if kind == "shuffle":
            return self.latencies.shuffle
        return 0 if kind == FREE else self.latencies.arithmetic

    def _control(self, instruction: Any, begin: float, warps: int) -> float:
        op, modifiers = instruction.op, instruction.modifiers
        if "commit_group" in modifiers:
            if op == "cp":
                self._copies.append(self._open_copy)
            else:
                self._products.append(self._matrix + self.latencies.product_of_warpgroup)
            return begin
        begin = max(begin, self._started)
        if "wait_group" in modifiers:
            groups = self._copies if op == "cp" else self._products
            left = int(re.findall(r"\d+", instruction.text.split("wait_group")[1])[0])
            while len(groups) > left:
                begin = max(begin, groups.popleft())
        elif op == "mbarrier" and "try_wait" in modifiers:
            if self._bulk and not self._looks_again(instruction):
                begin = max(begin, self._bulk.popleft())
        elif op == "mbarrier" and "expect_tx" in modifiers:
            self._bulk.append(begin)
            self._tried = (-1, 0)
        elif op in ("bar", "barrier"):
            begin += self.latencies.barrier
        self.clock = max(self.clock, begin)
        return begin + self.latencies.arithmetic

    def _looks_again(self, instruction: Any) -> bool:
        """Return whether a loop around this one instruction has not found its copy yet."""
        place, when = self._tried
        self._tried = (instruction.index, self._issued)
        return place == instruction.index and self._issued - when <= LONGEST_SPIN

    def _product(self, instruction: Any, begin: float, warps: int) -> float:
        m, n, k = map(int, SHAPE.search(instruction.text).groups())
        groups = warps / 4 if instruction.op == "wgmma" else warps
        rate = self.latencies.flop_16_bit / (2 if "tf32" in instruction.modifiers else 1)
        self._matrix = max(self._matrix, begin) + 2 * m * n * k * groups / rate
        if instruction.op == "wgmma":
            return begin  # whoever reads the result waits for its group
        return self._matrix + self.latencies.product_of_warp

    def _memory(self, instruction: Any, begin: float, warps: int) -> float:
        if "shared" in instruction.modifiers or instruction.op.endswith("matrix"):
            if instruction.op != "cp":
                return begin + self.latencies.shared
        if "bulk" in instruction.modifiers:
            return begin  # its bytes are those of bulk_copy
        end = self._through_port(begin, 32 * _bytes_of_lane(instruction) * warps)
        if instruction.op == "cp":
            self._open_copy = end
        return end

    def bulk_copy(self, instruction: Any, addresses: Any, size: int, count: int) -> None:
        end = self._through_port(self.clock, len(addresses) * size)
        if self._bulk:
            self._bulk[-1] = max(self._bulk[-1], end)

    def _through_port(self, begin: float, size: int) -> float:
        """Return when these bytes have arrived."""
        self._port = max(self._port, begin) + size / self.latencies.port_bytes
        return self._port + self.latencies.memory


def _bytes_of_lane(instruction: Any) -> int:
    """Return the bytes that a lane loads, stores or copies."""
    if instruction.op == "cp":
        sizes = re.findall(r",\s*(\d+)", instruction.text)
        return int(sizes[0]) if sizes else 0
    vector = next((int(m[1:]) for m in instruction.modifiers if re.fullmatch(r"v\d", m)), 1)
    bits = re.search(r"\d+$", instruction.modifiers[-1])
    return vector * int(bits[0]) // 8 if bits else 4


def _decode(instruction: Any) -> _Decoded:
    """Return the class of an instruction, and the registers that it writes and reads."""
    text = instruction.text.rstrip("; ")
    guard = re.match(r"@!?(%\w+)\s+", text)
    operands = text[guard.end() :] if guard else text
    operands = operands.partition(" ")[2]
    depth, end = 0, len(operands)
    for at, sign in enumerate(operands):
        depth += (sign in "{[(") - (sign in "}])")
        if sign == "," and depth == 0:
            end = at
            break
    first, rest = operands[:end], operands[end:]
    kind = class_of(instruction.op, instruction.modifiers)
    written = REGISTER.findall(first)
    sources = REGISTER.findall(rest) + ([guard[1]] if guard else [])
    if kind == "control" or instruction.op in ("st", "stmatrix", "red", "cp"):
        if "try_wait" not in instruction.modifiers:
            sources, written = written + sources, []
    elif instruction.op == "wgmma":  # accumulators: whoever reads them waits for the group
        written = []
    return _Decoded(kind, tuple(written), tuple(sources))
